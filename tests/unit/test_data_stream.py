"""Streamed rows: the same ids as the rows of the stored data set, in order, shuffled, mixed, over ranks and
workers, and after a resume."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from torch.utils.data import DataLoader

from hift_ds.data.config import DataConfig
from hift_ds.data.prepare import prepare_data, prepare_stream
from hift_ds.data.stream import Stream
from hift_ds.errors import ConfigError, DataError
from hift_ds.train.finetune import finetune
from hift_ds.train.run_config import load_run_config
from tests.helpers.tiny_tokenizers import byte_level
from tests.unit.test_launch import inputs, own_cache  # noqa: F401  (fixtures)
from tests.unit.test_tasks import no_pictures  # noqa: F401  (a fixture)

MAX_LENGTH = 64


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
    datasets.disable_progress_bars()


def written(folder: Path, name: str, count: int) -> str:
    """Rows of many lengths, none of which is another one's; every seventh's answer is beyond the longest length."""
    rows = [
        {"prompt": f"{name}{i:02d}" + "p" * (80 if i % 7 == 6 else 7 * i % 11), "completion": "c" * (5 * i % 13)}
        for i in range(count)
    ]
    file = folder / f"{name}.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


def streamed(train: Any, rank: int = 0, world_size: int = 1, **options: Any) -> Stream:
    config = DataConfig(train=train, streaming=True, **options)
    return prepare_stream(config, byte_level(), MAX_LENGTH, 280, rank, world_size).train


def stored(train: Any, **options: Any) -> list[tuple[int, ...]]:
    return ids(prepare_data(DataConfig(train=train, **options), byte_level(), MAX_LENGTH).train)


def ids(samples: Any) -> list[tuple[int, ...]]:
    return [(*sample["input_ids"], *sample["labels"]) for sample in samples]


def test_without_shuffling_the_ids_are_those_of_the_stored_rows_pass_after_pass(tmp_path):
    train = [written(tmp_path, "a", 20), written(tmp_path, "b", 9)]
    expected = stored(train)
    assert len(expected) == len(set(expected)) == 26
    assert ids(islice(streamed(train, shuffle=False), 60)) == (expected * 3)[:60]


@pytest.mark.parametrize("buffer", [4, 1000])
def test_shuffled_every_pass_has_every_row_once_in_another_order(tmp_path, buffer):
    train = [written(tmp_path, "a", 20), written(tmp_path, "b", 9)]
    expected = stored(train)
    seen = ids(islice(streamed(train, shuffle_buffer=buffer), 78))
    passes = [seen[begin : begin + 26] for begin in (0, 26, 52)]
    assert all(sorted(one) == sorted(expected) for one in passes)
    assert len({tuple(one) for one in [*passes, expected]}) == 4
    assert seen == ids(islice(streamed(train, shuffle_buffer=buffer), 78))  # and another run's are the same
    assert seen != ids(islice(streamed(train, shuffle_buffer=buffer, seed=1), 78))


def test_texts_are_cut_into_the_same_pieces(tmp_path):
    file = tmp_path / "t.jsonl"
    file.write_text("\n".join(json.dumps({"text": chr(97 + i) * (40 * i + 5)}) for i in range(5)))
    expected = stored(str(file), format="text")
    assert ids(islice(streamed(str(file), format="text", shuffle=False), len(expected))) == expected


def test_a_mixture_has_its_weights_and_ends_a_pass_when_every_row_was_there(tmp_path):
    names = {"a": written(tmp_path, "a", 60), "b": written(tmp_path, "b", 20)}
    train = [{"path": names["a"], "weight": 3}, {"path": names["b"]}]
    of = {name: set(stored(path)) for name, path in names.items()}
    for shuffle in (False, True):
        stream = streamed(train, shuffle=shuffle)
        seen = ids(islice(stream, 2000))
        share = sum(sample in of["a"] for sample in seen) / len(seen)
        assert set(seen) == of["a"] | of["b"] and abs(share - 0.75) < 0.03
        one_pass = Counter(row["origin"] for row in stream.one_pass(0, stream.shuffle_buffer))
        assert len(one_pass) == 80  # rows with nothing to learn among them
    in_order = [sample for sample in ids(islice(streamed(train, shuffle=False), 40)) if sample in of["b"]]
    assert in_order == stored(names["b"])[: len(in_order)]


@pytest.mark.parametrize("shuffle", [False, True])
def test_ranks_and_workers_have_rows_of_their_own_which_together_are_all(tmp_path, shuffle):
    train = [written(tmp_path, "a", 24), written(tmp_path, "b", 12)]
    whole = stored(train)
    ranks = [ids(islice(streamed(train, rank, 3, shuffle=shuffle), len(whole) // 3 - 1)) for rank in range(3)]
    assert len({sample for rank in ranks for sample in rank}) == sum(map(len, ranks))
    assert {sample for rank in ranks for sample in rank} <= set(whole)
    loader = DataLoader(streamed(train, 1, 3, shuffle=shuffle), batch_size=None, num_workers=2)
    workers = ids(islice(loader, 8))
    assert len(set(workers)) == 8 and set(workers) <= set(whole)


def test_packed_rows_have_the_samples_of_the_stream_whole(tmp_path, monkeypatch):
    pytest.importorskip("trl")
    monkeypatch.setattr("hift_ds.data.stream.PACKED_AT_ONCE", 26)  # a pass
    train = [written(tmp_path, "a", 20), written(tmp_path, "b", 9)]
    samples = []
    packed = list(islice(streamed(train, packing=True), 12))
    assert all(len(row["input_ids"]) == sum(row["seq_lengths"]) <= MAX_LENGTH for row in packed)
    for row in packed:
        begin = 0
        for length in row["seq_lengths"]:
            part = slice(begin, begin + length)
            samples.append((*row["input_ids"][part], *row["labels"][part]))
            begin += length
    assert sorted(samples[:26]) == sorted(stored(train))


def test_what_is_said_is_of_the_first_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("hift_ds.data.stream.COUNTED_ROWS", 10)
    config = DataConfig(train=written(tmp_path, "a", 20), streaming=True)
    report = str(prepare_stream(config, byte_level(), MAX_LENGTH).reports[0])
    assert report.startswith("train, streamed; of its first 10 rows: 9 samples of 10 rows") and "1 dropped" in report


def test_mistakes_are_one_line(tmp_path):
    good = written(tmp_path, "a", 20)
    broken = tmp_path / "broken.jsonl"
    broken.write_text(Path(good).read_text() + "\n{")
    with pytest.raises(DataError, match="broken.jsonl, line 21: not valid JSON"):
        list(islice(streamed(str(broken), shuffle=False), 18))
    empty = tmp_path / "empty.jsonl"
    empty.write_text(json.dumps({"prompt": "p" * 80, "completion": "c"}))
    with pytest.raises(DataError, match="data.max_length: 64 leaves nothing to learn in any of 1 train samples"):
        streamed(str(empty), max_samples=1)
    late = Stream(DataConfig(train=str(empty), max_samples=1).train_sources(), streamed(good).tokenize)
    with pytest.raises(DataError, match="data.train: nothing to learn"):
        next(iter(late))
    with pytest.raises(DataError, match="makes token id [0-9]+, but the model has only 50 embeddings"):
        next(iter(prepare_stream(DataConfig(train=good, streaming=True), byte_level(), MAX_LENGTH, 50).train))
    with pytest.raises(ValueError, match="val_size: 4 with streaming: true"):
        DataConfig(train=good, streaming=True, val_size=4)


def run_file(models: Path, folder: Path, **changes: Any) -> Path:
    run: dict[str, Any] = {
        "model": {"path": str(models / "model")},
        "data": {"train": [written(folder, "a", 20), written(folder, "b", 9)], "max_length": MAX_LENGTH},
        "train": {"output_dir": str(folder / "run"), "max_steps": 6, "micro_batch_size": 13, "learning_rate": 1e-3},
        "hift": {"fit": "off", "group_size": 2},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        run[section][name] = value
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(run))
    return file


def exported(folder: Path) -> bytes:
    return (folder / "run" / "model" / "model.safetensors").read_bytes()


def test_a_streamed_run_ends_with_the_weights_of_a_stored_one_and_a_resumed_one_with_its_own(inputs, tmp_path):  # noqa: F811
    """In order: the rows that both train on are the same, over the end of a pass."""
    weights = {}
    for name in ("stored", "whole", "shuffled", "shuffled_stopped"):
        folder = tmp_path / name
        folder.mkdir()
        options = {"data__shuffle": "shuffled" in name, "data__streaming": name != "stored"}
        if "stopped" in name:
            finetune(load_run_config(run_file(inputs, folder, **options, train__lr_scheduler="constant",
                                              train__max_steps=3)))  # fmt: skip
        finetune(load_run_config(run_file(inputs, folder, **options, train__lr_scheduler="constant")))
        weights[name] = exported(folder)
    assert weights["whole"] == weights["stored"]
    assert weights["shuffled"] == weights["shuffled_stopped"] != weights["whole"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__max_steps": None}, "data.streaming: true needs train.max_steps"),
        ({"train__arguments": {"train_sampling_strategy": "group_by_length"}}, "rows come as they are read"),
    ],
)
def test_what_does_not_go_with_streaming(inputs, tmp_path, changes, message):  # noqa: F811
    with pytest.raises(ConfigError, match=message):
        load_run_config(run_file(inputs, tmp_path, data__streaming=True, **changes))
