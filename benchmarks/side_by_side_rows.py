"""The rows of `side_by_side.py`: ways of training and workloads, and the file of what was measured of them."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import forked_steps as forked

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
STAGES = ("steps", "memory", "counted", "table")
MIXED, BF16, FP32 = "bf16, fp32 masters", "bf16, stochastic rounding", "fp32"
FULL = "torch AdamW, fused (full fine-tuning)"
GOAL = 1.05
PACKAGES = {"badam": "badam", "lora": "peft", "galore": "galore-torch", "lomo": "lomo-optim"}


@dataclass(frozen=True)
class Workload:
    """What a step of a shape does.

    Attributes:
        rows, length: of a batch.
        groups: layer groups that are timed, of one layer and of four.
        turns: of each row, after one that is not counted.
        ours: substrings of the names of ours that are run; none for all.
        recompute: blocks keep no activations but compute them again in backward.
    """

    rows: int
    length: int
    groups: dict[int, int]
    turns: int
    ours: tuple[str, ...] = ()
    recompute: bool = False


_OURS_7B = (
    f"1 layer, {MIXED}, device, after", f"1 layer, {MIXED}, host, ", f"4 layers, {MIXED}, host",
    f"all layers, {MIXED}, device, after", f"all layers, {MIXED}, host", "LISA's", "least memory",
)  # fmt: skip
WORKLOADS = {
    "tiny": Workload(1, 16, {1: 2, 4: 1}, 2),
    "135m": Workload(2, 128, {1: 4, 4: 3}, 3),
    "1b": Workload(1, 128, {1: 3, 4: 2}, 2, (
        f"1 layer, {MIXED}", f"1 layer, {BF16}, host, after", f"1 layer, {FP32}, host, after",
        f"4 layers, {MIXED}, host", f"all layers, {MIXED}, disk", f"all layers, {MIXED}, device, after",
        "least memory", "2 ranks",
    )),
    # Peaks alone, counted: two cores do not take its steps.
    "7b": Workload(1, 1024, {}, 0, _OURS_7B),
    "7b_recomputed": Workload(8, 512, {}, 0, _OURS_7B, recompute=True),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Row:
    """A way of training.

    Attributes:
        name: in the page.
        method: a key of ``MAKERS``.
        group: layers that train in a step, a number or "all"; rows of the same group and precision share a limit.
        settings: of the method.
        states: every weight is trained by Adam with fp32 masters (or in fp32).
        peer: trains by groups and is not ours.
        against: the name of the row of ours that does the same, for peers that train by groups.
        ranks: gloo processes.
    """

    name: str
    method: str
    group: int | str
    precision: str = MIXED
    settings: dict[str, Any] = field(default_factory=dict)
    states: bool = True
    peer: bool = False
    against: str = ""
    ranks: int = 1


def layers(group: int | str) -> str:
    """How a group's size is called."""
    return "all layers" if group == "all" else f"{group} layer{'s' if group != 1 else ''}"


def limit_of(row: Row) -> str:
    """The name of the bare loop with the same layers and arithmetic."""
    return FULL if (row.group, row.precision) == ("all", MIXED) else f"bare loop, {layers(row.group)}, {row.precision}"


RESIDENCIES: dict[str, dict[str, Any]] = {
    "device": {"residency": "device"},
    "host": {"residency": "host", "slots": 2},
    "disk": {"residency": "disk", "slots": 2},
}
PRECISIONS: dict[str, dict[str, Any]] = {
    MIXED: {}, BF16: {"master_weights": False, "stochastic_rounding": True}, FP32: {},
}  # fmt: skip
LEAN = {
    "state": {"residency": "disk", "prefetch": False, "slice_numel": 1 << 22},
    "activations": {"checkpointing": True, "chunked_loss": True},
}
LISA = {"group_size": 2, "order": "random", "reshuffle": True, "always_active": [r"embed|lm_head|^model\.norm"]}
LISA_OURS = "ours, LISA's layers (2 and both ends), device"
STAGE_3_OURS = "ours, 1 layer, stage 3, 2 ranks"


def _ours() -> Iterator[Row]:
    for group in (1, 4, "all"):
        for precision, block in PRECISIONS.items():
            for residency, state in RESIDENCIES.items():
                for update in ("after_backward", "in_backward"):
                    name = f"ours, {layers(group)}, {precision}, {residency}, {update.replace('_', ' ')}"
                    settings = {"group_size": group, "update": update, "state": state, **block}
                    yield Row(name, "hift", group, precision, settings, states=precision != BF16)
    alone = {"group_size": 1, "state": {"residency": "host", "prefetch": False}}
    yield Row(f"ours, 1 layer, {MIXED}, host, without prefetch", "hift", 1, MIXED, alone)
    yield Row("ours, 1 layer, least memory", "hift", 1, MIXED, {"group_size": 1, **LEAN})
    settings = {"group_size": "all", "update": "in_backward", **LEAN}
    yield Row("ours, all layers, least memory", "hift", "all", MIXED, settings)
    yield Row(LISA_OURS, "hift", "lisa", MIXED, {"state": RESIDENCIES["device"], **LISA})
    yield Row(STAGE_3_OURS, "hift", "ranks", MIXED, {"group_size": 1, "stage": 3}, ranks=2)


