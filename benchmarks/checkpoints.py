"""Checkpoint size and time against DeepSpeed's own ZeRO-1, same model, same ranks, one run.

    python benchmarks/checkpoints.py                       30M parameters, 2 CPU processes, a few minutes
    python benchmarks/checkpoints.py --layers 24 --width 1024 --folder /scratch

Each engine trains until every parameter has its optimizer states (AdamW), saves and loads ``--repeats`` times
into a folder of its own, alternating with the other engine; medians are reported. Loading is into an engine
that exists. Ours writes with fsync and checksums and verifies when it loads; DeepSpeed does neither. "held"
is the time that training stood still for an asynchronous save, copies before the following steps included.

Writes benchmarks/results/checkpoints.md (``--out``).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results" / "checkpoints.md"
VOCAB = 8192
VARIANTS = {  # name: (engine, precision, asynchronous)
    "DeepSpeed ZeRO-1, fp32": ("deepspeed", "fp32", False),
    "hift_ds, fp32": ("hift", "fp32", False),
    "hift_ds, fp32, asynchronous": ("hift", "fp32", True),
    "DeepSpeed ZeRO-1, bf16": ("deepspeed", "bf16", False),
    "hift_ds, bf16": ("hift", "bf16", False),
    "hift_ds, bf16, asynchronous": ("hift", "bf16", True),
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where checkpoints go meanwhile; a temporary folder by default")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if "BENCHMARK_FOLDER" in os.environ:
        measure(args, Path(os.environ["BENCHMARK_FOLDER"]))
        return 0
    with tempfile.TemporaryDirectory(prefix="hift-checkpoints-", dir=args.folder) as folder:
        start_ranks(args.ranks, Path(folder))
        measured = json.loads((Path(folder) / "measured.json").read_text())
    text = report(args, measured)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text, encoding="utf-8")
    print(text)
    return 0


def start_ranks(num_ranks: int, folder: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, *sys.argv],
            env={
                "OMP_NUM_THREADS": "1", **os.environ, "BENCHMARK_FOLDER": str(folder),
                "RANK": str(rank), "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            },
        )
        for rank in range(num_ranks)
    ]  # fmt: skip
    try:
        codes = [process.wait() for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    if any(codes):
        raise SystemExit(f"ranks ended with {codes}")


# -- on each rank ----------------------------------------------------------------------------------


def measure(args: argparse.Namespace, folder: Path) -> None:
    import logging

    import torch
    import torch.distributed as dist

    logging.disable(logging.WARNING)
    engines = {name: build(args, *variant) for name, variant in VARIANTS.items()}
    for engine in engines.values():
        train_all_groups(engine)
    times: dict[str, dict[str, list[float]]] = {name: {"save": [], "held": [], "load": []} for name in VARIANTS}
    for _ in range(args.repeats):
        for name, engine in engines.items():
            shutil.rmtree(folder / name, ignore_errors=True) if dist.get_rank() == 0 else None
            one_repeat(engine, VARIANTS[name][2], folder / name, times[name])
    if dist.get_rank() == 0:
        numel = sum(p.numel() for p in engines["hift_ds, fp32"].module.parameters())
        result = {
            name: {
                "bytes": sum(p.stat().st_size for p in (folder / name).rglob("*") if p.is_file()),
                "files": sum(p.is_file() for p in (folder / name).rglob("*")),
                **{key: statistics.median(values) for key, values in times[name].items()},
            }
            for name in VARIANTS
        }
        (folder / "measured.json").write_text(
            json.dumps({"numel": numel, "torch": torch.__version__, "variants": result})
        )
    dist.barrier()
    dist.destroy_process_group()


def one_repeat(engine, asynchronous: bool, folder: Path, times: dict[str, list[float]]) -> None:
    if asynchronous:
        engine.checkpointer.take_waited_s()
    times["save"].append(together(lambda: engine.save_checkpoint(str(folder), tag="measured")))
    if asynchronous:
        train_all_groups(engine)
        times["held"].append(engine_held_s(engine))
        engine.wait_for_checkpoint()
    else:
        times["held"].append(times["save"][-1])
    times["load"].append(together(lambda: engine.load_checkpoint(str(folder), tag="measured")))


def engine_held_s(engine) -> float:
    """Summed by train_all_groups over the reports of the steps, and what came after the last of them."""
    held, engine.held_s = engine.held_s, 0.0
    return held + engine.checkpointer.take_waited_s()


def together(action) -> float:
    """Seconds from when all ranks begin until all have ended."""
    import torch.distributed as dist

    dist.barrier()
    started = time.perf_counter()
    action()
    dist.barrier()
    return time.perf_counter() - started


def build(args: argparse.Namespace, kind: str, precision: str, asynchronous: bool):
    import deepspeed
    import torch

    import hift_ds

    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        **({"bf16": {"enabled": True}} if precision == "bf16" else {}),
    }
    if kind == "hift":
        config["hift"] = {"checkpoint": {"asynchronous": asynchronous}}
    initialize = hift_ds.initialize if kind == "hift" else deepspeed.initialize
    engine = initialize(model=decoder(args.layers, args.width), config=config)[0]
    engine.held_s = 0.0
    return engine


def decoder(layers: int, width: int):
    import torch
    from torch import nn

    class Block(nn.Module):
        """A decoder layer's matrices, without attention: it is checkpoints that are measured."""

        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(width)
            self.mix = nn.Linear(width, 4 * width, bias=False)
            self.up = nn.Linear(width, 4 * width, bias=False)
            self.down = nn.Linear(4 * width, width, bias=False)

        def forward(self, h: torch.Tensor) -> torch.Tensor:
            x = self.norm(h)
            return h + self.down(torch.sigmoid(self.mix(x)) * self.up(x))

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(VOCAB, width)
            self.layers = nn.ModuleList(Block() for _ in range(layers))
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, VOCAB, bias=False)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            h = self.embed(tokens)
            for layer in self.layers:
                h = layer(h)
            return nn.functional.cross_entropy(self.head(self.norm(h)).flatten(0, 1).float(), tokens.flatten())

    return Decoder()


