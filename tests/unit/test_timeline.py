"""The model of a step's timeline, on logs made by hand and on one of the real engine."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest

from benchmarks import timeline
from benchmarks.in_backward_tokens import PARTS, costs_of
from benchmarks.timeline import (
    BARE,
    CARDS,
    CLIPPED,
    LENGTH,
    SLOTS,
    UNCLIPPED,
    Affine,
    Card,
    Launch,
    in_backward_table,
    mean_step,
    model_all,
    model_in_backward,
    step_times,
    steps_of,
    table,
    why,
)
from hift_ds.cli.estimate import settle_layers
from hift_ds.config import StateConfig
from hift_ds.forecast.setting import Setting
from hift_ds.store.hiding import BackwardCosts, tokens_that_hide
from tests.helpers.race_rows import ROOT, ChildError, in_child

CARD = Card(flops_s=100.0, bytes_s=10.0, link_s=1.0, kernel_s=0.0, launch_s=0.0, host_s=10.0, read_s=2.0, written_s=1.0)


def op(agent, name="kernel", bytes_moved=0, flops=0, link="", after=(), kind="op", host="host"):
    return Launch(kind, agent, host, name, bytes_moved, link, flops, after)


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


def test_a_copy_that_waits_keeps_no_other_from_the_link():
    log = [
        mark("step 0"),
        op("compute", flops=400),  # until 4
        op("in", kind="wait", after=(1,)),
        op("in", bytes_moved=5, link="in"),  # 4 to 9
        op("in 2", bytes_moved=3, link="in"),  # 0 to 3
        op("in 2", bytes_moved=2, link="in"),  # does not fit before 4: 9 to 11
        op("in 3", bytes_moved=1, link="in"),  # 3 to 4
        op("compute", kind="wait", after=(6,)),
        op("compute", flops=100),  # until 5
        op("host", kind="sync", after=(5,)),
        mark("end"),
    ]
    assert step_times(log, CARD) == {"step 0": pytest.approx(11.0)}
    assert step_times([*log[:-2], mark("end")], CARD) == {"step 0": pytest.approx(5.0)}


def test_a_disk_serves_one_request_at_a_time_and_threads_begin_when_they_are_started():
    log = [
        mark("step 0"),
        op("host", bytes_moved=10),  # 1 s of the host's own arithmetic
        op("reader", kind="start"),
        op("reader", host="reader", bytes_moved=4, link="read"),  # 2 s, from 1 on
        op("writer", kind="start"),
        op("writer", host="writer", bytes_moved=3, link="written"),  # 3 s, from 3 on
        op("compute", flops=200),  # 1 to 3
        op("host", kind="sync", after=(5,)),  # until 6
        op("compute", flops=100),
        mark("end"),
    ]
    step = steps_of(log, CARD)["step 0"]
    assert step.seconds == pytest.approx(7.0)
    assert step.busy == {"disk": pytest.approx(5.0)}
    assert step.waited == {"written": pytest.approx(3.0), "launches": pytest.approx(1.0)}
    assert why(step).startswith("waits 3.00 s for the disk, 1.00 s for the host's launches; the disk is busy for 71%")


def test_why_a_step_is_slow():
    late = [mark("step 0"), op("compute", flops=100), op("in", bytes_moved=9, link="in"),
            op("compute", kind="wait", after=(2,)), op("compute", flops=50), mark("end")]  # fmt: skip
    step = steps_of(late, CARD)["step 0"]
    assert step.seconds == pytest.approx(9.5) and step.waited == {"in": pytest.approx(8.0)}
    assert why(step) == (
        "waits 8.00 s for states to arrive; the link (in) is busy for 9.00 s, 95% of the step, and bounds it"
    )


def test_a_step_that_hardly_waits_computes_more():
    codec = [mark("step 0"), op("compute", flops=100), op("in", bytes_moved=1, link="in"), op("compute", flops=50),
             op("compute", kind="wait", after=(2,)), mark("end")]  # fmt: skip
    assert why(steps_of(codec, CARD)["step 0"]) == "waits for next to nothing: it computes more than the bare loop"


def test_logs_of_other_batches_follow_from_two():
    def log(rows, extra):
        return [mark("step 0"), mark("step 1"), op("compute", flops=100 * rows + extra), mark("end")]

    bare, ours = Affine(log(2, 0), log(3, 0)), Affine(log(2, 50), log(3, 50))
    assert bare.step(3 * LENGTH, CARD).seconds == pytest.approx(3.0)
    assert ours.step(3 * LENGTH, CARD).seconds == pytest.approx(3.5)
    enough = timeline._enough(ours, bare, CARD)  # 0.5 s are 5 % of 10 s: 10 rows
    assert 10 * LENGTH <= enough["from"] <= 10.4 * LENGTH and enough["hidden"] == LENGTH  # nothing moves
    other = [mark("step 0"), mark("step 1"), op("side", flops=100), mark("end")]
    with pytest.raises(AssertionError, match="changes what is launched"):
        Affine(other, log(3, 0))


def test_from_how_many_tokens_the_link_hides():
    """What moves takes 21 s, a row 1 s before it is waited for and 1 s after: of 20 rows' 40 s it is 1 s late. The bare
    loop does not matter."""

    def log(rows):
        return [mark("step 0"), mark("step 1"), op("in", bytes_moved=21, link="in"), op("compute", flops=100 * rows),
                op("compute", kind="wait", after=(2,)), op("compute", flops=100 * rows), mark("end")]  # fmt: skip

    ours, bare = Affine(log(2), log(3)), Affine(*([mark("step 0"), mark("step 1"), mark("end")] for _ in range(2)))
    enough = timeline._enough(ours, bare, CARD)["hidden"]  # 21 - n <= 0.05 * 2 n
    assert 21 / 1.1 * LENGTH <= enough <= 21 / 1.1 * 1.04 * LENGTH


def test_a_child_that_dies_or_hangs_is_told():
    """And does not leave the parent waiting."""
    assert in_child(lambda a, b: a + b, 1, 2) == 3
    with pytest.raises(ChildError, match=r"^its process was killed by SIGKILL before it answered$"):
        in_child(lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(ChildError, match=r"^its process ended with exit code 3 before it answered$"):
        in_child(os._exit, 3)
    with pytest.raises(ChildError, match=r"^no answer within 0\.2 s$"):
        in_child(time.sleep, 60, seconds=0.2)


def test_a_launch_takes_the_host_its_time():
    card = Card(100.0, 10.0, 1.0, 0.0, launch_s=0.5)
    log = [mark("step 0"), *[op("compute", flops=10)] * 4, mark("end")]
    assert step_times(log, card) == {"step 0": pytest.approx(4 * 0.5 + 0.1)}


def test_blocks_stand_for_all():
    times = {f"step {number}": float(number) for number in range(8)}
    assert mean_step(times, 4, 10) == pytest.approx((4 + 10 * 5.5 + 7) / 12)


def test_what_is_known_is_not_made_again(monkeypatch):
    monkeypatch.setattr(timeline, "_import_once", lambda: None)
    monkeypatch.setattr(timeline, "in_child", lambda *args, **kwargs: pytest.fail("made again"))
    names, workload = list(timeline.SETTINGS)[:3], "1 x 2048"
    rows = [{"setting": name, "workload": workload} for name in names]
    assert model_all("llama2_7b", names, [workload], known=rows[::-1]) == rows
    full = [{"codec": "none", "clipping": way, "card": card, "from": None, "hidden": 8192,
             "factors": {4096: 1.2, 16384: 1.0}, "bare": {4096: 1.0, 16384: 4.0},
             "why": {4096: "waits for nothing", 16384: ""}}
            for way in (UNCLIPPED, *CLIPPED) for card in CARDS]  # fmt: skip
    assert model_in_backward("llama2_7b", ["none"], pytest.fail, full[::-1]) == full
    text = in_backward_table(full, "llama2_7b")
    cells = "1.20 of 1.00 s | **1.00** of 4.00 s | 8,192 | more than 1,048,576"
    assert f"| A6000 | none | 12 | speculative | {cells} |" in text
    assert "- A6000, codec none, clipping exact, 4,096 tokens, 1.20: waits for nothing" in text
    assert "16,384 tokens, 1.00" not in text


MODELLED = ROOT / "benchmarks" / "results" / "timeline_in_backward.md"
# Of the modelled tokens, what the arithmetic may say. It knows products and updates alone: what else a card computes
# (norms, rotations, attention; above all packing and unpacking, with a codec) hides transfers too, so that it asks for
# more tokens, and never for fewer.
AGREES = (0.95, 1.4)


def modelled_tokens():
    """From how many tokens a step on the link hides, by card, codec and way of clipping, as the page has it. Where
    it does not say so: from how many on it is within the goal, which without a codec is the same."""
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in MODELLED.read_text().splitlines()]
    head = next(row for row in rows if row[0] == "card")
    tokens = head.index("the link hides from, tokens" if "the link hides from, tokens" in head else head[-1])
    return {(row[0], row[1], row[3]): int(row[tokens].replace(",", "")) for row in rows if row[0] in CARDS}


def test_the_arithmetic_agrees_with_the_modelled_steps():
    """Of every card and form of the states: the arithmetic of estimates, and of "auto" at the start of a run."""
    modelled = {key: tokens for key, tokens in modelled_tokens().items() if key[-1] in (UNCLIPPED, "exact")}
    assert {(card, "none", way) for card in CARDS for way in (UNCLIPPED, "exact")} <= modelled.keys()
    for (card, codec, way), tokens in modelled.items():
        said = tokens_that_hide(costs_of(card, codec, SLOTS, is_clipped=way == "exact"), PARTS)
        most = AGREES[1] if codec == "none" else math.inf
        assert AGREES[0] <= said / tokens <= most, (card, codec, way)


def test_an_estimate_says_these_tokens():
    """By the speeds that it assumes; a run says them by those that it measures."""
    hift = {"update": "in_backward", "group_size": "auto", "tokens_per_step": 4096, "state": {"slots": SLOTS}}
    _, line = settle_layers(Setting("llama2_7b", {"hift": hift}), 1)
    costs = BackwardCosts.assumed(2, max(PARTS), StateConfig(slots=SLOTS), masters=True, ranks=1, parked_bytes=None)
    assert f"; all layers from {tokens_that_hide(costs, PARTS):,} tokens a step on" in line


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
