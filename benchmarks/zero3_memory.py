"""Peak accelerator memory with replicated, partitioned and streamed weights, counted on a fake device.

    python benchmarks/zero3_memory.py [--quick | --volume]

The real engine takes real steps of each model with few blocks; a place of a step (the peak of the last block's
backward, say) is linear in the number of blocks from there on. One cell of each model is counted on the whole model as
well. Groups with partitioned weights are visited twice, since ZeRO-3 prefetches from the second time on. Stepped are
the embedding, the lowest block, which of all blocks has the most above it, and the head. Writes docs/zero3_memory.md,
in 8 minutes on one core; --quick does the 7B model only and writes nothing; --volume counts what ZeRO-3 gathers, over
all groups of the 7B model.
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
from hift_ds.forecast.setting import Result, Setting, simulate  # noqa: E402

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
    num_blocks: int
    few: tuple[int, int]  # blocks that are stepped: more than ZeRO-3 keeps gathered at a time
    checked: tuple[str, int]  # the cell that is counted on the whole model too: mode, ranks


@dataclass(frozen=True)
class Peak:
    """Of the worst group."""

    num_bytes: float
    group: str
    place: str

    @property
    def gib(self) -> float:
        return self.num_bytes / GIB


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
    Model("llama2_7b", "LLaMA-2-7B", 32, (8, 11), (STREAMED, 1)),
    Model("llama3_8b", "Llama-3-8B", 32, (8, 11), (PARTITIONED, 2)),
    Model("llama2_13b", "LLaMA-2-13B", 40, (7, 9), (STREAMED, 4)),
    Model("llama3_70b", "Llama-3-70B", 80, (5, 7), (PARTITIONED, 8)),
)
Cell = tuple[Model, str, int]


def setting(model: Model, mode: str, ranks: int, num_blocks: int | None) -> Setting:
    """bf16 weights, fp32 masters and AdamW states in host memory; the savings of the streamed presets for all modes."""
    return counting.setting(
        model.name, MIXED_HI, 1, LENGTH, preset("bf16_zero3_param_cpu")["hift"],
        deepspeed={"gradient_clipping": 1.0, "zero_optimization": MODES[mode]},
        num_blocks=num_blocks, groups=(0, 1, -1), world_size=ranks, visits=1 if mode == REPLICATED else 2,
    )  # fmt: skip


def extended(small: Result, large: Result, num_blocks: int) -> Peak:
    """Of a model with ``num_blocks`` blocks: each place on a line, then the highest.

    Totals, and the blocks between too, where ZeRO-3's prefetch can peak: category by category and without them it was
    0.4 GiB too low and 6.5 GiB too high for partitioned weights on two ranks.
    """
    found = []
    for a, b in zip(small.steps, large.steps, strict=True):
        for place in a.places.keys() & b.places.keys():
            low, high = (sum(step.places[place].values()) for step in (a, b))
            slope = (high - low) / (large.num_blocks - small.num_blocks)
            found.append(Peak(high + slope * (num_blocks - large.num_blocks), b.name, place))
    return max(found, key=lambda peak: peak.num_bytes)


def measure(models: tuple[Model, ...]) -> dict[Cell, Peak]:
    found: dict[Cell, Peak] = {}
    for model in models:
        cells = [(model, mode, ranks) for mode in MODES for ranks in RANKS]
        started = time.perf_counter()
        results = simulate([setting(*cell, n) for cell in cells for n in model.few])
        for i, cell in enumerate(cells):
            found[cell] = extended(results[2 * i], results[2 * i + 1], model.num_blocks)
        print(f"# {model.title}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return found


def counted_whole(models: tuple[Model, ...]) -> dict[Model, Result]:
    """Each model's checked cell, with all its blocks."""
    results = simulate([setting(model, *model.checked, None) for model in models])
    return dict(zip(models, results, strict=True))


