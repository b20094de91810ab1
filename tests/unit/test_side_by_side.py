"""The benchmarks of step times beside a bare loop, and of growth, on a tiny shape; and what their pages say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import growth, side_by_side, side_by_side_page, side_by_side_rows

ROOT = Path(__file__).resolve().parents[2]
OURS = "ours, 1 layer, bf16, fp32 masters, device, after backward"


def script(name, *arguments):
    command = [sys.executable, str(ROOT / "benchmarks" / name), *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, text=True, capture_output=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_row_beside_its_limit(tmp_path):
    out = tmp_path / "page.md"
    options = ("--shape", "tiny", "--quick", "--only", OURS, "--path", tmp_path, "--out", out)
    script("side_by_side.py", "steps", "memory", "table", *options)
    timed = {line["row"]: line for line in lines_of(out.with_suffix(".jsonl")) if line["stage"] == "steps"}
    limit = timed["bare loop, 1 layer, bf16, fp32 masters"]
    (ratio,) = timed[OURS]["of_limit"]
    assert ratio == pytest.approx(timed[OURS]["seconds"][0] / limit["seconds"][0])
    (held,) = [line["peak_bytes"] for line in lines_of(out.with_suffix(".jsonl")) if line["stage"] == "memory"]
    assert 0 < held < 1 << 30
    assert f"| {OURS} | " in out.read_text() and f"{OURS}: {ratio:.3f}" in out.read_text()


def test_peaks_of_peers_are_counted_with_their_states(tmp_path):
    out = tmp_path / "page.md"
    zero = "DeepSpeed ZeRO-2"
    script(
        "side_by_side.py", "counted", "--shape", "135m", "--only", zero, "--only", side_by_side_rows.FULL, "--out", out
    )
    peaks = {line["row"]: line["peak_bytes"] for line in lines_of(out.with_suffix(".jsonl"))}
    numel = side_by_side_rows.numels("135m")[0]
    # bf16 weights, fp32 masters, two moments, and gradients: all in fp32, while bf16 ones are given back one by one
    assert peaks[side_by_side_rows.FULL] == pytest.approx(18 * numel, rel=0.01)
    assert 20 * numel < peaks[zero] < 25 * numel  # the same, bf16 gradients and buckets beside


def test_growth(tmp_path):
    out = tmp_path / "growth.md"
    script("growth.py", "sizes", "table", "--base", "tiny", "--sizes", "tiny", "--path", tmp_path, "--out", out)
    host, disk = lines_of(out.with_suffix(".jsonl"))
    assert host["groups"] == 6 and host["case"]["residency"] == "host"
    assert disk["checkpoint_bytes"] >= 14 * disk["numel"]  # bf16 weight, fp32 master and two moments
    assert (tmp_path / "growth_parameters.png").stat().st_size > 10_000


def steps(row, seconds, **more):
    where = {"machine": "m", "cores": 2, "threads": "1", "load": 0.0, "versions": {"torch": "2"}}
    return {
        "stage": "steps", "shape": "tiny", "quick": False, "row": row, "seconds": [seconds], "batch": "1 x 16",
        "where": where, "date": "d", "company": 3, **more,
    }  # fmt: skip


def test_goals_fail_and_pass_by_the_numbers(tmp_path):
    file = tmp_path / "page.jsonl"
    lean, zero = "ours, 1 layer, least memory", "DeepSpeed ZeRO-0"
    rows = [
        steps(OURS, 1.2, of_limit=[1.06, 1.0, 1.2]),
        steps("BAdam, 1 layer", 1.0, of_limit=[1.3, 1.3, 1.3]),  # timed at another hour: the ratios to the limit count
        {**steps(zero, 1.0), "stage": "memory", "peak_bytes": 2 << 30},
        {**steps(lean, 1.0), "stage": "memory", "peak_bytes": 1 << 30},
        {**steps("LOMO", 1.0), "stage": "memory", "peak_bytes": 1 << 20},  # no Adam: no contestant
        steps("ours, 1 layer, fp32, device, after backward", 0.7),
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"stage": "st')  # cut short by a kill
    lines = side_by_side_rows.Lines(file, "tiny", quick=False)
    theirs = [{"shape": "tiny", "group_size": size, "seconds": took} for size, took in (("all", 2.0), (1, 1.4))]
    text = "\n".join(side_by_side_page.goals("tiny", lines, theirs))
    assert f"- FAIL: {OURS}: 1.060" in text
    assert f"- pass: {1.06 / 1.3:.3f} of BAdam, 1 layer" in text
    assert "- pass: 0.500 of authors' HiFT, 1 layer, fp32, at another hour" in text
    assert f"- pass: {lean}: 1.00 GiB; of the others {zero}: 2.00 GiB" in text


def test_rows_that_do_not_fit_beside_their_limit_are_run_alone():
    rows = [side_by_side_rows.ROWS[name] for name in (OURS, "BAdam, 1 layer")]
    limit = side_by_side_rows.ROWS["bare loop, 1 layer, bf16, fp32 masters"]
    full = side_by_side_rows.ROWS[side_by_side_rows.FULL]
    assert side_by_side.companies(rows, 4.0, lambda row: 1.0) == [[limit, full, *rows]]
    assert side_by_side.companies(rows, 3.0, lambda row: 1.0) == [[limit, full, rows[0]], [limit, full, rows[1]]]
    assert side_by_side.companies(rows, 2.0, lambda row: 1.0) == [[limit, rows[0]], [limit, rows[1]]]
    assert side_by_side.companies(rows, 1.0, lambda row: 1.0) == [[limit], [rows[0]], [rows[1]]]


def test_bytes_a_trained_parameter_tend_to_the_counted_limit():
    run = {"case": {"ranks": 4}, "numel": 1000, "groups": 10, "sent_bytes": 6 * 100 * 3 / 4}
    assert growth.per_trained([run]) == pytest.approx(6.0)
    counted = growth.counted_traffic()
    assert counted["torch DDP"] == 4.0 and counted["DeepSpeed ZeRO-3"] == 12.0
