"""What each way of clipping in backward costs and learns: full fine-tuning of a small model, held-out loss.

    python benchmarks/clipping.py --model SMOLLM2 --ways exact speculative per_part last_visit    minutes a way

The task is ``stdlib`` of ``benchmarks/methods`` (this Python's docstrings). All ways train on the same rows from the
same weights with the same rates. Prints a JSON line for each way, and a table of all lines in ``--lines``.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks" / "methods")]

import methods  # noqa: E402
import run  # noqa: E402
import tasks  # noqa: E402


def train(args: argparse.Namespace, way: str) -> dict[str, Any]:
    """One run."""
    spec = {"task": "stdlib", "max_length": args.length, "held_out": args.held_out, "seed": args.seed}
    model, task, pad = run.load(spec, args.model, None)
    batches = tasks.batches(task.train, args.batch, pad, args.seed)
    methods.CLIP = args.clip if way != "none" else 0.0
    block = {"update": "in_backward", "group_size": "all", "state": {"residency": "host", "slots": 2}}
    if way != "none":
        block["clipping"] = way
    method = methods.HiFT(model, args.seed, **block)
    norms, seconds, cpu = [], [], []
    for step in range(args.steps):
        batch, started, busy = next(batches), time.perf_counter(), time.process_time()
        method.step(batch, run.rate_at(step, args.steps, args.rate))
        seconds.append(time.perf_counter() - started)
        cpu.append(time.process_time() - busy)
        norms.append(method.engine.last_report.grad_norm)
    trials = method.engine.optimizer.trials
    result = {
        "way": way, "clip": args.clip, "rate": args.rate, "seed": args.seed, "steps": args.steps,
        "tokens": args.batch * args.length, "loss": tasks.judge(method.model, task, pad)["loss"],
        "clipped": sum(norm > args.clip for norm in norms), "median_norm": statistics.median(norms),
        "cpu_s": statistics.median(cpu[2:]), "wall_s": statistics.median(seconds[2:]),
        "finite": all(map(math.isfinite, norms)), **trials.state_dict(),
    }  # fmt: skip
    method.close()
    return result


def table(lines: list[dict[str, Any]]) -> str:
    head = "| clipping | norm | held-out loss | steps over the norm | tried, undone | CPU s a step | s a step |"
    rows = [head, "|---|---|---|---|---|---|---|"]
    for line in lines:
        rows.append(
            f"| {line['way']} | {line['clip']:g} | {line['loss']:.4f} | {line['clipped']} of {line['steps']} | "
            f"{line['num_made']}, {line['num_undone']} | {line['cpu_s']:.2f} | {line['wall_s']:.2f} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--ways", nargs="*", default=["exact", "speculative", "last_visit", "per_part", "none"])
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=96)
    parser.add_argument("--held-out", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lines", type=Path, required=True, help="JSON lines, to which results are added")
    args = parser.parse_args()
    for way in args.ways:
        line = train(args, way)
        print(json.dumps(line), flush=True)
        with args.lines.open("a") as file:
            file.write(json.dumps(line) + "\n")
    print(table([json.loads(text) for text in args.lines.read_text().splitlines()]))


if __name__ == "__main__":
    main()
