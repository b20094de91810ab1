"""Every way data can lie on a disk, and every way it can be wrong."""

from __future__ import annotations

import hashlib
import itertools
import json
import socket
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset

from hift_ds.data.rows import guessed, iterate_rows, load_mixture, load_rows, mix
from hift_ds.data.sources import Source, check_source, parse_sources, resolve
from hift_ds.errors import ConfigError, DataError

ROWS = [{"prompt": "2020-01-01", "completion": "007"}, {"prompt": "null", "completion": "1e5"}]
LINES = "\n".join(json.dumps(row) for row in ROWS)


@pytest.fixture(autouse=True)
def private_cache_and_no_network(tmp_path_factory, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("local data reached for the network")

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    datasets.disable_progress_bars()


def read(path: Path, **options: Any) -> list[dict[str, Any]]:
    return [json.loads(row["row"]) for row in iterate_rows(Source("data.train", str(path), **options))]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_texts_that_look_like_dates_and_numbers_stay_texts(tmp_path):
    assert read(write(tmp_path / "a.jsonl", LINES)) == ROWS
    assert read(write(tmp_path / "a.json", json.dumps(ROWS, indent=1))) == ROWS
    assert read(write(tmp_path / "lines.json", LINES)) == ROWS  # the content decides, not the name
    assert read(write(tmp_path / "bom.jsonl", "\ufeff" + LINES + "\n\n")) == ROWS
    assert read(write(tmp_path / "a.csv", "prompt,completion\n2020-01-01,007\nnull,1e5\n")) == ROWS
    assert read(write(tmp_path / "a.tsv", "prompt\tcompletion\n2020-01-01\t007\nnull\t1e5\n")) == ROWS
    Dataset.from_list(ROWS).to_parquet(str(tmp_path / "a.parquet"))
    assert read(tmp_path / "a.parquet") == ROWS
    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    assert read(tmp_path / "saved") == ROWS


def test_csv_fields_with_newlines_and_long_documents(tmp_path):
    long = "x" * 200_000
    file = write(tmp_path / "a.csv", f'text\n"one\ntwo, ""three"""\n{long}\n')
    assert read(file) == [{"text": 'one\ntwo, "three"'}, {"text": long}]


def test_rows_know_where_they_come_from(tmp_path):
    file = write(tmp_path / "a.jsonl", "\n" + LINES)
    rows = list(iterate_rows(Source("data.train", str(file))))
    assert [row["origin"] for row in rows] == [f"{file}, line 2", f"{file}, line 3"]
    assert {row["format"] for row in rows} == {"prompt_completion"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "a.jsonl, line 2: not valid JSON"),
        ("a.json", '[{"text": "a"},\n {"text" "b"}]', "a.json, line 2: not valid JSON"),
        (
            "a.jsonl",
            '{"text": "a"}\n["b"]\n',
            "a.jsonl, line 2: expected an object with named columns, got list",
        ),
        ("a.json", '[{"text": "a"}, 5]', "a.json, row 2: expected an object with named columns, got int"),
        ("a.jsonl", "", "data.train: no rows in"),
        ("a.json", "[]", "data.train: no rows in"),
        ("a.csv", "text,more\n", "data.train: no rows in"),
        ("a.csv", "text,more\na,b\nc\n", "a.csv, line 3: expected 2 fields as in the first line"),
        ("a.csv", 'text\n"a\n', "a.csv, line 1: not valid CSV"),
        ("a.jsonl", '{"question": "a"}\n', "a.jsonl, line 1: no known format has the columns question"),
        ("a.parquet", "not parquet", "cannot read .*a.parquet' as parquet"),
        ("a.docx", "x", "unknown kind of file '.docx'; expected one of .jsonl"),
    ],
)
def test_bad_files_are_one_line_with_file_and_place(tmp_path, name, text, message):
    source = Source("data.train", str(write(tmp_path / name, text)))
    with pytest.raises(DataError, match=message) as caught:
        list(iterate_rows(source))
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=message):  # datasets wraps what its generators raise
        load_rows([source])


