"""Updates on the host for weights on an accelerator: gradients come down, new weights go up.

Both travel in their own 16 bits through page-locked buffers. While the host updates a part of the group, the next one's
gradient is on its way down and the new weights of the last on their way up; the next forward's kernels are queued
behind those: the host does not wait for them.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from hift_ds.errors import ConfigError
from hift_ds.layers.grouping import ALWAYS
from hift_ds.optim.group_shard import GroupShard
from hift_ds.optim.piecewise import PiecewiseOptimizer
from hift_ds.precision import write_weight_
from hift_ds.store.base import Traffic
from hift_ds.store.movers import IN, OUT, InlineMover, Mover, StreamMover, Ticket, one_thread
from hift_ds.store.split import SplitStateStore
from hift_ds.store.streams import streams_of

OptimizerT = TypeVar("OptimizerT", bound=torch.optim.Optimizer)
NUM_BUFFERS = 2  # each way: one is filled while the other travels


class HostStep:
    """The update of one group at a time on the host: ``gradient`` and ``send_weight`` for every part of it, then
    ``finish``. What ``expect`` was told of comes down meanwhile.

    Args:
        traffic: counts what travels: gradients in, weights out, as seen from where the update runs.
        device: where the weights are.
        pin_memory: page-lock the buffers, without which nothing overlaps.
        beside: a thread updates beside the training, which does not wait when that does.
    """

    def __init__(self, traffic: Traffic, device: torch.device, pin_memory: bool = True, beside: bool = False) -> None:
        self.traffic = traffic
        self._is_stall = not beside
        has_streams = streams_of(device) is not None
        self.mover: Mover = StreamMover(traffic, device) if has_streams else InlineMover(traffic, device)
        self.mover.causes = dict.fromkeys((IN, OUT), "host_update")
        self._pin_memory = pin_memory and device.type != "cpu"
        self._for_gradients = _buffers()
        self._coming: deque[tuple[Ticket | None, Tensor, Tensor]] = deque()  # with the gradient, and where it will be
        self._next_gradient = 0
        self._for_weights = _buffers()
        self._sent: list[Ticket | None] = [None] * NUM_BUFFERS
        self._next = 0

    def expect(self, grad: Tensor) -> None:
        """Start ``grad``, of any shape and float dtype, on its way down: it will be asked for next but one at the
        latest."""
        at, self._next_gradient = self._next_gradient, (self._next_gradient + 1) % NUM_BUFFERS
        self._for_gradients[at] = self._at_least(self._for_gradients[at], grad)
        buffer = _shaped(self._for_gradients[at], grad)
        ticket = self.mover.submit(OUT, lambda: buffer.copy_(grad, non_blocking=True))
        self._coming.append((ticket, grad, buffer))
        self.traffic.add(bytes_in=grad.numel() * grad.element_size())

    def gradient(self, grad: Tensor) -> Tensor:
        """``grad`` in fp32 on the host; the caller's."""
        if not self._coming:
            self.expect(grad)
        ticket, expected, buffer = self._coming.popleft()
        assert expected.data_ptr() == grad.data_ptr() and expected.shape == grad.shape, "another was expected"
        self.mover.settle(ticket, self._is_stall)
        return buffer.to(torch.float32, copy=True)  # the next but one overwrites the buffer

    def send_weight(self, weight: Tensor, value: Tensor, generator: torch.Generator | None) -> None:
        """Round ``value`` (fp32, on the host) and start it on its way into ``weight``."""
        at, self._next = self._next, (self._next + 1) % NUM_BUFFERS
        self.mover.settle(self._sent[at], self._is_stall)
        self._for_weights[at] = self._at_least(self._for_weights[at], weight)
        buffer = _shaped(self._for_weights[at], weight)
        write_weight_(buffer, value, generator)
        self._sent[at] = self.mover.submit(IN, lambda: weight.copy_(buffer, non_blocking=True))
        self.traffic.add(bytes_out=weight.numel() * weight.element_size())

    def finish(self) -> None:
        """Let what is computed from here on wait for the new weights."""
        for ticket in self._sent:
            self.mover.wait(ticket)

    def close(self) -> None:
        """Give back the buffers, and the streams."""
        self.mover.close()
        self._coming.clear()
        self._for_gradients, self._for_weights = _buffers(), _buffers()

    def _at_least(self, buffer: Tensor, like: Tensor) -> Tensor:
        num_bytes = like.numel() * like.element_size()
        if buffer.numel() >= num_bytes:
            return buffer
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._pin_memory)


