"""ZeRO-3 equals the replicated path bit for bit, and holds whole weights no longer than it must.

One process start per world size: every case runs in the same processes.
"""

from __future__ import annotations

import os
import tempfile
import time
import weakref
from collections.abc import Callable
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed import comm as deepspeed_comm
from torch import Tensor, nn

from hift_ds.engine.zero3 import seam as deepspeed_zero3_seam
from hift_ds.engine.zero3.seam import WeightShards
from hift_ds.engine.zero3.shards import whole_of
from model_zoo import tiny
from tests.helpers.distributed import run_distributed
from tests.helpers.engines import ds_config, make_engine, train_step
from tests.helpers.toy import Toy, make_batches

pytestmark = pytest.mark.distributed

KEEP_NOTHING = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}
# Times the parameters a step, on average over a cycle of eight groups or more; full fine-tuning: 2.
MOST_GATHERED = 1.58
DISK = {"device": "nvme", "nvme_path": tempfile.gettempdir()}
STEPS = 11  # two cycles and one step: every group is visited with a recorded trace

# name -> options of ds_config, of the ZeRO block, and of the model
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "DeepSpeed's defaults": ({}, {}, {}),
    "nothing kept, accumulation, clipping": ({"gas": 3, "clip": 0.05}, KEEP_NOTHING, {}),
    "prefetch": ({}, {**KEEP_NOTHING, "stage3_prefetch_bucket_size": 60}, {}),
    "some persistent, tied, top down": (
        {"hift": {"order": "top2down"}}, {**KEEP_NOTHING, "stage3_param_persistence_threshold": 10}, {"tied": True},
    ),
    "random order, slices, always active": (
        {"gas": 2, "clip": 0.05, "hift": {
            "order": "random", "reshuffle": True, "always_active": ["embed"], "state": {"slice_numel": 11}}},
        KEEP_NOTHING, {},
    ),
    "small buckets, groups of two": (
        {"hift": {"group_size": 2, "steps_per_group": 2}}, {**KEEP_NOTHING, "reduce_bucket_size": 16}, {},
    ),
    "Adafactor, whole tensors": ({"optimizer": "Adafactor", "gas": 2}, KEEP_NOTHING, {}),
    "Muon, whole tensors": ({"optimizer": "Muon"}, {}, {}),
    "Adagrad, step on the host": ({"optimizer": "Adagrad", "hift": {"state": {"step_on": "host"}}}, {}, {}),
    "bf16": ({"bf16": {"enabled": True}, "gas": 2}, KEEP_NOTHING, {}),
    "bf16, Muon": ({"bf16": {"enabled": True}, "optimizer": "Muon"}, {}, {}),
    "bf16, no masters": (
        {"bf16": {"enabled": True}, "hift": {"master_weights": False, "stochastic_rounding": True}}, {}, {},
    ),
    "fp16 with overflows": ({"fp16": {"enabled": True, "initial_scale_power": 20, "hysteresis": 1}}, KEEP_NOTHING, {}),
    "weights on the host": ({"clip": 0.05}, {**KEEP_NOTHING, "offload_param": {"device": "cpu"}}, {}),
    "weights on disk": ({"gas": 2, "clip": 0.05}, {**KEEP_NOTHING, "offload_param": DISK}, {}),
    "weights on disk, prefetch, some persistent, bf16, tied": (
        {"bf16": {"enabled": True}},
        {
            **KEEP_NOTHING, "offload_param": DISK,
            "stage3_prefetch_bucket_size": 60, "stage3_param_persistence_threshold": 10,
        },
        {"tied": True},
    ),
    "weights on disk, Muon": ({"optimizer": "Muon"}, {"offload_param": DISK}, {}),
    "checkpointing": ({"hift": {"activations": {"checkpointing": True}}}, KEEP_NOTHING, {}),
    "bf16 weights on the host, Adafactor": (
        {"bf16": {"enabled": True}, "optimizer": "Adafactor"}, {"offload_param": {"device": "cpu"}}, {},
    ),
}  # fmt: skip
FEWER_CASES = (  # on one and three ranks
    "DeepSpeed's defaults", "nothing kept, accumulation, clipping", "some persistent, tied, top down", "bf16, Muon",
    "weights on the host", "weights on disk",
)  # fmt: skip
# Name -> family, ZeRO block, "hift" block.
HF_CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", KEEP_NOTHING, {}),
    "llama, recomputed, chunked loss": ("llama", {}, {"activations": {"checkpointing": True, "chunked_loss": True}}),
    "llama, recomputed, nothing kept, on disk": (
        "llama",
        {**KEEP_NOTHING, "offload_param": DISK},
        {"activations": {"checkpointing": True, "chunked_loss": True}},
    ),
    "gpt2": ("gpt2", {"stage3_param_persistence_threshold": 50}, {}),  # ties its head to its embedding
    "mixtral": ("mixtral", KEEP_NOTHING, {}),
}  # fmt: skip


