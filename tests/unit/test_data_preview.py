import io
import json

import pytest
from rich.console import Console

from hift_ds.cli import main as cli
from hift_ds.data.config import DataConfig
from hift_ds.data.preview import BEGIN, END, marked, show_samples, show_totals
from tests.helpers.tiny_tokenizers import LLAMA_LIKE, byte_level, sentencepiece_folder

MESSAGES = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello [you]"},
]


def shown(config, tokenizer, max_length=200, num_samples=3, **options):
    out = io.StringIO()
    show_samples(config, tokenizer, max_length, Console(file=out, width=100, **options), num_samples)
    return out.getvalue()


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "a.jsonl"
    rows = [{"messages": MESSAGES}] * 2 + [{"broken": 1}]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return DataConfig(train=str(file))


def test_learned_text_is_in_brackets_where_there_is_no_colour(config):
    text = shown(config, byte_level(), num_samples=2)  # the third, broken row is not reached
    assert f"<|im_start|>assistant\n{BEGIN}Hello [you]<|im_end|>{END}\n" in text
    assert text.count(BEGIN) == 3 and "line 1   messages   " in text and "12 learned" in text


def test_learned_text_is_green_on_a_terminal(config):
    text = shown(config, byte_level(), num_samples=1, force_terminal=True, color_system="standard")
    assert "\x1b[1;32mHello [you]<|im_end|>\x1b[0m" in text and BEGIN not in text


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252"])
def test_a_terminal_that_lacks_the_characters_gets_marks_and_escapes_that_it_has(tmp_path, encoding):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"prompt": "你", "completion": "é🙂"}))
    out = io.BytesIO()
    terminal = io.TextIOWrapper(out, encoding=encoding)
    show_samples(DataConfig(train=str(file)), byte_level(), 200, Console(file=terminal, width=100), 1)
    terminal.flush()
    answer = {"ascii": r"\xe9\U0001f642"}.get(encoding, r"é\U0001f642")
    assert rf"\u4f60[[{answer}<|im_end|>]]" in out.getvalue().decode(encoding)


def test_no_command_fails_at_a_character(tmp_path):
    """In a process of its own, whose standard output is Latin-1."""
    import os
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "hift_ds", "preview", str(tmp_path / "你.yaml")],
        env={**os.environ, "PYTHONIOENCODING": "latin-1"}, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 2 and rb"\u4f60.yaml" in done.stderr and b"Traceback" not in done.stderr
    for module, words in (("hift_ds.cli.main", ["--version"]), ("hift_ds.train.worker", ["nowhere.yaml"])):
        code = f"from {module} import main; main({words!r}); print('你')"
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONIOENCODING": "latin-1"}, capture_output=True
        )
        assert done.returncode == 0 and rb"\u4f60" in done.stdout, module


def test_totals_of_each_source(tmp_path):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    rows = [{"prompt": "p" * 6, "completion": "c" * count} for count in (3, 9, 0)] + [
        {"prompt": "p" * 20, "completion": "c"}
    ]
    first.write_text("\n".join(map(json.dumps, rows)))
    second.write_text("\n".join(json.dumps({"question": "q", "answer": str(i)}) for i in range(5)))
    out = io.StringIO()
    config = DataConfig(train=[str(first), str(second)], max_length=12)
    show_totals(config, byte_level(), 12, Console(file=out, width=4000), 4)
    one, two = out.getvalue().splitlines()[1:]
    assert f"{first}: 3 samples of 4 rows; 29 tokens, 38% of them learned; longest 12; 1 cut to" in one
    assert "12 (4 tokens lost); 1 dropped" in one and "; the first 4 rows; in 1 samples an answer is empty" in one
    assert "0 samples of 4 rows" in two and "columns question, answer read as instruction, output" in two


def test_what_is_dropped_says_so(config):
    text = shown(config, byte_level(), max_length=20, num_samples=1)
    assert "dropped: nothing to learn within 20 tokens" in text


def test_marks_do_not_lose_the_spaces_of_sentencepiece(tmp_path):
    from hift_ds.data.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(sentencepiece_folder(tmp_path, **LLAMA_LIKE))
    ids = tokenizer("Hello there you", add_special_tokens=False).input_ids
    boundary = ids.index(tokenizer.convert_tokens_to_ids("▁you")) if "▁you" in tokenizer.get_vocab() else len(ids) // 2
    labels = [-100] * boundary + ids[boundary:]
    text = marked(tokenizer, ids, labels, colour=False).plain
    assert text.replace(BEGIN, "").replace(END, "") == "Hello there you"


def test_the_command(tmp_path, config, capsys):
    byte_level().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 90}))
    run_file = tmp_path / "run.yaml"
    run_file.write_text(
        f"model: {{path: {tmp_path / 'model'}}}\ndata: {{train: {config.train}}}\ntrain: {{output_dir: out}}\n"
    )
    assert cli.main(["preview", str(run_file), "-n", "1", "data.max_length=80"]) == 0
    printed = capsys.readouterr().out
    assert f"{BEGIN}Hello [you]<|im_end|>{END}" in printed
    assert "a.jsonl, line 3: no 'messages'" in " ".join(printed.split())  # what the totals come upon
    assert cli.main(["preview", str(run_file), "data.max_length=91"]) == 2
    assert "data.max_length: 91 is longer than the 90 positions" in capsys.readouterr().err
    assert cli.main(["preview", str(run_file), "-n", "9"]) == 2
    assert "a.jsonl, line 3: no 'messages'" in capsys.readouterr().err
