"""The HiFT paper's memory claims, counted: full fine-tuning against HiFT, five optimizers, three precisions.

    python benchmarks/paper_memory.py              the six models of the paper
    python benchmarks/paper_memory.py --quick      two of them, three optimizers

The real engine takes real steps of each whole model on a device that has no memory (hift_ds/forecast/setting.py). No
weights, no network, no GPU.

Writes docs/paper_memory.md and docs/paper_memory.png (``--out``, ``--plot``).
"""

from __future__ import annotations

import argparse
import re
import resource
import shlex
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import Template
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = ROOT / "benchmarks" / "paper_memory.template.md"
sys.path.insert(0, str(ROOT))

import model_zoo  # noqa: E402
from benchmarks.counting import AUTOCAST, FP32, GIB, MIXED_HI, setting  # noqa: E402
from hift_ds.forecast.setting import Bytes, GroupStep, Setting, simulate  # noqa: E402
from hift_ds.forecast.steps import Request, Slope, Steps, Structure, WholeModel, read_structure, worst_step  # noqa: E402

MIB = 1 << 20
BATCH, LENGTH = 8, 512
MIXED = "mixed"  # the paper's: for HiFT worked out, not run


@dataclass(frozen=True)
class Model:
    """A model of the paper.

    Attributes:
        size: in the zoo.
        head: the transformers class that the paper's task needs.
        millions: of parameters, as the paper's accounting has it; what is built must agree.
    """

    title: str
    size: str
    head: str
    millions: float


MODELS = (
    Model("RoBERTa-base", "roberta_base", "RobertaForSequenceClassification", 124.65),
    Model("RoBERTa-large", "roberta_large", "RobertaForSequenceClassification", 355.36),
    Model("GPT-2 large", "gpt2_large", "GPT2LMHeadModel", 774.03),
    Model("GPT-Neo 2.7B", "gpt_neo_2_7b", "GPTNeoForCausalLM", 2651.31),
    Model("LLaMA-2-7B", "llama2_7b", "LlamaForCausalLM", 6738.42),
    Model("OPT-13B", "opt_13b", "OPTForCausalLM", 12853.47),
)
LLAMA = "LLaMA-2-7B"
QUICK_MODELS = ("RoBERTa-base", LLAMA)

OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "AdamW": ("AdamW", {"lr": 1e-5}),
    "SGDM": ("SGD", {"lr": 1e-5, "momentum": 0.9}),
    "SGD": ("SGD", {"lr": 1e-5}),
    "Adafactor": ("Adafactor", {"lr": 1e-5}),
    "Adagrad": ("Adagrad", {"lr": 1e-5}),
}
QUICK_OPTIMIZERS = ("AdamW", "SGD", "Adafactor")
ROWS = (("FPFT", FP32), ("HiFT", FP32), ("FPFT", MIXED), ("HiFT", MIXED), ("HiFT", MIXED_HI))

# The authors' table for LLaMA-2-7B, E2E, m = 1 (an image in their repository's README; also the paper's): MB of weights
# and of gradients, and by optimizer MB of states, GB of all three and GB in total. Batch and length are not stated.
PAPER_WEIGHTS = {
    ("FPFT", FP32): (25705.04, 25705.04),
    ("HiFT", FP32): (25705.04, 772.03),
    ("FPFT", MIXED): (38557.56, 25705.04),
    ("HiFT", MIXED): (38557.56, 772.03),
    ("HiFT", MIXED_HI): (13624.53, 772.03),
}
PAPER_STATES: dict[str, dict[tuple[str, str], tuple[float, float, float]]] = {
    "AdamW": dict(zip(ROWS, ((51410.08, 100.41, 142.11), (1544.06, 27.36, 55.41), (51410.08, 112.96, 145.50),
                             (1544.06, 39.92, 61.54), (1544.06, 15.57, 36.57)), strict=True)),
    "SGDM": dict(zip(ROWS, ((25705.04, 75.31, 117.01), (772.03, 26.61, 55.41), (25705.04, 87.86, 120.40),
                            (772.03, 39.16, 61.54), (772.03, 14.81, 36.57)), strict=True)),
    "SGD": dict(zip(ROWS, ((0.0, 50.21, 91.93), (0.0, 25.86, 55.41), (0.0, 62.76, 95.30), (0.0, 38.41, 61.54),
                           (0.0, 14.06, 36.57)), strict=True)),
    "Adafactor": dict(zip(ROWS, ((10.82, 50.22, 91.94), (0.33, 25.86, 55.41), (10.82, 62.77, 95.31),
                                 (0.33, 38.41, 61.54), (0.33, 14.06, 36.57)), strict=True)),
}  # fmt: skip
PAPER_STATES["Adagrad"] = PAPER_STATES["SGDM"]
PAPER_AVERAGE = 89.18


