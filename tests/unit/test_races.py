"""Right in any order that an accelerator may take: the real engine under the race detector of
:mod:`tests.helpers.stream_clocks`, and what the detector is worth."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from hift_ds.store.page_locked import SLAB_BYTES
from tests.helpers import race_rows
from tests.helpers.race_rows import MUTATIONS, Row, run_rows

DISK = {"residency": "disk", "path": "FOLDER"}
WEIGHTS_ON_HOST = {"zero_optimization": {"offload_param": {"device": "cpu", "pin_memory": True}}}
PERSISTENT = {"zero_optimization": {"stage3_param_persistence_threshold": 1000}}
SMALL_BUCKETS = {"zero_optimization": {"reduce_bucket_size": 1024}}
ALL_GATHERED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


IN_BACKWARD = {"update": "in_backward", "group_size": "all"}


def state(**switches):
    return {"state": switches}


# The configuration, and how often the host may wait for the device within a step.
ROWS = {
    "one slot": (Row(), 1),
    "README": (Row(readme=True, steps=4), 0),
    "2 ranks: guarded": (Row(guarded=True, world_size=2), 1),
    "a ring of slices": (Row(hift=state(slice_numel=1500, slots=4)), 1),
    "codecs, accumulation": (Row(hift=state(codec="split_master+int8_moments"), gas=2), 1),
    "prefetch off": (Row(hift=state(prefetch=False)), 5),
    "update on the host": (Row(hift=state(step_on="host")), 19),
    "disk": (Row(hift=state(**DISK)), 9),
    "disk, prefetch off, slices": (Row(hift=state(**DISK, prefetch=False, slice_numel=3000)), 19),
    "activations on the host": (Row(hift={"activations": {"offload": True}}, gas=2, checkpointing=True), 1),
    "2 ranks: slices, 2 slots, codecs": (
        Row(hift=state(slots=2, slice_numel=1500, codec="bf16_moments"), stage=2, world_size=2), 1,
    ),
    "2 ranks: small buckets, accumulation": (Row(more=SMALL_BUCKETS, stage=2, world_size=2, gas=2), 1),
    "in backward": (Row(hift={**IN_BACKWARD, **state(slots=2)}, clip=0.0, steps=5), 2),
    "in backward, clipped, accumulation, slices": (
        Row(hift={**IN_BACKWARD, **state(slots=2, slice_numel=1500)}, gas=2, steps=4), 149,
    ),
    "in backward, taken back": (
        Row(hift={**IN_BACKWARD, "clipping": "speculative", **state(slots=2)}, undoes=True, steps=5), 50,
    ),
    "in backward, split": (
        Row(hift={**IN_BACKWARD, **state(slots=2, step_on="split", host_share=0.5)}, clip=0.0, steps=5), 24,
    ),
    "in backward, stage 2, 2 ranks, clipped, accumulation": (
        Row(hift={**IN_BACKWARD, **state(slots=2)}, gas=2, stage=2, world_size=2, steps=4), 149,
    ),
    "in backward, activations on the host": (
        Row(hift={**IN_BACKWARD, "activations": {"offload": True}, **state(slots=2)}, clip=0.0, steps=5), 2,
    ),
    "in backward, stage 3, 2 ranks": (
        Row(hift=IN_BACKWARD, clip=0.0, stage=3, world_size=2, more=ALL_GATHERED, steps=5), 6,
    ),
    "stage 3, 2 ranks": (Row(stage=3, world_size=2, more=ALL_GATHERED), 5),
    "stage 3, 2 ranks, weights on the host": (Row(stage=3, world_size=2, more=WEIGHTS_ON_HOST, steps=13), 2),
    "stage 3, 1 rank, weights on the host": (Row(stage=3, more=WEIGHTS_ON_HOST, steps=13), 2),
    "in backward, stage 3, weights on the host": (
        Row(hift=IN_BACKWARD, clip=0.0, stage=3, more=WEIGHTS_ON_HOST, steps=5), 6,
    ),
}  # fmt: skip
MORE_ROWS = {
    "guarded": (Row(guarded=True), 1),
    "two slots": (Row(hift=state(slots=2)), 1),
    "slices": (Row(hift=state(slice_numel=1500)), 1),
    "always active, turns of 3": (Row(hift={"steps_per_group": 3, "always_active": ["norm"]}, steps=13), 1),
    "activations on the host, two forwards": (Row(hift={"activations": {"offload": True}}, forwards=2, steps=5), 1),
    "2 ranks: always active": (
        Row(hift={"always_active": ["norm"]}, more=SMALL_BUCKETS, world_size=2), 1,
    ),
    "2 ranks: update on the host": (Row(hift=state(step_on="host"), stage=2, world_size=2), 19),
    "in backward, clipped by speculation": (
        Row(hift={**IN_BACKWARD, "clipping": "speculative", **state(slots=2)}, steps=5), 45,
    ),
    "in backward, taken back, compact states on disk": (
        Row(
            hift={**IN_BACKWARD, "clipping": "speculative", **state(**DISK, slots=2, codec="split_master")},
            undoes=True, steps=4,
        ), 154,
    ),
    "split": (
        Row(hift={"group_size": 2, **state(slots=2, step_on="split", host_share=0.5)}, steps=9), 21,
    ),
    "in backward, split, taken back, 2 ranks": (
        Row(
            hift={**IN_BACKWARD, "clipping": "speculative", **state(slots=2, step_on="split", host_share=0.5)},
            undoes=True, stage=2, world_size=2, steps=5,
        ), 94,
    ),
    "in backward, stage 1, 2 ranks": (
        Row(hift={**IN_BACKWARD, **state(slots=2)}, clip=0.0, stage=1, world_size=2, steps=5), 2,
    ),
    "in backward, group size auto": (
        Row(hift={"update": "in_backward", "group_size": "auto", **state(slots=2)}, clip=0.0, steps=6), 2,
    ),
    "in backward, stage 3, 2 ranks, taken back": (
        Row(
            hift={**IN_BACKWARD, "clipping": "speculative"}, undoes=True, stage=3, world_size=2, more=ALL_GATHERED,
            steps=5,
        ), 53,
    ),
    "stage 3, 2 ranks, persistent, accumulation": (
        Row(stage=3, world_size=2, gas=2, more=PERSISTENT, checkpointing=True), 3,
    ),
    "stage 3, 2 ranks, with the timer": (Row(stage=3, world_size=2, timer=True, more=ALL_GATHERED), 5),
    "disk, codecs": (Row(hift=state(**DISK, slots=2, codec="split_master+int8_moments")), 9),
    "host, split master and slices": (Row(hift=state(slice_numel=3000, codec="split_master"), steps=30), 1),
    "2 ranks: Muon": (Row(optimizer="Muon", stage=2, world_size=2), 1),
    "stage 3: Muon": (Row(optimizer="Muon", stage=3, world_size=2, more=ALL_GATHERED), 5),
    "activations on the host, chunked loss": (
        Row(hift={"activations": {"offload": True, "chunked_loss": True}}, gas=2), 1,
    ),
}  # fmt: skip
# What is taken out, and a configuration that needs it.
NEEDS = {
    "copies do not wait for the computation": Row(steps=6),
    "the computation does not wait for copies": Row(steps=6),
    "copies do not wait for each other": Row(steps=6),
    "the host's update does not wait for its copies": Row(steps=3, hift=state(step_on="host")),
    "copies of the disk do not wait for the computation": Row(steps=6, hift=state(**DISK, prefetch=False)),
    "threads do not wait for the computation": Row(steps=6, hift=state(**DISK)),
    "gathers do not wait for updates": Row(steps=9, stage=3, world_size=2, more=ALL_GATHERED),
    "gathers do not wait for new weights on their way to host memory": Row(steps=6, stage=3, more=WEIGHTS_ON_HOST),
    "new weights are written over others that still travel": Row(steps=4, stage=3, more=WEIGHTS_ON_HOST),
    "memory of gathered shards is used again early": Row(steps=9, stage=3, world_size=2, more=WEIGHTS_ON_HOST),
    "gradients are sent before they are there": Row(more=SMALL_BUCKETS, world_size=2, steps=4),
    "the norm does not wait for gradients of other ranks": Row(more=SMALL_BUCKETS, world_size=2, steps=4),
    "gradients are freed before their copies have ended": Row(hift=IN_BACKWARD, gas=2, clip=0.0, steps=3),
    "gradients are used before they are back": Row(hift=IN_BACKWARD, gas=2, clip=0.0, steps=3),
    "gathered weights are given back early": Row(steps=9, stage=3, world_size=2, more=ALL_GATHERED),
}


# What a step of a configuration says that it waited for. (Between steps there is always something.)
SAYS = {
    "one slot": {"states_in"},
    "disk": {"disk"},
    "update on the host": {"host_update"},
    "2 ranks: guarded": {"states_in", "reduction"},
    "stage 3, 2 ranks": {"states_in", "reduction", "gather"},
    "stage 3, 1 rank, weights on the host": {"states_in", "gather"},
    "in backward": {"states_in"},
    "in backward, clipped, accumulation, slices": {"states_in", "gradients_on_host"},
    "in backward, split": {"states_in", "host_update"},
    "in backward, stage 2, 2 ranks, clipped, accumulation": {"states_in", "gradients_on_host", "reduction"},
}


@pytest.fixture(scope="module")
def outcomes():
    rows = {**{name: row for name, (row, _) in ROWS.items()}, **{m: with_mutation(m) for m in MUTATIONS}}
    return dict(zip(rows, run_rows(list(rows.values())), strict=True))


def with_mutation(name):
    return Row(**{**NEEDS[name].__dict__, "mutation": name})


@pytest.mark.parametrize("name", ROWS)
def test_no_two_accesses_without_an_order(outcomes, name):
    assert outcomes[name].hazards == 0, outcomes[name].shown


@pytest.mark.parametrize("name", ROWS)
def test_how_often_the_host_waits_in_a_step(outcomes, name):
    assert outcomes[name].num_syncs <= ROWS[name][1], outcomes[name].syncs


@pytest.mark.parametrize("name", SAYS)
def test_a_step_says_what_it_waits_for(outcomes, name):
    # That the next step begins late is explained by a copy here, since each took a millisecond.
    assert SAYS[name] == set(outcomes[name].waits) - {"states_out", "between_steps", "synchronized"}


def test_a_row_whose_process_dies_is_told(monkeypatch):
    monkeypatch.setattr(race_rows, "_outcome", lambda row: os.kill(os.getpid(), signal.SIGKILL))
    assert race_rows._outcome_in_child({})["error"] == "its process was killed by SIGKILL before it answered"


def test_weights_in_host_memory_are_page_locked_in_slabs(outcomes):
    """A block for each weight would be rounded up to a power of two."""
    locked = outcomes["stage 3, 1 rank, weights on the host"].page_locked
    assert locked and min(locked) >= SLAB_BYTES


def test_gradients_in_host_memory_are_page_locked_in_slabs(outcomes):
    locked = outcomes["in backward, clipped, accumulation, slices"].page_locked
    assert locked and min(locked) >= SLAB_BYTES


@pytest.mark.parametrize("name", ["disk, prefetch off, slices", "disk", "in backward, clipped, accumulation, slices"])
def test_a_stream_a_direction_is_enough(outcomes, name):
    """Torch has 32 and then gives out the first again, which is somebody else's."""
    assert outcomes[name].num_streams <= 16


