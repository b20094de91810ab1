"""The group size that a run gets where its file says nothing: by its length, the memory of the device and the link."""

from __future__ import annotations

import pytest

import model_zoo
from hift_ds.forecast.fit import Speeds
from hift_ds.layers.grouping import LayerGroup
from hift_ds.train.card import Card, card_of
from hift_ds.train.group_size import (
    ENOUGH_TURNS,
    FEWEST_GROUPS,
    FEWEST_TURNS,
    ModelSizes,
    choose_group_size,
    choose_groups,
)
from hift_ds.train.run_config import RunConfig
from hift_ds.train.settings import resolve

UNITS = 32


def groups_of(*numels: int) -> tuple[LayerGroup, ...]:
    return tuple(LayerGroup(index, str(index), (), numel) for index, numel in enumerate(numels))


GROUPS = [groups_of(*[10 * m] * (UNITS // m), *[10 * (UNITS % m)] * (UNITS % m > 0)) for m in range(1, 12)]


def largest(groups) -> int:
    return max(group.numel for group in groups)


def test_the_smallest_groups_that_get_enough_turns():
    for steps in (10, 64, 65, 100, 200, 511, 512, 10_000):
        choice = choose_group_size(GROUPS, steps)
        sizes = [m for m, groups in enumerate(GROUPS, start=1) if len(groups) >= FEWEST_GROUPS]
        enough = [m for m in sizes if steps >= ENOUGH_TURNS * len(GROUPS[m - 1])]
        expected = len(GROUPS[min(enough) - 1]) if enough else FEWEST_GROUPS
        assert choice.num_groups == len(GROUPS[choice.group_size - 1]) == expected, steps
    assert choose_group_size(GROUPS, 512).group_size == 1
    assert choose_group_size(GROUPS, 511).group_size == 2


def test_a_size_that_makes_no_fewer_groups_is_not_taken():
    five = [groups_of(1, 1, 1, 1, 1), groups_of(2, 2, 1), groups_of(3, 2)]
    assert choose_group_size(five, 3).group_size == 1  # three groups are too few
    assert choose_group_size([groups_of(*[1] * 9), groups_of(2, 2, 2, 2, 1), groups_of(3, 3, 3)], 3).group_size == 2


def test_memory_limits_it_and_one_block_is_always_allowed():
    choice = choose_group_size(GROUPS, 64, lambda groups: "after_backward" if largest(groups) <= 30 else None)
    assert (choice.group_size, choice.limit, choice.update) == (3, "memory", "after_backward")
    assert "larger groups would not fit" in choice.line()
    assert choose_group_size(GROUPS, 64, lambda groups: None).group_size == 1


def test_what_fits_in_backward_only_is_updated_there():
    def rule(groups):
        return "after_backward" if largest(groups) <= 30 else "in_backward"

    choice = choose_group_size(GROUPS, 64, rule)
    assert (choice.num_groups, choice.update) == (4, "in_backward")
    assert "updated in backward" in choice.line()
    assert choose_group_size(GROUPS, 512, rule).update == "after_backward"


def test_beyond_a_few_turns_groups_do_not_wait_for_the_link():
    """Four turns each are worth the wait, sixteen are not."""
    choice = choose_group_size(GROUPS, 80, is_hidden=lambda groups, update: largest(groups) <= 20)
    assert (choice.group_size, choice.limit) == (2, "link") and FEWEST_TURNS * choice.num_groups <= 80
    assert "wait for transfers" in choice.line()
    short = choose_group_size(GROUPS, 32, is_hidden=lambda groups, update: False)
    assert short.num_groups == 8 == 32 / FEWEST_TURNS and short.limit == "link"


def settings_of(hift=None, **train):
    content = {"model": {"path": "x"}, "data": {"train": "y"}, "hift": hift or {}}
    return resolve(RunConfig.model_validate({**content, "train": {"output_dir": "z", **train}}), 1)


@pytest.mark.parametrize("size, card, expected", [
    ("llama2_7b", 80, {"hift.group_size": 9}),  # 34 units in 4 groups: 32 steps are few
    # There the link holds it back: clipped exactly, 6 blocks wait for 4.3 % of a step (5 of them for 24 bytes a
    # parameter, all for 2), 7 for 5.
    ("llama2_7b", 24, {"hift.group_size": 6, "hift.update": "in_backward"}),
    ("llama2_7b", 16, {"hift.group_size": 1}),
])  # fmt: skip
def test_a_short_run_on_cards(size, card, expected):
    model = ModelSizes.read(size, False)
    settings = settings_of(max_steps=32, global_batch_size=64, micro_batch_size=1)
    keys, lines = choose_groups(settings, "bf16", 2048, None, model, card_of(card, 1))
    assert keys == expected, lines


def test_a_slow_link_is_seen_and_what_the_user_says_holds():
    model = ModelSizes.read("llama2_7b", False)
    fast, slow = (Card("", 80 << 30, Speeds(100e12, link)) for link in (20e9, 0.5e9))
    run = settings_of(max_steps=200, global_batch_size=16, micro_batch_size=1)
    assert choose_groups(run, "bf16", 1024, None, model, fast)[0] == {"hift.group_size": 3}
    assert choose_groups(run, "bf16", 1024, None, model, slow)[0] == {"hift.group_size": 1}
    on_host = choose_groups(run, "bf16", 1024, None, model, Card("", 1 << 30, is_host=True))
    assert on_host[0] == {"hift.group_size": 3}  # nothing is bounded there
    for given in ({"group_size": 1}, {"groups": [["embed"]]}, {"always_active": ["norm"]}, {"steps_per_group": 2}):
        assert choose_groups(settings_of(given, max_steps=32), "bf16", 1024, None, model, fast) == ({}, ())
    after = settings_of({"update": "after_backward"}, max_steps=32, global_batch_size=64, micro_batch_size=1)
    keys, _ = choose_groups(after, "bf16", 2048, None, model, card_of(24, 1))
    assert keys["hift.group_size"] < 9 and "hift.update" not in keys


EDGE, BLOCK = 131_072_000, 202_383_360  # parameters of LLaMA-2-7B's embedding (its head has 4096 more) and blocks
FLOPS_S, TOKENS = 100e12, 16 * 1024


def waits_after_backward(size, link):
    """Of a step's computing, averaged over the groups: a group's states go and come, 12 bytes a parameter each way, in
    one slot."""
    parts = [EDGE, *[BLOCK] * 32, EDGE + 4096]
    computing = waiting = 0.0
    for start in range(0, len(parts), size):
        own, above = sum(parts[start : start + size]), sum(parts[start + size :])
        seconds = TOKENS / FLOPS_S * (2 * sum(parts) + 2 * above + 4 * own)
        computing += seconds
        waiting += max(24 * own / link - seconds, 0)
    return waiting / computing


def waits_for_the_norm(size, link, gradient):
    """Of blocks in the middle: gradients come back when backward has ended, ``gradient`` bytes a parameter, and with
    them the states of all that two slots have no room for."""
    parts = 2 * EDGE + 32 * BLOCK
    computing = TOKENS / FLOPS_S * (2 * parts + (parts - size * BLOCK) + 4 * size * BLOCK)
    return BLOCK * (size * gradient + max(size - 2, 0) * 12) / link / computing


def size_on(link, hift, **train):
    model = ModelSizes.read("llama2_7b", False)
    card = Card("", 500 << 30, Speeds(FLOPS_S, link, device_s=0))
    run = settings_of(hift, max_steps=4 * 34, global_batch_size=16, micro_batch_size=16, **train)
    return choose_groups(run, "bf16", 1024, None, model, card)[0]["hift.group_size"]


@pytest.mark.parametrize("link", [2.5e9, 4e9, 6e9, 8e9, 20e9])
def test_the_link_after_backward_is_what_a_step_can_hide(link):
    """The largest groups that wait for 5 % at most; five blocks get 16 turns of the run."""
    expected = max((m for m in range(1, 6) if waits_after_backward(m, link) <= 0.05), default=1)
    for clip in (0.0, 1.0):  # which changes nothing: gradients are on the device
        assert size_on(link, {}, max_grad_norm=clip) == expected


def test_the_link_in_backward_knows_of_the_norm():
    """Clipped exactly, updates begin when backward has ended, and gradients come back for them."""
    block = {"update": "in_backward", "state": {"slots": 2}}
    found = []  # the mean over all groups is some 8 % lower: none of these is that near
    for link in (6e9, 10e9, 15e9, 22e9):
        expected = [max((m for m in range(1, 6) if waits_for_the_norm(m, link, g) <= 0.05), default=1) for g in (2, 4)]
        assert size_on(link, block) == expected[0]
        unclipped = size_on(link, block, max_grad_norm=0.0)
        assert unclipped == size_on(link, {**block, "clipping": "per_part"}) > expected[0]
        run = settings_of(block, max_steps=4 * 34, global_batch_size=16, micro_batch_size=8)  # sums of two, in fp32
        card = Card("", 500 << 30, Speeds(FLOPS_S, link, device_s=0))
        keys, _ = choose_groups(run, "bf16", 1024, None, ModelSizes.read("llama2_7b", False), card)
        assert keys["hift.group_size"] == expected[1]
        found.append(tuple(expected))
    assert unclipped == 5 and len(set(found)) > 2, found  # a block's states come in 0.1 s, its backward takes 0.13


def test_the_link_knows_of_the_hosts_share():
    """A block's states, 12 bytes a parameter, are hidden by its backward from 16 GB/s on (two slots hide some more),
    and on half of that where the host updates half of them."""
    split = {"update": "in_backward", "state": {"slots": 2, "step_on": "split"}}
    sizes = [size_on(7e9, {**split, "state": {**split["state"], **share}}, max_grad_norm=0.0)
             for share in ({}, {"host_share": 0.5}, {"host_share": 0.0})]  # fmt: skip
    alone = {"update": "in_backward", "state": {"slots": 2}}
    assert sizes[2] == size_on(7e9, alone, max_grad_norm=0.0) < sizes[1] <= sizes[0] == 5


def test_the_length_of_a_run_comes_from_its_data_or_is_not_known():
    model = ModelSizes(model_zoo.config("smollm2_135m"))
    assert "not known" in choose_groups(settings_of(), "fp32", 512, None, model, None)[1][0]
    keys, (line,) = choose_groups(settings_of(epochs=2.0, global_batch_size=16), "fp32", 512, 512, model, None)
    assert keys == {"hift.group_size": 8} and "each trained in 16.0 of 64 steps" in line
