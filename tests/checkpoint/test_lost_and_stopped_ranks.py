"""Signals that reach one rank, bad losses on one rank, ranks that hang or die."""

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from hift_ds import ranks
from hift_ds.errors import ConfigError, TrainingError
from hift_ds.store.base import MASTER
from hift_ds.train import finetune, spread_masters
from hift_ds.train.preemption import StopRequest
from hift_ds.train.watchdog import (
    HANG_EXIT_CODE,
    DivergenceGuard,
    HangWatchdog,
    collective_timeout_s,
    lost_rank_error,
)
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
    with StopRequest(engine.device, engine) as stop:
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
    assert (tmp_path / "cut" / "step.0").read_text() == (tmp_path / "cut" / "step.1").read_text() == str(stopped_at)
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


def agree_as_if_on_gpus() -> tuple[list, list, bool]:
    """With a default group that says it is NCCL's: values in host memory travel over a gloo group, made once."""
    from datetime import timedelta
    from unittest import mock

    made, used = [], []
    new_group, gather = dist.new_group, dist.all_gather_object

    def count_new(*args, **kwargs):
        made.append(kwargs)
        return new_group(*args, **kwargs)

    def note_group(values, value, group=None):
        used.append(group)
        return gather(values, value, group=group)

    with (
        mock.patch.object(dist, "get_backend", lambda group=None: "cpu:gloo,cuda:nccl"),
        mock.patch.object(dist, "new_group", count_new),
        mock.patch.object(dist, "all_gather_object", note_group),
    ):
        values = [ranks.gather(dist.get_rank()), ranks.gather("same")]
    own_group = all(group is used[0] and group is not None and group is not dist.group.WORLD for group in used)
    assert [kwargs["backend"] for kwargs in made] == ["gloo"] and made[0]["timeout"] > timedelta(days=1)
    assert ranks.host_group() is None  # gloo's own
    return values, made, own_group


def test_agreement_about_host_matters_needs_no_gpu(launcher):
    for values, made, own_group in launcher.run(agree_as_if_on_gpus, 2):
        assert values == [[0, 1], ["same", "same"]] and len(made) == 1 and own_group


def test_a_lost_rank_and_other_errors_of_its_library():
    engine = SimpleNamespace(
        global_steps=3,
        groups=[SimpleNamespace(name="head")],
        schedule=SimpleNamespace(active=0),
        last_checkpoint=None,
    )
    lost = (
        dist.DistNetworkError("x"),
        RuntimeError("[../third_party/gloo/pair.cc:589] Connection closed by peer [127.0.0.1]:1234"),
        dist.DistBackendError("NCCL communicator was aborted on rank 1."),
        RuntimeError("ncclRemoteError: A call failed possibly due to a network error or a remote process exiting"),
    )
    for error in lost:
        assert "another rank is gone or hangs, noticed in step 3 (group head)" in str(lost_rank_error(error, engine))
    others = (
        dist.DistBackendError("NCCL error: ncclUnhandledCudaError: Failed to CUDA calloc async 6 bytes; out of memory"),
        RuntimeError("Tensors must be CUDA and dense for NCCL"),
        ValueError("Connection closed by peer"),
    )
    assert [lost_rank_error(error, engine) for error in others] == [None] * 3


def test_collectives_wait_longer_than_the_watchdog(monkeypatch):
    import deepspeed

    from hift_ds.process_group import ensure_process_group

    for hang_timeout_s in (1.0, 7200.0, 10**6):
        assert collective_timeout_s(hang_timeout_s) > hang_timeout_s
    assert collective_timeout_s(0) > 10**7
    given = []
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **options: given.append(options))
    monkeypatch.delenv("DEEPSPEED_TIMEOUT", raising=False)
    ensure_process_group(collective_timeout_s(7200.0))
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", "60")
    ensure_process_group(collective_timeout_s(7200.0))
    assert [options.get("timeout") and options["timeout"].total_seconds() for options in given] == [
        9600.0,
        None,
    ]


def test_a_job_asks_for_both_before_its_first_collective(monkeypatch):
    """For a timeout, and for NCCL without links that do not work."""
    happened = []

    def no_such_model(run):
        raise ConfigError("no such model")

    monkeypatch.setattr(finetune, "avoid_broken_links", lambda: happened.append("links"))
    monkeypatch.setattr(finetune, "ensure_process_group", happened.append)
    monkeypatch.setattr(finetune, "_check", no_such_model)
    with pytest.raises(ConfigError, match="no such model"):
        finetune.finetune(SimpleNamespace(train=SimpleNamespace(hang_timeout_s=100.0)))
    assert happened == ["links", collective_timeout_s(100.0)]


def test_masters_of_several_nodes_travel_through_host_memory(monkeypatch):
    """Else they would lie on the first rank's accelerator, those of all ranks at once."""
    pieces = {0: [(0, torch.ones(2))], 1: [(2, torch.full((3,), 2.0))]}
    groups = []

    def gather_object(own, gathered, group=None):
        groups.append(group)
        gathered[:] = [own, pieces[1]]

    saved = SimpleNamespace(
        weight_names=["w"],
        weight=lambda name: torch.zeros(5, dtype=torch.bfloat16),
        states_of=lambda rank: SimpleNamespace(pieces=lambda name, key: pieces[rank] if key == MASTER else []),
    )
    fake = SimpleNamespace(get_rank=lambda: 0, get_world_size=lambda: 2, gather_object=gather_object)
    monkeypatch.setattr(spread_masters, "dist", fake)
    monkeypatch.setattr(spread_masters, "host_group", lambda: "of the hosts")
    ((name, whole),) = spread_masters.gathered_weights(saved)
    assert name == "w" and whole.tolist() == [1, 1, 2, 2, 2] and groups == ["of the hosts"]


def test_consumer_gpus_that_cannot_talk_to_each_other(monkeypatch):
    from accelerate import utils

    names = ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(utils, "check_cuda_p2p_ib_support", lambda: True)
    ranks.avoid_broken_links()
    assert not any(name in os.environ for name in names)
    monkeypatch.setattr(utils, "check_cuda_p2p_ib_support", lambda: False)
    ranks.avoid_broken_links()
    assert [os.environ.pop(name) for name in names] == ["1", "1"]


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
