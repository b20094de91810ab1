"""The benchmark scripts run, on a model of ten thousand parameters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(script, *arguments):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, arguments)]
    return subprocess.run(command, env=env, text=True, capture_output=True, cwd=ROOT)


def test_the_small_machine(tmp_path):
    out = tmp_path / "page.md"
    done = run(
        "seven_b_on_a_small_box.py",
        "--path",
        tmp_path / "scratch",
        "--model",
        "tiny",
        "--tokens",
        16,
        "--out",
        out,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert out.read_text().count("| layers.1 |") == 2 and "GiB anonymous" in out.read_text()
    assert not list((tmp_path / "scratch").iterdir())


def test_the_small_machine_says_what_it_lacks(tmp_path):
    code = (
        "import sys; sys.argv[0] = ''; from benchmarks import seven_b_on_a_small_box as box;"
        "from hift_ds.store import machine; machine.host_bytes = lambda: machine.HostBytes(1 << 30, 1 << 30);"
        "machine.disk_bytes_free = lambda path: 10**9; sys.exit(box.main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--path", str(tmp_path)], text=True, capture_output=True, cwd=ROOT
    )
    assert done.returncode == 1 and not list(tmp_path.iterdir())
    assert "memory: " in done.stderr and "1.0 GiB available" in done.stderr
    assert "disk: " in done.stderr and "1.0 GB free" in done.stderr


@pytest.mark.slow
def test_ways_of_clipping_in_turn(tmp_path):
    """Each is what it is called: the script itself counts trials and those that were taken back."""
    out = tmp_path / "page.md"
    done = run(
        "in_backward.py", "--path", tmp_path, "--shape", "tiny", "--length", 16, "--rounds", 2, "--steps", 3,
        "--clipping", "--out", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in out.read_text().splitlines() if line.startswith(("| host", "| disk"))]
    assert (
        len(lines) == 8 and sum("| exact |" in line and "| 1.000 (1.00, 1.00) | 1.000 |" in line for line in lines) == 2
    )


def test_counts_go_on_where_they_were_interrupted(tmp_path, monkeypatch):
    from benchmarks import counting
    from hift_ds.forecast.setting import Result, Setting

    settings = [Setting("model", {"hift": {}}, batch=n) for n in range(1, 8)]
    asked: list[int] = []

    def simulate(part, num_processes):
        if len(asked) + len(part) > 5:
            raise KeyboardInterrupt
        asked.extend(setting.batch for setting in part)
        return [Result(setting.batch, 1) for setting in part]

    monkeypatch.setattr(counting, "simulate", simulate)
    rows = tmp_path / "rows.jsonl"
    with pytest.raises(KeyboardInterrupt):
        counting.results(settings, rows=rows)
    assert asked == [1, 2, 3, 4]
    asked.clear()
    found = counting.results([*settings[::-1], settings[2]], rows=rows)  # in any order, each once
    assert asked == [7, 6, 5] and [result.weight_bytes for result in found] == [7, 6, 5, 4, 3, 2, 1, 3]


@pytest.mark.slow
def test_states(tmp_path):
    out = tmp_path / "page.md"
    done = run(
        "states.py",
        "--path",
        tmp_path,
        "--model",
        "tiny",
        "--tokens",
        16,
        "--rounds",
        1,
        "--only",
        "disk",
        "--out",
        out,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert out.read_text().count("\n| disk") == 8
