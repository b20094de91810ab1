"""Streams and events of an accelerator, on a CPU: work on a stream runs as late as the rules allow, when the
computation, which runs at once, waits for it. So a missing wait gives wrong numbers, every time."""

from __future__ import annotations

import time

from hift_ds.store import movers


class FakeStreams:
    """Stands for ``torch.cuda``."""

    def __init__(self):
        self.current = None

    def Stream(self, device=None):  # noqa: N802
        return FakeStream()

    def Event(self, enable_timing=False):  # noqa: N802
        return FakeEvent()

    def current_stream(self, device=None):
        return COMPUTE

    def stream(self, stream):
        return stream

    def device(self, device):
        raise AssertionError("threads only")


class FakeStream:
    running = None

    def __init__(self):
        self.queue, self.seconds = [], 0.0

    def __enter__(self):
        FakeStream.running = self

    def __exit__(self, *error):
        FakeStream.running = None

    def wait_stream(self, other):
        assert other is COMPUTE

    def wait_event(self, event):
        if self is COMPUTE:
            event.synchronize()
        else:
            self.queue.append(event.synchronize)

    def run_until(self, event):
        while not event.happened:
            self.queue.pop(0)()

    def synchronize(self):
        while self.queue:
            self.queue.pop(0)()


class FakeEvent:
    def __init__(self):
        self.happened, self.on, self.at = False, None, 0.0

    def record(self, stream):
        self.on = stream
        if stream is COMPUTE:
            self._happen()
        else:
            stream.queue.append(self._happen)

    def _happen(self):
        self.happened, self.at = True, time.perf_counter()

    def synchronize(self):
        self.on.run_until(self)

    def query(self):
        return self.happened

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


COMPUTE = FakeStream()


def use_fake_streams(monkeypatch):
    """From now on :class:`StreamMover` works on these."""
    monkeypatch.setattr(movers, "streams_of", lambda device: FakeStreams())
    monkeypatch.setattr(movers, "_run", lambda copy: FakeStream.running.queue.append(copy))
