"""The HiFT paper's memory claims, counted: full fine-tuning against HiFT, five optimizers, three precisions.

    python benchmarks/paper_memory.py                the six models of the paper
    python benchmarks/paper_memory.py --quick        two of them, three optimizers
    python benchmarks/paper_memory.py --rows FILE    what was counted is kept in FILE: an interrupted count goes on

The real engine takes real steps of each whole model on a device that has no memory (hift_ds/forecast/setting.py). No
weights, no network, no GPU.

Writes docs/paper_memory.md and docs/paper_memory.png (``--out``, ``--plot``).
"""

from __future__ import annotations

import argparse
import itertools
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = ROOT / "benchmarks" / "paper_memory.template.md"
sys.path.insert(0, str(ROOT))

from benchmarks import paper_counts as counts  # noqa: E402
from benchmarks.counting import AUTOCAST, FP32, GIB, MIXED_HI, table  # noqa: E402
from benchmarks.paper_counts import FPFT, HIFT, LLAMA, MIXED, ROWS, Cell, Counted, residual, row, total_cell  # noqa: E402
from hift_ds.forecast.steps import Slope, worst_step  # noqa: E402

MIB = 1 << 20
PAPER_AVERAGE = 89.18


# -- the page -----------------------------------------------------------------------------------------------------


def write_page(found: dict[str, Counted], optimizers: Sequence[str], command: str, plot: str) -> str:
    """The sections of the template for which the counts are there, filled in."""
    sections = ["setting", "states", "peaks", "average"]
    eager = ", ".join(title for title, c in found.items() if not c.structure.has_fused_attention)
    values: dict[str, object] = {
        "command": command, "plot": plot, "batch": counts.BATCH, "length": counts.LENGTH,
        "eager": f" (except {eager}, for which transformers has none)" if eager else "",
        "heads": ",\n".join(f"{title} as `{c.head}`" for title, c in found.items()),
        "states_table": _states_table(found, optimizers), "peaks_table": _peaks_table(found, optimizers),
    }  # fmt: skip
    values |= _checks(found, optimizers) | _average(found)
    if LLAMA in found:
        sections.append("beside")
        values |= _beside_the_paper(found[LLAMA], optimizers)
        if total_cell(HIFT, FP32, 6, True) in found[LLAMA].steps:
            sections.append("totals")
            values |= _totals(found[LLAMA]) | {"claims_table": _claims(found[LLAMA])}
    if len(found) == len(counts.MODELS):
        sections.append("all")
    parts = re.split(r"<!-- (\w+) -->\n", TEMPLATE.read_text(encoding="utf-8"))[1:]
    kept = [text for name, text in zip(parts[::2], parts[1::2], strict=True) if name in sections]
    return Template("".join(kept)).substitute(values)


def _states_table(found: dict[str, Counted], optimizers: Sequence[str]) -> str:
    columns = [
        "model",
        "precision",
        "method",
        "trainable",
        "Para",
        "Gra",
        "held",
        *(f"Sta {o}" for o in optimizers),
        "PGS",
    ]
    lines = []
    for title, counted in found.items():
        for method, precision in ROWS:
            rows = [row(counted, method, precision, o) for o in optimizers]
            sizes = (rows[0].weights, rows[0].gradients, rows[0].gradients_held, *(r.states for r in rows))
            lines.append([title, precision, method, _millions(rows[0].trainable), *map(_mib, sizes), _gib(rows[0].pgs)])
    return table(columns, lines, text=range(3))


def _peaks_table(found: dict[str, Counted], optimizers: Sequence[str]) -> str:
    columns = ["model", "precision", "method", "Residual", *optimizers, "saved, AdamW", "AdamW, kept", "saved"]
    lines = []
    for title, counted in found.items():
        for method, precision in ROWS:
            rows = [row(counted, method, precision, o) for o in optimizers]
            full = row(counted, FPFT, FP32 if precision == FP32 else MIXED, "AdamW").peak
            kept = counts.peak_with_gradients_kept(counted, precision)
            last = (
                ["", _gib(kept), ""] if method == FPFT else [_saved(rows[0].peak, full), "", _saved(rows[0].peak, kept)]
            )
            peaks = [_gib(r.peak) for r in rows]
            lines.append([title, precision, method, _gib(rows[0].residual), *peaks, *last])
        full_step, hift_step = counted.worst(FPFT, AUTOCAST), counted.worst(HIFT, AUTOCAST)
        for method, step in ((FPFT, full_step), (HIFT, hift_step)):
            saved = _saved(step.peak_bytes, full_step.peak_bytes) if method == HIFT else ""
            peaks = [_gib(step.peak_bytes), *[""] * (len(optimizers) - 1)]
            lines.append([title, AUTOCAST, method, _gib(residual(step)), *peaks, saved, "", ""])
    return table(columns, lines, text=range(3))


