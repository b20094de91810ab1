"""Gradients that rest in host memory while backward goes on: sums over micro-batches, or gradients whose update waits
for the norm of all.

On an accelerator each travels to a page-locked buffer on a side stream, and a thread adds it to its sum; the
computation waits only where gradients come faster than they leave. They are asked for in the order in which they came:
the next ones are on their way back while one is used.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future
from functools import partial

import torch
from torch import Tensor

from hift_ds.store.base import Traffic
from hift_ds.store.movers import IN, OUT, InlineMover, Mover, StreamMover, Ticket, one_thread
from hift_ds.store.page_locked import PageLockedMemory
from hift_ds.store.streams import streams_of

ROOM_BYTES = 1 << 29  # 21 ms of a link of 25 GB/s


def waiting_bytes(weight_dtype: torch.dtype, sum_dtype: torch.dtype, micro_batches: int, num_ranks: int) -> int:
    """Bytes of an element of a gradient that waits here for the norm of the step: in fp32 where ranks have averaged it,
    else as a sum of micro-batches, or as it came."""
    if num_ranks > 1:
        return 4
    return (sum_dtype if micro_batches > 1 else weight_dtype).itemsize


class HostGradients:
    """Gradients, and other tensors of a step, kept in host memory by key, each alone or as a sum.

    Args:
        device: where the gradients come from.
        dtype: of sums; ``None`` keeps each gradient's own, for gradients that are not summed.
        pin_memory: page-lock the buffers, without which nothing overlaps.
        on_thread: ``False``: additions are made at once, where they are asked for.
        room_bytes: on ``device``, of those that are leaving, and of those that come back before they are asked for.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype | None, pin_memory: bool = True, on_thread: bool = True,
        room_bytes: int = ROOM_BYTES,
    ) -> None:  # fmt: skip
        self.dtype = dtype
        self.room_bytes = room_bytes
        self.traffic = Traffic()
        self._streams = streams_of(device)
        self._mover: Mover = (
            InlineMover(self.traffic, device) if self._streams is None else StreamMover(self.traffic, device)
        )
        self._mover.causes = dict.fromkeys((IN, OUT), "gradients_on_host")
        self._pin_memory = pin_memory and device.type != "cpu"
        self._locked = PageLockedMemory()
        self._thread = one_thread("gradients") if self._streams is not None and on_thread else None
        self._kept: dict[Hashable, Tensor] = {}
        # What is kept is there when its copy and the thread's addition have ended.
        self._tickets: dict[Hashable, Ticket | None] = {}
        self._additions: dict[Hashable, Future] = {}
        # On their way back, or there: where to, and the copy's ticket.
        self._coming: dict[Hashable, tuple[Tensor, Ticket | None]] = {}
        # Tickets, and the gradients that must not be freed yet.
        self._leaving: deque[tuple[Ticket | None, Tensor]] = deque()
        # Buffers that were used before, by shape and dtype, each with what waits until it may be used again.
        self._used: dict[tuple[torch.Size, torch.dtype], deque[tuple[Callable[[], object], Tensor]]] = {}

    def __len__(self) -> int:
        return len(self._kept) + len(self._coming)

    def add(self, key: Hashable, grad: Tensor, is_ours: bool = False) -> None:
        """Keep ``grad``, or add it to what is kept under ``key``: the first in the sum's dtype, the others rounded into
        it once, as ``sum.add_(grad)`` does.

        Args:
            is_ours: nobody else changes ``grad``, or minds that it is changed: on a CPU it need not be copied.
        """
        self.traffic.add(bytes_out=grad.nbytes)
        dtype = self.dtype or grad.dtype
        if self._streams is None:
            if key in self._kept:
                self._kept[key].add_(grad)
            else:
                self._kept[key] = grad.to("cpu", dtype, copy=not is_ours)
            return
        total = self.get(key)
        staged = self._buffer(grad.shape, grad.dtype)
        ticket = self._mover.submit(OUT, partial(_copy, staged, grad))
        self._leaving.append((ticket, grad))
        self._let_go(self.room_bytes)
        if total is None and dtype == grad.dtype:
            self._kept[key], self._tickets[key] = staged, ticket
            return
        first = total is None
        if total is None:
            total = self._kept[key] = self._buffer(grad.shape, dtype)
        if self._thread is None:
            self._add(ticket, staged, total, first)
            self._give_back(staged, int)
            return
        added = self._thread.submit(self._add, ticket, staged, total, first)
        self._additions[key] = added
        self._give_back(staged, added.result)

    def _let_go(self, kept_bytes: int) -> None:
        """Let the memory of gradients on their way out be the computation's again, once they have left, but for the
        newest of ``kept_bytes``."""
        while sum(grad.nbytes for _, grad in self._leaving) > kept_bytes:
            ticket, grad = self._leaving.popleft()
            self._mover.wait(ticket)
            del grad  # not before

    def _add(self, ticket: Ticket | None, staged: Tensor, total: Tensor, first: bool) -> None:
        self._mover.settle(ticket, is_stall=False)
        if first:
            total.copy_(staged)
        else:
            total.add_(staged)

    def has(self, key: Hashable) -> bool:
        """Whether something is kept under ``key``."""
        return key in self._kept or key in self._coming

    def get(self, key: Hashable) -> Tensor | None:
        """The tensor kept under ``key``, of the shape that was added and in the sum's dtype, on the host, not to be
        changed; ``None`` if there is none."""
        assert key not in self._coming, "some of these gradients have been taken: no more are added, or saved"
        self._mover.settle(self._tickets.pop(key, None))
        self._end_addition(key)
        return self._kept.get(key)

    def _end_addition(self, key: Hashable) -> None:
        addition = self._additions.pop(key, None)
        if addition is not None:
            addition.result()

    def in_order(self, keys: Iterable[Hashable]) -> list[Hashable]:
        """Those of ``keys`` under which something is kept, in the order in which they come back ahead of their use."""
        wanted = set(keys)
        return [key for key in (*self._coming, *self._kept) if key in wanted]

    def take(self, key: Hashable, device: torch.device) -> Tensor | None:
        """The tensor kept under ``key``, as :meth:`get` has it but on ``device``, and forgotten here; ``None`` if there
        is none."""
        if self._streams is None:
            total = self._kept.pop(key, None)
            self.traffic.add(bytes_in=0 if total is None else total.nbytes)
            return None if total is None else total.to(device)
        if key not in self._coming:
            if key not in self._kept:
                return None
            self._let_go(0)
            self._bring(key, device)
        there, ticket = self._coming.pop(key)
        ahead = sum(other.nbytes for other, _ in self._coming.values())
        for following in list(self._kept):
            ahead += self._kept[following].nbytes
            if ahead > self.room_bytes:
                break
            self._bring(following, device)
        self._mover.wait(ticket)
        return there

    def _bring(self, key: Hashable, device: torch.device) -> None:
        self._end_addition(key)
        total, arrived = self._kept.pop(key), self._tickets.pop(key, None)
        self.traffic.add(bytes_in=total.nbytes)
        there = torch.empty_like(total, device=device, pin_memory=False)
        ticket = self._mover.submit(IN, partial(_copy, there, total), after=(arrived,))
        self._coming[key] = there, ticket
        self._give_back(total, partial(self._mover.settle, ticket))

    def set(self, key: Hashable, value: Tensor) -> None:
        """Keep a copy of ``value``, which ``get`` gave, in the sum's dtype."""
        self._kept[key] = value.to("cpu", self.dtype or value.dtype, copy=True)

    def forget(self) -> None:
        """Forget everything, as ``clear`` does, and keep the buffers to be used again: at once, since what is on its
        way into one is there before anything that leaves later."""
        self._forget_coming()
        for key in list(self._kept):
            self._end_addition(key)
            total = self._kept.pop(key)
            if self._streams is not None:
                self._give_back(total, int)
        self._tickets.clear()
        self._let_go(0)

    def _forget_coming(self) -> None:
        for _, ticket in self._coming.values():
            self._mover.wait(ticket)  # their memory is the computation's again
        self._coming.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._forget_coming()
        for key in list(self._kept):
            self.get(key)
        self._let_go(0)
        self._kept.clear()

    def close(self) -> None:
        """Take no gradient any more."""
        self.clear()
        self._mover.close()
        if self._thread is not None:
            self._thread.shutdown(wait=True)
        self._used.clear()
        self._locked = PageLockedMemory()

    def _buffer(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        used = self._used.get((shape, dtype))
        if not used and self._pin_memory:
            return self._locked.whole(shape.numel(), dtype).view(shape)
        if not used:
            return torch.empty(shape, dtype=dtype)
        wait, buffer = used.popleft()
        wait()
        return buffer

    def _give_back(self, buffer: Tensor, wait: Callable[[], object]) -> None:
        self._used.setdefault((buffer.shape, buffer.dtype), deque()).append((wait, buffer))


def _copy(target: Tensor, source: Tensor) -> None:
    target.copy_(source, non_blocking=True)
