"""``metrics.jsonl``: a JSON line for every optimizer step and every evaluation. Fields: docs/metrics.md."""

from __future__ import annotations

import errno
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypedDict, cast

from hift_ds.checkpoint.files import replace_text
from hift_ds.step_report import CAUSES

FILE_NAME = "metrics.jsonl"


class StepRecord(TypedDict, total=False):
    """What is known of one optimizer step. Unknown: the key is absent. Not finite: the value is null."""

    step: int  # optimizer steps done, this one included
    epoch: float
    cycle: int  # times all groups had their turn before this step
    position: int  # place of the active group in this cycle's order
    group: int  # active layer group, 0 = embeddings
    group_name: str
    loss: float  # mean over ranks and micro-batches since the last record that has one
    lr: float  # the latched value the step was taken with
    grad_norm: float  # of the active group, before clipping
    loss_scale: float
    skipped: bool  # gradients overflowed: nothing was updated
    num_tokens: int  # input tokens seen so far, all ranks
    tokens_per_s: float  # all ranks, this step
    step_time_s: float  # data loading included; evaluation and saving not
    state_bytes_in: int  # optimizer state brought to the device, this rank
    state_bytes_out: int
    grad_numel_sent: int  # gradient elements this rank put into a reduction
    grad_bytes_out: int  # gradients sent to host memory (update in backward), this rank; absent where none are
    grad_bytes_in: int
    tried: bool  # clipping: speculative: updated before the norm was known
    undone: bool  # and taken back and made again
    undone_s: float
    transfer_s: float  # state transfers, whether hidden or not
    stalled_s: float  # the part of transfer_s the step waited for, on the device or on the host
    # Seconds that the step stood still, by cause (hift_ds.step_report.CAUSES). Those for states are stalled_s.
    waits_s: dict[str, float]
    # Training waited for checkpoints since the last step: copying, and writing unless asynchronous.
    checkpoint_s: float
    # Highest allocation on the device in this step, this rank; without one resident memory at its end.
    peak_memory_gib: float
    memory_of_process: bool  # true where it is that, and so much the same for every group
    # What peak_memory_gib was expected to be at most, once that is known; on accelerators.
    forecast_memory_gib: float


def waits_of(record: Mapping[str, Any]) -> dict[str, float]:
    """Seconds that a step stood still, by cause: the one number of them that reports show is their sum. A file of
    before causes were noted has those for states."""
    waits = record.get("waits_s")
    if waits is None:
        return {"states_in": record["stalled_s"]} if record.get("stalled_s") else {}
    return {cause: seconds or 0.0 for cause, seconds in waits.items()}


def waited_for(cause: str) -> str:
    """A cause in words: "states to arrive"."""
    return CAUSES.get(cause, cause).partition(" (")[0]


def share_waited(records: Iterable[Mapping[str, Any]]) -> tuple[float | None, dict[str, float]]:
    """The share of the steps' time that they stood still, ``None`` if their time is not known; and how it divides by
    cause, the largest part first."""
    total, seconds = 0.0, Counter[str]()
    for record in records:
        if record.get("step_time_s"):
            total += record["step_time_s"]
            seconds.update(waits_of(record))
    if not total:
        return None, {}
    shares = {cause: part / total for cause, part in seconds.most_common() if part}
    return sum(shares.values()), shares


class EvalRecord(TypedDict, total=False):
    """One evaluation: the step it was made at and whatever the Trainer measured, under its names."""

    step: int
    epoch: float
    eval_loss: float


@dataclass
class Metrics:
    """The content of a metrics file, in file order."""

    steps: list[StepRecord] = field(default_factory=list)
    evals: list[EvalRecord] = field(default_factory=list)


def read_metrics(path: str | Path) -> Metrics:
    """Read a metrics file, which may be growing or end in the middle of a line (a killed run).

    Args:
        path: the file, or the run folder that holds it. A missing file reads as empty.
    """
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    out = Metrics()
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        record = _parse(line)
        if record is not None:
            if "eval_loss" in record:
                out.evals.append(cast("EvalRecord", record))
            else:
                out.steps.append(cast("StepRecord", record))
    return out


class MetricsWriter:
    """Appends records to ``<run_dir>/metrics.jsonl``, each line on disk before the next step begins.

    Args:
        run_dir: created if missing.
        resume_step: the last step that counts. Lines of later steps, which a resumed run repeats, are
            dropped, and so is a last line that a kill cut short. 0 starts over.
    """

    def __init__(self, run_dir: str | Path, resume_step: int = 0) -> None:
        self.path = Path(run_dir) / FILE_NAME
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._drop_after(resume_step)
        self._file: IO[bytes] | None = open(self.path, "ab", buffering=0)  # noqa: SIM115 (see close)

    def write(self, record: StepRecord | EvalRecord) -> None:
        """Write a record. Raises OSError if the file system refuses the line, of which nothing stays then."""
        assert self._file is not None, "writer is closed"
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        line = json.dumps(finite, allow_nan=False).encode() + b"\n"
        before = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            self._file.truncate(before)  # or the next line would be glued to the half of this one
            raise

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _drop_after(self, step: int) -> None:
        if not self.path.is_file():
            return
        kept = []
        for line in self.path.read_bytes().splitlines(keepends=True):
            record = _parse(line)
            if record is not None and line.endswith(b"\n") and record.get("step", 0) <= step:
                kept.append(line)
        replace_text(self.path, b"".join(kept).decode("utf-8"))


def _parse(line: bytes) -> dict[str, Any] | None:
    """A record, or None for a line that is not one: cut short, or zeros that a power cut left."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None