def test_not_utf8(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match="a.jsonl: not UTF-8 text: byte 13"):
        read(tmp_path / "a.jsonl")


def test_missing_files_and_hub_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        DataError,
        match="data.train: no such file or folder: 'owner/name'; a data set of the .* hub:owner/name",
    ):
        check_source(Source("data.train", "owner/name"))
    check_source(Source("data.train", "hub:owner/name"))  # asks for nothing yet
    with pytest.raises(DataError, match="cannot load 'hub:owner/name'"):
        read(Path("hub:owner/name"))


def test_a_folder_gives_only_the_files_of_its_split(tmp_path):
    write(tmp_path / "d" / "train-00000.jsonl", '{"text": "a"}')
    write(tmp_path / "d" / "train-00001.jsonl", '{"text": "b"}')
    write(tmp_path / "d" / "test.jsonl", '{"text": "secret"}')
    write(tmp_path / "d" / "README.md", "no data")
    assert read(tmp_path / "d") == [{"text": "a"}, {"text": "b"}]
    assert read(tmp_path / "d", split="test") == [{"text": "secret"}]
    with pytest.raises(DataError, match="no file of split 'validation' .*found test.jsonl, train-00000.jsonl"):
        read(tmp_path / "d", split="validation")
    write(tmp_path / "e" / "one.jsonl", '{"text": "a"}')
    write(tmp_path / "e" / "two.csv", "text\nb\n")
    assert read(tmp_path / "e") == [{"text": "a"}, {"text": "b"}]
    write(tmp_path / "e" / "test.jsonl.gz", "of another split")
    assert len(read(tmp_path / "e")) == 2
    write(tmp_path / "e" / "three.jsonl.gz", "")
    with pytest.raises(DataError, match=r"three.jsonl.gz' is compressed and would not be read; unpack it"):
        read(tmp_path / "e")
    (tmp_path / "f").mkdir()
    with pytest.raises(DataError, match="no data in folder"):
        read(tmp_path / "f")


def test_columns_and_max_samples(tmp_path):
    file = write(tmp_path / "a.jsonl", '{"q": "1", "a": "2"}\n{"q": "3", "a": "4"}\n')
    columns = {"prompt": "q", "completion": "a"}
    assert read(file, columns=columns, max_samples=1) == [{"prompt": "1", "completion": "2"}]
    with pytest.raises(DataError, match="line 1: data.columns.prompt: no column 'x'; found columns: q, a"):
        read(file, columns={"prompt": "x"})


def test_sources_of_different_kinds_are_mixed_in_order(tmp_path):
    first = write(tmp_path / "a.jsonl", LINES)
    second = write(tmp_path / "b.csv", "text\nhello\n")
    rows = load_rows(parse_sources([str(first), {"path": str(second), "format": "text"}], "data.train"))
    assert rows["format"][:] == ["prompt_completion", "prompt_completion", "text"]
    assert [json.loads(row) for row in rows["row"]] == [*ROWS, {"text": "hello"}]


def test_the_cache_notices_an_edited_file(tmp_path):
    file = write(tmp_path / "a.jsonl", '{"text": "old"}')
    source = Source("data.train", str(file))
    assert json.loads(load_rows([source])["row"][0]) == {"text": "old"}
    write(file, '{"text": "new"}')
    assert json.loads(load_rows([source])["row"][0]) == {"text": "new"}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "expected at least one file"),
        ({"file": "a"}, "expected a path, an object with a path"),
        ({"path": "a", "splt": "b"}, "unknown key 'splt'; did you mean 'split'?"),
        ({"path": "a", "columns": "b"}, "data.train.columns: expected mapping, got 'b'"),
        ({"path": "a", "format": "alpacca"}, "expected one of messages, .*got 'alpacca'"),
        (5, "expected a path"),
    ],
)
def test_what_is_no_source(value, message):
    with pytest.raises(ConfigError, match=message):
        parse_sources(value, "data.train")


