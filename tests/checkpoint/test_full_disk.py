"""A disk that is full, or a folder that cannot be written, in the middle of a run of a Trainer or a run file: one line,
or, where the settings say so, a run that goes on without that checkpoint."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from hift_ds.checkpoint.files import refusal_of
from hift_ds.checkpoint.trainer_folder import find_checkpoints
from hift_ds.errors import CheckpointError
from hift_ds.report.metrics import MetricsWriter, read_metrics
from hift_ds.train import worker
from hift_ds.train.finetune import finetune
from hift_ds.train.run_config import load_run_config
from tests.checkpoint.conftest import disk_of
from tests.checkpoint.test_trainer_resume import checkpoints, make_trainer
from tests.unit.test_launch import inputs, own_cache, write_run  # noqa: F401  (fixtures)


@pytest.fixture
def small_disk(tmp_path):
    with disk_of("4m", tmp_path / "small") as folder:
        yield folder


class Fill(TrainerCallback):
    """Another program's data: the disk is full during some steps."""

    def __init__(self, disk: Path, first: int, last: int, left: int) -> None:
        self.disk, self.first, self.last, self.left = disk, first, last, left

    def on_step_begin(self, args, state, control, **kwargs):
        file = self.disk / "other people's data"
        if state.global_step + 1 == self.first:
            # A save in the background takes its share meanwhile: what there was no room for is not written.
            with contextlib.suppress(OSError):
                file.write_bytes(b"x" * max(shutil.disk_usage(self.disk).free - self.left, 0))
            if (lacking := self.left - shutil.disk_usage(self.disk).free) > 0:
                os.truncate(file, max(file.stat().st_size - lacking, 0))
        if state.global_step == self.last:
            file.unlink()


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("left", [0, 150_000])
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(small_disk, tmp_path, caplog, left, asynchronous):
    """With no byte left, and where the Trainer's copy of the weights fits and the states do not."""
    out = small_disk / "run"
    hift = {"checkpoint": {"on_error": "continue", "asynchronous": asynchronous}}
    options = {"max_steps": 8, "save_steps": 2, "gradient_accumulation_steps": 1}
    with caplog.at_level(logging.ERROR):
        trainer = make_trainer(out, hift, callbacks=[Fill(small_disk, 4, 5, left)], **options)
        trainer.train()
    assert checkpoints(out) == [2, 6, 8]
    whole = [out / f"checkpoint-{n}" for n in (8, 6, 2)]
    found, reasons = find_checkpoints(out, "auto")
    # Asynchronously checkpoint-2 was still being written when the disk became full.
    assert (found, reasons) == (whole, []) or (asynchronous and found == whole[:2] and "checkpoint-2" in reasons[0])
    assert "training goes on: " in caplog.text and "no space left for a checkpoint" in caplog.text
    assert "Traceback" not in caplog.text
    plain = make_trainer(tmp_path / "plain", **options)
    plain.train()
    for name, weight in plain.model.state_dict().items():
        assert torch.equal(weight, trainer.model.state_dict()[name]), name


def test_a_full_disk_ends_the_run_by_default(small_disk):
    out = small_disk / "run"
    trainer = make_trainer(out, callbacks=[Fill(small_disk, 4, 99, 0)], save_steps=2, gradient_accumulation_steps=1)
    with pytest.raises(CheckpointError, match="no space left for a checkpoint in .*GiB free"):
        trainer.train()
    assert checkpoints(out) == [2]  # nothing of the other stays


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "checkpoint-2").touch()
    trainer = make_trainer(tmp_path, save_steps=2, max_steps=2)
    with pytest.raises(CheckpointError, match="cannot write a checkpoint to .*checkpoint-2: File exists"):
        trainer.train()


@pytest.mark.parametrize("on_error", ["raise", "continue"])
def test_metrics_on_a_full_disk(inputs, tmp_path, capsys, caplog, monkeypatch, on_error):  # noqa: F811
    """``metrics.jsonl`` is written at every step, so it is what finds the disk full."""
    real = MetricsWriter.write

    def write(self, record):
        if record["step"] in (4, 5):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, record)

    monkeypatch.setattr(MetricsWriter, "write", write)
    out = tmp_path / "run"
    options = {
        "train__max_steps": 6,
        "train__save_steps": 100,
        "train__eval_steps": None,
        "data__val_size": 0,
    }
    file = write_run(inputs, out, hift={"checkpoint": {"on_error": on_error}}, **options)
    if on_error == "continue":
        finetune(load_run_config(file))
        assert caplog.text.count("metrics not written") == 1
    else:
        assert worker.main([str(file)]) == 2
        error = capsys.readouterr().err
        assert "error: no space left for metrics in" in error and "Traceback" not in error
    steps = [record["step"] for record in read_metrics(out).steps]
    assert steps == [1, 2, 3, 6] if on_error == "continue" else steps == [1, 2, 3]


def test_half_a_line_of_metrics_does_not_stay(small_disk):
    writer, file, number = MetricsWriter(small_disk), small_disk / "other people's data", 0
    file.write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 4096))
    with pytest.raises(OSError, match="No space left"):
        while True:
            number += 1
            writer.write({"step": number})
    file.unlink()
    writer.write({"step": number})
    writer.close()
    assert [record["step"] for record in read_metrics(small_disk).steps] == list(range(1, number + 1))
    assert (small_disk / "metrics.jsonl").read_bytes().count(b"\n") == number


def first_rank_cannot_make_the_folder(folder: str) -> tuple[list[str], list[int]]:
    """On this rank: what two runs of four steps said, where ``checkpoint-2`` is a file; what was saved."""
    said = []
    for on_error in ("raise", "continue"):
        trainer = make_trainer(
            Path(folder),
            {"checkpoint": {"on_error": on_error}},
            max_steps=4,
            save_steps=2,
            gradient_accumulation_steps=1,
        )
        try:
            trainer.train()
            said.append(f"trained to step {trainer.state.global_step}")
        except CheckpointError as error:
            said.append(str(error))
    return said, checkpoints(Path(folder))


@pytest.mark.distributed
def test_no_rank_waits_for_one_that_cannot_write(launcher, tmp_path):
    """The first rank alone writes the Trainer's files; the other learns of its failure."""
    (tmp_path / "checkpoint-2").touch()
    launcher.preload(__name__)
    for said, saved in launcher.run(first_rank_cannot_make_the_folder, 2, str(tmp_path)):
        assert said[0].startswith("rank 0: cannot write a checkpoint to") and said[0].endswith("File exists")
        assert said[1] == "trained to step 4" and 4 in saved


def test_the_words_of_torch_and_safetensors():
    class SafetensorError(Exception):
        pass

    assert refusal_of(SafetensorError("I/O error: No space left on device (os error 28)")).errno == 28
    assert refusal_of(RuntimeError("[enforce fail] . PytorchStreamWriter failed writing file data/0")).errno == 28
    assert refusal_of(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert refusal_of(ConnectionResetError(104, "Connection reset by peer")) is None
