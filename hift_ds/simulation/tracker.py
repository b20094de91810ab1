"""Counting every byte that a program allocates, without a device: a dispatch mode that watches storages come and go.

A storage is counted from the operation that made it until its last owner drops it, as a GPU's allocator counts a
block. Events are written to a log; peaks, and what was alive at them, are worked out afterwards. It works on fake
tensors, whose storages have a size and no memory, and on real ones.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hift_ds.simulation.flops import FlopCounter

CUDA_BLOCK_BYTES = 512  # the caching allocator's granularity: max_memory_allocated counts rounded sizes

DEVICE = torch.ops.prim.device.default

WEIGHTS = "weights"
GRADIENTS = "gradients"
STATES = "states"
ACTIVATIONS = "activations"
TEMPORARIES = "temporaries"
CATEGORIES = (WEIGHTS, GRADIENTS, STATES, ACTIVATIONS, TEMPORARIES)


@dataclass(frozen=True)
class Mark:
    """A mark in the log: from this event on the program is in ``phase``, at ``place`` (a name within the phase)."""

    event: int
    phase: str
    place: str


@dataclass
class Block:
    """One storage: when it lived, and what it was."""

    num_bytes: int
    born: int  # index of the event
    category: str | None  # as marked; None: told from its life
    died: int | None = None


@dataclass(frozen=True)
class Peak:
    """The highest total within a stretch of the log."""

    event: int
    num_bytes: int


class MemoryTracker:
    """Logs the storages on one type of device that it is shown; :class:`Watch` shows it all that are made.

    Args:
        device_type: "cuda", "cpu" or a fake device's.
        block_bytes: sizes are rounded up to a multiple of it.
        page_locked: sizes are rounded up to a power of two, as torch's allocator of page-locked memory does.
    """

    def __init__(self, device_type: str, block_bytes: int = CUDA_BLOCK_BYTES, page_locked: bool = False) -> None:
        self.device_type = device_type
        self.block_bytes = block_bytes
        self.page_locked = page_locked
        self.blocks: list[Block] = []
        self.events: list[tuple[int, int]] = []  # (index of the block, bytes gained or lost)
        self.marks: list[Mark] = []
        self.live_bytes = 0
        self._block_of: dict[int, int] = {}  # live blocks by the address of the storage

    # -- what is alive ----------------------------------------------------------------------------------------

    def see(self, tensor: Tensor, category: str | None = None) -> None:
        """Count the tensor's storage if that has not been done; with ``category``, mark it."""
        if tensor.device.type != self.device_type:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        index = self._block_of.get(key)
        if index is None:
            num_bytes = -(-storage.nbytes() // self.block_bytes) * self.block_bytes
            if self.page_locked and num_bytes:
                num_bytes = 1 << (num_bytes - 1).bit_length()
            index = len(self.blocks)
            self.blocks.append(Block(num_bytes, len(self.events), category))
            self._block_of[key] = index
            self._log(index, num_bytes)
            weakref.finalize(storage, self._freed, key, index).atexit = False
        elif category is not None:
            self.blocks[index].category = category

    def see_all(self, tensors: Iterable[object], category: str | None = None) -> None:
        """Do what ``see`` does for every tensor among ``tensors``."""
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                self.see(tensor, category)

    def mark(self, phase: str, place: str = "") -> None:
        """Say what the program does from here on."""
        self.marks.append(Mark(len(self.events), phase, place))

    def _freed(self, key: int, index: int) -> None:
        if self._block_of.get(key) == index:
            del self._block_of[key]
        block = self.blocks[index]
        block.died = len(self.events)
        self._log(index, -block.num_bytes)

    def _log(self, index: int, change: int) -> None:
        self.live_bytes += change
        self.events.append((index, change))


class Watch(TorchDispatchMode):
    """Inside, every operation's results are shown to the trackers, and its floating-point operations are counted.

    One mode for all of them: on fake tensors a second one would cost as much as the operation.
    """

    def __init__(self, *trackers: MemoryTracker, flops: FlopCounter | None = None) -> None:
        super().__init__()
        self._trackers = {tracker.device_type: tracker for tracker in trackers}
        self._flops = flops

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # C++ asks a subclass where it is: no operation, and more often called than all of them.
        if func is DEVICE:
            return args[0].device
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        for leaf in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(leaf, Tensor) and (tracker := self._trackers.get(leaf.device.type)) is not None:
                tracker.see(leaf)
        if self._flops is not None:
            self._flops.count(func, args, kwargs, out)
        return out


@dataclass
class Timeline:
    """The log of a tracker, for reading."""

    tracker: MemoryTracker
    totals: list[int] = field(init=False)  # bytes alive after each event

    def __post_init__(self) -> None:
        total, self.totals = 0, []
        for _, change in self.tracker.events:
            total += change
            self.totals.append(total)

    def stretches(self) -> list[tuple[Mark, int, int]]:
        """(mark, first event, end) of every stretch between two marks."""
        marks = self.tracker.marks
        ends = [mark.event for mark in marks[1:]] + [len(self.totals)]
        return [(mark, mark.event, end) for mark, end in zip(marks, ends, strict=True)]

    def peak(self, start: int, end: int) -> Peak:
        """The highest total over events [start, end), what was alive at ``start`` included."""
        before = self.totals[start - 1] if start else 0
        best = max(range(start, end), key=self.totals.__getitem__, default=None)
        if best is None or self.totals[best] < before:
            return Peak(max(start - 1, 0), before)
        return Peak(best, self.totals[best])

    def categories_at(self, event: int) -> dict[str, int]:
        """Bytes alive after ``event``, by category. An unmarked block that was made in a forward and outlives it
        is an activation; any other unmarked one is temporary (recomputed activations and their gradients too)."""
        sums: Counter[str] = Counter(dict.fromkeys(CATEGORIES, 0))
        forwards = [(start, end) for mark, start, end in self._phases() if mark.phase == "forward"]
        for block in self.tracker.blocks:
            if block.born <= event and (block.died is None or block.died > event):
                sums[block.category or self._category_by_life(block, forwards)] += block.num_bytes
        return dict(sums)

    def _phases(self) -> list[tuple[Mark, int, int]]:
        """Stretches joined while the phase stays the same."""
        joined: list[tuple[Mark, int, int]] = []
        for mark, start, end in self.stretches():
            if joined and joined[-1][0].phase == mark.phase:
                joined[-1] = (joined[-1][0], joined[-1][1], end)
            else:
                joined.append((mark, start, end))
        return joined

    @staticmethod
    def _category_by_life(block: Block, forwards: list[tuple[int, int]]) -> str:
        for start, end in forwards:
            if start <= block.born < end:
                return TEMPORARIES if block.died is not None and block.died < end else ACTIVATIONS
        return TEMPORARIES