# -- what is run ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One run of the engine.

    Attributes:
        method: "FPFT" (one group, states resident) or "HiFT" (one layer a group, states fetched for the update).
        precision: ``FP32``, ``MIXED_HI`` (bf16 weights, fp32 masters; for FPFT all of them are on the device, which is
            the paper's mixed) or ``AUTOCAST``.
        micro_batches: with 2 the second forward finds gradients there.
        resident: the masters and states of all groups stay on the device.
    """

    method: str
    precision: str
    optimizer: str = "AdamW"
    micro_batches: int = 1
    eager: bool = False
    batch: int = BATCH
    length: int = LENGTH
    prefetch: bool = False
    resident: bool = False

    def setting(self, folder: str) -> Setting:
        state: dict[str, Any] = {"residency": "host", "prefetch": self.prefetch}
        if self.method == "FPFT" or self.resident:
            state = {"residency": "device"}
        return setting(
            folder, self.precision, self.batch, self.length,
            {"group_size": 1 if self.method == "HiFT" else 1 << 30, "state": state}, OPTIMIZERS[self.optimizer],
            micro_batches=self.micro_batches, eager_attention=self.eager,
            # Makes its states in the first update, beside the masters.
            visits=2 if self.optimizer == "Adafactor" else 1,
        )  # fmt: skip


def main_cells(optimizers: Iterable[str]) -> list[Cell]:
    """What every model is run with."""
    cells = []
    for optimizer in optimizers:
        for precision in (FP32, MIXED_HI):
            cells += [Cell(method, precision, optimizer) for method in ("FPFT", "HiFT")]
    cells += [Cell("FPFT", precision, micro_batches=2) for precision in (FP32, MIXED_HI)]
    cells += [Cell("HiFT", MIXED_HI, micro_batches=2), Cell("HiFT", MIXED_HI, "SGD", resident=True)]
    cells += [Cell("HiFT", precision, prefetch=True) for precision in (FP32, MIXED_HI)]
    return cells + [Cell(method, AUTOCAST) for method in ("FPFT", "HiFT")]


# LLaMA-2-7B beside the paper's totals.
TOTALS = tuple((batch, eager) for eager in (False, True) for batch in (6, 8))
TOTAL_CELLS = {
    ("FPFT", FP32): ("FPFT", FP32, 2),
    ("HiFT", FP32): ("HiFT", FP32, 1),
    ("FPFT", MIXED): ("FPFT", MIXED_HI, 2),
    ("HiFT", MIXED): ("HiFT", MIXED_HI, 1),
    ("HiFT", MIXED_HI): ("HiFT", MIXED_HI, 1),
}


def total_cell(method: str, precision: str, batch: int, eager: bool) -> Cell:
    method, precision, micro_batches = TOTAL_CELLS[method, precision]
    return Cell(method, precision, micro_batches=micro_batches, eager=eager, batch=batch)


@dataclass(frozen=True)
class Claim:
    """That LLaMA-2-7B with AdamW fits a card."""

    card_gib: int
    precision: str
    batch: int
    length: int
    where: str

    def cell(self, eager: bool) -> Cell:
        return Cell("HiFT", self.precision, batch=self.batch, length=self.length, eager=eager)


CLAIMS = (
    Claim(48, FP32, 1, 512, "7B in fp32 on one A6000 (abstract; batch not stated)"),
    Claim(48, MIXED_HI, 8, 512, "the authors' README"),
    Claim(48, MIXED_HI, 1, 2800, "the authors' README"),
    Claim(24, MIXED_HI, 3, 512, "the authors' README"),
    Claim(24, MIXED_HI, 1, 1400, "the authors' README"),
)


@dataclass
class Counted:
    """The steps of one model."""

    model: Model
    structure: Structure
    steps: dict[Cell, Steps] = field(default_factory=dict)

    @property
    def numel(self) -> int:
        return sum(self.structure.group_numels)

    @property
    def largest_group(self) -> int:
        return max(range(self.structure.num_groups), key=self.structure.group_numels.__getitem__)


def count(model: Model, cells: Sequence[Cell], folder: str) -> Counted:
    """Every cell's steps of the groups that can be the worst: the embedding, the lowest block, the head."""
    config = model_zoo.config(model.size)
    config.architectures = [model.head]
    config.save_pretrained(folder)
    structure = read_structure(Cell("HiFT", FP32).setting(folder))
    counted = Counted(model, structure)
    if round(counted.numel / 1e6, 2) != model.millions:
        raise SystemExit(f"{model.title}: {counted.numel / 1e6:.2f}M parameters, the paper's has {model.millions}M")
    requests = {cell: Request(cell.setting(folder), structure, ends_only=True) for cell in dict.fromkeys(cells)}
    asked = [request.to_simulate() for request in requests.values()]
    results = simulate([replace(one, second_update=one.visits == 1) for one in asked])
    counted.steps = {cell: WholeModel(result) for cell, result in zip(requests, results, strict=True)}
    return counted


# -- what is read off a step --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A line of the paper's table, in bytes.

    Attributes:
        trainable: parameters of the largest group.
        weights: with those masters that are on the device while the largest group is updated.
        gradients: of the largest group, as the paper counts them, in fp32.
        gradients_held: as the engine holds them without accumulation, in the weights' dtype.
        states: of the largest group.
        residual: the most activations and temporaries, of all places in forward and backward.
        peak: the highest of forward, backward and update, over all groups.
    """

    trainable: int
    weights: int
    gradients: int
    gradients_held: int
    states: int
    residual: int
    peak: int

    @property
    def pgs(self) -> int:
        return self.weights + self.gradients + self.states


def row(counted: Counted, method: str, precision: str, optimizer: str) -> Row:
    """What the paper's table has for ``precision`` (its own word), from the cells that were run."""
    if (method, precision) == ("HiFT", MIXED):
        return _mixed_from_mixed_hi(counted, optimizer)
    run = FP32 if precision == FP32 else MIXED_HI
    steps = counted.steps[Cell(method, run, optimizer)]
    index = counted.largest_group if method == "HiFT" else 0
    largest = steps.step(index)
    masters = counted.steps[Cell(method, run, "SGD")].step(index).state_bytes  # all that SGD keeps
    in_fp32 = counted.steps[Cell(method, run, "AdamW", micro_batches=2)] if (method, run) != ("HiFT", FP32) else steps
    return Row(
        trainable=counted.structure.group_numels[index] if method == "HiFT" else counted.numel,
        weights=largest.categories["weights"] + masters,
        gradients=_at_update(in_fp32.step(index))["gradients"],
        gradients_held=_at_update(largest)["gradients"],
        states=largest.state_bytes - masters,
        residual=max(_residual(steps.step(i)) for i in steps.known()),
        peak=worst_step(steps).peak_bytes,
    )


def peak_with_gradients_kept(counted: Counted, precision: str) -> int:
    """Of FPFT with AdamW whose gradients stay from step to step: the second of two accumulated micro-batches."""
    return worst_step(counted.steps[Cell("FPFT", FP32 if precision == FP32 else MIXED_HI, micro_batches=2)]).peak_bytes


def _mixed_from_mixed_hi(counted: Counted, optimizer: str) -> Row:
    """Standard mixed precision for HiFT: what mixed_hi needs, and beside it the masters of the groups at rest."""
    hi, everything = (row(counted, *which, optimizer) for which in (("HiFT", MIXED_HI), ("FPFT", MIXED)))
    peak = _with_all_masters(counted, counted.steps[Cell("HiFT", MIXED_HI, optimizer)])
    return replace(hi, weights=everything.weights, peak=peak)


def _with_all_masters(counted: Counted, steps: Steps) -> int:
    """The peak of a mixed_hi run if the masters of the groups at rest were on the device too."""
    masters = counted.steps[Cell("FPFT", MIXED_HI, "SGD")].step(0).state_bytes
    own = counted.steps[Cell("HiFT", MIXED_HI, "SGD")]
    return max(
        num_bytes + masters - (own.step(i).state_bytes if phase == "update" else 0)
        for i in steps.known()
        for phase, num_bytes in steps.step(i).phases.items()
    )


def _at_update(step: GroupStep) -> Bytes:
    return max(
        (sums for place, sums in step.places.items() if place.startswith("update")),
        key=lambda s: s["gradients"],
    )


def _residual(step: GroupStep) -> int:
    """The most that is alive beside weights, gradients and states where some place of forward or backward is
    highest."""
    return max(
        s["activations"] + s["temporaries"] for place, s in step.places.items() if not place.startswith("update")
    )


# -- the page -----------------------------------------------------------------------------------------------------


def write_page(found: dict[str, Counted], optimizers: Sequence[str], command: str, plot: str) -> str:
    """The sections of the template for which the counts are there, filled in."""
    sections = ["setting", "states", "peaks", "average"]
    values = _setting(found, command, plot) | _checks(found, optimizers) | _average(found)
    values |= {"states_table": _states_table(found, optimizers), "peaks_table": _peaks_table(found, optimizers)}
    if LLAMA in found:
        sections.append("beside")
        values |= _beside_the_paper(found[LLAMA], optimizers)
        if total_cell("HiFT", FP32, 6, True) in found[LLAMA].steps:
            sections.append("totals")
            values |= _totals(found[LLAMA]) | {"claims_table": _claims(found[LLAMA])}
    if len(found) == len(MODELS):
        sections.append("all")
    parts = re.split(r"<!-- (\w+) -->\n", TEMPLATE.read_text(encoding="utf-8"))[1:]
    kept = [text for name, text in zip(parts[::2], parts[1::2], strict=True) if name in sections]
    return Template("".join(kept)).substitute(values)


def _setting(found: dict[str, Counted], command: str, plot: str) -> dict[str, object]:
    eager = ", ".join(c.model.title for c in found.values() if not c.structure.has_fused_attention)
    return {
        "command": command,
        "plot": plot,
        "batch": BATCH,
        "length": LENGTH,
        "eager": f" (except {eager}, for which transformers has none)" if eager else "",
        "heads": ",\n".join(f"{c.model.title} as `{c.model.head}`" for c in found.values()),
    }


def _states_table(found: dict[str, Counted], optimizers: Sequence[str]) -> str:
    states = " | ".join(f"Sta {optimizer}" for optimizer in optimizers)
    lines = [
        f"| model | precision | method | trainable | Para | Gra | held | {states} | PGS |",
        "|---|---|---|" + "--:|" * (5 + len(optimizers)),
    ]
    for counted in found.values():
        for method, precision in ROWS:
            first = row(counted, method, precision, optimizers[0])
            states_of = [row(counted, method, precision, o).states for o in optimizers]
            cells = [
                _millions(first.trainable),
                *(_mib(n) for n in (first.weights, first.gradients, first.gradients_held, *states_of)),
                _gib(first.pgs),
            ]
            lines.append(f"| {counted.model.title} | {precision} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _peaks_table(found: dict[str, Counted], optimizers: Sequence[str]) -> str:
    lines = [
        f"| model | precision | method | Residual | {' | '.join(optimizers)} | saved, AdamW | AdamW, kept | saved |",
        "|---|---|---|" + "--:|" * (4 + len(optimizers)),
    ]
    for counted in found.values():
        for method, precision in ROWS:
            rows = [row(counted, method, precision, o) for o in optimizers]
            saved, saved_kept = "", ""
            if method == "HiFT":
                full = row(counted, "FPFT", FP32 if precision == FP32 else MIXED, "AdamW").peak
                saved, saved_kept = (
                    _percent(1 - rows[0].peak / other) for other in (full, peak_with_gradients_kept(counted, precision))
                )
            kept = _gib(peak_with_gradients_kept(counted, precision)) if method == "FPFT" else ""
            cells = [_gib(rows[0].residual), *(_gib(r.peak) for r in rows), saved, kept, saved_kept]
            lines.append(f"| {counted.model.title} | {precision} | {method} | {' | '.join(cells)} |")
        full, hift = (worst_step(counted.steps[Cell(method, AUTOCAST)]) for method in ("FPFT", "HiFT"))
        for method, step in (("FPFT", full), ("HiFT", hift)):
            saved = _percent(1 - hift.peak_bytes / full.peak_bytes) if method == "HiFT" else ""
            cells = [_gib(_residual(step)), _gib(step.peak_bytes), *[""] * (len(optimizers) - 1), saved, "", ""]
            lines.append(f"| {counted.model.title} | autocast | {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _checks(found: dict[str, Counted], optimizers: Sequence[str]) -> dict[str, object]:
    """What the tables take for granted, tested on the counts."""
    spread, derived, prefetch = 0.0, 0.0, []
    for counted in found.values():
        for method, run in (("FPFT", FP32), ("HiFT", FP32), ("FPFT", MIXED_HI), ("HiFT", MIXED_HI)):
            residuals = [_residual(worst_step(counted.steps[Cell(method, run, o)])) for o in optimizers]
            spread = max(spread, max(residuals) / min(residuals) - 1)
        resident = worst_step(counted.steps[Cell("HiFT", MIXED_HI, "SGD", resident=True)]).peak_bytes
        derived = max(derived, abs(row(counted, "HiFT", MIXED, "SGD").peak / resident - 1))
        ways = [worst_step(counted.steps[Cell("HiFT", MIXED_HI, prefetch=on)]).peak_bytes for on in (False, True)]
        prefetch.append(f"{counted.model.title} {_gib(ways[0])} -> {_gib(ways[1])}")
    return {
        "num_optimizers": len(optimizers),
        "spread": f"{spread:.2%}",
        "derived": f"{derived:.2%}",
        "prefetch": ";\n  ".join(prefetch),
    }


def _beside_the_paper(counted: Counted, optimizers: Sequence[str]) -> dict[str, object]:
    lines = ["| optimizer | precision | method | Para | Gra | Sta | PGS |", "|---|---|---|--:|--:|--:|--:|"]
    largest: dict[str, tuple[float, float]] = {}
    for optimizer in optimizers:
        for key in ROWS:
            ours = row(counted, *key, optimizer)
            para, gra = PAPER_WEIGHTS[key]
            sta, pgs, _ = PAPER_STATES[optimizer][key]
            pairs = {"Para": (ours.weights / MIB, para), "Gra": (ours.gradients / MIB, gra),
                     "Sta": (ours.states / MIB, sta), "PGS": (ours.pgs / GIB, pgs)}  # fmt: skip
            for name, (a, b) in pairs.items():
                difference = abs(round(a, 2) - b)
                if difference > largest.get(name, (-1.0, 0.0))[0]:
                    largest[name] = (difference, difference / b if b else 0.0)
            cells = " | ".join(f"{a:.2f} / {b:.2f}" for a, b in pairs.values())
            lines.append(f"| {optimizer} | {key[1]} | {key[0]} | {cells} |")
    return {
        "beside_table": "\n".join(lines),
        "worst": ", ".join(f"{name} {a:.2f} ({b:.0e})" if a else f"{name} none" for name, (a, b) in largest.items()),
        "numel": f"{counted.numel:,}",
        "exact": f"{4 * counted.numel / MIB:.2f}",
        "parameters": _millions(counted.numel),
        "largest": _millions(max(counted.structure.group_numels)),
    }


def _totals(counted: Counted) -> dict[str, object]:
    columns = " | ".join(f"{batch} x {LENGTH}, {'eager' if eager else 'fused'}" for batch, eager in TOTALS)
    lines = [f"| precision | method | theirs | {columns} |", "|---|---|--:|" + "--:|" * len(TOTALS)]
    ours: dict[tuple[str, str], list[int]] = {}
    for key in ROWS:
        runs = [counted.steps[total_cell(*key, *which)] for which in TOTALS]
        is_derived = key == ("HiFT", MIXED)
        ours[key] = [_with_all_masters(counted, run) if is_derived else worst_step(run).peak_bytes for run in runs]
        theirs = PAPER_STATES["AdamW"][key][2]
        cells = " | ".join(f"{n / GIB:.2f} ({n / GIB / theirs - 1:+.1%})" for n in ours[key])
        lines.append(f"| {key[1]} | {key[0]} | {theirs:.2f} | {cells} |")
    for hift, full in ((FP32, FP32), (MIXED, MIXED), (MIXED_HI, MIXED)):
        theirs = 1 - PAPER_STATES["AdamW"]["HiFT", hift][2] / PAPER_STATES["AdamW"]["FPFT", full][2]
        shares = [_percent(1 - a / b) for a, b in zip(ours["HiFT", hift], ours["FPFT", full], strict=True)]
        lines.append(f"| saved, {hift} | against FPFT {full} | {_percent(theirs)} | {' | '.join(shares)} |")
    freed = 1 - row(counted, "HiFT", FP32, "AdamW").peak / row(counted, "FPFT", FP32, "AdamW").peak
    return {"totals_table": "\n".join(lines), "freed": _percent(freed)}


def _claims(counted: Counted) -> str:
    lines = [
        "| claim | precision | card | batch x length | fused | eager | largest batch at that length, fused |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for claim in CLAIMS:
        fused, eager = (worst_step(counted.steps[claim.cell(e)]).peak_bytes for e in (False, True))
        more = (claim.batch + 1, counted.steps[_one_more(claim)])
        largest = Slope(((claim.batch, counted.steps[claim.cell(False)]), more)).largest(claim.card_gib * GIB)
        asked = f"{claim.where} | {claim.precision} | {claim.card_gib} | {claim.batch} x {claim.length}"
        lines.append(f"| {asked} | {_gib(fused)} | {_gib(eager)} | {largest} |")
    return "\n".join(lines)


def _one_more(claim: Claim) -> Cell:
    return replace(claim.cell(eager=False), batch=claim.batch + 1)


def _average(found: dict[str, Counted]) -> dict[str, object]:
    shares = {name: 1 - max(c.structure.group_numels) / c.numel for name, c in found.items()}
    per_step = {name: 1 - 1 / c.structure.num_groups for name, c in found.items()}
    weighted = 1 - sum(max(c.structure.group_numels) for c in found.values()) / sum(c.numel for c in found.values())
    lines = [
        "| model | parameters | groups | largest group | its parameters | fewer | fewer, mean over a cycle |",
        "|---|--:|--:|---|--:|--:|--:|",
    ]
    for name, counted in found.items():
        index, structure = counted.largest_group, counted.structure
        group = f"{structure.group_names[index]} | {_millions(structure.group_numels[index])}"
        fewer = f"{_percent(shares[name], 2)} | {_percent(per_step[name], 2)}"
        lines.append(f"| {name} | {_millions(counted.numel)} | {structure.num_groups} | {group} | {fewer} |")
    mean, cycle = (_percent(sum(part.values()) / len(part), 2) for part in (shares, per_step))
    lines.append(f"| mean over models | | | | | **{mean}** | {cycle} |")
    return {
        "average_table": "\n".join(lines),
        "paper_average": PAPER_AVERAGE,
        "mean": mean,
        "weighted": _percent(weighted, 2),
        "cycle": cycle,
    }


def _millions(numel: int) -> str:
    return f"{numel / 1e6:.2f}M"


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / MIB:.2f}"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f}"


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


# -- the picture --------------------------------------------------------------------------------------------------

PARTS = {
    "weights and masters": "#4c78a8",
    "states": "#f2a65a",
    "gradients": "#6aa84f",
    "activations and temporaries": "#b8c4d0",
}
INK = "#1f2933"


def draw(found: dict[str, Counted], path: Path) -> None:
    """One panel a model: what is alive at the peak, AdamW; for LLaMA-2-7B the paper's totals beside it."""
    from matplotlib.figure import Figure

    columns = min(len(found), 3)
    lines = -(-len(found) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * lines + 0.9), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False)
    for axes, counted in zip(panels.flat, found.values(), strict=False):
        _draw_model(axes, counted)
    handles, labels = panels.flat[0].get_legend_handles_labels()
    if LLAMA in found:
        more = panels.flat[list(found).index(LLAMA)].get_legend_handles_labels()
        handles, labels = more
    figure.legend(handles, labels, loc="outside lower center", ncols=2 if columns < 3 else 3, frameon=False, fontsize=9)
    figure.suptitle(
        f"Peak memory on the device, AdamW, {BATCH} x {LENGTH} tokens, GiB (counted)", fontsize=12, color=INK
    )
    figure.savefig(path, dpi=130)


def _draw_model(axes: Any, counted: Counted) -> None:
    names = [f"{method}\n{precision}" for method, precision in ROWS]
    bottoms = [0.0] * len(ROWS)
    parts = [_parts_at_peak(counted, *key) for key in ROWS]
    for name, colour in PARTS.items():
        heights = [part[name] / GIB for part in parts]
        axes.bar(names, heights, bottom=bottoms, color=colour, label=name, width=0.66)
        bottoms = [a + b for a, b in zip(bottoms, heights, strict=True)]
    for i, top in enumerate(bottoms):
        axes.annotate(
            f"{top:.1f}",
            (i, top),
            ha="center",
            va="top",
            fontsize=9,
            color=INK,
            xytext=(0, -3),
            textcoords="offset points",
        )
    full = [i for i, (method, _) in enumerate(ROWS) if method == "FPFT"]
    kept = [peak_with_gradients_kept(counted, ROWS[i][1]) / GIB for i in full]
    heights = [high - bottoms[i] for i, high in zip(full, kept, strict=True)]
    outline = {"fill": False, "edgecolor": INK, "linestyle": ":", "width": 0.66}
    label = "FPFT, gradients kept from step to step"
    axes.bar(full, heights, bottom=[bottoms[i] for i in full], label=label, **outline)
    top = max(*bottoms, *kept)
    if counted.model.title == LLAMA:
        theirs = [PAPER_STATES["AdamW"][key][2] for key in ROWS]
        axes.plot(
            range(len(ROWS)),
            theirs,
            "_",
            color="#c92a2a",
            markersize=20,
            markeredgewidth=2,
            label="paper's total (batch not stated)",
        )
        top = max(top, *theirs)
    axes.set_title(f"{counted.model.title}, {counted.numel / 1e9:.2f} B", fontsize=10, color=INK)
    axes.set_ylim(0, 1.12 * top)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _parts_at_peak(counted: Counted, method: str, precision: str) -> dict[str, int]:
    run = FP32 if precision == FP32 else MIXED_HI
    step = worst_step(counted.steps[Cell(method, run)])
    alive = step.categories
    weights, states = alive["weights"], alive["states"]
    if method == "FPFT" and precision == MIXED:  # resident: masters are among what the store holds
        masters = counted.steps[Cell("FPFT", run, "SGD")].step(0).state_bytes
        weights, states = weights + masters, states - masters
    if (method, precision) == ("HiFT", MIXED):
        peak = row(counted, method, precision, "AdamW").peak
        weights = weights + peak - step.peak_bytes
    return {
        "weights and masters": weights,
        "states": states,
        "gradients": alive["gradients"],
        "activations and temporaries": alive["activations"] + alive["temporaries"],
    }


# -- the program --------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two models, three optimizers; needs --out")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "paper_memory.md")
    parser.add_argument("--plot", type=Path, help="default: beside the page")
    args = parser.parse_args(argv)
    if args.quick and args.out == parser.get_default("out"):
        parser.error("--quick would replace the whole page; give it another --out")
    args.plot = args.plot or args.out.with_suffix(".png")
    return args


def _cpu_minutes() -> float:
    """Of this process and those that it has waited for."""
    own, others = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in (own, others)) / 60


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    optimizers = QUICK_OPTIMIZERS if args.quick else tuple(OPTIMIZERS)
    found: dict[str, Counted] = {}
    for model in MODELS:
        if args.quick and model.title not in QUICK_MODELS:
            continue
        cells = main_cells(optimizers)
        if model.title == LLAMA and not args.quick:
            cells += [total_cell(*key, *which) for key in TOTAL_CELLS for which in TOTALS]
            cells += [cell for claim in CLAIMS for cell in (claim.cell(False), claim.cell(True), _one_more(claim))]
        with tempfile.TemporaryDirectory() as folder:
            found[model.title] = count(model, cells, folder)
        print(
            f"{model.title}: {len(found[model.title].steps)} runs, {_cpu_minutes():.1f} CPU minutes so far",
            flush=True,
        )
    command = shlex.join(["python", "benchmarks/paper_memory.py", *(["--quick"] if args.quick else [])])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(write_page(found, optimizers, command, args.plot.name))
    draw(found, args.plot)
    print(f"wrote {args.out} and {args.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
