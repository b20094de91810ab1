"""How many blocks a layer group gets where the run file does not say: enough turns for each group, within the memory
and, beyond a few turns, within what the link carries while the model computes.

Each step trains one of k groups, so a run of S steps gives each S / k turns. Few turns cost what is learned
(docs/group_size.md has the measurements behind the numbers here).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hift_ds.config import HiFTConfig
from hift_ds.dtypes import Dtype, torch_dtype
from hift_ds.forecast.fit import STATE_BYTES
from hift_ds.forecast.setting import SLICE_NUMEL
from hift_ds.hf.model_structure import build_on_meta, read_task_config
from hift_ds.layers.arch import find_arch
from hift_ds.layers.grouping import LayerGroup, partition_model
from hift_ds.optim.clip_in_backward import parked_bytes
from hift_ds.store.hiding import UNKNOWN_TOKENS, BackwardCosts, fastest_share
from hift_ds.train.card import Card
from hift_ds.train.settings import Settings, max_grad_norm
from hift_ds.train.tasks import TASKS

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

ENOUGH_TURNS = 16  # more of them taught SmolLM2-135M nothing more
FEWEST_TURNS = 4  # below, every trainer warns: so many are worth waiting for the link
FEWEST_GROUPS = 4  # below, little is saved
DEVICE_SHARE = 0.75  # of the usable memory for weights, one group's gradients and states; the rest is for activations
_GROUP_KEYS = frozenset({"group_size", "groups", "always_active", "steps_per_group"})


@dataclass(frozen=True)
class ModelSizes:
    """What a model's config says of the sizes of its groups.

    Attributes:
        config: of transformers.
    """

    config: PretrainedConfig
    trust_remote_code: bool = False

    @classmethod
    def read(cls, source: str, trust_remote_code: bool, auto_class: str = "AutoModelForCausalLM") -> ModelSizes:
        """Read a model's config.

        Args:
            source: what :func:`~hift_ds.hf.model_structure.read_config` takes.
            auto_class: of transformers, which makes the model.
        """
        return cls(read_task_config(source, auto_class, trust_remote_code=trust_remote_code), trust_remote_code)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model, on the meta device."""
        return build_on_meta(self.config, trust_remote_code=self.trust_remote_code)

    @cached_property
    def numel(self) -> int:
        """The number of parameters, tied ones once."""
        return sum(param.numel() for param in self.model.parameters())

    @property
    def num_blocks(self) -> int:
        """The number of blocks between embedding and head."""
        return len(find_arch(self.model).blocks)

    @cached_property
    def by_size(self) -> list[tuple[LayerGroup, ...]]:
        """The groups for sizes 1, 2, 3, ..., as far as enough groups are left."""
        first = partition_model(self.model).groups
        sizes = range(2, len(first) // FEWEST_GROUPS + 2)
        return [first, *(partition_model(self.model, group_size=size).groups for size in sizes)]

    def largest_group(self, block: HiFTConfig) -> int:
        """The number of parameters of the largest turn."""
        partition = partition_model(
            self.model, group_size=block.first_group_size, patterns=block.groups, always_active=block.always_active
        )
        always = partition.always.numel if partition.always else 0
        return max(group.numel for group in partition.groups) + always

    def head_above_base(self) -> list[str]:
        """The names of the parameters that are not the base model's; none where nothing says which those are."""
        base = getattr(self.model, "base_model", self.model)
        if base is self.model:
            return []
        below = {id(param) for param in base.parameters()}
        return [name for name, param in self.model.named_parameters() if id(param) not in below]

    def largest_part(self) -> int:
        """The number of parameters of the largest embedding, block or head."""
        return max(group.numel for group in self.by_size[0])


@dataclass(frozen=True)
class Choice:
    """What was chosen, and what it comes from.

    Attributes:
        limit: what keeps groups from being larger: "", "memory" or "link".
    """

    group_size: int
    num_groups: int
    num_steps: int
    limit: str = ""
    update: str = "after_backward"

    def line(self) -> str:
        """The choice as a line for the terminal."""
        turns = self.num_steps / self.num_groups
        text = f"group size {self.group_size}: {self.num_groups} layer groups, each trained in {turns:.1f} of "
        text += f"{self.num_steps} steps"
        if self.update == "in_backward":
            text += ", updated in backward, since gradients and optimizer states of a whole group would not fit at once"
        if turns >= ENOUGH_TURNS:
            return text
        why = {"": "", "memory": "larger groups would not fit; ", "link": "larger groups would wait for transfers; "}
        return f"{text} ({why[self.limit]}a longer run learns more; docs/group_size.md)"


def choose_groups(
    settings: Settings, dtype: Dtype, length: int, num_rows: int | None, model: ModelSizes, card: Card | None
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Keys of the run file and lines for the terminal; neither if the user has said anything of groups or turns.

    Args:
        length: tokens of a row.
        num_rows: of the training data; None where that is not known.
        card: None: any.
    """
    block = settings.hift
    if block is None or block.model_fields_set & _GROUP_KEYS:
        return {}, ()
    steps = num_steps(settings, num_rows)
    if steps is None:
        return {}, ("group size 1: without the data the run's length is not known (train.max_steps gives it)",)
    bounded = card if card is not None and not card.is_host else None
    choice = choose_group_size(
        model.by_size,
        steps,
        _memory_rule(settings, dtype, model, bounded) if bounded else None,
        _link_rule(settings, dtype, length, model, bounded) if bounded else None,
    )
    keys: dict[str, Any] = {"hift.group_size": choice.group_size}
    if choice.update == "in_backward":
        keys["hift.update"] = choice.update
    return keys, (choice.line(),)


def head_in_every_step(settings: Settings, model: ModelSizes) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Key of the run file and line for the terminal that train the head of a task in every step. Neither for the head
    of a language model, nor where every weight is trained in every step anyway, nor if the user has said what is
    always active.

    Such a head begins at random, and everything below it learns from its gradient: in turns it would be trained in a
    k-th of the steps (docs/results.md, "A head that begins at random"). It is a few rows, on the way of every backward.
    """
    block = settings.hift
    if block is None or not TASKS[settings.run.task].has_own_head or block.group_size == "all":
        return {}, ()
    names = model.head_above_base()
    if not names or block.model_fields_set & {"always_active", "groups"}:
        return {}, ()
    return {"hift.always_active": [f"^{re.escape(name)}$" for name in names]}, (
        f"always active: {', '.join(names)}: a head that begins at random learns in every step "
        "(hift.always_active=[] gives it turns)",
    )


def tokens_per_step(settings: Settings, tokens_per_row: float) -> dict[str, Any]:
    """The key that ``group_size: auto`` follows from: tokens of a step on one rank. Nothing where it is given or not
    needed.

    Args:
        tokens_per_row: of the training data, on average.
    """
    block = settings.hift
    if block is None or block.group_size != "auto" or block.tokens_per_step is not None:
        return {}
    rows = settings.batch.micro_batch_size * settings.batch.gradient_accumulation_steps
    return {"hift.tokens_per_step": max(round(rows * tokens_per_row), 1)}


def choose_group_size(
    by_size: Sequence[Sequence[LayerGroup]],
    num_steps: int,
    update_that_fits: Callable[[Sequence[LayerGroup]], str | None] | None = None,
    is_hidden: Callable[[Sequence[LayerGroup], str], bool] | None = None,
) -> Choice:
    """The smallest groups that get enough turns; if the run is too short for that, the largest allowed.

    Args:
        by_size: groups for group sizes 1, 2, 3, ...
        num_steps: optimizer steps of the run.
        update_that_fits: ``hift.update`` for such groups, None if no update has the room; without the rule everything
            fits.
        is_hidden: whether steps of such groups, with such a ``hift.update``, wait for next to no transfer.
    """
    best, update, limit = 1, "after_backward", ""
    for size, groups in enumerate(by_size, start=1):
        fewest = by_size[best - 1]
        if num_steps >= ENOUGH_TURNS * len(fewest) or (size > 1 and len(groups) < FEWEST_GROUPS):
            break
        if size == 1 or len(groups) == len(fewest):
            continue
        found = update_that_fits(groups) if update_that_fits is not None else update
        if found is None:
            limit = "memory"
            break
        if is_hidden is not None and not is_hidden(groups, found) and num_steps >= FEWEST_TURNS * len(fewest):
            limit = "link"
            break
        best, update = size, found
    return Choice(best, len(by_size[best - 1]), num_steps, limit, update)


def num_steps(settings: Settings, num_rows: int | None) -> int | None:
    """Optimizer steps of the run, counted as the Trainer counts them; None where ``num_rows`` decides and is not
    known."""
    train, batch = settings.run.train, settings.batch
    if train.max_steps:
        return train.max_steps
    if num_rows is None:
        return None
    passes = math.ceil(num_rows / (batch.micro_batch_size * settings.world_size))
    return math.ceil(train.epochs * max(math.ceil(passes / batch.gradient_accumulation_steps), 1))


def _memory_rule(
    settings: Settings, dtype: Dtype, model: ModelSizes, card: Card
) -> Callable[[Sequence[LayerGroup]], str | None]:
    """What says of groups for lack of which memory they cannot be trained, or nothing: after backward the gradients and
    visiting states of a whole group are there at once, in backward those of one embedding, block or head."""
    block = settings.hift
    assert block is not None
    state, ranks, weight = block.state, settings.world_size, 2 if dtype != "fp32" else 4
    is_sharded = (settings.written.get("zero_optimization") or {}).get("stage", 0) == 3
    states = STATE_BYTES if dtype != "fp32" and block.master_weights else 8
    gradient = weight + (4 if settings.batch.gradient_accumulation_steps > 1 and weight < 4 else 0)
    room = DEVICE_SHARE * card.usable_bytes - model.numel * weight // (ranks if is_sharded else 1)
    if state.residency == "device":
        room -= states * model.numel // ranks
    is_sliced = state.slice_numel or (settings.run.fit is not None and "slice_numel" not in state.model_fields_set)
    at_once = (state.slice_numel or SLICE_NUMEL) if is_sliced else None
    visits = state.residency != "device" and state.step_on == "device"
    in_backward = "update" not in block.model_fields_set and dtype != "fp16" and state.residency != "disk"

    def fits(numel: int) -> bool:
        visiting = min(numel, at_once or numel) * states * (state.slots or 1) // ranks if visits else 0
        return numel * gradient + visiting <= room

    def update_that_fits(groups: Sequence[LayerGroup]) -> str | None:
        if fits(max(group.numel for group in groups)):
            return block.update
        return "in_backward" if in_backward and fits(model.largest_part()) else None

    return update_that_fits


def _link_rule(
    settings: Settings, dtype: Dtype, length: int, model: ModelSizes, card: Card
) -> Callable[[Sequence[LayerGroup], str], bool]:
    """What says of groups whether their steps wait for next to no transfer, by the arithmetic of ``"group_size":
    "auto"``. After backward the states of a group come and go as one; in backward those of an embedding, block or
    head."""
    block, batch, ranks = settings.hift, settings.batch, settings.world_size
    assert block is not None
    tokens = batch.global_batch_size // ranks * length
    weight_bytes = 2 if dtype != "fp32" else 4

    def is_hidden(groups: Sequence[LayerGroup], update: str) -> bool:
        hift = block.model_copy(update={"update": update})
        parts = [group.numel for group in (model.by_size[0] if update == "in_backward" else groups)]
        costs = BackwardCosts.assumed(
            weight_bytes, max(parts), block.state, masters=block.master_weights, ranks=ranks, speeds=card.speeds,
            parked_bytes=parked_bytes(
                hift, settings.written, max_grad_norm(settings), torch_dtype(dtype), batch.gradient_accumulation_steps,
                ranks,
            ),
        )  # fmt: skip
        size = -(-len(parts) // len(groups))
        if block.state.step_on == "split" and block.state.host_share is None:  # as the engine will choose
            costs = replace(costs, share=fastest_share(costs, parts, size, UNKNOWN_TOKENS))
        return costs.hides(parts, size, tokens)

    return is_hidden
