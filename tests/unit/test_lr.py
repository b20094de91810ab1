"""The scheduler ticks once per optimizer step; CycleLR decides which of its values an update uses."""

import math
import warnings

import pytest
import torch
from deepspeed.runtime.lr_schedules import WarmupLR
from torch.optim.lr_scheduler import LambdaLR

from hift_ds.lr import CycleLR
from hift_ds.schedule import GroupSchedule

K, STEPS = 4, 24


@pytest.fixture(autouse=True)
def _no_optimizer_steps_here():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        yield


def run(mode, make_scheduler, lrs=(1.0,), steps_per_group=1):
    """The rate used at each of STEPS optimizer steps, as [param_group values]."""
    params = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs]
    optimizer = torch.optim.SGD(params, lr=0.0)
    scheduler = make_scheduler(optimizer)
    latch = CycleLR(mode, optimizer.param_groups)
    latch.scheduler = scheduler
    schedule = GroupSchedule(K, steps_per_group=steps_per_group)
    used = []
    for _ in range(STEPS):
        used.append(list(latch.before_step(schedule.starts_cycle, schedule.cursor.cycle, schedule.steps_per_cycle)))
        schedule.advance()
        scheduler.step()
    return used


def linear_decay(step):
    return 1 - step / STEPS


def warm_up_and_decay(step, warmup=6):
    return step / warmup if step < warmup else (STEPS - step) / (STEPS - warmup)


def test_cycle_holds_the_value_of_the_cycles_first_step_and_decays_over_the_run():
    used = run("cycle", lambda o: LambdaLR(o, linear_decay))
    assert used == [[linear_decay(step - step % K)] for step in range(STEPS)]


def test_cycle_keeps_each_param_groups_own_rate():
    used = run("cycle", lambda o: LambdaLR(o, linear_decay), lrs=(1.0, 0.1))
    assert used[5] == pytest.approx([linear_decay(4), 0.1 * linear_decay(4)])


def test_step_follows_the_scheduler():
    assert run("step", lambda o: LambdaLR(o, linear_decay)) == [[linear_decay(s)] for s in range(STEPS)]


