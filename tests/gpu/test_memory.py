"""Counted peaks against the accelerator's own. Run with ``make test-gpu``; skipped where there is none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.memory_against_allocator import EMBEDDING, HEAD, LOWEST, M106, case, model_folder
from hift_ds.cli.probe import probe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator"),
]
ALL = {
    "activations": {"checkpointing": True, "chunked_loss": True, "offload": True},
    "state": {"slice_numel": 1 << 21},
}
LARGER = {"batch": 8, "length": 512}  # so that activations, not the context, make the peak

CASES = {
    "fp32 embedding": case("fp32", EMBEDDING, **LARGER),
    "fp32 lowest block, checkpointing": case("fp32", LOWEST, {"activations": {"checkpointing": True}}, **LARGER),
    "bf16 masters, lowest block": case("mixed_hi", LOWEST, **LARGER),
    "bf16 masters, head": case("mixed_hi", HEAD, **LARGER),
    "bf16 masters, all switches": case("mixed_hi", EMBEDDING, ALL, **LARGER),
    "bf16 masters, two micro-batches": case("mixed_hi", LOWEST, micro_batches=2, **LARGER),
    "bf16 without masters": case("bf16", LOWEST, **LARGER),
}


@pytest.mark.parametrize("name", CASES)
def test_predictions_within_5_percent_of_max_memory_allocated(name):
    with model_folder(**M106) as folder:
        found = probe(replace(CASES[name].setting, model=folder), CASES[name].group)
    assert found["device"] == "cuda"
    assert found["predicted_gib"] == pytest.approx(found["measured_gib"], rel=0.05), found
