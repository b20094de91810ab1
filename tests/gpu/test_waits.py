"""A wait that is missing shows: kernels that do nothing for 50 ms stand in front of updates, of writes and of copies
in turn, and the weights, four of 64 M elements, are too large to be done before the next ones begin."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu.checks import Asked
from benchmarks.gpu.races import furthest_apart, trajectory, without_the_wait

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ASKED = Asked("cuda", False, None, None)
WIDTH, STEPS = 8192, 9
STATES = {
    "host, one slot": {"slots": 1},
    "host, slices": {"slots": 4, "slice_numel": 1 << 24},
    "host, no prefetch": {"prefetch": False},
    "disk": {"residency": "disk", "path": "FOLDER"},
    "disk, no prefetch": {"residency": "disk", "prefetch": False, "path": "FOLDER"},
}


@pytest.fixture(scope="module")
def expected():
    return {
        slices: trajectory(ASKED, WIDTH, STEPS, {"residency": "device", "slice_numel": slices}, "none")
        for slices in (None, 1 << 24)
    }


@pytest.mark.parametrize("delay", ["updates", "writes", "copies"])
@pytest.mark.parametrize("name", STATES)
def test_no_bit_depends_on_what_is_late(name, delay, expected, tmp_path):
    state = {key: str(tmp_path) if value == "FOLDER" else value for key, value in STATES[name].items()}
    weights = trajectory(ASKED, WIDTH, STEPS, state, delay)
    assert furthest_apart(weights, expected[state.get("slice_numel")]) == 0


@pytest.mark.parametrize("delay", ["updates", "writes", "copies", "gathers"])
def test_weights_in_host_memory_come_and_go_in_time(delay, expected):
    assert furthest_apart(trajectory(ASKED, WIDTH, STEPS, {}, delay, weights_on_host=True), expected[None]) == 0


def test_the_delays_show_a_wait_that_is_missing(expected, tmp_path):
    state = {"residency": "disk", "prefetch": False, "path": str(tmp_path)}
    with without_the_wait():
        assert furthest_apart(trajectory(ASKED, WIDTH, STEPS, state, "updates"), expected[None]) != 0
