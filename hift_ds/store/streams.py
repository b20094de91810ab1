"""Streams and events of an accelerator, by the names that every device module of torch has (``torch.cuda`` ...)."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch


class StreamEvent(Protocol):
    """A mark in a stream, as ``torch.cuda.Event``."""

    def record(self, stream: SideStream) -> None:
        """Set the mark behind what ``stream`` has been given so far."""

    def query(self) -> bool:
        """Whether the device has passed the mark."""

    def synchronize(self) -> None:
        """Have the host wait until the device has passed the mark."""

    def elapsed_time(self, end: StreamEvent) -> float:
        """Milliseconds from this mark to ``end``; both were made with ``enable_timing`` and have been passed."""


class SideStream(Protocol):
    """A queue of work on the device, as ``torch.cuda.Stream``."""

    def wait_stream(self, stream: SideStream) -> None:
        """Let what is queued here from now on run after all that ``stream`` has been given so far."""

    def wait_event(self, event: StreamEvent) -> None:
        """Let what is queued here from now on run after the mark."""

    def synchronize(self) -> None:
        """Have the host wait for all that is queued here."""


class Streams(Protocol):
    """A device module of torch that has streams."""

    def Stream(self, device: torch.device) -> SideStream:  # noqa: N802  (torch's name)
        """A new stream."""

    def Event(self, enable_timing: bool = False) -> StreamEvent:  # noqa: N802
        """A new mark."""

    def stream(self, stream: SideStream) -> AbstractContextManager[Any]:
        """A context inside of which work goes to ``stream``."""

    def current_stream(self, device: torch.device) -> SideStream:
        """The stream to which work goes now: the computation's."""

    def device(self, device: torch.device) -> AbstractContextManager[Any]:
        """A context inside of which ``device`` is this thread's."""


def streams_of(device: torch.device) -> Streams | None:
    """The torch module of ``device`` if it has streams and events that tell the time, else ``None``."""
    if device.type == "cpu":
        return None
    module: Any = getattr(torch, device.type, None)
    names = ("Stream", "Event", "stream", "current_stream", "device")
    has_all = all(hasattr(module, name) for name in names) and hasattr(module.Event, "elapsed_time")
    return module if has_all else None
