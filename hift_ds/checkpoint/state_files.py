"""What :class:`GroupStates` hold, as named tensors and JSON, and back again on any number of ranks.

A state is named by its parameter, never by a group or a rank, so another number of ranks, another grouping or
another slicing reads the same files: concatenate the pieces, cut to what is wanted. Names in a rank's file:

``layers.0.up.weight/exp_avg[0:46]``   elements 0 to 45 of the flattened parameter (``master``: fp32 weight)
``layers.0.up.weight/row_var``         a state with a shape of its own; belongs to one rank, whole
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from hift_ds.checkpoint.files import TensorSpec
from hift_ds.checkpoint.json_state import decode, encode
from hift_ds.errors import CheckpointError
from hift_ds.layers.grouping import ALWAYS
from hift_ds.optim.group_states import GroupStates
from hift_ds.optim.state_layout import StateTensor
from hift_ds.store.base import MASTER

_RANGE = re.compile(r"(?P<param>.*)/(?P<key>[^/\[]+)\[(?P<start>\d+):(?P<end>\d+)\]")


# Which kernel runs, not what it computes: the run's own choice, since another device may resume.
_KERNEL_OPTIONS = ("params", "fused", "foreach", "capturable", "differentiable")


def options_of(param_group: Mapping[str, Any]) -> dict[str, Any]:
    """What the optimizer computes with."""
    return {key: value for key, value in param_group.items() if key not in _KERNEL_OPTIONS}


def class_name(optimizer: torch.optim.Optimizer) -> str:
    """The optimizer's class by its dotted name, without the private module in which a version of torch happens to
    define it."""
    module = type(optimizer).__module__
    return f"{'torch.optim' if module.startswith('torch.optim.') else module}.{type(optimizer).__qualname__}"


# -- out -------------------------------------------------------------------------------------------


def spec_of(tensor: StateTensor) -> TensorSpec:
    """The tensor's name, dtype and shape in a rank's file."""
    piece = tensor.piece
    bounds = f"[{piece.start}:{piece.start + piece.numel}]" if tensor.flat else ""
    return TensorSpec(f"{tensor.param}/{tensor.key}{bounds}", tensor.place.dtype, tensor.shape)


def scalars_by_parameter(states: GroupStates) -> dict[str, Any]:
    """``{parameter: {key: value}}``, JSON-able: "step" and its like, of parameters with a piece here."""
    scalars: dict[str, Any] = {}
    for name, _, record in states.pieces():
        if name not in scalars and (record.scalars or record.slots):
            scalars[name] = _encode_scalars(name, record.scalars)
    return scalars


def _encode_scalars(name: str, scalars: Mapping[str, Any]) -> Any:
    for key, value in scalars.items():
        try:
            encode(value)
        except TypeError as error:
            raise CheckpointError(f"the optimizer's state {key!r} of {name!r} cannot be saved: {error}") from None
    return encode(dict(scalars))


def extras_by_group(states: GroupStates) -> list[dict[str, Any]]:
    """What the optimizer keeps in its param_groups, per layer group."""
    return [
        {"group": index, "param_group": position, "values": encode(values)}
        for index, by_group in states.extras.items()
        for position, values in by_group.items()
    ]


# -- in --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shard:
    file: Path
    name: str
    start: int
    end: int


class SavedStates:
    """The states of all ranks in a checkpoint folder, by parameter and range, read when asked for.

    Args:
        files: the ranks' safetensors files.
        scalars: ``{parameter: {key: encoded value}}``, all ranks' together.
        fp32_weights: weights saved in fp32 and the file they are in: these are their own masters.
    """

    def __init__(
        self,
        files: Iterable[Path],
        scalars: Mapping[str, Mapping[str, Any]],
        fp32_weights: Mapping[str, Path],
    ) -> None:
        self._flat: dict[tuple[str, str], list[_Shard]] = defaultdict(list)
        self._shaped: dict[tuple[str, str], _Shard] = {}
        self._keys: dict[str, set[str]] = defaultdict(set)
        self._open: dict[Path, safe_open] = {}
        self._scalars = scalars
        self._fp32_weights = fp32_weights
        for file in set(fp32_weights.values()):
            self._open[file] = safe_open(str(file), framework="pt")
        for file in files:
            self._open[file] = safe_open(str(file), framework="pt")
            for name in self._open[file].keys():  # noqa: SIM118
                self._index(file, name)

    def _index(self, file: Path, name: str) -> None:
        match = _RANGE.fullmatch(name)
        if match:
            param, key = match["param"], match["key"]
            self._flat[param, key].append(_Shard(file, name, int(match["start"]), int(match["end"])))
        elif "/" in name:
            param, _, key = name.rpartition("/")
            self._shaped[param, key] = _Shard(file, name, 0, 0)
        else:
            return  # padding
        self._keys[param].add(key)

    def keys(self, param: str) -> set[str]:
        """State keys of a parameter, ``master`` among them. Empty if it was never updated."""
        return set(self._keys.get(param, ()))

    def scalars(self, param: str) -> dict[str, Any] | None:
        """The saved scalars of a parameter, by the optimizer's key; ``None`` if it was never updated."""
        return decode(self._scalars[param]) if param in self._scalars else None

    def covers(self, param: str, key: str, start: int, numel: int) -> bool:
        """True if the files here hold these elements of a state (or all of one with a shape of its own)."""
        if not self.is_flat(param, key):
            return (param, key) in self._shaped
        at = start
        for shard in sorted(self._flat[param, key], key=lambda shard: shard.start):
            if shard.start <= at < shard.end:
                at = shard.end
        return at >= start + numel

    @property
    def has_states(self) -> bool:
        return bool(self._keys)

    def has_master(self, param: str) -> bool:
        """True if the fp32 value of the weight is known."""
        return self.is_flat(param, MASTER) or param in self._fp32_weights

    def master(self, param: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of the fp32 value of the weight; flat."""
        if self.is_flat(param, MASTER):
            return self.elements(param, MASTER, start, numel)
        return self._open[self._fp32_weights[param]].get_tensor(param).reshape(-1)[start : start + numel]

    def is_flat(self, param: str, key: str) -> bool:
        return (param, key) in self._flat

    def shaped(self, param: str, key: str) -> Tensor:
        """A state with a shape of its own."""
        shard = self._shaped[param, key]
        return self._open[shard.file].get_tensor(shard.name)

    def pieces(self, param: str, key: str) -> list[tuple[int, Tensor]]:
        """(first element, values) of each part of a flat state that the files here hold."""
        return [
            (shard.start, self._open[shard.file].get_tensor(shard.name)) for shard in self._flat.get((param, key), ())
        ]

    def elements(self, param: str, key: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of a flat state; ``covers`` has found them."""
        shards = sorted(self._flat[param, key], key=lambda shard: shard.start)
        parts, at, end = [], start, start + numel
        for shard in shards:
            if shard.end <= at or shard.start > at or at == end:
                continue
            stop = min(shard.end, end)
            parts.append(self._open[shard.file].get_slice(shard.name)[at - shard.start : stop - shard.start])
            at = stop
        assert at == end, (param, key, start, numel)
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def check_reachable(states: GroupStates, saved: SavedStates, updated: Collection[str], where: Path) -> None:
    """See that the files in this folder hold all that this rank will ask for, before anything is changed.

    Args:
        updated: parameters that had been updated when the checkpoint was saved, so that a state is to be
            expected.

    Raises:
        CheckpointError: they do not; with node-local storage the rest is on other nodes.
    """
    for name, piece, _ in states.pieces():
        keys = saved.keys(name)
        lost = next((key for key in keys if not saved.covers(name, key, piece.start, piece.numel)), None)
        if lost is None and (keys or not saved.has_states or name not in updated):
            continue
        raise CheckpointError(
            f"{where}: {lost or 'the state'} of {name!r} is in none of the files here; to resume on "
            "other ranks bring the files of all nodes together in one folder"
        )


def restore_extras(
    states: GroupStates, saved: Iterable[Mapping[str, Any]], group_of_saved: Mapping[int, int | None]
) -> None:
    """Take over what :func:`extras_by_group` gave.

    Args:
        group_of_saved: where each saved group's parameters are now; ``None`` for nowhere.
    """
    num_param_groups = len(states.piecewise.base.param_groups)
    states.extras = {index: {} for index in states.groups}
    for entry in saved:
        index = entry["group"] if entry["group"] == ALWAYS else group_of_saved.get(entry["group"])
        if index in states.extras and entry["param_group"] < num_param_groups:
            states.extras[index].setdefault(entry["param_group"], decode(entry["values"]))
