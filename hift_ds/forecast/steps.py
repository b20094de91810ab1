"""How much memory a run will take: the steps of its layer groups, counted, and what follows from them.

A model of like blocks is stepped with few of them (:mod:`hift_ds.forecast.extrapolation`), any other one whole. Steps at
twice the batch and twice the length give the slopes from which the largest batch and length of a card follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from hift_ds.forecast.extrapolation import BlockModel, between, nodes, through
from hift_ds.forecast.setting import GroupStep, Result, Setting, simulate

GIB = 2**30
ALL_GROUPS_UP_TO = 8  # groups of a model that is not extrapolated; of more, some are stepped
STASHED = 3  # blocks above a group from which on offloading holds as much on the device as it ever does


@dataclass(frozen=True)
class Structure:
    """What decides how a model is stepped.

    Attributes:
        group_names, group_numels: of its layer groups, bottom to top.
        num_blocks: repeated blocks.
        is_regular: one group each for the embedding, every block and the head, all blocks alike.
        max_length: tokens that its positions allow; ``None`` if it does not say.
        matrix_sides: sum of rows and columns over all matrices in blocks, for the size of LoRA's adapters.
        window: tokens that some layer's attention is limited to, below which no mask is needed.
        has_fused_attention: the model can use a kernel that does not hold the scores.
    """

    group_names: tuple[str, ...]
    group_numels: tuple[int, ...]
    num_blocks: int
    is_regular: bool
    max_length: int | None
    matrix_sides: int
    window: int | None = None
    has_fused_attention: bool = True

    @property
    def num_groups(self) -> int:
        return len(self.group_names)


def read_structure(setting: Setting) -> Structure:
    """From the model's config and the ``"hift"`` block; no weights."""
    from hift_ds.config import parse_block
    from hift_ds.hf.model_structure import build_on_meta, read_config
    from hift_ds.layers.arch import find_arch
    from hift_ds.layers.grouping import partition_model

    config = read_config(setting.model, trust_remote_code=setting.trust_remote_code)
    model = build_on_meta(config, trust_remote_code=setting.trust_remote_code)
    hift = parse_block(setting.engine_config["hift"])
    partition = partition_model(
        model, group_size=hift.group_size, patterns=hift.groups, always_active=hift.always_active
    )
    arch = find_arch(model)
    blocks = [model.get_submodule(names[0]) for names in arch.blocks]
    alike = len({(type(block), sum(p.numel() for p in block.parameters())) for block in blocks}) == 1
    plain = hift.group_size == 1 and hift.groups is None and not hift.always_active
    one_stack = len({names[0].rpartition(".")[0] for names in arch.blocks}) == 1
    weights = dict(model.named_parameters())
    return Structure(
        tuple(group.name for group in partition.groups),
        tuple(group.numel for group in partition.groups),
        len(blocks),
        alike and plain and one_stack and len(partition.groups) == len(blocks) + 2,
        getattr(config.get_text_config(), "max_position_embeddings", None),
        sum(sum(weights[name].shape) for name in partition.matrices),
        getattr(config.get_text_config(), "sliding_window", None),
        bool(getattr(model, "_supports_sdpa", False)),
    )


class Steps(Protocol):
    """The steps of a model's groups under one setting."""

    def step(self, index: int) -> GroupStep: ...

    def known(self) -> Sequence[int]:
        """Groups whose steps can be asked for."""
        ...


@dataclass(frozen=True)
class WholeModel:
    """Stepped as it is; groups that were left out lie on a line between their neighbours."""

    result: Result

    def step(self, index: int) -> GroupStep:
        below = max((step for step in self.result.steps if step.index <= index), key=lambda step: step.index)
        above = min((step for step in self.result.steps if step.index >= index), key=lambda step: step.index)
        return below if below is above else replace(between(below, above, index), numel=0)

    def known(self) -> Sequence[int]:
        return [step.index for step in self.result.steps]


