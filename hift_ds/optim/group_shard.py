"""What a step trains, as one rank sees it: the members of a layer group, and the pieces of them that are updated here.

The words, on two ranks: ``group_size`` 2, ``slice_numel`` 4, blocks of a weight ``w`` with 6 elements and a bias ``b``
with 3 (``tests/unit/test_optim.py`` cuts them so).

    model   | embedding | block 0 | block 1 | block 2 | ... | head |           units, bottom to top (layers/arch.py)
                        \________ __________/
                                 V
    group   | w0 w1 w2 w3 w4 w5  b0 b1 b2 | w0 w1 w2 w3 w4 w5  b0 b1 b2 |      what a step trains (layers/grouping.py)
              \______ ________/  \__ ___/   \____________ ____________/
                  member        member                 part                    a parameter; a unit's share of the group

    rank 0  | w0 w1 w2           b0 b1    | w0 w1 w2           b0 b1    |      GroupShard: of each member a shard of
    rank 1  |          w3 w4 w5        b2 |          w3 w4 w5        b2 |      ceil(numel / ranks) elements

    rank 0    [w0 w1 w2  b0] [b1]           [w0 w1 w2  b0] [b1]                chunks: fetched, updated and evicted
               \__ ___/  \/   \/                                               together; one a group without slice_numel
                piece  piece piece                                             a member's elements in one chunk

A slice is a chunk that ``slice_numel`` has made. Updates in backward end a chunk with each part, as slices do. The
masters and states of a chunk are in the state store under its id: for each key (``master``, ``exp_avg`` ...) and part
one flat buffer with an entry for each of those elements. On the update device a chunk is in a slot, memory that holds
one chunk at a time (store/parked.py). A piece of more than ``RUN_NUMEL`` elements is stepped in several runs
(optim/group_update.py). On the wire a member is a matrix with a row for each rank's shard, and a bucket, which is
what travels in one collective, is whole columns of several such matrices (collectives.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from hift_ds.collectives import Column


@dataclass(frozen=True)
class Member:
    """One parameter of a group, and this rank's shard of it: elements [start, start + numel), or none (numel 0)."""

    name: str
    param: nn.Parameter = field(repr=False)
    shape: tuple[int, ...]  # of the whole parameter, which a partitioned one does not have itself
    param_group: int  # index into the optimizer's param_groups
    start: int
    numel: int
    owner: int | None = None  # the rank that updates the whole tensor, for optimizers that look at shapes

    @property
    def whole_numel(self) -> int:
        """Elements of the whole parameter, over all ranks."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Piece:
    """A contiguous part of a member's shard that is updated at once: elements [start, start + numel) of the
    parameter."""

    member: int  # position in GroupShard.members
    start: int
    numel: int
    # Of the tensor handed to the optimizer: flat, or the parameter's own for a whole tensor.
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Chunk:
    """What is fetched, updated and evicted together: a whole group, or a slice of a large one."""

    id: int  # unique over all groups: the state store's key
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class GroupShard:
    """The parameters that are trained together: a layer group, or the always-active ones (index -1)."""

    index: int
    name: str
    members: tuple[Member, ...]
    chunks: tuple[Chunk, ...]
    # By weight dtype: columns of its parameters.
    buckets: dict[torch.dtype, list[list[Column]]] = field(repr=False)
    # Bottom to top, its embedding, blocks and head, each with the group's index; none of a part.
    parts: tuple[GroupShard, ...] = ()
    first: int = 0  # of a part: the position of its first member among the group's
    height: int = 0  # of a part: which embedding, block or head of the model it is, counted from the bottom

    @property
    def keys(self) -> list[tuple[int, int]]:
        """What names each member wherever parts of one group lie together: (group, position among its members)."""
        return [(self.index, self.first + i) for i in range(len(self.members))]

    def of_dtype(self, dtype: torch.dtype) -> list[int]:
        """Positions of the members whose weights have ``dtype``."""
        return [i for i, member in enumerate(self.members) if member.param.dtype == dtype]


def cut_into_chunks(members: Sequence[Member], slice_numel: int | None, ids: Iterator[int]) -> tuple[Chunk, ...]:
    """Chunks of at most ``slice_numel`` elements, in parameter order; a whole tensor is never cut. At least one."""
    room = float("inf") if slice_numel is None else slice_numel
    chunks: list[list[Piece]] = [[]]
    left = room
    for index, member in enumerate(members):
        if member.owner is not None:
            if member.numel > left and chunks[-1]:
                chunks.append([])
                left = room
            if member.numel:
                chunks[-1].append(Piece(index, 0, member.numel, member.shape))
                left -= member.numel
            continue
        start, end = member.start, member.start + member.numel
        while start < end:
            if left <= 0:
                chunks.append([])
                left = room
            length = int(min(end - start, left))
            chunks[-1].append(Piece(index, start, length, (length,)))
            start, left = start + length, left - length
    return tuple(Chunk(next(ids), tuple(pieces)) for pieces in chunks)


def of_group(chunk: Chunk, first: int) -> Chunk:
    """A part's chunk, its pieces counted as the group counts them."""
    return replace(chunk, pieces=tuple(replace(piece, member=piece.member + first) for piece in chunk.pieces))
