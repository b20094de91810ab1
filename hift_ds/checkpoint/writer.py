"""One rank's files of one checkpoint, from the first byte to the part record that the leader collects."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hift_ds.checkpoint.files import (
    FileRecord,
    SafetensorsWriter,
    TensorSpec,
    write_bytes,
    write_errors,
    write_json,
)
from hift_ds.checkpoint.shared_folder import SharedFolder
from hift_ds.checkpoint.write_plan import STATES, WEIGHTS, WritePlan
from hift_ds.durable import sync
from hift_ds.errors import CheckpointError

WEIGHTS_FILE = "model.safetensors"
CHECKPOINT_FILE = "checkpoint.json"
CLIENT_STATE_FILE = "client_state.pt"


def states_file(rank: int) -> str:
    """The file in which ``rank`` keeps its masters and states."""
    return f"states-rank-{rank:05d}.safetensors"


def rank_file(rank: int) -> str:
    """The file in which ``rank`` keeps scalars of states and random generators."""
    return f"rank-{rank:05d}.json"


def gradients_file(rank: int) -> str:
    """The file in which ``rank`` keeps pending gradients."""
    return f"gradients-rank-{rank:05d}.safetensors"


class CheckpointWriter:
    """Write with :meth:`open`, :meth:`add` for every tensor of the plan in its order, :meth:`close`.

    Args:
        common: what is the same on all ranks (the leader's is written).
        own: what is this rank's alone.
        unencodable: entries of the client state that JSON cannot hold.
    """

    def __init__(
        self, shared_folder: SharedFolder, plan: WritePlan, common: Mapping[str, Any], own: Mapping[str, Any],
        unencodable: Mapping[str, Any],
    ) -> None:  # fmt: skip
        self.shared_folder = shared_folder
        self.plan = plan
        self._common = common
        self._own = own
        self._unencodable = unencodable
        self._records: dict[str, FileRecord] = {}
        self._files: dict[str, SafetensorsWriter] = {}
        self._failure: CheckpointError | None = None

    def open(self, gradients: Mapping[str, Tensor]) -> None:
        """Write everything but the planned tensors, and start its files.

        Args:
            gradients: pending ones, by parameter.
        """
        try:
            self._open(gradients)
        except BaseException:
            self.discard()
            raise

    def _open(self, gradients: Mapping[str, Tensor]) -> None:
        folder, rank = self.shared_folder.path, self.shared_folder.rank
        with write_errors(self.shared_folder.save_dir):
            self._records[rank_file(rank)] = write_json(folder / rank_file(rank), self._own, indent=None)
            if gradients:
                self._records[gradients_file(rank)] = _write_tensors(folder / gradients_file(rank), gradients)
            if self.shared_folder.leads:
                self._records[CHECKPOINT_FILE] = write_json(folder / CHECKPOINT_FILE, self._common)
                if self._unencodable:
                    data = pickled_safely(self._unencodable)
                    self._records[CLIENT_STATE_FILE] = write_bytes(folder / CLIENT_STATE_FILE, data)
                self._files[WEIGHTS] = SafetensorsWriter(folder / WEIGHTS_FILE, self.plan.specs[WEIGHTS])
            self._files[STATES] = SafetensorsWriter(folder / states_file(rank), self.plan.specs[STATES])

    def write_all(self) -> None:
        """Write all that is planned, one tensor after another."""
        try:
            self.add(self.plan.frozen())
            self.add(self.plan.buffers())
            for group in self.plan.groups:
                self.add(self.plan.of_group(group))
            self.close()
        except BaseException:
            self.discard()
            raise

    def add(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """(file, tensor) pairs, in the order of the plan. An error is kept for :meth:`close` and the rest
        still taken: making partitioned weights whole is a collective, which the other ranks go on with."""
        for file, tensor in tensors:
            if self._failure is None:
                try:
                    with write_errors(self.shared_folder.save_dir):
                        self._files[file].write(tensor)
                except CheckpointError as error:
                    self._failure = error

    def close(self) -> None:
        """Bring everything to the disk.

        Raises:
            CheckpointError: the file system refused something, here or in :meth:`add`.
        """
        if self._failure is not None:
            raise self._failure
        with write_errors(self.shared_folder.save_dir):
            names = {WEIGHTS: WEIGHTS_FILE, STATES: states_file(self.shared_folder.rank)}
            for kind, file in self._files.items():
                self._records[names[kind]] = file.close()
            sync(self.shared_folder.path)
            self.shared_folder.write_part(self._records)

    def discard(self) -> None:
        """Close the files, whatever has become of them."""
        for file in self._files.values():
            file.discard()

    @property
    def num_bytes(self) -> int:
        """Bytes that this rank has written."""
        return sum(record.num_bytes for record in self._records.values())


def pickled_safely(values: Mapping[str, Any]) -> bytes:
    """``torch.save``'s bytes, if ``torch.load(weights_only=True)``, which runs no code, can read them back.

    Raises:
        CheckpointError: it cannot; found now and not when the run is to be resumed.
    """
    buffer = io.BytesIO()
    try:
        torch.save(dict(values), buffer)
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"client_state: {', '.join(sorted(values))}: only JSON values, tensors and containers of "
            f"them can be saved (what needs pickle could run code when loaded): {reason}"
        ) from None
    return buffer.getvalue()


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
    writer = SafetensorsWriter(path, [TensorSpec(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()])
    for tensor in tensors.values():
        writer.write(tensor)
    return writer.close()
