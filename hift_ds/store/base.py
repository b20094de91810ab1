"""Where the fp32 masters and optimizer states of the layer groups are, and how they move.

A store keeps, for every chunk of a layer group (by its id) and every key (``master``, ``exp_avg`` ...),
one flat 1-D tensor holding this rank's shard of all the chunk's parameters. It knows nothing of parameters or
optimizers; :mod:`hift_ds.optim.group_states` cuts the tensors into views.

Life of a chunk: parked --prefetch--> arriving --fetch--> resident --evict--> parked. Parked: only in its resting place.
Arriving: its copy to the update device is under way, or it was evicted and its memory there has not been used again.
Resident: its tensors on the update device are the current ones. Each call may be repeated in the state it leads to.

Who does what below this interface: ``encoded`` turns tensors into the bytes that are kept (``codecs``,
``layout``); ``device`` keeps the bytes where updates run; ``parked`` moves them through slots, with
``movers`` in the background; ``host`` and ``disk`` are the places they are moved to.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hift_ds.store.machine import Machine

MASTER = "master"  # key of the fp32 copies of 16-bit weights

# Flat bf16 tensors, in the order of a master's elements: the weights it is the master of.
Weights = Callable[[], Sequence[Tensor]]


class Traffic:
    """State traffic since the last ``take``: bytes to and from where states rest, and wall seconds.

    Of ``transfer_s`` seconds that transfers took, the training step waited ``stalled_s``; the rest was hidden
    behind compute. ``waits`` says for what it waited, these and others, in seconds by cause
    (:data:`hift_ds.step_report.CAUSES`). Bytes count when a transfer starts, seconds when it has ended: one that is
    under way at ``take`` has its seconds in the next report.
    """

    def __init__(self) -> None:
        self.bytes_in = 0
        self.bytes_out = 0
        self.transfer_s = 0.0
        self.stalled_s = 0.0
        self.waits: dict[str, float] = {}
        # Called by ``take``: add the times of copies and waits that have ended, which CUDA events keep.
        self.collectors: list[Callable[[], None]] = []
        self._lock = threading.Lock()

    def add(
        self, bytes_in: int = 0, bytes_out: int = 0, transfer_s: float = 0.0, stalled_s: float = 0.0, cause: str = ""
    ) -> None:
        """Count a transfer. Callable from any thread.

        Args:
            cause: of the stall.
        """
        if cause:
            self.waited(cause, stalled_s)
        with self._lock:
            self.bytes_in += bytes_in
            self.bytes_out += bytes_out
            self.transfer_s += transfer_s
            self.stalled_s += stalled_s

    def waited(self, cause: str, seconds: float) -> None:
        """Count a wait that is not for a transfer of states, or not for that alone. Callable from any thread."""
        with self._lock:
            self.waits[cause] = self.waits.get(cause, 0.0) + seconds

    def take(self) -> Traffic:
        """The counts so far, which start again at zero."""
        for collect in self.collectors:
            collect()
        taken = Traffic()
        with self._lock:
            taken.waits, self.waits = self.waits, {}
            for name in ("bytes_in", "bytes_out", "transfer_s", "stalled_s"):
                setattr(taken, name, getattr(self, name))
                setattr(self, name, type(getattr(self, name))(0))
        return taken


@dataclass
class StateStore(ABC):
    """One rank's states of all chunks.

    Attributes:
        on_fetch: called with the tensors of every ``fetch``, by key; for who watches memory.
    """

    device: torch.device  # where updates run
    traffic: Traffic = field(default_factory=Traffic, init=False)
    on_fetch: Callable[[Mapping[str, Tensor]], None] | None = field(default=None, init=False, repr=False)
    # Chunks that may be held at once; ``check_room`` follows when they change after ``start``.
    may_hold: Sequence[Sequence[int]] = field(default=(), init=False, repr=False)

    @abstractmethod
    def ensure(self, chunk: int, key: str, numel: int, dtype: torch.dtype, weights: Weights | None = None) -> None:
        """Reserve ``numel`` elements under ``key``, if that has not been done. Contents are undefined.

        Args:
            weights: of a master, the bf16 weights that are its rounded values whenever it is parked.
        """

    def start(self) -> StateStore:
        """Check that there is room for everything that is known in advance and was reserved, and take the room.

        Returns:
            The store to go on with: itself, or the one that it chose.

        Raises:
            StateStoreError: there is no room; names the bytes needed and found.
        """
        return self

    @abstractmethod
    def host_bytes(self) -> int:
        """Bytes of host memory that states take at most: at rest, and the second copies of what may be held at once
        (``may_hold``)."""

    @abstractmethod
    def check_room(self, machine: Machine, beside: int = 0) -> None:
        """See that there is room for what is reserved and for what may be held.

        Args:
            machine: what it has.
            beside: bytes of host memory that something else of this process needs.

        Raises:
            StateStoreError: there is none; names the bytes needed and found.
        """

    @abstractmethod
    def keys(self, chunk: int) -> list[str]:
        """The keys reserved for ``chunk``."""

    @abstractmethod
    def fetch(self, chunk: int) -> dict[str, Tensor]:
        """All tensors of ``chunk`` by key, flat, in the dtypes that were reserved, on the update device: to be changed
        in place, valid until ``evict``."""

    @abstractmethod
    def evict(self, chunk: int, step: int = 0) -> None:
        """Send the changed tensors of ``chunk`` back to their resting place.

        Args:
            step: optimizer steps applied so far; seeds stochastic rounding, so that a resumed run rounds
                alike.
        """

    def prefetch(self, *chunks: int) -> None:  # noqa: B027  (a hint: stores that cannot use it ignore it)
        """Start ``chunks`` on their way, which will be fetched next, in this order."""

    @property
    def reads_weights(self) -> bool:
        """True if masters are kept in a form that is decoded with their weights."""
        return False

    @abstractmethod
    def hold(self, chunk: int) -> None:
        """Keep what ``chunk`` is now beside what an update makes of it, until ``release`` or ``take_back``. It is not
        fetched."""

    @abstractmethod
    def release(self, chunk: int) -> None:
        """Forget what ``hold`` kept."""

    @abstractmethod
    def take_back(self, chunk: int) -> None:
        """Make ``chunk`` again what it was at ``hold``, bit for bit. It is not fetched. A compact master is decoded
        with its weight, which the caller has taken back by then."""

    def idle(self) -> None:  # noqa: B027
        """Note that a step's work has been given to the update device, all of it."""

    def busy(self) -> None:  # noqa: B027
        """Note that the next step begins."""

    def tensors_at_rest(self) -> list[Tensor]:
        """The memory (uint8, 1-D) of this process in which states rest, as far as that is not where updates run."""
        return []

    def slot_tensors(self) -> list[Tensor]:
        """The memory (uint8, 1-D) where updates run that is kept for states to arrive in."""
        return []

    def synchronize(self) -> None:  # noqa: B027
        """Wait for every transfer under way. Called before anything reads or writes parked states."""

    @abstractmethod
    def read(self, chunk: int) -> Mapping[str, Tensor]:
        """The current values by key, flat, for a checkpoint; not to be changed. ``synchronize`` first."""

    @abstractmethod
    def write(self, chunk: int, key: str, values: Tensor, start: int = 0) -> None:
        """Set elements [start, start + len(values)) of ``key`` from ``values``, flat and on any device. Call
        ``synchronize`` first.

        A compact form is made when the next chunk is written, or at ``synchronize``: so write a chunk's pieces
        one after the other, in any order of keys.
        """

    def close(self) -> None:  # noqa: B027
        """Let go of all tensors, and of what the store holds outside of process memory. Engines outlive their use:
        whoever keeps one must not keep its states."""
