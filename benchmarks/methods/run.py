"""One run of the study: train, judge along the way, print one JSON line.

python benchmarks/methods/run.py '{"task": "stdlib", "method": "full", "rate": 1e-4, "steps": 100, ...}' --model DIR
[--data DIR]
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

import methods  # noqa: E402
import tasks  # noqa: E402

WARMUP = 0.05  # of the steps
MULTIPLIES_BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # this processor by itself; else through fp32
aten = torch.ops.aten
# None in the torch of the authors' package, whose weights are fp32.
FLASH, FLASH_BACKWARD = (
    getattr(aten, f"_scaled_dot_product_flash_attention_for_cpu{end}", None) for end in ("", "_backward")
)

Run = Callable[[dict[str, Any], Path, Path | None], dict[str, Any]]
Timing = Callable[[list[dict[str, Any]], Path, Path | None, int], list[dict[str, Any]]]


class ProductsInFp32(TorchDispatchMode):
    """bf16 matrix products on a processor without instructions for them: the same operands multiplied in fp32, which
    is what such instructions accumulate in, and the result rounded to bf16 once, as they round it. What torch does
    there instead is thirty times slower."""

    PRODUCTS = frozenset({
        aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default,
        *(op.default for op in (FLASH, FLASH_BACKWARD) if op is not None),
    })  # fmt: skip

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        def widened(tensor: Tensor) -> Tensor:
            return tensor.float() if tensor.dtype == torch.bfloat16 else tensor

        if func not in self.PRODUCTS or not any(isinstance(a, Tensor) and a.dtype == torch.bfloat16 for a in args):
            return func(*args, **(kwargs or {}))
        made = func(*tree_map_only(Tensor, widened, args), **tree_map_only(Tensor, widened, kwargs or {}))
        if FLASH is not None and func is FLASH.default:
            return made[0].bfloat16(), made[1]  # the logarithms of sums are fp32 in either kernel
        return tree_map_only(Tensor, Tensor.bfloat16, made)


def rate_at(step: int, steps: int, rate: float, decays: bool = True) -> float:
    """Linear warm-up over the first twentieth, then linear decay to 0, or ``rate`` to the end."""
    warmup = max(int(steps * WARMUP), 1)
    return rate * min((step + 1) / warmup, (steps - step) / max(steps - warmup, 1) if decays else 1.0)


def load(spec: dict[str, Any], folder: Path, data: Path | None) -> tuple[nn.Module, tasks.Task, int]:
    """The model in bf16, the tokenized task, the id to pad with."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    task = tasks.load_task(spec["task"], tokenizer, spec["max_length"], data)
    del task.held_out[spec["held_out"] :]
    torch.manual_seed(spec["seed"])  # of a new head
    if task.kind == "classes":
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=task.num_labels, dtype=torch.float32
        )
        model.config.pad_token_id = pad
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.config.use_cache = False
    return model.to(torch.bfloat16).train(), task, pad


def work_of_steps(method: methods.Method, batch: dict[str, Tensor], count: int) -> tuple[float, float]:
    """Mean FLOPs of matrix products, and mean number of weights trained, in one of ``count`` steps."""
    trained = 0
    with FlopCounterMode(display=False) as counter:
        for _ in range(count):
            trained += method.trained()
            method.step(batch)
    return counter.get_total_flops() / count, trained / count


def evaluated_at(spec: dict[str, Any]) -> set[int]:
    """After which steps a run is judged: evenly along the run, the last time at its end."""
    return {math.ceil(spec["steps"] * i / spec["evaluations"]) for i in range(1, spec["evaluations"] + 1)}