def volume() -> list[float]:
    """Elements that each group of the whole 7B model gathers in a micro-batch, over its parameters; partitioned, on 2
    ranks."""
    one = setting(MODELS[0], PARTITIONED, 2, None)
    (result,) = simulate([replace(one, groups=None, second_update=False)])
    return [step.numel_gathered / result.numel for step in result.steps]


def table(models: tuple[Model, ...], found: dict[Cell, Peak]) -> str:
    lines = ["| model | weights | " + " | ".join(f"{n} rank{'s' if n > 1 else ''}" for n in RANKS) + " | worst group |"]
    lines.append("|---|---|" + "---|" * (len(RANKS) + 1))
    for model in models:
        for mode in MODES:
            peaks = [found[model, mode, ranks] for ranks in RANKS]
            worst = ", ".join(dict.fromkeys(peak.group for peak in peaks))
            lines.append(f"| {model.title} | {mode} | " + " | ".join(f"{p.gib:.2f}" for p in peaks) + f" | {worst} |")
    return "\n".join(lines)


GOALS = ((MODELS[0], STREAMED, 1, 4.0), (MODELS[3], PARTITIONED, 8, 24.0))


def goals(found: dict[Cell, Peak]) -> str:
    lines = []
    for model, mode, ranks, limit in GOALS:
        peak = found[model, mode, ranks]
        verdict = "met" if peak.gib < limit else "missed"
        on = f"{ranks} rank{'s' if ranks > 1 else ''}"
        lines.append(f"- {model.title}, {mode}, {on}: {peak.gib:.2f} GiB, goal below {limit:.0f}: {verdict}.")
    return "\n".join(lines)


def checks(found: dict[Cell, Peak], whole: dict[Model, Result]) -> str:
    lines = ["| model | cell | extended | counted whole |", "|---|---|---|---|"]
    for model, result in whole.items():
        mode, ranks = model.checked
        counted = max(step.peak_bytes for step in result.steps) / GIB
        lines.append(f"| {model.title} | {mode}, {ranks} | {found[model, mode, ranks].gib:.3f} | {counted:.3f} |")
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
  gradient, which is largest on two; so do the other modes.
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

The real engine took real steps of each model with two small numbers of blocks:
{few}.
Each place of a step (such as "backward, last block") was put on a line through the two: from more blocks on
than ZeRO-3 keeps gathered at a time, one block adds the same to every place. Groups with partitioned weights
were stepped twice and counted the second time, when ZeRO-3 prefetches; a third time the peaks were the same
within 10 KiB. Whole models for comparison, GiB:

{checks}
"""


def page(found: dict[Cell, Peak], whole: dict[Model, Result]) -> str:
    return PAGE.format(
        length=LENGTH,
        table=table(MODELS, found),
        goals=goals(found),
        tensor=128256 * 8192 * 2 / GIB,
        few=", ".join(f"{model.title} {model.few[0]} and {model.few[1]}" for model in MODELS),
        checks=checks(found, whole),
    )


def where(models: tuple[Model, ...], found: dict[Cell, Peak]) -> str:
    """For reading on the terminal."""
    return "\n".join(
        f"# {model.title}, {mode}, {ranks}: {peak.gib:.2f} in {peak.group}, {peak.place}"
        for (model, mode, ranks), peak in found.items()
        if model in models
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--quick", action="store_true", help="the smallest model only, nothing written")
    only.add_argument("--volume", action="store_true", help="what is gathered, nothing written")
    args = parser.parse_args()
    if args.volume:
        found = volume()
        print(
            f"{sum(found) / len(found):.3f} x the parameters on average; by group:",
            *(f"{x:.2f}" for x in found),
        )
        return
    models = MODELS[:1] if args.quick else MODELS
    peaks = measure(models)
    print(where(models, peaks), file=sys.stderr)
    if args.quick:
        print(table(models, peaks))
    else:
        OUT.write_text(page(peaks, counted_whole(models)), encoding="utf-8")


if __name__ == "__main__":
    main()
