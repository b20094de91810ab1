import math

import torch

from hift_ds.precision import LossScaler, round_to_bf16_stochastic, write_weight_


def test_stochastic_rounding_gives_a_neighbour_and_the_right_mean():
    generator = torch.Generator().manual_seed(0)
    low = torch.tensor(1.0)
    high = torch.tensor(1.0 + 2**-7)  # the next bf16
    value = (low + 0.25 * (high - low)).expand(20000)
    rounded = round_to_bf16_stochastic(value, generator).float()
    assert set(rounded.tolist()) == {low.item(), high.item()}
    share_up = (rounded == high).float().mean().item()
    assert abs(share_up - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 20000)


def test_stochastic_rounding_keeps_what_bf16_can_say_and_what_is_not_a_number():
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(1000).to(torch.bfloat16)
    assert torch.equal(round_to_bf16_stochastic(exact.float(), generator), exact)
    odd = round_to_bf16_stochastic(torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0]), generator)
    assert odd[0] == math.inf and odd[1] == -math.inf and odd[2].isnan() and odd[3] == 0 and odd[4] == 0


def test_stochastic_rounding_of_negative_values_is_unbiased_too():
    generator = torch.Generator().manual_seed(1)
    value = torch.full((20000,), -3.3)
    rounded = round_to_bf16_stochastic(value, generator).float()
    step = 2.0**-6
    assert abs(rounded.mean().item() + 3.3) < 5 * step / math.sqrt(20000)


def test_small_updates_survive_stochastic_but_not_nearest_rounding():
    update = 2.0**-12  # far below half a bf16 step at 1.0
    nearest = torch.ones(4096, dtype=torch.bfloat16)
    stochastic = torch.ones(4096, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(2)
    for _ in range(16):
        write_weight_(nearest, nearest.float() + update, None)
        write_weight_(stochastic, stochastic.float() + update, generator)
    assert torch.equal(nearest, torch.ones_like(nearest))
    assert abs(stochastic.float().mean().item() - (1 + 16 * update)) < 1e-3


def test_dynamic_scale_halves_after_hysteresis_and_doubles_after_a_window():
    scaler = LossScaler.from_fp16_block({"initial_scale_power": 4, "loss_scale_window": 3, "hysteresis": 2})
    scaler.update(True)
    assert scaler.scale == 16  # one overflow is tolerated
    scaler.update(True)
    assert scaler.scale == 8
    for _ in range(3):
        scaler.update(False)
    assert scaler.scale == 16
    assert scaler.overflowed(math.inf) and scaler.overflowed(math.nan) and not scaler.overflowed(1.0)


def test_static_scale_never_moves_and_no_scale_never_skips():
    static = LossScaler.from_fp16_block({"loss_scale": 128})
    static.update(True)
    assert static.scale == 128 and static.overflowed(math.inf)
    assert not LossScaler().overflowed(math.inf)


def test_scale_state_round_trip():
    scaler = LossScaler.from_fp16_block({"initial_scale_power": 8, "loss_scale_window": 4})
    for overflow in (True, False, False, True, False):
        scaler.update(overflow)
    copy = LossScaler.from_fp16_block({"initial_scale_power": 8, "loss_scale_window": 4})
    copy.load_state_dict(scaler.state_dict())
    for overflow in (False, False, False, True, True):
        scaler.update(overflow)
        copy.update(overflow)
    assert copy.state_dict() == scaler.state_dict()
