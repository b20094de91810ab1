"""Averaging the gradients of a group over ranks while backward goes on below it.

What travels together (a bucket of several gradients, or one that an optimizer wants whole) starts when all of it has
come, from the hook of the last that came, on a side stream: backward's kernels do not wait for it. The order is a list
that all ranks have, and never that of arrival: ranks whose batches reach other weights still meet. It is the order in
which gradients came to the first rank in the group's first backward.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hift_ds import collectives
from hift_ds.collectives import Ranks
from hift_ds.errors import HiFTError
from hift_ds.optim.autograd_graph import is_recomputed_reentrantly, nodes_below
from hift_ds.optim.group_shard import GroupShard, Member
from hift_ds.optim.parameters import GradientSums, ReplicatedParameters
from hift_ds.store.streams import SideStream, streams_of

Reduced = tuple[list[Tensor | None], list[bool]]


@dataclass
class _Message:
    """What travels together: the members whose gradients are in it, and how it is sent.

    Attributes:
        reserve: makes room for the result, on the computation's stream, which will free it.
        finish: makes the result of it, when the computation has waited.
    """

    members: list[Member]
    reserve: Callable[[], None]
    send: Callable[[], None]
    finish: Callable[[], None]


class EarlyReduction:
    """The reduction of the gradients of one backward pass.

    Args:
        groups: the active ones.
        sums: where the gradients are taken from.
        comm_dtype: of the sums on the wire.
        side: the stream on which they are sent; ``None`` on a device without streams.
        order: of what travels together, by its position from the top of the groups down; ``None`` for just that.
        waits: gradients may come in several parts: none is sent before backward is over.
    """

    def __init__(
        self,
        ranks: Ranks,
        groups: Sequence[GroupShard],
        sums: GradientSums,
        comm_dtype: torch.dtype,
        side: SideStream | None,
        order: Sequence[int] | None = None,
        waits: bool = False,
    ) -> None:
        self._ranks, self._sums, self._comm_dtype = ranks, sums, comm_dtype
        self._device = groups[0].members[0].param.device
        self._streams = streams_of(self._device) if side is not None else None
        self._side = side
        self._waits = waits
        self._arrived: dict[nn.Parameter, int] = {}  # how many came before
        # Taken off the parameters; kept until the computation has waited for what reads them on the side stream.
        self._grads: dict[nn.Parameter, Tensor | None] = {}
        self._names = {member.param: member.name for group in groups for member in group.members}
        self._shards: dict[int, list[Tensor | None]] = {group.index: [None] * len(group.members) for group in groups}
        self._messages = [message for group in groups for message in self._messages_of(group)]
        self._left = deque(self._messages if order is None else [self._messages[at] for at in order])
        self._sent: list[_Message] = []

    def arrived(self, param: nn.Parameter) -> None:
        """Take the gradient of ``param``, all of which backward has brought.

        Raises:
            HiFTError: it was sent before.
        """
        if param not in self._names or self._waits:
            return
        if param in self._grads:
            raise HiFTError(
                f"{self._names[param]}: a second gradient came in one backward, after the first was sent to the other "
                'ranks; set "zero_optimization": {"overlap_comm": false}'
            )
        self._arrived[param] = len(self._arrived)
        while self._left and all(member.param in self._arrived for member in self._left[0].members):
            self._start(self._left.popleft())

    def has(self, group: GroupShard) -> bool:
        """True if ``finish`` can be asked for the group."""
        return group.index in self._shards

    @property
    def is_empty(self) -> bool:
        """True if ``finish`` was asked for all groups."""
        return not self._shards

    def order_of_arrival(self) -> list[int]:
        """The order in which gradients came, to be the ``order`` of the next time."""
        last = [
            max(self._arrived.get(member.param, len(self._names)) for member in message.members)
            for message in self._messages
        ]
        return sorted(range(len(last)), key=lambda at: (last[at], at))

    def finish(self, group: GroupShard) -> Reduced:
        """What :meth:`hift_ds.optim.parameters.Parameters.reduce` gives; the computation waits for it."""
        while self._left:
            self._start(self._left.popleft())
        if self._sent and self._streams is not None:
            assert self._side is not None
            self._streams.current_stream(self._device).wait_stream(self._side)
        while self._sent:
            self._sent.pop(0).finish()
        # A weight without elements is in no message.
        present = [self._grads.pop(member.param, None) is not None for member in group.members]
        return self._shards.pop(group.index), present

    def abandon(self) -> None:
        """Give what was taken back to the sums so far: backward has failed."""
        if self._streams is not None:
            assert self._side is not None
            self._streams.current_stream(self._device).wait_stream(self._side)
        for param, grad in self._grads.items():
            if grad is not None:
                self._sums.set(param, grad)
        self._grads.clear()
        self._left.clear()

    def _start(self, message: _Message) -> None:
        for member in message.members:
            if member.param not in self._grads:
                self._grads[member.param] = self._sums.take(member.param)
        message.reserve()
        self._sent.append(message)
        if self._streams is None:
            message.send()
            return
        assert self._side is not None
        self._side.wait_stream(self._streams.current_stream(self._device))
        with self._streams.stream(self._side):
            message.send()

    def _messages_of(self, group: GroupShard) -> list[_Message]:
        """Topmost first, as backward goes."""
        shards = self._shards[group.index]
        if group.members[0].owner is not None:
            return [self._to_owner(member, shards, at) for at, member in reversed(list(enumerate(group.members)))]
        messages = []
        for dtype, buckets in group.buckets.items():
            positions = group.of_dtype(dtype)
            reduction = collectives.ReduceScatter(
                self._ranks, [group.members[at].whole_numel for at in positions], self._comm_dtype, self._device
            )
            messages += [self._bucket(group, positions, bucket, reduction, shards) for bucket in reversed(buckets)]
        return messages

    def _bucket(
        self,
        group: GroupShard,
        positions: Sequence[int],
        bucket: Sequence[collectives.Column],
        reduction: collectives.ReduceScatter,
        shards: list[Tensor | None],
    ) -> _Message:
        members = [group.members[at] for at in positions]

        def send() -> None:
            reduction.send(bucket, [self._grads.get(member.param) for member in members])

        def finish() -> None:
            for index, shard in reduction.take_complete():
                shards[positions[index]] = shard

        here = [members[index] for index in dict.fromkeys(column.index for column in bucket)]
        return _Message(here, lambda: reduction.reserve(bucket), send, finish)

    def _to_owner(self, member: Member, shards: list[Tensor | None], at: int) -> _Message:
        owner, ranks, buffers = member.owner, self._ranks, []
        assert owner is not None

        def reserve() -> None:
            grad = self._grads[member.param]
            buffers.append(collectives.whole_on_wire(ranks, grad, member.whole_numel, self._device, self._comm_dtype))

        def finish() -> None:
            shards[at] = collectives.mean_at_owner(ranks, buffers.pop(), owner)

        return _Message([member], reserve, lambda: collectives.sum_at_owner(ranks, buffers[0], owner), finish)


class EarlyReducedParameters(ReplicatedParameters):
    """Whole weights on every rank, whose gradients are averaged while backward goes on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._under_way: EarlyReduction | None = None
        self._hooked: list[nn.Parameter] = []
        # By the active groups, since their first backward: in which order all ranks send, and whether gradients come
        # in parts.
        self._orders: dict[tuple[int, ...], list[int]] = {}
        self._comes_in_parts: dict[tuple[int, ...], bool] = {}
        self._key: tuple[int, ...] = ()
        self._side: SideStream | None = None

    def watch(self, params: Iterable[nn.Parameter]) -> None:
        """Send gradients as they come, from now on. Called after all hooks that sum them up."""
        self._hooked = list(params)
        self.sums.hooks.add(self._hooked, self._arrived)

    def _arrived(self, param: nn.Parameter) -> None:
        if self._under_way is not None:
            with torch.no_grad():
                self._under_way.arrived(param)

    def begin_reduction(self, groups: Sequence[GroupShard], loss: Tensor) -> None:
        key = self._key = tuple(group.index for group in groups)
        if key not in self._comes_in_parts:
            self._comes_in_parts[key] = any(map(is_recomputed_reentrantly, nodes_below(loss)))
        device = groups[0].members[0].param.device
        if self._side is None and (streams := streams_of(device)) is not None:
            self._side = streams.Stream(device)
        self._under_way = EarlyReduction(
            self.ranks, groups, self.sums, self.comm_dtype, self._side, self._orders.get(key), self._comes_in_parts[key]
        )

    def forget_groups(self) -> None:
        self._orders.clear()
        self._comes_in_parts.clear()

    def abandon_reduction(self) -> None:
        if self._under_way is not None:
            self._under_way.abandon()
            self._under_way = None

    def reduce(self, group: GroupShard) -> Reduced:
        if self._under_way is None or not self._under_way.has(group):
            return super().reduce(group)
        reduced = self._under_way.finish(group)
        if self._under_way.is_empty:
            if self._key not in self._orders:
                self._orders[self._key] = self._agree(self._under_way.order_of_arrival())
            self._under_way = None
        return reduced

    def _agree(self, order: list[int]) -> list[int]:
        """The first rank's."""
        device = self._hooked[0].device
        shared = torch.tensor(order, dtype=torch.int64, device=device)
        self.ranks.comm.broadcast(shared, src=self.ranks.global_rank(0), group=self.ranks.process_group)
        first = shared.cpu().tolist()
        return first if sorted(first) == sorted(order) else order  # a simulated device has no values

    def end_training(self) -> None:
        super().end_training()
        self._under_way = None
