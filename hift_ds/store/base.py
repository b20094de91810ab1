"""Where the fp32 masters and optimizer states of the layer groups are, and how they move.

A store keeps, for every unit (a layer group's index, or -1 for the always-active group) and every key
(``master``, ``exp_avg`` ...), one flat 1-D tensor holding this rank's shard of all the unit's parameters.
It knows nothing of parameters or optimizers; :mod:`hift_ds.optim.group_optimizer` cuts the tensors into views.

Life of a unit: PARKED --prefetch--> ARRIVING --fetch--> RESIDENT --evict--> PARKED. Each transition may be
called again in the state it leads to.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


class Residency(enum.Enum):
    PARKED = "parked"  # only in its resting place (evict)
    ARRIVING = "arriving"  # on its way to the update device (prefetch)
    RESIDENT = "resident"  # tensors on the update device are the current ones (fetch)


@dataclass
class Traffic:
    """State traffic since the last ``take``. Bytes cross the host-device (or disk) boundary; seconds are wall time."""

    bytes_in: int = 0
    bytes_out: int = 0
    transfer_s: float = 0.0  # time transfers took
    stalled_s: float = 0.0  # of which the training step waited

    def take(self) -> Traffic:
        taken = Traffic(self.bytes_in, self.bytes_out, self.transfer_s, self.stalled_s)
        self.bytes_in = self.bytes_out = 0
        self.transfer_s = self.stalled_s = 0.0
        return taken


@dataclass
class StateStore(ABC):
    """One rank's states of all units."""

    device: torch.device  # where updates run
    traffic: Traffic = field(default_factory=Traffic, init=False)

    @abstractmethod
    def ensure(self, unit: int, key: str, numel: int, dtype: torch.dtype) -> None:
        """Reserve ``numel`` elements under ``key``, if that has not been done. Contents are undefined."""

    @abstractmethod
    def keys(self, unit: int) -> list[str]:
        """The keys reserved for ``unit``."""

    @abstractmethod
    def fetch(self, unit: int) -> dict[str, Tensor]:
        """All tensors of ``unit`` on the update device, to be changed in place; valid until ``evict``."""

    @abstractmethod
    def evict(self, unit: int) -> None:
        """Send the changed tensors of ``unit`` back to their resting place."""

    def prefetch(self, unit: int) -> None:  # noqa: B027  (a hint: stores that cannot use it ignore it)
        """``unit`` will be fetched next."""

    def synchronize(self) -> None:  # noqa: B027
        """Wait for every transfer under way. Before anything reads or writes parked states."""

    @abstractmethod
    def read(self, unit: int) -> Mapping[str, Tensor]:
        """The current values by key, flat, for a checkpoint. Not to be changed. Call ``synchronize`` first."""

    @abstractmethod
    def write(self, unit: int, key: str, values: Tensor, start: int = 0) -> None:
        """Set elements [start, start + len(values)) of ``key``. Call ``synchronize`` first."""

    def close(self) -> None:  # noqa: B027
        """Release what the store holds outside of process memory."""
