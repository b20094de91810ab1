"""How much memory a run will take: the steps of its layer groups, counted, and what follows from them.

The whole model is stepped, some of its groups: between those everything lies on a line
(:mod:`hift_ds.forecast.lines`). Steps at twice the batch and twice the length give the slopes from which the largest
batch and length of a card follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from hift_ds.forecast.lines import between, through
from hift_ds.forecast.setting import GroupStep, Result, Setting
from hift_ds.forecast.simulator import simulate

GIB = 2**30
ALL_GROUPS_UP_TO = 8  # of a model with more groups, some are stepped
STASHED = 3  # with so many blocks above a group the offload stash is full; with fewer the lines bend


@dataclass(frozen=True)
class Structure:
    """What decides how a model is stepped.

    Attributes:
        group_names, group_numels: of its layer groups, bottom to top.
        max_length: tokens that its positions allow; ``None`` if it does not say.
        matrix_sides: sum of rows and columns over all matrices in blocks, for the size of LoRA's adapters.
        window: tokens that some layer's attention is limited to, below which no mask is needed.
        has_fused_attention: the model can use a kernel that does not hold the scores.
    """

    group_names: tuple[str, ...]
    group_numels: tuple[int, ...]
    max_length: int | None
    matrix_sides: int
    window: int | None = None
    has_fused_attention: bool = True

    @property
    def num_groups(self) -> int:
        """The number of layer groups."""
        return len(self.group_names)


def read_structure(setting: Setting) -> Structure:
    """Read how a model is stepped from its config and the ``"hift"`` block; no weights."""
    from hift_ds.config import parse_block
    from hift_ds.hf.model_structure import build_on_meta, read_config
    from hift_ds.layers.grouping import partition_model

    config = read_config(setting.model, trust_remote_code=setting.trust_remote_code)
    model = build_on_meta(config, trust_remote_code=setting.trust_remote_code)
    hift = parse_block(setting.engine_config["hift"])
    partition = partition_model(
        model, group_size=hift.first_group_size, patterns=hift.groups, always_active=hift.always_active
    )
    weights = dict(model.named_parameters())
    return Structure(
        tuple(group.name for group in partition.groups),
        tuple(group.numel for group in partition.groups),
        getattr(config.get_text_config(), "max_position_embeddings", None),
        sum(sum(weights[name].shape) for name in partition.matrices),
        getattr(config.get_text_config(), "sliding_window", None),
        bool(getattr(model, "_supports_sdpa", False)),
    )


class Steps(Protocol):
    """The steps of a model's groups under one setting."""

    def step(self, index: int) -> GroupStep:
        """The step of group ``index``, as counted or worked out."""

    def known(self) -> Sequence[int]:
        """Groups whose steps can be asked for."""
        ...


@dataclass(frozen=True)
class WholeModel:
    """Some groups as they were counted; the others lie on a line between their neighbours."""

    result: Result

    def step(self, index: int) -> GroupStep:
        below = max((step for step in self.result.steps if step.index <= index), key=lambda step: step.index)
        above = min((step for step in self.result.steps if step.index >= index), key=lambda step: step.index)
        return below if below is above else replace(between(below, above, index), numel=0)

    def known(self) -> Sequence[int]:
        return [step.index for step in self.result.steps]


@dataclass(frozen=True)
class WithUpdates:
    """Steps with the forward and backward of ``steps`` and the update of ``others``."""

    steps: Steps
    others: Steps

    def step(self, index: int) -> GroupStep:
        step, other = self.steps.step(index), self.others.step(index)
        updates = {place: sums for place, sums in other.places.items() if place.startswith("update:")}
        return replace(step, places={**step.places, **updates})

    def known(self) -> Sequence[int]:
        return self.steps.known()


@dataclass(frozen=True)
class Request:
    """A setting whose steps are wanted.

    Attributes:
        ends_only: of the embedding, the lowest block and the head.
        updates_as: take the update from the steps of this setting, which differ in forward and backward only.
    """

    setting: Setting
    structure: Structure
    ends_only: bool = False
    updates_as: Setting | None = None

    def to_simulate(self) -> Setting:
        """The setting to step, with the groups that are wanted."""
        setting = replace(self.setting, second_update=not self.ends_only, updates=self.updates_as is None)
        if (setting.engine_config.get("zero_optimization") or {}).get("stage", 0) == 3:
            setting = replace(setting, visits=max(setting.visits, 2))  # ZeRO-3 prefetches from the second on
        return replace(setting, groups=self._groups())

    def _groups(self) -> tuple[int, ...]:
        """All of a small model; of others the lowest, one in the middle, and those near the top, where lines bend."""
        count = self.structure.num_groups
        if self.ends_only:
            return (0, 1, -1)
        if count <= ALL_GROUPS_UP_TO:
            return tuple(range(count))
        activations = self.setting.engine_config["hift"].get("activations") or {}
        kept = activations.get("blocks_kept", 0)
        settled = max(kept + 2, STASHED if activations.get("offload") else 0)
        above = (0, 1, kept, kept + 1, settled, settled + 1)  # groups between one and the head
        wanted = {0, 1, 2, count // 2, count - 1, *(count - 2 - n for n in above)}
        return tuple(sorted(index for index in wanted if index >= 0))


def run_requests(requests: Sequence[Request], num_processes: int = 2) -> list[Steps]:
    """The steps of each request. Those that ``updates_as`` names are among the requests."""
    settings = [request.to_simulate() for request in requests]
    # The longest first, so that the processes end together.
    order = sorted(range(len(settings)), key=lambda i: -len(settings[i].groups or ()))
    results = dict(zip(order, simulate([settings[i] for i in order], num_processes), strict=True))
    steps: list[Steps] = [WholeModel(results[i]) for i in range(len(settings))]
    whole = {id(request.setting): found for request, found in zip(requests, steps, strict=True)}
    return [
        found if request.updates_as is None else WithUpdates(found, whole[id(request.updates_as)])
        for request, found in zip(requests, steps, strict=True)
    ]


def worst_step(steps: Steps) -> GroupStep:
    """The step of the group with the highest peak."""
    return max((steps.step(index) for index in steps.known()), key=lambda step: step.peak_bytes)


@dataclass(frozen=True)
class Slope:
    """Peaks over a range of batches or lengths, place by place.

    Attributes:
        points: (batch or length, steps there): two where everything is linear in it, three where scores or masks of
            length times length exist.
    """

    points: tuple[tuple[int, Steps], ...]

    def peak_bytes(self, value: float) -> int:
        """The highest peak at ``value``."""
        return max(
            through([(at, steps.step(index)) for at, steps in self.points], value).peak_bytes
            for index in self.points[-1][1].known()
        )

    def largest(self, budget_bytes: float, multiple_of: int = 1, limit: int = 1 << 20) -> int:
        """The largest multiple of ``multiple_of`` up to ``limit`` that stays within the budget; 0 if none does."""
        low, high = 0, limit // multiple_of
        if self.peak_bytes(high * multiple_of) <= budget_bytes:
            return high * multiple_of
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.peak_bytes(middle * multiple_of) <= budget_bytes else (low, middle)
        return low * multiple_of
