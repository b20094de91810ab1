"""The held-out loss as a mean over tokens: the same number for every batch size and any number of ranks.

transformers averages the losses of batches, each weighted by its rows, so that a batch of short answers
counts as much as one of long ones.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import EvalPrediction

from hift_ds.data.packing import IGNORED

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn
    from torch.utils.data import DataLoader
    from transformers.trainer_utils import EvalLoopOutput


@torch.no_grad()
def sums_per_row(
    logits: Tensor | tuple[Tensor, ...],
    labels: Tensor,
) -> Tensor:
    """The losses of each row, one row at a time, since the logits in fp32 are the largest tensor there is.

    Args:
        logits: float[rows, tokens, vocabulary], or a tuple that begins with it.
        labels: int64[rows, tokens], not yet shifted.

    Returns:
        float64[rows, 2]: the summed negative log-likelihood, and the number of learned tokens.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    out = torch.zeros(len(labels), 2, dtype=torch.float64, device=labels.device)
    for row, target in enumerate(labels[:, 1:]):
        learned = target != IGNORED
        if learned.any():
            losses = torch.nn.functional.cross_entropy(
                logits[row, :-1][learned].float(), target[learned], reduction="none"
            )
            out[row, 0], out[row, 1] = losses.double().sum(), learned.sum()
    return out


def token_mean(prediction: EvalPrediction) -> dict[str, float]:
    """Mean loss, perplexity and number of learned tokens of all rows of all ranks."""
    total, tokens = (float(value) for value in prediction.predictions.sum(axis=0))
    loss = total / max(tokens, 1.0)
    return {"token_loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": int(tokens)}


class TokenMeanEvaluation:
    """Mixin for a Trainer of a causal language model: ``eval_loss`` is the mean over learned tokens.

    Logits never leave the step that made them, so evaluation needs no more memory than one batch.

    Args:
        eval_collator: makes one row of each sample, so that what is gathered over ranks can be counted; the
            rows that fill up the last batch are dropped. (In training several samples may share a row.)
    """

    def __init__(
        self, *args: Any, eval_collator: Callable[[list[dict[str, Any]]], dict[str, Tensor]], **kwargs: Any
    ) -> None:
        super().__init__(*args, compute_metrics=token_mean, **kwargs)
        self.eval_collator = eval_collator

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        train_collator, self.data_collator = self.data_collator, self.eval_collator
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.data_collator = train_collator

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss, logits, labels = super().prediction_step(model, inputs, False, ignore_keys)
        return loss, sums_per_row(logits, labels), labels[:, :1]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        output = super().evaluation_loop(*args, **kwargs)
        for key in [key for key in output.metrics if key.endswith("_token_loss")]:
            output.metrics[key.removesuffix("token_loss") + "loss"] = output.metrics.pop(key)
        return output
