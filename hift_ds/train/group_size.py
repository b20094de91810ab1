"""How many units a layer group gets where the run file does not say: enough turns for each group, within the memory.

Each step trains one of k groups, so a run of S steps gives each S / k turns. Few turns cost what is learned
(docs/group_size.md has the measurements behind the numbers here); large groups cost memory, and nothing else as long as
the link keeps up, which the line about transfers at the start of a run says.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hift_ds.config import BLOCK, HiFTConfig
from hift_ds.engine.deepspeed_seam import device_bytes
from hift_ds.hf.model_structure import build_on_meta, read_config
from hift_ds.layers.grouping import partition_model
from hift_ds.ranks import gather
from hift_ds.train.preflight import CheckedRun

ENOUGH_TURNS = 16  # where SmolLM2-135M's held-out loss was that of full fine-tuning
FEWEST_GROUPS = 4  # below, little is saved
DEVICE_SHARE = 0.75  # of the device for weights, one group's gradients and states; the rest is for activations
_MASTER, _MOMENTS = 4, 8  # bytes a weight, AdamW's


@dataclass(frozen=True)
class Choice:
    """What was chosen, and what it comes from."""

    group_size: int
    num_groups: int
    num_steps: int
    fits_more: bool
    """Larger groups would still fit the device."""

    def line(self) -> str:
        turns = self.num_steps / self.num_groups
        given = f"group size {self.group_size}: {self.num_groups} layer groups, {turns:.1f} turns each"
        if turns >= ENOUGH_TURNS:
            return f"{given} in {self.num_steps} steps"
        why = "a longer run learns more" if self.fits_more else "larger groups would not fit; a longer run learns more"
        return f"{given} in {self.num_steps} steps ({why}; docs/group_size.md)"


def settle_group_size(
    checked: CheckedRun, arguments: Any, num_rows: int, goes_on: bool, say: Callable[[str], None]
) -> None:
    """Put the group size into the DeepSpeed config of ``arguments``, if the user has said nothing of groups or turns.

    Args:
        num_rows: of the training data.
        goes_on: from a checkpoint, whose run has chosen already; its deepspeed.json says what.
    """
    block = checked.settings.hift
    if block is None or block.model_fields_set & {"group_size", "groups", "always_active", "steps_per_group"}:
        return
    size = gather(_size_before(checked) if goes_on else None)[0]
    if size is None:
        choice = choose_group_size(
            _groups_by_size(checked),
            num_steps(checked, num_rows),
            None if arguments.device.type == "cpu" else _room(checked, arguments.deepspeed, block),
        )
        say(choice.line())
        size = choice.group_size
    for config in (arguments.deepspeed, arguments.deepspeed_plugin.deepspeed_config):
        config[BLOCK]["group_size"] = size


def settle_tokens(checked: CheckedRun, arguments: Any, tokens_per_row: float) -> None:
    """Put the tokens of a step into the DeepSpeed config of ``arguments``, where the group size follows from them.

    Args:
        tokens_per_row: of the training data, on average.
    """
    block = checked.settings.hift
    if block is None or block.group_size != "auto" or block.tokens_per_step is not None:
        return
    batch = checked.batch
    tokens = max(round(batch.micro_batch_size * batch.gradient_accumulation_steps * tokens_per_row), 1)
    for config in (arguments.deepspeed, arguments.deepspeed_plugin.deepspeed_config):
        config[BLOCK]["tokens_per_step"] = tokens


def choose_group_size(
    groups_by_size: Sequence[Sequence[int]], num_steps: int, fits: Callable[[int], bool] | None = None
) -> Choice:
    """The smallest groups that get enough turns; if the run is too short for that, the largest allowed.

    Args:
        groups_by_size: weights in each group for group sizes 1, 2, 3, ...
        num_steps: optimizer steps of the run.
        fits: whether the device has room for a group of so many weights; None: it has.
    """
    largest = 1
    fits_more = False
    for size, groups in enumerate(groups_by_size, start=1):
        if size > 1 and len(groups) < FEWEST_GROUPS:
            break
        if size > 1 and fits is not None and not fits(max(groups)):
            return Choice(largest, len(groups_by_size[largest - 1]), num_steps, fits_more=False)
        if len(groups) < len(groups_by_size[largest - 1]):
            largest = size
        if num_steps >= ENOUGH_TURNS * len(groups_by_size[largest - 1]):
            fits_more = True
            break
    return Choice(largest, len(groups_by_size[largest - 1]), num_steps, fits_more or largest > 1)


def num_steps(checked: CheckedRun, num_rows: int) -> int:
    """Optimizer steps of the run, counted as the Trainer counts them."""
    train, batch = checked.run.train, checked.batch
    if train.max_steps:
        return train.max_steps
    passes = math.ceil(num_rows / (batch.micro_batch_size * checked.world_size))
    return math.ceil(train.epochs * max(math.ceil(passes / batch.gradient_accumulation_steps), 1))


def _groups_by_size(checked: CheckedRun) -> list[list[int]]:
    trust = checked.run.model.trust_remote_code
    model = build_on_meta(read_config(str(checked.model.path), trust_remote_code=trust), trust_remote_code=trust)
    first = [group.numel for group in partition_model(model).groups]
    sizes = range(2, len(first) // FEWEST_GROUPS + 2)
    return [first, *([g.numel for g in partition_model(model, group_size=size).groups] for size in sizes)]


def _room(checked: CheckedRun, ds: Mapping[str, Any], block: HiFTConfig) -> Callable[[int], bool]:
    is_16_bit = checked.dtype != "fp32"
    ranks, weight = checked.world_size, 2 if is_16_bit else 4
    is_sharded = (ds.get("zero_optimization") or {}).get("stage", 0) == 3
    weights = checked.model.numel * weight // (ranks if is_sharded else 1)
    room = DEVICE_SHARE * device_bytes() - weights
    states = _MOMENTS + (_MASTER if is_16_bit and block.master_weights else 0)
    state = block.state
    if state.residency == "device":
        room -= states * checked.model.numel // ranks
    fetched = state.residency != "device" and state.step_on == "device"

    def fits(numel: int) -> bool:
        visiting = min(numel, state.slice_numel or numel) * states * state.slots // ranks if fetched else 0
        return numel * weight + visiting <= room

    return fits


def _size_before(checked: CheckedRun) -> int | None:
    try:
        saved = json.loads((checked.run.output_dir / "deepspeed.json").read_text(encoding="utf-8"))
        return int(saved[BLOCK]["group_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