@dataclass(frozen=True)
class FewBlocks:
    """Extrapolated to ``num_blocks``."""

    model: BlockModel
    num_blocks: int
    ends_only: bool

    def step(self, index: int) -> GroupStep:
        return self.model.step(self.num_blocks, index)

    def known(self) -> Sequence[int]:
        last = self.num_blocks + 1
        if self.model.large.num_groups == 1:
            return [0]
        return [0, 1, last] if self.ends_only else range(last + 1)


@dataclass(frozen=True)
class WithUpdates:
    """Forward and backward of ``steps``, the update of ``others``."""

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

    def settings(self) -> list[Setting]:
        """What has to be simulated for it."""
        sizes = self._sizes()
        setting = replace(self.setting, second_update=not self.ends_only, updates=self.updates_as is None)
        if self._is_partitioned():
            setting = replace(setting, visits=max(setting.visits, 2))  # ZeRO-3 prefetches from the second on
        if sizes is None:
            return [replace(setting, groups=self._whole_groups())]
        return [replace(setting, num_blocks=size, groups=self._groups(size)) for size in sizes]

    def steps(self, results: Sequence[Result]) -> Steps:
        """From the results of ``settings()``."""
        if len(results) == 1:
            return WholeModel(results[0])
        return FewBlocks(BlockModel(*results), self.structure.num_blocks, self.ends_only)

    def _activations(self) -> dict[str, Any]:
        return self.setting.engine_config["hift"].get("activations") or {}

    def _is_partitioned(self) -> bool:
        """Then prefetching holds weights of several blocks, in places that differ with their number: stepped whole."""
        return (self.setting.engine_config.get("zero_optimization") or {}).get("stage", 0) == 3

    def _settled(self) -> int:
        """Blocks above a group from which on every line is straight."""
        kept = self._activations().get("blocks_kept", 0)
        return max(kept + 2, STASHED if self._activations().get("offload") else 0)

    def _sizes(self) -> tuple[int, int] | None:
        """Numbers of blocks to build; ``None``: so many that extrapolating is not worth it."""
        small = self._settled() + (1 if self.ends_only else 3)
        if self._is_partitioned() or not self.structure.is_regular or small + 1 >= self.structure.num_blocks:
            return None
        return small, small + 1

    def _groups(self, size: int) -> tuple[int, ...]:
        if self.ends_only:
            return (0, 1, size + 1)
        return tuple(nodes(size, self._activations().get("blocks_kept", 0), self._settled()))

    def _whole_groups(self) -> tuple[int, ...]:
        count = self.structure.num_groups
        if self.ends_only:
            return (0, 1, -1)
        return tuple(range(count)) if count <= ALL_GROUPS_UP_TO else (0, 1, 2, count // 2, -2, -1)


def run_requests(requests: Sequence[Request], num_processes: int = 2) -> list[Steps]:
    """The steps of each request. Those that ``updates_as`` names are among the requests."""
    settings = [request.settings() for request in requests]
    flat = [setting for several in settings for setting in several]
    # The longest first, so that the processes end together.
    order = sorted(range(len(flat)), key=lambda i: -((flat[i].num_blocks or 100) * len(flat[i].groups or ())))
    results = dict(zip(order, simulate([flat[i] for i in order], num_processes), strict=True))
    steps, start = [], 0
    for request, several in zip(requests, settings, strict=True):
        steps.append(request.steps([results[i] for i in range(start, start + len(several))]))
        start += len(several)
    whole = {id(request.setting): found for request, found in zip(requests, steps, strict=True)}
    return [
        found if request.updates_as is None else WithUpdates(found, whole[id(request.updates_as)])
        for request, found in zip(requests, steps, strict=True)
    ]


def worst_step(steps: Steps) -> GroupStep:
    """Of the group with the highest peak."""
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

    def largest(self, budget_bytes: float, unit: int = 1, limit: int = 1 << 20) -> int:
        """The largest multiple of ``unit`` up to ``limit`` that stays within the budget; 0 if none does."""
        low, high = 0, limit // unit
        if self.peak_bytes(high * unit) <= budget_bytes:
            return high * unit
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.peak_bytes(middle * unit) <= budget_bytes else (low, middle)
        return low * unit
