"""States in host memory, copied to the update device for the update of their group and back after it.

The copies are real on a CPU-only machine as well (host buffer to slot): the same code runs in the tests and
on an accelerator, and a CPU run reports the traffic it would have.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hift_ds.store.base import StateStore
from hift_ds.store.machine import THIS_MACHINE, Machine, processes_on_node
from hift_ds.store.movers import StreamMover, ThreadMover
from hift_ds.store.page_locked import PageLockedMemory
from hift_ds.store.parked import ParkedStateStore
from hift_ds.store.speeds import Link, measure_link
from hift_ds.store.streams import streams_of

logger = logging.getLogger(__name__)

# Of the memory that is free now, what may be page-locked: the system cannot swap it out, nor take it back.
LOCKED_SHARE = 0.9
# A copy engine serves one copy at a time: activations and weights of ZeRO-3 wait no longer than for one of these.
COPY_BYTES = 1 << 25


@dataclass
class HostStateStore(ParkedStateStore):
    """One run of host memory per chunk, all reserved when training starts.

    Args:
        pin_memory: page-lock it: needed for copies that overlap with compute. No effect without an
            accelerator.
        machine: where this runs.
    """

    pin_memory: bool = True
    machine: Machine = THIS_MACHINE
    _host: dict[int, list[Tensor]] = field(default_factory=dict, init=False)  # segments, uint8
    # Of held chunks whose newer form rests already: the old segments. And segments that were such, by their bytes.
    _before: dict[int, list[Tensor]] = field(default_factory=dict, init=False)
    _spare: dict[int, list[list[Tensor]]] = field(default_factory=dict, init=False)
    _locked: PageLockedMemory = field(default_factory=PageLockedMemory, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.pin_memory = self.pin_memory and self.device.type != "cpu"
        if self.num_slots and streams_of(self.device) is not None:
            self.mover = StreamMover(self.traffic, self.device)
        elif self.num_slots and self.device.type == "cpu" and self.machine.copies_on_threads:
            self.mover = ThreadMover(self.traffic, self.device)

    def start(self) -> StateStore:
        self.check_room(self.machine)
        needed = self.host_bytes() * processes_on_node()
        available = self.machine.host_bytes().available
        if self.pin_memory and needed > LOCKED_SHARE * available:
            logger.warning(
                "the optimizer states need %.1f GiB of host memory on this node and %.1f GiB are free: they are not "
                'page-locked, and the step waits for their copies; a compact "hift.state.codec" needs less',
                needed / 2**30, available / 2**30,
            )  # fmt: skip
            self.pin_memory = False
        for chunk in self._layouts:
            self._reserve(chunk)
        return super().start()

    def close(self) -> None:
        super().close()
        self._host.clear()
        self._before.clear()
        self._spare.clear()
        self._locked = PageLockedMemory()

    def host_bytes(self) -> int:
        return self.total_bytes() + self.held_bytes()

    def tensors_at_rest(self) -> list[Tensor]:
        return [segment for segments in self._host.values() for segment in segments]

    @property
    def place(self) -> str:
        return "in host memory"

    def _measured_link(self) -> Link:
        return measure_link(self.device, self.largest_bytes(), self.pin_memory)

    def _copy_in(self, chunk: int, memory: Tensor) -> None:
        offset = 0
        for segment in self._reserve(chunk):
            copy_bytes(memory[offset : offset + segment.numel()], segment[: memory.numel() - offset])
            offset += segment.numel()

    def _copy_out(self, chunk: int, memory: Tensor) -> None:
        # The old bytes are overwritten: from memory to memory nothing fails half way.
        offset = 0
        for segment in self._reserve(chunk):
            copy_bytes(segment[: memory.numel() - offset], memory[offset : offset + segment.numel()])
            offset += segment.numel()

    def _at_rest(self, chunk: int) -> Tensor:
        segments = self._reserve(chunk)
        return segments[0] if len(segments) == 1 else torch.cat(segments)

    def _put(self, chunk: int, memory: Tensor) -> None:
        if memory is not self._reserve(chunk)[0]:
            self._copy_out(chunk, memory)

    def _divert(self, chunk: int) -> None:
        spare = self._spare.get(self.num_bytes(chunk))
        self._before[chunk], self._host[chunk] = self._host[chunk], spare.pop() if spare else []
        self._reserve(chunk)

    def _end_diversion(self, chunk: int, back: bool) -> None:
        free = self._before.pop(chunk)
        if back:
            free, self._host[chunk] = self._host[chunk], free
        self._spare.setdefault(sum(segment.numel() for segment in free), []).append(free)

    def _reserve(self, chunk: int) -> list[Tensor]:
        """The chunk's segments, made or extended to its size. Zeros at first."""
        segments = self._host.setdefault(chunk, [])
        missing = self.num_bytes(chunk) - sum(segment.numel() for segment in segments)
        if not self.pin_memory:
            if missing or not segments:
                segments.append(torch.zeros(missing, dtype=torch.uint8))
            return segments
        while missing or not segments:
            taken = self._locked.some(missing)
            segments.append(taken)
            missing -= taken.numel()
        return segments


def copy_bytes(target: Tensor, source: Tensor) -> None:
    """Copy bytes (uint8, 1-D). On the CPU with one thread, whatever torch's number of threads: this runs beside the
    computation."""
    if type(target) is type(source) is Tensor and target.device.type == source.device.type == "cpu":
        target.numpy()[:] = source.numpy()
        return
    for start in range(0, target.numel(), COPY_BYTES):
        end = start + COPY_BYTES
        target[start:end].copy_(source[start:end], non_blocking=True)