def test_reference_uses_the_cth_value_in_cycle_c():
    assert run("reference", lambda o: LambdaLR(o, linear_decay)) == [[linear_decay(s // K)] for s in range(STEPS)]


def deepspeed_warm_up(optimizer):
    return WarmupLR(optimizer, 0.0, 1.0, warmup_num_steps=6, warmup_type="linear")


@pytest.mark.parametrize(
    "make,first,second",  # the schedule's value at the last step of cycles 0 and 1
    [
        (lambda o: LambdaLR(o, warm_up_and_decay), 3 / 6, warm_up_and_decay(7)),
        (deepspeed_warm_up, 2 / 6, 1.0),  # DeepSpeed counts from -1
    ],
)
def test_no_cycle_of_a_warm_up_is_wasted_at_rate_zero(make, first, second):
    used = run("cycle", make)
    assert all(rate > 0 for (rate,) in used)
    for start in range(0, STEPS, K):
        assert len({rate for (rate,) in used[start : start + K]}) == 1
    assert [used[0][0], used[K][0]] == pytest.approx([first, second])


def test_looking_ahead_leaves_the_scheduler_where_it_was():
    schedulers = {}

    def make(mode):
        def build(optimizer):
            schedulers[mode] = LambdaLR(optimizer, warm_up_and_decay)
            return schedulers[mode]

        return build

    for mode in ("cycle", "step"):
        run(mode, make(mode))
    assert schedulers["cycle"].last_epoch == schedulers["step"].last_epoch == STEPS
    assert schedulers["cycle"].optimizer.param_groups[0]["lr"] == schedulers["step"].optimizer.param_groups[0]["lr"]


def one_cycle(optimizer, total_steps=STEPS):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=total_steps)


def sequence(optimizer):
    parts = [LambdaLR(optimizer, lambda s: (s + 1) / 6), one_cycle(optimizer, STEPS - 6)]
    return torch.optim.lr_scheduler.SequentialLR(optimizer, parts, milestones=[6])


class Stateful:
    """A schedule that counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, step):
        self.calls += 1
        return (1 + self.calls) / 100


def table(optimizer):
    values = [warm_up_and_decay(step) for step in range(STEPS + 1)]  # nothing after the run's last step
    return LambdaLR(optimizer, lambda step: values[step])


@pytest.mark.parametrize("k", [4, 5, 7])  # also with an incomplete last cycle
@pytest.mark.parametrize(
    ("make", "knows_its_end"),
    [(one_cycle, True), (sequence, True), (table, True), (lambda o: LambdaLR(o, Stateful()), True),
     (one_cycle, False), (sequence, False), (table, False)],
)  # fmt: skip
def test_looking_ahead_touches_nothing_and_never_passes_the_end(make, knows_its_end, k):
    """What torch's own loop leaves in param_groups and scheduler, whatever the scheduler writes (momentum here). A loop
    of one's own does not say how many steps are left: then the scheduler's own end counts."""

    def trace(mode):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
        scheduler = make(optimizer)
        latch = CycleLR(mode, optimizer.param_groups)
        latch.scheduler = scheduler
        schedule, seen, used = GroupSchedule(k), [], []
        for step in range(STEPS):
            if knows_its_end:
                latch.steps_left = lambda step=step: STEPS - step
            used += latch.before_step(schedule.starts_cycle, schedule.cursor.cycle, schedule.steps_per_cycle)
            group = {key: v for key, v in optimizer.param_groups[0].items() if key != "params"}
            state = {key: v for key, v in scheduler.state_dict().items() if key != "lr_lambdas"}
            seen.append(repr((group, state)))
            schedule.advance()
            scheduler.step()
        return seen, used

    (seen, used), (plain, rates) = trace("cycle"), trace("step")
    assert seen == plain
    for start in range(0, STEPS, k):
        ticks = rates[start : start + k]
        rises = len(ticks) > 1 and ticks[1] >= ticks[0]
        assert used[start : start + k] == [max(ticks[0], ticks[-1]) if rises else ticks[0]] * len(ticks)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.MultiplicativeLR(o, lambda s: 0.8),
        lambda o: LambdaLR(o, lambda s: 1 / (1 + s)),
        lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
        sequence,
        one_cycle,
    ],
)
@pytest.mark.parametrize("steps_before", [0, 3])
def test_to_watch_a_scheduler_changes_no_rate(make, steps_before):
    """MultiplicativeLR's functions, which have the name of LambdaLR's, are of the rate before."""
    pair = []
    for watched in (False, True):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
        scheduler, rates = make(optimizer), []
        for step in range(STEPS):
            if watched and step == steps_before:
                CycleLR("step", optimizer.param_groups).watch(scheduler)
            rates.append(optimizer.param_groups[0]["lr"])
            scheduler.step()
        pair.append(rates)
    assert pair[0] == pair[1]


def test_a_cosine_that_would_rise_after_its_end_is_not_taken_there():
    def cosine(step):
        return 0.5 * (1 + math.cos(math.pi * step / STEPS))

    params = [torch.nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.SGD(params, lr=1.0)
    scheduler = LambdaLR(optimizer, cosine)
    latch = CycleLR("cycle", optimizer.param_groups)
    latch.scheduler = scheduler
    for _ in range(STEPS - 1):
        scheduler.step()
    assert latch.before_step(True, 0, 9) == [cosine(STEPS - 1)]


def test_turns_of_several_steps_share_the_cycles_rate():
    used = run("cycle", lambda o: LambdaLR(o, linear_decay), steps_per_group=2)
    assert used == [[linear_decay(step - step % (2 * K))] for step in range(STEPS)]


def test_a_scheduler_that_needs_a_metric_is_not_run_ahead():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    latch = CycleLR("cycle", optimizer.param_groups)
    latch.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    assert latch.before_step(True, 0, K) == [0.5]


@pytest.mark.parametrize("mode", ["cycle", "reference"])
def test_state_round_trip(mode):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    latch = CycleLR(mode, optimizer.param_groups)
    for step in range(6):
        optimizer.param_groups[0]["lr"] = 0.5 - step / 100
        latch.before_step(step % K == 0, step // K, K)
    copy = CycleLR(mode, optimizer.param_groups)
    copy.load_state_dict(latch.state_dict())
    assert copy.latched == latch.latched
    assert copy.before_step(False, 1, K) == latch.before_step(False, 1, K)
    assert copy.before_step(True, 2, K) == latch.before_step(True, 2, K)