# -- data as people have it ----------------------------------------------------------------------------------


def test_documents(tmp_path):
    text = "Once upon\na time.\n\n  \nThere was é.\r\n\nEnd"
    file = write(tmp_path / "a.txt", text)
    file.write_text(text, encoding="utf-8-sig", newline="")
    assert read(file) == [{"text": text.replace("\r\n", "\n")}]
    paragraphs = [{"text": "Once upon\na time."}, {"text": "There was é."}, {"text": "End"}]
    assert read(file, documents="paragraph") == paragraphs
    origins = [row["origin"] for row in iterate_rows(Source("data.train", str(file), documents="paragraph"))]
    assert [origin.rpartition(" ")[2] for origin in origins] == ["1", "5", "7"]
    assert [row["text"] for row in read(file, documents="line")] == [
        "Once upon", "a time.", "There was é.", "End",
    ]  # fmt: skip
    with pytest.raises(DataError, match="no rows in"):
        read(write(tmp_path / "empty.md", " \n"))
    # a folder of documents, whose README is none of them; beside data it describes them
    write(tmp_path / "d" / "one.md", "# One")
    write(tmp_path / "d" / "two.txt", "Two")
    write(tmp_path / "d" / "README.md", "about")
    assert read(tmp_path / "d") == [{"text": "# One"}, {"text": "Two"}]
    write(tmp_path / "d" / "rows.jsonl", '{"text": "row"}')
    assert read(tmp_path / "d") == [{"text": "row"}]
    with pytest.raises(ConfigError, match="documents: expected one of file, paragraph, line, got 'page'"):
        parse_sources({"path": "a.txt", "documents": "page"}, "data.train")


def test_a_document_that_is_too_large_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("hift_ds.data.files._LARGEST_DOCUMENT", 10)
    file = write(tmp_path / "a.txt", "eleven signs")
    with pytest.raises(DataError, match="is one document of .* documents: paragraph, or line"):
        read(file)
    assert len(read(file, documents="line")) == 1


def test_json_that_is_one_object_with_the_rows_in_it(tmp_path):
    rows = [{"text": "a"}, {"text": "b"}]
    for indent, mark in itertools.product((None, 2), ("", "\ufeff")):
        content = json.dumps({"version": 1, "data": rows}, indent=indent)
        if indent is not None:
            assert read(write(tmp_path / "a.json", mark + content)) == rows
        assert read(write(tmp_path / "b.json", mark + json.dumps(rows, indent=indent))) == rows
    two = json.dumps({"train": rows, "test": rows}, indent=2)
    with pytest.raises(DataError, match=r"several lists of rows \(train, test\)"):
        read(write(tmp_path / "c.json", two))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "q", "answer": "a"}, {"instruction": "q", "output": "a"}),
        ({"Question": "q", "Answer": "a", "id": 3}, {"instruction": "q", "output": "a", "id": 3}),
        ({"instruction": "q", "response": "a"}, {"instruction": "q", "output": "a"}),
        (
            {"instruction": "q", "context": "c", "response": "a", "category": "x"},
            {"instruction": "q", "input": "c", "output": "a", "category": "x"},
        ),
        ({"input": "q", "output": "a"}, {"instruction": "q", "output": "a"}),
        ({"problem": "q", "solution": "a"}, {"instruction": "q", "output": "a"}),
    ],
)
def test_columns_that_read_like_question_and_answer_are_guessed_and_said(tmp_path, row, expected):
    file = write(tmp_path / "a.jsonl", json.dumps(row) + "\n" + json.dumps(row))
    assert read(file) == [expected, expected]
    assert {r["format"] for r in iterate_rows(Source("data.train", str(file)))} == {"alpaca"}
    said = guessed(Source("data.train", str(file)))
    names = {name.lower() for name in row} - {"id", "category"}
    assert said.startswith(f"{file}: columns ") and all(name in said.lower() for name in names)
    assert guessed(Source("data.train", str(file), columns={"prompt": next(iter(row))})) is None


