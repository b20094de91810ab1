"""How long a step would take on a card that is not here: a discrete-event model of its streams, driven by the log of
what the real engine launches.

    python benchmarks/timeline.py --out benchmarks/results/timeline.md

The engine takes its steps on the device without memory that the estimator uses, under
``tests/helpers/stream_clocks.py``, which notes every kernel, copy, wait and synchronization in the order of launch. A
card is a handful of rates. Kernels take the longer of their arithmetic and their bytes; each direction of the link
serves one copy at a time; the host launches one operation after the other and stands still where the log says that it
does. What it leaves out: how kernels share a device, the clock of a hot card, and the host's time outside of launching.
Ratios are better than absolutes.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


@dataclass(frozen=True)
class Card:
    """Sustained rates.

    Attributes:
        flops_s: of bf16 matrix products.
        bytes_s: of device memory.
        link_s: bytes a second, each way, page-locked.
        kernel_s: the shortest kernel.
        launch_s: the host's time for one operation.
    """

    flops_s: float
    bytes_s: float
    link_s: float = 25e9
    kernel_s: float = 3e-6
    launch_s: float = 6e-6


CARDS = {
    "A6000": Card(95e12, 0.69e12),
    "RTX 4090": Card(140e12, 0.92e12),
    "H100 SXM": Card(560e12, 2.9e12),
}
WORKLOADS = {"8 x 512": (8, 512), "1 x 2048": (1, 2048)}
BARE = "a bare loop: torch's forward, backward, clipping and AdamW, states on the device"
SETTINGS: dict[str, dict[str, Any]] = {
    BARE: {},
    "hift_ds, states on the device": {"residency": "device"},
    "host, 1 slot": {"slots": 1},
    "host, 2 slots: the default where memory allows": {"slots": 2},
    "host, 1 slot, device synchronized (DeepSpeed's timer)": {"slots": 1},
    "host, slices of 2^24, 2 slots": {"slice_numel": 1 << 24, "slots": 2},
    "host, slices of 2^24, 8 slots": {"slice_numel": 1 << 24, "slots": 8},
    "host, slices of 2^24, 26 slots": {"slice_numel": 1 << 24, "slots": 26},
    "host, slices of 2^24, 2 slots, split_master+int8_moments": {
        "slice_numel": 1 << 24, "slots": 2, "codec": "split_master+int8_moments",
    },
    "host, 2 slots, split_master": {"slots": 2, "codec": "split_master"},
}  # fmt: skip
GOAL = 1.05
TRAINED = (0, 16, 31)  # blocks that stand for all; the embedding and the head train too


@dataclass(frozen=True)
class Launch:
    """A line of the log, in what the model needs."""

    kind: str
    agent: str
    host: str
    name: str
    bytes_moved: int
    link: str
    flops: int
    after: tuple[int, ...]


def step_times(log: Sequence[Any], card: Card) -> dict[str, float]:
    """By mark, the seconds from it to the next, on the host's clock or the compute stream's, whichever is later."""
    clock: dict[str, float] = {}  # of hosts and streams: when they are free
    link: dict[str, float] = {"in": 0.0, "out": 0.0}
    ended: list[float] = []
    marks: list[tuple[str, float]] = []
    for entry in log:
        waits = max((ended[i] for i in entry.after), default=0.0)
        host = clock.setdefault(entry.host, 0.0)
        if entry.kind == "mark":
            marks.append((entry.name, max(host, clock.get("compute", 0.0))))
            end = host
        elif entry.kind == "sync":
            end = clock[entry.host] = max(host, waits)
        elif entry.kind == "wait":
            end = clock[entry.agent] = max(clock.get(entry.agent, 0.0), waits)
        elif entry.agent == entry.host:  # the host's own arithmetic
            end = clock[entry.host] = host + card.launch_s + entry.bytes_moved / 20e9
        else:
            clock[entry.host] = host + card.launch_s
            start = max(clock.get(entry.agent, 0.0), clock[entry.host], link.get(entry.link, 0.0))
            if entry.link:
                end = link[entry.link] = start + max(entry.bytes_moved / card.link_s, card.kernel_s)
            else:
                end = start + max(entry.flops / card.flops_s, entry.bytes_moved / card.bytes_s, card.kernel_s)
            clock[entry.agent] = end
        ended.append(end)
    return {name: end - start for (name, start), (_, end) in zip(marks, marks[1:], strict=False)}


def mean_step(times: dict[str, float], num_groups: int, num_blocks: int) -> float:
    """Over all groups of the model, from the last cycle: embedding, lowest block, those between, which the inner ones
    stand for, topmost block, head. (The outermost blocks have the embedding and the head for neighbours, whose states
    are of another size.)"""
    steps = [times[f"step {number}"] for number in range(num_groups, 2 * num_groups)]
    inner = steps[2:-2] or steps[1:-1]
    outer = steps[0] + steps[1] + steps[-2] + steps[-1]
    return (outer + (num_blocks - 2) * sum(inner) / len(inner)) / (num_blocks + 2)


def record(
    name: str, state: dict[str, Any], shape: tuple[int, int], model: str, trained: Sequence[int]
) -> list[Launch]:
    """The log of two cycles. Changes this process for good."""
    from hift_ds.engine.engine import HiFTEngine
    from hift_ds.simulation.device import fake_device
    from hift_ds.store.machine import HostBytes, Machine
    from tests.helpers import race_rows, stream_clocks

    if name == BARE:
        return record_bare(shape, model, trained)
    row = race_rows.Row(
        hift={"state": state}, steps=2 * (len(trained) + 2), timer="synchronized" in name,
        more={"timers": {"throughput": {"synchronized": True}}} if "synchronized" in name else {},
    )  # fmt: skip
    with fake_device() as device, tempfile.TemporaryDirectory() as folder:
        race_rows._join(1)
        HiFTEngine.machine = Machine(HostBytes(1 << 60, 1 << 60))  # the card's host is not this one
        with stream_clocks.installed(stream_clocks.Machine(device, count_flops=True)) as machine:
            race_rows.step(row, device, machine, folder, model=_build(model, trained, device), batch=shape)
            return _launches(machine)


def record_bare(shape: tuple[int, int], model: str, trained: Sequence[int]) -> list[Launch]:
    """The same of a loop that anybody would write: the group's weights ask for gradients, fp32 masters, nothing moves
    and nothing is read."""
    import torch

    from hift_ds.forecast.setting import make_batch
    from hift_ds.layers.grouping import partition_model
    from hift_ds.simulation.device import fake_device
    from tests.helpers import race_rows, stream_clocks

    with fake_device() as device:
        race_rows._join(1)
        with stream_clocks.installed(stream_clocks.Machine(device, count_flops=True)) as machine:
            built = _build(model, trained, device).train()
            built.config.use_cache = False
            weights = dict(built.named_parameters())
            groups = [[weights[name] for name in group.param_names] for group in partition_model(built).groups]
            built.requires_grad_(False)
            optimizers = []
            for params in groups:
                masters = [torch.nn.Parameter(param.detach().float()) for param in params]
                optimizers.append(torch.optim.AdamW(masters, lr=1e-4, fused=True))
            for number in range(2 * len(groups)):
                machine.mark(f"step {number}")
                _bare_step(built, make_batch(built, *shape, device), groups[number % len(groups)],
                           optimizers[number % len(groups)])  # fmt: skip
            machine.mark("end")
            return _launches(machine)


def _bare_step(model: Any, inputs: dict[str, Any], params: list[Any], optimizer: Any) -> None:
    import torch

    masters = optimizer.param_groups[0]["params"]
    for param in params:
        param.requires_grad_(True)
    model(**inputs).loss.backward()
    for master, param in zip(masters, params, strict=True):
        master.grad, param.grad = param.grad.float(), None
    torch.nn.utils.clip_grad_norm_(masters, 1.0)
    optimizer.step()
    with torch.no_grad():
        for master, param in zip(masters, params, strict=True):
            param.copy_(master)
            master.grad = None
            param.requires_grad_(False)


def _launches(machine: Any) -> list[Launch]:
    return [Launch(e.kind, e.agent, e.host, e.name, e.bytes_moved, e.link, e.flops, e.after) for e in machine.log]


def _build(model: str, trained: Sequence[int], device: str) -> Any:
    """With random weights in bf16, of which the blocks ``trained``, the embedding and the head ask for gradients."""
    import torch
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    from hift_ds.hf.model_structure import build_on_meta, read_config
    from hift_ds.simulation.step import make_real

    with unset_fake_temporarily():
        built = build_on_meta(read_config(model))
    make_real(built, torch.bfloat16, device)
    for name, param in built.named_parameters():
        block = name.partition("layers.")[2].partition(".")[0]
        param.requires_grad_(not block or int(block) in trained)
    return built


def _modelled(job: tuple[str, dict[str, Any], str, tuple[int, int], str, tuple[int, ...]]) -> dict[str, Any]:
    name, state, workload, shape, model, trained = job
    from hift_ds.hf.model_structure import read_config

    num_blocks = read_config(model).num_hidden_layers
    log = record(name, state, shape, model, trained)
    at = {entry.name: position for position, entry in enumerate(log) if entry.kind == "mark"}
    syncs = sum(entry.kind == "sync" for entry in log[at[f"step {2 * len(trained) + 3}"] : at["end"]])
    seconds = {card: mean_step(step_times(log, rates), len(trained) + 2, num_blocks) for card, rates in CARDS.items()}
    return {"setting": name, "workload": workload, "seconds": seconds, "syncs": syncs, "launches": len(log)}


def model_all(
    model: str = "llama2_7b",
    settings: Sequence[str] = tuple(SETTINGS),
    workloads: Sequence[str] = tuple(WORKLOADS),
    trained: tuple[int, ...] = TRAINED,
    told: Callable[[list[dict[str, Any]]], None] = lambda found: None,
) -> list[dict[str, Any]]:
    """Every setting under every workload: seconds a step by card, host synchronizations of a step.

    Args:
        trained: blocks that train and stand for all; the others are frozen, which costs the same.
        told: called with what there is after each.
    """
    import trl.models.activation_offloading  # noqa: F401

    import hift_ds.engine.initialize
    import hift_ds.simulation.accelerator
    import hift_ds.simulation.step  # noqa: F401

    jobs = [(name, SETTINGS[name], w, WORKLOADS[w], model, trained) for w in workloads for name in settings]
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        found = []
        for one in pool.imap(_modelled, jobs):
            found.append(one)
            told(found)
        return found


def table(found: Sequence[dict[str, Any]], model: str) -> str:
    lines = [
        f"# Modelled step times, {model}",
        "",
        "**Modelled, not measured**: a discrete-event model of streams, link and host, driven by the log of what the "
        "real",
        "engine launches on a device without memory. Made by `benchmarks/timeline.py`, which says what it leaves "
        "out. One",
        "rank, one layer a group, bf16 with fp32 masters, fused AdamW, attention without scores, no recomputation, "
        "25 GB/s",
        f"each way. The mean over all groups, as a factor of a bare loop with the same groups; goal {GOAL:.2f}.",
        "",
    ]
    for workload in dict.fromkeys(row["workload"] for row in found):
        rows = [row for row in found if row["workload"] == workload]
        bare = next(row["seconds"] for row in rows if row["setting"] == BARE)
        lines += [f"## {workload} tokens", "", f"| states | {' | '.join(CARDS)} | the host waits, per step |",
                  f"|---|{'---|' * len(CARDS)}---|"]  # fmt: skip
        for row in rows:
            if row["setting"] == BARE:
                cells = [f"{row['seconds'][card]:.3f} s" for card in CARDS]
            else:
                cells = [_cell(row["seconds"][card] / bare[card]) for card in CARDS]
            lines.append(f"| {row['setting']} | {' | '.join(cells)} | {row['syncs']} |")
        lines.append("")
    return "\n".join(lines)


def _cell(ratio: float) -> str:
    text = f"{ratio:.2f}"
    return f"**{text}**" if ratio <= GOAL + 0.005 else text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama2_7b")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--settings", type=int, nargs="*", help="positions in SETTINGS; default: all")
    args = parser.parse_args()
    names = list(SETTINGS) if args.settings is None else [list(SETTINGS)[i] for i in args.settings]
    with contextlib.redirect_stdout(sys.stderr):
        found = model_all(args.model, names, told=lambda found: print(found[-1], flush=True))
    text = table(found, args.model)
    (args.out.write_text(text) if args.out else print(text))


if __name__ == "__main__":
    main()
