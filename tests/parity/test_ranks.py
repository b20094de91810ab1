"""Two ranks, and three, which divide no number of rows: HiFTTrainer with one group of all weights against the plain
Trainer over DistributedDataParallel."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import Trainer

import model_zoo
from tests.helpers.distributed import run_distributed
from tests.helpers.parity import ONE_GROUP, compare, run, same
from tests.helpers.trainer import ragged_dataset
from tests.parity.test_trainer import dropout

pytestmark = pytest.mark.distributed

PARTITIONED = {**ONE_GROUP, "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}

CASES = {
    "tokens of all ranks": {"gradient_accumulation_steps": 3, "max_grad_norm": 0.1},
    "tokens of each rank": {"gradient_accumulation_steps": 3, "average_tokens_across_devices": False},
    "smoothed, evaluated, best model": {
        "label_smoothing_factor": 0.1, "learning_rate": 0.5, "optim": "sgd", "lr_scheduler_type": "constant",
        "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2,
        "load_best_model_at_end": True, "metric_for_best_model": "loss",
        "trainer": {"eval_dataset": ragged_dataset(6, seed=9)},
    },
    "length groups": {"train_sampling_strategy": "group_by_length", "per_device_train_batch_size": 1},
}  # fmt: skip


def on_a_rank(folder: str) -> None:
    for name, options in CASES.items():
        options = {"data": ragged_dataset(22), "max_steps": 6, **options}
        try:
            compare(
                Path(folder) / name.replace(" ", "_"),
                Trainer,
                lambda: model_zoo.tiny.build("llama"),
                **options,
            )
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
    goes_on_in_the_middle_of_an_epoch(Path(folder) / "going_on")


def goes_on_in_the_middle_of_an_epoch(folder: Path) -> None:
    """Stopped after 4 of an epoch's 5 steps, it ends as the plain run that never stopped, an epoch later."""
    options = {"max_steps": 7, "save_strategy": "steps", "save_steps": 4, "data": ragged_dataset(20)}
    whole = run(folder / "whole", Trainer, dropout, hift=False, **options)
    for name, ds in {"replicated": ONE_GROUP, "in shards": PARTITIONED}.items():
        run(folder / name, Trainer, dropout, hift=True, ds=ds, stop_at=4, **options)
        again = run(folder / name, Trainer, dropout, hift=True, ds=ds, resume=4, **options)
        try:
            same(again, whole)
        except AssertionError as error:
            raise AssertionError(f"going on, weights {name}: {error}") from error


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks(tmp_path, world_size):
    run_distributed(on_a_rank, world_size, str(tmp_path))
