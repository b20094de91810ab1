"""What ranks send in one optimizer step: DDP, ZeRO-2, ZeRO-3 and HiFT, counted by a spy on the collectives.

    python benchmarks/traffic.py

A LLaMA of 10 blocks on 2 and on 4 gloo ranks, bf16 (DDP too), two micro-batches a step. The spy sees every collective
where torch dispatches it, whoever calls it (DDP's reducer is C++), and counts what a ring sends from each rank: for a
tensor of B bytes on N ranks, all-reduce 2 B (N-1)/N, reduce-scatter and all-gather B (N-1)/N of the whole, broadcast
and reduce B. Steps of a whole cycle are averaged, after one that is not counted. Bytes, not seconds: they are the same
on every machine. From them, the arithmetic for 8 to 64 ranks.

Writes benchmarks/results/traffic.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results" / "traffic.md"
BLOCKS, MICRO_BATCHES = 10, 2
SETTINGS: dict[str, dict[str, Any] | None] = {
    "torch DDP": None,
    "DeepSpeed ZeRO-2": {"stage": 2},
    "DeepSpeed ZeRO-3": {"stage": 3},
    "ours, stage 0 to 2, every weight in each step": {"stage": 2, "group_size": "all"},
    "ours, stage 0 to 2, 4 layers a group": {"stage": 2, "group_size": 4},
    "ours, stage 0 to 2, 1 layer a group": {"stage": 2, "group_size": 1},
    "ours, stage 3, every weight in each step": {"stage": 3, "group_size": "all"},
    "ours, stage 3, 1 layer a group": {"stage": 3, "group_size": 1},
}


class Spy(TorchDispatchMode):
    """Adds up the bytes that a ring sends from this rank, in ``sent``."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.sent += self._of(func._opname, args)
        return func(*args, **(kwargs or {}))

    def _of(self, name: str, args: Any) -> float:
        import torch.distributed as dist

        n = dist.get_world_size()
        size = [sum(t.numel() * t.element_size() for t in _flat(arg)) for arg in args[:2]]
        share = (n - 1) / n
        if name == "allreduce_" or name == "allreduce_coalesced_":
            return 2 * size[0] * share
        if name in ("_allgather_base_", "allgather_", "allgather_into_tensor_coalesced_"):  # (outputs, inputs)
            return max(size) * share
        if name in ("_reduce_scatter_base_", "reduce_scatter_", "reduce_scatter_tensor_coalesced_"):
            return max(size) * share
        if name in ("broadcast_", "reduce_"):
            return size[0]
        if name in ("barrier", "send", "recv_", "monitored_barrier_"):
            return 0.0
        raise NotImplementedError(f"traffic of c10d.{name}")


def _flat(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for one in value for t in _flat(one)] if isinstance(value, list | tuple) else []


def count() -> dict[str, float]:
    """On every rank: bytes sent per step and parameter, by setting; and ``numel``, the parameters."""
    found = {name: _bytes_a_step(setting) for name, setting in SETTINGS.items()}
    found["numel"] = float(sum(p.numel() for p in _model().parameters()))
    return found


def _model() -> torch.nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=352, num_hidden_layers=BLOCKS, num_attention_heads=4,
        num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16)


def _bytes_a_step(setting: dict[str, Any] | None) -> float:
    model = _model()
    numel = sum(p.numel() for p in model.parameters())
    step, steps = _ddp(model) if setting is None else _deepspeed(model, setting)
    for _ in range(steps):
        step()
    with Spy() as spy:
        for _ in range(steps):
            step()
    return spy.sent / steps / numel


def _rows() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 512, (1, 32))
    return {"input_ids": ids, "labels": ids}


def _ddp(model: torch.nn.Module) -> tuple[Any, int]:
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> None:
        for i in range(MICRO_BATCHES):
            ddp.require_backward_grad_sync = i == MICRO_BATCHES - 1
            ddp(**_rows()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, 2


def _deepspeed(model: torch.nn.Module, setting: dict[str, Any]) -> tuple[Any, int]:
    import deepspeed

    import hift_ds

    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": MICRO_BATCHES, "bf16": {"enabled": True},
        # As a large model: nothing stays gathered between forward and backward.
        "zero_optimization": {
            "stage": setting["stage"], "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
        },
        "zero_allow_untested_optimizer": True,
    }  # fmt: skip
    steps = 2
    if "group_size" in setting:
        config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-5}}
        config["hift"] = {"group_size": setting["group_size"]}
        engine, *_ = hift_ds.initialize(model=model, config=config)
        steps = len(engine.groups)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def step() -> None:
        for _ in range(MICRO_BATCHES):
            engine.backward(engine(**_rows()).loss)
            engine.step()

    return step, steps


def table(found: dict[int, dict[str, float]]) -> str:
    """The page, in Markdown. ``found``: by number of ranks, what :func:`count` gave."""
    ranks = sorted(found)
    out = [
        "# Bytes between ranks", "",
        "Written by `python benchmarks/traffic.py`. Sent by each rank in one optimizer step of "
        f"{MICRO_BATCHES} micro-batches, bytes per parameter of the model ({found[ranks[0]]['numel'] / 1e6:.1f} M, "
        f"bf16, {BLOCKS} blocks). Counted by a spy on torch's collectives; as a ring sends them. `limit`: what it "
        "tends to for many ranks, N/(N-1) times that of N.", "",
        "| | " + " | ".join(f"{n} ranks" for n in ranks) + " | limit | of DDP |",
        "|---|" + "---|" * (len(ranks) + 2),
    ]  # fmt: skip
    last = ranks[-1]
    for name in SETTINGS:
        limit = found[last][name] * last / (last - 1)
        base = found[last]["torch DDP"] * last / (last - 1)
        cells = " | ".join(f"{found[n][name]:.3f}" for n in ranks)
        out.append(f"| {name} | {cells} | {limit:.3f} | {limit / base:.3f} |")
    out += [
        "", "## 8 to 64 ranks, arithmetic", "",
        "LLaMA-2-7B (6.74 B parameters): the counts above, times parameters and (N-1)/N. GB sent by each rank in a "
        "step. One group of one layer is 1/34 of its weights on average, here 1/12: that row is scaled by 12/34.", "",
        "| | 8 | 16 | 32 | 64 |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for name in ("torch DDP", "DeepSpeed ZeRO-3", "ours, stage 0 to 2, every weight in each step"):
        limit = found[last][name] * last / (last - 1)
        out.append(f"| {name} | " + " | ".join(f"{limit * 6.738 * (n - 1) / n:.1f}" for n in (8, 16, 32, 64)) + " |")
    name = "ours, stage 0 to 2, 1 layer a group"
    limit = found[last][name] * last / (last - 1) * 12 / 34
    out.append(f"| {name} | " + " | ".join(f"{limit * 6.738 * (n - 1) / n:.2f}" for n in (8, 16, 32, 64)) + " |")
    return "\n".join(out) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    from benchmarks.traffic import count as counted  # a name that other processes can import
    from tests.helpers.distributed import run_distributed

    found = {n: run_distributed(counted, n)[0] for n in (2, 4)}
    args.out.write_text(table(found))
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
