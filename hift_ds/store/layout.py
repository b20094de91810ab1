"""How the tensors of one chunk lie in one run of bytes, so that a chunk moves in one copy and is one file."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hift_ds.store.codecs import Codec

ALIGNMENT = 256  # of every part: any dtype can be viewed there, and vector instructions like it


def aligned(num_bytes: int, alignment: int = ALIGNMENT) -> int:
    """The next multiple of ``alignment`` bytes."""
    return -(-num_bytes // alignment) * alignment


@dataclass(frozen=True)
class Entry:
    """One key of a chunk: its tensor, and where the parts of its compact form are."""

    numel: int
    dtype: torch.dtype
    codec: Codec
    offsets: dict[str, int]  # of each part, in bytes


@dataclass
class ChunkLayout:
    """Grows at its end only, so that bytes laid out earlier stay valid."""

    entries: dict[str, Entry] = field(default_factory=dict)
    num_bytes: int = 0

    def add(self, key: str, numel: int, dtype: torch.dtype, codec: Codec) -> None:
        """Lay out ``numel`` elements of ``key``, in the codec's parts, behind what is there."""
        offsets = {}
        for part in codec.parts(numel):
            offsets[part.name] = self.num_bytes
            self.num_bytes += aligned(part.numel * part.dtype.itemsize)
        self.entries[key] = Entry(numel, dtype, codec, offsets)

    def parts(self, key: str, memory: Tensor) -> dict[str, Tensor]:
        """The parts of ``key`` as views of ``memory`` (uint8, 1-D)."""
        entry = self.entries[key]
        views = {}
        for part in entry.codec.parts(entry.numel):
            start = entry.offsets[part.name]
            views[part.name] = memory[start : start + part.numel * part.dtype.itemsize].view(part.dtype)
        return views
