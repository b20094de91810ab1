"""An exported checkpoint read by other programs: the log-probabilities that transformers gives, within 1e-3, in fp32.

``make interop`` installs them beside the test environment and fetches SmolLM2-135M; without that these tests are
skipped. llama.cpp runs as the package ``xllamacpp``, through its own converter.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = Path(os.environ.get("HIFT_INTEROP", ROOT / ".interop"))
WITHIN = 1e-3
TEXT = "To sort a list in place, call its method sort(); sorted() returns a new list and takes any iterable."


@pytest.fixture(scope="module")
def programs():
    if not PROGRAMS.is_dir():
        pytest.skip("make interop installs llama.cpp, CTranslate2 and lm-eval")
    sys.path.append(str(PROGRAMS))  # after the environment's own
    yield PROGRAMS
    sys.path.remove(str(PROGRAMS))


@pytest.fixture(scope="module")
def exported(programs, tmp_path_factory) -> Path:
    """SmolLM2-135M after three steps of ``hift-ds train`` in fp32, as ``hift-ds export`` gives it."""
    from examples.demo.fetch_model import fetch_model

    folder = tmp_path_factory.mktemp("interop")
    model = fetch_model(os.environ.get("HIFT_SMOLLM2") or programs / "smollm2")
    rows = [{"prompt": f"What is {i} + {i}?", "completion": f"{i + i}, the double of {i}."} for i in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = {
        "model": {"path": str(model), "dtype": "fp32"},
        "data": {"train": str(folder / "rows.jsonl"), "max_length": 64},
        "train": {
            "output_dir": str(folder / "run"), "max_steps": 3, "micro_batch_size": 2, "learning_rate": 1e-4,
        },
        "hift": {"group_size": 11},
    }  # fmt: skip
    (folder / "run.yaml").write_text(json.dumps(run))  # JSON is YAML
    for command in (["train", folder / "run.yaml"], ["export", folder / "run", folder / "out"]):
        subprocess.run([sys.executable, "-m", "hift_ds", *map(str, command)], check=True, cwd=ROOT)
    return folder / "out"


@pytest.fixture(scope="module")
def expected(exported) -> tuple[list[int], torch.Tensor]:
    """Token ids of ``TEXT``, and transformers' log-probabilities of every next token: [tokens, vocabulary]."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(exported)(TEXT)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return ids, model(torch.tensor([ids])).logits[0].log_softmax(-1)


