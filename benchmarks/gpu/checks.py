"""What the checks of validate.py have in common: what is asked, what was found, engines, models and their memory."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Found:
    """What one check found. ``rows`` are its table; it passed if ``failures`` is empty."""

    name: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def require(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.failures.append(otherwise)


@dataclass(frozen=True)
class Asked:
    """The command line."""

    device: str
    tiny: bool
    model: str | None
    data: str | None

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"


def config_of(state: dict[str, Any], *, stage: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage},
        "timers": {"throughput": {"enabled": False}},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "hift": {"state": state, **more.pop("hift", {})},
        **more,
    }


def engine_of(model: Any, config: dict[str, Any]) -> Any:
    import hift_ds

    return hift_ds.initialize(model=model.train(), model_parameters=list(model.parameters()), config=config)[0]


def llama(size: str, device: str, **changes: Any) -> Any:
    """Random weights in bf16, on the device."""
    import torch

    import model_zoo

    config = model_zoo.config(size, **changes)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            from transformers import AutoModelForCausalLM

            return AutoModelForCausalLM.from_config(config)
    finally:
        torch.set_default_dtype(torch.float32)


TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 128}  # fmt: skip


def tokens_of(model: Any, batch: int, length: int, device: str, seed: int = 0) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, model.config.vocab_size, (batch, length), generator=generator).to(device)
    return {"input_ids": ids, "labels": ids}


def synchronize(device: str) -> None:
    import torch

    if device != "cpu":
        torch.cuda.synchronize()


def leaves_no_memory(work: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator: engines and models are cycles of references, and the next one needs the device's memory before
    Python would look for them."""

    @functools.wraps(work)
    def wrapped(asked: Asked, *args: Any, **kwargs: Any) -> Any:
        import torch

        try:
            return work(asked, *args, **kwargs)
        finally:
            gc.collect()
            if asked.on_gpu:
                torch.cuda.empty_cache()

    return wrapped


def size_for(device: str) -> str:
    """What is trained without any saving of memory: LLaMA-2-7B takes 33 GiB at 8 x 512 tokens (docs/memory.md)."""
    import torch

    small = device != "cpu" and torch.cuda.get_device_properties(0).total_memory < 40 << 30
    return "tinyllama_1_1b" if small else "llama2_7b"
