"""Compact forms of states: lossless where they say so, unbiased where they round, and stable when kept
again."""

import itertools

import pytest
import torch

from hift_ds import config
from hift_ds.store import codecs, eight_bit
from hift_ds.store.codecs import Bfloat16Moment, Exact, Int8Moment, SplitMaster, codec_for
from hift_ds.store.eight_bit import BLOCK_NUMEL
from hift_ds.store.layout import ChunkLayout


def kept(codec, values, seed=0):
    """The parts after encoding, as the memory of a slot."""
    layout = ChunkLayout()
    layout.add("key", values.numel(), values.dtype, codec)
    memory = torch.randint(0, 256, (layout.num_bytes,), dtype=torch.uint8)  # what was there must not matter
    parts = layout.parts("key", memory)
    codec.encode(values, parts, seed)
    return parts


def round_trip(codec, values, seed=0):
    return codec.decode(kept(codec, values, seed)).clone()


def awkward_masters():
    """Every bf16 pattern as high half, with the low halves at which rounding changes its mind; shuffled."""
    high = torch.arange(1 << 16, dtype=torch.int64)
    lows = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = ((high[:, None] << 16) | lows).view(-1)
    bits = bits[torch.randperm(bits.numel(), generator=torch.Generator().manual_seed(0))]
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)


def test_split_master_loses_no_bit():
    masters = awkward_masters()
    weights = masters.to(torch.bfloat16)
    pieces = [weights[:7], weights[7:100_003], weights[100_003:]]
    decoded = round_trip(SplitMaster(lambda: pieces), masters)
    is_nan = masters.isnan()
    assert torch.equal(decoded.view(torch.int32)[~is_nan], masters.view(torch.int32)[~is_nan])
    assert decoded.isnan().equal(is_nan)
    assert SplitMaster(lambda: pieces).parts(10)[0].dtype.itemsize == 2


def test_split_master_of_nothing_but_ties():
    """Masters that came from fp16: one in eight is half way between two bf16."""
    masters = torch.arange(1, 50_001, dtype=torch.float32) * 2.0**-14
    masters = masters.half().float()
    codec = SplitMaster(lambda: [masters.to(torch.bfloat16)])
    assert torch.equal(round_trip(codec, masters), masters)
    assert codec._ties_down.numel() > 1000


def test_split_master_with_a_list_of_fixed_length(monkeypatch):
    """As on an accelerator: the same bits, the same length whatever the values; where a pass has more ties than room
    they lose half a unit of fp32 and no more."""
    monkeypatch.setattr(SplitMaster, "_fixes_length", lambda self, values: True)
    masters = torch.randn(1 << 18, generator=torch.Generator().manual_seed(0))
    masters.view(torch.int32)[1000:1200] &= -65536
    masters.view(torch.int32)[1000:1100] |= 0x8000  # half of them are rounded down
    codec = SplitMaster(lambda: [masters.to(torch.bfloat16)])
    for _ in range(2):
        assert torch.equal(round_trip(codec, masters), masters)
    assert codec._ties_down.numel() == 2 * 64 and 20 < (codec._ties_down >= 0).sum() < 64

    masters[: 1 << 17] = (torch.arange(1, (1 << 17) + 1, dtype=torch.float32) * 2.0**-16).half().float()
    codec = SplitMaster(lambda: [masters.to(torch.bfloat16)])
    decoded = round_trip(codec, masters)
    apart = (decoded.view(torch.int32) - masters.view(torch.int32)).abs()
    assert apart[: 1 << 17].max() == 1 and apart[1 << 17 :].max() == 0
    assert torch.equal(decoded.to(torch.bfloat16), masters.to(torch.bfloat16))


def test_split_master_of_zero_bytes_is_the_weight():
    weights = torch.randn(33).to(torch.bfloat16)
    codec = SplitMaster(lambda: [weights])
    assert torch.equal(codec.decode({"low": torch.zeros(33, dtype=torch.int16)}), weights.float())


