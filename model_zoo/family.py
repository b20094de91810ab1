"""What a declaration in the zoo says about one model family: plain data, no torch, no transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

HEADS = (
    "causal_lm",
    "masked_lm",
    "seq2seq_lm",
    "sequence_classification",
    "token_classification",
    "question_answering",
)


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        name: the zoo's name, a Python identifier.
        model_type: transformers' name, the ``model_type`` of its ``config.json``.
        heads: which of :data:`HEADS` transformers offers for it; the first is its pretraining head.
        tiny: config entries of a model of about ten thousand parameters with every structural feature of
            the family (three blocks, odd vocabulary, grouped keys and values where the family has them).
        sizes: config entries of published checkpoints by zoo name; what is absent is the default.
    """

    name: str
    model_type: str
    heads: tuple[str, ...]
    tiny: Mapping[str, Any]
    sizes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
