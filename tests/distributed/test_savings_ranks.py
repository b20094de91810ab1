"""The switches of "activations" on two ranks, whole weights and partitioned ones."""

import pytest

import model_zoo
from hift_ds.activations import chunked_loss
from hift_ds.errors import ConfigError
from tests.helpers.distributed import run_distributed
from tests.helpers.engines import ds_config, make_engine

pytestmark = pytest.mark.distributed

SWITCHES = {"checkpointing": True, "blocks_kept": 1, "chunked_loss": True}
CASES = [(0, "llama"), (3, "llama"), (3, "gpt2")]  # gpt2's head is tied to the embedding


def losses(stage: int, family: str, activations: dict) -> list[float]:
    """Six optimizer steps, each rank on rows of its own."""
    from deepspeed import comm

    rank = comm.get_rank()
    zero = {"stage": stage, "stage3_param_persistence_threshold": 40}
    config = ds_config(rows=4, world_size=2, clip=0.5, hift={"activations": activations}, zero_optimization=zero)
    engine = make_engine(model_zoo.tiny.build(family, attn_implementation="eager"), config)
    try:
        found = []
        for step in range(6):
            loss = engine(**model_zoo.tiny.batch(engine.module, rows=2, tokens=9, seed=2 * step + rank)).loss
            engine.backward(loss)
            engine.step()
            found.append(float(loss.detach()))
        return found
    finally:
        engine.destroy()


def train_both_ways() -> dict:
    """Losses without and with the switches, and whether the loss was really chunked."""
    chunked_loss.MIN_TILE_ROWS, chunked_loss.TILE_NUMEL = 5, 1
    calls, real = [], chunked_loss.LinearCrossEntropy.apply
    chunked_loss.LinearCrossEntropy.apply = lambda *args: (calls.append(1), real(*args))[1]
    found = {}
    for stage, family in CASES:
        plain = losses(stage, family, {})
        assert not calls
        found[stage, family] = plain, losses(stage, family, SWITCHES)
        assert len(calls) == 6
        calls.clear()
    with pytest.raises(ConfigError, match="activations.offload"):
        losses(3, "llama", {"offload": True})
    return found


def test_two_ranks_whole_and_partitioned():
    for found in run_distributed(train_both_ways, 2):
        for case, (plain, saving) in found.items():
            assert saving == pytest.approx(plain, rel=1e-5), case