def test_bf16_second_moments_are_right_on_average():
    values = torch.rand(64, generator=torch.Generator().manual_seed(1)) * 1e-5
    codec = Bfloat16Moment(stochastic=True)
    mean = torch.stack([round_trip(codec, values, seed) for seed in range(4000)]).double().mean(0)
    step = 2.0**-8 * values.double()  # distance of neighbouring bf16 is between this and twice this
    assert ((mean - values).abs() < 5 * 2 * step / 4000**0.5).all()
    nearest = round_trip(Bfloat16Moment(stochastic=False), values)
    assert torch.equal(nearest, values.to(torch.bfloat16).float())


def test_bf16_second_moments_do_not_stand_still():
    """exp_avg_sq of a gradient that has become 0 must decay by 0.999 a step: nearest rounding would keep it
    for ever."""
    moments = {stochastic: torch.full((4096,), 1e-3) for stochastic in (True, False)}
    for step, stochastic in itertools.product(range(700), moments):
        moments[stochastic] = round_trip(Bfloat16Moment(stochastic), moments[stochastic] * 0.999, seed=step)
    assert moments[False].mean().item() == pytest.approx(1e-3, rel=0.01)
    assert moments[True].mean().item() == pytest.approx(1e-3 * 0.999**700, rel=0.02)


def test_the_same_seed_rounds_alike_and_bf16_values_stay():
    codec, values = Bfloat16Moment(stochastic=True), torch.randn(10_001).square()
    once = round_trip(codec, values, seed=3)
    assert torch.equal(once, round_trip(codec, values, seed=3))
    assert not torch.equal(once, round_trip(codec, values, seed=4))
    assert torch.equal(once, round_trip(codec, once, seed=5))
    odd = torch.tensor([float("inf"), 0.0, -0.0, 3.0, 1e-40])
    assert round_trip(codec, odd)[:4].tolist() == [float("inf"), 0.0, 0.0, 3.0]


def moments(numel=BLOCK_NUMEL * 9 + 13):
    """Gradient-like: magnitudes over many orders, a block of zeros, one whose largest magnitude is
    negative."""
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(numel, generator=generator) * torch.logspace(-12, 2, numel)
    values[BLOCK_NUMEL : 2 * BLOCK_NUMEL] = 0
    values[5 * BLOCK_NUMEL] = -values[5 * BLOCK_NUMEL : 6 * BLOCK_NUMEL].abs().max() * 3
    return values


@pytest.mark.parametrize("nonnegative", [False, True])
def test_int8_moments_are_close_and_stay_when_kept_again(nonnegative):
    codec = Int8Moment(nonnegative)
    values = moments().square() if nonnegative else moments()
    once = round_trip(codec, values)
    for block, before in zip(once.split(BLOCK_NUMEL), values.split(BLOCK_NUMEL), strict=True):
        relevant = before.abs() > before.abs().max() * (2.0**-30 if nonnegative else 2.0**-15)
        error = (
            (block.abs().sqrt() - before.abs().sqrt()) / before.abs().sqrt()
            if nonnegative
            else (block - before) / before
        )
        assert not relevant.any() or error[relevant].abs().max() <= (1 / 32 if nonnegative else 1 / 16)
        assert (block[~relevant] - before[~relevant]).abs().sum() <= before.abs().max() * 2.0**-15
    again = once
    for _ in range(5):
        again = round_trip(codec, again)
    assert torch.equal(again, once)
    assert (once[BLOCK_NUMEL : 2 * BLOCK_NUMEL] == 0).all() and once.isfinite().all()


@pytest.mark.parametrize("signed", [False, True])
def test_every_eight_bit_level_stays_at_every_scale(signed):
    levels = torch.arange(256, dtype=torch.uint8)
    for scale in torch.tensor([1.0, 0.37, 1e-3, 7.7e-5, 3e8, 2.0**-59]).tolist():
        values, codes, scales = torch.empty(256), torch.empty(256, dtype=torch.uint8), torch.empty(1)
        eight_bit.decode(levels, torch.tensor([scale]), values, signed=signed)
        eight_bit.encode(values, codes, scales, signed=signed)
        again = torch.empty(256)
        eight_bit.decode(codes, scales, again, signed=signed)
        assert torch.equal(again, values) and values.unique().numel() == (255 if signed else 256)
        assert values.abs().max() == scale == scales.item()


