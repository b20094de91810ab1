"""Where the master and the states of a piece lie in a chunk's buffers.

A store keeps flat buffers, by chunk and key. States with an entry per weight share one buffer per key and embedding,
block or head, piece after piece, so that a compact form (blocks, stochastic rounding) does not depend on what else is
in the chunk; a state with a shape of its own (Adafactor's factors) has one to itself.
"""

from __future__ import annotations

import bisect
import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hift_ds.optim.group_shard import Chunk, GroupShard, Piece
from hift_ds.optim.piecewise import PieceState


@dataclass(frozen=True)
class StateView:
    """Where one state tensor of one piece is: elements [offset, offset + numel) of the store's buffer ``key``."""

    key: str
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    def view(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The tensor, a view of ``shape`` into a chunk's buffers by key."""
        return tensors[self.key][self.offset : self.offset + math.prod(self.shape)].view(self.shape)


@dataclass
class PieceRecord:
    """What is known of a piece's state between its turns."""

    master: StateView | None
    slots: dict[str, StateView] = field(default_factory=dict)  # state tensors, by the optimizer's key
    scalars: PieceState = field(default_factory=dict)  # "step" and the like: tiny, they stay where they are

    def copy(self) -> PieceRecord:
        """The record as it is now, which later changes of this one do not touch; scalars are shared."""
        return PieceRecord(self.master, dict(self.slots), dict(self.scalars))

    def state(self, tensors: Mapping[str, Tensor], piece: Piece, run: Piece) -> PieceState | None:
        """What the optimizer knows of ``run``, a part of ``piece``; ``None`` before the first update."""
        if not (self.slots or self.scalars):
            return None
        state = {key: part_of(slot.view(tensors), piece, run) for key, slot in self.slots.items()}
        # Each run counts its own step.
        return state | (self.scalars if run is piece else copied(self.scalars))


@dataclass(frozen=True)
class StateTensor:
    """A master or state tensor that holds values, as a checkpoint names it."""

    param: str
    key: str  # the optimizer's, or MASTER
    piece: Piece
    place: StateView
    flat: bool  # has an entry per weight: read flat, without the parameter's shape

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in a checkpoint: flat, or the state's own."""
        return (self.piece.numel,) if self.flat else self.place.shape

    def view(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The tensor, a view of ``shape`` into the chunk's buffers by key."""
        return self.place.view(tensors).view(self.shape)


def by_part(group: GroupShard, chunk: Chunk) -> list[list[int]]:
    """Positions of the chunk's pieces, those of one embedding, block or head together."""
    starts = [part.first for part in group.parts]
    together: dict[int, list[int]] = {}
    for i, piece in enumerate(chunk.pieces):
        together.setdefault(bisect.bisect_right(starts, piece.member), []).append(i)
    return list(together.values())


def shared_key(group: GroupShard, chunk: Chunk, shared: list[int], key: str) -> str:
    """The store's key of the buffer that the pieces at positions ``shared`` have together for the state ``key``: no
    other of the model has that name."""
    first = chunk.pieces[shared[0]]
    return f"{key}:{group.members[first.member].name}[{first.start}:]"


def part_of(whole: Tensor, piece: Piece, run: Piece) -> Tensor:
    """The elements of ``run``, a part of ``piece``, in a tensor with one entry per element of ``piece``."""
    return whole if run is piece else whole[run.start - piece.start :][: run.numel]


def copied(scalars: PieceState) -> PieceState:
    """The same scalars, which later steps of an optimizer do not touch."""
    return {key: value.clone() if isinstance(value, Tensor) else copy.deepcopy(value) for key, value in scalars.items()}
