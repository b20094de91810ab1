import pytest

from hift_ds.schedule import GroupSchedule


def visits(schedule, steps):
    seen = []
    for _ in range(steps):
        seen.append(schedule.active)
        schedule.advance()
    return seen


def test_bottom2up_and_top2down_visit_every_group_once_a_cycle():
    assert visits(GroupSchedule(4), 8) == [0, 1, 2, 3, 0, 1, 2, 3]
    assert visits(GroupSchedule(4, "top2down"), 8) == [3, 2, 1, 0, 3, 2, 1, 0]


def test_random_is_one_shuffle_and_reshuffle_draws_anew():
    fixed = visits(GroupSchedule(6, "random", seed=3), 18)
    assert sorted(fixed[:6]) == list(range(6)) and fixed[:6] == fixed[6:12] == fixed[12:]
    fresh = visits(GroupSchedule(6, "random", reshuffle=True, seed=3), 18)
    assert all(sorted(fresh[i : i + 6]) == list(range(6)) for i in (0, 6, 12))
    assert fresh[:6] != fresh[6:12]
    assert visits(GroupSchedule(6, "random", seed=4), 6) != fixed[:6]


def test_orders_do_not_touch_the_global_generator():
    import random

    random.seed(0)
    expected = random.random()
    random.seed(0)
    visits(GroupSchedule(5, "random", reshuffle=True), 10)
    assert random.random() == expected


def test_steps_per_group_is_a_turn():
    schedule = GroupSchedule(3, steps_per_group=2)
    assert visits(schedule, 7) == [0, 0, 1, 1, 2, 2, 0]
    assert schedule.steps_per_cycle == 6


def test_starts_cycle_only_at_the_first_step_of_a_cycle():
    schedule = GroupSchedule(2, steps_per_group=2)
    flags = []
    for _ in range(8):
        flags.append(schedule.starts_cycle)
        schedule.advance()
    assert flags == [True, False, False, False] * 2


@pytest.mark.parametrize("order,reshuffle", [("bottom2up", False), ("random", False), ("random", True)])
def test_resumed_schedule_goes_on_alike(order, reshuffle):
    whole = GroupSchedule(5, order, reshuffle, seed=7, steps_per_group=3)
    expected = visits(whole, 60)
    first = GroupSchedule(5, order, reshuffle, seed=7, steps_per_group=3)
    visits(first, 19)  # mid-cycle, mid-turn
    second = GroupSchedule(5, order, reshuffle, seed=7, steps_per_group=3)
    second.load_state_dict(first.state_dict())
    assert visits(second, 41) == expected[19:]


def test_upcoming_crosses_into_the_next_cycles_order():
    schedule = GroupSchedule(3, "random", reshuffle=True, seed=1)
    expected = schedule.order_at(0)[1:] + schedule.order_at(1)
    assert schedule.upcoming(5) == expected


def test_differences_name_what_changed():
    saved = GroupSchedule(3).state_dict()
    assert GroupSchedule(3).differences(saved) == []
    assert GroupSchedule(4, "top2down").differences(saved) == [
        "num_groups: 3 -> 4",
        "order: bottom2up -> top2down",
    ]


def test_too_few_turns():
    assert "takes 8 steps and the run has 7: some groups will not be trained" in GroupSchedule(8).too_few_turns(7)
    assert "each of the 8 layer groups is trained in 3.9 of 31 steps" in GroupSchedule(8).too_few_turns(31)
    assert GroupSchedule(8).too_few_turns(32) is None
    assert GroupSchedule(1).too_few_turns(1) is None  # full fine-tuning
    assert GroupSchedule(8, steps_per_group=50).too_few_turns(400) is None  # turns of many steps are a plan
    assert GroupSchedule(8, steps_per_group=50).too_few_turns(399)
