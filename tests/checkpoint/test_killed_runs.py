"""Training on two ranks, killed again and again at random moments, ends as if nothing had happened.

Each round starts both ranks from the newest checkpoint; after a random time one of them, or both, get
SIGKILL, in the middle of whatever they do: starting, loading, stepping, saving (after every step, or in the
background after every third). The rank that is left must notice and end by itself. Every round must find a
whole checkpoint. The end is compared bit for bit with a run that was never stopped.
"""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hift_ds.checkpoint.manifest import latest_tag, tags_by_age, verify
from tests.checkpoint.runs import BATCHES, states_of, whole_weights
from tests.helpers.engines import ds_config, make_engine
from tests.helpers.toy import Toy, loss_of, rows_of_rank

FOREVER = 10**9
CLIP = 0.1  # among the norms of these steps: some are clipped
SURVIVOR_ENDS_WITHIN_S = 60
LONGEST_S = 0.4  # between a run's first step and its kill: a few steps and saves


def train(
    folder: str | None, last: int, asynchronous: bool = False, update: str = "after_backward", clipping: str = "exact"
):
    """This rank's weights, states and cursor after optimizer step ``last``."""
    rank = dist.get_rank()
    hift = {
        "order": "random",
        "reshuffle": True,
        "steps_per_group": 2,
        "update": update,
        "clipping": clipping,
        "checkpoint": {"asynchronous": asynchronous},
    }
    engine = make_engine(Toy(), ds_config(world_size=2, gas=2, clip=CLIP, bf16={"enabled": True}, hift=hift))
    if folder is not None:
        engine.load_checkpoint(folder)
    while engine.global_steps < last:
        for i in (2 * engine.global_steps, 2 * engine.global_steps + 1):
            engine.backward(loss_of(engine, rows_of_rank(BATCHES[i % len(BATCHES)], rank, 2)))
            engine.step()
        if folder is not None and engine.global_steps % (3 if asynchronous else 1) == 0:
            engine.save_checkpoint(folder)
        if folder is not None:
            Path(folder, f"progress.{rank}").touch()
    end = whole_weights(engine), states_of(engine), engine.schedule.cursor
    engine.destroy()
    return end


def one_round(launcher, folder: Path, draw: random.Random, update: str, clipping: str, longest_s: float) -> str:
    """Start, train for up to ``longest_s``, kill, wait. What was done."""
    for path in folder.glob("progress.*"):
        path.unlink()
    asynchronous = draw.random() < 0.5
    job = launcher.start(train, 2, str(folder), FOREVER, asynchronous, update, clipping)
    if draw.random() < 0.15:
        when, delay = "starting", draw.uniform(0.0, 0.5)
    else:
        when, delay = "training", draw.uniform(0.0, longest_s)
        wait_until(lambda: (folder / f"progress.{draw.randrange(2)}").exists() or ended(job), job)
    time.sleep(delay)
    victims = draw.choice([[0], [1], [0, 1], [1, 0]])
    met = all((folder / f"progress.{rank}").exists() for rank in range(2))
    for rank in victims:
        os.kill(job.pids[rank], signal.SIGKILL)
    if not met:  # a rank that still waits for the other to come waits for long: launchers end it
        time.sleep(0.3)
        for pid in job.pids:
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: ended(job), job)
    codes = job.wait()
    assert all(codes[rank] == -signal.SIGKILL for rank in victims), (codes, job.output(0), job.output(1))
    assert all(code != 0 for code in codes), codes
    return f"{'a' if asynchronous else ''}synchronous, {when}, after {delay:.3f} s killed {victims}"


def ended(job) -> bool:
    """Both ranks are zombies or gone."""
    states = []
    for pid in job.pids:
        try:
            states.append(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0])
        except FileNotFoundError:
            states.append("Z")
    return all(state == "Z" for state in states)


def wait_until(condition, job) -> None:
    deadline = time.monotonic() + SURVIVOR_ENDS_WITHIN_S
    while not condition():
        if time.monotonic() > deadline:
            for pid in job.pids:
                os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"still running\n{job.output(0)}\n{job.output(1)}")
        time.sleep(0.005)


def check_and_prune(folder: Path) -> int:
    """The step of the newest checkpoint, which is whole (or 0 if there is none yet); older ones but two
    go."""
    tags = tags_by_age(folder)
    tag = latest_tag(folder)
    if tag is None:
        return verify(folder / tags[0]).global_steps if tags else 0
    step = verify(folder / tag).global_steps
    for old in tags[3:]:
        if old != tag:
            shutil.rmtree(folder / old)
    return step


def kill_and_compare(
    launcher, folder: Path, num_kills: int, update: str = "after_backward", clipping: str = "exact"
) -> None:
    seed = int(os.environ.get("HIFT_TEST_SEED", random.SystemRandom().randrange(10**6)))
    print(f"HIFT_TEST_SEED={seed}")
    draw = random.Random(seed)
    number, step, progressed, longest_s = 0, 0, 0, LONGEST_S
    # Where a step is slow an asynchronous save, after the third, is rarely whole by then: such rounds are made up for.
    while number < num_kills or progressed < num_kills // 2:
        assert number < 3 * num_kills, f"progress, not bits: {progressed} of {number} rounds went on"
        what = one_round(launcher, folder, draw, update, clipping, longest_s)
        before, step = step, check_and_prune(folder)
        print(f"kill {number}: {what}; step {before} -> {step}")
        assert step >= before
        progressed += step > before
        number += 1
        if 2 * progressed < number:  # a slow or busy machine, on which most kills come before the first save
            longest_s *= 1.5
    last = step + 5
    survivors = launcher.run(train, 2, str(folder), last, False, update, clipping)
    whole = launcher.run(train, 2, None, last, False, update, clipping)
    for (weights, states, cursor), (expected_weights, expected_states, expected_cursor) in zip(
        survivors, whole, strict=True
    ):
        assert cursor == expected_cursor
        for theirs, expected in ((weights, expected_weights), (states, expected_states)):
            assert theirs.keys() == expected.keys()
            others = [name for name, tensor in expected.items() if not torch.equal(theirs[name], tensor)]
            assert not others, f"bits at step {last}: {others} are not those of a run that was never stopped"
    leftovers = [p.name for p in folder.iterdir() if p.name.startswith(".") and p.is_dir()]
    assert not leftovers


@pytest.mark.distributed
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads process states from /proc")
def test_twenty_kills(launcher, memory_path):
    kill_and_compare(launcher, memory_path, 20)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads process states from /proc")
def test_two_hundred_kills_on_a_disk(launcher, tmp_path):
    kill_and_compare(launcher, tmp_path, 200)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads process states from /proc")
@pytest.mark.parametrize("clipping", ["exact", "speculative", "last_visit", "per_part"])
def test_twenty_kills_of_updates_in_backward(launcher, memory_path, clipping):
    kill_and_compare(launcher, memory_path, 20, "in_backward", clipping)
