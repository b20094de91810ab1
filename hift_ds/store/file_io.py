"""Whole files to and from memory, past the page cache or through it, whichever is faster here.

Only the standard library: ``os.preadv`` and ``os.pwrite`` with O_DIRECT reach the disk's rate (DeepSpeed's
own asynchronous I/O would have to be compiled).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hift_ds.errors import StateStoreError
from hift_ds.store.page_locked import huge_pages

PAGE_BYTES = 4096  # O_DIRECT wants memory, offsets and lengths in multiples of the disk's block: at most this
_CALL_BYTES = 1 << 26  # in one system call; Linux moves at most 2 GiB
_DIRECT = getattr(os, "O_DIRECT", 0)


def whole_pages(num_bytes: int) -> int:
    """``num_bytes`` rounded up to whole pages."""
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES


def page_aligned(num_bytes: int, pin_memory: bool = False) -> Tensor:
    """Host memory (uint8) for ``num_bytes``, rounded up to whole pages, that O_DIRECT accepts."""
    rounded = whole_pages(num_bytes)
    if not pin_memory:
        return huge_pages(rounded)
    memory = torch.empty(rounded + PAGE_BYTES, dtype=torch.uint8, pin_memory=True)
    skip = -memory.data_ptr() % PAGE_BYTES
    return memory[skip : skip + rounded]


def checksum(pages: np.ndarray, offset: int, before: int = 0) -> int:
    """A sum over whole pages (uint8) at ``offset`` in a file, added to that of what stands before them: 64 bits.

    The sum of each page's 64-bit words, times an odd number that tells pages apart: one changed word is always found,
    pages that changed places or are stale, too. Two to three times as fast as ``zlib.crc32``, which NumPy cannot do.
    """
    words = pages.view(np.uint64).reshape(-1, PAGE_BYTES // 8).sum(axis=1, dtype=np.uint64)
    places = np.arange(offset // PAGE_BYTES, offset // PAGE_BYTES + words.size, dtype=np.uint64)
    weights = places * np.uint64(0x9E3779B97F4A7C15) | np.uint64(1)
    return (before + int((words * weights).sum(dtype=np.uint64))) % (1 << 64)


def write_file(path: Path, pieces: Iterable[Tensor], direct: bool) -> int:
    """Write ``pieces``, one after the other, as the file's new contents. A failure leaves the file that was there.

    Args:
        pieces: each from ``page_aligned``, in whole pages; taken when the one before has been written, so one
            buffer can serve all.

    Returns:
        The :func:`checksum` of the bytes in memory.

    Raises:
        StateStoreError: the disk is full or fails.
    """
    new, done, total = path.with_name(path.name + ".new"), 0, 0
    try:
        handle = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | (_DIRECT if direct else 0), 0o600)
        try:
            for piece in pieces:
                view, start, end = piece.numpy().data, done, done + piece.numel()
                total = checksum(piece.numpy(), done, total)
                while done < end:
                    done += os.pwrite(handle, view[done - start :][:_CALL_BYTES], done)
            if not direct:  # or the page cache would grow until the kernel stops everybody
                os.fdatasync(handle)
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
        os.replace(new, path)
        return total
    except OSError as error:
        new.unlink(missing_ok=True)
        raise StateStoreError(
            f"writing optimizer states to {path} failed after {done:,} bytes: {error.strerror}"
        ) from None


def read_file(path: Path, pieces: Iterable[Tensor], direct: bool, expected: int | None = None) -> None:
    """Read the file into ``pieces`` (uint8, in host memory), one after the other, as in :func:`write_file`; it must
    fill them.

    Args:
        expected: what :func:`write_file` returned; None: not looked at.

    Raises:
        StateStoreError: the file is shorter, is not what was written, or cannot be read.
    """
    done = found = 0
    try:
        handle = os.open(path, os.O_RDONLY | (_DIRECT if direct else 0))
        try:
            for piece in pieces:
                view, start, end = piece.numpy().data, done, done + piece.numel()
                while done < end:
                    got = os.preadv(handle, [view[done - start :][:_CALL_BYTES]], done)
                    if got == 0:
                        raise StateStoreError(f"{path}: {end:,} bytes of optimizer states expected, {done:,} found")
                    done += got
                if expected is not None:
                    found = checksum(piece.numpy(), start, found)
            if expected is not None and found != expected:
                raise StateStoreError(
                    f"{path} is not what was written: the disk is failing, or another program wrote there; the "
                    "optimizer states in it are lost, go on from the last checkpoint with another "
                    '"hift.state.path"'
                )
            if not direct:
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
    except OSError as error:
        raise StateStoreError(
            f"reading optimizer states from {path} failed after {done:,} bytes: {error.strerror}"
        ) from None


class DiskSpeed(NamedTuple):
    """Bytes a second, one way at a time."""

    read: float
    write: float
    direct: bool


def measure(path: Path, num_bytes: int, io: str = "auto") -> DiskSpeed:
    """The faster way to write and read ``num_bytes`` at ``path``; direct if it is nearly as fast.

    Args:
        io: ``direct`` or ``buffered`` to measure that one only.
    """
    memory = page_aligned(max(num_bytes, 1))
    memory.view(torch.int64).random_()  # a file system that compresses would be too fast on zeros
    speeds = []
    for direct in {"auto": (True, False), "direct": (True,), "buffered": (False,)}[io]:
        if direct and not _DIRECT:
            continue
        try:
            speeds.append(DiskSpeed(*_times(path, memory, direct), direct))
        except StateStoreError:
            if io != "auto" or not direct:
                raise  # not only this way of writing fails
        finally:
            path.unlink(missing_ok=True)
    if not speeds:
        raise StateStoreError(f'"hift.state.io": direct is not possible at {path.parent}; use "auto" or "buffered"')
    return max(speeds, key=lambda s: (1.1 if s.direct else 1.0) / (1 / s.read + 1 / s.write))


def _times(path: Path, memory: Tensor, direct: bool) -> tuple[float, float]:
    started = time.perf_counter()
    write_file(path, [memory], direct)
    written = time.perf_counter()
    read_file(path, [memory], direct)
    ended = time.perf_counter()
    return memory.numel() / max(ended - written, 1e-9), memory.numel() / max(written - started, 1e-9)
