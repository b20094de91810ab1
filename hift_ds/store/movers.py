"""How copies of states run beside the computation.

| mover       | where                                               | a copy runs                      |
|-------------|-----------------------------------------------------|----------------------------------|
| InlineMover | anywhere; prefetch off                              | at once, while the caller waits  |
| ThreadMover | on the CPU, which has no streams; disks everywhere  | on one thread per direction      |
| StreamMover | between host memory and an accelerator with streams | on one side stream per direction |

Two directions, so that a group can leave while the next arrives. A copy starts when all computation submitted
so far and the copies it names have ended.
"""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from hift_ds.errors import HiFTError, StateStoreError
from hift_ds.store.base import Traffic
from hift_ds.store.streams import StreamEvent, streams_of

IN, OUT = "in", "out"
RESUMES_WITHIN_MS = 2.0  # of the end of a copy: then the computation has waited for it


@dataclass
class Ticket:
    """A copy that was submitted to a mover. ``None`` in its place stands for one that has ended."""

    cause: str  # of a wait for it, a key of ``CAUSES``


class Mover(ABC):
    """Starts copies, and lets the computation or its caller wait for them."""

    def __init__(self, traffic: Traffic) -> None:
        self.traffic = traffic
        self.causes = {IN: "states_in", OUT: "states_out"}  # what a wait for a copy in that direction is

    @abstractmethod
    def submit(self, direction: str, copy: Callable[[], object], after: Iterable[Ticket | None] = ()) -> Ticket | None:
        """Start ``copy`` once the computation so far and the copies of the tickets ``after`` have ended.

        Returns:
            The copy's ticket.
        """

    @abstractmethod
    def wait(self, ticket: Ticket | None) -> None:
        """Have computation from here on run after the copy; the time it stands still for that is a stall.

        Raises:
            StateStoreError: the copy failed.
        """

    def settle(self, ticket: Ticket | None, is_stall: bool = True) -> None:
        """Have the caller wait until the copy has ended. Raises as ``wait`` does.

        Args:
            is_stall: the step waits with it. False on a thread that works beside the training.
        """
        self.wait(ticket)

    def idle(self) -> None:  # noqa: B027
        """Note that a step has ended: the computation has been given all of it."""

    def busy(self) -> None:  # noqa: B027
        """Note that the next step begins. If the computation stood still since ``idle`` until a copy ended, somebody
        synchronized the device: that is a stall."""

    def close(self) -> None:  # noqa: B027
        """Submit no copy any more."""


class InlineMover(Mover):
    """Copies at once, in the caller: every second of a copy is a stall."""

    def __init__(self, traffic: Traffic, device: torch.device) -> None:
        super().__init__(traffic)
        self._device = device
        self._streams = streams_of(device)

    def submit(self, direction: str, copy: Callable[[], object], after: Iterable[Ticket | None] = ()) -> None:
        if self._streams is not None:  # stores copy on streams of their own, which wait for nothing
            self._streams.current_stream(self._device).synchronize()
        started = time.perf_counter()
        _run(copy)
        if self._streams is not None:
            self._streams.current_stream(self._device).synchronize()
        elapsed = time.perf_counter() - started
        self.traffic.add(transfer_s=elapsed, stalled_s=elapsed, cause=self.causes[direction])

    def wait(self, ticket: Ticket | None) -> None:
        pass


@dataclass
class ThreadTicket(Ticket):
    """A copy on a thread, which it blocks until it has ended."""

    future: Future[None]


