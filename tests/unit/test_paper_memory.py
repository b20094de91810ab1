"""benchmarks/paper_memory.py: the accounting on made-up steps, and (slow) the quick page against the paper's table."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import paper_counts as paper
from benchmarks import paper_memory
from hift_ds.forecast.setting import GroupStep

ROOT = Path(__file__).resolve().parents[2]


class Made:
    """Steps of a model with two groups of 10 and 30 parameters."""

    def __init__(self, *steps: GroupStep) -> None:
        self._steps = steps

    def known(self):
        return range(len(self._steps))

    def step(self, index):
        return self._steps[index]


def step(index: int, states: int, forward: int, update: int) -> GroupStep:
    sums = {"weights": 80, "gradients": 0, "states": 0, "activations": 0, "temporaries": 0}
    places = {
        "forward:head": {**sums, "activations": forward},
        "backward:head": {**sums, "gradients": 20, "activations": forward - 30},
        "update:": {**sums, "gradients": 20, "states": states, "temporaries": update},
    }
    return GroupStep(index, f"g{index}", 10, places, {}, states, 0)


def test_hift_mixed_adds_the_masters_at_rest():
    """Masters: 160 bytes in all, 40 and 120 in the groups. In an update the group's own are there already."""
    sgd = Made(step(0, 40, 300, 5), step(1, 120, 200, 5))
    counted = paper.Counted(None, None)
    counted.steps = {
        paper.Cell("HiFT", paper.MIXED_HI, "SGD"): sgd,
        paper.Cell("FPFT", paper.MIXED_HI, "SGD"): Made(step(0, 160, 0, 0)),
    }
    assert paper.peak_with_all_masters(counted, sgd) == 80 + 300 + 160  # a forward
    update = Made(step(0, 40, 30, 1000), step(1, 120, 30, 900))
    assert paper.peak_with_all_masters(counted, update) == 80 + 20 + 40 + 1000 + (160 - 40)


def test_residual_is_what_is_neither_weight_gradient_nor_state():
    assert paper.residual(step(0, 40, 300, 5000)) == 300


@pytest.mark.parametrize("argv", [["--quick"], ["--quick", "--plot", "x.png"]])
def test_quick_does_not_replace_the_page(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        paper_memory.parse(argv)
    assert stopped.value.code == 2 and "--out" in capsys.readouterr().err


@pytest.mark.slow
def test_quick_page_agrees_with_the_paper(tmp_path):
    """Within a millionth in Para, Gra and Sta, and to the digit in the GB column."""
    out = tmp_path / "page.md"
    command = [sys.executable, "benchmarks/paper_memory.py", "--quick", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert out.with_suffix(".png").stat().st_size > 10_000
    rows = [line for line in out.read_text().splitlines() if line.startswith("| ") and line.count(" / ") == 4]
    assert len(rows) == len(paper.QUICK_OPTIMIZERS) * len(paper.ROWS)
    for line in rows:
        pairs = [tuple(map(float, cell.split(" / "))) for cell in line.strip("| ").split(" | ") if " / " in cell]
        for ours, theirs in pairs[:3]:
            assert ours == pytest.approx(theirs, rel=1.1e-6), line
        assert pairs[3][0] == pairs[3][1], line
    assert "differ by 0.00% at most" in out.read_text() and "SGD: off by 0.00% at most" in out.read_text()
