"""States that rest somewhere else than where updates run, and come and go through slots.

A slot is a run of bytes on the update device that holds one chunk at a time. With prefetch the slots are
allocated once; while one group computes, its predecessor leaves its slot and its successor arrives. One slot
serves: states are needed in the update only, so the old group leaves and the new one arrives between two
updates. With two, both directions run at once. Where groups are cut into slices, the slots are a ring: filled ahead
with the first slices of the next group, and each again as soon as its slice has left. Without prefetch a slot exists
from ``fetch`` to ``evict`` and every copy is waited for.

A slot is written back when another chunk is announced, not before: a group that is updated several times in a
row (a turn of several steps, a model of one group) stays where it is.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hift_ds.store.encoded import EncodedStateStore
from hift_ds.store.layout import aligned
from hift_ds.store.movers import IN, OUT, InlineMover, Mover, Ticket


@dataclass(eq=False)
class Slot:
    """Memory on the update device, and whose bytes are in it.

    A chunk is in one slot at a time. A slot is loaded after its write-back, and after that of the chunk that comes.
    """

    memory: Tensor  # uint8
    chunk: int | None = None
    fetched: bool = False  # lent out between fetch and evict
    dirty: bool = False  # newer than the resting place
    arrival: Ticket | None = None  # of the last copies into and out of it
    departure: Ticket | None = None
    lasting: bool = True  # not only from fetch to evict
    last_fetch: int = 0


@dataclass
class ParkedStateStore(EncodedStateStore):
    """What host and disk share: slots, their order of events, and the count of bytes."""

    mover: Mover = field(init=False)
    _slots: list[Slot] = field(default_factory=list, init=False)
    _departures: dict[int, Ticket | None] = field(default_factory=dict, init=False)  # of each chunk, the last
    _fetches: int = field(default=0, init=False)
    _held: dict[int, bool] = field(default_factory=dict, init=False)  # whether a newer form rests elsewhere already

    def __post_init__(self) -> None:
        self.mover = InlineMover(self.traffic, self.device)  # subclasses with slots choose by device and place

    # -- the resting place ---------------------------------------------------------------------------------

    @abstractmethod
    def _copy_in(self, chunk: int, memory: Tensor) -> None:
        """Fill ``memory`` (on the update device) with the chunk's bytes. Runs in the mover."""

    @abstractmethod
    def _copy_out(self, chunk: int, memory: Tensor) -> None:
        """Make ``memory`` the chunk's bytes. Runs in the mover. If it fails the old bytes stay."""

    def _new_memory(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    # -- StateStore ----------------------------------------------------------------------------------------

    def prefetch(self, *chunks: int) -> None:
        # As many as there are slots: what comes later must not keep a slot from what comes first.
        coming = [chunk for chunk in chunks if self.num_bytes(chunk)][: self.num_slots]
        if not coming:
            return
        self._encode_staged()
        for slot in self._slots:
            if slot.chunk not in coming:
                self._write_back(slot)
        for chunk in coming:
            if self._slot_of(chunk) is None:
                vacant = self._vacant(keeping=coming)
                if vacant is None:
                    break
                self._load(chunk, vacant)

    def slots_within(self, spare_bytes: int, useful: int) -> int:
        """How many slots there would be with as many more as fit into ``spare_bytes``, up to ``useful`` in all."""
        room = aligned(max(self.largest_bytes(), 1))
        return self.num_slots + max(min(spare_bytes // room, useful - self.num_slots), 0)

    def idle(self) -> None:
        self.mover.idle()

    def busy(self) -> None:
        self.mover.busy()

    def slot_tensors(self) -> list[Tensor]:
        return [slot.memory for slot in self._slots]

    def synchronize(self) -> None:
        super().synchronize()
        for slot in self._slots:
            self._write_back(slot)
        for slot in self._slots:
            self.mover.settle(slot.arrival)
            self.mover.settle(slot.departure)
        self._departures.clear()

    def close(self) -> None:
        self.mover.close()
        super().close()
        self._slots.clear()
        self._departures.clear()
        self._held.clear()

    # -- EncodedStateStore ---------------------------------------------------------------------------------

    def _bring(self, chunk: int) -> Tensor:
        slot = self._slot_of(chunk)
        if slot is None:
            slot = self._vacant() or self._passing_slot()
            self._load(chunk, slot)
        self.mover.wait(slot.arrival)
        self.mover.wait(slot.departure)  # a write-back may still read what the update is going to change
        self._fetches += 1
        slot.fetched, slot.last_fetch = True, self._fetches
        assert slot.memory.numel() >= self.num_bytes(chunk), "a state was reserved and not written"
        return slot.memory[: self.num_bytes(chunk)]

    def _grow(self, chunk: int, memory: Tensor) -> Tensor:
        num_bytes, slot = self.num_bytes(chunk), self._lent(chunk)
        if slot.memory.numel() < num_bytes:
            larger = self._new_memory(num_bytes)
            larger[: memory.numel()].copy_(memory)
            slot.memory = larger
        return slot.memory[:num_bytes]

    def _send(self, chunk: int) -> None:
        slot = self._lent(chunk)
        slot.fetched, slot.dirty = False, True
        if not slot.lasting:
            self._write_back(slot)
            self.mover.settle(slot.departure)
            self._slots.remove(slot)

    def _replace_at_rest(self, chunk: int, memory: Tensor) -> None:
        """Between steps only: nothing is fetched. A slot with the old bytes, or one that they are on their
        way to, is free for others."""
        slot = self._slot_of(chunk)
        if slot is not None:
            slot.chunk, slot.dirty = None, False
        self._put(chunk, memory)

    @abstractmethod
    def _put(self, chunk: int, memory: Tensor) -> None:
        """Make ``memory`` (on the host) the chunk's bytes."""

    # -- states that may be taken back ---------------------------------------------------------------------

    @abstractmethod
    def _divert(self, chunk: int) -> None:
        """Let ``_copy_out`` fill another resting place from now on than the one that the chunk has, which stays."""

    @abstractmethod
    def _end_diversion(self, chunk: int, back: bool) -> None:
        """The chunk has one resting place again: the new one, or the old one if it goes ``back``."""

    def _hold(self, chunk: int) -> None:
        slot = self._slot_of(chunk)
        if slot is not None:
            self._write_back(slot)  # its own bytes are the newest
        self._held[chunk] = False

    def _release(self, chunk: int) -> None:
        if self._held.pop(chunk):
            self._end_diversion(chunk, back=False)

    def _take_back(self, chunk: int) -> None:
        slot = self._slot_of(chunk)
        if slot is not None:
            self.mover.settle(slot.arrival)
            slot.chunk, slot.dirty = None, False
        self.mover.settle(self._departures.get(chunk))
        if self._held.pop(chunk):
            self._end_diversion(chunk, back=True)

    # -- slots ---------------------------------------------------------------------------------------------

    def _slot_of(self, chunk: int) -> Slot | None:
        return next((slot for slot in self._slots if slot.chunk == chunk), None)

    def _lent(self, chunk: int) -> Slot:
        """The slot of a chunk that has been fetched."""
        slot = self._slot_of(chunk)
        assert slot is not None, "fetch comes first"
        return slot

    def _vacant(self, keeping: Sequence[int] = ()) -> Slot | None:
        """A slot to load into that has none of the chunks ``keeping``: an empty one, else the one fetched longest ago,
        whose write-back ends first."""
        if len([slot for slot in self._slots if slot.lasting]) < self.num_slots:
            self._slots.append(Slot(self._new_memory(0)))
        free = [slot for slot in self._slots if slot.lasting and not slot.fetched and slot.chunk not in keeping]
        return min(free, key=lambda slot: (slot.chunk is not None, slot.last_fetch), default=None)

    def _passing_slot(self) -> Slot:
        """A slot for one visit alone: without prefetch, or when all slots are lent."""
        self._slots.append(Slot(self._new_memory(0), lasting=False))
        return self._slots[-1]

    def _load(self, chunk: int, slot: Slot) -> None:
        num_bytes = self.num_bytes(chunk)
        self._write_back(slot)
        self._fit(slot, num_bytes)
        memory = slot.memory[:num_bytes]
        slot.chunk = chunk
        slot.arrival = self.mover.submit(
            IN, lambda: self._copy_in(chunk, memory), after=(slot.departure, self._departures.get(chunk))
        )
        self.traffic.add(bytes_in=num_bytes)

    def _write_back(self, slot: Slot) -> None:
        """Start it, if the slot is newer than the resting place."""
        chunk = slot.chunk
        if chunk is None or not slot.dirty or slot.fetched:
            return
        memory = slot.memory[: self.num_bytes(chunk)]
        if self._held.get(chunk) is False:
            self._held[chunk] = True
            self._divert(chunk)
        slot.departure = self._departures[chunk] = self.mover.submit(OUT, lambda: self._copy_out(chunk, memory))
        slot.dirty = False
        self.traffic.add(bytes_out=memory.numel())

    def _fit(self, slot: Slot, num_bytes: int) -> None:
        """Slots that last get room for the largest chunk at once."""
        if slot.memory.numel() >= num_bytes:
            return
        self.mover.settle(slot.arrival)
        self.mover.settle(slot.departure)
        room = aligned(max(num_bytes, self.largest_bytes() if slot.lasting else 0))
        slot.memory = self._new_memory(0)  # gone before its successor comes
        slot.memory = self._new_memory(room)