class ThreadMover(Mover):
    """Copies on two threads.

    Args:
        device: where the computation runs; if it has streams, a copy first waits for what they were given so
            far.
    """

    def __init__(self, traffic: Traffic, device: torch.device) -> None:
        super().__init__(traffic)
        self._threads = {d: one_thread(f"states-{d}") for d in (IN, OUT)}
        self._device = device
        self._streams = streams_of(device)

    def submit(self, direction: str, copy: Callable[[], object], after: Iterable[Ticket | None] = ()) -> ThreadTicket:
        computed = None
        if self._streams is not None:
            computed = self._streams.Event()
            computed.record(self._streams.current_stream(self._device))
        earlier = []
        for ticket in after:
            if ticket is not None:
                assert isinstance(ticket, ThreadTicket)
                earlier.append(ticket.future)
        future = self._threads[direction].submit(self._run, copy, earlier, computed)
        return ThreadTicket(self.causes[direction], future)

    def _run(self, copy: Callable[[], object], after: list[Future[None]], computed: StreamEvent | None) -> None:
        for earlier in after:
            earlier.result()
        if computed is not None:
            computed.synchronize()
        started = time.perf_counter()
        # A new thread starts on the first device and stream, whatever the caller's are.
        with self._streams.device(self._device) if self._streams is not None else contextlib.nullcontext():
            _run(copy)
        self.traffic.add(transfer_s=time.perf_counter() - started)

    def wait(self, ticket: Ticket | None) -> None:
        if ticket is None:
            return
        assert isinstance(ticket, ThreadTicket)
        started = time.perf_counter()
        try:
            ticket.future.result()
        finally:
            self.traffic.add(stalled_s=time.perf_counter() - started, cause=ticket.cause)

    def close(self) -> None:
        for thread in self._threads.values():
            thread.shutdown(wait=True)


@dataclass
class StreamTicket(Ticket):
    """A copy on a side stream, and the events around it there."""

    start: StreamEvent
    end: StreamEvent


class StreamMover(Mover):
    """Copies on two side streams; the host never waits, the compute stream waits for events.

    Buffers are kept by the store for its life, so no stream can meet memory that was given away meanwhile.
    """

    def __init__(self, traffic: Traffic, device: torch.device) -> None:
        super().__init__(traffic)
        self._device = device
        streams = streams_of(device)
        assert streams is not None
        self._streams = streams
        self._sides = {d: self._streams.Stream(device) for d in (IN, OUT)}
        # (cause of a wait, or none for a copy; start, end), not yet read
        self._timed: list[tuple[str, StreamEvent, StreamEvent]] = []
        self._idle_since: StreamEvent | None = None  # event at the end of the last step
        # Between two steps, and copies that may explain them.
        self._gaps: list[tuple[StreamEvent, StreamEvent, list[StreamTicket]]] = []
        self._recent: list[StreamTicket] = []  # copies since the step before the last ended
        traffic.collectors.append(self._collect)

    def submit(self, direction: str, copy: Callable[[], object], after: Iterable[Ticket | None] = ()) -> StreamTicket:
        side = self._sides[direction]
        side.wait_stream(self._streams.current_stream(self._device))
        for ticket in after:
            if ticket is not None:
                assert isinstance(ticket, StreamTicket)
                side.wait_event(ticket.end)
        ticket = StreamTicket(self.causes[direction], self._event(), self._event())
        with self._streams.stream(side):
            ticket.start.record(side)
            _run(copy)
            ticket.end.record(side)
        self._timed.append(("", ticket.start, ticket.end))
        self._recent.append(ticket)
        return ticket

    def idle(self) -> None:
        self._idle_since = self._event()
        self._idle_since.record(self._streams.current_stream(self._device))

    def busy(self) -> None:
        if self._idle_since is None:
            return
        resumed = self._event()
        resumed.record(self._streams.current_stream(self._device))
        self._gaps.append((self._idle_since, resumed, self._recent))
        self._idle_since, self._recent = None, []

    def wait(self, ticket: Ticket | None) -> None:
        if ticket is None:
            return
        assert isinstance(ticket, StreamTicket)
        compute = self._streams.current_stream(self._device)
        before, after = self._event(), self._event()
        before.record(compute)
        compute.wait_event(ticket.end)
        after.record(compute)
        self._timed.append((ticket.cause, before, after))

    def settle(self, ticket: Ticket | None, is_stall: bool = True) -> None:
        if ticket is None:
            return
        assert isinstance(ticket, StreamTicket)
        started = time.perf_counter()
        ticket.end.synchronize()
        if is_stall:
            self.traffic.add(stalled_s=time.perf_counter() - started, cause=ticket.cause)

    def close(self) -> None:
        for side in self._sides.values():
            side.synchronize()

    def _event(self) -> StreamEvent:
        return self._streams.Event(enable_timing=True)

    def _collect(self) -> None:
        """Read the times of what has ended; nothing waits for what has not."""
        pending = []
        for cause, start, end in self._timed:
            if not end.query():
                pending.append((cause, start, end))
            elif cause:
                self.traffic.add(stalled_s=start.elapsed_time(end) / 1e3, cause=cause)
            else:
                self.traffic.add(transfer_s=start.elapsed_time(end) / 1e3)
        self._timed = pending
        waiting = []
        for idle, resumed, copies in self._gaps:
            if not resumed.query():
                waiting.append((idle, resumed, copies))
                continue
            # A computation that goes on as the last of the copies ends has waited for it.
            ended = [copy for copy in copies if copy.end.query() and copy.end.elapsed_time(resumed) >= 0]
            last_s = min((copy.end.elapsed_time(resumed) for copy in ended), default=None)
            if last_s is not None and last_s <= RESUMES_WITHIN_MS:
                self.traffic.add(stalled_s=idle.elapsed_time(resumed) / 1e3, cause="synchronized")
        self._gaps = waiting


