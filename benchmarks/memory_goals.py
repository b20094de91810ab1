"""Peaks that were aimed at, and what each switch saves, counted on a fake device.

    python benchmarks/memory_goals.py                 an hour on one core, no GPU, no weights
    python benchmarks/memory_goals.py --rows FILE     what was counted is kept in FILE: an interrupted count goes on

The real engine takes real steps of AdamW on the whole model (docs/memory.md). For
each goal the sets of switches are tried on the embedding, the lowest block and the head, in the order of what they cost
in time; of the first set that meets it every layer group is worked out. Allocated bytes: the driver's context (about
0.6 GiB) and fragmentation come on top.

Writes benchmarks/results/memory_goals.md (``--out``).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.counting import GIB, count, setting  # noqa: E402
from hift_ds.cli.estimate_table import SWITCH_NAMES  # noqa: E402
from hift_ds.forecast.setting import GroupStep, Setting, with_switch  # noqa: E402
from hift_ds.forecast.steps import worst_step  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "memory_goals.md"
TITLES = {"llama2_7b": "LLaMA-2-7B", "llama3_8b": "Llama-3-8B"}
PRECISIONS = {"mixed_hi": "bf16, fp32 masters", "fp32": "fp32"}
# In time. The first costs none that was measured.
BY_COST = ("slice_numel", "chunked_loss", "checkpointing", "offload")
NOT_SLOTTED = "no prefetch"


@dataclass(frozen=True)
class Goal:
    model: str
    precision: str
    batch: int
    length: int
    below_gib: float
    why: str = ""

    @property
    def setting(self) -> Setting:
        """No switch on."""
        clipping = {"gradient_clipping": 1.0}
        return setting(self.model, self.precision, self.batch, self.length, {}, deepspeed=clipping)


GOALS = (
    Goal("llama2_7b", "mixed_hi", 1, 1024, 13.4, "weights alone are 12.55"),
    Goal("llama2_7b", "mixed_hi", 8, 512, 14.2, "weights alone are 12.55"),
    Goal("llama2_7b", "mixed_hi", 8, 2048, 18),
    Goal("llama2_7b", "fp32", 8, 512, 42, "a card of 48 GB"),
    Goal("llama2_7b", "fp32", 8, 512, 29),
    Goal("llama2_7b", "fp32", 1, 2800, 42, "a card of 48 GB"),
    Goal("llama2_7b", "fp32", 8, 2048, 42, "a card of 48 GB"),
    Goal("llama2_7b", "mixed_hi", 3, 512, 14, "the authors' limit on 24 GB"),
    Goal("llama2_7b", "mixed_hi", 1, 1400, 14, "the authors' limit on 24 GB"),
    Goal("llama3_8b", "mixed_hi", 1, 2048, 17.5),
    Goal("llama3_8b", "mixed_hi", 1, 8192, 22),
)
SAVINGS = (GOALS[1], GOALS[2], GOALS[6], Goal("llama3_8b", "mixed_hi", 8, 2048, 0))


def with_switches(asked: Setting, switches: tuple[str, ...]) -> Setting:
    for switch in switches:
        if switch == NOT_SLOTTED:
            block = asked.engine_config["hift"]
            block = {**block, "state": {**block.get("state", {}), "prefetch": False}}
            asked = replace(asked, engine_config={**asked.engine_config, "hift": block})
        else:
            asked = with_switch(asked, switch, on=True)
    return asked


def levels() -> list[tuple[str, ...]]:
    """Sets of switches, each with one more than the one before, the cheapest first."""
    return [BY_COST[:number] for number in range(len(BY_COST) + 1)]


# -- goals --------------------------------------------------------------------------------------------------------


def goal_table(goals: tuple[Goal, ...], num_processes: int, rows: Path | None = None) -> tuple[list[str], int]:
    """Lines of markdown, and how many goals are missed."""
    tried = levels()
    asked = [with_switches(goal.setting, switches) for goal in goals for switches in tried]
    found = count(asked, num_processes, rows=rows)
    lines = [
        "| model | precision | batch x length | goal, GiB | no switch | all switches | fewest switches | peak with "
        "them | worst group | where | met |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    chosen, outer = [], []
    for number, goal in enumerate(goals):
        steps = [worst_step(found[number * len(tried) + level]) for level in range(len(tried))]
        met = (level for level, step in enumerate(steps) if step.peak_bytes / GIB < goal.below_gib)
        chosen.append(next(met, len(tried) - 1))
        outer.append((steps[0], steps[-1]))
    every_group = count(
        [with_switches(goal.setting, tried[level]) for goal, level in zip(goals, chosen, strict=True)],
        num_processes,
        False,
        rows,
    )
    missed = 0
    for goal, level, (none, everything), steps in zip(goals, chosen, outer, every_group, strict=True):
        step = worst_step(steps)
        met = step.peak_bytes / GIB < goal.below_gib
        missed += not met
        switches = "; ".join(SWITCH_NAMES[name] for name in tried[level]) or "none"
        why = f" ({goal.why})" if goal.why else ""
        lines.append(
            f"| {TITLES[goal.model]} | {PRECISIONS[goal.precision]} | {goal.batch} x {goal.length} | < "
            f"{goal.below_gib:g}{why} "
            f"| {gib(none)} | {gib(everything)} | {switches} | {gib(step)} | {step.index} ({step.name}) | "
            f"{where(step)} | {'yes' if met else 'no'} |"
        )
    return lines, missed


def gib(step: GroupStep) -> str:
    return f"{step.peak_bytes / GIB:.2f}"


def where(step: GroupStep) -> str:
    """Phase and place of the highest peak."""
    phase, _, rest = step.peak_place.partition(":")
    return phase if not rest or rest.lstrip("-").isdigit() else f"{phase}, {rest}"


# -- what each switch saves ---------------------------------------------------------------------------------------


def savings_table(cases: tuple[Goal, ...], num_processes: int, rows: Path | None = None) -> list[str]:
    """Peak with each switch alone, and with all but it."""
    names = (*BY_COST, NOT_SLOTTED)
    everything = tuple(BY_COST)
    sets = [(), *((name,) for name in names), everything]
    sets += [tuple(n for n in everything if n != name) for name in BY_COST] + [(*everything, NOT_SLOTTED)]
    settings = [with_switches(case.setting, switches) for case in cases for switches in sets]
    settings += [replace(case.setting, micro_batches=2) for case in cases]
    settings += [replace(with_switches(case.setting, everything), micro_batches=2) for case in cases]
    peaks = [worst_step(steps).peak_bytes / GIB for steps in count(settings, num_processes, rows=rows)]

    def row(title: str, number: int) -> str:
        return f"| {title} | " + " | ".join(f"{peaks[i * len(sets) + number]:.2f}" for i in range(len(cases))) + " |"

    heads = [f"{TITLES[c.model]}, {PRECISIONS[c.precision]}, {c.batch} x {c.length}" for c in cases]
    lines = ["| peak, GiB | " + " | ".join(heads) + " |", "|---|" + "---|" * len(cases)]
    lines.append(row("no switch", 0))
    lines += [row(f"{SWITCH_NAMES.get(name, name)} alone", 1 + i) for i, name in enumerate(names)]
    lines.append(row("all four", 1 + len(names)))
    lines += [row(f"all but {SWITCH_NAMES[name]}", 2 + len(names) + i) for i, name in enumerate(BY_COST)]
    lines.append(row("all four and no prefetch", len(sets) - 1))
    accumulated = peaks[len(cases) * len(sets) :]
    for title, start in (
        ("no switch, two micro-batches a step", 0),
        ("all four, two micro-batches a step", len(cases)),
    ):
        values = " | ".join(f"{value:.2f}" for value in accumulated[start : start + len(cases)])
        lines.append(f"| {title} | {values} |")
    return lines


def report(goals: list[str], missed: int, savings: list[str]) -> str:
    return "\n".join(
        [
            "# Memory: goals, and what each switch saves",
            "",
            "Written by `python benchmarks/memory_goals.py`. GiB allocated on the GPU at the peak of the worst layer "
            "group, AdamW,",
            "every weight trained, one block a group, attention in a fused kernel, states in host memory. Counted on "
            "a fake device",
            "([docs/memory.md](../../docs/memory.md)), not measured on a GPU. The driver's context and fragmentation "
            "come on top.",
            "",
            "## Goals",
            "",
            "Fewest switches: those that meet the goal, added in the order slices, chunked loss, checkpointing, "
            "offload.",
            "",
            *goals,
            "",
            f"{'All goals are met.' if not missed else f'{missed} missed.'}",
            "",
            "## What each switch saves",
            "",
            "Update in slices is `state.slice_numel: 16777216`, no prefetch is `state.prefetch: false`, the others are",
            "`activations.checkpointing`, `chunked_loss`, `offload`. Two micro-batches a step: gradients are summed "
            "in fp32 and",
            "stay while the second one runs; with one they are in the weights' dtype.",
            "",
            *savings,
        ]
    ) + "\n"  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--rows", type=Path, help="a file of counts of this very code, which is read and added to")
    args = parser.parse_args(argv)
    goals, missed = goal_table(GOALS, args.processes, args.rows)
    print("\n".join(goals), flush=True)
    text = report(goals, missed, savings_table(SAVINGS, args.processes, args.rows))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
