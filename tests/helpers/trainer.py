"""Arguments and data for Trainer tests: everything small, deterministic and ragged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

PAD, VOCAB, LENGTH = 0, 67, 12
AUTO: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": 0},
    "bf16": {"enabled": "auto"},
    "hift": {},
}
# TrainingArguments: two rows a step on the CPU, every step logged, nothing written.
QUIET: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 3,
}


def arguments(
    folder: Path,
    ds: dict | str | None = None,
    cls: type[TrainingArguments] = TrainingArguments,
    **options: Any,
) -> TrainingArguments:
    ds = copy.deepcopy(AUTO if ds is None else ds)
    return cls(str(folder), deepspeed=ds, **{**QUIET, "max_steps": 5, **options})


def ragged_dataset(num_rows: int, seed: int = 0, padded: bool = True) -> list[dict[str, Tensor]]:
    """Rows with 1 to LENGTH - 2 label tokens each: a mean of means over rows is not the mean over tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(num_rows):
        length = 3 + (7 * i) % (LENGTH - 2)
        num_labels = 1 + (5 * i) % (length - 1)
        tokens = torch.randint(3, VOCAB, (length,), generator=generator)
        labels = tokens.clone()
        labels[: length - num_labels] = -100
        row = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
        if padded:
            fill = {"input_ids": PAD, "attention_mask": 0, "labels": -100}
            row = {key: torch.nn.functional.pad(v, (0, LENGTH - length), value=fill[key]) for key, v in row.items()}
        rows.append(row)
    return rows
