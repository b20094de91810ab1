"""Every way data can lie on a disk, and every way it can be wrong."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset

from hift_ds.data.sources import Source, check_source, iterate_rows, load_rows, parse_sources
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


def test_half_a_surrogate_pair_does_not_stop_a_run(tmp_path):
    assert read(write(tmp_path / "a.jsonl", '{"text": "a\\ud83d"}')) == [{"text": "a?"}]


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
    with pytest.raises(
        DataError, match="no file of split 'validation' .*found test.jsonl, train-00000.jsonl"
    ):
        read(tmp_path / "d", split="validation")
    write(tmp_path / "e" / "one.jsonl", '{"text": "a"}')
    write(tmp_path / "e" / "two.csv", "text\nb\n")
    assert read(tmp_path / "e") == [{"text": "a"}, {"text": "b"}]
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
