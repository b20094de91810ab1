"""Counted peaks against the allocator's: real steps of the real engine with a 106M LLaMA on the CPU.

    python benchmarks/memory_against_allocator.py                 a few minutes on one core, 4 GiB

Each setting trains one layer group twice in a process of its own, with random weights; torch's profiler records
every allocation from the building of the engine on, and the highest sum within the two steps is the measure. On a CPU
the states at rest share the memory that is measured, so their bytes are taken off. Beside it stands what
``hift_ds.forecast.setting`` counts for the same setting on a device that has no memory.

Writes benchmarks/results/memory_against_allocator.md (``--out``).
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hift_ds.forecast.setting import GroupStep, Setting  # noqa: E402
from hift_ds.forecast.simulator import simulate  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "memory_against_allocator.md"
MIB = 2**20
WITHIN = 0.01
M106 = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 12,
        "num_key_value_heads": 12}  # fmt: skip
EMBEDDING, LOWEST, MIDDLE, HEAD = 0, 1, 4, 9  # layer groups of it
ADAMW = ("AdamW", {"lr": 1e-4})


@dataclass(frozen=True)
class Case:
    """A setting with the layer group that trains."""

    setting: Setting
    group: int


def case(
    precision: str,
    group: int,
    hift: dict[str, Any] | None = None,
    optimizer: tuple[str, dict] = ADAMW,
    **options: Any,
) -> Case:
    """2 x 256 tokens unless ``options`` says otherwise; ``hift`` is the block."""
    config: dict[str, Any] = {
        "optimizer": {"type": optimizer[0], "params": optimizer[1]},
        "gradient_clipping": 1.0,
        "hift": dict(hift or {}),
    }
    if precision in ("mixed_hi", "bf16"):
        config["bf16"] = {"enabled": True}
        config["hift"]["master_weights"] = precision == "mixed_hi"
    elif precision == "mixed":
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    dtype = "float32" if precision in ("fp32", "mixed") else "bfloat16"
    return Case(Setting("", config, dtype, **{"batch": 2, "length": 256, **options}), group)


CASES = {
    "fp32, embedding": case("fp32", EMBEDDING),
    "fp32, middle block": case("fp32", MIDDLE),
    "fp32, head": case("fp32", HEAD),
    "fp32, checkpointing": case("fp32", LOWEST, {"activations": {"checkpointing": True}}),
    "fp32, chunked loss": case("fp32", EMBEDDING, {"activations": {"chunked_loss": True}}),
    "fp32, scores held (eager attention)": case("fp32", EMBEDDING, eager_attention=True),
    "fp32, Adafactor": case("fp32", LOWEST, optimizer=("Adafactor", {"lr": 1e-3})),
    "fp32, every weight at once (full fine-tuning)": case(
        "fp32", 0, {"group_size": 1 << 30, "state": {"residency": "device"}}
    ),
    "mixed (autocast), middle block": case("mixed", MIDDLE),
    "mixed (autocast), checkpointing, chunked loss": case(
        "mixed", LOWEST, {"activations": {"checkpointing": True, "chunked_loss": True}}
    ),
    "bf16 with masters, lowest block": case("mixed_hi", LOWEST),
    "bf16 with masters, checkpointing, chunked loss, slices": case(
        "mixed_hi",
        EMBEDDING,
        {"activations": {"checkpointing": True, "chunked_loss": True}, "state": {"slice_numel": 1 << 21}},
    ),
    "bf16 with masters, states resident, two micro-batches": case(
        "mixed_hi", MIDDLE, {"state": {"residency": "device"}}, micro_batches=2
    ),
    "bf16 without masters, SGD with momentum, three blocks a group": case(
        "bf16", LOWEST, {"group_size": 3}, ("SGD", {"lr": 1e-3, "momentum": 0.9})
    ),
}  # fmt: skip


@contextlib.contextmanager
def model_folder(**shape: int) -> Iterator[str]:
    """A folder with the config of a LLaMA of that shape."""
    import model_zoo

    with tempfile.TemporaryDirectory() as folder:
        model_zoo.config("llama2_7b", **shape).save_pretrained(folder)
        yield folder


@dataclass(frozen=True)
class Row:
    name: str
    step: GroupStep
    predicted_bytes: int  # on a device of its own
    measured_bytes: int  # with the states at rest, which share the CPU's memory
    parked_bytes: int  # these

    @property
    def error(self) -> float:
        """Of the prediction, relative to what was measured besides the states at rest."""
        return self.predicted_bytes / (self.measured_bytes - self.parked_bytes) - 1


def compare(cases: dict[str, Case], shape: dict[str, int]) -> list[Row]:
    """Each case, counted and measured.

    Raises:
        SystemExit: there is an accelerator: ``hift-ds estimate --probe`` and tests/gpu compare on one.
    """
    from hift_ds.cli.probe import measure

    rows = []
    with model_folder(**shape) as folder:
        settings = [replace(case.setting, model=folder, groups=(case.group,)) for case in cases.values()]
        for (name, setting), result in zip(zip(cases, settings, strict=True), simulate(settings), strict=True):
            measured = measure(setting)
            if measured["device"] != "cpu":
                raise SystemExit("this compares with the CPU's allocator; hide the accelerator (CUDA_VISIBLE_DEVICES=)")
            (step,) = result.steps
            rows.append(Row(name, step, step.peak_bytes, measured["peak_bytes"], measured["parked_bytes"]))
            print(f"{name}: {rows[-1].error:+.3%}", file=sys.stderr, flush=True)
    return rows


def report(rows: list[Row]) -> str:
    import torch
    import transformers

    lines = [
        "# Counted peaks against the allocator's",
        "",
        "Written by `python benchmarks/memory_against_allocator.py`: a LLaMA of 106 M parameters (8 blocks, random "
        "weights),",
        f"2 x 256 tokens, on the CPU ({platform.machine()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}). Measured: the",
        "highest sum of allocations that torch's profiler recorded within two steps of one layer group, less the "
        "states at rest,",
        "since a CPU has one memory for all. Counted: the same setting on the fake device.",
        "",
        "| setting | group | counted, MiB | measured, MiB | off by | at rest, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        group = f"{row.step.index} ({row.step.name})"
        lines.append(
            f"| {row.name} | {group} | {row.predicted_bytes / MIB:.1f} | "
            f"{(row.measured_bytes - row.parked_bytes) / MIB:.1f} | {row.error:+.3%} | {row.parked_bytes / MIB:.1f} |"
        )
    worst = max(abs(row.error) for row in rows)
    lines += ["", f"Largest difference: {worst:.3%}; the aim is {WITHIN:.0%}."]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    text = report(compare(CASES, M106))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
