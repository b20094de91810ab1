"""Seconds of a step and peak memory of the authors' package, `hift` 0.0.5, for the page of `side_by_side.py`.

    DIR/bin/python -E benchmarks/authors_steps.py --model SMOLLM2 [--turns 3]

DIR is the environment of `benchmarks/methods/README.md`. Their trainer trains in fp32 on a CPU, one and four layers a
group; its ratio is against full fine-tuning by transformers' own Trainer in the same environment (their
``hier_tuning=False`` still trains a group a step). Each turn of each is a process of its own, one after the other: a
cycle to warm up and one that is timed. Lines go to `results/authors.jsonl`, which `side_by_side.py table` reads.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import repeat
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks" / "methods")]

ROWS, LENGTH = 2, 128  # of side_by_side.py's workload "135m"
SHAPE = "135m"
NAMES = {
    None: "transformers' Trainer in the authors' environment, fp32, full fine-tuning",
    1: "authors' HiFT, 1 layer, fp32; `of full` is of the row above",
    4: "authors' HiFT, 4 layers, fp32; `of full` as above",
}


def one_turn(folder: Path, group_size: int | None) -> dict[str, float]:
    """Mean seconds of the steps of a cycle after a first one, the peak, and the weights that the last step trained.

    ``None``: no groups. The peak is of resident memory, in GiB, above what the process held before the model was there.
    """
    import authors
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    config = AutoConfig.from_pretrained(folder)
    config.use_cache = False
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, torch_dtype=torch.float32).train()
    ids = torch.randint(config.vocab_size, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    times: list[float] = []

    def at_end_of(step: int, taken: float) -> bool:
        times.append(time.perf_counter())
        return False

    with tempfile.TemporaryDirectory() as out:
        if group_size is None:
            trainer, cycle = _plain_trainer(model, batch, authors.watcher(at_end_of), out), 3
        else:
            settings = {"group_element": group_size, "strategy": "down2up", "optim": "adamw_torch", "warmup": 0.0}
            spec = {"steps": 1, "rate": 0.0, "seed": 0, "settings": settings}
            trainer = authors.build(spec, model, "text", repeat(batch), authors.watcher(at_end_of), out)
            cycle = -(-len(trainer.group_parameters) // group_size)
        trainer.args.max_steps = 2 * cycle
        trainer.train()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": (times[-1] - times[cycle - 1]) / cycle, "peak_gib": (peak - held) / 2**20, "trained": trained}


def _plain_trainer(model: Any, batch: dict[str, Any], watch: Any, out: str) -> Any:
    """transformers' own, with the same arguments as `authors.build` gives theirs."""
    import authors

    args = authors.arguments(out, 1, 0.0, "adamw_torch", 0, 0.0)
    from transformers import Trainer

    return Trainer(
        model, args, data_collator=authors.only, train_dataset=authors.Batches(repeat(batch)), callbacks=[watch]
    )


def measure(folder: Path, turns: int) -> list[dict[str, Any]]:
    """The lines."""
    found: dict[int | None, list[dict[str, float]]] = {None: [], 1: [], 4: []}
    for _ in range(turns):
        for size, them in found.items():
            command = [sys.executable, "-E", __file__, "--model", str(folder), "--one", json.dumps(size)]
            job = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            them.append(json.loads(job.stdout.strip().splitlines()[-1]))
            print(size or "all", them[-1], flush=True)
    return [
        {
            "row": NAMES[size], "shape": SHAPE, "group_size": size or "all",
            "seconds": statistics.median(t["seconds"] for t in them),
            "of_full": statistics.median(
                mine["seconds"] / full["seconds"] for mine, full in zip(them, found[None], strict=True)
            ),
            "peak_gib": max(t["peak_gib"] for t in them), "date": time.strftime("%Y-%m-%d"),
        }
        for size, them in found.items()
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of SmolLM2-135M, or of another model")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "authors.jsonl")
    parser.add_argument("--one", type=json.loads, default=False, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not False:
        print(json.dumps(one_turn(args.model, args.one)))
        return 0
    args.out.write_text("".join(json.dumps(line) + "\n" for line in measure(args.model, args.turns)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