def _checks(found: dict[str, Counted], optimizers: Sequence[str]) -> dict[str, object]:
    """What the tables take for granted, tested on the counts."""
    spread, derived, prefetch = 0.0, 0.0, []
    for title, counted in found.items():
        for method, run in itertools.product((FPFT, HIFT), (FP32, MIXED_HI)):
            residuals = [residual(counted.worst(method, run, o)) for o in optimizers]
            spread = max(spread, max(residuals) / min(residuals) - 1)
        resident = counted.worst(HIFT, MIXED_HI, "SGD", resident=True).peak_bytes
        derived = max(derived, abs(row(counted, HIFT, MIXED, "SGD").peak / resident - 1))
        off, on = (_gib(counted.worst(HIFT, MIXED_HI, prefetch=on).peak_bytes) for on in (False, True))
        prefetch.append(f"{title} {off} -> {on}")
    return {"num_optimizers": len(optimizers), "spread": f"{spread:.2%}", "derived": f"{derived:.2%}",
            "prefetch": ";\n  ".join(prefetch)}  # fmt: skip


def _beside_the_paper(counted: Counted, optimizers: Sequence[str]) -> dict[str, object]:
    lines, names = [], ("Para", "Gra", "Sta", "PGS")
    largest = dict.fromkeys(names, (-1.0, 0.0))
    for optimizer, key in itertools.product(optimizers, ROWS):
        own = row(counted, *key, optimizer)
        ours = own.weights / MIB, own.gradients / MIB, own.states / MIB, own.pgs / GIB
        theirs = *counts.PAPER_WEIGHTS[key], *counts.PAPER_STATES[optimizer][key][:2]
        for name, a, b in zip(names, ours, theirs, strict=True):
            difference = abs(round(a, 2) - b)
            if difference > largest[name][0]:
                largest[name] = (difference, difference / b if b else 0.0)
        cells = (f"{a:.2f} / {b:.2f}" for a, b in zip(ours, theirs, strict=True))
        lines.append([optimizer, key[1], key[0], *cells])
    return {
        "beside_table": table(["optimizer", "precision", "method", *names], lines, text=range(3)),
        "worst": ", ".join(f"{name} {a:.2f} ({b:.0e})" if a else f"{name} none" for name, (a, b) in largest.items()),
        "numel": f"{counted.numel:,}",
        "exact": f"{4 * counted.numel / MIB:.2f}",
        "parameters": _millions(counted.numel),
        "largest": _millions(counted.largest),
    }


def _totals(counted: Counted) -> dict[str, object]:
    columns = [f"{batch} x {counts.LENGTH}, {'eager' if eager else 'fused'}" for batch, eager in counts.TOTALS]
    lines, ours = [], {}
    for key in ROWS:
        runs = [counted.steps[total_cell(*key, *which)] for which in counts.TOTALS]
        is_derived = key == (HIFT, MIXED)
        ours[key] = [
            counts.peak_with_all_masters(counted, run) if is_derived else worst_step(run).peak_bytes for run in runs
        ]
        theirs = counts.PAPER_STATES["AdamW"][key][2]
        lines.append(
            [key[1], key[0], f"{theirs:.2f}", *(f"{n / GIB:.2f} ({n / GIB / theirs - 1:+.1%})" for n in ours[key])]
        )
    for hift, full in ((FP32, FP32), (MIXED, MIXED), (MIXED_HI, MIXED)):
        a, b = (HIFT, hift), (FPFT, full)
        theirs = _saved(counts.PAPER_STATES["AdamW"][a][2], counts.PAPER_STATES["AdamW"][b][2])
        lines.append([f"saved, {hift}", f"against FPFT {full}", theirs, *map(_saved, ours[a], ours[b])])
    freed = _saved(row(counted, HIFT, FP32, "AdamW").peak, row(counted, FPFT, FP32, "AdamW").peak)
    return {"totals_table": table(["precision", "method", "theirs", *columns], lines, text=range(2)), "freed": freed}


def _claims(counted: Counted) -> str:
    columns = ["claim", "precision", "card", "batch x length", "fused", "eager", "largest batch at that length, fused"]
    lines = []
    for card, cell, where in counts.CLAIMS:
        fused, eager, more = (counted.steps[one] for one in counts.of_claim(cell))
        largest = Slope(((cell.batch, fused), (cell.batch + 1, more))).largest(card * GIB)
        peaks = [_gib(worst_step(steps).peak_bytes) for steps in (fused, eager)]
        lines.append([where, cell.precision, str(card), f"{cell.batch} x {cell.length}", *peaks, str(largest)])
    return table(columns, lines, text=range(2))


def _average(found: dict[str, Counted]) -> dict[str, object]:
    shares = [1 - c.largest / c.numel for c in found.values()]
    per_step = [1 - 1 / c.structure.num_groups for c in found.values()]
    weighted = 1 - sum(c.largest for c in found.values()) / sum(c.numel for c in found.values())
    columns = ["model", "parameters", "groups", "largest group", "its parameters", "fewer", "fewer, mean over a cycle"]
    lines = [
        [title, _millions(c.numel), str(c.structure.num_groups), c.structure.group_names[c.largest_group],
         _millions(c.largest), _percent(fewer, 2), _percent(mean, 2)]
        for (title, c), fewer, mean in zip(found.items(), shares, per_step, strict=True)
    ]  # fmt: skip
    mean, cycle = (_percent(sum(part) / len(part), 2) for part in (shares, per_step))
    lines.append(["mean over models", "", "", "", "", f"**{mean}**", cycle])
    return {"average_table": table(columns, lines, text=(0, 3)), "paper_average": PAPER_AVERAGE, "mean": mean,
            "weighted": _percent(weighted, 2), "cycle": cycle}  # fmt: skip