@pytest.mark.parametrize(
    "row",
    [
        {"question": "q", "answer": "a", "response": "b"},  # which of the two?
        {"question": "q", "answers": ["a"]},
        {"question": "q", "answer": {"text": "a"}},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
    ],
)
def test_what_is_not_guessed(tmp_path, row):
    file = write(tmp_path / "a.jsonl", json.dumps(row))
    match = "preference data" if "chosen" in row else "no known format has the columns"
    with pytest.raises(DataError, match=f"line 1: .*{match}"):
        read(file)
    assert guessed(Source("data.train", str(file))) is None


def test_known_columns_are_not_guessed_about(tmp_path):
    file = write(tmp_path / "a.jsonl", '{"text": "t", "question": "q", "answer": "a"}')
    assert guessed(Source("data.train", str(file))) is None
    assert read(file) == [{"text": "t", "question": "q", "answer": "a"}]


C4 = '{"content": "Once"}\n{"content": "Twice"}'
INFO = {
    "alpaca_en": {"file_name": "alpaca.json"},
    "renamed": {
        "file_name": "renamed.jsonl",
        "columns": {"prompt": "q", "query": "more", "response": "a", "system": "s", "history": "h"},
    },
    "glaive": {
        "file_name": "glaive.json",
        "formatting": "sharegpt",
        "columns": {"messages": "turns", "tools": "functions"},
        "tags": {"role_tag": "who", "content_tag": "what", "user_tag": "me", "assistant_tag": "you",
                 "observation_tag": "result", "function_tag": "call"},
    },
    "openai": {
        "file_name": "openai.jsonl", "formatting": "sharegpt", "columns": {"messages": "messages"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
                 "system_tag": "system"},
    },
    "c4": {"file_name": "c4.jsonl", "columns": {"prompt": "content"}, "num_samples": 1},
    "dpo": {
        "file_name": "dpo.jsonl", "ranking": True, "formatting": "sharegpt",
        "columns": {"messages": "turns", "chosen": "good", "rejected": "bad"},
        "tags": {"role_tag": "who", "content_tag": "what", "user_tag": "me", "assistant_tag": "you"},
    },
    "dpo_alpaca": {
        "file_name": "dpo_alpaca.jsonl", "ranking": True,
        "columns": {"prompt": "q", "query": "more", "chosen": "good", "rejected": "bad"},
    },
    "kto": {
        "file_name": "kto.jsonl", "formatting": "sharegpt", "columns": {"messages": "messages", "kto_tag": "mark"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    },
    "kto_alpaca": {"file_name": "kto_alpaca.jsonl", "columns": {"prompt": "instruction", "response": "output",
                                                                "kto_tag": "kto_tag"}},
    "summed": {"file_name": "c4.jsonl", "columns": {"prompt": "content"},
               "file_sha1": hashlib.sha1(C4.encode()).hexdigest()},
    "other_file": {"file_name": "c4.jsonl", "columns": {"prompt": "content"}, "file_sha1": "0" * 40},
    "parts": {"file_name": "parts", "columns": {"prompt": "content"}},
    "pictures": {"file_name": "c4.jsonl", "columns": {"messages": "messages", "images": "images"}},
    "elsewhere": {"ms_hub_url": "owner/name"},
    "hub": {"hf_hub_url": "owner/name", "subset": "main", "split": "validation", "folder": "part"},
    "script": {"script_url": "x"},
    "odd": {"file_name": "c4.jsonl", "formatting": "odd"},
}  # fmt: skip


@pytest.fixture
def factory(tmp_path) -> Path:
    """A data folder as LLaMA-Factory has it."""
    folder = tmp_path / "data"
    write(folder / "dataset_info.json", "\ufeff" + json.dumps(INFO, indent=2))  # a byte-order mark, as editors put it
    write(folder / "alpaca.json", json.dumps([{"instruction": "Hi", "input": "", "output": "Hello"}]))
    write(
        folder / "renamed.jsonl",
        json.dumps({"q": "Sum", "more": "2+2", "a": "4", "s": "S", "h": [["a", "b"]]}),
    )
    turns = [{"who": "me", "what": "w?"}, {"who": "call", "what": '{"name": "f", "arguments": {"x": 1}}'},
             {"who": "result", "what": "1"}, {"who": "you", "what": "one", "weight": 0}]  # fmt: skip
    write(folder / "glaive.json", json.dumps([{"turns": turns, "functions": '[{"name": "f"}]'}]))
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello"}]  # fmt: skip
    write(folder / "openai.jsonl", json.dumps({"messages": messages}))
    write(folder / "c4.jsonl", C4)
    write(folder / "parts" / "a.jsonl", C4)
    write(folder / "parts" / "b.jsonl", C4)
    said = {"good": {"who": "you", "what": "one"}, "bad": {"who": "you", "what": "two"}}
    write(folder / "dpo.jsonl", json.dumps({"turns": turns[:1], **said, "system": "not named"}))
    write(folder / "dpo_alpaca.jsonl", json.dumps({"q": "Sum", "more": "2+2", "good": "4", "bad": "5"}))
    write(folder / "kto.jsonl", json.dumps({"messages": messages, "mark": False}))
    write(folder / "kto_alpaca.jsonl", json.dumps({"instruction": "Hi", "input": "not named", "output": "Hello",
                                                   "kto_tag": True}))  # fmt: skip
    return folder


def test_llama_factorys_dataset_info(factory):
    from hift_ds.data.formats import Conversation, Text, to_sample

    user, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}

    def sample_of(name: str):
        [row] = iterate_rows(Source("data.train", str(factory), name=name))
        return to_sample(json.loads(row["row"]), row["format"], row["origin"])

    assert sample_of("alpaca_en") == Conversation([user, answer])
    assert [message["content"] for message in sample_of("renamed").messages] == [
        "S",
        "a",
        "b",
        "Sum\n2+2",
        "4",
    ]
    called = sample_of("glaive")
    assert [message["role"] for message in called.messages] == ["user", "assistant", "tool", "assistant"]
    assert called.messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert called.tools == [{"name": "f"}] and called.masked == {3}
    assert sample_of("openai") == Conversation([{"role": "system", "content": "S"}, user, answer])
    assert sample_of("c4") == Text("Once")  # num_samples
    file = factory / "dataset_info.json"
    [source] = parse_sources({"path": str(file), "name": "hub"}, "data.train")
    assert resolve(source).path == "hub:owner/name"
    assert (resolve(source).subset, resolve(source).split, resolve(source).folder) == ("main", "validation", "part")
    check_source(source)
    rows = load_rows(
        parse_sources([{"path": str(file), "name": "c4"}, {"path": str(factory), "name": "alpaca_en"}], "x")
    )
    assert rows["format"][:] == ["text", "alpaca"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (None, "lists data sets; say which with name: one of alpaca_en, renamed"),
        ("alpaca", "no data set 'alpaca' in .*; it has alpaca_en"),
        ("dpo", "'dpo' is preference data .*, for tasks dpo, kto and reward; this run wants data of questions"),
        ("kto", "'kto' is of answers with a mark"),
        ("script", "'script' is read by a script .x., which is not run; give its files"),
        ("other_file", "c4.jsonl: SHA-1 is [0-9a-f]{40}, but dataset_info.json says file_sha1 0000"),
        ("pictures", "'pictures' has images, which are not read here"),
        ("elsewhere", "'elsewhere' has only ms_hub_url, which is not read"),
        ("odd", "formatting 'odd' is not known; expected alpaca, sharegpt or openai"),
    ],
)
def test_what_a_dataset_info_does_not_give(factory, name, message):
    with pytest.raises(DataError, match=message) as caught:
        check_source(Source("data.train", str(factory), name=name))
    assert "\n" not in str(caught.value)


