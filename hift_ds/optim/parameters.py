"""How gradients reach the rank that updates a piece, and how the new weights reach the other ranks. The words (group,
member, piece, chunk, part) are drawn in :mod:`hift_ds.optim.group_shard`.

``ReplicatedParameters`` serves DeepSpeed's stages 0, 1 and 2: every rank holds the whole weight. Gradients travel
once per optimizer step, at the accumulation boundary, and only the active group's exist.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from hift_ds import collectives
from hift_ds.collectives import Column, Ranks
from hift_ds.optim.gradient_hooks import GradientHooks
from hift_ds.optim.group_shard import Chunk, GroupShard, Member, Piece, cut_into_chunks, of_group
from hift_ds.precision import write_weight_
from hift_ds.store.movers import Waits

DEFAULT_BUCKET_NUMEL = 1 << 25  # 128 MiB in fp32


class GradientSums:
    """What the micro-batches since the last step have summed up, where ``param.grad`` cannot hold it. Only the active
    group ever has gradients, so only its sums exist.

    Attributes:
        hooks: on the weights, of all who take gradients off them.
    """

    def __init__(self) -> None:
        self._sums: dict[nn.Parameter, Tensor] = {}
        self.hooks = GradientHooks()

    def watch(self, params: Iterable[nn.Parameter], add: Callable[[Tensor | None, Tensor], Tensor]) -> None:
        """Take each gradient off its parameter as soon as backward has made it, from now on.

        Args:
            add: (the sum so far or ``None``, a gradient) -> the new sum.
        """

        def take(param: nn.Parameter) -> None:
            if param.grad is None:  # the graph led here and brought nothing
                return
            self._sums[param] = add(self._sums.get(param), param.grad)
            param.grad = None

        self.hooks.add(params, take)

    def get(self, param: nn.Parameter) -> Tensor | None:
        """The sum, whole, of the parameter's shape; ``None`` where backward has not come by."""
        return self._sums.get(param, param.grad)

    def set(self, param: nn.Parameter, grad: Tensor) -> None:
        """Go on from ``grad``, which may have another dtype than the parameter."""
        self._sums[param] = grad.to(param.device)

    def take(self, param: nn.Parameter) -> Tensor | None:
        """The sum that :meth:`get` would give, whole and of the parameter's shape, of which none is left here."""
        grad = self._sums.pop(param, None)
        if grad is None:
            grad = param.grad
        param.grad = None
        return grad

    def close(self) -> None:
        """Take no gradient any more."""
        self.hooks.remove()
        self._sums.clear()


