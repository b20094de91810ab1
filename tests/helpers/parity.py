"""One training run twice: by a plain Trainer, and by its HiFT form with one group of all weights, which must be full
fine-tuning. What both leave behind is compared: losses, norms, rates, weights, and the global random generators."""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from hift_ds import HiFTMixin
from hift_ds.engine.zero3.shards import is_partitioned, whole_of
from tests.helpers.trainer import AUTO, QUIET, ragged_dataset

ONE_GROUP: dict[str, Any] = {**AUTO, "hift": {"groups": [["."]], "lr_update": "step"}}
COMPARED = ("loss", "grad_norm", "learning_rate", "eval_loss")


@dataclass
class Run:
    trainer: Any
    logs: list[dict[str, float]]
    weights: dict[str, torch.Tensor]
    drawn: list[float] = field(default_factory=list)  # the next number of each global generator


def run(
    folder: Path,
    cls: type[Trainer],
    make_model: Callable[[], Any],
    *,
    hift: bool,
    ds: dict[str, Any] | None = None,
    args_cls: type[TrainingArguments] = TrainingArguments,
    data: Any = None,
    resume: int | None = None,
    stop_at: int | None = None,
    trainer: dict[str, Any] | None = None,
    **options: Any,
) -> Run:
    """Train once. ``resume``: go on from ``checkpoint-N`` of ``folder``. ``stop_at``: steps after which the run ends,
    as if it had been killed."""
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # set by an earlier run's arguments
    unset_hf_deepspeed_config()  # as long as those live, a plain model would be made in shards too
    args = args_cls(
        str(folder / ("hift" if hift else "plain")),
        deepspeed=copy.deepcopy(ds or ONE_GROUP) if hift else None,
        **{**QUIET, "max_steps": 4, "learning_rate": 1e-2, **options},
    )
    chosen = type("HiFT" + cls.__name__, (HiFTMixin, cls), {}) if hift else cls
    given = {"train_dataset": ragged_dataset(18) if data is None else data, **(trainer or {})}
    made = chosen(model=make_model(), args=args, **given)
    if stop_at is not None:
        made.add_callback(_StopAt(stop_at))
    made.train(resume_from_checkpoint=None if resume is None else f"{args.output_dir}/checkpoint-{resume}")
    return Run(
        made,
        [{key: e[key] for key in COMPARED if key in e} for e in made.state.log_history if "train_loss" not in e],
        weights_of(made.model),
        [random.random(), float(numpy.random.rand()), torch.rand(()).item()],
    )


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    """Of a model whose weights may be in shards: whole ones. Collective there."""
    found = {name: value.detach().clone() for name, value in model.state_dict().items()}
    parts = {n: p for n, p in model.named_parameters(remove_duplicate=False) if is_partitioned(p)}
    return found | {name: whole_of(param).clone() for name, param in parts.items()}


def compare(folder: Path, cls: type[Trainer], make_model: Callable[[], Any], **options: Any) -> tuple[Run, Run]:
    """Both runs of the same options, compared. ``ds``, ``only_hift`` and ``only_plain`` differ.

    Not to the last bit: torch's optimizers step several tensors at once where ours step pieces of them.
    """
    only = {True: options.pop("only_hift", {}), False: options.pop("only_plain", {})}
    ds, atol = options.pop("ds", None), options.pop("atol", 2e-6)
    plain = run(folder, cls, make_model, hift=False, **{**options, **only[False]})
    ours = run(folder, cls, make_model, hift=True, ds=ds, **{**options, **only[True]})
    same(ours, plain, atol)
    return ours, plain


def same(ours: Run, plain: Run, atol: float = 2e-6) -> None:
    """``atol`` is 5e-5 of what four steps at a rate of 1e-2 can move a weight."""
    assert len(ours.logs) == len(plain.logs) and ours.weights.keys() == plain.weights.keys()
    for step, (a, b) in enumerate(zip(ours.logs, plain.logs, strict=True)):
        assert a == pytest.approx(b, rel=2e-4, abs=2e-6), f"log {step}"
    for name, value in plain.weights.items():
        torch.testing.assert_close(
            ours.weights[name], value, atol=atol, rtol=0, msg=lambda m, name=name: f"{name}: {m}"
        )
    assert ours.drawn == plain.drawn, "the global generators are elsewhere"


class _StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = control.should_training_stop or state.global_step >= self.step
