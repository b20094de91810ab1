"""Peaks of full fine-tuning in the update in backward, counted on a fake device against what was aimed at.

    python benchmarks/in_backward_memory.py           some minutes on one core, no GPU, no weights

AdamW, bf16 weights with fp32 masters, every weight in every step; the real engine takes real steps (docs/memory.md).
Writes benchmarks/results/in_backward_memory.md (``--out``).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import counting  # noqa: E402
from benchmarks.counting import GIB, MIXED_HI  # noqa: E402
from hift_ds.forecast.setting import Setting  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "in_backward_memory.md"
STREAMED = {  # weights in host memory, a module's at a time on the device
    "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0,
}  # fmt: skip
ON_HOST = {"offload_param": {"device": "cpu", "pin_memory": False}}


def setting(
    model: str,
    batch: int,
    length: int,
    *,
    ranks: int = 1,
    zero: dict[str, Any] | None = None,
    offload: bool = False,
    slice_numel: int | None = 1 << 23,
    clipped: bool = True,
    micro_batches: int = 1,
) -> Setting:
    hift = {
        "update": "in_backward",
        "group_size": "all",
        "state": {"slots": 2, "slice_numel": slice_numel},
        "activations": {"checkpointing": True, "chunked_loss": True, "offload": offload},
    }
    deepspeed = {"zero_optimization": zero or {"stage": 0}, "gradient_clipping": float(clipped)}
    visits = 2 if zero else 1  # ZeRO-3 prefetches from the second on
    return counting.setting(
        model, MIXED_HI, batch, length, hift, deepspeed=deepspeed, world_size=ranks, visits=visits,
        micro_batches=micro_batches,
    )  # fmt: skip


# What, the setting, the goal in GiB if there is one.
ROWS: tuple[tuple[str, Setting, float | None], ...] = (
    ("LLaMA-2-7B, 1 x 1024", setting("llama2_7b", 1, 1024), 13.6),
    ("LLaMA-2-7B, 8 x 512, activations offloaded", setting("llama2_7b", 8, 512, offload=True), 14.4),
    (
        "LLaMA-2-7B, 1 x 1024, weights streamed",
        setting("llama2_7b", 1, 1024, zero={"stage": 3, **STREAMED, **ON_HOST}),
        4.0,
    ),
    (
        "Llama-3-70B, 1 x 1024, 8 ranks",
        setting("llama3_70b", 1, 1024, ranks=8, zero={"stage": 3, **STREAMED}),
        24.0,
    ),
    ("LLaMA-2-7B, 1 x 1024, no clipping", setting("llama2_7b", 1, 1024, clipped=False), 13.6),
    ("LLaMA-2-7B, 2 micro-batches of 1 x 1024", setting("llama2_7b", 1, 1024, micro_batches=2), None),
    (
        "LLaMA-2-7B, 2 micro-batches of 8 x 512, activations offloaded",
        setting("llama2_7b", 8, 512, offload=True, micro_batches=2),
        None,
    ),
    (
        "LLaMA-2-7B, 2 micro-batches of 1 x 1024, weights streamed",
        setting("llama2_7b", 1, 1024, zero={"stage": 3, **STREAMED, **ON_HOST}, micro_batches=2),
        None,
    ),
    ("LLaMA-2-7B, 8 x 512", setting("llama2_7b", 8, 512), None),
    ("LLaMA-2-7B, 1 x 1024, whole parts in slots", setting("llama2_7b", 1, 1024, slice_numel=None), None),
)

PAGE = """\
# Full fine-tuning in the update in backward: counted peaks

`python benchmarks/in_backward_memory.py`. AdamW, bf16 weights with fp32 masters, every weight in every step, blocks
recomputed, chunked loss, slices of 2^23 elements in two slots (or whole parts, whose transfers are hidden), clipped
exactly. Gradients that wait for the norm, and sums of micro-batches, which are fp32, rest in host memory; those that
are leaving or coming back are on the device (one that leaves alone, on one rank, counts among temporaries). Counted on
a fake device, not measured on a GPU; the driver's context and fragmentation come on top.

| model, batch x length | goal, GiB | peak, GiB | where | at the peak, GiB |
|---|---|---|---|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose names contain this; writes nothing")
    parser.add_argument("--rows", type=Path, help="a file of counts of this very code, which is read and added to")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    lines = []
    for name, asked, goal in ROWS:
        if args.only not in name:
            continue
        step = counting.results([asked], rows=args.rows)[0].steps[0]
        parts = ", ".join(f"{key} {value / GIB:.2f}" for key, value in step.categories.items())
        below = f"< {goal}" if goal else ""
        lines.append(f"| {name} | {below} | {step.peak_bytes / GIB:.2f} | {step.peak_place} | {parts} |")
        print(lines[-1], flush=True)
    if not args.only:
        args.out.write_text(PAGE + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