@pytest.mark.parametrize("name", ["activations on the host", "in backward, activations on the host", "one slot"])
def test_a_destroyed_engine_leaves_no_hook(outcomes, name):
    assert outcomes[name].hooks_left == 0


def test_gradients_travel_to_other_ranks_while_backward_goes_on(outcomes):
    assert outcomes["2 ranks: small buckets, accumulation"].reduced_in_backward > 9


def test_gradients_for_an_update_on_the_host_come_one_part_ahead(outcomes):
    assert outcomes["update on the host"].copies_ahead == 1
    assert outcomes["one slot"].copies_ahead == 0


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_detector_finds_what_is_taken_out(outcomes, name):
    assert outcomes[name].hazards > 0


def test_activations_leave_where_the_hosts_memory_is_short():
    """TRL's context would warn, through a logger that fails where accelerate is not used; backward died of it."""
    code = """
import psutil
real = psutil.virtual_memory
psutil.virtual_memory = lambda: real()._replace(percent=99.0)
from tests.helpers.race_rows import Row, run_row
assert run_row(Row(hift={"activations": {"offload": True}})).hazards == 0
"""
    job = subprocess.run([sys.executable, "-c", code], cwd=race_rows.ROOT, capture_output=True, text=True)
    assert job.returncode == 0, job.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_ROWS)
def test_more_configurations(name):
    row, most = MORE_ROWS[name]
    (outcome,) = run_rows([row])
    assert outcome.hazards == 0, outcome.shown
    assert outcome.num_syncs <= most, outcome.syncs
