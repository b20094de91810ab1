"""The tracker counts storages from the operation that makes them to the last owner that drops them."""

import torch

from hift_ds.simulation.tracker import ACTIVATIONS, TEMPORARIES, WEIGHTS, MemoryTracker, Timeline, Watch


def test_peak_of_a_known_sequence():
    tracker = MemoryTracker("cpu", block_bytes=1)
    with Watch(tracker):
        a = torch.zeros(100)  # 400 bytes
        b = a + 1  # 800
        del a  # 400
        c = torch.cat([b, b])  # 1200
        del b, c
    timeline = Timeline(tracker)
    assert timeline.totals == [400, 800, 400, 1200, 800, 0]
    assert timeline.peak(0, len(timeline.totals)).num_bytes == 1200
    assert timeline.peak(0, 3).num_bytes == 800
    assert tracker.live_bytes == 0


def test_views_and_in_place_results_are_no_new_bytes():
    tracker = MemoryTracker("cpu", block_bytes=1)
    with Watch(tracker):
        a = torch.zeros(10, 10)
        views = [a.t(), a[2:], a.view(-1), a.detach()]
        a.add_(1)
        a.mul_(2)
        del a
        assert tracker.live_bytes == 400
        del views
    assert tracker.live_bytes == 0


def test_what_an_operation_frees_inside_does_not_count_but_what_the_graph_keeps_does():
    weight = torch.ones(50, 50, requires_grad=True)
    tracker = MemoryTracker("cpu", block_bytes=1)
    tracker.see(weight, WEIGHTS)
    with Watch(tracker):
        kept = (weight * 2).exp()  # exp saves its result, which is also the output
        out = kept.sum()
        del kept
        alive = tracker.live_bytes
        out.backward()
        del out
    assert alive == 10000 + 10000 + 4
    assert tracker.live_bytes == 20000  # the weight and its gradient


def test_sizes_are_rounded_up_to_blocks():
    tracker = MemoryTracker("cpu", block_bytes=512)
    with Watch(tracker):
        a = torch.zeros(1)
        b = torch.zeros(129)
    assert tracker.live_bytes == 512 + 1024
    del a, b


def test_categories_by_mark_or_by_life():
    """What a forward makes and backward needs is activation; what dies before is temporary."""
    weight = torch.ones(8, 8, requires_grad=True)
    tracker = MemoryTracker("cpu", block_bytes=1)
    tracker.see(weight, WEIGHTS)
    with Watch(tracker):
        tracker.mark("forward", "a")
        short = torch.zeros(16)
        del short
        long = (weight * 3).sin()
        tracker.mark("backward", "a")
        long.sum().backward()
        del long
        tracker.mark("update")
    timeline = Timeline(tracker)
    stretches = {mark.phase: (start, end) for mark, start, end in timeline.stretches()}
    peak = timeline.peak(*stretches["forward"])
    sums = timeline.categories_at(peak.event)
    assert sums[WEIGHTS] == 256 and sums[ACTIVATIONS] == 512  # the input and the output of sin
    assert timeline.categories_at(stretches["forward"][0])[TEMPORARIES] == 64


def test_other_devices_are_not_counted():
    tracker = MemoryTracker("cuda")
    with Watch(tracker):
        torch.zeros(100)
    assert tracker.blocks == []


def test_page_locked_memory_is_counted_in_powers_of_two():
    tracker = MemoryTracker("cpu", block_bytes=1, page_locked=True)
    with Watch(tracker):
        kept = [torch.empty(n, dtype=torch.uint8) for n in (1, 3, 88 << 20, 1 << 20, 0)]
        assert tracker.live_bytes == 1 + 4 + (128 << 20) + (1 << 20)
        del kept[2]
        assert tracker.live_bytes == 1 + 4 + (1 << 20)
