"""Models of about ten thousand random parameters, one per family, for first runs and for tests.

Three blocks (T5: three and two), a vocabulary of 67, no dropout: two runs with one seed agree bit for bit,
and sizes do not divide evenly over two or three ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from hift_ds.errors import unknown_key

from . import FAMILIES, Family
from .heads import config_for, model_class

SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _family(name: str) -> Family:
    if name not in FAMILIES:
        raise unknown_key(name, FAMILIES, "model zoo families")
    return FAMILIES[name]


def config(family: str, head: str | None = None, **overrides: Any) -> PretrainedConfig:
    """The config of the tiny model of ``family``.

    Args:
        family: a key of ``model_zoo.FAMILIES``.
        head: one of the family's heads; its pretraining head if not given.
        overrides: config entries to change.

    Raises:
        ConfigError: no such family, or the family has no such head.
    """
    declared = _family(family)
    entries = {**SPECIAL_TOKENS, **declared.tiny}
    if declared.model_type == "t5":
        entries["decoder_start_token_id"] = SPECIAL_TOKENS["pad_token_id"]
    made = config_for(declared, head or declared.heads[0], {**entries, **overrides})
    for key in list(vars(made)):
        if ("dropout" in key or key.endswith("_pdrop")) and key not in overrides and getattr(made, key) is not None:
            setattr(made, key, 0.0)
    return made


def build(
    family: str,
    head: str | None = None,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    **overrides: Any,
) -> PreTrainedModel:
    """A tiny model with random weights, in training mode; the caller's random state is left as it was.

    Args:
        family: a key of ``model_zoo.FAMILIES``, such as ``"llama"`` or ``"opt_350m_style"``.
        head: one of the family's heads; its pretraining head if not given.
        seed: of the weights.
        dtype: of the weights.
        device: ``"meta"`` makes the structure alone.
        overrides: config entries to change, such as ``tie_word_embeddings=True``.

    Raises:
        ConfigError: no such family, or the family has no such head.
    """
    made = config(family, head, **overrides)
    cls = model_class(_family(family), head or _family(family).heads[0])
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        model = cls(made)
        model.tie_weights()  # transformers 5.0 leaves it out on meta
    return model.to(dtype).train()


def batch(
    model: PreTrainedModel, *, rows: int = 2, tokens: int = 12, seed: int = 0, labels: bool = True
) -> dict[str, Tensor]:
    """Random inputs that ``model(**batch)`` takes, with the labels its head learns from.

    Args:
        model: a model of :func:`build`, or any other transformers text model.
        rows: sequences in the batch.
        tokens: length of every sequence; nothing is padded.
        seed: of the tokens and labels.
        labels: leave them out for a forward without loss.

    Returns:
        ``input_ids`` and ``attention_mask`` int64[rows, tokens], and the labels by the head's own names.
    """
    config = model.config
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    vocab_size = config.get_text_config().vocab_size
    inputs = {"input_ids": draw(3, vocab_size, rows, tokens)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if not labels:
        return inputs
    name = type(model).__name__
    if name.endswith("ForSequenceClassification"):
        if config.is_encoder_decoder:  # T5 reads the last end token of every row
            inputs["input_ids"][:, -1] = config.eos_token_id
        inputs["labels"] = draw(0, config.num_labels, rows)
    elif name.endswith("ForTokenClassification"):
        inputs["labels"] = draw(0, config.num_labels, rows, tokens)
    elif name.endswith("ForQuestionAnswering"):
        inputs["start_positions"] = draw(0, tokens, rows)
        inputs["end_positions"] = draw(0, tokens, rows)
    else:
        inputs["labels"] = inputs["input_ids"].clone()
    return inputs
