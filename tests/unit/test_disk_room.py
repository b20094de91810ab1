"""The forecast of a run folder's size against what a run leaves there, and what is said where it will not fit."""

from __future__ import annotations

import os

import pytest

from hift_ds.errors import CheckpointError
from hift_ds.integrations import disk_room
from hift_ds.integrations.disk_room import bytes_on_disk, checkpoints_at_once
from hift_ds.train.finetune import finetune
from hift_ds.train.run_config import load_run_config
from tests.unit.test_launch import inputs, own_cache, write_run  # noqa: F401  (fixtures)


def test_checkpoints_at_once():
    """A new one is written before an old one goes."""
    assert [checkpoints_at_once(5, limit, False) for limit in (None, 1, 2, 9)] == [5, 2, 3, 5]
    assert checkpoints_at_once(5, 1, True) == 3 and checkpoints_at_once(1, 2, False) == 1


def test_a_file_with_two_names_is_one(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 100)
    os.link(tmp_path / "a", tmp_path / "b")
    (tmp_path / "c").write_bytes(b"x" * 10)
    assert bytes_on_disk(tmp_path) == 110 and bytes_on_disk(tmp_path / "nowhere") == 0


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_the_forecast_is_what_is_there_and_a_run_that_will_not_fit_does_not_begin(
    inputs,  # noqa: F811
    tmp_path,
    monkeypatch,
    capsys,
    optimizer,  # noqa: F811
):
    """The tiny model's small files (tokenizer, JSON) outweigh nothing but it; tensors are compared."""
    asked = []
    check = disk_room.DiskRoomCallback._check
    monkeypatch.setattr(disk_room.DiskRoomCallback, "_check", lambda *args: (asked.append(args), check(*args)))
    file = write_run(inputs, tmp_path / "run", train__max_steps=7, train__save_steps=2, train__optimizer=optimizer,
                     train__save_total_limit=1, train__eval_steps=7)  # fmt: skip
    finetune(load_run_config(file))
    ((_, folder, each, count, writes, _),) = asked
    assert (count, writes) == (2, True)
    checkpoint = tmp_path / "run" / "checkpoint-7"
    (tensors,) = [path for path in checkpoint.iterdir() if path.is_dir()]
    found = sum(path.stat().st_size for path in tensors.glob("*.safetensors"))
    assert each <= found < each + 20_000  # headers of two files
    assert "disk: 2 checkpoints of" in capsys.readouterr().out

    free = disk_room.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(disk_room.shutil, "disk_usage", lambda path: free._replace(free=each))
    other = write_run(inputs, tmp_path / "other", train__max_steps=7, train__save_steps=2, train__optimizer=optimizer)
    with pytest.raises(CheckpointError, match=r"train.output_dir: .* will need 3 checkpoints .* free"):
        finetune(load_run_config(other))
    assert not list((tmp_path / "other").glob("checkpoint-*"))
