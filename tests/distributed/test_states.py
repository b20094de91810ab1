"""Sharded states on two ranks: where they rest changes no bit, and each rank has its own files and random
numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.distributed import run_distributed
from tests.helpers.engines import ds_config, make_engine, train_step
from tests.helpers.toy import Toy, make_batches

CODEC = "split_master+bf16_moments"


def train(rank, world_size, state, **config):
    model = Toy()
    engine = make_engine(
        model, ds_config(world_size=world_size, hift={"state": state}, bf16={"enabled": True}, **config)
    )
    try:
        for batch in make_batches(11):
            train_step(engine, [batch], rank, world_size)
        weights = [engine.optimizer.parameters.whole_weight(p).clone() for p in model.parameters()]
        return weights, engine.optimizer.store.total_bytes()
    finally:
        engine.destroy()


def on_rank(folder):
    import deepspeed.comm as dist

    rank, world_size = dist.get_rank(), dist.get_world_size()
    disk = {"residency": "disk", "path": folder, "slots": 2}
    results = {}
    for name, config in {
        "stage 1": {"stage": 1},
        "stage 3": {"stage": 3},
        "whole tensors": {"optimizer": "Muon"},
    }.items():
        resident, num_bytes = train(rank, world_size, {"residency": "device"}, **config)
        for state in (
            disk,
            {**disk, "slots": 1, "slice_numel": 50},
            {"codec": "split_master"},
            {**disk, "codec": "split_master"},
        ):
            moved, _ = train(rank, world_size, state, **config)
            assert all(torch.equal(a, b) for a, b in zip(moved, resident, strict=True)), (name, state)
        compact, compact_bytes = train(rank, world_size, {**disk, "codec": CODEC}, **config)
        again, _ = train(rank, world_size, {"codec": CODEC}, **config)
        assert all(torch.equal(a, b) for a, b in zip(compact, again, strict=True)), name
        results[name] = (compact, num_bytes, compact_bytes)
    return results


@pytest.mark.distributed
def test_two_ranks(tmp_path):
    first, second = run_distributed(on_rank, 2, str(tmp_path))
    for name, (weights, num_bytes, compact_bytes) in first.items():
        assert all(torch.equal(a, b) for a, b in zip(weights, second[name][0], strict=True)), name
        assert compact_bytes < num_bytes
    assert not list(Path(tmp_path).iterdir())