@dataclass(eq=False)
class Parameters(ABC):
    """How the gradients and weights of layer groups are reached. Below: whole weights on every rank; in
    ``engine/zero3/parameters.py``: weights of which each rank holds a shard.

    Args:
        ranks: the data-parallel ranks.
        comm_dtype: of gradient sums on the wire. fp32 unless the user chose otherwise: sums of bf16 gradients
            over ranks lose up to 2e-3 of a weight's size.
        bucket_numel: elements in one collective, over all ranks.
        whole_tensors: give each parameter to one rank instead of a shard to each.
        slice_numel: elements of a chunk at most; ``None`` for one chunk to a group.
        by_part: chunks end where an embedding, block or head does, for updates of one at a time. With slices they
            always do, so that what a slice holds does not depend on what it is trained with.
    """

    ranks: Ranks
    comm_dtype: torch.dtype
    bucket_numel: int
    whole_tensors: bool
    slice_numel: int | None = None
    by_part: bool = False
    sums: GradientSums = field(default_factory=GradientSums, init=False)
    _chunk_ids: Iterator[int] = field(default_factory=itertools.count, init=False)

    def __post_init__(self) -> None:
        self.by_part = self.by_part or self.slice_numel is not None

    def group_shard(
        self,
        index: int,
        name: str,
        entries: Sequence[tuple[str, nn.Parameter, int]],
        parts: Sequence[tuple[int, Sequence[str]]] = (),
    ) -> GroupShard:
        """This rank's shard of a group of ``entries``: (name, parameter, param_group index).

        Args:
            parts: bottom to top, which embedding, block or head of the model, and the names that belong to it.
        """
        place = {name: at for at, (_, names) in enumerate(parts) for name in names}
        entries = sorted(entries, key=lambda entry: place.get(entry[0], 0))  # stable
        world_size, rank = self.ranks.world_size, self.ranks.rank
        shapes = [self.shape_of(param) for _, param, _ in entries]
        numels = [math.prod(shape) for shape in shapes]
        owners = collectives.assign_owners(numels, world_size) if self.whole_tensors else [None] * len(entries)
        members = []
        for (param_name, param, param_group), shape, numel, owner in zip(entries, shapes, numels, owners, strict=True):
            if owner is None:
                start, end = collectives.shard_bounds(numel, world_size, rank)
            else:
                start, end = 0, numel if owner == rank else 0
            members.append(Member(param_name, param, shape, param_group, start, end - start, owner))
        shards, first = [], 0
        for height, names in parts:
            part = tuple(members[first : first + len(names)])
            chunks = self._chunks(part) if self.by_part else ()
            shards.append(GroupShard(index, name, part, chunks, self._buckets(part), (), first, height))
            first += len(names)
        if self.by_part and parts:
            chunks = tuple(of_group(chunk, part.first) for part in shards for chunk in part.chunks)
        else:
            chunks = self._chunks(members)
        return GroupShard(index, name, tuple(members), chunks, self._buckets(members), tuple(shards))

    def merged(self, index: int, name: str, groups: Sequence[GroupShard]) -> GroupShard:
        """Neighbouring groups, bottom to top, as one: the same members, chunks and parts."""
        members: list[Member] = []
        chunks: list[Chunk] = []
        parts: list[GroupShard] = []
        for group in groups:
            first = len(members)
            members.extend(group.members)
            chunks.extend(of_group(chunk, first) for chunk in group.chunks)
            parts.extend(replace(part, index=index, name=name, first=first + part.first) for part in group.parts)
        return GroupShard(index, name, tuple(members), tuple(chunks), self._buckets(members), tuple(parts))

    def _chunks(self, members: Sequence[Member]) -> tuple[Chunk, ...]:
        return cut_into_chunks(members, self.slice_numel, self._chunk_ids)

    def _buckets(self, members: Sequence[Member]) -> dict[torch.dtype, list[list[Column]]]:
        numels_of: dict[torch.dtype, list[int]] = {}
        for member in members:
            numels_of.setdefault(member.param.dtype, []).append(member.whole_numel)
        return {
            dtype: collectives.plan_buckets(numels_of[dtype], self.ranks.world_size, self.bucket_numel)
            for dtype in sorted(numels_of, key=str)
        }

    def grad(self, group: GroupShard, piece: Piece, shard: Tensor) -> Tensor:
        """The piece of a reduced gradient: a view of ``piece.shape``, in the gradient's dtype."""
        offset = piece.start - group.members[piece.member].start
        return shard.view(-1)[offset : offset + piece.numel].view(piece.shape)

    # -- gradients --------------------------------------------------------------------------------------------

    @abstractmethod
    def end_backward(self) -> None:
        """End a micro-batch's backward."""

    def pending(self, param: nn.Parameter) -> Tensor | None:
        """The sum of the gradients of the micro-batches since the last step, of the parameter's shape; ``None`` without
        any."""
        return self.sums.get(param)

    @abstractmethod
    def set_pending(self, param: nn.Parameter, grad: Tensor) -> None:
        """Go on from ``grad``, which :meth:`pending` gave."""

    def drop_grads(self, groups: Iterable[GroupShard]) -> None:
        """Forget all gradients of ``groups``."""
        for group in groups:
            for member in group.members:
                self.sums.take(member.param)

    def begin_reduction(self, groups: Sequence[GroupShard], loss: Tensor) -> None:  # noqa: B027
        """Get ready for the backward of ``loss``, after which ``groups`` will be reduced: their gradients may be sent
        as they come."""

    def forget_groups(self) -> None:  # noqa: B027
        """Forget what was noted of groups: they have other parameters from now on."""

    def abandon_reduction(self) -> None:  # noqa: B027
        """Give up what :meth:`begin_reduction` began: backward has failed."""

    def reduce(self, group: GroupShard) -> tuple[list[Tensor | None], list[bool]]:
        """Mean gradients over ranks, and which parameters had one here. Takes the gradients off the parameters.

        Returns:
            Per member: this rank's shard, flat (fp32; on one rank the gradient as it is), ``None`` where this rank
            has no part or (on one rank) no gradient; and whether this rank's backward reached the parameter.
        """
        grads = [self.sums.take(member.param) for member in group.members]
        present = [grad is not None for grad in grads]
        if self.whole_tensors:
            return self._reduce_to_owners(group, grads), present
        return self._reduce_scatter(group, grads), present

    def _reduce_to_owners(self, group: GroupShard, grads: list[Tensor | None]) -> list[Tensor | None]:
        shards = []
        for grad, member in zip(grads, group.members, strict=True):
            assert member.owner is not None
            numel, device = member.whole_numel, member.param.device
            shards.append(collectives.reduce_to_owner(self.ranks, grad, numel, device, member.owner, self.comm_dtype))
        return shards

    def _reduce_scatter(self, group: GroupShard, grads: list[Tensor | None]) -> list[Tensor | None]:
        reduced: list[Tensor | None] = [None] * len(grads)
        for dtype, buckets in group.buckets.items():
            positions = group.of_dtype(dtype)
            members = [group.members[i] for i in positions]
            shards = collectives.reduce_scatter_shards(
                self.ranks,
                [grads[i] for i in positions],
                [member.whole_numel for member in members],
                buckets,
                self.comm_dtype,
                members[0].param.device,
            )
            for position, shard in zip(positions, shards, strict=True):
                reduced[position] = shard
        return reduced

    # -- weights ----------------------------------------------------------------------------------------------

    @abstractmethod
    def shape_of(self, param: nn.Parameter) -> tuple[int, ...]:
        """The shape of the whole parameter."""

    @abstractmethod
    def begin_update(self, group: GroupShard) -> None:
        """Get ready for the group's weights being read or changed through ``weight``. Every rank calls this."""

    def begin_part(self, part: GroupShard) -> None:  # noqa: B027
        """Do what ``begin_update`` does, while backward goes on below ``part``."""

    @abstractmethod
    def abandon_update(self, group: GroupShard) -> None:
        """End what ``begin_update`` began: the weights were only read."""

    @abstractmethod
    def publish(self, group: GroupShard) -> None:
        """End what ``begin_update`` began: bring the updated pieces to where every rank's next forward finds them."""

    @property
    @abstractmethod
    def weights_are_always_here(self) -> bool:
        """True if ``weight`` may be asked for outside of an update too."""

    @abstractmethod
    def weight(self, group: GroupShard, piece: Piece) -> Tensor:
        """The piece of the weight: a view, in the weight's dtype, of ``piece.shape``."""

    def version(self, param: nn.Parameter) -> int | None:
        """A number that grows when ``param`` is written, through ``.data`` excepted; ``None`` where there is none."""
        return None

    def write_weight(self, weight: Tensor, value: Tensor, generator: torch.Generator | None) -> None:
        """Round ``value`` (fp32) into ``weight``, which ``weight()`` gave; see :func:`hift_ds.precision.write_weight_`.
        It may be on its way there until ``finish_writes``."""
        write_weight_(weight, value, generator)

    def note_waits(self, waits: Waits) -> None:  # noqa: B027
        """Note in ``waits``, from now on, for how long the computation waits for weights."""

    def finish_writes(self) -> None:  # noqa: B027
        """Let what is computed from here on see what was written."""

    @abstractmethod
    def whole_weight(self, weight: Tensor) -> Tensor:
        """All elements of a parameter or buffer, of its whole shape and in its dtype, for a checkpoint. Every rank
        calls this."""

    @abstractmethod
    def begin_loading(self, weights: Iterable[Tensor]) -> None:
        """Get ready for ``set_weight``, which is about to change these."""

    @abstractmethod
    def set_weight(self, weight: Tensor, value: Tensor) -> None:
        """Take over ``value`` (whole, any float dtype, on the host); the same on every rank."""

    @abstractmethod
    def held(self, weights: Iterable[Tensor]) -> list[Tensor]:
        """The memory in which this rank keeps ``weights`` (parameters or buffers) from step to step, which may be the
        host's."""

    def saved_by_reference(self) -> contextlib.AbstractContextManager[None]:
        """A context for a forward, inside of which autograd saves weights so that no gathered copy stays alive."""
        return contextlib.nullcontext()

    def during_backward(self) -> contextlib.AbstractContextManager[None]:
        """A context around a backward: what functions with one of their own may ask of saved weights."""
        return contextlib.nullcontext()

    def end_training(self) -> None:
        """Take no gradient any more."""
        self.sums.close()

    def close(self) -> None:
        """Let go of the weights, which are a plain model's from now on."""
        self.end_training()


