"""Declarations of model families: tiny shapes for first runs and tests, published sizes for estimates.

>>> import model_zoo
>>> model_zoo.config("llama2_7b").hidden_size
4096
>>> model_zoo.tiny.build("llama")        # about ten thousand random parameters, on the CPU

Importing the zoo loads neither torch nor transformers; asking it for a config or a model does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hift_ds.errors import unknown_key

from .families import FAMILIES, HEADS, SIZES, Family

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["FAMILIES", "HEADS", "SIZES", "Family", "config", "tiny"]


def config(size: str, head: str | None = None, **overrides: Any) -> PretrainedConfig:
    """The transformers config of a published size, ``architectures`` naming the model class with its head.

    Args:
        size: a key of :data:`SIZES`, such as ``"llama2_7b"``.
        head: one of the family's heads; its pretraining head if not given.
        overrides: config entries to change, such as ``num_hidden_layers=2``.

    Raises:
        ConfigError: there is no such size, or the family has no such head.
    """
    if size not in SIZES:
        raise unknown_key(size, SIZES, "model zoo")
    from .heads import config_for

    family = SIZES[size]
    return config_for(family, head or family.heads[0], {**family.sizes[size], **overrides})


def __getattr__(name: str) -> Any:  # `model_zoo.tiny` without importing torch for those who only read sizes
    if name == "tiny":
        return importlib.import_module(".tiny", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
