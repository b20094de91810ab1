"""What the benchmarks of memory have in common: the settings that are counted, and the counting, on a fake device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hift_ds.forecast.setting import Setting
from hift_ds.forecast.steps import Request, Steps, read_structure, run_requests

GIB = 1 << 30
FP32, MIXED_HI, AUTOCAST = "fp32", "mixed_hi", "autocast"  # MIXED_HI: bf16 weights, fp32 masters
ADAMW = ("AdamW", {"lr": 1e-5})
_BLOCKS: dict[str, dict[str, Any]] = {
    FP32: {},
    MIXED_HI: {"bf16": {"enabled": True}},
    AUTOCAST: {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
}


def setting(
    model: str,
    precision: str,
    batch: int,
    length: int,
    hift: Mapping[str, Any],
    optimizer: tuple[str, Mapping[str, Any]] = ADAMW,
    deepspeed: Mapping[str, Any] | None = None,
    **more: Any,
) -> Setting:
    """A run to be counted.

    Args:
        model: a size of the zoo, or the folder of a config.
        precision: ``FP32``, ``MIXED_HI`` or ``AUTOCAST``.
        batch, length: sequences of a micro-batch, and the tokens of each.
        hift: the ``"hift"`` block.
        optimizer: its name and arguments.
        deepspeed: other blocks of the DeepSpeed config.
        more: other fields of :class:`Setting`.
    """
    name, params = optimizer
    config = {"optimizer": {"type": name, "params": dict(params)}, **_BLOCKS[precision], **(deepspeed or {})}
    dtype = "bfloat16" if precision == MIXED_HI else "float32"
    return Setting(model, {**config, "hift": dict(hift)}, dtype, batch, length, **more)


def count(settings: Sequence[Setting], num_processes: int = 1, ends_only: bool = True) -> list[Steps]:
    """The steps of every group; with ``ends_only`` of those that can be the worst, the embedding, the lowest block and
    the head."""
    structures = {
        model: read_structure(next(s for s in settings if s.model == model)) for model in {s.model for s in settings}
    }
    return run_requests([Request(s, structures[s.model], ends_only) for s in settings], num_processes)
