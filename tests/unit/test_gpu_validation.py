"""The checks for a GPU, as far as they run without one: what a renter types must not be run there for the first
time."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.helpers.race_rows import ROOT


def run(tmp_path, *checks):
    """Results by name."""
    command = [
        sys.executable,
        "benchmarks/gpu/validate.py",
        *checks,
        "--device",
        "cpu",
        "--tiny",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    table = (tmp_path / "results.md").read_text()
    assert all(f"## {name}: PASS" in table for name in checks) and "says nothing about speed" in table
    return {line["name"]: line for line in lines}


def test_link_and_races(tmp_path):
    found = run(tmp_path, "link", "races")
    assert all(row["same bits"] for row in found["races"]["rows"]) and len(found["races"]["rows"]) > 20
    assert all(row["in_gb_s"] > 0 for row in found["link"]["rows"])


def test_a_failed_check_is_told_and_costs_the_others_nothing(tmp_path):
    code = (
        "import sys; sys.argv = ['validate.py', 'memory', 'link', '--device', 'cpu', '--tiny', '--out', sys.argv[1]];"
        "from benchmarks.gpu import validate; validate.CHECKS['memory'] = lambda asked: 1 / 0; "
        "sys.exit(validate.main())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "FAIL memory" in done.stderr and "PASS link" in done.stderr
    assert "ZeroDivisionError" in (tmp_path / "results.md").read_text()


@pytest.mark.slow
def test_the_others(tmp_path):
    found = run(tmp_path, "overlap", "memory", "resume", "two_ranks")
    assert all(line["rows"] for line in found.values())