def _millions(numel: int) -> str:
    return f"{numel / 1e6:.2f}M"


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / MIB:.2f}"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f}"


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def _saved(ours: float, theirs: float) -> str:
    return _percent(1 - ours / theirs)


# -- the picture --------------------------------------------------------------------------------------------------

COLOURS = {"weights and masters": "#4c78a8", "states": "#f2a65a", "gradients": "#6aa84f",
           "activations and temporaries": "#b8c4d0"}  # fmt: skip


def draw(found: dict[str, Counted], path: Path) -> None:
    """One panel a model: what is alive at the peak, AdamW; for LLaMA-2-7B the paper's totals beside it."""
    from matplotlib.figure import Figure

    columns = min(len(found), 3)
    lines = -(-len(found) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * lines + 0.9), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flat
    for axes, (title, counted) in zip(panels, found.items(), strict=False):
        _draw_model(axes, title, counted)
    of = panels[list(found).index(LLAMA) if LLAMA in found else 0]
    figure.legend(*of.get_legend_handles_labels(), loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    figure.suptitle(
        f"Peak memory on the device, AdamW, {counts.BATCH} x {counts.LENGTH} tokens, GiB (counted)", fontsize=12
    )
    figure.savefig(path, dpi=130)


def _draw_model(axes: Any, title: str, counted: Counted) -> None:
    places, bottoms = range(len(ROWS)), [0.0] * len(ROWS)
    parts = [_parts_at_peak(counted, *key) for key in ROWS]
    for name, colour in COLOURS.items():
        heights = [part[name] / GIB for part in parts]
        bars = axes.bar(places, heights, bottom=bottoms, color=colour, label=name, width=0.66)
        bottoms = [a + b for a, b in zip(bottoms, heights, strict=True)]
    axes.bar_label(bars, [f"{top:.1f}" for top in bottoms], fontsize=9, padding=-13)  # below the top
    full = [i for i, (method, _) in enumerate(ROWS) if method == FPFT]
    kept = [counts.peak_with_gradients_kept(counted, ROWS[i][1]) / GIB for i in full]
    axes.bar(
        full, [a - bottoms[i] for i, a in zip(full, kept, strict=True)], bottom=[bottoms[i] for i in full], width=0.66,
        fill=False, linestyle=":", label="FPFT, gradients kept from step to step",
    )  # fmt: skip
    if title == LLAMA:
        theirs = [counts.PAPER_STATES["AdamW"][key][2] for key in ROWS]
        axes.plot(places, theirs, "_", color="#c92a2a", ms=20, mew=2, label="paper's total (batch not stated)")
    axes.set_title(f"{title}, {counted.numel / 1e9:.2f} B", fontsize=10)
    axes.margins(y=0.12)
    axes.set_xticks(places, [f"{method}\n{precision}" for method, precision in ROWS], fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _parts_at_peak(counted: Counted, method: str, precision: str) -> dict[str, int]:
    run = FP32 if precision == FP32 else MIXED_HI
    step = counted.worst(method, run)
    alive, masters = step.categories, 0
    if method == FPFT and precision == MIXED:  # resident: masters are among what the store holds
        masters = counted.steps[Cell(FPFT, run, "SGD")].step(0).state_bytes
    at_rest = row(counted, method, precision, "AdamW").peak - step.peak_bytes  # of HiFT mixed, which is derived
    sizes = (alive["weights"] + masters + at_rest, alive["states"] - masters, alive["gradients"],
             alive["activations"] + alive["temporaries"])  # fmt: skip
    return dict(zip(COLOURS, sizes, strict=True))


# -- the program --------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two models, three optimizers; needs --out")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "paper_memory.md")
    parser.add_argument("--plot", type=Path, help="default: beside the page")
    parser.add_argument("--rows", type=Path, help="a file of counts of this very code, which is read and added to")
    args = parser.parse_args(argv)
    if args.quick and args.out == parser.get_default("out"):
        parser.error("--quick would replace the whole page; give it another --out")
    args.plot = args.plot or args.out.with_suffix(".png")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    optimizers = counts.QUICK_OPTIMIZERS if args.quick else tuple(counts.OPTIMIZERS)
    found: dict[str, Counted] = {}
    for title, *model in counts.MODELS:
        if args.quick and title not in counts.QUICK_MODELS:
            continue
        cells = counts.main_cells(optimizers) + (counts.llama_cells() if title == LLAMA and not args.quick else [])
        found[title] = counts.count(title, *model, cells, args.rows)
        print(f"{title}: {len(found[title].steps)} runs", flush=True)
    command = shlex.join(["python", "benchmarks/paper_memory.py", *(["--quick"] if args.quick else [])])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(write_page(found, optimizers, command, args.plot.name))
    draw(found, args.plot)
    print(f"wrote {args.out} and {args.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