def values(engine: Any) -> dict[str, Tensor]:
    """Whole weights by name, whatever the stage."""
    shards = getattr(engine.optimizer.parameters, "shards", None)
    return {
        name: (whole_of(param) if shards else param.detach().clone())
        for name, param in engine.module.named_parameters()
    }


def kept_wrongly(engine: Any) -> list[str]:
    """Weights that this rank holds whole though they are not persistent, or are persistent and were just changed."""
    shards = engine.optimizer.parameters.shards
    names = {param: name for name, param in engine.module.named_parameters()}
    return [names[p] for p in shards.gathered() if not p.ds_persist]


def train_toy(name: str, stage: int, rank: int, world_size: int) -> tuple[list[float], list[Any], dict[str, Tensor]]:
    options, zero, model_options = CASES[name]
    config = ds_config(lr=1e-3, world_size=world_size, **options)
    config["zero_optimization"] = {"stage": stage, **(zero if stage == 3 else {})}
    if stage != 3 and "reduce_bucket_size" in zero:
        config["zero_optimization"]["reduce_bucket_size"] = zero["reduce_bucket_size"]
    engine = make_engine(Toy(**model_options), config)
    gas = config["gradient_accumulation_steps"]
    batches, losses, reports = make_batches(7 * gas), [], []
    for step in range(STEPS):
        micro_batches = [batches[(step * gas + i) % len(batches)] for i in range(gas)]
        losses.append(train_step(engine, micro_batches, rank, world_size))
        report = engine.last_report
        reports.append((report.group, str(report.grad_norm), report.skipped, report.grad_numel_sent))
        if stage == 3:
            assert not (kept := kept_wrongly(engine)), f"{name}: whole after step {step}: {kept}"
            assert all(p.grad is None for p in engine.module.parameters())
    trained = values(engine)
    engine.destroy()
    return losses, reports, trained


def differences_from_replicated(name: str, rank: int, world_size: int) -> list[str]:
    (losses, reports, weights), (losses3, reports3, weights3) = (
        train_toy(name, stage, rank, world_size) for stage in (0, 3)
    )
    errors = [
        f"{name}: step {i}: loss {a} and {b}" for i, (a, b) in enumerate(zip(losses, losses3, strict=True)) if a != b
    ]
    errors += [
        f"{name}: step {i}: {a} and {b}" for i, (a, b) in enumerate(zip(reports, reports3, strict=True)) if a != b
    ]
    errors += [f"{name}: {key}" for key in weights if not torch.equal(weights[key], weights3[key])]
    return errors


# -- models of transformers -----------------------------------------------------------------------------------


def train_hf(
    name: str, stage: int, rank: int, world_size: int
) -> tuple[list[float], list[list[int]], dict[str, Tensor]]:
    family, zero, hift = HF_CASES[name]
    config = ds_config(lr=1e-3, world_size=world_size, rows=2 * world_size, gas=2, clip=0.1, hift=hift)
    config["zero_optimization"] = {"stage": stage, **(zero if stage == 3 else {})}
    model = tiny.build(family, seed=0)
    engine = make_engine(model, config)
    generator = torch.Generator().manual_seed(5)
    losses, generated = [], []
    for step in range(STEPS):
        for _ in range(2):
            ids = torch.randint(3, 67, (2 * world_size, 9), generator=generator)[rank::world_size].contiguous()
            if rank == 0:
                ids[:] = 7  # one token only: most experts get nothing on this rank
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
            losses.append(float(loss.detach()))
        if step % 4 == 1:  # in between, everything is gathered by other traces
            engine.eval()
            with torch.no_grad():
                losses.append(float(engine(input_ids=ids, labels=ids).loss))
            answer = model.generate(
                ids[:1, :4], max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0,
                attention_mask=torch.ones_like(ids[:1, :4]),
            )  # fmt: skip
            generated.append(answer[0].tolist())
            engine.train()
        if stage == 3:
            assert not (kept := kept_wrongly(engine)), f"{name}: whole after step {step}: {kept}"
    trained = values(engine)
    engine.destroy()
    return losses, generated, trained


