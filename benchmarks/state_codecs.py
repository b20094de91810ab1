"""What compact optimizer states change: a real model trained with each codec on the same data in the same
order.

    python benchmarks/state_codecs.py --model-dir SMOLLM2       a folder with safetensors and a tokenizer

The text is the source of Python's standard library, which every machine has: some modules to train on, others
held out. Every codec starts from the same weights. Compared with states kept in fp32 after the last step:

* moved apart: distance of the fp32 masters from those of the fp32 run, over the distance that run moved;
* same direction: cosine of the two runs' movements;
* loss of the last cycle, and on held-out text.

A run in fp32 with a learning rate 0.01 % larger says how far runs drift apart by themselves.

Writes benchmarks/results/state_codecs.md (``--out``).
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results" / "state_codecs.md"
NUDGED = "fp32, learning rate x 1.0001"  # how far two runs drift apart that differ by next to nothing
CODECS = ("split_master", "bf16_moments", "int8_moments", "split_master+int8_moments")
TRAIN = (
    "argparse",
    "collections",
    "email.message",
    "http.client",
    "json.decoder",
    "logging",
    "random",
    "tarfile",
    "typing",
)
HELD_OUT = ("csv", "difflib", "zipfile")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-dir", required=True)
    parser.add_argument("--cycles", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--note", default="")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    logging.disable(logging.WARNING)
    rows, reference = [], None
    for codec in ("fp32", NUDGED, *CODECS):
        started = time.perf_counter()
        run = train(args, codec)
        reference = reference or run
        rows.append((codec, run, *compare(run, reference)))
        print(f"{codec}: {time.perf_counter() - started:.0f} s, held-out {run['held_out']:.4f}", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(report(args, rows))
    print(args.out.read_text())


def train(args: argparse.Namespace, codec: str) -> dict[str, Any]:
    """Masters before and after, losses."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import hift_ds

    tokenizer = AutoTokenizer.from_pretrained(args.model_dir)
    model = AutoModelForCausalLM.from_pretrained(args.model_dir, dtype=torch.float32)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": args.lr * (1.0001 if codec == NUDGED else 1)}},
        "hift": {"group_size": args.group_size, "state": {"codec": "fp32" if codec == NUDGED else codec}},
    }
    engine = hift_ds.initialize(model=model, config=config)[0]
    before = masters(engine)
    text, generator = tokens_of(tokenizer, TRAIN), torch.Generator().manual_seed(0)
    losses = []
    for _ in range(args.cycles * len(engine.groups)):
        start = int(torch.randint(0, len(text) - args.tokens, (1,), generator=generator))
        rows = text[start : start + args.tokens][None].to(engine.device)
        loss = engine(input_ids=rows, labels=rows).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    store = engine.optimizer.store
    result = {
        "moved": {name: after - before[name] for name, after in masters(engine).items()},
        "losses": losses,
        "groups": len(engine.groups),
        "bytes": store.total_bytes() / sum(param.numel() for param in model.parameters()),
        "held_out": held_out_loss(engine, tokens_of(tokenizer, HELD_OUT), args.tokens),
    }
    engine.destroy()
    return result


def masters(engine: Any) -> dict[str, Any]:
    """The fp32 masters, by chunk."""
    from hift_ds.store.base import MASTER

    store = engine.optimizer.store
    store.synchronize()
    return {
        f"{group.name}/{chunk.id}": store.read(chunk.id)[MASTER].clone()
        for group in engine.optimizer.groups.values()
        for chunk in group.chunks
    }


def tokens_of(tokenizer: Any, modules: tuple[str, ...]) -> Any:
    text = "\n\n".join(inspect.getsource(importlib.import_module(name)) for name in modules)
    return tokenizer(text, return_tensors="pt").input_ids[0]


def held_out_loss(engine: Any, text: Any, length: int, num_rows: int = 24) -> float:
    import torch

    engine.eval()
    total = 0.0
    with torch.no_grad():
        for row in range(num_rows):
            start = row * (len(text) - length) // num_rows
            rows = text[start : start + length][None].to(engine.device)
            total += float(engine(input_ids=rows, labels=rows).loss) / num_rows
    return total


def compare(run: dict[str, Any], reference: dict[str, Any]) -> tuple[float, float]:
    """(distance over the reference's movement, cosine of the movements)."""
    apart = own = other = product = 0.0
    for name, moved in reference["moved"].items():
        a, b = moved.double(), run["moved"][name].double()
        apart += float((a - b).square().sum())
        own += float(a.square().sum())
        other += float(b.square().sum())
        product += float((a * b).sum())
    return (apart / own) ** 0.5, product / (own * other) ** 0.5


def report(args: argparse.Namespace, rows: list[tuple[str, dict[str, Any], float, float]]) -> str:
    import torch

    first = rows[0][1]
    lines = [
        "# Compact optimizer states against fp32",
        "",
        f"`python benchmarks/state_codecs.py --model-dir {Path(args.model_dir).name} --cycles {args.cycles} "
        f"--group-size {args.group_size} --tokens {args.tokens} --lr {args.lr:g}`",
        "",
        f"{len(first['losses'])} AdamW steps ({args.cycles} cycles of {first['groups']} layer groups) of "
        f"1 x {args.tokens} tokens of Python's standard library, bf16 weights with fp32 masters, "
        f"torch {torch.__version__}. {args.note}".rstrip(),
        "",
        "| codec | bytes a parameter | moved apart | same direction | loss, last cycle | loss, held out "
        "| against fp32 |",
        "|---|---|---|---|---|---|---|",
    ]
    for codec, run, apart, cosine in rows:
        last = run["losses"][-run["groups"] :]
        lines.append(
            f"| {codec} | {run['bytes']:.2f} | {apart:.3%} | {cosine:.6f} | {sum(last) / len(last):.4f} | "
            f"{run['held_out']:.4f} | {run['held_out'] - first['held_out']:+.4f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
