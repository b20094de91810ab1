"""Peak accelerator memory with replicated, partitioned and streamed weights, counted on a fake device.

    python benchmarks/zero3_memory.py [--quick | --volume] [--rows FILE]

The real engine takes real steps of each whole model. Groups with partitioned weights are visited twice, since ZeRO-3
prefetches from the second time on. Stepped are the embedding, the lowest block, which of all blocks has the most above
it, and the head. Writes docs/zero3_memory.md; --quick does the 7B model only and writes nothing; --volume counts what
ZeRO-3 gathers, over all groups of the 7B model. --rows: what was counted is kept in FILE, so that an interrupted count
goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import counting  # noqa: E402
from benchmarks.counting import GIB, MIXED_HI  # noqa: E402
from hift_ds.forecast.setting import GroupStep, Setting  # noqa: E402
from hift_ds.forecast.simulator import simulate  # noqa: E402
from hift_ds.forecast.steps import worst_step  # noqa: E402

OUT = ROOT / "docs" / "zero3_memory.md"
RANKS = (1, 2, 4, 8)
LENGTH = 2048
NOTHING_KEPT = {
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}


@dataclass(frozen=True)
class Model:
    name: str
    title: str


def preset(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "ds_configs" / f"{name}.json").read_text(encoding="utf-8"))


def zero_block(name: str, **changes: Any) -> dict[str, Any]:
    """Of a preset, without page-locked memory."""
    zero = {**preset(name)["zero_optimization"], **changes}
    if "offload_param" in zero:
        zero["offload_param"] = {**zero["offload_param"], "pin_memory": False}
    return zero


REPLICATED, PARTITIONED, STREAMED, LEAST = "replicated", "partitioned", "streamed", "streamed, nothing kept"
MODES = {
    REPLICATED: zero_block("bf16_host"),
    PARTITIONED: zero_block("bf16_zero3"),
    STREAMED: zero_block("bf16_zero3_param_cpu"),
    LEAST: zero_block("bf16_zero3_param_cpu", **NOTHING_KEPT),
}
MODELS = (
    Model("llama2_7b", "LLaMA-2-7B"),
    Model("llama3_8b", "Llama-3-8B"),
    Model("llama2_13b", "LLaMA-2-13B"),
    Model("llama3_70b", "Llama-3-70B"),
)
Cell = tuple[Model, str, int]


def setting(model: Model, mode: str, ranks: int) -> Setting:
    """bf16 weights, fp32 masters and AdamW states in host memory; the savings of the streamed presets for all modes."""
    return counting.setting(
        model.name, MIXED_HI, 1, LENGTH, preset("bf16_zero3_param_cpu")["hift"],
        deepspeed={"gradient_clipping": 1.0, "zero_optimization": MODES[mode]},
        world_size=ranks,
    )  # fmt: skip


def count(models: tuple[Model, ...], rows: Path | None = None) -> dict[Cell, GroupStep]:
    """The step of each cell's worst group."""
    found: dict[Cell, GroupStep] = {}
    for model in models:
        cells = [(model, mode, ranks) for mode in MODES for ranks in RANKS]
        started = time.perf_counter()
        steps = counting.count([setting(*cell) for cell in cells], rows=rows)
        found |= zip(cells, map(worst_step, steps), strict=True)
        print(f"# {model.title}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return found


def volume() -> list[float]:
    """Elements that each group of the whole 7B model gathers in a micro-batch, over its parameters; partitioned, on 2
    ranks."""
    (result,) = simulate([replace(setting(MODELS[0], PARTITIONED, 2), second_update=False, visits=2)])
    return [step.numel_gathered / result.numel for step in result.steps]


def gib(step: GroupStep) -> float:
    return step.peak_bytes / GIB


def table(models: tuple[Model, ...], found: dict[Cell, GroupStep]) -> str:
    columns = ["model", "weights", *(f"{n} rank{'s' if n > 1 else ''}" for n in RANKS), "worst group"]
    lines = []
    for model in models:
        for mode in MODES:
            steps = [found[model, mode, ranks] for ranks in RANKS]
            worst = ", ".join(dict.fromkeys(step.name for step in steps))
            lines.append([model.title, mode, *(f"{gib(step):.2f}" for step in steps), worst])
    return counting.table(columns, lines, text=range(len(columns)))


GOALS = ((MODELS[0], STREAMED, 1, 4.0), (MODELS[3], PARTITIONED, 8, 24.0))


def goals(found: dict[Cell, GroupStep]) -> str:
    lines = []
    for model, mode, ranks, limit in GOALS:
        peak = gib(found[model, mode, ranks])
        verdict = "met" if peak < limit else "missed"
        on = f"{ranks} rank{'s' if ranks > 1 else ''}"
        lines.append(f"- {model.title}, {mode}, {on}: {peak:.2f} GiB, goal below {limit:.0f}: {verdict}.")
    return "\n".join(lines)


PAGE = """# Peak memory with partitioned and streamed weights

    python benchmarks/zero3_memory.py

wrote this page; [zero3.md](zero3.md) says what the modes are, [memory.md](memory.md) how bytes are counted
without a device. GiB allocated on each accelerator at the peak of the worst layer group: a batch of 1 x
{length} tokens on each rank, one layer a group, bf16 weights, fp32 masters and AdamW states in host memory;
in all modes blocks are recomputed, the loss is made in chunks and the update in slices of 2^24 elements, as
in `bf16_zero3_param_cpu`. The driver's context and fragmentation come on top ([memory.md](memory.md)). No
accelerator has confirmed these numbers yet.

{table}

- replicated: `bf16_host`. Each rank holds all weights. Several ranks also hold the fp32 shard of the group's
  gradient, which is largest on two; so do the other modes. They hold it while backward still runs, beside the whole
  gradients that it was made of, because gradients travel as soon as they are there: without that
  (`"overlap_comm": false` in `zero_optimization`) Llama-3-8B on 2 ranks takes 17.29 GiB instead of 18.71.
- partitioned: `bf16_zero3`. On one rank nothing is cut.
- streamed: `bf16_zero3_param_cpu`; `bf16_zero3_param_disk` looks the same from the accelerator. Up to half a
  billion elements are gathered ahead or kept.
- streamed, nothing kept: the same with `stage3_max_live_parameters`, `stage3_max_reuse_distance` and
  `stage3_prefetch_bucket_size` 0: least memory, no prefetch, and a recomputed block is gathered three times.

## Goals

{goals}

## Limits

A module's weights are gathered whole, so the largest tensor is the floor of the streamed modes: in
Llama-3-70B the embedding and the head, {tensor:.2f} GiB each in bf16. While one of them trains its gradient
is as large. More ranks do not help there. `slice_numel` bounds what the update adds, `chunked_loss` what the
logits add.

## How it was counted

The real engine took real steps of each whole model. Groups with partitioned weights were stepped twice and
counted the second time, when ZeRO-3 prefetches; a third time the peaks were the same within 10 KiB.
"""


def page(found: dict[Cell, GroupStep]) -> str:
    return PAGE.format(
        length=LENGTH,
        table=table(MODELS, found),
        goals=goals(found),
        tensor=128256 * 8192 * 2 / GIB,
    )


def where(models: tuple[Model, ...], found: dict[Cell, GroupStep]) -> str:
    """For reading on the terminal."""
    return "\n".join(
        f"# {model.title}, {mode}, {ranks}: {gib(step):.2f} in {step.name}, {step.peak_place}"
        for (model, mode, ranks), step in found.items()
        if model in models
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--quick", action="store_true", help="the smallest model only, nothing written")
    only.add_argument("--volume", action="store_true", help="what is gathered, nothing written")
    parser.add_argument("--rows", type=Path, help="a file of counts of this very code, which is read and added to")
    args = parser.parse_args()
    if args.volume:
        found = volume()
        print(
            f"{sum(found) / len(found):.3f} x the parameters on average; by group:",
            *(f"{x:.2f}" for x in found),
        )
        return
    models = MODELS[:1] if args.quick else MODELS
    peaks = count(models, args.rows)
    print(where(models, peaks), file=sys.stderr)
    if args.quick:
        print(table(models, peaks))
    else:
        OUT.write_text(page(peaks), encoding="utf-8")


if __name__ == "__main__":
    main()
