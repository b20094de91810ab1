"""States that stay on the update device: the baseline that the others are compared with, and the fastest."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hift_ds.store.base import StateStore
from hift_ds.store.encoded import EncodedStateStore


@dataclass
class DeviceStateStore(EncodedStateStore):
    """Keeps states where updates run and never moves them; with a codec, decodes for the update what it keeps
    compactly."""

    _memory: dict[int, Tensor] = field(default_factory=dict, init=False)
    _held: dict[int, Tensor] = field(default_factory=dict, init=False)  # in host memory

    def start(self) -> StateStore:
        for chunk in self._layouts:
            self._bring(chunk)
        return super().start()

    def host_bytes(self) -> int:
        return self.held_bytes() + (self.total_bytes() if self.device.type == "cpu" else 0)

    def _bring(self, chunk: int) -> Tensor:
        if chunk not in self._memory:
            self._memory[chunk] = torch.zeros(self.num_bytes(chunk), dtype=torch.uint8, device=self.device)
        self._memory[chunk] = self._grow(chunk, self._memory[chunk])
        return self._memory[chunk]

    def _grow(self, chunk: int, memory: Tensor) -> Tensor:
        missing = self.num_bytes(chunk) - memory.numel()
        if missing:
            self._memory[chunk] = torch.cat([memory, memory.new_zeros(missing)])
        return self._memory[chunk]

    def _send(self, chunk: int) -> None:
        pass

    def _at_rest(self, chunk: int) -> Tensor:
        return self._bring(chunk)

    def _replace_at_rest(self, chunk: int, memory: Tensor) -> None:
        self._memory[chunk] = memory

    def _hold(self, chunk: int) -> None:
        memory = self._bring(chunk)
        pinned = self.device.type != "cpu"
        self._held[chunk] = torch.empty(memory.shape, dtype=torch.uint8, pin_memory=pinned)
        self._held[chunk].copy_(memory, non_blocking=True)  # in the order of the computation, as the update is

    def _release(self, chunk: int) -> None:
        del self._held[chunk]

    def _take_back(self, chunk: int) -> None:
        held = self._held.pop(chunk)
        self._memory[chunk][: held.numel()].copy_(held, non_blocking=True)

    def close(self) -> None:
        super().close()
        self._memory.clear()
        self._held.clear()