class ReplicatedParameters(Parameters):
    """Whole weights on every rank; states and updates sharded. For DeepSpeed's stages 0, 1 and 2."""

    def accumulate_in_fp32(self, params: Iterable[nn.Parameter]) -> None:
        """Sum the micro-batches of 16-bit weights in fp32 from now on: sums in bf16 drop small gradients."""
        low = [param for param in params if param.dtype != torch.float32]
        self.sums.watch(low, lambda total, grad: grad.float() if total is None else total.add_(grad))

    def end_backward(self) -> None:
        """Whole weights have nothing to release."""

    def set_pending(self, param: nn.Parameter, grad: Tensor) -> None:
        if grad.dtype != param.dtype:
            self.sums.set(param, grad)
        else:
            param.grad = grad.to(param.device)

    def shape_of(self, param: nn.Parameter) -> tuple[int, ...]:
        return tuple(param.shape)

    def begin_update(self, group: GroupShard) -> None:
        """Weights are whole and where they are used."""

    def abandon_update(self, group: GroupShard) -> None:
        """Nothing was made for the update."""

    def publish(self, group: GroupShard) -> None:
        """Bring the updated pieces to every rank's replica."""
        for member in group.members:
            if member.owner is not None:
                collectives.broadcast_from_owner(self.ranks, member.param.data, member.owner)
        if self.whole_tensors:
            return
        for dtype, buckets in group.buckets.items():
            weights = [group.members[i].param.data for i in group.of_dtype(dtype)]
            collectives.all_gather_shards(self.ranks, weights, buckets)

    @property
    def weights_are_always_here(self) -> bool:
        return True

    def weight(self, group: GroupShard, piece: Piece) -> Tensor:
        weight = group.members[piece.member].param.detach()
        return weight.view(-1)[piece.start : piece.start + piece.numel].view(piece.shape)

    def version(self, param: nn.Parameter) -> int | None:
        return param._version

    def whole_weight(self, weight: Tensor) -> Tensor:
        return weight.detach()

    def begin_loading(self, weights: Iterable[Tensor]) -> None:
        """Whole weights are changed where they are."""

    def set_weight(self, weight: Tensor, value: Tensor) -> None:
        weight.detach().copy_(value)

    def held(self, weights: Iterable[Tensor]) -> list[Tensor]:
        return list(weights)
