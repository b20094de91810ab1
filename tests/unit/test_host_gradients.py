"""Gradients that rest in host memory: they come back before they are asked for, and right although copies run as late
as they may."""

import random

import pytest
import torch

from hift_ds.optim import host_gradients
from hift_ds.optim.host_gradients import HostGradients
from tests.helpers import fake_streams

CPU = torch.device("cpu")
SIZES = [5, 700, 3, 1000, 64, 700]


@pytest.fixture
def kept(monkeypatch):
    fake_streams.use_fake_streams(monkeypatch)
    monkeypatch.setattr(host_gradients, "streams_of", lambda device: fake_streams.FakeStreams())
    kept = HostGradients(CPU, torch.float32, pin_memory=False)
    yield kept
    kept.close()


def fill(kept, steps=2):
    """Sums of bf16 gradients by position; and what is in them."""
    expected = [torch.zeros(numel) for numel in SIZES]
    for _ in range(steps):
        for key, total in enumerate(expected):
            grad = torch.randn(total.shape).bfloat16()
            kept.add(key, grad)
            total += grad
    return expected


def events_of(kept, monkeypatch):
    """What happens to copies, as it happens."""
    events = []
    for name in ("submit", "wait"):
        real = getattr(kept._mover, name)

        def noted(*args, name=name, real=real, **kwargs):
            events.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(kept._mover, name, noted)
    return events


def test_the_next_are_on_their_way_while_one_is_used(kept, monkeypatch):
    kept.room_bytes = 4 * 1100
    for _ in range(3):  # buffers are used again
        expected = fill(kept)
        events = events_of(kept, monkeypatch)
        at_once = []
        for key, total in enumerate(expected):
            events.clear()
            assert torch.equal(kept.take(key, CPU), total)
            at_once.append(sum(there.nbytes for there, _ in kept._coming.values()))
            if key == 0:
                coming = events[events.index("submit") :]  # before: waits for what was leaving
                assert coming == ["submit", "submit", "submit", "wait"]  # 700 and 3 more before it is waited for
            elif key == 1:
                assert events == ["submit", "submit", "wait"]  # the third is on its way already
        assert at_once == [4 * 703, 4 * 1067, 4 * 1064, 4 * 764, 4 * 700, 0] and not len(kept)


def test_in_another_order_than_they_came(kept, monkeypatch):
    kept.room_bytes = 4 * 1100
    for seed in range(6):
        order = random.Random(seed).sample(range(len(SIZES)), len(SIZES))
        expected = fill(kept)
        assert all(torch.equal(kept.take(key, CPU), expected[key]) for key in order)
        assert kept.take(0, CPU) is None


def test_the_order_in_which_they_come_back(kept):
    """What is on its way first, then as they came."""
    kept.room_bytes = 4 * 3
    for key in (4, 0, 3, 2, 1):
        kept.add(key, torch.ones(SIZES[key]).bfloat16())
    kept.take(0, CPU)
    assert list(kept._coming) == [] and kept.in_order([0, 1, 2, 3, 7]) == [3, 2, 1]
    kept.room_bytes = 4 * 64
    kept.take(2, CPU)
    assert list(kept._coming) == [4] and kept.in_order([1, 3, 4]) == [4, 3, 1]


def test_what_is_closed_keeps_no_buffer(kept):
    fill(kept)
    kept.take(0, CPU)
    assert kept._used
    kept._locked.some(1)
    kept.close()
    assert not kept._used and not kept._kept and not kept._coming and not kept._locked._rests


def test_of_what_leaves_only_the_newest_are_on_the_device(kept, monkeypatch):
    """The memory of the others is the computation's again after a wait; and that of all, when they are asked for."""
    kept.room_bytes = 2 * 1100
    events, alive = events_of(kept, monkeypatch), []
    for key, numel in enumerate(SIZES):
        events.clear()
        kept.add(key, torch.ones(numel).bfloat16())
        alive.append(sum(grad.numel() for _, grad in kept._leaving))
        assert events == ["submit"] + ["wait"] * {3: 2, 5: 2}.get(key, 0)
    assert alive == [5, 705, 708, 1003, 1067, 764]
    events.clear()
    kept.take(0, CPU)
    assert not kept._leaving and events[:2] == ["wait", "wait"]


def test_what_comes_and_goes_between_those_that_are_taken(kept):
    """A gradient comes back after it has left, and a buffer is written again after what was in it has come back."""
    kept.dtype = None
    grads = [torch.randn(50) for _ in range(4)]
    for key in (0, 1):
        kept.add(key, grads[key].clone())
    assert torch.equal(kept.take(0, CPU), grads[0])  # the next is on its way, from a buffer that may be used again
    kept.add(2, grads[2].clone())
    room, kept.room_bytes = kept.room_bytes, 0
    kept.add(3, grads[3].clone())
    kept.room_bytes = room
    assert all(torch.equal(kept.take(key, CPU), grads[key]) for key in (1, 2, 3))
    kept.add(0, grads[0].clone())
    kept.add(1, grads[1].clone())
    assert torch.equal(kept.take(0, CPU), grads[0])
    kept.add(2, grads[2].clone())  # and has not left when it is asked for ahead
    assert all(torch.equal(kept.take(key, CPU), grads[key]) for key in (1, 2))


@pytest.mark.parametrize("end", ["clear", "forget"])
def test_what_is_not_wanted_any_more(kept, end, monkeypatch):
    fill(kept)
    kept.take(0, CPU)
    assert len(kept._coming) == len(SIZES) - 1 == len(kept)
    with pytest.raises(AssertionError, match="have been taken"):
        kept.add(1, torch.zeros(SIZES[1]))
    events = events_of(kept, monkeypatch)
    getattr(kept, end)()
    assert events == ["wait"] * (len(SIZES) - 1) and not len(kept)  # whose memory is written must not be freed
    expected = fill(kept)
    assert all(torch.equal(kept.take(key, CPU), total) for key, total in enumerate(expected))


@pytest.mark.parametrize("end", ["clear", "forget"])
def test_what_was_leaving_gives_its_memory_back(kept, end, monkeypatch):
    """After a wait: the copies are still to come."""
    fill(kept)
    leaving, events = len(kept._leaving), events_of(kept, monkeypatch)
    assert leaving
    getattr(kept, end)()
    assert events == ["wait"] * leaving and not kept._leaving


class LateThread:
    """Runs what it is given, in order, when somebody waits for it."""

    def __init__(self):
        self.queue = []

    def submit(self, work, *args):
        job = Job(self.queue, work, args)
        self.queue.append(job)
        return job

    def shutdown(self, wait):
        pass


class Job:
    def __init__(self, queue, work, args):
        self.queue, self.work, self.args = queue, work, args

    def result(self):
        while self in self.queue:
            job = self.queue.pop(0)
            job.work(*job.args)


def test_nothing_is_added_to_what_was_forgotten(kept):
    """Its buffer may have got another gradient meanwhile."""
    kept._thread.shutdown()
    kept._thread = LateThread()
    low, high = torch.randn(50).bfloat16(), torch.randn(50)
    kept.add("sum in fp32", low)
    kept.forget()
    kept.add("fp32", high)
    assert torch.equal(kept.get("fp32"), high)
    kept.add("another sum", low)  # waits for the first addition, whose buffer it takes
    assert torch.equal(kept.get("fp32"), high) and torch.equal(kept.get("another sum"), low.float())