class Waits:
    """How long the computation stands still for other things than states: between ranks, and between steps.

    Args:
        device: where it runs. Without streams the host's time counts.
    """

    def __init__(self, device: torch.device) -> None:
        self.traffic = Traffic()
        self.traffic.collectors.append(self._collect)
        self._device = device
        self._streams = streams_of(device)
        self._timed: list[tuple[str, StreamEvent, StreamEvent]] = []
        self._idle_since: StreamEvent | float | None = None  # without streams: seconds
        self._skipped = False

    @contextlib.contextmanager
    def around(self, cause: str) -> Iterator[None]:
        """A context inside of which what is given to the computation is a wait for ``cause`` and no more."""
        started = self._now()
        try:
            yield
        finally:
            self._note(cause, started)

    def idle(self) -> None:
        """Note that a step's work has been given to the device, all of it."""
        self._idle_since = self._now()

    def busy(self) -> None:
        """Note that the next step begins."""
        if self._idle_since is not None:
            self._note("between_steps", self._idle_since)
            self._idle_since = None

    def skip(self) -> None:
        """Leave out work that is no step's, an evaluation or a checkpoint: that the next step begins late is no wait.
        Within a step it changes nothing."""
        self._skipped |= self._idle_since is not None
        self._idle_since = None

    def take_skipped(self) -> bool:
        """Whether ``skip`` was called between two steps since this was last asked."""
        skipped, self._skipped = self._skipped, False
        return skipped

    def _now(self) -> StreamEvent | float:
        if self._streams is None:
            return time.perf_counter()
        event = self._streams.Event(enable_timing=True)
        event.record(self._streams.current_stream(self._device))
        return event

    def _note(self, cause: str, started: StreamEvent | float) -> None:
        ended = self._now()
        if isinstance(started, float):
            assert isinstance(ended, float)
            self.traffic.waited(cause, ended - started)
        else:
            assert not isinstance(ended, float)
            self._timed.append((cause, started, ended))

    def _collect(self) -> None:
        pending = []
        for cause, start, end in self._timed:
            if end.query():
                self.traffic.waited(cause, start.elapsed_time(end) / 1e3)
            else:
                pending.append((cause, start, end))
        self._timed = pending


def one_thread(name: str) -> ThreadPoolExecutor:
    """Runs what it is given, one after the other, beside the caller."""
    return ThreadPoolExecutor(1, thread_name_prefix=name)


def _run(copy: Callable[[], object]) -> None:
    try:
        copy()
    except HiFTError:
        raise
    except Exception as error:
        raise StateStoreError(f"moving optimizer states failed: {error}") from error
