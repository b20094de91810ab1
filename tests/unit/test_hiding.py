"""How many layers a step may update while nobody waits for the link: the arithmetic against cases worked by hand."""

from dataclasses import replace

import pytest

from hift_ds.store.hiding import BackwardCosts, fastest_share, layers_hidden, tokens_that_hide
from hift_ds.store.speeds import Link

# Ten layers of 1000 parameters. At 1000 FLOP/s and 1 token a layer's forward takes 2 s, its backward 4 s.
LAYERS = [1000] * 10
FREE = BackwardCosts(state_bytes=12, room=2000, flops_s=1000, link=Link(1e9, 1e9), device_s=0, host_s=1e-3)


def at(rate, **changes):
    """A layer's states take 12,000 / ``rate`` seconds each way."""
    return replace(FREE, link=Link(rate, rate), **changes)


def test_a_step_computes_what_its_layers_cost():
    """All layers: 2 forward and 4 backward for each; one layer: forward, backward for the inputs above, its own 4."""
    assert FREE.cycle(LAYERS, 10, 1) == (pytest.approx(60), pytest.approx(0))
    assert FREE.step([1000], 3000, 10000, 1) == (pytest.approx(20 + 6 + 4), pytest.approx(0))


def test_waiting_for_what_has_no_room():
    """States take 6 s a layer, its backward 4 s. Two layers have arrived when backward begins, at 20 s. The first is
    updated at 24 s and gives its room to the third, which is there at 30 s; from then on one comes every 6 s, the tenth
    at 72 s. Computing alone would have ended at 60 s."""
    computing, waiting = at(2000).cycle(LAYERS, 10, 1)
    assert computing == pytest.approx(60)
    assert waiting == pytest.approx(72 - 60)
    assert at(2000).cycle(LAYERS, 2, 1)[1] == pytest.approx(0)
    assert at(3000).cycle(LAYERS, 10, 1)[1] == pytest.approx(0)  # 4 s a layer: as fast as backward


def test_what_waits_for_the_exact_norm_is_hidden_by_nothing():
    """Backward ends at 60 s. A gradient takes 2 s back, states 6 s: two layers' are there, and updated at 62 and 64 s;
    then each layer's states and gradient take 8 s, the tenth's until 128 s."""
    clipped = at(2000, parked_bytes=2, host_link=Link(1000, 1000))
    assert clipped.cycle(LAYERS, 10, 1) == (pytest.approx(60), pytest.approx(128 - 60))
    assert clipped.cycle(LAYERS, 2, 1)[1] == pytest.approx(4)  # gradients alone
    assert clipped.cycle(LAYERS, 10, 50)[1] == pytest.approx(68)  # more tokens hide no more of it
    assert replace(clipped, prefetch=False).cycle(LAYERS, 10, 1)[1] == pytest.approx(10 * (6 + 2))
    assert replace(clipped, link=None).cycle(LAYERS, 10, 1)[1] == pytest.approx(10 * 2)
    assert replace(clipped, ranks=2).cycle(LAYERS, 10, 1)[1] < 68
    free, waits = (layers_hidden(costs, LAYERS, 4) for costs in (at(2000), clipped))
    assert free.group_size == 10 and 1 < waits.group_size < 10
    assert "28 bytes a parameter" in waits.line() and "updates after backward (clipped exactly)" in waits.line()
    assert "clipped" not in free.line()


def test_one_slot_and_no_prefetch_wait_more():
    both, one = at(4000), at(4000, both_ways=False)
    assert both.cycle(LAYERS, 10, 1)[1] == 0 < one.cycle(LAYERS, 10, 1)[1]
    assert at(4000, prefetch=False).cycle(LAYERS, 10, 1)[1] == pytest.approx(10 * 3)


def test_slices_hide_what_has_room():
    """Half a layer has room: the other half comes when backward is there."""
    computing, waiting = at(4000, room=500).step([1000], 0, 10000, 1)
    assert (computing, waiting) == (pytest.approx(24), pytest.approx(1.5))


def test_the_group_size_grows_with_tokens_until_all_are_hidden():
    costs = at(100.0)  # 120 s a layer
    sizes = [layers_hidden(costs, LAYERS, tokens).group_size for tokens in (1, 5, 10, 20, 25, 30, 60)]
    assert sizes == sorted(sizes) and sizes[0] == 1 and sizes[-1] == 10
    enough = tokens_that_hide(costs, LAYERS)
    assert costs.hides(LAYERS, 10, enough) and not costs.hides(LAYERS, 10, enough * 0.9)
    assert layers_hidden(costs, LAYERS, enough).num_groups == 1
    assert layers_hidden(replace(costs, link=None), LAYERS, 1).group_size == 10  # nothing moves
    assert layers_hidden(costs, LAYERS, 60, largest=3).group_size == 3


