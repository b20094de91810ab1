"""What moving optimizer states costs: step times with states on the device, in host memory and on disk.

    python benchmarks/states.py --path /scratch                 a 1.1B LLaMA, random bf16 weights, 512 tokens a step
    python benchmarks/states.py --path /scratch --model tiny    seconds, to see that it works

Every setting runs in a process of its own, and the settings take turns, so that a machine that gets slower or
faster meanwhile does so for all. Of the model's layer groups a few are trained, from bottom to top, the
others are frozen: a step does the same work, and what is kept is small enough for the memory of the machine.
The first cycle makes the states and is not counted.

Writes benchmarks/results/states.md (``--out``).
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
RESULTS = ROOT / "benchmarks" / "results" / "states.md"
MODELS = {"tiny": "tiny", "135m": "smollm2_135m", "1b": "tinyllama_1_1b", "7b": "llama2_7b"}
SETTINGS: dict[str, dict[str, Any]] = {
    "device": {"residency": "device"},
    "host, waited for": {"residency": "host", "prefetch": False},
    "host, 1 slot": {"residency": "host", "slots": 1},
    "host, 2 slots": {"residency": "host", "slots": 2},
    "disk, waited for": {"residency": "disk", "prefetch": False},
    "disk, 1 slot": {"residency": "disk", "slots": 1},
    "disk, 2 slots": {"residency": "disk", "slots": 2},
    "device, split_master": {"residency": "device", "codec": "split_master"},
}  # fmt: skip
CODECS = (
    "split_master", "bf16_moments", "split_master+bf16_moments", "int8_moments", "split_master+int8_moments",
)  # fmt: skip
SETTINGS |= {f"disk, 2 slots, {codec}": {"residency": "disk", "slots": 2, "codec": codec} for codec in CODECS}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", required=True, help="folder on the disk to measure")
    parser.add_argument("--model", choices=MODELS, default="1b")
    parser.add_argument("--tokens", type=int, default=512, help="of one step, one sequence")
    parser.add_argument("--groups", type=int, default=3, help="layer groups that are trained, bottom to top")
    parser.add_argument("--cycles", type=int, default=2, help="counted, after one that is not")
    parser.add_argument("--rounds", type=int, default=2, help="turns of every setting")
    parser.add_argument("--only", help="settings whose names contain this, and device")
    parser.add_argument("--note", default="", help="what else the machine was doing")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--setting", help=argparse.SUPPRESS)  # the process of one setting
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.setting is not None:
        print(json.dumps(measure(args, json.loads(args.setting))))
        return
    names = [name for name in SETTINGS if name == "device" or not args.only or args.only in name]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    loads = []
    for _ in range(args.rounds):
        for name in names:
            results[name].append(in_process(args, SETTINGS[name]))
            loads.append(os.getloadavg()[0])
            print(
                f"{name}: {statistics.median(step['seconds'] for step in results[name][-1]['steps']):.2f} s",
                flush=True,
            )
            args.out.write_text(report(args, results, loads))
    print(args.out)


def in_process(args: argparse.Namespace, state: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--setting", json.dumps(state)]
    for option in ("path", "model", "tokens", "groups", "cycles"):
        command += [f"--{option}", str(getattr(args, option))]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env)
    if done.returncode:
        raise SystemExit(f"{state}: failed with exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


# -- one setting -------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, state: dict[str, Any]) -> dict[str, Any]:
    """Every counted step's seconds and transfers, and this process's peak of resident memory."""
    import torch

    import hift_ds

    logging.disable(logging.WARNING)
    if state["residency"] == "disk":
        state = {**state, "path": args.path}
    model = build_model(MODELS[args.model])
    trained = freeze_all_but(model, args.groups)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "fused": True}},
        "hift": {"state": state},
    }
    engine = hift_ds.initialize(model=model, config=config)[0]
    assert len(engine.groups) == trained
    generator = torch.Generator().manual_seed(0)
    steps = []
    for step in range(trained * (args.cycles + 1)):
        tokens = torch.randint(0, model.config.vocab_size, (1, args.tokens), generator=generator).to(engine.device)
        started = time.perf_counter()
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
        if engine.device.type != "cpu":
            torch.get_device_module(engine.device).synchronize()
        seconds, done = time.perf_counter() - started, engine.last_report
        if step >= trained:
            moved = done.state_bytes_in + done.state_bytes_out
            steps.append({"seconds": seconds, "moved": moved, "transfer": done.transfer_s, "stalled": done.stalled_s})
    result = {
        "device": str(engine.device),
        "numel": sum(p.numel() for p in model.parameters()),
        "group_numel": statistics.mean(group.numel for group in engine.groups),
        "steps": steps,
        "resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    engine.destroy()
    return result


def build_model(name: str) -> Any:
    """Random weights in bf16, made one by one where they stay."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from model_zoo import FAMILIES

    llama = FAMILIES["llama"]
    entries = llama.tiny if name == "tiny" else llama.sizes[name]
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **entries))
    finally:
        torch.set_default_dtype(torch.float32)


