"""Runs that diverge: nothing of a bad step remains, and the error says where to go on."""

import pytest
import torch

from hift_ds.errors import TrainingError
from hift_ds.train.watchdog import DivergenceGuard
from tests.helpers.engines import ds_config, make_engine, weights_of
from tests.helpers.toy import Toy, loss_of, make_batches

BATCHES = make_batches(12)


@pytest.fixture
def engine():
    engine = make_engine(Toy(), ds_config())
    yield engine
    engine.destroy()


def step(engine, i, factor=1.0):
    engine.backward(loss_of(engine, BATCHES[i % len(BATCHES)]) * factor)
    engine.step()


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def run_without(bad, steps):
    """The weights of a run that never saw the bad batches."""
    engine = make_engine(Toy(), ds_config())
    for i in range(steps):
        if i not in bad:
            step(engine, i)
    weights = weights_of(engine.module)
    engine.destroy()
    return weights


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_stop_names_step_group_and_checkpoint_before_anything_moves(engine, tmp_path, factor):
    DivergenceGuard(engine)
    for i in range(7):
        step(engine, i)
    engine.save_checkpoint(tmp_path)
    before = weights_of(engine.module)
    with pytest.raises(
        TrainingError,
        match=rf"step 7 \(group layers.1\): the loss is not finite; last good checkpoint: "
        rf"{tmp_path}/global_step7",
    ):
        step(engine, 7, factor)
    assert same(weights_of(engine.module), before)


def test_stop_without_a_checkpoint(engine):
    DivergenceGuard(engine)
    with pytest.raises(
        TrainingError,
        match=r"step 0 \(group embed\): the loss is not finite; no checkpoint has been saved yet",
    ):
        step(engine, 0, float("nan"))


def test_skip_is_the_run_without_the_bad_batches(engine):
    guard = DivergenceGuard(engine, policy="skip")
    for i in range(16):
        step(engine, i, float("nan") if i in (3, 9) else 1.0)
    assert same(weights_of(engine.module), run_without({3, 9}, 16))
    assert engine.skipped_steps == 2 and len(guard.lines) == 2 and guard.lines[1].startswith("step 9 (group layers.2)")


def test_a_loss_that_is_nan_although_its_gradient_is_not(engine):
    """All labels masked: torch's mean over nothing is NaN, with a gradient of zero."""
    DivergenceGuard(engine)
    tokens, targets = BATCHES[0]
    loss = loss_of(engine, (tokens, torch.full_like(targets, -100)))
    assert torch.isnan(loss)
    engine.backward(loss)
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in engine.module.parameters())
    with pytest.raises(TrainingError, match="the loss is not finite"):
        engine.step()


def test_a_bad_micro_batch_counts_whichever_it_is():
    engine = make_engine(Toy(), ds_config(gas=3))
    guard = DivergenceGuard(engine, policy="skip")
    for i in range(9):
        step(engine, i, float("nan") if i == 3 else 1.0)
    assert engine.skipped_steps == 1 and len(guard.lines) == 1
    engine.destroy()


def test_an_explosion_is_judged_by_the_groups_own_history(engine):
    guard = DivergenceGuard(engine, policy="skip", max_norm_ratio=1000.0)
    step(engine, 0, 1e6)  # no history yet: anything goes
    for i in range(1, 25):
        step(engine, i)
    assert guard.lines == []
    step(engine, 25, 1e6)
    assert len(guard.lines) == 1 and "times this group's usual" in guard.lines[0]
    step(engine, 26, 10.0)  # within the ratio
    assert len(guard.lines) == 1
    guard.max_norm_ratio = 0
    step(engine, 27, 1e6)
    assert len(guard.lines) == 1


def test_rollback_goes_back_and_on_with_the_next_batch(engine, tmp_path):
    guard = DivergenceGuard(engine, policy="rollback")
    for i in range(4):
        step(engine, i)
        guard.after_step()
    engine.save_checkpoint(tmp_path)
    for i in range(4, 12):
        step(engine, i, float("nan") if i == 7 else 1.0)
        guard.after_step()
    assert engine.global_steps == 4 + 4 and same(weights_of(engine.module), run_without({4, 5, 6, 7}, 12))


def test_rollback_that_does_not_help_ends(engine, tmp_path):
    guard = DivergenceGuard(engine, policy="rollback", max_rollbacks=2)
    step(engine, 0, float("nan"))
    with pytest.raises(TrainingError, match="no checkpoint to go back to"):
        guard.after_step()
    engine.save_checkpoint(tmp_path)
    for _ in range(2):
        step(engine, 0, float("nan"))
        guard.after_step()
    step(engine, 0, float("nan"))
    with pytest.raises(TrainingError, match=r"keeps coming back after rollbacks to .*global_step"):
        guard.after_step()


def test_skipping_for_ever_ends(engine):
    DivergenceGuard(engine, policy="skip", max_in_a_row=5)
    for factor in [1.0, *[float("nan")] * 4] * 2:
        step(engine, 0, factor)
    with pytest.raises(TrainingError, match="5 steps in a row were left out"):
        step(engine, 0, float("nan"))


def test_the_loss_scale_moves_by_its_own_overflows_only():
    config = ds_config(fp16={"enabled": True, "initial_scale_power": 20, "loss_scale_window": 3, "hysteresis": 1})
    plain, guarded = (make_engine(Toy(), config) for _ in range(2))
    guard = DivergenceGuard(guarded)
    for i in range(20):
        step(plain, i)
        step(guarded, i)
    assert plain.skipped_steps == guarded.skipped_steps == len(guard.lines) > 2
    assert plain.optimizer.scaler.state_dict() == guarded.optimizer.scaler.state_dict()
    guard.policy, judge = "skip", guard._reason
    guard._reason = lambda *args: "an explosion"
    step(guarded, 20)
    guard._reason = judge
    assert guarded.skipped_steps == plain.skipped_steps + 1
    assert plain.optimizer.scaler.state_dict() == guarded.optimizer.scaler.state_dict()
    assert same(weights_of(plain.module), weights_of(guarded.module))
    for engine in (plain, guarded):
        engine.destroy()
