"""Moving one group's gradients and weights between ranks. Free functions; no training state.

Layout: ZeRO-3's. A parameter of ``numel`` elements is cut into ``world_size`` shards of
``ceil(numel / world_size)``, the last ones short or empty. Several parameters travel together: the buffer is
rank-major, row r holding rank r's shard (or a column range of it) of each.

A bucket is a static list of such column ranges, the same on all ranks and launched in a fixed order, with
missing gradients sent as zeros: ranks that disagree about which parameters a micro-batch touched (an expert
without a token) must still run the same collectives.

With one rank every function is a no-op or a view, so that callers have no second code path.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


class Ranks:
    """The data-parallel ranks: a process group and the module whose functions reach it.

    Args:
        comm: ``torch.distributed`` or ``deepspeed.comm`` (then DeepSpeed's communication logger counts us too).
        process_group: the ranks that hold replicas; ``None`` for a single process.
        sequence_ranks: so many of them share each sequence (Ulysses): their gradients are parts of one and add up.
    """

    def __init__(
        self, comm: ModuleType | None = None, process_group: ProcessGroup | None = None, sequence_ranks: int = 1
    ) -> None:
        self._comm = comm
        self.process_group = process_group
        self.world_size = 1 if comm is None else comm.get_world_size(group=process_group)
        self.rank = 0 if comm is None else comm.get_rank(group=process_group)
        self.num_batches = self.world_size // sequence_ranks  # over which gradients are averaged
        self._global_ranks: list[int] | None = None
        # Gradient elements handed to reduce collectives by this rank, padding excluded.
        self.grad_numel_sent = 0

    @property
    def comm(self) -> ModuleType:
        """What was given as ``comm``. Only where there are several ranks is there something to ask of it."""
        assert self._comm is not None
        return self._comm

    def global_rank(self, rank: int) -> int:
        """The rank in the default process group of group member ``rank``, as broadcast and reduce want it."""
        if self._global_ranks is None:
            import torch.distributed as dist

            self._global_ranks = dist.get_process_group_ranks(self.process_group or dist.group.WORLD)
        return self._global_ranks[rank]


def shard_bounds(numel: int, world_size: int, rank: int) -> tuple[int, int]:
    """[start, end) of the rank's shard of a flat parameter, without padding."""
    per_rank = shard_numel(numel, world_size)
    start = min(rank * per_rank, numel)
    return start, min(start + per_rank, numel)


def shard_numel(numel: int, world_size: int) -> int:
    """Shard length with padding: the same on every rank."""
    return -(-numel // world_size)


@dataclass(frozen=True)
class Column:
    """Columns [start, start + length) of parameter ``index``'s (world_size, shard_numel) matrix."""

    index: int
    start: int
    length: int


def plan_buckets(numels: Sequence[int], world_size: int, bucket_numel: int) -> list[list[Column]]:
    """Columns packed into buckets of at most ``bucket_numel`` elements (over all ranks), in parameter order."""
    width = max(1, bucket_numel // world_size)  # columns in one bucket
    buckets: list[list[Column]] = []
    room = 0
    for index, numel in enumerate(numels):
        start, left = 0, shard_numel(numel, world_size)
        while left:
            if room == 0:
                buckets.append([])
                room = width
            length = min(left, room)
            buckets[-1].append(Column(index, start, length))
            start, left, room = start + length, left - length, room - length
    return buckets


def _rows(numel: int, world_size: int, column: Column) -> Iterator[tuple[int, int, int]]:
    """(rank, first element, end) of the real elements, padding excluded, that ``column`` covers per rank."""
    per_rank = shard_numel(numel, world_size)
    for rank in range(world_size):
        start = min(rank * per_rank + column.start, numel)
        end = min(start + column.length, (rank + 1) * per_rank, numel)
        if end > start:
            yield rank, start, end


def reduce_scatter_shards(
    ranks: Ranks,
    grads: Sequence[Tensor | None],
    numels: Sequence[int],
    buckets: Sequence[Sequence[Column]],
    dtype: torch.dtype,
    device: torch.device,
) -> list[Tensor | None]:
    """Average the gradients of parameters over ranks, of each a shard on each rank.

    Args:
        grads: by parameter, whole, of any shape and float dtype; ``None`` counts as zeros.
        numels: elements of each parameter.
        buckets: the columns that travel in one collective; the same on every rank, and all columns in one of them.
        dtype: of the sum on the wire.
        device: where ranks talk to each other.

    Returns:
        This rank's shard of the mean gradient of each parameter, flat, fp32, unpadded; ``None`` where it has no
        element. On one rank the gradients themselves, flat, in the dtypes they have, and ``None`` where there is none.
    """
    if ranks.world_size == 1:
        return [None if grad is None else grad.reshape(-1) for grad in grads]
    reduction = ReduceScatter(ranks, numels, dtype, device)
    for bucket in buckets:
        reduction.send(bucket, grads)
    shards = dict(reduction.take_complete())
    return [shards.get(index) for index in range(len(numels))]


class ReduceScatter:
    """The buckets of one list of parameters, sent one by one, in any order that is the same on every rank.

    Args:
        numels: of the parameters.
        dtype: of the sum on the wire.
    """

    def __init__(self, ranks: Ranks, numels: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self._ranks, self._numels, self._dtype, self._device = ranks, numels, dtype, device
        bounds = [shard_bounds(numel, ranks.world_size, ranks.rank) for numel in numels]
        self._shard_numels = [end - start for start, end in bounds]
        self._columns_left = [shard_numel(numel, ranks.world_size) for numel in numels]
        self._shards: dict[int, Tensor] = {}

    def send(self, bucket: Sequence[Column], grads: Sequence[Tensor | None]) -> None:
        """Average the columns of ``bucket``. The device waits, the host does not.

        Args:
            grads: by parameter, as :func:`reduce_scatter_shards` takes them; those that the bucket does not name are
                not looked at.
        """
        ranks, width = self._ranks, sum(column.length for column in bucket)
        self.reserve(bucket)
        send = torch.zeros(ranks.world_size, width, dtype=self._dtype, device=self._device)
        offset = 0
        for column in bucket:
            grad = grads[column.index]
            if grad is not None:
                flat = grad.reshape(-1)
                for row, start, end in _rows(self._numels[column.index], ranks.world_size, column):
                    send[row, offset : offset + end - start].copy_(flat[start:end])
                    ranks.grad_numel_sent += end - start
            offset += column.length
        received = torch.empty(width, dtype=self._dtype, device=self._device)
        ranks.comm.reduce_scatter_tensor(received, send.view(-1), group=ranks.process_group)
        del send
        offset = 0
        for column in bucket:
            self._keep(column, received[offset : offset + column.length])
            offset += column.length

    def reserve(self, bucket: Sequence[Column]) -> None:
        """Make room for what :meth:`send` will leave here, on the current stream."""
        for index in {column.index for column in bucket} - self._shards.keys():
            if numel := self._shard_numels[index]:
                self._shards[index] = torch.empty(numel, dtype=torch.float32, device=self._device)

    def _keep(self, column: Column, values: Tensor) -> None:
        length = max(0, min(column.length, self._shard_numels[column.index] - column.start))
        if length:
            self._shards[column.index][column.start : column.start + length].copy_(values[:length])
        self._columns_left[column.index] -= column.length

    def take_complete(self) -> list[tuple[int, Tensor]]:
        """(parameter, this rank's shard of its mean gradient: flat, fp32, unpadded) of those all of whose columns were
        sent."""
        complete = [index for index in self._shards if not self._columns_left[index]]
        return [(index, self._shards.pop(index).div_(self._ranks.num_batches)) for index in complete]


def all_gather_shards(
    ranks: Ranks,
    weights: Sequence[Tensor],
    buckets: Sequence[Sequence[Column]],
) -> None:
    """Bring every rank's shard into every replica, in place.

    Args:
        weights: whole replicas, of any shape and one dtype, contiguous; this rank's shard of each is up to date.
        buckets: the columns that travel in one collective; the same on every rank, and all columns in one of them.
    """
    if ranks.world_size == 1 or not weights:
        return
    world_size, rank = ranks.world_size, ranks.rank
    flats = [weight.view(-1) for weight in weights]
    for bucket in buckets:
        width = sum(column.length for column in bucket)
        send = torch.zeros(width, dtype=flats[0].dtype, device=flats[0].device)
        offset = 0
        for column in bucket:
            for row, start, end in _rows(flats[column.index].numel(), world_size, column):
                if row == rank:
                    send[offset : offset + end - start].copy_(flats[column.index][start:end])
            offset += column.length
        received = torch.empty(world_size, width, dtype=send.dtype, device=send.device)
        ranks.comm.all_gather_into_tensor(received.view(-1), send, group=ranks.process_group)
        offset = 0
        for column in bucket:
            for row, start, end in _rows(flats[column.index].numel(), world_size, column):
                if row != rank:
                    flats[column.index][start:end].copy_(received[row, offset : offset + end - start])
            offset += column.length


def reduce_to_owner(
    ranks: Ranks,
    grad: Tensor | None,
    numel: int,
    device: torch.device,
    owner: int,
    dtype: torch.dtype,
) -> Tensor | None:
    """Average the gradient of one parameter over ranks, for rank ``owner`` alone.

    Args:
        grad: whole, of any shape and float dtype; ``None`` counts as zeros.
        numel: elements of the parameter.
        device: where ranks talk to each other.
        dtype: of the sum on the wire.

    Returns:
        The mean gradient on rank ``owner``, flat, fp32; ``None`` elsewhere. On one rank the gradient itself, flat, in
        the dtype it has, and ``None`` if there is none.
    """
    if ranks.world_size == 1:
        return None if grad is None else grad.reshape(-1)
    buffer = whole_on_wire(ranks, grad, numel, device, dtype)
    sum_at_owner(ranks, buffer, owner)
    return mean_at_owner(ranks, buffer, owner)


def whole_on_wire(ranks: Ranks, grad: Tensor | None, numel: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The first of the three steps of :func:`reduce_to_owner`: what is sent, flat, in ``dtype``; may be the gradient's
    own memory."""
    ranks.grad_numel_sent += 0 if grad is None else grad.numel()
    return torch.zeros(numel, dtype=dtype, device=device) if grad is None else grad.reshape(-1).to(dtype)


def sum_at_owner(ranks: Ranks, buffer: Tensor, owner: int) -> None:
    """The second of the three steps of :func:`reduce_to_owner`: rank ``owner`` gets the sum of all buffers in place."""
    ranks.comm.reduce(buffer, dst=ranks.global_rank(owner), group=ranks.process_group)


def mean_at_owner(ranks: Ranks, buffer: Tensor, owner: int) -> Tensor | None:
    """The third of the three steps of :func:`reduce_to_owner`: what it returns, of the sum in ``buffer``."""
    return buffer.float().div_(ranks.num_batches) if ranks.rank == owner else None


def broadcast_from_owner(ranks: Ranks, weight: Tensor, owner: int) -> None:
    """Copy rank ``owner``'s whole weight into every replica, in place."""
    if ranks.world_size > 1:
        ranks.comm.broadcast(weight, src=ranks.global_rank(owner), group=ranks.process_group)


def scatter_from_owner(ranks: Ranks, weight: Tensor | None, numel: int, like: Tensor, owner: int) -> Tensor:
    """This rank's shard (flat, unpadded) of a weight of which rank ``owner`` has the whole.

    Args:
        weight: on the owner, any shape; not looked at elsewhere.
        like: has the weight's dtype and device.
    """
    start, end = shard_bounds(numel, ranks.world_size, ranks.rank)
    if ranks.world_size == 1:
        assert weight is not None
        return weight.reshape(-1)
    per_rank = shard_numel(numel, ranks.world_size)
    received = torch.empty(per_rank, dtype=like.dtype, device=like.device)
    rows = None
    if ranks.rank == owner:
        assert weight is not None
        padded = torch.zeros(ranks.world_size, per_rank, dtype=like.dtype, device=like.device)
        padded.view(-1)[:numel].copy_(weight.reshape(-1))
        rows = list(padded)
    ranks.comm.scatter(received, rows, src=ranks.global_rank(owner), group=ranks.process_group)
    return received[: end - start]


def join_norms_and_flags(
    ranks: Ranks, norm: Tensor, flags: Sequence[bool | Tensor]
) -> tuple[Tensor, float | None, list[bool]]:
    """One small all-reduce for two questions, and one wait of the host for the device; every rank gets the same
    answers.

    Args:
        norm: 0-dim, fp32: the 2-norm of the elements that this rank holds, and no other rank does.
        flags: as many on every rank; a 0-dim tensor for one that only the device knows yet.

    Returns:
        The 2-norm of all ranks' elements, on ``norm``'s device; its value, where it has been read with the flags; and
        for each flag whether any rank raised it.
    """
    if ranks.world_size == 1:
        return _read_with_norm(norm, flags)
    raised = torch.ones(len(flags), dtype=torch.float32, device=norm.device)
    for position, flag in enumerate(flags):
        if isinstance(flag, Tensor):
            raised[position].copy_(flag)
        elif not flag:  # seldom; copying the flags from the host would wait for the device
            raised[position].zero_()
    summed = torch.cat([norm.square().reshape(1), raised])
    ranks.comm.all_reduce(summed, group=ranks.process_group)
    norm = summed[0].sqrt()
    if not flags:
        return norm, None, []
    value, *counts = torch.cat([norm.reshape(1), summed[1:]]).cpu().tolist()
    return norm, value, [count > 0 for count in counts]


def _read_with_norm(norm: Tensor, flags: Sequence[bool | Tensor]) -> tuple[Tensor, float | None, list[bool]]:
    on_device = [flag.to(norm.device, torch.float32).reshape(()) for flag in flags if isinstance(flag, Tensor)]
    if not on_device:
        return norm, None, [bool(flag) for flag in flags]
    value, *read = torch.stack([norm, *on_device]).cpu().tolist()
    answers = iter(read)
    return norm, value, [next(answers) > 0 if isinstance(flag, Tensor) else flag for flag in flags]


def assign_owners(numels: Sequence[int], world_size: int) -> list[int]:
    """A rank for each whole tensor, largest first to the least loaded rank: balanced and the same everywhere."""
    load = [0] * world_size
    owners = [0] * len(numels)
    for index in sorted(range(len(numels)), key=lambda i: (-numels[i], i)):
        owner = min(range(world_size), key=lambda r: (load[r], r))
        owners[index] = owner
        load[owner] += numels[index]
    return owners
