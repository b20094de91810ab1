"""Signals that reach one rank, bad losses on one rank, ranks that hang or die."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hift_ds.errors import TrainingError
from hift_ds.train.preemption import StopRequest
from hift_ds.train.watchdog import HANG_EXIT_CODE, DivergenceGuard, HangWatchdog, lost_rank_error
from tests.helpers.engines import ds_config, make_engine, weights_of
from tests.helpers.toy import Toy, loss_of, make_batches, rows_of_rank

pytestmark = pytest.mark.distributed
BATCHES = make_batches(12)


def step(engine, i, factor=1.0):
    engine.backward(loss_of(engine, rows_of_rank(BATCHES[i % len(BATCHES)], dist.get_rank(), 2)) * factor)
    engine.step()


def loop(folder: str, last: int) -> dict:
    """Trains to ``last`` or until told to stop; in the latter case saves and leaves."""
    engine = make_engine(Toy(), ds_config(world_size=2))
    engine.load_checkpoint(folder)
    with StopRequest(engine.device) as stop:
        while engine.global_steps < last:
            step(engine, engine.global_steps)
            time.sleep(0.02)  # few steps while the other side looks
            Path(folder, f"step.{dist.get_rank()}").write_text(str(engine.global_steps))
            if stop.agreed():
                engine.save_checkpoint(folder)
                stop.exit("the same command")
    weights = weights_of(engine.module)
    engine.destroy()
    return weights


@pytest.mark.parametrize("rank", [1])  # the one that does not speak
def test_a_signal_to_one_rank_stops_all_at_the_same_step(launcher, tmp_path, rank):
    for folder in ("whole", "cut"):
        (tmp_path / folder).mkdir()
    job = launcher.start(loop, 2, str(tmp_path / "cut"), 10**9)
    deadline = time.monotonic() + 120
    while not (tmp_path / "cut" / "step.1").exists():
        assert time.monotonic() < deadline, job.output(0)
        time.sleep(0.01)
    os.kill(job.pids[rank], signal.SIGUSR1)
    assert job.wait() == [0, 0], job.output(0) + job.output(1)
    assert job.output(0).count("stopped and saved; to go on: the same command") == 1
    assert "stopped and saved" not in job.output(1)
    stopped_at = int((tmp_path / "cut" / "latest").read_text().removeprefix("global_step"))
    assert (
        (tmp_path / "cut" / "step.0").read_text()
        == (tmp_path / "cut" / "step.1").read_text()
        == str(stopped_at)
    )
    resumed = launcher.run(loop, 2, str(tmp_path / "cut"), stopped_at + 4)[0]
    whole = launcher.run(loop, 2, str(tmp_path / "whole"), stopped_at + 4)[0]
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())


def bad_loss_on_rank_1() -> tuple[int, dict, dict]:
    rank = dist.get_rank()
    guarded, plain = (make_engine(Toy(), ds_config(world_size=2)) for _ in range(2))
    guard = DivergenceGuard(guarded, policy="skip")
    for i in range(8):
        step(guarded, i, float("nan") if i == 3 and rank == 1 else 1.0)
        if i != 3:
            step(plain, i)
    return len(guard.lines), weights_of(guarded.module), weights_of(plain.module)


def test_a_bad_loss_on_one_rank_is_skipped_by_all(launcher):
    for num_skipped, guarded, plain in launcher.run(bad_loss_on_rank_1, 2):
        assert num_skipped == 1 and all(torch.equal(guarded[name], weight) for name, weight in plain.items())


def hang_on_rank_1(folder: str) -> None:
    engine = make_engine(Toy(), ds_config(world_size=2))
    with HangWatchdog(engine, timeout_s=4.0) as watchdog:
        for i in range(6):
            step(engine, i)
            watchdog.beat()
        engine.save_checkpoint(folder)
        watchdog.beat()
        if dist.get_rank() == 1:
            time.sleep(300)
        step(engine, 6)


def test_a_rank_that_hangs_ends_all_of_them_with_a_reason(launcher, tmp_path):
    job = launcher.start(hang_on_rank_1, 2, str(tmp_path))
    assert job.wait() == [HANG_EXIT_CODE, HANG_EXIT_CODE]
    for rank in range(2):
        line = next(line for line in job.output(rank).splitlines() if "nothing has happened" in line)
        assert line.startswith(f"rank {rank}: nothing has happened for 4 s in step 6 (group layers.0)")
        assert line.endswith(f"last good checkpoint: {tmp_path}/global_step6")
    assert "(hang_on_rank_1)" in job.output(1)  # where it hangs


def die_on_rank_1() -> str:
    engine = make_engine(Toy(), ds_config(world_size=2))
    for i in range(3):
        step(engine, i)
    if dist.get_rank() == 1:
        os._exit(9)
    try:
        for i in range(3, 6):
            step(engine, i)
    except RuntimeError as error:
        named = lost_rank_error(error, engine)
        assert isinstance(named, TrainingError) and lost_rank_error(ValueError("x"), engine) is None
        os.write(1, f"{named}\n".encode())
        os._exit(3)
    return "rank 0 noticed nothing"


def test_a_rank_that_dies_is_named_as_such(launcher):
    job = launcher.start(die_on_rank_1, 2)
    assert job.wait() == [3, 9], job.output(0)
    assert "another rank is gone or hangs, noticed in step 3 (group layers.2): " in job.output(0)
    assert "no checkpoint has been saved yet" in job.output(0)