def hf_differences_from_replicated(name: str, rank: int, world_size: int) -> list[str]:
    (losses, texts, weights), (losses3, texts3, weights3) = (
        train_hf(name, stage, rank, world_size) for stage in (0, 3)
    )
    errors = [f"{name}: {key}" for key in weights if (weights[key] - weights3[key]).abs().max() > 1e-6]
    errors += [] if texts == texts3 else [f"{name}: {texts} and {texts3}"]
    worst = max(abs(a - b) for a, b in zip(losses, losses3, strict=True))
    return errors + ([f"{name}: losses differ by {worst}"] if worst > 2e-6 else [])


# -- zero.Init ------------------------------------------------------------------------------------------------


def init_under_zero(rank: int, world_size: int) -> list[str]:
    """A model made under ``deepspeed.zero.Init`` is never whole anywhere, and trains as any other."""
    config = ds_config(lr=1e-3, world_size=world_size)
    config["zero_optimization"] = {"stage": 3, **KEEP_NOTHING}
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = Toy()
    engines = [make_engine(model, config), make_engine(Toy(), {**config, "zero_optimization": {"stage": 0}})]
    for step, batch in enumerate(make_batches(7)):
        a, b = (train_step(engine, [batch], rank, world_size) for engine in engines)
        if a != b:
            return [f"zero.Init: step {step}: loss {a} and {b}"]
    different = [key for key, value in values(engines[0]).items() if not torch.equal(value, values(engines[1])[key])]
    for engine in engines:
        engine.destroy()
    return different


# -- memory and volume ----------------------------------------------------------------------------------------


class LivingCopies:
    """The bytes of gathered weights that are alive, whoever holds them."""

    def __init__(self) -> None:
        self.bytes_of: dict[tuple[int, int], int] = {}
        self._arrived = WeightShards.arrived

    def __enter__(self) -> LivingCopies:
        def arrived(shards: WeightShards, module: nn.Module) -> None:
            self._arrived(shards, module)
            for param in module.parameters():
                if param.numel() and param.untyped_storage().nbytes():
                    self._watch(param)

        WeightShards.arrived = arrived
        return self

    def _watch(self, param: nn.Parameter) -> None:
        storage = param.untyped_storage()
        key = (storage.data_ptr(), id(param))
        if key not in self.bytes_of:
            self.bytes_of[key] = storage.nbytes()
            weakref.finalize(storage, self.bytes_of.pop, key, None)

    def __exit__(self, *_: Any) -> None:
        WeightShards.arrived = self._arrived

    def num_bytes(self) -> int:
        """Gloo's thread may hold the tensors of the last collective a moment longer: wait for that."""
        for _ in range(200):
            if not self.bytes_of:
                break
            time.sleep(0.01)
        return sum(self.bytes_of.values())


def saved_weights_do_not_stay(rank: int, world_size: int) -> list[str]:
    """Between forward and backward no whole weight is alive, through the transposed views of linear layers and the
    slices of experts that autograd saves either."""
    errors = []
    config = ds_config(lr=1e-3, world_size=world_size, rows=2 * world_size)
    config["zero_optimization"] = {"stage": 3, **KEEP_NOTHING}
    for family, more in (("llama", {}), ("mixtral", {"experts_implementation": "eager"})):
        with LivingCopies() as copies:
            engine = make_engine(tiny.build(family, seed=0, **more), config)
            ids = torch.randint(3, 67, (2, 9), generator=torch.Generator().manual_seed(rank))
            for _ in range(STEPS):
                loss = engine(input_ids=ids, labels=ids).loss
                if num_bytes := copies.num_bytes():
                    errors.append(f"{family}, {engine.groups[engine.schedule.active].name}: {num_bytes} bytes")
                engine.backward(loss)
                engine.step()
            engine.destroy()
    return errors