def freeze_all_but(model: Any, num_groups: int) -> int:
    """Leave blocks spread from the bottom to the top trainable. Returns how many."""
    blocks = model.model.layers
    num_groups = min(num_groups, len(blocks))
    kept = {round(i * (len(blocks) - 1) / max(num_groups - 1, 1)) for i in range(num_groups)}
    model.requires_grad_(False)
    for index in kept:
        blocks[index].requires_grad_(True)
    return len(kept)


# -- the table ---------------------------------------------------------------------------------------------


def report(args: argparse.Namespace, results: dict[str, list[dict[str, Any]]], loads: list[float]) -> str:
    first = results["device"][0]
    steps = {name: [step for run in runs for step in run["steps"]] for name, runs in results.items()}
    baseline = statistics.median(step["seconds"] for step in steps["device"])
    lines = [
        "# Optimizer states off the device: what a step costs",
        "",
        f"`python {' '.join(['benchmarks/states.py', *shown_arguments(args)])}`",
        "",
        f"LLaMA shape `{MODELS[args.model]}`, {first['numel'] / 1e6:,.0f}M random parameters in bf16 with "
        f"fp32 masters, fused AdamW, 1 x {args.tokens} tokens a step, "
        f"{first['group_numel'] / 1e6:,.1f}M parameters a layer group, on `{first['device']}`.",
        f"{describe_machine()}. Load average while it ran: {min(loads):.1f} to {max(loads):.1f}."
        + (f" {args.note}" if args.note else ""),
        "",
        f"Median (and fastest) of {len(steps['device'])} steps. Exposed: the share of a step that waited for "
        "transfers. Beside waiting, a codec costs its encoding and decoding in the step.",
        "",
        "| states | s a step | fastest | against device | moved a step | transfer s | waited s | exposed "
        "| peak memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [row(name, runs, steps[name], baseline) for name, runs in results.items() if runs]
    return "\n".join(lines) + "\n"


def row(name: str, runs: list[dict[str, Any]], steps: list[dict[str, float]], baseline: float) -> str:
    def median(key: str) -> float:
        return statistics.median(step[key] for step in steps)

    exposed = sum(step["stalled"] for step in steps) / sum(step["seconds"] for step in steps)
    cells = [
        name,
        f"{median('seconds'):.2f}",
        f"{min(step['seconds'] for step in steps):.2f}",
        f"{median('seconds') / baseline - 1:+.1%}",
        f"{median('moved') / 1e9:.3f} GB",
        f"{median('transfer'):.2f}",
        f"{median('stalled'):.3f}",
        f"{exposed:.1%}",
        f"{max(run['resident_bytes'] for run in runs) / 2**30:.1f} GiB",
    ]
    return "| " + " | ".join(cells) + " |"


def shown_arguments(args: argparse.Namespace) -> list[str]:
    shown = ["--path", "PATH"]
    for option in ("model", "tokens", "groups", "cycles", "rounds", "only"):
        if getattr(args, option) is not None:
            shown += [f"--{option}", str(getattr(args, option))]
    return shown


def describe_machine() -> str:
    import torch

    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    machine = f"{os.cpu_count()} cores, {pages / 2**30:.0f} GiB, {platform.system()}"
    return f"{machine}, {threads} compute threads, torch {torch.__version__}"


if __name__ == "__main__":
    main()