def test_preferences_of_a_dataset_info(factory):
    from hift_ds.data.task_rows import to_example

    def example_of(name: str, format: str):
        [row] = iterate_rows(Source("data.train", str(factory), name=name, format=format))
        return to_example(json.loads(row["row"]), row["format"], row["origin"])

    def said(*texts: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text} for text in texts]

    pair = {"prompt": [{"role": "user", "content": "w?"}], "chosen": said("one"), "rejected": said("two")}
    assert example_of("dpo", "preference") == example_of("dpo", "rated") == pair
    asked = [{"role": "user", "content": "Sum\n2+2"}]
    assert example_of("dpo_alpaca", "preference") == {"prompt": asked, "chosen": said("4"), "rejected": said("5")}
    system, user = {"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}
    assert example_of("kto", "rated") == {"prompt": [system, user], "completion": said("Hello"), "label": False}
    assert example_of("kto_alpaca", "rated") == {"prompt": [user], "completion": said("Hello"), "label": True}
    with pytest.raises(
        DataError, match="'alpaca_en' is data of questions and answers or texts, .*; this run wants preference data"
    ):
        example_of("alpaca_en", "preference")
    note = guessed(Source("data.train", str(factory), name="dpo", format="preference"))
    assert "system not read, since dataset_info.json does not name it" in note


def test_a_file_of_a_dataset_info_is_what_it_says_and_a_folder_is_all_its_files(factory):
    assert [len(list(iterate_rows(Source("x", str(factory), name=name)))) for name in ("summed", "parts")] == [2, 4]


def test_keys_that_have_no_meaning_for_a_source(tmp_path):
    file = write(tmp_path / "a.jsonl", '{"text": "a"}')
    with pytest.raises(ConfigError, match="data.train.name: 'x' names a data set of a dataset_info.json"):
        check_source(Source("data.train", str(file), name="x"))
    with pytest.raises(ConfigError, match="data.train.documents: 'line' is for .txt and .md files"):
        check_source(Source("data.train", str(file), documents="line"))


def test_weights(tmp_path):

    sizes = {"a": 10, "b": 4, "c": 3}
    for name, count in sizes.items():
        write(tmp_path / f"{name}.jsonl", "\n".join(json.dumps({"text": f"{name}{i}"}) for i in range(count)))
    sources = parse_sources([{"path": str(tmp_path / f"{name}.jsonl")} for name in sizes], "data.train")
    rows = load_mixture(sources)

    def mixed(*weights: float, seed: int = 0) -> list[str]:
        return [json.loads(row)["text"] for row in mix(rows, list(weights), seed)["row"]]

    found = mixed(1, 1, 2)  # 10 rows for a weight of 1: c's three rows 20 times over in all
    counts = {name: sum(text[0] == name for text in found) for name in sizes}
    assert counts == {"a": 10, "b": 10, "c": 20}
    assert {found.count(f"b{i}") for i in range(4)} == {2, 3} and {found.count(f"a{i}") for i in range(10)} == {1}
    assert mixed(1, 1, 2) == found != mixed(1, 1, 2, seed=1)
    assert len(mixed(10, 4, 3)) == 17  # in proportion to their rows: each once
    assert {name: sum(t[0] == name for t in mixed(0.1, 4, 1)) for name in sizes} == {
        "a": 10,
        "b": 400,
        "c": 100,
    }
    for weight in (0, -1, "x", True, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="data.train.weight: expected a number"):
            parse_sources({"path": "a", "weight": weight}, "data.train")
