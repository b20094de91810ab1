"""What is done with a finished run: chat, eval, predict, against plain transformers."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import model_zoo
from hift_ds.cli.chat import Chat
from hift_ds.cli.main import main
from hift_ds.data.encoding import Encoder
from hift_ds.data.formats import to_sample
from hift_ds.data.packing import IGNORED
from hift_ds.data.sources import parse_sources
from hift_ds.errors import ConfigError, DataError
from hift_ds.report.model_card import model_card
from hift_ds.report.run_summary import read_run
from hift_ds.train.after_training import closing_lines
from hift_ds.train.finetune import finetune
from hift_ds.train.predict import predict
from hift_ds.train.run_config import load_run_config
from hift_ds.train.trained_model import TrainedModel, find_trained, generation_options
from tests.unit.test_launch import ROOT, inputs, own_cache, write_run  # noqa: F401  (fixtures)


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory) -> Path:  # noqa: F811
    """A run in fp32 whose model has learned to end its answers."""
    folder = tmp_path_factory.mktemp("after")
    out = folder / "run"
    rows = [
        {"messages": [{"role": "user", "content": f"{i} + 1?"}, {"role": "assistant", "content": f"It is {i}, and 1."}]}
        for i in range(60)
    ]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    file = write_run(
        inputs, out, data__train=str(folder / "data.jsonl"), train__max_steps=90, train__eval_steps=90,
        train__save_steps=90, train__learning_rate=2e-2, train__lr_scheduler="constant",
        deepspeed=str(ROOT / "ds_configs" / "fp32_host.json"), hift={"group_size": "all"},
    )  # fmt: skip
    finetune(load_run_config(file))
    return out


QUESTIONS = [
    {"messages": [{"role": "user", "content": text}]} for text in ("3 + 1?", "What of 12345678 + 1, then?", "4?")
]


def ask(trained: TrainedModel, messages: list[dict], new: int = 24) -> str:
    """By transformers alone, one at a time."""
    model = AutoModelForCausalLM.from_pretrained(trained.folder, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(trained.folder)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    out = model.generate(**ids, max_new_tokens=new, do_sample=False, eos_token_id=end, pad_token_id=0)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


# -- eval ------------------------------------------------------------------------------------------------------


def test_the_held_out_loss_is_the_runs_own_and_transformers(finished, capsys):
    assert main(["eval", str(finished), "--json", "--batch-size", "3"]) == 0
    found = json.loads(capsys.readouterr().out)
    results = json.loads((finished / "all_results.json").read_text())
    assert found["loss"] == pytest.approx(results["eval_loss"], rel=1e-5)
    assert found["tokens"] == results["eval_tokens"] and found["samples"] == 4
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert main(["eval", str(finished)]) == 0
    assert f"loss {found['loss']:.4f}, perplexity {found['perplexity']:,.2f}" in capsys.readouterr().out


def test_other_rows_and_a_model_alone(finished, inputs, tmp_path, capsys):  # noqa: F811
    """Every row alone through transformers; a mean over tokens, not over rows."""
    data = tmp_path / "other.jsonl"
    rows = [json.loads(line) for line in (inputs / "data.jsonl").read_text().splitlines()[:7]]
    data.write_text("\n".join(map(json.dumps, rows)))
    model = AutoModelForCausalLM.from_pretrained(finished / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    total = tokens = 0
    for row in rows:
        [encoded] = Encoder(tokenizer)(to_sample(row, "messages", "row"), "row")
        labels = [i if flag else IGNORED for i, flag in zip(encoded.ids, encoded.learned, strict=True)]
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([encoded.ids]), labels=torch.tensor([labels])).loss
        total, tokens = total + float(loss) * sum(encoded.learned), tokens + sum(encoded.learned)
    for where in (finished, finished / "model"):
        assert main(["eval", str(where), "--data", str(data), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["loss"] == pytest.approx(total / tokens, rel=1e-5) and found["tokens"] == tokens


def test_what_cannot_be_evaluated_is_one_line(finished, inputs, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    cases = {
        ("eval", str(tmp_path / "none")): "no such folder; expected the folder of a run",
        ("eval", str(tmp_path)): "neither a run.yaml of a run nor a config.json",
        ("eval", str(inputs / "model")): "give --data FILE",
        ("eval", str(finished), "--tasks", "hellaswag"): "pip install lm-eval",
        ("eval", str(finished), "--batch-size", "0"): "--batch-size: expected at least 1, got 0",
        (
            "predict",
            str(finished),
            "--data",
            str(inputs / "data.jsonl"),
            "-o",
            str(inputs / "data.jsonl"),
        ): "name another",
        ("predict", str(finished), "--data", "none.jsonl", "-o", "out"): "no such file or folder: 'none.jsonl'",
        ("chat", str(finished), "--plain", "--system", "x"): "--system with --plain",
        ("chat", str(finished), "--device", "nonsense:1"): "--device: torch cannot use 'nonsense:1' here (",
        ("chat", str(finished), "--max-new-tokens", "0"): "--max-new-tokens: expected at least 1, got 0",
        ("eval", str(finished), "--device", "cuda:99"): "--device: torch cannot use 'cuda:99' here (",
        ("preview", str(finished / "run.yaml"), "-n", "-1"): "--num-samples: expected at least 0, got -1",
    }
    for arguments, expected in cases.items():
        assert main(list(arguments)) == 2
        err = capsys.readouterr().err
        assert expected in err and err.count("\n") == 1, err


def test_benchmarks_whose_data_are_not_here_are_one_line(finished, capsys, monkeypatch):
    class TaskManager:
        def __init__(self, include_path):
            pass

        def match_tasks(self, names):
            return names

    def unreachable(**_):
        raise ConnectionError("Couldn't reach 'owner/data' on the Hub")

    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace(simple_evaluate=unreachable))
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", SimpleNamespace(TaskManager=TaskManager))
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: name == "lm_eval" or find(name, *rest))
    assert main(["eval", str(finished), "--tasks", "hellaswag"]) == 2
    err = capsys.readouterr().err
    assert "--tasks: the data of hellaswag are not to be had (Couldn't reach 'owner/data' on the Hub); fetch" in err
    assert "Traceback" not in err


def test_a_run_that_has_not_ended_or_was_moved(finished, inputs, tmp_path):  # noqa: F811
    (tmp_path / "run.yaml").write_text((finished / "run.yaml").read_text().replace(str(finished), str(tmp_path)))
    with pytest.raises(Exception, match="has not exported its model"):
        find_trained(tmp_path)
    (tmp_path / "run.yaml").write_text((finished / "run.yaml").read_text().replace(str(finished), "gone"))
    (tmp_path / "model").symlink_to(finished / "model")
    assert find_trained(tmp_path).folder == tmp_path / "model"
    other = model_zoo.tiny.build("llama", "sequence_classification", vocab_size=280)
    other.save_pretrained(tmp_path / "classifier")
    AutoTokenizer.from_pretrained(finished / "model").save_pretrained(tmp_path / "classifier")
    with pytest.raises(ConfigError, match="LlamaForSequenceClassification, which does not write text"):
        TrainedModel(tmp_path / "classifier").load()


def test_a_model_of_the_hub_and_its_code(finished, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda name, allow_patterns: asked.append((name, "*.py" in allow_patterns)) or str(finished / "model"),
    )
    assert find_trained("hub:me/mine").folder == finished / "model" and not find_trained("hub:me/mine").trusts_its_code
    assert find_trained("hub:me/mine", trust_remote_code=True).trusts_its_code
    assert find_trained(finished, trust_remote_code=True).trusts_its_code and not find_trained(finished).trusts_its_code
    assert asked == [("me/mine", False), ("me/mine", False), ("me/mine", True)]
    assert main(["eval", "me/mine"]) == 2
    assert "no such folder" in (line := capsys.readouterr().err) and "hub:owner/name" in line and len(asked) == 3


def test_the_last_lines_say_what_came_of_it_and_what_to_type(finished):
    run = load_run_config(finished / "run.yaml")
    results = json.loads((finished / "all_results.json").read_text())
    first, page, second = closing_lines(run, results)
    assert first.startswith(
        f"held-out loss {results['eval_loss_before']:.4f} -> {results['eval_loss']:.4f}, perplexity "
    )
    assert second == f"next: hift-ds chat {finished}    hift-ds eval {finished}"
    assert page == f"report: {finished / 'report.html'}" and (finished / "report.html").is_file()
    assert closing_lines(run, {}) == [page, second]


# -- predict -------------------------------------------------------------------------------------------------


def test_answers_in_batches_are_those_of_transformers_one_by_one(finished, tmp_path, capsys):
    data, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    data.write_text("\n".join(map(json.dumps, QUESTIONS)))
    arguments = ["predict", str(finished), "--data", str(data), "-o", str(out), "--max-new-tokens", "24"]
    assert main(arguments) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["messages"] for row in rows] == [row["messages"] for row in QUESTIONS]  # in their order
    expected = [ask(find_trained(finished), row["messages"]).strip() for row in QUESTIONS]
    assert [row["prediction"] for row in rows] == expected
    assert len(set(expected)) > 1, expected
    assert main([*arguments, "--batch-size", "1"]) == 0
    assert [json.loads(line)["prediction"] for line in out.read_text().splitlines()] == expected
    assert "3 answers in" in capsys.readouterr().out


def test_padding_and_batches_change_nothing(finished, tmp_path):
    """On a model without sense, which every wrong position or unmasked pad would lead elsewhere."""
    model = model_zoo.tiny.build("llama", vocab_size=280, max_position_embeddings=256, initializer_range=0.4).eval()
    _, tokenizer = find_trained(finished).load(device="cpu")
    data = tmp_path / "in.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": "ab" * n}) for n in (1, 9, 4, 15, 2)))
    [source] = parse_sources(str(data), "--data")
    answers = [
        [row["prediction"] for row in predict(model, tokenizer, source, batch_size=size, max_new_tokens=12)]
        for size in (1, 2, 5)
    ]
    expected = []
    for n in (1, 9, 4, 15, 2):
        ids = tokenizer("ab" * n, return_tensors="pt").input_ids
        out = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=0)
        expected.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip())
    assert len(set(expected)) == 5 and answers == 3 * [expected]


def test_a_prompt_is_what_stood_before_the_answer_in_training():
    from tests.helpers.tiny_tokenizers import byte_level

    encoder = Encoder(byte_level(bos=True))
    rows = [
        ("messages", {"messages": [*QUESTIONS[0]["messages"], {"role": "assistant", "content": "Four."}]}),
        ("alpaca", {"instruction": "Add", "input": "3, 1", "output": "4", "system": "Short."}),
        ("prompt_completion", {"prompt": "3 + 1 =", "completion": " 4"}),
    ]
    for format, row in rows:
        sample = to_sample(row, format, "row")
        [learned] = encoder(sample, "row")
        assert encoder.prompt_ids(sample, "row") == learned.ids[: learned.learned.index(True)]
    with pytest.raises(DataError, match="only an answer"):
        encoder.prompt_ids(to_sample({"messages": [{"role": "assistant", "content": "x"}]}, "messages", "row"), "row")


def test_questions_need_no_answers(finished, tmp_path):
    data, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    for row in ({"instruction": "3 + 1?"}, {"prompt": [{"role": "user", "content": "3 + 1?"}]}, {"prompt": "3 + 1?"}):
        data.write_text(json.dumps(row))
        assert main(["predict", str(finished), "--data", str(data), "-o", str(out), "--max-new-tokens", "24"]) == 0
        answer = json.loads(out.read_text())["prediction"]
        if row != {"prompt": "3 + 1?"}:  # a text, which is gone on with, without a template
            assert answer == ask(find_trained(finished), QUESTIONS[0]["messages"]).strip()


def test_a_row_without_room_for_an_answer_is_named(finished, tmp_path, capsys):
    data = tmp_path / "in.jsonl"
    data.write_text(json.dumps({"prompt": "x" * 250, "completion": ""}))
    assert (
        main(["predict", str(finished), "--data", str(data), "-o", str(tmp_path / "o"), "--max-new-tokens", "9"]) == 2
    )
    assert (
        "in.jsonl, line 1: 250 tokens and 9 new ones are more than the model's 256 positions" in capsys.readouterr().err
    )


# -- chat ----------------------------------------------------------------------------------------------------


def test_a_conversation_through_a_pipe(finished, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("3 + 1?\n5 + 1?\n/reset\n5 + 1?\n"))
    assert main(["chat", str(finished), "--temperature", "0", "--max-new-tokens", "24"]) == 0
    first, second, anew = capsys.readouterr().out.splitlines()
    trained, said = find_trained(finished), []
    for question, answer in (("3 + 1?", first), ("5 + 1?", second)):  # it sees what was said before
        said.append({"role": "user", "content": question})
        assert answer == ask(trained, said)
        said.append({"role": "assistant", "content": answer})
    assert anew == ask(trained, [{"role": "user", "content": "5 + 1?"}])


def test_system_plain_and_no_room(finished):
    model, tokenizer = find_trained(finished).load(device="cpu")
    pieces: list[str] = []
    chat = Chat(model, tokenizer, system="Shout.", temperature=0.0, max_new_tokens=12)
    assert chat.answer("4?", pieces.append) == "".join(pieces)
    asked = [{"role": "system", "content": "Shout."}, {"role": "user", "content": "4?"}]
    assert chat.messages == [*asked, {"role": "assistant", "content": ask(find_trained(finished), asked, new=12)}]
    plain = Chat(model, tokenizer, plain=True, temperature=0.0, max_new_tokens=5)
    ids = tokenizer("It is", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=5, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    assert plain.answer("It is", pieces.append) == tokenizer.decode(out[0, 5:], skip_special_tokens=True)
    with pytest.raises(ConfigError, match="256 positions; /reset"):
        plain.answer("x" * 300, pieces.append)
    model.generate = lambda **options: 1 / 0  # an error in the thread is not lost
    with pytest.raises(ZeroDivisionError):
        plain.answer("x", pieces.append)


def test_what_ends_an_answer_and_how_it_is_drawn(finished):
    model, tokenizer = find_trained(finished).load(device="cpu")
    assert generation_options(model, tokenizer, 0.0)["do_sample"] is False
    assert generation_options(model, tokenizer, 0.5)["temperature"] == 0.5
    assert "do_sample" not in generation_options(model, tokenizer, None)
    model.generation_config.eos_token_id = 7  # a chat template may have brought another end
    assert generation_options(model, tokenizer, None)["eos_token_id"] == [7, tokenizer.eos_token_id]


# -- the model card ------------------------------------------------------------------------------------------


def test_the_card_says_what_the_run_was(finished, inputs, tmp_path):  # noqa: F811
    from huggingface_hub import ModelCard

    text = (finished / "model" / "README.md").read_text()
    card, results = ModelCard(text), json.loads((finished / "all_results.json").read_text())
    assert card.data.library_name == "transformers" and "hift_ds" in card.data.tags
    assert f"| held-out loss | {results['eval_loss_before']:,.4g} | {results['eval_loss']:,.4g} |" in text
    assert "apply_chat_template" in text and "data.jsonl: 56 samples" in text
    assert "tensors were updated in 90 steps, 90 times each" in text
    assert results["environment"]["torch"] == torch.__version__ and f"torch {torch.__version__}" in text
    for private in (str(finished.parent), str(inputs), "/tmp"):
        assert private not in text
    code = re.search(r"```python\n(.*?)```", text, re.S)[1].replace("FOLDER_OR_REPO", str(finished / "model"))
    exec(code, {})


def test_a_card_of_ones_own_stays(finished, tmp_path):
    out = tmp_path / "out"
    assert main(["export", str(finished), str(out)]) == 0
    assert (out / "README.md").read_text() == (finished / "model" / "README.md").read_text()
    (out / "README.md").write_text("# Mine")
    assert main(["export", str(finished), str(out)]) == 0
    assert (out / "README.md").read_text() == "# Mine"


def test_hub_names_and_full_fine_tuning_in_a_card(finished):
    run = read_run(finished)
    data = {"train": ["hub:owner/questions", {"path": "/home/me/b.jsonl", "weight": 2}]}
    settings = {"model": {"path": "owner/base"}, "data": data}
    text = model_card(dataclasses.replace(run, settings=settings, deepspeed={}, groups=[], results={}, coverage={}))
    assert "base_model: owner/base" in text and "- owner/questions" in text
    assert "hub:owner/questions; b.jsonl, weight 2" in text and "/home/me" not in text
    assert "in every optimizer step" in text and "Every trainable weight was updated in every step." in text
    block = {"update": "in_backward", "clipping": "per_part"}
    deepspeed = {"gradient_clipping": 1.0, "hift": block}
    text = model_card(dataclasses.replace(run, deepspeed=deepspeed))
    assert '| gradient clipping | 1.0 (`"clipping": "per_part"`) |' in text