def line_of(
    spec: dict[str, Any], curve: list[dict[str, float]], loss: float, tokens: int, cpu_s: float, held: int
) -> dict[str, Any]:
    """The line of a run; ``loss`` is its last, ``held`` the KiB that the process held before the method was built."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        **spec, "curve": curve, "final": curve[-1]["loss"], "best": min(point["loss"] for point in curve),
        "diverged": not math.isfinite(loss), "tokens": tokens, "cpu_s": round(cpu_s, 2),
        # Not with copies in fp32, which a peak would count.
        "peak_gib": round((peak - held) / 2**20, 3) if MULTIPLIES_BF16 else None,
        "where": {"machine": platform.processor() or platform.machine(), "torch": torch.__version__,
                  "threads": torch.get_num_threads(), "date": time.strftime("%Y-%m-%d"),
                  "products": "bf16" if MULTIPLIES_BF16 else "fp32, rounded to bf16"},
    }  # fmt: skip


def typical_batch(task: tasks.Task, batch_size: int, pad: int) -> dict[str, Tensor]:
    """The batch that steps are timed on: the one of the first 64 whose width is the mean."""
    first = list(islice(tasks.batches(task.train, batch_size, pad, 0), 64))
    mean = sum(batch["input_ids"].numel() for batch in first) / len(first)
    return min(first, key=lambda batch: abs(batch["input_ids"].numel() - mean))


def run(spec: dict[str, Any], folder: Path, data: Path | None) -> dict[str, Any]:
    """Train as ``spec`` says.

    Returns:
        ``spec`` with ``curve`` (step, CPU seconds of training so far, held-out loss), ``final``, ``best``, ``tokens``,
        ``cpu_s``, ``peak_gib`` above what the process held before the method was built, and where it ran.
    """
    model, task, pad = load(spec, folder, data)
    batches = tasks.batches(task.train, spec["batch_size"], pad, spec["seed"])
    before = tasks.judge(model, task, pad)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    schedule = partial(rate_at, steps=spec["steps"], rate=spec["rate"], decays=spec.get("decays", True))
    method = methods.build(spec["method"], model, spec["seed"], schedule, spec.get("settings", {}))
    curve = [{"step": 0, "cpu_s": 0.0, **before}]
    steps, tokens, cpu_s, losses = spec["steps"], 0, 0.0, []
    marks = evaluated_at(spec)
    for step in range(steps):
        batch = next(batches)
        tokens += int(batch["attention_mask"].sum())
        started = time.process_time()
        losses.append(method.step(batch))
        cpu_s += time.process_time() - started
        if not math.isfinite(losses[-1]):
            break
        if step + 1 in marks:
            curve.append({"step": step + 1, "cpu_s": round(cpu_s, 2), **tasks.judge(method.model, task, pad)})
    result = line_of(spec, curve, losses[-1], tokens, cpu_s, held)
    method.close()
    return result


def seconds(specs: list[dict[str, Any]], folder: Path, data: Path | None, rounds: int) -> list[dict[str, Any]]:
    """CPU seconds and FLOPs of a step of each spec's method: all in this process, in turn, medians of ``rounds``.

    A round of a method that trains layer groups is a whole cycle, so that every group counts once. All of them step on
    the same batch.
    """
    made = []
    for spec in specs:
        model, task, pad = load(spec, folder, data)
        batch = typical_batch(task, spec["batch_size"], pad)
        method = methods.build(spec["method"], model, 0, lambda _: 0.0, {**spec["settings"], **spec["timed"]})
        made.append((spec, method, batch, method.steps_per_cycle(), []))
    # BAdam collects garbage at every change of block: in a run once in 20 steps; here each step, among all models.
    gc.freeze()
    for number in range(rounds + 1):
        for _, method, batch, cycle, times in made:
            started = time.process_time()
            for _ in range(cycle):
                method.step(batch)
            if number:  # the first is warm-up
                times.append((time.process_time() - started) / cycle)
    result = []
    for spec, method, batch, cycle, times in made:
        flops, trained = work_of_steps(method, batch, cycle)
        result.append({
            **{key: spec[key] for key in ("task", "method", "name", "settings")},
            "seconds": sorted(times)[len(times) // 2], "flops": flops, "trained": trained,
        })  # fmt: skip
    return result


def main(run: Run = run, seconds: Timing = seconds) -> int:
    """The command line; ``run`` and ``seconds`` are those of another environment in `authors.py`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("spec", help="a run as JSON, or a list of runs with --seconds")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seconds", type=int, metavar="ROUNDS", help="time steps instead, all methods in turn")
    args = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.set_num_threads(1)
    spec = json.loads(args.spec)
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever libraries print is not the answer
    with nullcontext() if MULTIPLIES_BF16 else ProductsInFp32():
        result = (
            seconds(spec, args.model, args.data, args.seconds) if args.seconds else run(spec, args.model, args.data)
        )
    print(json.dumps(result), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
