"""Full fine-tuning in the update in backward, against a plain torch loop with everything resident.

    python benchmarks/in_backward.py --path /scratch                    SmolLM2-135M's shape, random bf16 weights
    python benchmarks/in_backward.py --path /scratch --shape 1.1b --rounds 2 --steps 3      20 GiB of memory, 20 minutes
    python benchmarks/in_backward.py --path /scratch --shape tiny       seconds, to see that it works
    python benchmarks/in_backward.py --path /scratch --clipping --out benchmarks/results/speculation.md

The plain loop: bf16 weights, fp32 masters and AdamW states in memory, torch's fused kernel, an update after backward.
Ours: the same arithmetic with ``"update": "in_backward"``, all layers a group, states resident, in a host store or on
disk. Each setting is a process that sleeps while the others have their turns of a few steps, so that what else the
machine does meets all alike; ``--one-at-a-time`` (the 1.1B shape always) starts a process for each turn, where memory
does not hold all. The first step of a turn is not counted. CPU seconds are those of all threads, waiting left out.

``--clipping`` compares what waiting for the norm costs, and what speculation saves: one engine for each place of states
takes turns of steps without clipping, clipped exactly, and speculatively, with a threshold that no step exceeds and
with one that every step does.

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
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SHAPES = {"tiny": "tiny", "135m": "smollm2_135m", "1.1b": "tinyllama_1_1b"}
PLAIN = "plain torch, resident"
SETTINGS: dict[str, dict[str, Any]] = {
    "in backward, resident": {"residency": "device"},
    "in backward, host, 2 slots": {"residency": "host", "slots": 2},
    # The embedding's states are eight blocks' and must be there one block's backward after the room for them is: in
    # slices the first ones come earlier, into less memory than two whole parts need.
    "in backward, disk, 8 slots": {"residency": "disk", "slots": 8, "slice_numel": 1 << 22},
}

# Ways of clipping that one engine takes in turn.
UNCLIPPED, EXACT, TAKEN_BACK = "no clipping", "exact", "speculative, every update taken back"
WAYS = (UNCLIPPED, EXACT, "speculative, every update stands", TAKEN_BACK)
NEVER, ALWAYS = 1e9, 1e-9  # thresholds that no norm exceeds, and that every one does


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", required=True, help="folder on the disk to measure")
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=6, help="of a turn, the first not counted")
    parser.add_argument("--rounds", type=int, default=3, help="turns of every setting")
    parser.add_argument("--only", default="", help="settings whose names contain one of these, and the plain loop")
    parser.add_argument("--one-at-a-time", action="store_true", help="a process a turn, where memory is short")
    parser.add_argument(
        "--clipping", action="store_true", help="compare ways of clipping, in --only's places of states"
    )
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


def plain(args: argparse.Namespace) -> Callable[[], None]:
    """A function that takes one step."""
    import torch

    model = build(SHAPES[args.shape]).train()
    masters = [torch.nn.Parameter(param.detach().float()) for param in model.parameters()]
    optimizer = torch.optim.AdamW(masters, lr=1e-5, fused=True)

    def step() -> None:
        batch = batch_of(model, args)
        model(**batch).loss.backward()
        with torch.no_grad():
            for master, param in zip(masters, model.parameters(), strict=True):
                master.grad, param.grad = param.grad.float(), None
            optimizer.step()
            for master, param in zip(masters, model.parameters(), strict=True):
                master.grad = None
                param.copy_(master)

    return step


def engine_of(args: argparse.Namespace, setting: str, block: dict[str, Any] | None = None, **config: Any) -> Any:
    """All layers in backward, states as ``setting`` says.

    Args:
        block: more of the ``"hift"`` block.
        config: more of the DeepSpeed config.
    """
    import hift_ds

    state = dict(SETTINGS[setting])
    if state["residency"] == "disk":
        state["path"] = args.path
    model = build(SHAPES[args.shape]).train()
    config |= {
        "train_micro_batch_size_per_gpu": args.batch,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "fused": True}},
        "bf16": {"enabled": True},
        "timers": {"throughput": {"enabled": False}},
        "hift": {"update": "in_backward", "group_size": "all", "state": state, **(block or {})},
    }
    engine, *_ = hift_ds.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    return engine


def ours(args: argparse.Namespace) -> Callable[[], None]:
    """A function that takes one step."""
    engine = engine_of(args, args.worker)

    def step() -> None:
        engine.backward(engine(**batch_of(engine.module, args)).loss)
        engine.step()

    return step


def work(args: argparse.Namespace) -> None:
    """For every line on stdin take a turn of steps; what each took goes to stdout."""
    answers, sys.stdout = sys.stdout, sys.stderr
    logging.disable(logging.WARNING)
    step = plain(args) if args.worker == PLAIN else ours(args)
    for _ in sys.stdin:
        wall, cpu = [], []
        for _ in range(args.steps):
            started, busy = time.perf_counter(), time.process_time()
            step()
            wall.append(time.perf_counter() - started)
            cpu.append(time.process_time() - busy)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": wall[1:], "cpu": cpu[1:], "peak_bytes": peak}), file=answers, flush=True)


class Worker:
    """A setting in a process of its own, which sleeps while others have their turns."""

    def __init__(self, name: str) -> None:
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", name]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        self._job = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def turn(self) -> dict[str, Any]:
        assert self._job.stdin is not None and self._job.stdout is not None
        self._job.stdin.write("go\n")
        self._job.stdin.flush()
        answer = self._job.stdout.readline()
        if not answer:
            raise SystemExit(f"a worker ended with {self._job.wait()}")
        return json.loads(answer)

    def end(self) -> None:
        assert self._job.stdin is not None
        self._job.stdin.close()
        self._job.wait()


def table(args: argparse.Namespace, turns: dict[str, list[dict[str, Any]]]) -> str:
    """Medians over all counted steps; a ratio is the median over rounds of a round's own ratio."""
    lines = [
        f"`python benchmarks/in_backward.py "
        f"{' '.join(a for a in sys.argv[1:] if a not in (str(args.out), '--out', args.note, '--note'))}`",
        "",
        f"{platform.processor() or platform.machine()}, {os.environ.get('OMP_NUM_THREADS', '1')} thread(s), "
        f"{args.batch} x {args.length} tokens, {len(turns[PLAIN])} rounds of {args.steps - 1} counted steps. "
        f"{args.note}".strip(),
        "",
        "| setting | s a step (median) | of plain (median of rounds; least, most) | CPU seconds of plain "
        "| peak memory, GiB |",
        "|---|---|---|---|---|",
    ]
    for name, results in turns.items():
        seconds = statistics.median(s for result in results for s in result["seconds"])
        peak = max(result["peak_bytes"] for result in results) / 2**30
        wall, cpu = (ratios(results, turns[PLAIN], key) for key in ("seconds", "cpu"))
        lines.append(
            f"| {name} | {seconds:.3f} | {statistics.median(wall):.3f} ({min(wall):.2f}, {max(wall):.2f}) "
            f"| {statistics.median(cpu):.3f} | {peak:.2f} |"
        )
    return "\n".join(lines)