def _buffers() -> list[Tensor]:
    return [torch.empty(0, dtype=torch.uint8) for _ in range(NUM_BUFFERS)]


@dataclass
class SplitUpdates:
    """Which chunks the host updates.

    Attributes:
        share: of the parameters.
        given: the user has said so, and no checkpoint says otherwise.
        make_store: an empty store for it.
    """

    share: float
    given: bool
    make_store: Callable[[], SplitStateStore]

    def chunks(self, groups: Mapping[int, GroupShard]) -> frozenset[int]:
        """The ids of the chunks that the host updates, spread evenly over the model from bottom to top, so that within
        a step both places have work."""
        on_host, due = set(), 0.0
        for index in sorted(index for index in groups if index != ALWAYS):
            for chunk in groups[index].chunks:
                numel = sum(piece.numel for piece in chunk.pieces)
                due += self.share * numel
                if numel and due >= numel / 2:
                    on_host.add(chunk.id)
                    due -= numel
        return frozenset(on_host)


class HostUpdates:
    """Updates on the host beside those on the device: one after the other, on a thread of their own.

    Args:
        optimizer: whose class and options they use; another object steps them, since this one is busy meanwhile.
        device: where weights are.
        on_thread: ``False``: at once, where they are submitted.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device, on_thread: bool) -> None:
        self.piecewise = PiecewiseOptimizer(twin_of(optimizer))
        self._device, self._streams = device, streams_of(device)
        self._thread = one_thread("host-updates") if on_thread else None
        self._pending: list[Future[None]] = []

    def submit(self, update: Callable[[], None]) -> None:
        """Run ``update`` after those before it."""
        if self._thread is None:
            update()
        else:
            self._pending.append(self._thread.submit(self._run, update))

    @torch.no_grad()
    def _run(self, update: Callable[[], None]) -> None:
        # A new thread starts on the first device, whatever the caller's is.
        with self._streams.device(self._device) if self._streams is not None else contextlib.nullcontext():
            update()

    def finish(self) -> None:
        """Wait for all updates."""
        while self._pending:
            self._pending[0].result()
            del self._pending[0]

    def abandon(self) -> None:
        """Wait for all updates; what they made is not wanted."""
        for update in self._pending:
            with contextlib.suppress(Exception):
                update.result()
        self._pending = []

    def close(self) -> None:
        """Take no update any more."""
        self.abandon()
        if self._thread is not None:
            self._thread.shutdown(wait=True)


def twin_of(optimizer: OptimizerT) -> OptimizerT:
    """Another optimizer with the same param_groups, whose ``step`` shares nothing else with the first's.

    Raises:
        ConfigError: it may keep what cannot be seen here.
    """
    if not type(optimizer).__module__.startswith(("torch.optim", "hift_ds.")):
        raise ConfigError(
            f'"hift.state.step_on": split is not supported with {type(optimizer).__name__}, which two threads may not '
            'step at once; use "device" or "host"'
        )
    twin = object.__new__(type(optimizer))
    twin.__dict__.update(optimizer.__dict__)
    twin.state = defaultdict(dict)
    for name, value in vars(optimizer).items():
        if isinstance(value, dict) and value and all(isinstance(v, torch.optim.Optimizer) for v in value.values()):
            setattr(twin, name, {key: twin_of(inner) for key, inner in value.items()})
    return twin


def _shaped(buffer: Tensor, like: Tensor) -> Tensor:
    return buffer[: like.numel() * like.element_size()].view(like.dtype).view(like.shape)
