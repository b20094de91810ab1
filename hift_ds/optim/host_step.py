"""Updates on the host for weights on an accelerator: gradients come down, new weights go up.

Both travel in their own 16 bits through page-locked buffers. While the host updates a part of the group, the next one's
gradient is on its way down and the new weights of the last on their way up; the next forward's kernels are queued
behind those: the host does not wait for them.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from hift_ds.precision import write_weight_
from hift_ds.store.movers import IN, OUT, InlineMover, Mover, StreamMover, streams_of

NUM_BUFFERS = 2  # each way: one is filled while the other travels


class HostStep:
    """One group at a time: ``gradient`` and ``send_weight`` for every part of it, then ``finish``. What ``expect`` was
    told of comes down meanwhile.

    Args:
        traffic: counts what travels: gradients in, weights out, as seen from where the update runs.
        device: where the weights are.
        pin_memory: page-lock the buffers, without which nothing overlaps.
    """

    def __init__(self, traffic: Any, device: torch.device, pin_memory: bool = True) -> None:
        self.traffic = traffic
        has_streams = streams_of(device) is not None
        self.mover: Mover = StreamMover(traffic, device) if has_streams else InlineMover(traffic, device)
        self.mover.causes = dict.fromkeys((IN, OUT), "host_update")
        self._pin_memory = pin_memory and device.type != "cpu"
        self._for_gradients = _buffers()
        self._coming: deque[tuple[Any, Tensor, Tensor]] = deque()  # ticket, gradient, where it will be
        self._next_gradient = 0
        self._for_weights = _buffers()
        self._sent: list[Any] = [None] * NUM_BUFFERS  # tickets
        self._next = 0

    def expect(self, grad: Tensor) -> None:
        """Start ``grad``, which will be asked for next but one at the latest, on its way down."""
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
        self.mover.settle(ticket)
        return buffer.to(torch.float32, copy=True)  # the next but one overwrites the buffer

    def send_weight(self, weight: Tensor, value: Tensor, generator: torch.Generator | None) -> None:
        """Round ``value`` (fp32, on the host) and start it on its way into ``weight``."""
        at, self._next = self._next, (self._next + 1) % NUM_BUFFERS
        self.mover.settle(self._sent[at])
        self._for_weights[at] = self._at_least(self._for_weights[at], weight)
        buffer = _shaped(self._for_weights[at], weight)
        write_weight_(buffer, value, generator)
        self._sent[at] = self.mover.submit(IN, lambda: weight.copy_(buffer, non_blocking=True))
        self.traffic.add(bytes_out=weight.numel() * weight.element_size())

    def finish(self) -> None:
        """What is computed from here on sees the new weights."""
        for ticket in self._sent:
            self.mover.wait(ticket)

    def close(self) -> None:
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


def _shaped(buffer: Tensor, like: Tensor) -> Tensor:
    return buffer[: like.numel() * like.element_size()].view(like.dtype).view(like.shape)
