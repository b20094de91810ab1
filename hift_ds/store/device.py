"""States that stay on the update device: the baseline that the others are compared with, and the fastest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hift_ds.store.base import StateStore


@dataclass
class DeviceStateStore(StateStore):
    """Never moves anything."""

    _tensors: dict[int, dict[str, Tensor]] = field(default_factory=dict, init=False)

    def ensure(self, unit: int, key: str, numel: int, dtype: torch.dtype) -> None:
        tensors = self._tensors.setdefault(unit, {})
        if key not in tensors:
            tensors[key] = torch.zeros(numel, dtype=dtype, device=self.device)

    def keys(self, unit: int) -> list[str]:
        return list(self._tensors.get(unit, ()))

    def fetch(self, unit: int) -> dict[str, Tensor]:
        return dict(self._tensors.get(unit, {}))

    def evict(self, unit: int) -> None:
        pass

    def read(self, unit: int) -> Mapping[str, Tensor]:
        return self._tensors.get(unit, {})

    def write(self, unit: int, key: str, values: Tensor, start: int = 0) -> None:
        self._tensors[unit][key][start : start + values.numel()].copy_(values)
