"""Settings that fit a card: of the exact switches and the micro-batches those that lose least time.

Every candidate takes the same optimizer steps; they differ in memory and time. Memory is counted by the simulation.
Time is modelled from the operations and bytes that the simulation counts, and decides between candidates only; it is
promised to nobody.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hift_ds.forecast.lines import through
from hift_ds.forecast.setting import (
    SLICE_NUMEL,
    WORKSPACE_BYTES,
    GroupStep,
    Setting,
    torch_has_fake_devices,
    with_hift,
    with_switch,
)
from hift_ds.forecast.steps import GIB, Request, Slope, Steps, Structure, read_structure, run_requests, worst_step
from hift_ds.store.speeds import ASSUMED_SPEEDS, Speeds

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CONTEXT_GIB = 0.6  # of the driver and its libraries: assumed
# Buffers of NCCL on several ranks: up to 0.5 a communicator, of which DeepSpeed makes two. Assumed.
NCCL_GIB = 1.0
FRAGMENTATION = 0.05  # of the allocated bytes, held by the allocator beside them: assumed
_STATES = "states"  # the simulation's category of states on the device
STATE_BYTES = 12  # of a 16-bit weight's fp32 master and AdamW's moments

SMALL_PASS = 256  # tokens: a pass of so many is taken to run at half of the device's speed
MOST_TOKENS = 8192  # in a pass: more are not faster
OFFLOAD_COST = 0.05  # of the computing, for copies that compete with it
# What is tried, besides the state's place: each names the switches that are on, from nothing to all.
LADDER = (
    (),
    ("chunked_loss",),
    ("chunked_loss", "slice_numel"),
    ("chunked_loss", "checkpointing"),
    ("chunked_loss", "checkpointing", "slice_numel"),
    ("chunked_loss", "checkpointing", "slice_numel", "offload"),
)
STREAMED = {"stage": 3, "offload_param": {"device": "cpu", "pin_memory": True}}
NAMES = {
    "checkpointing": "recomputed blocks",
    "chunked_loss": "loss in chunks",
    "slice_numel": "update in slices",
    "offload": "activations offloaded to the host",
    "residency": "optimizer states on the device",
    "streaming": "weights streamed from host memory (ZeRO-3)",
}
NOTHING_ON = "no memory-saving option"
VERIFIED = 3  # candidates that are counted whole before the leanest is taken


def budget_gib(card: float, world_size: int) -> float:
    """What may be allocated on a card of ``card`` GiB, by the assumptions."""
    return (card - CONTEXT_GIB - (NCCL_GIB if world_size > 1 else 0)) / (1 + FRAGMENTATION) - WORKSPACE_BYTES / GIB


@dataclass(frozen=True)
class Question:
    """What may be chosen, and for what.

    Attributes:
        setting: of the run as it is written, at any batch.
        free: names of ``NAMES`` that nobody has set.
        batches: micro-batches to choose from; a single one: as it is given.
        rows: of one rank in an optimizer step.
        usable_bytes: that may be allocated.
        speeds: of the device.
        num_blocks: of the model; recomputing some of them only is tried where it is given.
    """

    setting: Setting
    free: frozenset[str]
    batches: tuple[int, ...]
    rows: int
    usable_bytes: int
    speeds: Speeds = ASSUMED_SPEEDS
    num_blocks: int = 0


@dataclass(frozen=True)
class Candidate:
    """One way to run.

    Attributes:
        setting: with its switches and micro-batch.
        on: what was switched on of what is free.
        blocks_kept: of recomputed blocks, those that keep their activations after all.
        peak_bytes: forecast.
        seconds: of an optimizer step, modelled.
    """

    setting: Setting
    on: tuple[str, ...]
    blocks_kept: int
    peak_bytes: int
    seconds: float

    def words(self, rows: int | None = None) -> str:
        """The choice in words: "micro-batch 4 x 2 accumulation steps, recomputed blocks (but for the top 3), loss in
        chunks"; accumulation where the ``rows`` of a step are given.
        """
        kept = f" (but for the top {self.blocks_kept})" if self.blocks_kept else ""
        names = [NAMES[name] + (kept if name == "checkpointing" else "") for name in self.on]
        batch = f"micro-batch {self.setting.batch}" + (f" x {accumulation(rows // self.setting.batch)}" if rows else "")
        return ", ".join([batch, *(names or [NOTHING_ON])])


@dataclass(frozen=True)
class Fit:
    """The answer.

    Attributes:
        chosen: the fastest that fits; if none does, the one that needs least.
        fits: whether it does.
        fastest: with all the memory in the world.
        compared: every candidate, fastest first.
    """

    chosen: Candidate
    fits: bool
    fastest: Candidate
    compared: tuple[Candidate, ...]


def divisors_up_to(rows: int, most: int) -> tuple[int, ...]:
    """Micro-batches that divide ``rows``, in order; 1 always."""
    return tuple(n for n in range(1, rows + 1) if rows % n == 0 and (n <= most or n == 1))


def find_fit(question: Question) -> Fit:
    """Step every candidate on the fake device and choose. Takes seconds to a minute, in processes of its own.

    Raises:
        HiFTError: the engine refuses the setting, or the simulation failed.
    """
    setting = replace(question.setting, on_host=not torch_has_fake_devices())
    question = replace(question, setting=setting)
    structure = read_structure(setting)
    compared = sorted(_candidates(question, structure, LADDER[:-1]), key=lambda one: one.seconds)
    best = _first_that_fits(compared, question, structure)
    if best is None and "offload" in question.free:
        more = sorted(_candidates(question, structure, LADDER[-1:]), key=lambda one: one.seconds)
        compared += more
        best = _first_that_fits(more, question, structure)
    if best is None and "streaming" in question.free:
        streamed = _streamed(question)
        more = sorted(_candidates(streamed, structure, LADDER[:-1]), key=lambda one: one.seconds)
        more = [replace(one, on=("streaming", *one.on)) for one in more]
        compared += more
        best = _first_that_fits(more, streamed, structure)
    leanest = min(compared, key=lambda one: (one.peak_bytes, one.seconds))
    return Fit(best or leanest, best is not None, compared[0], tuple(compared))


def leanest_setting(setting: Setting, free: frozenset[str]) -> tuple[Setting, tuple[str, ...]]:
    """``setting`` with every free switch on, and the names of these switches."""
    on = tuple(name for name in LADDER[-1] if name in free)
    for name in on:
        setting = with_switch(setting, name, on=True)
    return setting, on


# -- candidates ------------------------------------------------------------------------------------------------


def _candidates(question: Question, structure: Structure, ladder: Sequence[tuple[str, ...]]) -> list[Candidate]:
    rungs = dict(_rungs(question, ladder))
    slopes = _slopes(question, structure, rungs)
    found = []
    for on, slope in slopes.items():
        for batch in question.batches:
            peak = slope.peak_bytes(batch)
            seconds = _seconds(question, rungs[on], _typical(slope, batch), batch, peak)
            one = Candidate(replace(rungs[on], batch=batch), on, 0, peak, seconds)
            found.append(one)
            found += _with_blocks_kept(question, one, slopes, rungs)
    return found


def _rungs(question: Question, ladder: Sequence[tuple[str, ...]]) -> Iterator[tuple[tuple[str, ...], Setting]]:
    """What is on of what is free, and the setting with it; each once."""
    setting, seen = question.setting, set()
    if "residency" in question.free and () in ladder:
        yield ("residency",), with_hift(setting, "state", {"residency": "device"})
    for rung in ladder:
        on = tuple(name for name in rung if name in question.free)
        if on not in seen:
            seen.add(on)
            changed = setting
            for name in on:
                changed = with_switch(changed, name, on=True)
            yield on, changed


def _slopes(
    question: Question, structure: Structure, rungs: dict[tuple[str, ...], Setting]
) -> dict[tuple[str, ...], Slope]:
    """Peaks over the micro-batch for each rung. Slices and resident states change what the states take, by as much
    at every batch and with every other switch: they are stepped once, and added to the rest."""
    sliced = ("chunked_loss", "slice_numel") if "chunked_loss" in question.free else ("slice_numel",)
    derived = {on: tuple(name for name in on if name != "slice_numel") for on in rungs if "slice_numel" in on}
    derived = {on: below for on, below in derived.items() if below in rungs and sliced in rungs}
    batches = sorted({question.batches[0], question.batches[-1]})
    wanted = {(on, batch): replace(rungs[on], batch=batch)
              for on in rungs if on not in derived and on != ("residency",) for batch in batches}  # fmt: skip
    if derived:
        wanted[sliced, batches[0]] = replace(rungs[sliced], batch=batches[0])
    requests = [Request(setting, structure, ends_only=True) for setting in wanted.values()]
    processes = max(min(len(requests), os.cpu_count() or 1), 1)
    counted: dict[tuple[tuple[str, ...], int], Steps] = dict(
        zip(wanted, run_requests(requests, processes), strict=True)
    )
    for on, below in derived.items():
        base, other = counted[derived[sliced], batches[0]], counted[sliced, batches[0]]
        for batch in batches:
            counted[on, batch] = _Sliced(counted[below, batch], base, other)
    if ("residency",) in rungs:
        size = STATE_BYTES * sum(structure.group_numels) // question.setting.world_size
        for batch in batches:
            counted[("residency",), batch] = _Resident(counted[(), batch], size)
    return {on: Slope(tuple((batch, counted[on, batch]) for batch in batches)) for on in rungs}


@dataclass(frozen=True)
class _Sliced:
    """``steps`` with the update of ``sliced``, and as much less for visiting states elsewhere as ``sliced`` has less
    than ``whole``."""

    steps: Steps
    whole: Steps
    sliced: Steps

    def step(self, index: int) -> GroupStep:
        step, whole, sliced = (steps.step(index) for steps in (self.steps, self.whole, self.sliced))
        saved = [sums.get(_STATES, 0) - sliced.places[place].get(_STATES, 0) for place, sums in whole.places.items()
                 if place in sliced.places and not place.startswith("update:")]  # fmt: skip
        less = min(saved, default=0)
        places = {
            place: {name: n - (less if name == _STATES else 0) for name, n in sums.items()}
            for place, sums in step.places.items()
            if not place.startswith("update:")
        }
        places |= {place: sums for place, sums in sliced.places.items() if place.startswith("update:")}
        return replace(step, places=places)

    def known(self) -> Sequence[int]:
        return self.steps.known()


@dataclass(frozen=True)
class _Resident:
    """``steps`` with all states on the device besides."""

    steps: Steps
    state_bytes: int

    def step(self, index: int) -> GroupStep:
        step = self.steps.step(index)
        places = {place: {**sums, "resident states": self.state_bytes} for place, sums in step.places.items()}
        return replace(step, places=places)

    def known(self) -> Sequence[int]:
        return self.steps.known()


def _with_blocks_kept(
    question: Question, one: Candidate, slopes: dict[tuple[str, ...], Slope], rungs: dict[tuple[str, ...], Setting]
) -> Iterator[Candidate]:
    """Recomputing some blocks only, as many as the memory needs. Peaks are maxima of lines in the number of kept
    blocks, so that the chord between none and all is never too low."""
    without = tuple(name for name in one.on if name != "checkpointing")
    if "checkpointing" not in one.on or "offload" in one.on or without not in slopes:
        return
    blocks = question.num_blocks
    batch = one.setting.batch
    all_kept = slopes[without].peak_bytes(batch)
    room = question.usable_bytes - one.peak_bytes
    if room <= 0 or all_kept <= question.usable_bytes:
        return
    kept = int(blocks * room / (all_kept - one.peak_bytes))
    if 0 < kept < blocks:
        share = kept / blocks
        peak = round(one.peak_bytes + share * (all_kept - one.peak_bytes))
        fast = _seconds(question, rungs[without], _typical(slopes[without], batch), batch, peak)
        setting = with_hift(one.setting, "activations", {"blocks_kept": kept})
        yield Candidate(setting, one.on, kept, peak, one.seconds + share * (fast - one.seconds))


def _streamed(question: Question) -> Question:
    config = {**question.setting.engine_config, "zero_optimization": STREAMED}
    setting = replace(question.setting, engine_config=config, visits=2)
    return replace(question, setting=setting, free=question.free - {"offload", "residency"})


def _first_that_fits(compared: Sequence[Candidate], question: Question, structure: Structure) -> Candidate | None:
    """The fastest whose whole step, counted, stays within the budget."""
    likely = [one for one in compared if one.peak_bytes <= question.usable_bytes]
    for one in likely[:VERIFIED]:
        (steps,) = run_requests([Request(one.setting, structure)], 1)
        one = replace(one, peak_bytes=worst_step(steps).peak_bytes)
        if one.peak_bytes <= question.usable_bytes:
            return one
    return min(likely[VERIFIED:], key=lambda one: one.peak_bytes, default=None)


# -- time ------------------------------------------------------------------------------------------------------


def _typical(slope: Slope, batch: int) -> GroupStep:
    """The mean step of a cycle: halfway between the lowest block's and the head's, on whose line the others lie."""
    known = list(slope.points[0][1].known())
    ends = [through([(at, steps.step(index)) for at, steps in slope.points], batch) for index in known[1:] or known]
    low, high = ends[0], ends[-1]
    return replace(
        low,
        flops={"all": (sum(low.flops.values()) + sum(high.flops.values())) // 2},
        state_bytes=(low.state_bytes + high.state_bytes) // 2,
        offloaded_bytes=(low.offloaded_bytes + high.offloaded_bytes) // 2,
        numel_gathered=slope.points[0][1].step(known[-1]).numel_gathered,  # a line through steps has lost it
    )


def _seconds(question: Question, setting: Setting, step: GroupStep, batch: int, peak: int) -> float:
    """The seconds of an optimizer step: computing, and what transfers take beyond what computing hides."""
    speeds, passes = question.speeds, question.rows / batch
    flops = step.flops["all"] / setting.micro_batches
    compute = passes * flops / speeds.flops_s * (1 + SMALL_PASS / (batch * setting.length))
    state = setting.engine_config["hift"].get("state") or {}
    moving = 0.0 if state.get("residency") == "device" else 2 * step.state_bytes / speeds.link
    hidden = moving
    if state.get("slice_numel") and step.state_bytes:
        # Slices are fetched ahead as far as there are slots; the engine makes more of them in half of what is left.
        slots = STATE_BYTES * SLICE_NUMEL + max(question.usable_bytes - peak, 0) / 2
        hidden = moving * min(slots / step.state_bytes, 1)
    waited = moving - min(hidden, compute)
    if (setting.engine_config["hift"].get("activations") or {}).get("offload"):
        waited += max(passes * 2 * step.offloaded_bytes / speeds.link - compute, 0) + OFFLOAD_COST * compute
    if (setting.engine_config.get("zero_optimization") or {}).get("offload_param"):
        weight_bytes = 4 if setting.weight_dtype == "float32" else 2
        waited += max(passes * weight_bytes * step.numel_gathered / setting.micro_batches / speeds.link - compute, 0)
    return compute + waited


# -- a bound without a simulation ------------------------------------------------------------------------------


def upper_bound_bytes(
    config: PretrainedConfig, numel: int, largest_group: int, setting: Setting, *, holds_scores: bool
) -> int | None:
    """More than the step can take, from the sizes in the model's config; None if it does not name them.

    Args:
        config: of transformers; of the text model.
        numel, largest_group: parameters, of the model and of one layer group.
        holds_scores: attention is not in a fused kernel.
    """
    named = [getattr(config, name, None) for name in ("hidden_size", "num_hidden_layers", "vocab_size")]
    sizes = [size for size in named if isinstance(size, int) and size > 0]
    if len(sizes) < len(named):
        return None
    hidden, layers, vocabulary = sizes
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    experts = max(getattr(config, "num_experts_per_tok", None) or 1, 1)
    heads = getattr(config, "num_attention_heads", None) or 1
    itemsize = 4 if setting.weight_dtype == "float32" else 2
    tokens = setting.batch * setting.length
    state = setting.engine_config["hift"].get("state") or {}
    visiting = numel if state.get("residency") == "device" else (1 + (state.get("slots") or 1)) * largest_group
    weights = numel * itemsize + largest_group * (itemsize + 4) + STATE_BYTES * visiting
    block = tokens * (itemsize * (16 * hidden + 8 * experts * inner) + 8 * hidden)
    if holds_scores:
        block += setting.batch * heads * setting.length**2 * (2 * itemsize + 4)
    return weights + layers * block + tokens * vocabulary * (itemsize + 16)


def accumulation(passes: int) -> str:
    """The accumulation as a line says it: "1 accumulation step"."""
    return f"{passes} accumulation step{'s' if passes > 1 else ''}"


def gib(num_bytes: float) -> str:
    """Bytes as a line says them, in GiB."""
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / 2**20:.0f} MiB"
