"""Small engines for tests: a config from the few things a test wants to vary, and steps over micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import hift_ds
from tests.helpers.toy import loss_of, rows_of_rank


def ds_config(
    *,
    lr: float = 1e-2,
    optimizer: str | None = "AdamW",
    params: dict[str, Any] | None = None,
    gas: int = 1,
    clip: float = 0.0,
    stage: int = 0,
    rows: int = 12,
    world_size: int = 1,
    hift: dict[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": rows // world_size,
        "gradient_accumulation_steps": gas,
        "gradient_clipping": clip,
        "zero_optimization": {"stage": stage},
        "hift": hift or {},
        **more,
    }
    if optimizer:
        config["optimizer"] = {"type": optimizer, "params": {"lr": lr, **(params or {})}}
    return config


def layers_of(width: int, num: int = 4) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    """``num`` equal square layers side by side, and a batch for them."""
    model = nn.Sequential()
    model.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(num))
    model.forward = lambda x, y: sum(layer(x).square().mean() for layer in model.layers)
    x = torch.randn(12, width)
    return model, (x, x)


def config_with_slots(num_layers: int, slots: int) -> dict[str, Any]:
    """One group for each of :func:`layers_of`; with 0 slots there is no prefetch."""
    state = {"prefetch": slots > 0, **({"slots": slots} if slots else {}), "residency": "host"}
    return ds_config(hift={"groups": [[f"layers.{i}."] for i in range(num_layers)], "state": state})


def make_engine(model: nn.Module, config: dict[str, Any], **kwargs: Any):
    return hift_ds.initialize(model=model, config=config, **kwargs)[0]


def train_step(engine, micro_batches: Sequence[Any], rank: int = 0, world_size: int = 1) -> float:
    """One optimizer step; this rank takes its rows of each micro-batch. The mean loss of this rank."""
    total = 0.0
    for batch in micro_batches:
        loss = loss_of(engine, rows_of_rank(batch, rank, world_size))
        engine.backward(loss)
        engine.step()
        total += float(loss.detach()) / len(micro_batches)
    return total


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def largest_difference(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.named_parameters(), b.named_parameters(), strict=True)
    return max((x.detach().float() - y.detach().float()).abs().max().item() for (_, x), (_, y) in pairs)