def _peers() -> Iterator[Row]:
    yield Row("DeepSpeed ZeRO-0", "deepspeed", "all", settings={"stage": 0})
    yield Row("DeepSpeed ZeRO-2", "deepspeed", "all", settings={"stage": 2})
    yield Row("DeepSpeed ZeRO-Offload", "deepspeed", "all", settings={"stage": 2, "offload": True})
    for group in (1, 4):
        same = f"ours, {layers(group)}, {MIXED}, device, after backward"
        yield Row(f"BAdam, {layers(group)}", "badam", group, peer=True, against=same, states=False)
    yield Row("LISA (its rule: 2 blocks and both ends)", "lisa", "lisa", peer=True, against=LISA_OURS)
    yield Row("LoRA, rank 16", "lora", "lora", states=False)
    yield Row("GaLore, rank 128", "galore", "galore", states=False)
    yield Row("LOMO", "lomo", "lomo", states=False)
    yield Row("DeepSpeed ZeRO-3, 2 ranks", "deepspeed", "ranks", settings={"stage": 3}, ranks=2)
    yield Row("BAdam with ZeRO-3, 2 ranks", "badam", "ranks", settings={"stage": 3}, peer=True, against=STAGE_3_OURS,
              ranks=2, states=False)  # fmt: skip


OURS, PEERS = tuple(_ours()), tuple(_peers())
LIMITS = tuple(Row(limit_of(row), "bare", row.group, row.precision)
               for row in {limit_of(r): r for r in OURS if r.group in (1, 4, "all")}.values())  # fmt: skip
ROWS = {row.name: row for row in (*LIMITS, *PEERS, *OURS)}


def rows_of(shape: str, only: Sequence[str] = ()) -> list[Row]:
    """The rows that are run for a shape, limits left out."""
    kept = WORKLOADS[shape].ours
    chosen = [*PEERS, *(row for row in OURS if not kept or any(word in row.name for word in kept))]
    return [row for row in chosen if not only or any(word in row.name for word in only)]


# By shape and row, why it is not even tried.
NOT_TRIED = {
    ("1b", "GaLore, rank 128"): "the decompositions of its first step, 154 matrices of up to 2048 x 5632, take "
    "longer than everything else here",
}  # fmt: skip


def numels(shape: str) -> tuple[int, int]:
    model = forked.on_meta(shape)
    return sum(p.numel() for p in model.parameters()), sum(p.numel() for p in forked.blocks_of(model)[0].parameters())


# -- lines ---------------------------------------------------------------------------------------------------------


class Lines:
    """What was measured: a JSON line for each row of a shape and a stage, in a file that is only appended to."""

    def __init__(self, path: Path, shape: str, quick: bool) -> None:
        self.path, self.shape, self.quick = path, shape, quick
        self.found: list[dict[str, Any]] = []
        for line in path.read_text().splitlines() if path.is_file() else []:
            try:
                self.found.append(json.loads(line))
            except json.JSONDecodeError:  # a kill cut it short
                continue

    def has(self, stage: str, row: Row) -> bool:
        return self.get(stage, row.name) is not None

    def get(self, stage: str, name: str) -> dict[str, Any] | None:
        """The last line of that row."""
        key = (stage, self.shape, self.quick, name)
        return next(
            (x for x in reversed(self.found) if (x["stage"], x["shape"], x["quick"], x["row"]) == key), None
        )  # fmt: skip

    def add(self, stage: str, row: Row, **values: Any) -> None:
        work = WORKLOADS[self.shape]
        line = {
            "stage": stage, "shape": self.shape, "quick": self.quick, "row": row.name, **values,
            "batch": f"{work.rows} x {work.length}", "where": where(row), "date": time.strftime("%Y-%m-%d"),
        }  # fmt: skip
        self.found.append(line)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")


def where(row: Row) -> dict[str, Any]:
    """Machine and versions."""
    names = ["torch", "transformers", "deepspeed", *([PACKAGES[row.method]] if row.method in PACKAGES else [])]
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    return {"machine": platform.machine(), "cores": os.cpu_count(), "threads": threads, "load": os.getloadavg()[0],
            "versions": versions}  # fmt: skip
