"""``groups.json``: the layer groups of a run and, at its end, how far each of them moved."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hift_ds.checkpoint.files import replace_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hift_ds.layers.grouping import LayerGroup

FILE_NAME = "groups.json"


@dataclass
class GroupSummary:
    """One layer group of a run. ``moved``: L2 norm of (weights at the end - at the start); ``norm``: of those at the
    start."""

    index: int  # -1: active in every turn
    name: str
    numel: int
    params: list[str]
    moved: float | None = None
    norm: float | None = None

    @property
    def relative(self) -> float | None:
        """How far the group has moved, over the norm that it had before; ``None`` where that is not known or 0."""
        if self.moved is None or not self.norm:
            return None
        return self.moved / self.norm


def summarize(groups: Iterable[LayerGroup]) -> list[GroupSummary]:
    """A summary of each layer group, its distances not known yet."""
    return [GroupSummary(g.index, g.name, g.numel, list(g.param_names)) for g in groups]


def add_distances(
    groups: list[GroupSummary],
    distances: Mapping[str, tuple[float, float]],
    saved_names: Callable[[str], Iterable[str]] = lambda name: (name,),
) -> None:
    """Sum up per group what ``hf.weight_distances`` measured per tensor.

    Args:
        saved_names: parameter name -> the names under which ``distances`` has it, where those differ.
    """
    for group in groups:
        pairs = [distances[saved] for name in group.params for saved in saved_names(name) if saved in distances]
        if pairs:
            group.moved = math.sqrt(sum(moved**2 for moved, _ in pairs))
            group.norm = math.sqrt(sum(norm**2 for _, norm in pairs))


def record_movement(run_dir: str | Path, before_dir: str | Path, after_dir: str | Path, model: PreTrainedModel) -> None:
    """Measure how far each group of a finished run moved and add it to ``groups.json``, if there is one.

    Args:
        before_dir: safetensors folder of the input.
        after_dir: of the export. Changes below the resolution of its dtype do not count: they are not in it.
        model: names the parameters; its values are not looked at, and it may be partitioned.

    Raises:
        CheckpointError: a folder is damaged, or the two are of different models.
    """
    from hift_ds.hf.weight_distances import weight_distances
    from hift_ds.hf.weight_names import skeleton

    groups = read_groups(run_dir)
    if groups:
        shapes = skeleton(model.config, like=model)
        add_distances(groups, _under_all_names(weight_distances(before_dir, after_dir, model=shapes), shapes))
        write_groups(run_dir, groups)


def _under_all_names(
    distances: dict[str, tuple[float, float]], model: PreTrainedModel
) -> dict[str, tuple[float, float]]:
    """A tied weight was measured under one of its names and may be listed in a group under another."""
    tensors = model.state_dict(keep_vars=True)
    measured = {id(tensors[name]): pair for name, pair in distances.items()}
    return {name: measured[id(tensor)] for name, tensor in tensors.items() if id(tensor) in measured}


def write_groups(run_dir: str | Path, groups: list[GroupSummary]) -> Path:
    """Write ``groups.json`` into the run folder; returns its path."""
    path = Path(run_dir) / FILE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps([asdict(group) for group in groups], indent=1) + "\n")
    return path


def read_groups(run_dir: str | Path) -> list[GroupSummary]:
    """The groups of a run; empty if it has no ``groups.json``."""
    path = Path(run_dir) / FILE_NAME
    if not path.is_file():
        return []
    return [GroupSummary(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