def ratios(mine: list[dict[str, Any]], base: list[dict[str, Any]], key: str) -> list[float]:
    return [statistics.median(a[key]) / statistics.median(b[key]) for a, b in zip(mine, base, strict=True)]


# -- ways of clipping ------------------------------------------------------------------------------------------------


def clipped_step(engine: Any, way: str, args: argparse.Namespace) -> dict[str, float]:
    """Take one step that is clipped in one of ``WAYS``; its seconds, and those that it waited."""
    from hift_ds.optim.clip_in_backward import ClippingRule

    optimizer = engine.optimizer
    optimizer.max_grad_norm = 0.0 if way == UNCLIPPED else NEVER
    optimizer.clipping = ClippingRule(way.partition(",")[0] if "," in way else "exact", optimizer.max_grad_norm)
    batch = batch_of(engine.module, args)
    started, busy = time.perf_counter(), time.process_time()
    engine.backward(engine(**batch).loss)
    if way == TAKEN_BACK:
        optimizer.max_grad_norm = ALWAYS
    engine.step()
    seconds, cpu = time.perf_counter() - started, time.process_time() - busy
    return {"seconds": seconds, "cpu": cpu, "waited": sum(engine.last_report.waits.values())}


def compare_clipping(args: argparse.Namespace, setting: str) -> dict[str, list[dict[str, list[float]]]]:
    """By way, for each round the counted steps' ``seconds``, ``cpu`` and ``waited``. Of a turn the first step is not
    counted: what it meets is left by another way, and its norm may not be known."""
    engine = engine_of(args, setting, {"clipping": "speculative"}, gradient_clipping=NEVER)
    turns: dict[str, list[dict[str, list[float]]]] = {way: [] for way in WAYS}
    for number in range(args.rounds + 1):  # the first, in which states are made, is not counted
        for way in WAYS if number % 2 else WAYS[::-1]:
            trials = engine.optimizer.trials
            made, undone = trials.num_made, trials.num_undone
            steps = [clipped_step(engine, way, args) for _ in range(args.steps)][1:]
            tried, taken_back = trials.num_made - made, trials.num_undone - undone
            assert number == 0 or tried >= len(steps) * ("speculative" in way) and (tried > 0) == ("speculative" in way)
            assert taken_back == (tried if way == TAKEN_BACK else 0)
            if number:
                turns[way].append({key: [step[key] for step in steps] for key in steps[0]})
    engine.destroy()
    return turns


