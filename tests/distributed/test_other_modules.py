"""ZeRO-3 where ranks do not run the same modules: one line on the ranks that notice, before a weight is gathered
wrongly; and DeepSpeed's ways to have such modules gathered by all."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import deepspeed
import pytest
import torch
from torch import Tensor, nn

from hift_ds.engine.zero3 import same_on_ranks
from hift_ds.errors import ConfigError
from tests.distributed.test_partitioned import KEEP_NOTHING, MoEToy, values
from tests.helpers.distributed import run_distributed
from tests.helpers.engines import ds_config, make_engine, train_step
from tests.helpers.toy import Toy, make_batches

pytestmark = pytest.mark.distributed

STEPS = 12  # two cycles of five groups and more: traces are whole after the first


class Either(nn.Module):
    """Two layers of one shape, of which a rank takes one, or both, or none."""

    def __init__(self, choose: Callable[[int, int], str]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(7, 7), nn.Linear(7, 7)
        self.choose, self.step = choose, 0

    def forward(self, h: Tensor) -> Tensor:
        chosen = self.choose(int(os.environ["RANK"]), self.step)
        self.step += 1
        for name in chosen:
            h = h + self.get_submodule(name)(h)
        return h


def either(choose: Callable[[int, int], str]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = Toy(num_layers=3)
        torch.manual_seed(5)
        model.layers[1] = Either(choose)
        return model

    return make


def train(make_model: Callable[[], nn.Module], zero: dict[str, Any], leaf: type | None = None) -> tuple[Any, Any]:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    config = ds_config(lr=1e-3, world_size=world_size)
    config["zero_optimization"] = zero
    model = make_model()
    if leaf is not None:
        deepspeed.utils.set_z3_leaf_modules(model, [leaf])
    engine, losses = make_engine(model, config), []
    for tokens, targets in make_batches(STEPS):
        tokens = tokens.clone()
        tokens[: len(tokens) // world_size] = 3  # the first rank sees one token, so one expert
        losses.append(train_step(engine, [(tokens, targets)], rank, world_size))
    weights = values(engine)
    engine.destroy()
    return losses, weights


IN_SHARDS = {"stage": 3, **KEEP_NOTHING}
AHEAD = {**IN_SHARDS, "stage3_prefetch_bucket_size": 200}
OTHER_MODULES = {
    "experts": MoEToy,
    "another layer of the same shape": either(lambda rank, step: "ab"[rank]),
    "a layer more": either(lambda rank, step: "" if rank else "a"),
}


def leaf(cls: type) -> dict[str, Any]:
    return {"leaf_module": {"classes": [f"{cls.__module__}.{cls.__qualname__}"]}}


WAYS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], type | None]] = {
    "config, a layer more": (either(lambda rank, step: "" if rank else "a"), {**IN_SHARDS, **leaf(Either)}, None),
    "config, later": (either(lambda rank, step: "ab"[rank and step > 7]), {**AHEAD, **leaf(Either)}, None),
    "by name": (either(lambda rank, step: "ab"[rank]), {**IN_SHARDS, "leaf_module": {"names": ["layers.1"]}}, None),
    "set_z3_leaf_modules": (either(lambda rank, step: "ab"[rank]), IN_SHARDS, Either),
    "threshold": (either(lambda rank, step: "ab"[rank]), {**AHEAD, "stage3_module_granularity_threshold": 100}, None),
    "no leaf, all ranks change": (either(lambda rank, step: "ab"[step > 7]), AHEAD, None),
    "no leaf, all ranks in turn": (either(lambda rank, step: ("ab", "b", "")[step // 5]), AHEAD, None),
}


def on_a_rank() -> list[str]:
    errors = []
    for name, make_model in OTHER_MODULES.items():
        for zero in (IN_SHARDS, AHEAD):
            try:
                train(make_model, zero)
                errors.append(f"{name}: trained")
            except ConfigError as error:
                if "leaf_module" not in str(error) or "layers." not in str(error):
                    errors.append(f"{name}: {error}")
    for name, (make_model, zero, leaf_class) in WAYS.items():
        (losses, weights), (replicated, expected) = train(make_model, zero, leaf_class), train(make_model, {"stage": 0})
        if losses != replicated:
            errors.append(f"{name}: losses {losses}, replicated {replicated}")
        errors += [f"{name}: {key}" for key in weights if not torch.equal(weights[key], expected[key])]
    return [*errors, *leaves_a_whole_trace()]


def leaves_a_whole_trace() -> list[str]:
    """The first rank does; the other one waits for it in a collective until its process has ended."""
    same_on_ranks.OTHERS_HAVE_S = 2.0
    began = time.monotonic()
    try:
        train(either(lambda rank, step: "b" if step > 7 and not rank else "a"), IN_SHARDS)
    except ConfigError as error:
        late = time.monotonic() - began > 30
        return [str(error)] if late or "this one is at layers.1.b" not in str(error) else []
    except RuntimeError as error:
        return [str(error)] if os.environ["RANK"] == "0" else []
    return ["trained with a layer that only one rank ran"]


def test_ranks_that_run_other_modules():
    for rank, errors in enumerate(run_distributed(on_a_rank, 2, timeout_s=150)):
        assert not errors, f"rank {rank}: " + "\n".join(errors)
