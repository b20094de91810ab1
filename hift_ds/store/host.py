"""States in host memory, copied to the update device for the update of their group and back after it.

The copies are real on a CPU-only machine as well (host buffer to working buffer): the same code runs in the
tests and on an accelerator, and a CPU run reports the traffic it would have.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hift_ds.store.base import Residency, StateStore


@dataclass
class HostStateStore(StateStore):
    """One host buffer per unit and key, all reserved when training starts; page-locked if asked to.

    Args:
        pin_memory: page-lock the buffers. Only meaningful with an accelerator.
    """

    pin_memory: bool = True
    _host: dict[int, dict[str, Tensor]] = field(default_factory=dict, init=False)
    _working: dict[int, dict[str, Tensor]] = field(default_factory=dict, init=False)

    def residency(self, unit: int) -> Residency:
        return Residency.RESIDENT if unit in self._working else Residency.PARKED

    def ensure(self, unit: int, key: str, numel: int, dtype: torch.dtype) -> None:
        buffers = self._host.setdefault(unit, {})
        if key in buffers:
            return
        pin = self.pin_memory and self.device.type != "cpu"
        buffers[key] = torch.zeros(numel, dtype=dtype, pin_memory=pin)
        if unit in self._working:  # reserved while the unit is being updated for the first time
            self._working[unit][key] = torch.zeros(numel, dtype=dtype, device=self.device)

    def keys(self, unit: int) -> list[str]:
        return list(self._host.get(unit, ()))

    def fetch(self, unit: int) -> dict[str, Tensor]:
        if unit not in self._working:
            started = time.perf_counter()
            self._working[unit] = {
                key: buffer.to(self.device, non_blocking=True, copy=True) for key, buffer in self._host.get(unit, {}).items()
            }
            self._account(started, bytes_in=_num_bytes(self._working[unit]))
        return self._working[unit]

    def evict(self, unit: int) -> None:
        working = self._working.pop(unit, None)
        if working is None:
            return
        started = time.perf_counter()
        for key, tensor in working.items():
            # Blocking on purpose: the working tensor is freed on return, and the next fetch may read the buffer.
            self._host[unit][key].copy_(tensor)
        self._account(started, bytes_out=_num_bytes(working))

    def read(self, unit: int) -> Mapping[str, Tensor]:
        return self._working.get(unit) or self._host.get(unit, {})

    def write(self, unit: int, key: str, values: Tensor, start: int = 0) -> None:
        for tensors in (self._host, self._working):
            if unit in tensors:
                tensors[unit][key][start : start + values.numel()].copy_(values)

    def _account(self, started: float, bytes_in: int = 0, bytes_out: int = 0) -> None:
        elapsed = time.perf_counter() - started
        self.traffic.bytes_in += bytes_in
        self.traffic.bytes_out += bytes_out
        self.traffic.transfer_s += elapsed
        self.traffic.stalled_s += elapsed


def _num_bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())