def clipping_table(args: argparse.Namespace, found: dict[str, dict[str, list[dict[str, list[float]]]]]) -> str:
    """Ratios to ``EXACT`` are medians over rounds of a round's own."""
    lines = [
        "# What waiting for the norm costs in the update in backward, and what speculation saves",
        "",
        f"`python benchmarks/in_backward.py {' '.join(a for a in sys.argv[1:] if a not in (args.note, '--note'))}`",
        "",
        f"{platform.processor() or platform.machine()}, {os.environ.get('OMP_NUM_THREADS', '1')} thread(s), "
        f"{args.batch} x {args.length} tokens, {args.rounds} rounds of {args.steps - 1} counted steps of each way, in "
        f"turn, by one engine for each place of states. {args.note}".strip(),
        "",
        "| states | clipping | s a step (median) | of exact (median of rounds; least, most) | CPU seconds of exact "
        "| of a step it waited |",
        "|---|---|---|---|---|---|",
    ]
    for setting, turns in found.items():
        for way, rounds in turns.items():
            steps = {key: [s for one in rounds for s in one[key]] for key in rounds[0]}
            wall, cpu = (ratios(rounds, turns[EXACT], key) for key in ("seconds", "cpu"))
            lines.append(
                f"| {setting.partition(', ')[2]} | {way} | {statistics.median(steps['seconds']):.3f} "
                f"| {statistics.median(wall):.3f} ({min(wall):.2f}, {max(wall):.2f}) | {statistics.median(cpu):.3f} "
                f"| {sum(steps['waited']) / sum(steps['seconds']):.0%} |"
            )
    return "\n".join(lines)


def main() -> None:
    args = parse()
    if args.worker:
        work(args)
        return
    if args.clipping:
        logging.disable(logging.WARNING)
        names = [n for n in SETTINGS if "resident" not in n and any(word in n for word in args.only.split(","))]
        tell(args, clipping_table(args, {name: compare_clipping(args, name) for name in names}))
        return
    args.one_at_a_time |= args.shape == "1.1b"
    names = [PLAIN, *(name for name in SETTINGS if any(word in name for word in args.only.split(",")))]
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    workers = {} if args.one_at_a_time else {name: Worker(name) for name in names}
    for number in range(args.rounds):
        for name in names if number % 2 == 0 else names[::-1]:  # not always the same one first
            worker = workers.get(name) or Worker(name)
            turns[name].append(worker.turn())
            if args.one_at_a_time:
                worker.end()
    for worker in workers.values():
        worker.end()
    tell(args, table(args, turns))


def tell(args: argparse.Namespace, text: str) -> None:
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
