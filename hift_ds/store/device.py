"""States that stay on the update device: the baseline that the others are compared with, and the fastest."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hift_ds.store.base import StateStore
from hift_ds.store.encoded import EncodedStateStore


@dataclass
class DeviceStateStore(EncodedStateStore):
    """Never moves anything; with a codec, decodes for the update what it keeps compactly."""

    _memory: dict[int, Tensor] = field(default_factory=dict, init=False)

    def start(self) -> StateStore:
        for unit in self._layouts:
            self._bring(unit)
        return super().start()

    def _bring(self, unit: int) -> Tensor:
        if unit not in self._memory:
            self._memory[unit] = torch.zeros(self.num_bytes(unit), dtype=torch.uint8, device=self.device)
        self._memory[unit] = self._grow(unit, self._memory[unit])
        return self._memory[unit]

    def _grow(self, unit: int, memory: Tensor) -> Tensor:
        missing = self.num_bytes(unit) - memory.numel()
        if missing:
            self._memory[unit] = torch.cat([memory, memory.new_zeros(missing)])
        return self._memory[unit]

    def _send(self, unit: int) -> None:
        pass

    def _at_rest(self, unit: int) -> Tensor:
        return self._bring(unit)

    def _replace_at_rest(self, unit: int, memory: Tensor) -> None:
        self._memory[unit] = memory

    def close(self) -> None:
        super().close()
        self._memory.clear()
