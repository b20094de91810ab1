"""Full fine-tuning in the update in backward, against a plain torch loop with everything resident.

    python benchmarks/in_backward.py --path /scratch                    SmolLM2-135M's shape, random bf16 weights
    python benchmarks/in_backward.py --path /scratch --model 1b         the 1.1B shape: 16 GiB of memory
    python benchmarks/in_backward.py --path /scratch --model tiny       seconds, to see that it works

The plain loop: bf16 weights, fp32 masters and AdamW states in memory, torch's fused kernel, an update after backward.
Ours: the same arithmetic with ``"update": "in_backward"``, all layers a group, states resident, in a host store or on
disk. Every turn of a setting is a process of its own, and the settings take turns. The first step of each is not
counted.

Prints a table; ``--out`` writes it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODELS = {"tiny": "tiny", "135m": "smollm2_135m", "1b": "tinyllama_1_1b"}
PLAIN = "plain torch, resident"
SETTINGS: dict[str, dict[str, Any]] = {
    "in backward, resident": {"residency": "device"},
    "in backward, host, 2 slots": {"residency": "host", "slots": 2},
    "in backward, disk, 2 slots": {"residency": "disk", "slots": 2},
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", required=True, help="folder on the disk to measure")
    parser.add_argument("--model", choices=MODELS, default="135m")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=6, help="of a turn, the first not counted")
    parser.add_argument("--rounds", type=int, default=3, help="turns of every setting")
    parser.add_argument("--only", default="", help="settings whose names contain this, and the plain loop")
    parser.add_argument("--note", default="", help="what else the machine was doing")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def build(name: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    import model_zoo

    torch.manual_seed(0)
    if name == "tiny":
        return model_zoo.tiny.build("llama").to(torch.bfloat16)
    config = model_zoo.config(name)
    config.use_cache = False
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def batch_of(model: Any, args: argparse.Namespace) -> dict[str, Any]:
    import torch

    tokens = torch.randint(0, model.config.vocab_size, (args.batch, args.length))
    return {"input_ids": tokens, "labels": tokens}


def plain(args: argparse.Namespace) -> list[float]:
    """Seconds of each step."""
    import torch

    model = build(MODELS[args.model]).train()
    masters = [torch.nn.Parameter(param.detach().float()) for param in model.parameters()]
    optimizer = torch.optim.AdamW(masters, lr=1e-5, fused=True)
    seconds = []
    for _ in range(args.steps):
        batch = batch_of(model, args)
        started = time.perf_counter()
        model(**batch).loss.backward()
        with torch.no_grad():
            for master, param in zip(masters, model.parameters(), strict=True):
                master.grad, param.grad = param.grad.float(), None
            optimizer.step()
            for master, param in zip(masters, model.parameters(), strict=True):
                master.grad = None
                param.copy_(master)
        seconds.append(time.perf_counter() - started)
    return seconds


def ours(args: argparse.Namespace) -> list[float]:
    import hift_ds

    state = dict(SETTINGS[args.worker])
    if state["residency"] == "disk":
        state["path"] = args.path
    model = build(MODELS[args.model]).train()
    config = {
        "train_micro_batch_size_per_gpu": args.batch,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "fused": True}},
        "bf16": {"enabled": True},
        "timers": {"throughput": {"enabled": False}},
        "hift": {"update": "in_backward", "group_size": "all", "state": state},
    }
    engine, *_ = hift_ds.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    seconds = []
    for _ in range(args.steps):
        batch = batch_of(engine.module, args)
        started = time.perf_counter()
        engine.backward(engine(**batch).loss)
        engine.step()
        seconds.append(time.perf_counter() - started)
    engine.destroy()
    return seconds


def work(args: argparse.Namespace) -> None:
    logging.disable(logging.WARNING)
    seconds = plain(args) if args.worker == PLAIN else ours(args)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds[1:], "peak_bytes": peak}))


def turn(args: argparse.Namespace, name: str) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", name]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    job = subprocess.run(command, capture_output=True, text=True, env=env)
    if job.returncode:
        raise SystemExit(job.stderr[-3000:])
    return json.loads(job.stdout.splitlines()[-1])


def table(args: argparse.Namespace, turns: dict[str, list[dict[str, Any]]]) -> str:
    """Medians over all counted steps; the ratio is the median over rounds of a round's own ratio."""
    lines = [
        f"`python benchmarks/in_backward.py "
        f"{' '.join(a for a in sys.argv[1:] if a != str(args.out) and a != '--out')}`",
        "",
        f"{platform.processor() or platform.machine()}, {os.environ.get('OMP_NUM_THREADS', '1')} thread(s), "
        f"{args.batch} x {args.length} tokens. {args.note}".strip(),
        "",
        "| setting | s a step (median) | of plain (median of rounds) | peak memory, GiB |",
        "|---|---|---|---|",
    ]
    for name, results in turns.items():
        ratios = [
            statistics.median(mine["seconds"]) / statistics.median(base["seconds"])
            for mine, base in zip(results, turns[PLAIN], strict=True)
        ]
        seconds = statistics.median(s for result in results for s in result["seconds"])
        peak = max(result["peak_bytes"] for result in results) / 2**30
        lines.append(f"| {name} | {seconds:.3f} | {statistics.median(ratios):.3f} | {peak:.2f} |")
    return "\n".join(lines)


def main() -> None:
    args = parse()
    if args.worker:
        work(args)
        return
    names = [PLAIN, *(name for name in SETTINGS if args.only in name)]
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(args.rounds):
        for name in names[number % 2 :: 1] + names[: number % 2]:  # not always the same one first
            turns[name].append(turn(args, name))
    text = table(args, turns)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
