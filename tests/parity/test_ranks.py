"""Two ranks: HiFTTrainer with one group of all weights against the plain Trainer over DistributedDataParallel."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import Trainer

import model_zoo
from tests.helpers.distributed import run_distributed
from tests.helpers.parity import compare
from tests.helpers.trainer import ragged_dataset

pytestmark = pytest.mark.distributed

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


def test_two_ranks(tmp_path):
    run_distributed(on_a_rank, 2, str(tmp_path))
