"""The start-up line says what follows from its figures: LLaMA-2-7B, one layer a group, on a 25 GB/s link."""

import dataclasses
import logging
import re

import pytest
import torch

from hift_ds.store.arithmetic import Link, StateArithmetic, measure_flops, measure_link, measure_update
from tests.helpers.engines import ds_config, make_engine
from tests.helpers.toy import Toy

LLAMA = StateArithmetic(
    residency="in host memory", total_bytes=80_900_000_000, step_bytes=2.43e9, link=Link(25e9, 25e9),
    prefetch=True, slots=1, model_numel=6_740_000_000, flops_s=150e12, update_numel=202.4e6,
    device_s=2e-11, host_s=0.76e-9,
    host_link=Link(25e9, 25e9), weight_bytes=2, step_on="device",
)  # fmt: skip


def test_when_computing_hides_the_transfers():
    assert LLAMA.transfer_s == pytest.approx(2 * 2.43 / 25)
    assert dataclasses.replace(LLAMA, slots=2).transfer_s == pytest.approx(2.43 / 25)
    assert LLAMA.hiding_tokens == pytest.approx(0.1944 / (3.1 * 6.74e9 / 150e12))
    line = LLAMA.line()
    assert "75.3 GiB in host memory; a step moves 2.26 GiB in at 23.3 GiB/s and out at 23.3 GiB/s: 0.194 s" in line
    assert "hidden from 1,396 tokens a step on (6.74 G parameters at 150 TFLOP/s)" in line
    small = dataclasses.replace(LLAMA, model_numel=17_408, flops_s=1.75e8).line()
    assert "(17.4 k parameters at 175 MFLOP/s)" in small
    assert "all of it waited for" in dataclasses.replace(LLAMA, prefetch=False).line()
    assert "nothing moves" in dataclasses.replace(LLAMA, link=None).line()


def test_which_step_is_faster():
    """Host: 0.032 s of moving 0.405 GB down and up, 0.154 s of update. Device: 0.194 s of transfer that few
    tokens do not hide, 0.004 s of update. Equal where computing takes (0.194 + 0.004 - 0.186) s, at 0.139 ms
    a token."""
    assert LLAMA.host_step_s == pytest.approx(2 * 0.4048 / 25 + 202.4e6 * 0.76e-9)
    assert "step_on host is faster here below 88 tokens a step, device above" in LLAMA.line()
    slow_host = dataclasses.replace(LLAMA, host_s=2e-9)
    assert "step_on device is faster here" in slow_host.line()
    assert "here device and host are one" in dataclasses.replace(LLAMA, host_link=None).line()


def test_measurements_are_of_the_right_order():
    cpu = torch.device("cpu")
    assert 1e8 < measure_flops(cpu, torch.float32, 128) < 1e14
    assert 1e-12 < measure_update(cpu, 10_000) < 1e-5
    link = measure_link(cpu, 1 << 20, True)
    assert 1e7 < link.into < 1e13 and 1e7 < link.out < 1e13


def test_one_line_at_the_start_if_anybody_reads_it(caplog, tmp_path):
    caplog.set_level(logging.INFO, logger="hift_ds.engine.engine")
    state = {"residency": "disk", "path": str(tmp_path)}
    engine = make_engine(Toy(), ds_config(hift={"state": state}, bf16={"enabled": True}))
    (line,) = [message for message in caplog.messages if message.startswith("states: ")]
    assert re.search(r"on disk \((direct|buffered) I/O\); a step moves .* hidden from [\d,]+ tokens a step", line)
    assert engine.state_arithmetic.step_bytes == engine.optimizer.store.total_bytes() / len(engine.groups)
    engine.destroy()
    caplog.clear()
    caplog.set_level(logging.WARNING, logger="hift_ds.engine.engine")
    engine = make_engine(Toy(), ds_config())
    assert not caplog.messages and "state_arithmetic" not in vars(engine)  # nothing was measured
    assert "nothing moves" not in engine.state_arithmetic.line()
    engine.destroy()
