"""Reading a checkpoint folder that was verified, and how it differs from the run that wants to load it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from hift_ds.checkpoint.files import PADDING, read_regular_text
from hift_ds.checkpoint.json_state import decode
from hift_ds.checkpoint.state_files import SavedStates
from hift_ds.checkpoint.writer import (
    CHECKPOINT_FILE,
    CLIENT_STATE_FILE,
    WEIGHTS_FILE,
    gradients_file,
    rank_file,
    states_file,
)
from hift_ds.config import HiFTConfig
from hift_ds.errors import CheckpointError
from hift_ds.layers.grouping import LayerGroup
from hift_ds.store.base import MASTER


class SavedCheckpoint:
    """A complete checkpoint; tensors stay on disk until they are asked for.

    Attributes:
        common: the contents of ``checkpoint.json``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.common: dict[str, Any] = json.loads(read_regular_text(folder / CHECKPOINT_FILE))
        self._weights = safe_open(str(folder / WEIGHTS_FILE), framework="pt")
        self.weight_names = [name for name in self._weights.keys() if not name.startswith(PADDING)]  # noqa: SIM118

    @property
    def world_size(self) -> int:
        """The number of ranks that saved."""
        return self.common["world_size"]

    @property
    def parameters(self) -> dict[str, dict[str, Any]]:
        """Parameters and buffers by name: shape, dtype, whether and how often it was trained."""
        return self.common["tensors"]

    def of_rank(self, rank: int) -> dict[str, Any] | None:
        """The rank's own JSON; ``None`` if it is not here."""
        path = self.folder / rank_file(rank)
        return json.loads(read_regular_text(path)) if path.is_file() else None

    @cached_property
    def states(self) -> SavedStates:
        """The masters and states of all ranks, by parameter."""
        scalars: dict[str, Any] = {}
        for rank in range(self.world_size):
            scalars |= (self.of_rank(rank) or {}).get("scalars", {})
        files = [self.folder / states_file(rank) for rank in range(self.world_size)]
        fp32 = {
            name: self.folder / WEIGHTS_FILE
            for name in self.weight_names
            if self.parameters[name]["dtype"] == "float32" and self.parameters[name]["trained"]
        }
        return SavedStates([file for file in files if file.is_file()], scalars, fp32)

    def weight(self, name: str, best: bool = False) -> Tensor:
        """A weight as it was saved, or (``best``) the fp32 master that it is rounded from, if any.

        Raises:
            CheckpointError: the master, or a part of it, is in no file here.
        """
        if best and (MASTER in self.states.keys(name) or self._master_may_be_elsewhere(name)):
            shape = self.parameters[name]["shape"]
            numel = torch.Size(shape).numel()
            if not self.states.covers(name, MASTER, 0, numel):
                raise CheckpointError(
                    f"{self.folder}: the fp32 master of {name!r} is not, or not whole, in the files here; bring the "
                    "files of all nodes together in one folder, or take the 16-bit weights"
                )
            return self.states.elements(name, MASTER, 0, numel).view(shape)
        return self._weights.get_tensor(name)

    def _master_may_be_elsewhere(self, name: str) -> bool:
        """Some rank's states are not here, and the weight has been updated."""
        entry = self.parameters[name]
        return (
            entry["updates"] > 0
            and entry["dtype"] in ("bfloat16", "float16")
            and self.common["precision"] == "mixed_hi"
            and not all((self.folder / states_file(rank)).is_file() for rank in range(self.world_size))
        )

    def states_of(self, rank: int) -> SavedStates:
        """The masters and states in one rank's file alone."""
        return SavedStates([self.folder / states_file(rank)], {}, {})

    def weights(self, best: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Yield (name in the model, whole tensor in the dtype that it was saved in, or fp32 where a master is the
        ``best``), one at a time, tied weights once; for an export."""
        for name in self.weight_names:
            yield name, self.weight(name, best)

    def gradients(self, rank: int, world_size: int) -> dict[str, Tensor]:
        """The gradients that ``rank`` had summed up since the last step, by name, of the parameter's shape and in the
        dtype of the sum. On another number of ranks each gets the mean over all ranks, in fp32, which has the same mean
        over ranks."""
        if world_size == self.world_size:
            return self._gradients_of(rank)
        total: dict[str, Tensor] = {}
        for saved_rank in range(self.world_size):
            for name, grad in self._gradients_of(saved_rank).items():
                share = grad.float() / self.world_size
                total[name] = total[name] + share if name in total else share
        return total

    def _gradients_of(self, rank: int) -> dict[str, Tensor]:
        path = self.folder / gradients_file(rank)
        if not path.is_file():
            return {}
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if not name.startswith(PADDING)}  # noqa: SIM118

    def client_state(self) -> dict[str, Any]:
        """The caller's state, as it was given to ``save_checkpoint``."""
        state = decode(self.common["client_state"])
        path = self.folder / CLIENT_STATE_FILE
        if path.is_file():
            try:
                state |= torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # whatever its bytes lead to: this package did not write it
                reason = str(error).strip().splitlines()[0]
                raise CheckpointError(
                    f"{path} holds more than plain values and tensors, which could run code; it is not loaded "
                    f"({reason})"
                ) from None
        return state


def check_same_model(saved: SavedCheckpoint, shapes: Mapping[str, tuple[int, ...]], strict: bool) -> None:
    """Refuse the weights of another model before anything is changed.

    Args:
        shapes: of the model's parameters and persistent buffers.
        strict: names must agree too.

    Raises:
        CheckpointError: names the first difference and counts the rest.
    """
    theirs = {name: tuple(entry["shape"]) for name, entry in saved.parameters.items()}
    wrong = [name for name in theirs if name in shapes and theirs[name] != shapes[name]]
    if wrong:
        raise CheckpointError(
            f"{saved.folder} is the checkpoint of another model: {wrong[0]!r} has shape "
            f"{theirs[wrong[0]]} there and {shapes[wrong[0]]} here{_and_more(wrong)}"
        )
    excluded = set(saved.common["excluded"])
    missing = [name for name in shapes if name not in theirs and name not in excluded]
    unknown = [name for name in theirs if name not in shapes]
    if strict and (missing or unknown):
        side, names = ("lacks", missing) if missing else ("has", unknown)
        raise CheckpointError(
            f"{saved.folder} is the checkpoint of another model: it {side} {names[0]!r}{_and_more(names)}; "
            "load_module_strict=False loads what fits"
        )


def check_same_optimizer(saved: SavedCheckpoint, name: str) -> None:
    """See that the states are those of the optimizer class ``name``.

    Raises:
        CheckpointError: they are another's.
    """
    theirs = saved.common["optimizer"]["class"]
    if theirs != name:
        raise CheckpointError(
            f"{saved.folder} has the states of {theirs}, the run uses {name}: set the optimizer back, or "
            "start its states anew with load_optimizer_states=False"
        )


def grouping_differences(
    saved: SavedCheckpoint, groups: Sequence[LayerGroup], schedule_differences: Sequence[str]
) -> list[str]:
    """What makes the saved place in the cycle meaningless here; empty if nothing does."""
    differences = list(schedule_differences)
    theirs = [tuple(group["parameters"]) for group in saved.common["groups"]]
    ours = [group.param_names for group in groups]
    if theirs != ours:
        changed = next((i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if set(a) != set(b)), None)
        where = f"first in group {changed} ({groups[changed].name})" if changed is not None else "in number or order"
        differences.append(f"groups: {len(theirs)} -> {len(ours)}, different {where}")
    return differences


_OF_THE_GROUPS = ("group_size", "groups", "always_active", "order", "reshuffle", "seed", "steps_per_group")


def block_differences(saved: SavedCheckpoint, block: Mapping[str, Any], groups_are_said: bool = False) -> list[str]:
    """Settings of the "hift" block, as ``key: saved -> now``, whatever they do; a checkpoint of an earlier version does
    not say what it was saved with.

    Args:
        block: of the run, with every key.
        groups_are_said: leave out those that make layer groups and their order.
    """
    theirs, ours = dict(_flat(saved.common.get("hift") or block)), dict(_flat(block))
    theirs = dict(_flat(HiFTConfig().model_dump(mode="json"))) | theirs  # with keys that came later
    return [
        f"{key}: {theirs.get(key)} -> {ours.get(key)}"
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key) != ours.get(key) and not (groups_are_said and key in _OF_THE_GROUPS)
    ]


def _flat(block: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in block.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def option_differences(saved: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> list[str]:
    """Optimizer options that a config change and not a scheduler made different."""
    scheduled = {"lr", "initial_lr", "betas", "momentum", "max_lr", "min_lr", "max_momentum", "base_momentum"}
    return [
        f"param_groups[{i}].{key}: {theirs[key]!r} -> {ours[key]!r}"
        for i, (theirs, ours) in enumerate(zip(saved, now, strict=False))
        for key in theirs
        if key in ours and key not in scheduled and theirs[key] != ours[key]
    ]


def groups_now(saved: SavedCheckpoint, groups: Sequence[LayerGroup]) -> dict[int, int | None]:
    """The group in which the first parameter of each saved group is now, by the saved group's index; ``None`` if it is
    in none."""
    home = {name: group.index for group in groups for name in group.param_names}
    return {
        group["index"]: next((home[name] for name in group["parameters"] if name in home), None)
        for group in saved.common["groups"]
    }


def _and_more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
