"""Weights and gradients of the layer groups, as one rank sees them: which piece it updates, how gradients
reach it and how the new weights reach the other ranks.

``ReplicatedParameters`` serves DeepSpeed's stages 0, 1 and 2: every rank holds the whole weight. Gradients travel
once per optimizer step, at the accumulation boundary, and only the active group's exist.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hift_ds import collectives
from hift_ds.collectives import Column, Ranks

DEFAULT_BUCKET_NUMEL = 1 << 25  # 128 MiB in fp32


@dataclass(frozen=True)
class Piece:
    """This rank's part of one parameter: elements [start, start + numel) of it, or none (numel 0)."""

    name: str
    param: nn.Parameter = field(repr=False)
    param_group: int  # index into the optimizer's param_groups
    start: int
    numel: int
    owner: int | None = None  # the rank that updates the whole tensor, for optimizers that look at shapes

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor handed to the optimizer: flat, or the parameter's own for a whole tensor."""
        return tuple(self.param.shape) if self.owner is not None else (self.numel,)


@dataclass(frozen=True)
class Unit:
    """The parameters that are trained together: a layer group, or the always-active ones (index -1)."""

    index: int
    name: str
    pieces: tuple[Piece, ...]
    buckets: dict[torch.dtype, list[list[Column]]] = field(repr=False)  # by weight dtype: columns of its parameters

    def of_dtype(self, dtype: torch.dtype) -> list[int]:
        """Positions of the pieces whose weights have ``dtype``."""
        return [i for i, piece in enumerate(self.pieces) if piece.param.dtype == dtype]


class ReplicatedParameters:
    """Whole weights on every rank; states and updates sharded.

    Args:
        ranks: the data-parallel ranks.
        comm_dtype: of gradient sums on the wire. fp32 unless the user chose otherwise: sums of bf16 gradients
            over ranks lose up to 2e-3 of a weight's size.
        bucket_numel: elements in one collective, over all ranks.
        whole_tensors: give each parameter to one rank instead of a shard to each.
    """

    def __init__(self, ranks: Ranks, comm_dtype: torch.dtype, bucket_numel: int, whole_tensors: bool) -> None:
        self.ranks = ranks
        self.comm_dtype = comm_dtype
        self.bucket_numel = bucket_numel
        self.whole_tensors = whole_tensors
        self._accumulated: dict[nn.Parameter, Tensor] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def unit(self, index: int, name: str, members: Sequence[tuple[str, nn.Parameter, int]]) -> Unit:
        """The unit of ``members``: (name, parameter, param_group index)."""
        numels = [param.numel() for _, param, _ in members]
        world_size, rank = self.ranks.world_size, self.ranks.rank
        owners = collectives.assign_owners(numels, world_size) if self.whole_tensors else [None] * len(members)
        pieces = []
        for (param_name, param, param_group), owner in zip(members, owners, strict=True):
            if owner is None:
                start, end = collectives.shard_bounds(param.numel(), world_size, rank)
            else:
                start, end = 0, param.numel() if owner == rank else 0
            pieces.append(Piece(param_name, param, param_group, start, end - start, owner))
        buckets = {
            dtype: collectives.plan_buckets([p.numel() for _, p, _ in members if p.dtype == dtype], world_size, self.bucket_numel)
            for dtype in sorted({p.dtype for _, p, _ in members}, key=str)
        }
        return Unit(index, name, tuple(pieces), buckets)

    def weight(self, piece: Piece) -> Tensor:
        """This rank's piece of the weight: a view, in the weight's dtype, of ``piece.shape``."""
        weight = piece.param.detach()
        if piece.owner is not None:
            return weight
        return weight.view(-1)[piece.start : piece.start + piece.numel]

    # -- gradients --------------------------------------------------------------------------------------------

    def accumulate_in_fp32(self, params: Iterable[nn.Parameter]) -> None:
        """From now on sum the micro-batches of 16-bit weights in fp32: sums in bf16 drop small gradients.

        Only the active group ever has gradients, so only its accumulators exist.
        """
        for param in params:
            if param.dtype != torch.float32:
                self._hooks.append(param.register_post_accumulate_grad_hook(self._accumulate))

    def _accumulate(self, param: nn.Parameter) -> None:
        total = self._accumulated.get(param)
        if total is None:
            self._accumulated[param] = param.grad.float()
        else:
            total.add_(param.grad)
        param.grad = None

    def _take_grad(self, param: nn.Parameter) -> Tensor | None:
        grad = self._accumulated.pop(param, None)
        if grad is None:
            grad = param.grad
        param.grad = None
        return grad

    def drop_grads(self, units: Iterable[Unit]) -> None:
        for unit in units:
            for piece in unit.pieces:
                self._take_grad(piece.param)

    def reduce(self, unit: Unit) -> tuple[list[Tensor | None], list[bool]]:
        """Mean gradients over ranks, and which parameters had one here. Takes the gradients off the parameters.

        Returns:
            Per piece: fp32 gradient of ``piece.shape``, ``None`` where this rank has no part or (on one rank) no
            gradient; and whether this rank's backward reached the parameter.
        """
        grads = [self._take_grad(piece.param) for piece in unit.pieces]
        present = [grad is not None for grad in grads]
        if self.ranks.world_size == 1:
            return [
                None if g is None else g.reshape(piece.shape).float() for g, piece in zip(grads, unit.pieces, strict=True)
            ], present
        if self.whole_tensors:
            return self._reduce_to_owners(unit, grads), present
        return self._reduce_scatter(unit, grads), present

    def _reduce_to_owners(self, unit: Unit, grads: list[Tensor | None]) -> list[Tensor | None]:
        return [
            collectives.reduce_to_owner(self.ranks, grad, piece.param, piece.owner, self.comm_dtype)
            for grad, piece in zip(grads, unit.pieces, strict=True)
        ]

    def _reduce_scatter(self, unit: Unit, grads: list[Tensor | None]) -> list[Tensor | None]:
        reduced: list[Tensor | None] = [None] * len(grads)
        for dtype, buckets in unit.buckets.items():
            positions = unit.of_dtype(dtype)
            params = [unit.pieces[i].param for i in positions]
            shards = collectives.reduce_scatter_shards(
                self.ranks,
                [grads[i] for i in positions],
                [p.numel() for p in params],
                buckets,
                self.comm_dtype,
                params[0].device,
            )
            for position, shard in zip(positions, shards, strict=True):
                reduced[position] = shard if shard.numel() else None
        return reduced

    # -- weights ----------------------------------------------------------------------------------------------

    def publish(self, unit: Unit) -> None:
        """Bring the updated pieces to every rank's replica."""
        if self.whole_tensors:
            for piece in unit.pieces:
                collectives.broadcast_from_owner(self.ranks, piece.param.data, piece.owner)
            return
        for dtype, buckets in unit.buckets.items():
            weights = [unit.pieces[i].param.data for i in unit.of_dtype(dtype)]
            collectives.all_gather_shards(self.ranks, weights, buckets)

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._accumulated.clear()
