"""Weights cut over the ranks (ZeRO-3, arXiv 1910.02054; DeepSpeed stage 3), one layer group trained at a time.

The layout is the replicated path's: each rank updates elements [rank * n, (rank + 1) * n) of a parameter, with
n = ``ceil(numel / ranks)``. There the new values are gathered into every replica; here they are written into the
rank's shard, and the next forward gathers them anyway.

Whole gradients exist for the active group only, from backward to the boundary, where they are reduced once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hift_ds import collectives
from hift_ds.engine.zero3.host_shards import WriteBack
from hift_ds.engine.zero3.seam import WeightShards
from hift_ds.engine.zero3.shards import as_partitioned, is_partitioned, shard_of, whole_of
from hift_ds.layers.arch import whole_shape
from hift_ds.optim.group_shard import GroupShard, Piece
from hift_ds.optim.parameters import Parameters
from hift_ds.store.movers import Waits


@dataclass(eq=False)
class PartitionedParameters(Parameters):
    """Weights of which each rank holds a shard; states and updates sharded alike. For DeepSpeed's stage 3.

    Args:
        shards: the weights. The other arguments are those of :class:`Parameters`.
    """

    shards: WeightShards = field(kw_only=True)
    _owned: dict[Tensor, Tensor] = field(default_factory=dict, init=False)  # whole weights during an update
    _changed: set[nn.Parameter] = field(default_factory=set, init=False)  # whose whole copies, if any, are old
    _write_back: WriteBack | None = field(default=None, init=False)  # for shards in host memory

    def shape_of(self, param: nn.Parameter) -> tuple[int, ...]:
        return whole_shape(param)

    # -- gradients --------------------------------------------------------------------------------------------

    def take_gradients(self, params: Iterable[nn.Parameter]) -> None:
        """Take each gradient off its parameter as soon as it is there, from now on: ZeRO-3 releases the weight next,
        and a whole gradient does not belong to an empty one."""
        # From the second micro-batch on in fp32: sums of 16-bit gradients drop small ones.
        self.sums.watch(params, lambda total, grad: grad if total is None else total.float().add_(grad))

    def set_pending(self, param: nn.Parameter, grad: Tensor) -> None:
        self.sums.set(param, grad)

    def end_backward(self) -> None:
        """Release what modules without a gradient to their input left gathered."""
        self.shards.release(self._changed)
        self._changed.clear()

    # -- weights ----------------------------------------------------------------------------------------------

    def begin_update(self, group: GroupShard) -> None:
        """Release every whole copy of the group; an optimizer that looks at shapes gets the whole weights it owns."""
        self.shards.release(member.param for member in group.members)
        self._gather_owned(group)

    def begin_part(self, part: GroupShard) -> None:
        """Leave whole copies until backward ends: what of it is left may read them, old as they are, and no more."""
        self._changed.update(member.param for member in part.members)
        self.shards.written(member.param for member in part.members)
        self._gather_owned(part)

    def _gather_owned(self, group: GroupShard) -> None:
        if self.whole_tensors:
            for member in group.members:
                whole = whole_of(as_partitioned(member.param))
                if member.owner == self.ranks.rank:
                    self._owned[member.param] = whole

    def abandon_update(self, group: GroupShard) -> None:
        self._owned.clear()

    @property
    def weights_are_always_here(self) -> bool:
        return not self.whole_tensors  # which are gathered for the update

    def weight(self, group: GroupShard, piece: Piece) -> Tensor:
        """The piece of the weight: a view, in the weight's dtype, of ``piece.shape``; where the shard is (the host,
        with ``offload_param``), or on the accelerator for a whole tensor."""
        member = group.members[piece.member]
        if member.owner is not None:
            return self._owned[member.param].view(piece.shape)
        offset = piece.start - member.start
        return shard_of(as_partitioned(member.param))[offset : offset + piece.numel].view(piece.shape)

    def write_weight(self, weight: Tensor, value: Tensor, generator: torch.Generator | None) -> None:
        if weight.device == value.device or weight.device.type != "cpu":
            super().write_weight(weight, value, generator)
            return
        if self._write_back is None:
            self._write_back = WriteBack(value.device)
        self._write_back.send(weight, value, generator)

    def note_waits(self, waits: Waits) -> None:
        self.shards.waits = waits

    def finish_writes(self) -> None:
        if self._write_back is not None:
            self._write_back.finish()

    def _settle(self) -> None:
        """The host is about to read or write shards."""
        if self._write_back is not None:
            self._write_back.settle()

    def whole_weight(self, weight: Tensor) -> Tensor:
        return whole_of(weight) if is_partitioned(weight) else weight.detach()

    def held(self, weights: Iterable[Tensor]) -> list[Tensor]:
        self._settle()
        return [shard_of(weight) if is_partitioned(weight) else weight for weight in weights]

    def begin_loading(self, weights: Iterable[Tensor]) -> None:
        self._settle()
        self.shards.release(weights)  # whole copies would be used in place of the new shards

    def set_weight(self, weight: Tensor, value: Tensor) -> None:
        if not is_partitioned(weight):
            weight.detach().copy_(value)
            return
        start, end = collectives.shard_bounds(value.numel(), self.ranks.world_size, self.ranks.rank)
        shard_of(weight).copy_(value.reshape(-1)[start:end])

    def publish(self, group: GroupShard) -> None:
        """Put whole tensors back into shards; shards are where they belong already."""
        if self.whole_tensors:
            for member in group.members:
                assert member.owner is not None
                new = collectives.scatter_from_owner(
                    self.ranks,
                    self._owned.pop(member.param, None),
                    member.whole_numel,
                    member.param,
                    member.owner,
                )
                self.write_weight(shard_of(as_partitioned(member.param)), new, None)
            self.finish_writes()

    def saved_by_reference(self) -> contextlib.AbstractContextManager[None]:
        return self.shards.saved_by_reference()

    def during_backward(self) -> contextlib.AbstractContextManager[None]:
        return self.shards.saved_weights_say_that_they_are_whole()

    def close(self) -> None:
        super().close()
        if self._write_back is not None:
            self._write_back.close()
        self._owned.clear()
        self.shards.close()
