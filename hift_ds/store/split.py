"""States of which some are updated on the device and some on the host, each in a store of its own."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hift_ds.store.base import StateStore, Weights
from hift_ds.store.encoded import EncodedStateStore
from hift_ds.store.machine import Machine
from hift_ds.store.speeds import Link


@dataclass
class SplitStateStore(StateStore):
    """Two stores in one: asks the one that a chunk is in. Bytes are counted by the one of the device.

    Args:
        of_device: of what is updated on ``device``.
        of_host: of what the host updates.

    Attributes:
        on_host: ids of the chunks that the host updates; set before anything is reserved. Two threads may use this
            store at once, as long as one only touches these and the other does not.
    """

    of_device: EncodedStateStore
    of_host: EncodedStateStore
    on_host: Collection[int] = field(default=(), init=False)

    def __post_init__(self) -> None:
        self.traffic = self.of_device.traffic

    def of(self, chunk: int) -> EncodedStateStore:
        """The store that ``chunk`` is in."""
        return self.of_host if chunk in self.on_host else self.of_device

    # -- StateStore ----------------------------------------------------------------------------------------

    def ensure(self, chunk: int, key: str, numel: int, dtype: torch.dtype, weights: Weights | None = None) -> None:
        self.of(chunk).ensure(chunk, key, numel, dtype, weights)

    def start(self) -> StateStore:
        self._tell_what_may_be_held()
        for store in (self.of_device, self.of_host):
            if store.total_bytes():
                store.start()
        return self

    def _tell_what_may_be_held(self) -> None:
        for store in (self.of_device, self.of_host):
            store.may_hold = [[c for c in chunks if self.of(c) is store] for chunks in self.may_hold]

    def check_room(self, machine: Machine, beside: int = 0) -> None:
        self._tell_what_may_be_held()
        machine.check_room(self.host_bytes(), beside)

    def host_bytes(self) -> int:
        return self.of_device.host_bytes() + self.of_host.host_bytes()

    def keys(self, chunk: int) -> list[str]:
        return self.of(chunk).keys(chunk)

    def fetch(self, chunk: int) -> dict[str, Tensor]:
        tensors = self.of(chunk).fetch(chunk)
        if self.on_fetch is not None and chunk not in self.on_host:
            self.on_fetch(tensors)
        return tensors

    def evict(self, chunk: int, step: int = 0) -> None:
        self.of(chunk).evict(chunk, step)

    def prefetch(self, *chunks: int) -> None:
        self.of_device.prefetch(*(chunk for chunk in chunks if chunk not in self.on_host))

    @property
    def reads_weights(self) -> bool:
        return self.of_device.reads_weights

    def hold(self, chunk: int) -> None:
        self.of(chunk).hold(chunk)

    def release(self, chunk: int) -> None:
        self.of(chunk).release(chunk)

    def take_back(self, chunk: int) -> None:
        self.of(chunk).take_back(chunk)

    def idle(self) -> None:
        self.of_device.idle()

    def busy(self) -> None:
        self.of_device.busy()

    def tensors_at_rest(self) -> list[Tensor]:
        return self.of_device.tensors_at_rest()

    def slot_tensors(self) -> list[Tensor]:
        return self.of_device.slot_tensors()

    def synchronize(self) -> None:
        self.of_device.synchronize()
        self.of_host.synchronize()

    def read(self, chunk: int) -> Mapping[str, Tensor]:
        return self.of(chunk).read(chunk)

    def write(self, chunk: int, key: str, values: Tensor, start: int = 0) -> None:
        self.of(chunk).write(chunk, key, values, start)

    def close(self) -> None:
        self.of_device.close()
        self.of_host.close()

    # -- facts, as an EncodedStateStore has them -----------------------------------------------------------

    def num_bytes(self, chunk: int) -> int:
        """Bytes kept for ``chunk``."""
        return self.of(chunk).num_bytes(chunk)

    def total_bytes(self) -> int:
        """Bytes of the states of all chunks, in both places."""
        return self.of_device.total_bytes() + self.of_host.total_bytes()

    @property
    def num_slots(self) -> int:
        return self.of_device.num_slots

    @property
    def link(self) -> Link | None:
        """The link over which the states of what the device updates come and go."""
        return self.of_device.link

    @property
    def place(self) -> str:
        """Where states rest, in words."""
        return self.of_device.place
