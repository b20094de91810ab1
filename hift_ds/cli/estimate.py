"""``hift-ds estimate``: how much memory a run will take, before anything is rented or loaded.

From here to the simulated step: ``run`` -> ``estimate`` -> ``count`` -> ``run_requests`` (forecast/steps.py) ->
``simulate`` (forecast/simulator.py), which starts ``python -m hift_ds.simulation`` -> ``run`` (simulation/step.py).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch

from hift_ds.cli.estimate_input import add_input_arguments, setting_and_choice
from hift_ds.config import parse_block, sum_dtype
from hift_ds.dtypes import torch_dtype
from hift_ds.forecast.fit import CONTEXT_GIB, FRAGMENTATION, NCCL_GIB, budget_gib
from hift_ds.forecast.setting import (
    SWITCHES,
    WORKSPACE_BYTES,
    GroupStep,
    Setting,
    is_on,
    torch_has_fake_devices,
    with_switch,
)
from hift_ds.forecast.simulator import one_simulator
from hift_ds.forecast.steps import (
    GIB,
    Request,
    Slope,
    Steps,
    Structure,
    read_structure,
    run_requests,
    worst_step,
)
from hift_ds.optim.clip_in_backward import ClippingRule, parked_bytes
from hift_ds.optim.host_gradients import waiting_bytes
from hift_ds.store.hiding import BackwardCosts, layers_hidden
from hift_ds.store.page_locked import SLAB_BYTES

CARDS_GIB = (8, 12, 16, 24, 32, 40, 48, 80)
LENGTH_STEP = 16
LORA_RANK = 16
NUM_PROCESSES = 2
ASSUMPTIONS = (
    f"a card gives its nominal GiB less {CONTEXT_GIB} GiB of context (with several ranks {NCCL_GIB} more for NCCL's "
    f"buffers); the allocator holds {FRAGMENTATION:.0%} more than is allocated (neither is counted)",
    f"cuBLAS takes {WORKSPACE_BYTES >> 20} MiB of workspaces (not counted); other kernels' and what is compiled are "
    "left out",
)
ATTENTION = "attention runs in a fused kernel (FlashAttention-2's buffers) where the model allows it; batches have "
UNPADDED, PADDED = "no padding", "padding: a mask, for which grouped heads are repeated"


@dataclass(frozen=True)
class Counted:
    """The steps behind an estimate.

    Attributes:
        steps: under the setting asked about.
        batch, length: peaks at other batches and lengths.
        switched: for each switch, the steps with it the other way; "everything": with all switches on.
        full: full fine-tuning, all states resident, with the same switches for activations.
    """

    setting: Setting
    structure: Structure
    steps: Steps
    batch: Slope
    length: Slope
    switched: dict[str, Steps]
    full: Steps

    def all_steps(self) -> list[GroupStep]:
        """The step of every layer group, bottom to top."""
        return [self.steps.step(index) for index in range(self.structure.num_groups)]


def count(setting: Setting) -> Counted:
    """Step the setting and its neighbours on the fake device, or on fake host tensors where torch has none."""
    setting = replace(setting, on_host=not torch_has_fake_devices())
    structure = read_structure(setting)
    requests = _requests(setting, structure)
    found = dict(zip(requests, run_requests(list(requests.values()), NUM_PROCESSES), strict=True))
    here, batch, length = found["steps"], setting.batch, setting.length
    lengths = [(n * length, found[f"length x {n}"]) for n in (2, 3) if f"length x {n}" in found]
    return Counted(
        setting,
        structure,
        here,
        Slope(((batch, here), (2 * batch, found["batch"]))),
        Slope(((length, here), *(lengths or [(2 * length, found["batch"])]))),
        {name: steps for name, steps in found.items() if name in SWITCHES or name == "everything"},
        found["full"],
    )


def _requests(setting: Setting, structure: Structure) -> dict[str, Request]:
    """What is stepped, by name: the setting itself, twice its batch, full fine-tuning, each switch the other way, all
    of them on, and, where something grows with its square, two and three times the length."""

    def ends(changed: Setting) -> Request:
        updates_as = setting if _same_updates(setting, changed) else None
        return Request(changed, structure, ends_only=True, updates_as=updates_as)

    requests = {
        "steps": Request(setting, structure),
        "batch": ends(replace(setting, batch=2 * setting.batch)),
        "full": ends(_full_fine_tuning(setting)),
        **{switch: ends(with_switch(setting, switch, not is_on(setting, switch))) for switch in SWITCHES},
    }
    if not any(is_on(setting, switch) for switch in SWITCHES[1:]):
        everything = setting
        for switch in SWITCHES:
            everything = with_switch(everything, switch, on=True)
        requests["everything"] = ends(everything)
    if _scores_matter(setting, structure):  # otherwise memory depends on the number of tokens alone
        requests |= {f"length x {n}": ends(replace(setting, length=n * setting.length)) for n in (2, 3)}
    return requests


def _full_fine_tuning(setting: Setting) -> Setting:
    """All weights in every step, with all states on the device; the switches for activations stay."""
    block = setting.engine_config["hift"]
    state = {**(block.get("state") or {}), "residency": "device", "slice_numel": None, "path": None}
    one_group: dict[str, Any] = {"group_size": "all", "groups": None, "always_active": []}
    plain_update = {"update": "after_backward", "clipping": "exact"}
    full = {**block, **one_group, **plain_update, "state": state}
    return replace(setting, engine_config={**setting.engine_config, "hift": full})


def _same_updates(a: Setting, b: Setting) -> bool:
    """Do they differ in batch, length or what is kept for backward alone? An update knows nothing of these. (With stage
    3 the update finds weights that backward has left gathered; in backward it finds what that still holds.)"""
    if "in_backward" in (a.engine_config["hift"].get("update"), b.engine_config["hift"].get("update")):
        return False
    a, b = (_without_activations(replace(setting, batch=1, length=1)) for setting in (a, b))
    return a == b and (a.engine_config.get("zero_optimization") or {}).get("stage", 0) < 3


def _without_activations(setting: Setting) -> Setting:
    block = {key: value for key, value in setting.engine_config["hift"].items() if key != "activations"}
    return replace(setting, engine_config={**setting.engine_config, "hift": block})


def _scores_matter(setting: Setting, structure: Structure) -> bool:
    """Does anything as large as length times length exist?"""
    masked = structure.window is not None and structure.window <= 2 * setting.length
    return setting.eager_attention or not structure.has_fused_attention or masked


def estimate(setting: Setting) -> dict[str, Any]:
    """All figures, as plain data. ``docs/memory.md`` says what each key means."""
    counted = count(setting)
    steps = counted.all_steps()
    worst = max(steps, key=lambda step: step.peak_bytes)
    state_bytes = sum(step.state_bytes for step in steps)
    weight_bytes = worst_weights(worst)
    peak = worst.peak_bytes / GIB
    return {
        "model": setting.model,
        "batch": setting.batch,
        "length": setting.length,
        "gpus": setting.world_size,
        "numel": sum(counted.structure.group_numels),
        "num_groups": len(steps),
        "peak_gib": peak,
        "phases": {phase: max(step.phases.get(phase, 0) for step in steps) / GIB for phase in worst.phases},
        "categories": {name: num_bytes / GIB for name, num_bytes in worst.categories.items()},
        "worst_group": {"index": worst.index, "name": worst.name, "numel": counted.structure.group_numels[worst.index]},
        "groups": [{"index": step.index, "name": counted.structure.group_names[step.index],
                    "peak_gib": step.peak_bytes / GIB} for step in steps],
        "weights_gib": weight_bytes / GIB,
        **_elsewhere(setting, steps, weight_bytes, state_bytes),
        **_flops(counted, steps),
        "full_fine_tuning_peak_gib": worst_step(counted.full).peak_bytes / GIB,
        "switches": {switch: is_on(setting, switch) for switch in SWITCHES},
        "switched": {name: worst_step(steps).peak_bytes / GIB for name, steps in counted.switched.items()},
        "fits": _fits(counted, peak),
        "method": _method(counted),
        "assumptions": [*ASSUMPTIONS, ATTENTION + (PADDED if setting.padded and setting.batch > 1 else UNPADDED)],
    }  # fmt: skip


def worst_weights(step: GroupStep) -> int:
    """Bytes of the weights on the device at the step's highest peak."""
    return step.categories["weights"]


