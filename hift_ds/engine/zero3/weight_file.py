"""Parked weights in a file: host memory holds what is being read, written, or not yet needed elsewhere.

The file is mapped, so a shard in it is an ordinary host tensor: reading it brings its pages in, an update dirties them
and the kernel writes them back. It has no name once it is mapped, so nothing is left of it when the process ends,
however it ends; checkpoints are what survives.
"""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from hift_ds.errors import StateStoreError

PAGE = mmap.PAGESIZE


class WeightFile:
    """Room for ``num_bytes`` in a file in ``folder``, given out by :meth:`reserve`.

    Raises:
        StateStoreError: the folder cannot be used, or its disk lacks the space.
    """

    def __init__(self, folder: str | Path, num_bytes: int) -> None:
        self._length = max(PAGE, num_bytes)
        self._used = 0
        # Of reserved tensors, by address: offset in the file, bytes.
        self._bounds: dict[int, tuple[int, int]] = {}
        self._map = _map_nameless_file(Path(folder), self._length)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    @staticmethod
    def room(num_bytes: int) -> int:
        """Bytes that a tensor of ``num_bytes`` takes in a file: each starts on a page of its own."""
        return -(-num_bytes // PAGE) * PAGE

    def reserve(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A flat tensor in the file, with undefined contents."""
        num_bytes = numel * dtype.itemsize
        start, self._used = self._used, self._used + self.room(num_bytes)
        reserved = self._bytes[start : start + num_bytes].view(dtype)
        self._bounds[reserved.data_ptr()] = (start, num_bytes)
        return reserved

    def will_need(self, tensor: Tensor) -> None:
        """Start reading ``tensor``, which is in the file (else nothing happens); returns at once."""
        self._advise(tensor, mmap.MADV_WILLNEED)

    def let_go(self, tensor: Tensor) -> None:
        """Let the pages of ``tensor``, which is not needed for a while, leave this process. What was written to them is
        kept."""
        self._advise(tensor, mmap.MADV_DONTNEED)

    def _advise(self, tensor: Tensor, advice: int) -> None:
        bounds = self._bounds.get(tensor.data_ptr())
        if bounds is not None and bounds[1]:
            self._map.madvise(advice, bounds[0], bounds[1])


def _map_nameless_file(folder: Path, num_bytes: int) -> mmap.mmap:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < num_bytes:
            raise StateStoreError(f"{folder}: parked weights need {num_bytes:,} bytes, {free:,} are free")
        with tempfile.TemporaryFile(dir=folder, prefix="hift_weights_") as file:
            os.posix_fallocate(file.fileno(), 0, num_bytes)  # now, not as a crash in the middle of a step
            return mmap.mmap(file.fileno(), num_bytes)
    except OSError as error:
        raise StateStoreError(
            f"{folder}: cannot hold {num_bytes:,} bytes of parked weights: {error.strerror}"
        ) from None
