"""The start-up line says what follows from its figures: LLaMA-2-7B, one layer a group, on a 25 GB/s link."""

import dataclasses
import logging
import re

import pytest
import torch

from hift_ds.store.arithmetic import StateArithmetic
from hift_ds.store.speeds import Link, measure_flops, measure_link, measure_update
from tests.helpers.engines import ds_config, make_engine
from tests.helpers.toy import Toy

LLAMA = StateArithmetic("in host memory", 80_900_000_000, 2.43e9, Link(25e9, 25e9), slots=1)


def test_what_a_step_moves_and_how_long_that_takes():
    assert LLAMA.transfer_s == pytest.approx(2 * 2.43 / 25)
    assert dataclasses.replace(LLAMA, slots=2).transfer_s == pytest.approx(2.43 / 25)
    line = LLAMA.line()
    assert "75.3 GiB in host memory; each step copies 2.26 GiB in (23.3 GiB/s) and out (23.3 GiB/s), 0.194 s" in line
    assert "while the model computes" in line
    assert "for which the step waits" in dataclasses.replace(LLAMA, slots=0).line()
    assert "none is copied" in dataclasses.replace(LLAMA, link=None).line()


def test_what_no_computing_hides_is_said():
    """Of 12 slices of 2^24 parameters two have a slot: the other ten come during the update."""
    sliced = dataclasses.replace(LLAMA, slots=2, step_bytes=12 * 2e8, late_bytes=10 * 2e8)
    assert sliced.waited_s == pytest.approx(10 * 2e8 / 25e9)
    assert ", 0.096 s for 0.08 s of which the step waits (slices without a slot)" in sliced.line()
    assert LLAMA.waited_s == 0 and dataclasses.replace(LLAMA, slots=0).waited_s == LLAMA.transfer_s


@pytest.mark.parametrize("update", ["after_backward", "in_backward"])
def test_slices_without_a_slot_are_counted(update):
    state = {"slice_numel": 40, "slots": 2}
    engine = make_engine(Toy(), ds_config(hift={"state": state, "update": update}))
    store, optimizer = engine.optimizer.store, engine.optimizer
    sizes = [[store.num_bytes(chunk.id) for chunk in group.chunks] for group in optimizer.groups.values()]
    late = sum(sum(chunks[2:]) for chunks in sizes) / len(sizes)
    assert late > 0 and optimizer.arithmetic().late_bytes == (late if update == "after_backward" else 0)
    engine.destroy()


def test_measurements_are_of_the_right_order():
    cpu = torch.device("cpu")
    assert 1e8 < measure_flops(cpu, torch.float32, 128) < 1e14
    assert 1e-12 < measure_update(cpu, 10_000) < 1e-5
    link = measure_link(cpu, 1 << 20, True)
    assert 1e7 < link.into < 1e13 and 1e7 < link.out < 1e13


def test_one_line_at_the_start_if_anybody_reads_it(caplog, tmp_path):
    caplog.set_level(logging.INFO, logger="hift_ds.engine")
    state = {"residency": "disk", "path": str(tmp_path)}
    engine = make_engine(Toy(), ds_config(hift={"state": state}, bf16={"enabled": True}))
    (line,) = [message for message in caplog.messages if message.startswith("optimizer states: ")]
    assert re.search(r"on disk \((direct|buffered) I/O\); each step copies .* m?s while the model computes", line)
    states = engine.optimizer.states
    assert engine.optimizer.arithmetic().step_bytes == states.store.total_bytes() / len(engine.groups)
    engine.destroy()
    caplog.clear()
    caplog.set_level(logging.WARNING, logger="hift_ds.engine")
    engine = make_engine(Toy(), ds_config())
    states = engine.optimizer.states
    assert not caplog.messages and "link" not in vars(states.store)  # nothing was measured
    assert "none is copied" not in engine.optimizer.arithmetic().line()
    engine.destroy()
