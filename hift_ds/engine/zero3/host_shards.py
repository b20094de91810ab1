"""Shards in host memory on their way to the accelerator and back, without anybody waiting who need not.

DeepSpeed copies such a shard on the stream of its gathers, in front of the kernels of the module before, and has the
host wait for it. Here copies have a stream of their own, and a module's computation waits for its own weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, cast

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor

from hift_ds.engine.zero3.shards import PartitionedWeight, Shard
from hift_ds.precision import write_weight_
from hift_ds.store.base import Traffic
from hift_ds.store.movers import OUT, InlineMover, Mover, StreamMover, Ticket
from hift_ds.store.streams import SideStream, streams_of

NUM_BUFFERS = 2  # one is filled while the other travels


class Copied:
    """A handle as DeepSpeed's gathers return them: of weights whose copies were started on the current stream."""

    def __init__(self, params: Sequence[PartitionedWeight]) -> None:
        self._params = list(params)
        self._ended = get_accelerator().Event()
        self._ended.record(get_accelerator().current_stream())

    def wait(self, **options: Any) -> None:
        """What the current stream does from here on finds the weights."""
        if self._params:
            get_accelerator().current_stream().wait_event(self._ended)
        for param in self._params:
            param.ds_status = ZeroParamStatus.AVAILABLE
        self._params.clear()


class GatherHandle(Protocol):
    """What DeepSpeed's gathers return."""

    def wait(self, **options: Any) -> None:
        """The current stream waits for the gather."""


class Gathered:
    """DeepSpeed's handle of a gather of the shards ``sent``, which were made on the stream ``copies``: their memory is
    given out there again, and must not be written before the gather has read it."""

    def __init__(self, handle: GatherHandle, copies: SideStream, sent: Sequence[Tensor]) -> None:
        self._handle, self._copies, self._sent = handle, copies, list(sent)

    def wait(self, **options: Any) -> None:
        """What the current stream does from here on finds the weights."""
        self._handle.wait(**options)
        if self._sent:
            self._copies.wait_stream(get_accelerator().current_stream())
            self._sent.clear()  # not before


def start_copies(params: Sequence[PartitionedWeight]) -> Copied:
    """Bring weights, which on one rank are their shards, to the accelerator on the current stream."""
    device = get_accelerator().current_device_name()
    for param in params:
        param.ds_status = ZeroParamStatus.INFLIGHT
        param.data = param.ds_tensor.data.to(device, non_blocking=True).view(param.ds_shape)
    return Copied(params)


@contextlib.contextmanager
def on_the_accelerator(params: Sequence[PartitionedWeight]) -> Iterator[list[Tensor]]:
    """Inside this block the shards that are gathered are copies, made on the current stream. Gives these."""
    device, at_rest = get_accelerator().current_device_name(), [param.ds_tensor for param in params]
    for param, shard in zip(params, at_rest, strict=True):
        copy = cast(Shard, shard.data.to(device, non_blocking=True))
        copy.ds_numel, copy.status, copy.final_location = shard.ds_numel, shard.status, shard.final_location
        param.ds_tensor = copy
    try:
        yield [param.ds_tensor for param in params]
    finally:
        for param, shard in zip(params, at_rest, strict=True):
            param.ds_tensor = shard


class WriteBack:
    """New values on their way to shards in host memory: rounded on the accelerator, where two buffers take turns, and
    copied on a side stream.

    Args:
        device: where updates run.
    """

    def __init__(self, device: torch.device) -> None:
        traffic = Traffic()
        has_streams = streams_of(device) is not None
        self._mover: Mover = StreamMover(traffic, device) if has_streams else InlineMover(traffic, device)
        self._mover.causes[OUT] = "gather"
        self._device = device
        self._buffers = self._none()
        self._sent: list[Ticket | None] = [None] * NUM_BUFFERS
        self._next = 0

    def _none(self) -> list[Tensor]:
        return [torch.empty(0, dtype=torch.uint8, device=self._device) for _ in range(NUM_BUFFERS)]

    def send(self, shard: Tensor, value: Tensor, generator: torch.Generator | None) -> None:
        """Round ``value`` (fp32, on the device) and start it on its way into ``shard``, part of a weight."""
        at, self._next = self._next, (self._next + 1) % NUM_BUFFERS
        self._mover.wait(self._sent[at])
        if self._buffers[at].numel() < shard.nbytes:
            self._buffers[at] = torch.empty(shard.nbytes, dtype=torch.uint8, device=self._device)
        buffer = self._buffers[at][: shard.nbytes].view(shard.dtype).view(shard.shape)
        write_weight_(buffer, value, generator)
        self._sent[at] = self._mover.submit(OUT, lambda: shard.copy_(buffer, non_blocking=True))

    def finish(self) -> None:
        """Let what is computed from here on, and copied after that, see the new weights."""
        for ticket in self._sent:
            self._mover.wait(ticket)
        self._buffers = self._none()  # only an update needs them

    def settle(self) -> None:
        """Wait until the host may read and write the shards."""
        for ticket in self._sent:
            self._mover.settle(ticket)
        self._sent = [None] * NUM_BUFFERS

    def close(self) -> None:
        """Wait for what travels, and give back the stream."""
        self.settle()
        self._mover.close()