def test_smaller_states_need_fewer_tokens():
    tokens = [tokens_that_hide(at(100.0, state_bytes=size), LAYERS) for size in (12, 10, 4)]
    assert tokens[0] > tokens[1] > tokens[2]


def test_the_host_takes_the_share_that_makes_a_step_fastest():
    slow_link = at(2000, host_s=4e-3, host_link=Link(1e6, 1e6))  # 6 s a layer by link, 4 s by host, 4 s of backward
    share = fastest_share(slow_link, LAYERS, 10, 1)
    assert 0.2 < share < 0.8
    mixed = replace(slow_link, share=share)
    assert sum(mixed.cycle(LAYERS, 10, 1)) < min(
        sum(slow_link.cycle(LAYERS, 10, 1)), sum(replace(slow_link, share=1.0).cycle(LAYERS, 10, 1))
    )
    assert fastest_share(at(1e9, host_s=4e-3), LAYERS, 10, 1) == 0  # a link that hides all needs no host
    assert layers_hidden(slow_link, LAYERS, 1, split=True).group_size > layers_hidden(slow_link, LAYERS, 1).group_size


def test_the_hosts_share_of_what_waits_for_the_norm():
    """After backward the device brings ten layers' states, 6 s each, and then each time the gradients, of which the
    host updates its share in 2 s a layer: the last layer's after all that the device brings, all of them after the
    first. That takes 16.5 s at 0.75, 17.2 s at 0.8 and 19.4 s at 0.7."""
    late = at(2000, parked_bytes=2, host_s=2e-3, host_link=Link(1e9, 1e9), prefetch=False)
    waits = {s: max(60 * (1 - s) + 2 * s, 6 * (1 - s) + 20 * s) for s in (0.7, 0.75, 0.8, 1.0)}
    for share, waited in waits.items():
        assert replace(late, share=share).cycle(LAYERS, 10, 1)[1] == pytest.approx(waited, rel=1e-4)
    assert fastest_share(late, LAYERS, 10, 1) == 0.75
    assert fastest_share(replace(late, parked_bytes=0), LAYERS, 10, 1) == 0.75  # nor does after backward hide it
    hidden = at(3000, host_s=2e-3, host_link=Link(1e9, 1e9))
    assert fastest_share(hidden, LAYERS, 10, 1) == 0 < fastest_share(replace(hidden, parked_bytes=2), LAYERS, 10, 1)


def test_after_backward_gradients_are_where_they_are_needed():
    """A group's states have come by the end of backward, or are waited for; its gradients move nowhere."""
    late = at(2000, parked_bytes=0, host_link=Link(1, 1))
    assert late.cycle(LAYERS, 2, 1)[1] == 0 and "clipped" not in layers_hidden(late, LAYERS, 1).line()
    assert late.cycle(LAYERS, 10, 1)[1] == pytest.approx(8 * 6)
    whole = replace(late, room=2e4)  # one part of 10,000 parameters: 60 s of link, 60 s of computing
    assert whole.cycle([10000], 1, 1)[1] == pytest.approx(0)
    assert replace(whole, both_ways=False).cycle([10000], 1, 1)[1] == pytest.approx(60)


def test_backward_waits_for_the_hosts_update():
    """``step_on: host``: 1 s down and 2 s of updating for each of ten layers, and the last one's weights 1 s up."""
    waits = at(1e9, host_s=2e-3, host_link=Link(2000, 2000), share=1.0, beside=False)
    assert waits.cycle(LAYERS, 10, 1) == (pytest.approx(60), pytest.approx(10 * 3 + 1))
    assert waits.cycle(LAYERS, 1, 1)[1] == pytest.approx(3 + 1)
    beside = replace(waits, beside=True)
    assert beside.cycle(LAYERS, 10, 1)[1] == pytest.approx(3 + 1)  # of the last layer: the others' run beside backward
    on_two = replace(waits, ranks=2)  # half of it each, and the others' weights are waited for
    assert on_two.cycle(LAYERS, 10, 1)[1] == pytest.approx(10 * (0.5 + 1 + 0.5))
    assert layers_hidden(waits, LAYERS, 3).group_size < layers_hidden(beside, LAYERS, 3).group_size


def test_the_line_has_the_figures():
    line = layers_hidden(at(100.0), LAYERS, 20).line()
    assert "24 bytes a parameter" in line and "at 20 tokens" in line and "all layers from" in line
