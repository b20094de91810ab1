"""What each way of clipping in backward learns and costs: full fine-tuning of a small model, held-out loss.

    python benchmarks/clipping.py --model SMOLLM2 --out benchmarks/results/clipping.md   some six minutes of a core

Rows are the questions about hift_ds that come with the package, every eighth held out. For each seed (of the order of
rows) all ways train on the same rows from the same weights with the same rates, each an engine of this process, step by
step in turn: what else the machine does meets all alike. ``speculative`` makes the bits of ``exact``: it runs with the
first seed only, and that its losses are the same is checked. CPU seconds are those of all threads of the process.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks" / "methods")]

import methods  # noqa: E402
import run  # noqa: E402
import tasks  # noqa: E402

QUESTIONS = ROOT / "hift_ds" / "data" / "bundled" / "hift_questions.jsonl"
EVERY = 8  # row of the questions is held out
LEARNING = ("exact", "last_visit", "per_part")  # ways that differ in what they learn


@dataclass
class Way:
    """One way of clipping at work, and what its steps were.

    Attributes:
        norms: before clipping.
        cpu: seconds of a step.
    """

    method: methods.HiFT
    norms: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def step(self, batch: dict[str, torch.Tensor]) -> None:
        started = time.process_time()
        self.losses.append(self.method.step(batch))
        self.cpu.append(time.process_time() - started)
        self.norms.append(self.method.engine.last_report.grad_norm)


def read_task(tokenizer: Any, length: int, held_out: int) -> tasks.Task:
    """Rows of up to ``length`` tokens."""
    lines = [json.loads(line)["messages"] for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    rows = [tasks._answer_row(tokenizer, *(turn["content"] for turn in turns)) for turns in lines]
    parts = [[row for i, row in enumerate(rows) if (i % EVERY == 0) is held] for held in (False, True)]
    train, held = ([row for row in part if len(row.ids) <= length] for part in parts)
    return tasks.Task("lm", train, random.Random(0).sample(held, min(held_out, len(held))))


def begin(way: str, args: argparse.Namespace, seed: int) -> Way:
    """The model as it is in its folder, under an engine that clips so."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model.config.use_cache = False
    block = {"update": "in_backward", "group_size": "all", "clipping": way}
    schedule = partial(run.rate_at, steps=args.steps, rate=args.rate)
    state = {"residency": "host", "slots": 2}
    return Way(methods.HiFT(model.to(torch.bfloat16).train(), seed, schedule, state=state, **block))


def compare(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """For each seed a result of each way; the loss before training in all of them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    task = read_task(tokenizer, args.length, args.held_out)
    before = None
    for seed in args.seeds:
        names = (*LEARNING, "speculative") if seed == args.seeds[0] else LEARNING
        ways = {name: begin(name, args, seed) for name in names}
        if before is None:
            before = tasks.judge(ways["exact"].method.model, task, pad)["loss"]
        batches = itertools.islice(tasks.batches(task.train, args.batch, pad, seed), args.steps)
        for step, batch in enumerate(batches):
            order = list(ways.values())
            for way in order if step % 2 == 0 else order[::-1]:
                way.step(batch)
        for name, way in ways.items():
            assert name != "speculative" or (way.losses, way.norms) == (ways["exact"].losses, ways["exact"].norms)
            yield {
                "way": name, "seed": seed, "before": before, "loss": tasks.judge(way.method.model, task, pad)["loss"],
                "cpu": way.cpu, "norms": way.norms,
                "clipped": sum(norm > methods.CLIP for norm in way.norms),
                **way.method.engine.optimizer.trials.state_dict(),
            }  # fmt: skip
            way.method.close()
        ways.clear()


def table(args: argparse.Namespace, results: list[dict[str, Any]], cpu_s: float) -> str:
    """Losses, their differences to ``exact`` seed by seed, and CPU seconds of a step, the first two left out."""
    exact = {result["seed"]: result for result in results if result["way"] == "exact"}
    name = "SmolLM2-135M" if "smollm2" in str(args.model).lower() else f"`{args.model.name}`"
    lines = [
        "# Ways of clipping in backward: what they learn and cost",
        "",
        f"`python benchmarks/clipping.py --model SMOLLM2 --steps {args.steps}`",
        "",
        f"Full fine-tuning of {name} in the update in backward, states in a host store, two slots: {args.steps} steps "
        f"of {args.batch} rows of at most {args.length} tokens of the questions that come with the package, AdamW at "
        f"{args.rate:g}, clipped to {methods.CLIP:g}; {len(exact)} orders of the rows. Held-out loss over "
        f"{args.held_out} rows; before training {results[0]['before']:.4f}. {platform.machine()}, one thread, "
        f"{cpu_s:.0f} CPU seconds in all.",
        "",
        "| `clipping` | held-out loss, by order | less `exact`'s (mean; least, most) | steps over the norm "
        "| tried, undone | CPU s a step (median) | of `exact` (median of steps) |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(result["way"] for result in results):
        mine = [result for result in results if result["way"] == name]
        losses = ", ".join(f"{result['loss']:.4f}" for result in mine)
        apart = [result["loss"] - exact[result["seed"]]["loss"] for result in mine]
        seconds = statistics.median(s for result in mine for s in result["cpu"][2:])
        ratio = statistics.median(
            a / b for r in mine for a, b in zip(r["cpu"][2:], exact[r["seed"]]["cpu"][2:], strict=True)
        )
        steps = f"{sum(r['clipped'] for r in mine)} of {args.steps * len(mine)}"
        trials = f"{sum(r['num_made'] for r in mine)}, {sum(r['num_undone'] for r in mine)}"
        lines.append(
            f"| `{name}` | {losses} | {statistics.mean(apart):+.4f} ({min(apart):+.4f}, {max(apart):+.4f}) | {steps} | "
            f"{trials} | {seconds:.2f} | {ratio:.3f} |"
        )
    norms = sorted(norm for result in exact.values() for norm in result["norms"])
    lines += ["", f"Norms of `exact`: {norms[0]:.2f} to {norms[-1]:.2f}, median {statistics.median(norms):.2f}."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of SmolLM2-135M, or of another model")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1], help="of the order of the rows")
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=96)
    parser.add_argument("--held-out", type=int, default=32, help="rows that are judged by")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.set_num_threads(1)
    methods.CLIP = args.clip
    results = list(compare(args))
    text = table(args, results, time.process_time())
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