def volume_of_gathers(rank: int, world_size: int) -> list[str]:
    """Forward gathers every weight once; backward only the modules above the lowest one that is trained."""
    config = ds_config(lr=1e-3, world_size=world_size)
    config["zero_optimization"] = {"stage": 3, **KEEP_NOTHING}
    engine = make_engine(Toy(num_layers=8), config)
    groups = engine.groups
    total = sum(group.numel for group in groups)
    sent, original = [], deepspeed_comm.allgather_fn

    def counted(output: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(output.numel())
        return original(output, *args, **kwargs)

    deepspeed_comm.allgather_fn = counted
    errors, by_engine = [], []
    for step, batch in enumerate(make_batches(2 * len(groups))):
        sent.clear()
        active = engine.schedule.active
        before = engine.optimizer.parameters.shards.numel_gathered
        train_step(engine, [batch], rank, world_size)
        expected = total + sum(group.numel for group in groups[active:])
        by_engine.append(engine.optimizer.parameters.shards.numel_gathered - before)
        if by_engine[-1] != expected:
            errors.append(f"volume, step {step}: {by_engine[-1]} elements gathered, expected {expected}")
        if not expected <= sum(sent) < expected + 2 * world_size * len(list(engine.module.parameters())):
            errors.append(f"volume, step {step}: {sum(sent)} elements sent for {expected}")
    deepspeed_comm.allgather_fn = original
    engine.destroy()
    average = sum(by_engine) / len(by_engine) / total
    return errors + ([f"volume: {average:.3f} x the parameters"] if average > MOST_GATHERED else [])


def volume_of_gathers_with_recomputation(rank: int, world_size: int) -> list[str]:
    """Recomputing a block gathers its weights for backward too, which keeps them (stage3_max_reuse_distance)."""
    model = tiny.build("llama", seed=0, num_hidden_layers=6)
    block, total = (sum(p.numel() for p in m.parameters()) for m in (model.model.layers[0], model))
    config = ds_config(lr=1e-3, world_size=world_size, rows=world_size, hift={"activations": {"checkpointing": True}})
    config["zero_optimization"] = {"stage": 3, **KEEP_NOTHING, "stage3_max_reuse_distance": block}
    engine = make_engine(model, config)
    shards, gathered = engine.optimizer.parameters.shards, []
    for _ in range(3 * len(engine.groups)):
        before = shards.numel_gathered
        ids = torch.randint(3, 67, (1, 9), generator=torch.Generator().manual_seed(rank))
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
        gathered.append(shards.numel_gathered - before)
    last_cycle = gathered[-len(engine.groups) :]
    engine.destroy()
    average = sum(last_cycle) / len(last_cycle) / total
    return [f"volume, recomputed: {average:.3f} x the parameters"] if not 1.3 < average <= MOST_GATHERED else []


# -- experts --------------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """Experts as modules of their own, of which one without tokens is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(7, 3)
        self.experts = nn.ModuleList(nn.Linear(7, 7) for _ in range(3))

    def forward(self, h: Tensor) -> Tensor:
        weight = self.gate(h).softmax(-1)
        chosen = weight.argmax(-1)
        out = torch.zeros_like(h)
        for i, expert in enumerate(self.experts):
            mine = chosen == i
            if mine.any():
                out[mine] = expert(h[mine]) * weight[mine][:, i : i + 1]
        return h + out


class MoEToy(Toy):
    def __init__(self) -> None:
        super().__init__(num_layers=3)
        self.layers[1] = Experts()


def experts_as_modules(rank: int, world_size: int) -> list[str]:
    """Ranks that call different experts must gather and reduce alike: DeepSpeed's ``leaf_module`` with static
    buckets."""
    results: list[Callable] = []
    for stage in (0, 3):
        config = ds_config(lr=1e-3, world_size=world_size)
        leaf = {"leaf_module": {"classes": [f"{Experts.__module__}.{Experts.__qualname__}"]}}
        config["zero_optimization"] = {"stage": stage, **({**KEEP_NOTHING, **leaf} if stage == 3 else {})}
        engine = make_engine(MoEToy(), config)
        losses = []
        for tokens, targets in make_batches(STEPS):
            tokens = tokens.clone()
            tokens[: len(tokens) // world_size] = 3  # the first rank sees one token, so one expert
            losses.append(train_step(engine, [(tokens, targets)], rank, world_size))
        results.append((losses, values(engine)))
        engine.destroy()
    (a, weights), (b, weights3) = results
    errors = [] if a == b else [f"experts: losses {a} and {b}"]
    return errors + [f"experts: {key}" for key in weights if not torch.equal(weights[key], weights3[key])]


# -- tests ----------------------------------------------------------------------------------------------------


def all_cases() -> list[str]:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    linear = torch.nn.functional.linear
    if world_size == 3:
        # The larger of the toy's weights travel alone, the others together.
        deepspeed_zero3_seam.ALONE_NUMEL = 50
    errors = []
    for name in CASES if world_size == 2 else FEWER_CASES:
        errors += differences_from_replicated(name, rank, world_size)
    if world_size == 2:
        for name in HF_CASES:
            errors += hf_differences_from_replicated(name, rank, world_size)
        errors += saved_weights_do_not_stay(rank, world_size)
    if world_size > 1:
        errors += volume_of_gathers(rank, world_size)
        errors += volume_of_gathers_with_recomputation(rank, world_size)
    errors += init_under_zero(rank, world_size)
    errors += experts_as_modules(rank, world_size)
    if torch.nn.functional.linear is not linear:
        errors.append("torch.nn.functional.linear is not torch's any more")
    return errors


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_partitioned_equals_replicated(world_size):
    for rank, errors in enumerate(run_distributed(all_cases, world_size)):
        assert not errors, f"rank {rank}: " + "\n".join(errors)
