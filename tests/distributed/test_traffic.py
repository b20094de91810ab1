"""The spy of benchmarks/traffic.py counts what is known without it."""

import pytest

from benchmarks import traffic
from tests.helpers.distributed import run_distributed


def count_two() -> dict[str, float]:
    group = "ours, stage 0 to 2, 1 layer a group"
    return {
        "ddp": traffic._bytes_a_step(None),
        "group": traffic._bytes_a_step(traffic.SETTINGS[group]),
        "zero2": traffic._bytes_a_step({"stage": 2, "group_size": "all"}),
    }


@pytest.mark.distributed
def test_bytes_are_those_of_the_documented_arithmetic():
    """DDP: bf16 gradients by all-reduce, 2 x 2 bytes (N-1)/N. Ours: fp32 gradients by reduce-scatter and bf16 weights
    by all-gather, 6 bytes (N-1)/N of what a step trains: docs/multi_node.md. Beside them a few flags."""
    for found in run_distributed(count_two, 2):
        assert found["ddp"] == pytest.approx(2.0, rel=1e-3)
        assert found["zero2"] == pytest.approx(3.0, rel=1e-3)
        assert found["group"] == pytest.approx(3.0 / 12, rel=1e-3)  # 12 groups, a cycle's mean