def train_all_groups(engine) -> None:
    import torch

    steps = engine.schedule.steps_per_cycle if hasattr(engine, "schedule") else 1
    for _ in range(steps):
        loss = engine(torch.randint(0, VOCAB, (1, 16)))
        engine.backward(loss)
        engine.step()
        if hasattr(engine, "last_report"):
            engine.held_s += engine.last_report.checkpoint_s


# -- the table -------------------------------------------------------------------------------------


def report(args: argparse.Namespace, measured: dict) -> str:
    numel = measured["numel"]
    command = " ".join(["python", "benchmarks/checkpoints.py", *sys.argv[1:]])
    lines = [
        "# Checkpoints: size and time",
        "",
        f"`{command}` on {time.strftime('%Y-%m-%d')}: {numel / 1e6:.1f}M parameters, AdamW, {args.ranks} "
        "CPU processes, "
        f"median of {args.repeats}; torch {measured['torch']}, {os.cpu_count()} cores, {platform.machine()}. "
        f"Load average at the end: {os.getloadavg()[0]:.1f}"
        " (above the number of cores other programs ran as well; the two engines took turns).",
        "",
        "| | bytes a parameter | files | save, s | training held, s | load, s |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in measured["variants"].items():
        lines.append(
            f"| {name} | {row['bytes'] / numel:.2f} | {row['files']} | "
            f"{row['save']:.3f} | {row['held']:.3f} | {row['load']:.3f} |"
        )
    return "\n".join([*lines, "", *NOTES, ""])


NOTES = [
    "Ours: every file is checksummed and fsynced before the folder gets its name, and verified before "
    "anything is loaded.",
    "DeepSpeed's ZeRO-1 does none of that, so part of what it writes is still on its way to the disk "
    "when `save` returns.",
    "Asynchronous: `save` is the call alone; `training held` adds the copies made before the steps of "
    "the following cycle",
    "(on this machine the writing thread also takes its share of the cores; on an accelerator it does not).",
]

if __name__ == "__main__":
    sys.exit(main())
