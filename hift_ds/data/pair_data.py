"""Source and target texts, for an encoder with a decoder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hift_ds.data import scores
from hift_ds.data.encoding import without_affixes
from hift_ds.data.packing import IGNORED
from hift_ds.data.prepare import PreparedData
from hift_ds.data.rows import code_stamp
from hift_ds.data.task_data import Preparation, arrays_of, right_padded, tokenised

if TYPE_CHECKING:
    from transformers import EvalPrediction, PreTrainedTokenizerBase


def pair_data(how: Preparation, format: str) -> PreparedData:
    """Source and target texts of an encoder with a decoder."""
    train, evaluated, notes = how.examples(format)
    tokenize = TokenizePairs(right_padded(how), how.max_length, how.config.truncation, code_stamp())
    parts, reports = tokenised(how, (train, evaluated), tokenize, notes)
    from transformers import DataCollatorForSeq2Seq

    tokenizer = right_padded(how)
    return PreparedData(
        parts[0], parts[1], DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED), "none", reports,
        score=TextScores(tokenizer),
    )  # fmt: skip


@dataclass(frozen=True)
class TokenizePairs:
    """Examples with ``source`` and ``target`` -> ``input_ids`` and ``labels``; a function for ``map``."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    truncation: str
    stamp: str

    def __call__(self, row: dict[str, str]) -> dict[str, Any]:
        example = json.loads(row["example"])
        source, target = (without_affixes(self.tokenizer, example[name]) for name in ("source", "target"))
        sides = [{"text": source}, {"text_target": target}]
        whole = [self.tokenizer(**side)["input_ids"] for side in sides]
        end = self.tokenizer.eos_token_id
        is_open = end is not None and whole[1][-1:] != [end]  # then the end token is ours to put, to learn to stop
        too_long = [max(len(ids) - self.max_length, 0) for ids in whole]
        cut = sum(too_long) + (is_open and len(whole[1]) >= self.max_length)
        if any(too_long):
            whole = [self.tokenizer(**side, truncation=True, max_length=self.max_length)["input_ids"] for side in sides]
        if is_open and not too_long[1] and len(whole[1]) < self.max_length:
            whole[1] = [*whole[1], end]
        return {
            "input_ids": whole[0], "attention_mask": [1] * len(whole[0]), "labels": whole[1], "cut": cut,
            "dropped": bool(cut) and self.truncation == "drop",
        }  # fmt: skip


@dataclass(frozen=True)
class TextScores:
    """Generated texts -> scores against their references, for a Trainer's ``compute_metrics``."""

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        given, references = arrays_of(prediction)
        pad = self.tokenizer.pad_token_id
        texts = [
            self.tokenizer.batch_decode(np.where(ids < 0, pad, ids), skip_special_tokens=True)
            for ids in (given, references)
        ]
        return scores.text_scores(*texts)
