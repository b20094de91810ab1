"""The trained weights of a run whose nodes keep their checkpoints to themselves: each has its own ranks' masters
only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hift_ds.checkpoint.saved_checkpoint import SavedCheckpoint
from hift_ds.ranks import host_group
from hift_ds.store.base import MASTER


def gathered_weights(saved: SavedCheckpoint) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every weight on the first rank, where there are masters their fp32 values; empty tensors
    elsewhere.

    A collective: every rank must exhaust it. Memory: one weight, on the first rank in fp32 and once more in pieces.

    Args:
        saved: this rank's copy of a checkpoint that all ranks have written together.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    own = saved.states_of(rank)
    for name in saved.weight_names:
        pieces: list[Any] | None = [None] * world_size if rank == 0 else None
        dist.gather_object(own.pieces(name, MASTER), pieces, group=host_group())
        yield name, torch.empty(0) if pieces is None else _assembled(saved.weight(name), sum(pieces, []))


def _assembled(weight: Tensor, pieces: list[tuple[int, Tensor]]) -> Tensor:
    """What no piece covers was never updated: there the weight is its own master."""
    if not pieces:
        return weight
    whole = weight.float().reshape(-1)
    for start, piece in pieces:
        whole[start : start + piece.numel()] = piece
    return whole.view(weight.shape)
