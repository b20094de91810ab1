"""What is counted for the HiFT paper's memory claims (benchmarks/paper_memory.py), and what is read off a step."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import model_zoo  # noqa: E402
from benchmarks.counting import AUTOCAST, FP32, MIXED_HI, results, setting  # noqa: E402
from hift_ds.forecast.setting import GroupStep, Setting  # noqa: E402
from hift_ds.forecast.steps import Request, Steps, Structure, WholeModel, read_structure, worst_step  # noqa: E402

BATCH, LENGTH = 8, 512
MIXED = "mixed"  # the paper's: for HiFT worked out, not run
FPFT, HIFT = "FPFT", "HiFT"
# Title, size in the zoo, the transformers class that the paper's task needs, and millions of parameters as the paper's
# accounting has them; what is built must agree.
MODELS = (
    ("RoBERTa-base", "roberta_base", "RobertaForSequenceClassification", 124.65),
    ("RoBERTa-large", "roberta_large", "RobertaForSequenceClassification", 355.36),
    ("GPT-2 large", "gpt2_large", "GPT2LMHeadModel", 774.03),
    ("GPT-Neo 2.7B", "gpt_neo_2_7b", "GPTNeoForCausalLM", 2651.31),
    (LLAMA := "LLaMA-2-7B", "llama2_7b", "LlamaForCausalLM", 6738.42),
    ("OPT-13B", "opt_13b", "OPTForCausalLM", 12853.47),
)
QUICK_MODELS, QUICK_OPTIMIZERS = ("RoBERTa-base", LLAMA), ("AdamW", "SGD", "Adafactor")
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    name: (name.replace("SGDM", "SGD"), {"lr": 1e-5, **({"momentum": 0.9} if name == "SGDM" else {})})
    for name in ("AdamW", "SGDM", "SGD", "Adafactor", "Adagrad")
}
ROWS = ((FPFT, FP32), (HIFT, FP32), (FPFT, MIXED), (HIFT, MIXED), (HIFT, MIXED_HI))

# The authors' table for LLaMA-2-7B, E2E, m = 1 (an image in their repository's README; also the paper's): MB of weights
# and of gradients, and by optimizer MB of states, GB of all three and GB in total. Batch and length are not stated.
PAPER_WEIGHTS = dict(zip(ROWS, ((25705.04, 25705.04), (25705.04, 772.03), (38557.56, 25705.04), (38557.56, 772.03),
                                (13624.53, 772.03)), strict=True))  # fmt: skip
_TOTAL = {"AdamW": (142.11, 55.41, 145.50, 61.54, 36.57), "SGDM": (117.01, 55.41, 120.40, 61.54, 36.57),
          "SGD": (91.93, 55.41, 95.30, 61.54, 36.57), "Adafactor": (91.94, 55.41, 95.31, 61.54, 36.57)}  # fmt: skip
_STATES = {"AdamW": (51410.08, 1544.06, 51410.08, 1544.06, 1544.06), "SGD": (0.0,) * 5,
           "SGDM": (25705.04, 772.03, 25705.04, 772.03, 772.03),
           "Adafactor": (10.82, 0.33, 10.82, 0.33, 0.33)}  # fmt: skip
_PGS = {"AdamW": (100.41, 27.36, 112.96, 39.92, 15.57), "SGDM": (75.31, 26.61, 87.86, 39.16, 14.81),
        "SGD": (50.21, 25.86, 62.76, 38.41, 14.06), "Adafactor": (50.22, 25.86, 62.77, 38.41, 14.06)}  # fmt: skip
PAPER_STATES = {
    name: dict(zip(ROWS, zip(_STATES[name], _PGS[name], _TOTAL[name], strict=True), strict=True)) for name in _TOTAL
}
PAPER_STATES["Adagrad"] = PAPER_STATES["SGDM"]


# -- what is run ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One run of the engine.

    Attributes:
        method: ``FPFT`` (one group, states resident) or ``HIFT`` (one layer a group, states fetched for the update).
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
        is_here = self.method == FPFT or self.resident
        state = {"residency": "device"} if is_here else {"residency": "host", "prefetch": self.prefetch}
        return setting(
            folder, self.precision, self.batch, self.length,
            {"group_size": 1 if self.method == HIFT else 1 << 30, "state": state}, OPTIMIZERS[self.optimizer],
            micro_batches=self.micro_batches, eager_attention=self.eager,
            # Makes its states in the first update, beside the masters.
            visits=2 if self.optimizer == "Adafactor" else 1,
        )  # fmt: skip


def main_cells(optimizers: Iterable[str]) -> list[Cell]:
    """What every model is run with."""
    cells = [Cell(method, run, name) for name in optimizers for run in (FP32, MIXED_HI) for method in (FPFT, HIFT)]
    cells += [Cell(FPFT, FP32, micro_batches=2), Cell(FPFT, MIXED_HI, micro_batches=2)]
    cells += [Cell(HIFT, MIXED_HI, micro_batches=2), Cell(HIFT, MIXED_HI, "SGD", resident=True)]
    cells += [Cell(HIFT, FP32, prefetch=True), Cell(HIFT, MIXED_HI, prefetch=True)]
    return [*cells, Cell(FPFT, AUTOCAST), Cell(HIFT, AUTOCAST)]


# LLaMA-2-7B beside the paper's totals.
TOTALS = tuple((batch, eager) for eager in (False, True) for batch in (6, 8))


def total_cell(method: str, precision: str, batch: int, eager: bool) -> Cell:
    run = FP32 if precision == FP32 else MIXED_HI
    return Cell(method, run, micro_batches=2 if method == FPFT else 1, eager=eager, batch=batch)


# That LLaMA-2-7B with AdamW fits a card: GiB of the card, and who says so.
CLAIMS = (
    (48, Cell(HIFT, FP32, batch=1, length=512), "7B in fp32 on one A6000 (abstract; batch not stated)"),
    (48, Cell(HIFT, MIXED_HI, batch=8, length=512), "the authors' README"),
    (48, Cell(HIFT, MIXED_HI, batch=1, length=2800), "the authors' README"),
    (24, Cell(HIFT, MIXED_HI, batch=3, length=512), "the authors' README"),
    (24, Cell(HIFT, MIXED_HI, batch=1, length=1400), "the authors' README"),
)


def of_claim(cell: Cell) -> tuple[Cell, Cell, Cell]:
    """With fused and with eager attention, and with one row more."""
    return cell, replace(cell, eager=True), replace(cell, batch=cell.batch + 1)


def llama_cells() -> list[Cell]:
    """What LLaMA-2-7B is run with besides."""
    return [total_cell(*key, *which) for key in ROWS for which in TOTALS] + [
        c for _, x, _ in CLAIMS for c in of_claim(x)
    ]


@dataclass
class Counted:
    """The steps of one model, with the name of its class."""

    head: str
    structure: Structure
    steps: dict[Cell, Steps] = field(default_factory=dict)

    @property
    def numel(self) -> int:
        return sum(self.structure.group_numels)

    @property
    def largest_group(self) -> int:
        return max(range(self.structure.num_groups), key=self.structure.group_numels.__getitem__)

    @property
    def largest(self) -> int:
        """The number of parameters of the largest group."""
        return max(self.structure.group_numels)

    def worst(self, *cell: Any, **options: Any) -> GroupStep:
        """The step of :class:`Cell` ``(*cell, **options)`` with the highest peak."""
        return worst_step(self.steps[Cell(*cell, **options)])


def count(title: str, size: str, head: str, millions: float, cells: Sequence[Cell], rows: Path | None) -> Counted:
    """Every cell's steps of the groups that can be the worst: the embedding, the lowest block, the head."""
    config = model_zoo.config(size)
    config.architectures = [head]
    with tempfile.TemporaryDirectory() as ours:
        folder = ours if rows is None else str(rows.absolute().with_suffix(f".{size}"))  # a count is known by its name
        config.save_pretrained(folder)
        counted = Counted(head, read_structure(Cell(HIFT, FP32).setting(folder)))
        if round(counted.numel / 1e6, 2) != millions:
            raise SystemExit(f"{title}: {counted.numel / 1e6:.2f}M parameters, the paper's has {millions}M")
        cells = list(dict.fromkeys(cells))
        asked = [Request(cell.setting(folder), counted.structure, ends_only=True).to_simulate() for cell in cells]
        found = results([replace(one, second_update=one.visits == 1) for one in asked], rows=rows)
    counted.steps = dict(zip(cells, map(WholeModel, found), strict=True))
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
    """What the paper's table has for ``precision`` (its own word), from the cells that were run. Standard mixed
    precision for HiFT is what mixed_hi needs, and beside it the masters of the groups at rest."""
    if (method, precision) == (HIFT, MIXED):
        hi, everything = row(counted, HIFT, MIXED_HI, optimizer), row(counted, FPFT, MIXED, optimizer)
        peak = peak_with_all_masters(counted, counted.steps[Cell(HIFT, MIXED_HI, optimizer)])
        return replace(hi, weights=everything.weights, peak=peak)
    run = FP32 if precision == FP32 else MIXED_HI
    steps = counted.steps[Cell(method, run, optimizer)]
    index = counted.largest_group if method == HIFT else 0
    largest = steps.step(index)
    masters = counted.steps[Cell(method, run, "SGD")].step(index).state_bytes  # all that SGD keeps
    in_fp32 = steps if (method, run) == (HIFT, FP32) else counted.steps[Cell(method, run, micro_batches=2)]
    return Row(
        trainable=counted.structure.group_numels[index] if method == HIFT else counted.numel,
        weights=largest.categories["weights"] + masters,
        gradients=_gradients(in_fp32.step(index)),
        gradients_held=_gradients(largest),
        states=largest.state_bytes - masters,
        residual=max(residual(steps.step(i)) for i in steps.known()),
        peak=worst_step(steps).peak_bytes,
    )


def peak_with_gradients_kept(counted: Counted, precision: str) -> int:
    """Of FPFT with AdamW whose gradients stay from step to step: the second of two accumulated micro-batches."""
    return counted.worst(FPFT, FP32 if precision == FP32 else MIXED_HI, micro_batches=2).peak_bytes


def peak_with_all_masters(counted: Counted, steps: Steps) -> int:
    """The peak of a mixed_hi run if the masters of the groups at rest were on the device too."""
    masters = counted.steps[Cell(FPFT, MIXED_HI, "SGD")].step(0).state_bytes
    own = counted.steps[Cell(HIFT, MIXED_HI, "SGD")]
    return max(
        num_bytes + masters - (own.step(i).state_bytes if phase == "update" else 0)
        for i in steps.known()
        for phase, num_bytes in steps.step(i).phases.items()
    )


def _gradients(step: GroupStep) -> int:
    return max(sums["gradients"] for place, sums in step.places.items() if place.startswith("update"))


def residual(step: GroupStep) -> int:
    """The most that is alive beside weights, gradients and states where some place of forward or backward is
    highest."""
    beside = (sums for place, sums in step.places.items() if not place.startswith("update"))
    return max(sums["activations"] + sums["temporaries"] for sums in beside)