def _elsewhere(setting: Setting, steps: list[GroupStep], weight_bytes: int, state_bytes: int) -> dict[str, float]:
    """Host memory of one node with all its ranks, disk, and a checkpoint of all ranks."""
    state = setting.engine_config["hift"].get("state") or {}
    residency = state.get("residency", "host")
    on_host = state_bytes if residency in ("host", "auto") or state.get("step_on") == "host" else 0
    on_disk = state_bytes if residency == "disk" else 0
    if on_disk:
        on_host = 3 * max(step.state_bytes for step in steps)
    offloaded = max(step.offloaded_bytes for step in steps)
    on_host += gradient_bytes_on_host(setting, max(step.numel for step in steps))
    ranks = setting.world_size
    numel, itemsize = sum(step.numel for step in steps), {"float32": 4}.get(setting.weight_dtype, 2)
    weights_on_host, weights_pinned = _weights_on_host(setting, numel * itemsize)
    pinned = ranks * slab_bytes(on_host + offloaded) if state.get("pin_memory", True) else 0
    return {
        "host_gib": (ranks * (on_host + offloaded) + weights_on_host) / GIB,
        "pinned_gib": (pinned + weights_pinned) / GIB,
        "disk_gib": ranks * on_disk / GIB,
        "checkpoint_gib": (weight_bytes + ranks * state_bytes) / GIB,
        "state_gib_per_step": sum(step.state_bytes for step in steps) / len(steps) / GIB,
    }


