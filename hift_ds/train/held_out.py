"""The held-out loss of a finished model, counted as a run counts its own (:mod:`hift_ds.train.evaluate`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hift_ds.data.config import DataConfig
from hift_ds.data.packing import collator
from hift_ds.data.prepare import prepare_eval
from hift_ds.errors import ConfigError
from hift_ds.hf.model_folder import max_sequence_length
from hift_ds.train.evaluate import sums_per_row
from hift_ds.train.settings import length_or_default
from hift_ds.train.tasks import TASKS
from hift_ds.train.trained_model import TrainedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class HeldOut:
    """The result over all rows: the mean negative log-likelihood of a learned token in nats, and of how many tokens."""

    loss: float
    tokens: int
    samples: int

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return math.exp(min(self.loss, 700.0))


def data_to_evaluate(trained: TrainedModel, data: str | None) -> DataConfig:
    """The run's own held-out rows, or those of ``data`` read as the run reads its data.

    Raises:
        ConfigError: a model folder alone, and no ``data``; or the run learned something else than to go on with texts.
    """
    if trained.run is None:
        if data is None:
            raise ConfigError(
                f"{trained.folder} is a model and not a run, which would say what was held out; give --data FILE"
            )
        return DataConfig(train=data, eval=data)
    task = trained.run.task
    if not TASKS[task].is_language_modelling:
        raise ConfigError(
            f"task: {task}; the held-out loss of a token is of sft and text; all_results.json has this one's measures"
        )
    if data is None:
        return trained.run.data_of_task
    return DataConfig(**{**trained.run.data_of_task.model_dump(), "train": data, "eval": data, "val_size": 0.0})


@torch.no_grad()
def held_out_loss(
    trained: TrainedModel, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: DataConfig,
    batch_size: int, progress: Callable[[int, int], None] = lambda done, total: None,
) -> HeldOut:  # fmt: skip
    """The loss over every row once, ``batch_size`` rows at a time; no more logits than one batch's are held.

    Args:
        progress: told how many rows of how many are done.

    Raises:
        ConfigError: ``data`` cannot be read with this tokenizer and model.
        DataError: data is missing or malformed, or nothing is held out.
    """
    if model.config.is_encoder_decoder:
        raise ConfigError(
            f"{trained.folder}: reads and writes apart ({type(model).__name__}); expected a causal language model"
        )
    wanted = length_or_default(data.max_length, max_sequence_length(model.config.to_dict()))
    rows, _ = prepare_eval(data, tokenizer, wanted, model.get_input_embeddings().num_embeddings)
    # The longest first, so that what does not fit in memory is known at once; the sum has no order.
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]["input_ids"]))
    collate = collator(tokenizer, packing=False)
    total, tokens = 0.0, 0
    for begin in range(0, len(order), batch_size):
        batch = collate([rows[index] for index in order[begin : begin + batch_size]]).to(model.device)
        labels = batch.pop("labels")
        sums = sums_per_row(model(**batch, use_cache=False).logits, labels).sum(dim=0)
        total, tokens = total + float(sums[0]), tokens + int(sums[1])
        progress(min(begin + batch_size, len(order)), len(order))
    return HeldOut(total / max(tokens, 1), tokens, len(rows))