def test_the_export_is_not_the_model_that_was_fine_tuned(exported, expected, programs):
    """Else the comparisons below would show nothing about training."""
    from transformers import AutoModelForCausalLM

    first = os.environ.get("HIFT_SMOLLM2") or programs / "smollm2"
    model = AutoModelForCausalLM.from_pretrained(first, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        before = model(torch.tensor([expected[0]])).logits[0].log_softmax(-1)
    assert float((before - expected[1]).abs().max()) > 10 * WITHIN


def test_llama_cpp(exported, expected, programs, tmp_path):
    """Its converter, its tokenizer (as many ids, and the same next token), its log-probabilities of the ten likeliest
    tokens at every place."""
    ids, log_probs = expected
    gguf = tmp_path / "model.gguf"
    convert = [str(programs / "convert_hf_to_gguf.py"), str(exported), "--outtype", "f32", "--outfile", str(gguf)]
    converted = subprocess.run(
        [sys.executable, *convert],
        env={**os.environ, "PYTHONPATH": str(programs)}, capture_output=True, text=True,
    )  # fmt: skip
    assert converted.returncode == 0, converted.stderr[-2000:]
    # A process of its own: llama.cpp and torch each bring their OpenMP.
    job = subprocess.run(
        [sys.executable, "-c", LLAMA_CPP, str(gguf), json.dumps(ids), TEXT],
        env={**os.environ, "PYTHONPATH": str(programs)}, capture_output=True, text=True,
    )  # fmt: skip
    assert job.returncode == 0, job.stderr[-2000:]
    answer = json.loads(job.stdout.splitlines()[-1])
    assert answer["num_tokens"] == len(ids)
    assert [token for token, _ in answer["after_text"]] == [token for token, _ in answer["likeliest"][-1]]
    worst = 0.0
    for place, likeliest in enumerate(answer["likeliest"]):
        assert len(likeliest) == 10
        for token, log_prob in likeliest:
            worst = max(worst, abs(log_prob - float(log_probs[place, token])))
    print(f"llama.cpp: {worst:.1e}")
    assert worst < WITHIN


LLAMA_CPP = """
import json, sys
import xllamacpp as xl
params = xl.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx, params.n_gpu_layers, params.n_parallel, params.warmup = 256, 0, 1, False
params.cache_type_k = params.cache_type_v = xl.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xl.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xl.Server(params)
ids = json.loads(sys.argv[2])


def ask(prompt):
    asked = {"prompt": prompt, "n_predict": 1, "temperature": 0.0, "n_probs": 10, "cache_prompt": False}
    done = server.handle_completions(asked)
    place = done["choices"][0]["logprobs"]["content"][0]
    return done["usage"]["prompt_tokens"], [(one["id"], one["logprob"]) for one in place["top_logprobs"]]


likeliest = [ask(ids[:end])[1] for end in range(1, len(ids) + 1)]
num_tokens, after_text = ask(sys.argv[3])
print(json.dumps({"likeliest": likeliest, "num_tokens": num_tokens, "after_text": after_text}))
"""


def test_ctranslate2(exported, expected, tmp_path):
    """The log-probability of every token of the text."""
    import ctranslate2
    from transformers import AutoTokenizer

    ids, log_probs = expected
    converter = ctranslate2.converters.TransformersConverter(str(exported))
    folder = converter.convert(str(tmp_path / "ct2"), quantization="float32")
    tokens = AutoTokenizer.from_pretrained(exported).convert_ids_to_tokens(ids)
    generator = ctranslate2.Generator(folder, device="cpu", compute_type="float32")
    (scored,) = generator.score_batch([tokens])
    theirs = torch.tensor(scored.log_probs)
    ours = log_probs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    print(f"CTranslate2: {float((theirs - ours).abs().max()):.1e}")
    assert len(theirs) == len(ours)
    assert float((theirs - ours).abs().max()) < WITHIN


def write_local_task(folder: Path) -> None:
    """``local_text`` for lm-eval: the perplexity of ``TEXT``."""
    (folder / "text.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    (folder / "task.yaml").write_text(
        json.dumps(
            {
                "task": "local_text", "dataset_path": "json", "test_split": "test",
                "dataset_kwargs": {"data_files": {"test": str(folder / "text.jsonl")}},
                "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
                "metric_list": [{"metric": "byte_perplexity"}],
            }
        )
    )  # fmt: skip


def test_lm_eval_on_a_local_task(exported, expected, tmp_path):
    """Perplexity of a text, by a task file of one's own: the sum of the log-probabilities, and nothing else."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    write_local_task(tmp_path)
    model = HFLM(pretrained=str(exported), dtype="float32", device="cpu", batch_size=1)
    found = lm_eval.simple_evaluate(
        model=model, tasks=["local_text"], task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False)
    )
    check_perplexity(found["results"]["local_text"]["byte_perplexity,none"], exported, expected[0])


def test_the_eval_verb_on_a_local_task(exported, expected, programs, tmp_path):
    write_local_task(tmp_path)
    verb = [
        "eval",
        str(exported),
        "--tasks",
        "local_text",
        "--include-path",
        str(tmp_path),
        "--dtype",
        "fp32",
        "--json",
    ]
    job = subprocess.run(
        [sys.executable, "-m", "hift_ds", *verb], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(programs)},
    )  # fmt: skip
    assert job.returncode == 0, job.stderr[-2000:]
    check_perplexity(json.loads(job.stdout)["local_text"]["byte_perplexity,none"], exported, expected[0])
    unknown = subprocess.run(
        [sys.executable, "-m", "hift_ds", "eval", str(exported), "--tasks", "no_such_task"], cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(programs)}, capture_output=True, text=True,
    )  # fmt: skip
    assert unknown.returncode == 2 and "--tasks: lm-eval has no no_such_task" in unknown.stderr


def check_perplexity(byte_perplexity: float, exported: Path, ids: list[int]) -> None:
    """It is transformers' of the same tokens."""
    theirs = math.log(byte_perplexity) * -len(TEXT.encode())
    # lm-eval puts the text's first token after the end-of-text token.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    start = AutoTokenizer.from_pretrained(exported)
    start = start.bos_token_id if start.bos_token_id is not None else start.eos_token_id
    whole = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    with torch.no_grad():
        ours = whole(torch.tensor([[start, *ids]])).logits[0, :-1].log_softmax(-1)
    ours = float(ours.gather(1, torch.tensor(ids)[:, None]).sum())
    print(f"lm-eval: {abs(theirs - ours) / len(ids):.1e} a token")
    assert abs(theirs - ours) / len(ids) < WITHIN