def slab_bytes(num_bytes: float) -> float:
    """What is page-locked for so many bytes: whole slabs."""
    return -(-num_bytes // SLAB_BYTES) * SLAB_BYTES


def _weights_on_host(setting: Setting, num_bytes: int) -> tuple[float, float]:
    """Bytes of host memory on one node with all ranks: the shards that ``offload_param`` puts there, and what is
    page-locked for them."""
    offload = (setting.engine_config.get("zero_optimization") or {}).get("offload_param") or {}
    if offload.get("device") != "cpu":
        return 0.0, 0.0
    pinned = setting.world_size * slab_bytes(num_bytes / setting.world_size) if offload.get("pin_memory") else 0.0
    return num_bytes, pinned


def gradient_bytes_on_host(setting: Setting, numel: int) -> int:
    """Bytes of host memory that the gradients of a group of ``numel`` elements take on one rank, at most, with the
    update in backward: sums of micro-batches, gradients that wait for the norm or may be wanted again, and of what may
    be taken back the states' second copy (12 bytes a parameter at most; on disk with states there)."""
    config, block = setting.engine_config, setting.engine_config["hift"]
    if block.get("update") != "in_backward":
        return 0
    rule = _clipping(setting)
    sums = torch_dtype(sum_dtype(config)).itemsize * numel if setting.micro_batches > 1 else 0
    shard = numel // setting.world_size
    waiting = _waiting_bytes(setting, setting.micro_batches) * shard if rule.keeps_gradients else 0
    on_disk = (block.get("state") or {}).get("residency") == "disk"
    second = 12 * shard if rule.speculates and not on_disk else 0
    return sums + waiting + second


def _clipping(setting: Setting) -> ClippingRule:
    config = setting.engine_config
    return ClippingRule(config["hift"].get("clipping", "exact"), config.get("gradient_clipping") or 0.0)


def _waiting_bytes(setting: Setting, micro_batches: int) -> int:
    """Bytes of an element of a gradient that is in host memory until the norm is known."""
    weight_dtype, summed_in = getattr(torch, setting.weight_dtype), torch_dtype(sum_dtype(setting.engine_config))
    return waiting_bytes(weight_dtype, summed_in, micro_batches, setting.world_size)


def settle_layers(setting: Setting, micro_batches: int) -> tuple[Setting, str]:
    """A setting whose ``"group_size"`` is ``"auto"``, with the size that speeds assumed for a card and its link give;
    and how that came about."""
    config, block = setting.engine_config, setting.engine_config["hift"]
    hift = parse_block(block)
    numels = read_structure(setting).group_numels
    weight_bytes = 4 if setting.weight_dtype == "float32" else 2
    costs = BackwardCosts.assumed(
        weight_bytes, max(numels), hift.state, masters=hift.master_weights, ranks=setting.world_size,
        parked_bytes=parked_bytes(
            hift, config, config.get("gradient_clipping") or 0.0, getattr(torch, setting.weight_dtype), micro_batches,
            setting.world_size,
        ),
    )  # fmt: skip
    tokens = hift.tokens_per_step or setting.batch * setting.length * micro_batches
    is_open = hift.state.step_on == "split" and hift.state.host_share is None
    choice = layers_hidden(costs, numels, tokens, split=is_open)
    size = "all" if choice.num_groups == 1 else choice.group_size
    block = {**block, "group_size": size, "tokens_per_step": None}
    return replace(setting, engine_config={**setting.engine_config, "hift": block}), choice.line()


def _flops(counted: Counted, steps: list[GroupStep]) -> dict[str, float]:
    """Matrix products of one micro-batch, averaged over a cycle, against full fine-tuning and LoRA."""
    mean = sum(sum(step.flops.values()) for step in steps) / len(steps)
    full = sum(counted.full.step(0).flops.values())
    # Forward, and backward through every block without its weights' gradients.
    lowest = sum(steps[0].flops.values())
    tokens = counted.setting.batch * counted.setting.length
    adapters = 6 * LORA_RANK * counted.structure.matrix_sides * tokens
    return {
        "flops_per_step": mean,
        "flops_ratio_full": mean / full,
        "flops_ratio_lora": mean / (lowest + adapters),
    }


def _fits(counted: Counted, peak: float) -> list[dict[str, Any]]:
    """Whether the run fits each card, what is the most that does, and if it does not, which switch would make it."""
    limit = counted.structure.max_length
    rows = []
    for card in CARDS_GIB:
        budget = budget_gib(card, counted.setting.world_size)
        fits = peak <= budget
        enough = [name for name, steps in counted.switched.items() if worst_step(steps).peak_bytes / GIB <= budget]
        rows.append(
            {
                "card_gib": card,
                "fits": fits,
                "largest_batch": counted.batch.largest(budget * GIB),
                "largest_length": counted.length.largest(budget * GIB, LENGTH_STEP, limit or 1 << 20),
                "would_fit_with": [] if fits else enough,
            }
        )
    return rows


def _method(counted: Counted) -> str:
    where = "on fake GPU tensors"
    if counted.setting.on_host:
        where = "on fake host tensors, since this torch has no fake devices (2.8 has): up to 1 % off"
    return f"a real step of the whole model, every allocation counted {where}"


EXAMPLES = """examples:
  hift-ds estimate run.yaml                                      # as `hift-ds train run.yaml` would run here
  hift-ds estimate --model llama2_7b --batch 4 --length 1024     # without a run file
  hift-ds estimate run.yaml train.micro_batch_size=8 --json
What the lines mean, and how it was checked: docs/memory.md
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_input_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--probe", action="store_true", help="also run one real step here, predicted beside measured")


@one_simulator()
def run(args: argparse.Namespace) -> int:
    setting, chosen = setting_and_choice(args)
    layers = ""
    if setting.engine_config["hift"].get("group_size") == "auto":
        setting, layers = settle_layers(setting, args.accumulation or setting.micro_batches)
        print(f"group size auto, with assumed speeds: {layers}", file=sys.stderr)
    figures = estimate(setting)
    if layers:
        figures["group_size_auto"] = layers
    if chosen is not None:
        figures["chosen"] = {"keys": chosen.keys, "lines": list(chosen.lines)}
    if args.probe:
        from hift_ds.cli.probe import probe

        figures["probe"] = probe(setting)
    if args.json:
        json.dump(figures, sys.stdout, indent=2)
        print()
    else:
        from hift_ds.cli.estimate_table import print_estimate

        print_estimate(figures)
    return 0
