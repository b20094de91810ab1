"""The checks for a GPU, as far as they run without one: what a renter types must not be run there for the first
time."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from benchmarks.gpu import races, validate
from benchmarks.gpu.checks import Asked
from tests.helpers.race_rows import ROOT


def run(tmp_path, *checks):
    """Results by name."""
    command = [sys.executable, "benchmarks/gpu/validate.py", *checks, "--device", "cpu", "--tiny", "--out", tmp_path]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    table = (tmp_path / "results.md").read_text()
    assert all(f"## {name}: PASS" in table for name in checks) and "says nothing about speed" in table
    return {line["name"]: line for line in lines}


def test_link_and_races_and_the_suite_of_the_gpu(tmp_path):
    found = run(tmp_path, "link", "races", "gpu_tests", "demo")
    races = found["races"]["rows"]
    assert all(row["same bits"] for row in races) and len(races) > 20
    assert {row["residency"] for row in races} == {"host", "disk", "host, weights too"}
    assert all(row["in_gb_s"] > 0 for row in found["link"]["rows"] if "in_gb_s" in row)
    assert any(row.get("disk read, O_DIRECT, page-locked, gb_s", 0) > 0 for row in found["link"]["rows"])
    assert "skipped" in found["gpu_tests"]["rows"][0]["pytest"] and found["demo"]["notes"]


@pytest.mark.parametrize(("delay", "least"), [("none", 0), ("updates", 9), ("writes", 9), ("copies", 17)])
def test_what_is_said_to_be_held_back_is(delay, least, monkeypatch):
    """Each of nine updates, of their writes of weights, and of the copies of states in and out, which a thread makes
    here. ("gathers": a CPU copies no shard.)"""
    slept = []
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append, raising=False)
    monkeypatch.setattr(races.time, "sleep", slept.append)
    races.trajectory(Asked("cpu", True, None, None), 16, 9, {"slots": 2}, delay)
    assert len(slept) >= least and bool(slept) is bool(least)


def test_the_suite_is_asked_who_of_it_is_on_the_gpu(monkeypatch):
    """Not this process, which a container numbers otherwise, nor what was there before."""
    answers = iter([{"17"}, {"17"}])
    monkeypatch.setattr(validate, "_processes_on_gpu", lambda: next(answers, {"17", "99"}))
    monkeypatch.setattr(validate, "LOOKS_EVERY_S", 0.02)
    found = validate.suite(Asked("cuda", True, None, None))
    assert found.failures == ["processes ['99'] were on the GPU"] and "passed" in found.rows[0]["pytest"]


def test_a_failed_check_is_told_and_costs_the_others_nothing(tmp_path):
    code = (
        "import sys; sys.argv = ['validate.py', 'memory', 'link', '--device', 'cpu', '--tiny', '--out', sys.argv[1]];"
        "from benchmarks.gpu import validate; validate.CHECKS['memory'] = lambda asked: 1 / 0; "
        "sys.exit(validate.main())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "FAIL memory" in done.stderr and "PASS link" in done.stderr
    assert "ZeroDivisionError" in (tmp_path / "results.md").read_text()
    run(tmp_path, "link")  # the page's commands make one table; a check that is run again takes the place of the first
    lines, table = (tmp_path / "results.jsonl").read_text().splitlines(), (tmp_path / "results.md").read_text()
    assert len(lines) == 3 and table.count("## link: PASS") == table.count("## memory: FAIL") == 1
    (tmp_path / "results.jsonl").write_text(lines[0].replace("a CPU", "another machine") + "\n")
    run(tmp_path, "link")
    assert "## memory" not in (tmp_path / "results.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "checks", [("overlap", "memory", "resume"), ("two_ranks", "suite"), ("run", "lost_rank"), ("peers",)]
)
def test_the_others(tmp_path, checks):
    found = run(tmp_path, *checks)
    assert all(line["rows"] for line in found.values())
    if "lost_rank" in found:
        assert "last good checkpoint" in found["lost_rank"]["rows"][0]["it said"]
    if "peers" in found:
        assert {"hift_ds, states on the host", "full fine-tuning", "ZeRO-Offload"} <= {
            row["method"] for row in found["peers"]["rows"]
        }
