"""The model of a step's timeline, on logs made by hand and on one of the real engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from benchmarks.timeline import BARE, Card, Launch, mean_step, step_times, table
from tests.helpers.race_rows import ROOT

CARD = Card(flops_s=100.0, bytes_s=10.0, link_s=1.0, kernel_s=0.0, launch_s=0.0)


def op(agent, name="kernel", bytes_moved=0, flops=0, link="", after=(), kind="op"):
    return Launch(kind, agent, "host", name, bytes_moved, link, flops, after)


def mark(name):
    return op("host", name, kind="mark")


def test_kernels_wait_for_events_and_copies_for_the_link():
    log = [
        mark("step 0"),
        op("compute", flops=300),  # 3 s of arithmetic
        op("in", bytes_moved=5, link="in"),  # 5 s beside it
        op("in 2", bytes_moved=2, link="in"),  # the link is taken: until 7
        op("out", bytes_moved=4, link="out"),  # the other direction is not
        op("compute", kind="wait", after=(3,)),
        op("compute", bytes_moved=10),  # 1 s of memory, from 7 on
        mark("step 1"),
        op("compute", flops=100),
        op("host", kind="sync", after=(4,)),
        mark("end"),
    ]
    times = step_times(log, CARD)
    assert times == {"step 0": pytest.approx(8.0), "step 1": pytest.approx(1.0)}
    late = [*log[:-2], op("in", bytes_moved=9, link="in"), op("host", kind="sync", after=(9,)), log[-1]]
    assert step_times(late, CARD)["step 1"] == pytest.approx(16.0 - 8.0)  # the host stood still for the copy


def test_a_launch_takes_the_host_its_time():
    card = Card(100.0, 10.0, 1.0, 0.0, launch_s=0.5)
    log = [mark("step 0"), *[op("compute", flops=10)] * 4, mark("end")]
    assert step_times(log, card) == {"step 0": pytest.approx(4 * 0.5 + 0.1)}


def test_blocks_stand_for_all():
    times = {f"step {number}": float(number) for number in range(8)}
    assert mean_step(times, 4, 10) == pytest.approx((4 + 10 * 5.5 + 7) / 12)


def test_on_the_real_engine(tmp_path):
    """A bare loop is the yardstick; the engine takes as long or longer, one slot longer than that, and a synchronized
    device longer still."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 512, "hidden_size": 128,
        "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    code = (
        "import sys, json; from benchmarks import timeline as t; out, sys.stdout = sys.stdout, sys.stderr;"
        "t.WORKLOADS = {'tiny': (2, 16)}; names = list(t.SETTINGS);"
        f"print(json.dumps(t.model_all({str(tmp_path)!r}, names[:3] + [names[4]], ['tiny'], (0, 1))), file=out)"
    )
    job = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert job.returncode == 0, job.stderr[-2000:]
    bare, device, one_slot, synchronized = json.loads(job.stdout.splitlines()[-1])
    assert bare["setting"] == BARE and bare["syncs"] == 0
    assert device["syncs"] == one_slot["syncs"] == 1 < synchronized["syncs"]
    assert all(0 < bare["seconds"][card] <= 1.001 * seconds for card, seconds in device["seconds"].items())
    for card, seconds in device["seconds"].items():
        assert 0 < seconds <= one_slot["seconds"][card] * 1.001 <= synchronized["seconds"][card] * 1.002
    assert "Modelled, not measured" in table([bare, one_slot], "tiny")
