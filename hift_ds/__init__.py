"""hift_ds: full-parameter fine-tuning of large language models on few GPUs.

HiFT (arXiv 2401.15207) on DeepSpeed: every optimizer step trains one group of layers; the gradients,
fp32 master weights and optimizer state of all other groups are off the accelerator.

Importing this package does no work: DeepSpeed and torch are loaded by the first name that needs them.
"""

from __future__ import annotations

from typing import Any

from hift_ds.version import __version__

_LAZY = {
    "initialize": "hift_ds.engine.initialize",
    "load_partitioned": "hift_ds.engine.zero3.load",
    "HiFTEngine": "hift_ds.engine.engine",
    "HiFTConfig": "hift_ds.config",
    "HiFTTrainer": "hift_ds.integrations.transformers",
    "HiFTMixin": "hift_ds.integrations.transformers",
    "HiFTCallback": "hift_ds.integrations.callback",
    "accelerate": "hift_ds.integrations.loops",
    "LayerGroup": "hift_ds.layers.grouping",
    "partition_model": "hift_ds.layers.grouping",
    "deepspeed_config": "hift_ds.shipped",
    "HiFTError": "hift_ds.errors",
    "ConfigError": "hift_ds.errors",
}

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
