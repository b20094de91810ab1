"""Two ranks, and three, which divide no number of rows: HiFTTrainer with one group of all weights against the plain
Trainer over DistributedDataParallel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer

import model_zoo
from tests.helpers.distributed import run_distributed
from tests.helpers.parity import ONE_GROUP, compare, run, same
from tests.helpers.trainer import VOCAB, ragged_dataset
from tests.parity.test_trainer import dropout

pytestmark = pytest.mark.distributed

# What ranks average is another sum than DistributedDataParallel's, and with ZeRO-3 the vectors of a processor begin
# elsewhere too. The bias of GPT-2's keys has no gradient but such rounding, of which Adam makes steps: 4.3e-6 apart on
# one processor, 2.6e-6 in shards on another.
ROUNDING_OF_RANKS = 1e-5
PARTITIONED = {**ONE_GROUP, "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}


class Normalized(nn.Module):
    """With the statistics of batch norm, a weight without elements, one that no row reaches, and one for some rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.norm, self.head = nn.Embedding(VOCAB, 8), nn.BatchNorm1d(8), nn.Linear(8, VOCAB)
        self.empty, self.unreached, self.sometimes = nn.Parameter(torch.zeros(0, 8)), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, input_ids: Any, labels: Any, attention_mask: Any = None) -> dict[str, Any]:
        hidden = self.norm(self.embed(input_ids).transpose(1, 2)).transpose(1, 2)
        if int(input_ids[0, 0]) % 3 == 0:
            hidden = hidden + self.sometimes(hidden)
        logits = self.head(hidden)
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


class Remembers(nn.Module):
    """With buffers that its forward changes by the rows that it sees and computes with, written to and replaced, and a
    table that each rank has made otherwise."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.head = nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB)
        self.register_buffer("average", torch.zeros(8))
        self.register_buffer("num_tokens", torch.zeros((), dtype=torch.long))
        self.register_buffer("seen", torch.zeros(VOCAB, dtype=torch.bool))
        self.register_buffer("spread", torch.ones(8, 1).expand(8, 2).T)  # its elements do not lie one after the other
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        self.register_buffer("table", torch.full((8,), 1.0 + rank), persistent=False)

    def forward(self, input_ids: Any, labels: Any, attention_mask: Any = None) -> dict[str, Any]:
        hidden = self.embed(input_ids)
        if self.training:
            with torch.no_grad():
                self.average = 0.9 * self.average + 0.1 * hidden.mean((0, 1))
                self.num_tokens += int(input_ids.sum())
                self.seen[input_ids.flatten()] = True
        share = 1 + self.seen.float().mean() + 1e-4 * self.num_tokens
        logits = self.head((hidden - self.average) * self.table * share * self.spread[0])
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def without_labels(*indices: int) -> list[dict[str, Any]]:
    rows = ragged_dataset(22)
    return [{**r, "labels": torch.full_like(r["labels"], -100)} if i in indices else r for i, r in enumerate(rows)]


CASES: dict[str, dict[str, Any]] = {
    # The second rank has nothing to learn in the first step, and no rank in the second.
    "a rank without labels": {"train_sampling_strategy": "sequential", "data": without_labels(2, 3, 4, 5, 6, 7)},
    "tokens of all ranks": {"gradient_accumulation_steps": 3, "max_grad_norm": 0.1},
    "tokens of each rank": {"gradient_accumulation_steps": 3, "average_tokens_across_devices": False},
    "smoothed, evaluated, best model": {
        "label_smoothing_factor": 0.1, "learning_rate": 0.5, "optim": "sgd", "lr_scheduler_type": "constant",
        "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2,
        "load_best_model_at_end": True, "metric_for_best_model": "loss",
        "trainer": {"eval_dataset": ragged_dataset(6, seed=9)},
    },
    "batch norm, evaluated": {
        "make_model": Normalized, "gradient_accumulation_steps": 2, "weight_decay": 0.1,
        "ddp_find_unused_parameters": True, "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2,
        "trainer": {"eval_dataset": ragged_dataset(9, seed=9)},
    },
    "other buffers": {
        "make_model": Remembers, "gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 2,
        "per_device_eval_batch_size": 2, "trainer": {"eval_dataset": ragged_dataset(9, seed=9)},
    },
    "other buffers, in shards": {"make_model": Remembers, "ds": PARTITIONED, "atol": ROUNDING_OF_RANKS},
    "length groups": {"train_sampling_strategy": "group_by_length", "per_device_train_batch_size": 1},
}  # fmt: skip


def on_a_rank(folder: str) -> None:
    for name, options in CASES.items():
        options = {"data": ragged_dataset(22), "max_steps": 6, **options}
        try:
            compare(
                Path(folder) / name.replace(" ", "_"),
                Trainer,
                options.pop("make_model", lambda: model_zoo.tiny.build("llama")),
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
            same(again, whole, atol=ROUNDING_OF_RANKS)
        except AssertionError as error:
            raise AssertionError(f"going on, weights {name}: {error}") from error


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks(tmp_path, world_size):
    run_distributed(on_a_rank, world_size, str(tmp_path))