def test_eight_bit_rounds_to_the_nearest_level():
    generator = torch.Generator().manual_seed(4)
    for signed in (True, False):
        values = torch.randn(1 << 14, generator=generator) ** 3
        values = values if signed else values.abs()
        codes, scales = torch.empty(1 << 14, dtype=torch.uint8), torch.empty(64)
        eight_bit.encode(values, codes, scales, signed=signed)
        levels = torch.empty(256)
        eight_bit.decode(torch.arange(256, dtype=torch.uint8), torch.ones(1), levels, signed=signed)
        wanted = values.view(64, 256, 1) / scales.view(64, 1, 1)
        best = (wanted - levels).abs().amin(-1)
        got = torch.empty(1 << 14)
        eight_bit.decode(codes, torch.ones(64), got, signed=signed)
        above_zero = wanted[..., 0].abs() > 2.0**-15
        assert torch.allclose(
            (got.view(64, 256) - wanted[..., 0]).abs()[above_zero], best[above_zero], rtol=1e-4, atol=1e-8
        )


def test_int8_keeps_small_second_moments_above_zero():
    """An element whose gradients are 10^7 smaller than its neighbours': at 0 its step would be 10^8 too
    large."""
    grads = torch.ones(BLOCK_NUMEL) * 1e-7
    grads[0], grads[1] = 1.0, 0.0
    decoded = round_trip(Int8Moment(nonnegative=True), grads.square())
    assert decoded[0] == 1 and decoded[1] == 0
    assert (decoded[2:] >= 1e-14).all() and decoded[2:].sqrt().max() < 1e-4


def test_int8_in_passes_is_int8_at_once(monkeypatch):
    values = moments()
    whole = round_trip(Int8Moment(False), values)
    monkeypatch.setitem(codecs.PASS_NUMEL, "cpu", 2 * BLOCK_NUMEL)
    assert torch.equal(round_trip(Int8Moment(False), values), whole)


@pytest.mark.parametrize("codec", [Exact(torch.float32), Bfloat16Moment(True), Int8Moment(True), Int8Moment(False)])
def test_zero_bytes_are_zeros(codec):
    parts = {part.name: torch.zeros(part.numel, dtype=part.dtype) for part in codec.parts(300)}
    assert (codec.decode(parts) == 0).all()


def test_bytes_a_parameter():
    """The figures in docs/states.md, for AdamW with masters."""

    def per_parameter(*names):
        numel, layout = BLOCK_NUMEL * 4096, ChunkLayout()
        for key in ("master", "exp_avg", "exp_avg_sq"):
            layout.add(key, numel, torch.float32, codec_for(names, key, torch.float32, lambda: []))
        return layout.num_bytes / numel

    assert per_parameter() == 12
    assert per_parameter("split_master") == 10
    assert per_parameter("bf16_moments") == 8
    assert per_parameter("split_master", "bf16_moments") == 6
    assert per_parameter("int8_moments") == pytest.approx(6, abs=0.04)
    assert per_parameter("split_master", "int8_moments") == pytest.approx(4, abs=0.04)


def test_only_moments_and_masters_have_a_compact_form():
    names = ("split_master", "bf16_moments")
    assert isinstance(codec_for(names, "master", torch.float32, None), Exact)  # its weight is not in bf16
    assert isinstance(codec_for(names, "row_var:layers.0.up.weight", torch.float32, None), Exact)
    assert isinstance(codec_for(names, "exp_avg", torch.bfloat16, None), Exact)
    assert codec_for(names, "momentum_buffer:layers.0.up.weight", torch.float32, None).stochastic is False
    assert codec_for(names, "exp_avg_sq", torch.float32, None).stochastic is True
    assert {codecs.SPLIT_MASTER, codecs.BF16_MOMENTS, codecs.INT8_MOMENTS, "fp32"} == set(config.CODECS)


def test_weights_elsewhere_are_copied_in_large_pieces():
    """Where values are made decides how much is decoded at once: a weight in host memory would be brought to an
    accelerator in 256 kB."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Copies(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.found += func is torch.ops.aten.copy_.default
            return func(*args, **(kwargs or {}))

    weight = torch.zeros(1 << 20, dtype=torch.bfloat16)
    low = torch.zeros(1 << 20, dtype=torch.int16, device="meta")
    with Copies() as copies:
        SplitMaster(lambda: [weight]).decode({"low": low})
    assert copies.found == 1
