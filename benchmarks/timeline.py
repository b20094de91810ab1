"""How long a step would take on a card that is not here: a discrete-event model of its streams, driven by the log of
what the real engine launches.

    python benchmarks/timeline.py --out benchmarks/results/timeline.md              ten seconds a row
    python benchmarks/timeline.py --settings 0 4 --out FILE                         these rows
    python benchmarks/timeline.py --in-backward --out benchmarks/results/timeline_in_backward.md
    python benchmarks/timeline.py --rows FILE --out FILE    rows are kept: an interrupted run goes on

The engine takes its steps on the device without memory that the estimator uses, under
``tests/helpers/stream_clocks.py``, which notes every kernel, copy, file, wait and synchronization in the order of
launch. A card is a handful of rates. Kernels take the longer of their arithmetic and their bytes; each direction of the
link serves one copy at a time, and a disk one request, whichever is ready first; the host launches one operation after
the other and stands still where the log says that it does. What it leaves out: how kernels share a device, the clock of
a hot card, and the host's time outside of launching. Ratios are better than absolutes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.helpers.race_rows import in_child  # noqa: E402


@dataclass(frozen=True)
class Card:
    """Sustained rates, all assumed.

    Attributes:
        flops_s: of bf16 matrix products.
        bytes_s: of device memory.
        link_s: bytes a second, each way, page-locked.
        kernel_s: the shortest kernel.
        launch_s: the host's time for one operation.
        host_s: bytes a second of the host's own arithmetic, all cores.
        read_s, written_s: of a disk: one NVMe drive on four lanes of PCIe 4.
    """

    flops_s: float
    bytes_s: float
    link_s: float = 25e9
    kernel_s: float = 3e-6
    launch_s: float = 6e-6
    host_s: float = 100e9
    read_s: float = 6e9
    written_s: float = 4e9

    def rate(self, link: str) -> float:
        return {"read": self.read_s, "written": self.written_s}.get(link, self.link_s)


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
    "disk, 2 slots": {"residency": "disk", "slots": 2},
    "disk, 2 slots, split_master+int8_moments": {
        "residency": "disk", "slots": 2, "codec": "split_master+int8_moments",
    },
}  # fmt: skip
GOAL = 1.05
TRAINED = (0, 16, 31)  # blocks that stand for all; the embedding and the head train too
# What a stream or the host waited for, by the link of the entry that it waited for.
WORDS = {
    "in": "states to arrive", "out": "states to leave", "read": "the disk", "written": "the disk",
    "computing": "the whole device", "launches": "the host's launches", "host": "the host's arithmetic",
}  # fmt: skip
MOVES = ("in", "out", "read", "written")  # over the link, or a disk
RESOURCES = {"in": "the link (in)", "out": "the link (out)", "disk": "the disk"}
BOUND = 0.85  # a resource that is busy for so much of a step bounds it
NEXT_TO_NOTHING = 0.02  # of a step


@dataclass(slots=True)
class Launch:
    """A line of the log, in what the model needs."""

    kind: str
    agent: str
    host: str
    name: str
    bytes_moved: float
    link: str
    flops: float
    after: tuple[int, ...]


@dataclass
class Step:
    """From a mark to the next.

    Attributes:
        seconds: on the host's clock or the compute stream's, whichever is later.
        waited: of these the compute stream stood still, by cause (see ``WORDS``).
        busy: seconds of work by link, and "disk".
    """

    seconds: float = 0.0
    waited: Counter[str] = field(default_factory=Counter)
    busy: Counter[str] = field(default_factory=Counter)


@dataclass
class _Agent:
    """A stream or a thread of the host: when it is free, for what it last waited, and until when."""

    free: float = 0.0
    cause: str = ""
    waited_until: float = 0.0

    def wait(self, until: float, cause: str) -> None:
        if until > self.free:
            self.free = self.waited_until = until
            self.cause = cause


@dataclass
class _Link:
    """One direction of the link, or a disk: serves one request at a time, and whichever is ready first. (One that waits
    for an event on its stream keeps none on another stream from going ahead.)

    Attributes:
        starts, ends: of the stretches in which it is busy, in order.
    """

    starts: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)

    def serve(self, ready: float, seconds: float) -> float:
        """When a request that could begin at ``ready`` has been served: in the first gap that is long enough."""
        at, start = bisect_right(self.ends, ready), ready
        while at < len(self.starts) and self.starts[at] < start + seconds:
            start = self.ends[at]
            at += 1
        end = start + seconds
        if at and self.ends[at - 1] == start:  # no gap before it
            self.ends[at - 1] = end
        else:
            self.starts.insert(at, start)
            self.ends.insert(at, end)
        return end


def steps_of(log: Sequence[Any], card: Card) -> dict[str, Step]:
    """What happens from each mark to the next, by mark."""
    agents: dict[str, _Agent] = {}
    links: defaultdict[str, _Link] = defaultdict(_Link)
    ended: list[float] = []
    causes: list[str] = []  # why whoever waits for the entry waits
    marks: list[tuple[str, float]] = []
    step = Step()
    found: dict[str, Step] = {}
    for entry in log:
        agent, host = (agents.setdefault(name, _Agent()) for name in (entry.agent, entry.host))
        last = max(entry.after, key=lambda i: ended[i], default=None)
        until, cause = (0.0, "") if last is None else (ended[last], causes[last])
        if entry.kind == "mark":
            now = max(host.free, agents.get("compute", host).free)
            if marks:
                step.seconds = now - marks[-1][1]
                found[marks[-1][0]] = step
            marks.append((entry.name, now))
            step = Step()
        elif entry.kind == "start":
            agent.free = max(agent.free, host.free)
        elif entry.kind == "sync":
            host.wait(until, cause)
        elif entry.kind == "wait":
            before = agent.free
            agent.wait(until, cause)
            if entry.agent == "compute" and agent.free > before:
                step.waited[cause] += agent.free - before
        elif entry.agent == entry.host:  # the host's own work
            cause = entry.link or "host"
            seconds = entry.bytes_moved / (card.rate(entry.link) if entry.link else card.host_s)
            if entry.link:
                host.free = links["disk"].serve(host.free, seconds + card.launch_s)
                step.busy["disk"] += seconds
            else:
                host.free += seconds + card.launch_s
        else:
            cause = entry.link or "computing"
            host.free += card.launch_s
            if entry.agent == "compute":
                _note_late_launch(step, agent, host)
            start = max(agent.free, host.free)
            if entry.link:
                seconds = max(entry.bytes_moved / card.link_s, card.kernel_s)
                agent.free = links[entry.link].serve(start, seconds)
                step.busy[entry.link] += seconds
            else:
                seconds = max(entry.flops / card.flops_s, entry.bytes_moved / card.bytes_s, card.kernel_s)
                agent.free = start + seconds
        ended.append(host.free if entry.kind in ("mark", "sync") else agent.free)
        causes.append(cause or agent.cause)
    return found


def _note_late_launch(step: Step, compute: _Agent, host: _Agent) -> None:
    """The compute stream has nothing to do until the host comes: because that waited, or since launching takes time."""
    late = host.free - compute.free
    if late <= 0:
        return
    blocked = min(max(host.waited_until - compute.free, 0.0), late) if host.cause else 0.0
    if blocked:
        step.waited[host.cause] += blocked
    step.waited["launches"] += late - blocked


def step_times(log: Sequence[Any], card: Card) -> dict[str, float]:
    """By mark, the seconds from it to the next."""
    return {name: step.seconds for name, step in steps_of(log, card).items()}


def mean_step(times: dict[str, float], num_groups: int, num_blocks: int) -> float:
    """Over all groups of the model, from the last cycle: embedding, lowest block, those between, which the inner ones
    stand for, topmost block, head. (The outermost blocks have the embedding and the head for neighbours, whose states
    are of another size.)"""
    steps = [times[f"step {number}"] for number in range(num_groups, 2 * num_groups)]
    inner = steps[2:-2] or steps[1:-1]
    outer = steps[0] + steps[1] + steps[-2] + steps[-1]
    return (outer + (num_blocks - 2) * sum(inner) / len(inner)) / (num_blocks + 2)


def mean_of(steps: dict[str, Step], num_groups: int, num_blocks: int) -> Step:
    """:func:`mean_step` of everything."""

    def mean(value: Callable[[Step], float]) -> float:
        return mean_step({name: value(step) for name, step in steps.items()}, num_groups, num_blocks)

    def by_name(part: str) -> Counter[str]:
        names = {name for step in steps.values() for name in getattr(step, part)}
        return Counter({name: mean(lambda step, name=name: getattr(step, part)[name]) for name in names})

    return Step(mean(lambda step: step.seconds), by_name("waited"), by_name("busy"))


def why(step: Step) -> str:
    """What a step waited for, and whether something bounds it however it is arranged."""
    if step.waited.total() < NEXT_TO_NOTHING * step.seconds:
        return "waits for next to nothing: it computes more than the bare loop"
    waited = [
        f"{seconds:.2f} s for {WORDS.get(cause, cause)}"
        for cause, seconds in step.waited.most_common()
        if seconds >= 0.1 * step.waited.total()
    ]
    busiest, seconds = max(step.busy.items(), key=lambda item: item[1], default=("", 0.0))
    share = seconds / step.seconds if step.seconds else 0.0
    text = f"waits {', '.join(waited)}"
    if not busiest:
        return text
    if share >= BOUND:
        return f"{text}; {RESOURCES[busiest]} is busy for {seconds:.2f} s, {share:.0%} of the step, and bounds it"
    return f"{text}; {RESOURCES[busiest]} is busy for {share:.0%} of the step only: what moves had to wait for a slot"


def record(
    name: str, state: dict[str, Any], shape: tuple[int, int], model: str, trained: Sequence[int]
) -> list[Launch]:
    """The log of two cycles. Changes this process for good."""
    from tests.helpers import race_rows

    if name == BARE:
        return record_bare(shape, model, trained)
    row = race_rows.Row(
        hift={"state": state}, steps=2 * (len(trained) + 2), timer="synchronized" in name,
        more={"timers": {"throughput": {"synchronized": True}}} if "synchronized" in name else {},
    )  # fmt: skip
    return record_row(row, shape, model, trained)


def record_row(row: Any, shape: tuple[int, int], model: str, trained: Sequence[int] | None) -> list[Launch]:
    """The log of a row's steps.

    Args:
        trained: blocks that ask for gradients; ``None``: all.
    """
    from hift_ds.engine.engine import HiFTEngine
    from hift_ds.simulation.device import fake_device
    from hift_ds.store.machine import HostBytes, Machine
    from tests.helpers import race_rows, stream_clocks

    with fake_device() as device, tempfile.TemporaryDirectory() as folder:
        race_rows._join(1)
        # The card's host is not this one.
        HiFTEngine.machine = Machine(HostBytes(1 << 60, 1 << 60))
        if row.hift["state"].get("residency") == "disk":
            row = replace(row, hift={**row.hift, "state": {**row.hift["state"], "path": folder}})
        with stream_clocks.installed(stream_clocks.Machine(device, count_flops=True)) as machine:
            race_rows.step(row, device, machine, folder, model=_build(model, trained, device), batch=shape)
            return _launches(machine)


def record_bare(
    shape: tuple[int, int], model: str, trained: Sequence[int] | None, at_once: bool = False
) -> list[Launch]:
    """The same of a loop that anybody would write: the group's weights ask for gradients, fp32 masters, nothing moves
    and nothing is read.

    Args:
        at_once: all groups are one.
    """
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
            if at_once:
                groups = [[param for group in groups for param in group]]
            built.requires_grad_(False)
            optimizers = []
            for params in groups:
                masters = [torch.nn.Parameter(param.detach().float()) for param in params]
                optimizers.append(torch.optim.AdamW(masters, lr=1e-4, fused=True))
            for number in range(2 * len(groups)):
                machine.mark(f"step {number}")
                _bare_step(built, make_batch(built, *shape, device), groups[number % len(groups)],
                           optimizers[number % len(groups)], clips=not at_once)  # fmt: skip
            machine.mark("end")
            return _launches(machine)


def _bare_step(model: Any, inputs: dict[str, Any], params: list[Any], optimizer: Any, clips: bool = True) -> None:
    import torch

    masters = optimizer.param_groups[0]["params"]
    for param in params:
        param.requires_grad_(True)
    model(**inputs).loss.backward()
    for master, param in zip(masters, params, strict=True):
        master.grad, param.grad = param.grad.float(), None
    if clips:
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
    optimizer.step()
    with torch.no_grad():
        for master, param in zip(masters, params, strict=True):
            param.copy_(master)
            master.grad = None
            param.requires_grad_(False)


def _launches(machine: Any) -> list[Launch]:
    """The log up to the mark "end": an engine that is collected as garbage gives its memory back when that comes."""
    end = next(i for i, entry in enumerate(machine.log) if (entry.kind, entry.name) == ("mark", "end"))
    log = machine.log[: end + 1]
    return [Launch(e.kind, e.agent, e.host, e.name, e.bytes_moved, e.link, e.flops, e.after) for e in log]


def _build(model: str, trained: Sequence[int] | None, device: str) -> Any:
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
        param.requires_grad_(trained is None or not block or int(block) in trained)
    return built


def _modelled(job: tuple[str, dict[str, Any], str, tuple[int, int], str, tuple[int, ...]]) -> dict[str, Any]:
    name, state, workload, shape, model, trained = job
    from hift_ds.hf.model_structure import read_config

    num_blocks = read_config(model).num_hidden_layers
    log = record(name, state, shape, model, trained)
    at = {entry.name: position for position, entry in enumerate(log) if entry.kind == "mark"}
    last = log[at[f"step {2 * len(trained) + 3}"] : at["end"]]
    syncs = sum(entry.kind == "sync" and entry.host == "host" for entry in last)  # threads may wait
    means = {card: mean_of(steps_of(log, rates), len(trained) + 2, num_blocks) for card, rates in CARDS.items()}
    return {
        "setting": name, "workload": workload, "seconds": {card: step.seconds for card, step in means.items()},
        "why": {card: why(step) for card, step in means.items()}, "syncs": syncs, "launches": len(log),
    }  # fmt: skip


def _import_once() -> None:
    """What every child would import."""
    import trl.models.activation_offloading  # noqa: F401

    import hift_ds.engine.initialize
    import hift_ds.simulation.accelerator
    import hift_ds.simulation.step  # noqa: F401


def model_all(
    model: str = "llama2_7b",
    settings: Sequence[str] = tuple(SETTINGS),
    workloads: Sequence[str] = tuple(WORKLOADS),
    trained: tuple[int, ...] = TRAINED,
    told: Callable[[dict[str, Any]], None] = lambda row: None,
    known: Sequence[dict[str, Any]] = (),
) -> list[dict[str, Any]]:
    """Every setting under every workload: seconds a step by card, host synchronizations of a step.

    Args:
        trained: blocks that train and stand for all; the others are frozen, which costs the same.
        told: called with each new row.
        known: rows that need not be made again.
    """
    _import_once()
    before = {(row["setting"], row["workload"]): row for row in known}
    found = []
    for workload in workloads:
        for name in settings:
            row = before.get((name, workload))
            if row is None:
                job = (name, SETTINGS[name], workload, WORKLOADS[workload], model, trained)
                row = in_child(_modelled, job, seconds=1800)
                told(row)
            found.append(row)
    return found


ASSUMED = (
    "**Modelled, not measured**: a discrete-event model of streams, link, disk and host, driven by the log of what "
    "the real\nengine launches on a device without memory. Made by `benchmarks/timeline.py`, which says what it leaves "
    "out. Assumed: bf16\nproducts at 95, 140 and 560 TFLOP/s, memory at 0.69, 0.92 and 2.9 TB/s, 25 GB/s each way over "
    "the link, a disk of 6 GB/s read\nand 4 GB/s written, one request at a time. One rank, bf16 with fp32 masters, "
    "fused AdamW, attention without scores, no\nrecomputation; "
    "whether a card has the memory is not asked: LLaMA-2-7B takes 33 GiB at 8 x 512 tokens."
)


def table(found: Sequence[dict[str, Any]], model: str) -> str:
    """In Markdown. Every cell above the goal has a line that says why."""
    lines = [
        f"# Modelled step times, {model}", "", ASSUMED, "",
        "One layer a group; the mean over all groups, as a factor of a bare loop with the same groups; goal "
        f"{GOAL:.2f}.", "",
    ]  # fmt: skip
    for workload in dict.fromkeys(row["workload"] for row in found):
        rows = [row for row in found if row["workload"] == workload]
        bare = next(row["seconds"] for row in rows if row["setting"] == BARE)
        lines += [f"## {workload} tokens", "", f"| states | {' | '.join(CARDS)} | the host waits, per step |",
                  f"|---|{'---|' * len(CARDS)}---|"]  # fmt: skip
        reasons = []
        for row in rows:
            if row["setting"] == BARE:
                cells = [f"{row['seconds'][card]:.3f} s" for card in CARDS]
            else:
                ratios = {card: row["seconds"][card] / bare[card] for card in CARDS}
                cells = [_cell(ratio) for ratio in ratios.values()]
                reasons += [f"- {row['setting']}, {card}, {ratio:.2f}: {row['why'][card]}"
                            for card, ratio in ratios.items() if not _is_good(ratio)]  # fmt: skip
            lines.append(f"| {row['setting']} | {' | '.join(cells)} | {row['syncs']} |")
        lines += ["", "Above the goal, and why:", "", *reasons, ""] if reasons else [""]
    return "\n".join(lines).rstrip() + "\n"


def _is_good(ratio: float) -> bool:
    return ratio <= GOAL + 0.005


def _cell(ratio: float) -> str:
    text = f"{ratio:.2f}"
    return f"**{text}**" if _is_good(ratio) else text


# -- the update in backward ------------------------------------------------------------------------------------------


LENGTH = 512  # of the rows of the two logs from which those of other batches follow
ROWS = (2, 3)
IN_BACKWARD = {"none": 12.0, "split_master": 10.0, "split_master+int8_moments": 4.03}  # bytes a parameter, each way
UNCLIPPED, TAKEN_BACK = "none", "speculative, taken back"
CLIPPED = ("exact", "speculative", TAKEN_BACK)  # ways of clipping that wait, or may not have to
# With smaller states, those between which the others lie: nothing waits for the norm, or every update does.
WAYS = {codec: (UNCLIPPED, *CLIPPED) if codec == "none" else (UNCLIPPED, "exact") for codec in IN_BACKWARD}
SLOTS = 2
TOKENS = (4096, 16384)
MOST_TOKENS = 1 << 20


@dataclass(frozen=True)
class Affine:
    """The logs of a step with ``ROWS`` rows, which differ in bytes and operations only: both grow by as much with each
    further row. (With one row the labels' copy is a view, and one launch less.)"""

    few: list[Launch]
    more: list[Launch]
    _steps: dict[tuple[float, Card], Step] = field(default_factory=dict, repr=False, compare=False)  # worked out before

    def __post_init__(self) -> None:
        same = [(e.kind, e.agent, e.host, e.name, e.link, e.after) for e in self.few]
        other = [(e.kind, e.agent, e.host, e.name, e.link, e.after) for e in self.more]
        assert same == other, "the number of rows changes what is launched"

    def rows(self, number: float) -> Iterator[Launch]:
        """The log of a step with ``number`` rows."""
        further = (number - ROWS[0]) / (ROWS[1] - ROWS[0])
        for few, more in zip(self.few, self.more, strict=True):
            moved = few.bytes_moved + further * (more.bytes_moved - few.bytes_moved)
            flops = few.flops + further * (more.flops - few.flops)
            yield Launch(few.kind, few.agent, few.host, few.name, moved, few.link, flops, few.after)

    def step(self, tokens: float, card: Card) -> Step:
        """The last step, in which states exist, and a trial has been made before."""
        if (tokens, card) not in self._steps:
            *_, self._steps[tokens, card] = steps_of(list(self.rows(tokens / LENGTH)), card).values()
        return self._steps[tokens, card]


def record_in_backward(model: str, codec: str | None, clipping: str = UNCLIPPED) -> Affine:
    """The logs of steps that update all layers in backward; of a bare loop if ``codec`` is ``None``.

    Args:
        clipping: ``UNCLIPPED``, or one of ``CLIPPED``. No step is over the norm, but for ``TAKEN_BACK`` every one is.
    """
    return Affine(*(in_child(_record_full, model, codec, clipping, rows, seconds=1800) for rows in ROWS))


def _record_full(model: str, codec: str | None, clipping: str, rows: int) -> list[Launch]:
    from tests.helpers import race_rows

    if codec is None:
        return record_bare((rows, LENGTH), model, None, at_once=True)
    state: dict[str, Any] = {"slots": SLOTS, **({} if codec == "none" else {"codec": codec})}
    hift = {"update": "in_backward", "group_size": "all", "state": state}
    if clipping == UNCLIPPED:
        row = race_rows.Row(hift=hift, steps=2, clip=0.0)
    else:  # the first step's norm is not known before, so that the second is the first that may try
        hift["clipping"] = clipping.partition(",")[0]
        row = race_rows.Row(hift=hift, steps=3, clip=1.0, undoes=clipping == TAKEN_BACK)
    return record_row(row, (rows, LENGTH), model, None)


def tokens_from_which(is_good: Callable[[float], bool]) -> int | None:
    """The fewest tokens a step, within 3 %, that are good; ``None``: no number up to ``MOST_TOKENS`` is."""
    low, high = LENGTH, LENGTH
    while not is_good(high):
        low, high = high, 2 * high
        if high > MOST_TOKENS:
            return None
    while high - low > 0.03 * low:
        middle = (low + high) // 2
        low, high = (low, middle) if is_good(middle) else (middle, high)
    return high


def hides_the_link(step: Step) -> bool:
    """True if the step waits for what moves no longer than ``GOAL`` allows, as ``"group_size": "auto"`` means it."""
    waited = sum(step.waited[link] for link in MOVES)
    return step.seconds <= GOAL * (step.seconds - waited)


def model_in_backward(
    model: str,
    codecs: Sequence[str],
    told: Callable[[dict[str, Any]], None],
    known: Sequence[dict[str, Any]] = (),
) -> list[dict[str, Any]]:
    """By codec, way of clipping and card: the factor of a bare loop's step, and the tokens from which it is good.

    Args:
        told: called with each new row.
        known: rows that need not be made again.
    """
    _import_once()
    before = {(row["codec"], row["clipping"], row["card"]): row for row in known}
    wanted = [(codec, way) for codec in codecs for way in WAYS[codec]]
    bare = None
    found = []
    for codec, clipping in wanted:
        ours = None
        for card, rates in CARDS.items():
            if (codec, clipping, card) not in before:
                bare = bare or record_in_backward(model, None)
                ours = ours or record_in_backward(model, codec, clipping)
                steps = {tokens: (ours.step(tokens, rates), bare.step(tokens, rates)) for tokens in TOKENS}
                row = {
                    "codec": codec, "clipping": clipping, "card": card, **_enough(ours, bare, rates),
                    "factors": {tokens: step.seconds / alone.seconds for tokens, (step, alone) in steps.items()},
                    "bare": {tokens: alone.seconds for tokens, (_, alone) in steps.items()},
                    "why": {tokens: why(step) for tokens, (step, _) in steps.items()},
                }  # fmt: skip
                told(row)
                before[codec, clipping, card] = row
            found.append(before[codec, clipping, card])
    return found


def _enough(ours: Affine, bare: Affine, card: Card) -> dict[str, int | None]:
    """From how many tokens on a step takes at most ``GOAL`` times as long as the bare loop's, and from how many on the
    link hides."""
    within = tokens_from_which(lambda n: ours.step(n, card).seconds <= GOAL * bare.step(n, card).seconds)
    return {"from": within, "hidden": tokens_from_which(lambda n: hides_the_link(ours.step(n, card)))}


def in_backward_table(found: Sequence[dict[str, Any]], model: str) -> str:
    lines = [
        f"# Modelled steps that update all layers in backward, {model}", "", ASSUMED, "",
        'Every weight in every step (`"update": "in_backward", "group_size": "all"`), whole parts in two slots; as a '
        "factor of\na bare loop that trains all weights, unclipped, with states on the device, which no card here has "
        f"room for; goal {GOAL:.2f}. Bytes:\nof a parameter's states, each way. Clipping: no step is over the norm, "
        "but for those that are taken back every one is.\nThe link hides: a step waits for what moves for at most 5 % "
        "of its computing. Codecs compute too: a step may wait for nothing and\nbe above the goal.", "",
        f"| card | `codec` | bytes | `clipping` | {' | '.join(f'{tokens:,} tokens' for tokens in TOKENS)} | "
        "the link hides from, tokens | within the goal from |",
        "|---|---|---|---|" + "---|" * (len(TOKENS) + 2),
    ]  # fmt: skip
    reasons = []
    for card in CARDS:
        for row in (row for row in found if row["card"] == card):
            cells = [f"{_cell(row['factors'][tokens])} of {row['bare'][tokens]:.2f} s" for tokens in TOKENS]
            enough = [f"{row[key]:,}" if row[key] else f"more than {MOST_TOKENS:,}" for key in ("hidden", "from")]
            moved = f"{row['codec']} | {IN_BACKWARD[row['codec']]:g} | {row['clipping']}"
            lines.append(f"| {card} | {moved} | {' | '.join([*cells, *enough])} |")
            reasons += [
                f"- {card}, {_words(row)}, {tokens:,} tokens, {row['factors'][tokens]:.2f}: {row['why'][tokens]}"
                for tokens in TOKENS if not _is_good(row["factors"][tokens])
            ]  # fmt: skip
    return "\n".join([*lines, "", "Above the goal, and why:", "", *reasons, ""])


def _words(row: dict[str, Any]) -> str:
    clipped = "" if row["clipping"] == UNCLIPPED else f", clipping {row['clipping']}"
    return f"codec {row['codec']}{clipped}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama2_7b")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--settings", type=int, nargs="*", help="positions in SETTINGS; default: all")
    parser.add_argument("--workloads", nargs="*", default=list(WORKLOADS))
    parser.add_argument("--in-backward", nargs="*", metavar="CODEC", help="the update in backward; default: all codecs")
    parser.add_argument("--rows", type=Path, help="a file of rows of this very code, which is read and added to")
    args = parser.parse_args()
    known = [json.loads(line) for line in args.rows.read_text().splitlines()] if _is_file(args.rows) else []

    def tell(row: dict[str, Any]) -> None:
        print(row, file=sys.stderr, flush=True)
        if args.rows:
            with args.rows.open("a") as lines:
                lines.write(json.dumps(row) + "\n")

    known = [_with_whole_keys(row) for row in known]
    with contextlib.redirect_stdout(sys.stderr):
        if args.in_backward is not None:
            rows = model_in_backward(args.model, args.in_backward or list(IN_BACKWARD), tell, known)
        else:
            names = list(SETTINGS) if args.settings is None else [list(SETTINGS)[i] for i in args.settings]
            rows = model_all(args.model, names, args.workloads, told=tell, known=known)
    text = table(rows, args.model) if args.in_backward is None else in_backward_table(rows, args.model)
    (args.out.write_text(text) if args.out else print(text))


def _is_file(path: Path | None) -> bool:
    return path is not None and path.is_file()


def _with_whole_keys(row: dict[str, Any]) -> dict[str, Any]:
    """As before it was JSON, which knows no keys that are numbers."""
    by_tokens = ("factors", "bare", "why") if "factors" in row else ()
    return row | {name: {int(tokens): value for tokens, value in row[name].items()} for name in by_tokens}


if __name__ == "__main__":
    main()
