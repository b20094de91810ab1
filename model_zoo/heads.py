"""From a family and the name of a head to the transformers classes that make them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers
from transformers import AutoConfig, PretrainedConfig

from hift_ds.errors import unknown_key

from .families import Family

MODEL_CLASSES = {  # each maps a config class to a model class
    "causal_lm": transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
    "masked_lm": transformers.MODEL_FOR_MASKED_LM_MAPPING,
    "seq2seq_lm": transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    "sequence_classification": transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "token_classification": transformers.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    "question_answering": transformers.MODEL_FOR_QUESTION_ANSWERING_MAPPING,
}


def model_class(family: Family, head: str) -> type[transformers.PreTrainedModel]:
    """The model class of ``family`` with ``head``.

    Raises:
        ConfigError: the family has no such head.
    """
    if head not in family.heads:
        raise unknown_key(head, family.heads, f"heads of {family.name}")
    return MODEL_CLASSES[head][type(AutoConfig.for_model(family.model_type))]


def config_for(family: Family, head: str, entries: Mapping[str, Any]) -> PretrainedConfig:
    """A config of ``family`` with ``entries``, its ``architectures`` naming the class with ``head``."""
    if head == "causal_lm" and family.heads[0] == "masked_lm":
        entries = {"is_decoder": True, **entries}  # an encoder family: attend to the left only
    config = AutoConfig.for_model(family.model_type, **entries)
    config.architectures = [model_class(family, head).__name__]
    return config
