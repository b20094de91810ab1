"""What a :class:`GroupOptimizer` knows, as named tensors and JSON, and back again on any number of ranks.

A state is named by its parameter, never by a group or a rank, so another number of ranks, another grouping or
another slicing reads the same files: concatenate the pieces, cut to what is wanted. Names in a rank's file:

``layers.0.up.weight/exp_avg[0:46]``   elements 0 to 45 of the flattened parameter (``master``: fp32 weight)
``layers.0.up.weight/row_var``         a state with a shape of its own; belongs to one rank, whole
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from hift_ds.checkpoint.files import TensorSpec
from hift_ds.checkpoint.json_state import decode, encode
from hift_ds.errors import CheckpointError
from hift_ds.optim.group_optimizer import ALWAYS, MASTER, GroupOptimizer, PieceRecord, StateView
from hift_ds.optim.parameters import Chunk, GroupShard

_RANGE = re.compile(r"(?P<param>.*)/(?P<key>[^/\[]+)\[(?P<start>\d+):(?P<end>\d+)\]")


@dataclass(frozen=True)
class StoredTensor:
    """One state tensor of one piece: its name in the file and its place in the state store."""

    spec: TensorSpec
    slot: StateView
    flat: bool  # has an entry per weight: saved without the parameter's shape

    def view(self, tensors: Mapping[str, Tensor]) -> Tensor:
        view = self.slot.view(tensors)
        return view.reshape(-1) if self.flat else view


# Which kernel runs, not what it computes: the run's own choice, since another device may resume.
_KERNEL_OPTIONS = ("params", "fused", "foreach", "capturable", "differentiable")


def options_of(param_group: Mapping[str, Any]) -> dict[str, Any]:
    """What the optimizer computes with."""
    return {key: value for key, value in param_group.items() if key not in _KERNEL_OPTIONS}


def class_name(optimizer: torch.optim.Optimizer) -> str:
    """Dotted, without the private module in which a version of torch happens to define the class."""
    module = type(optimizer).__module__
    return f"{'torch.optim' if module.startswith('torch.optim.') else module}.{type(optimizer).__qualname__}"


# -- out -------------------------------------------------------------------------------------------


def states_of_chunk(optimizer: GroupOptimizer, group: GroupShard, chunk: Chunk) -> list[StoredTensor]:
    """This rank's masters and states of ``chunk`` that hold values."""
    stored = []
    for piece, record in zip(chunk.pieces, optimizer.records[chunk.id], strict=True):
        name, bounds = group.members[piece.member].name, f"[{piece.start}:{piece.start + piece.numel}]"
        if record.master is not None and chunk.id in optimizer.masters_filled:
            spec = TensorSpec(f"{name}/{MASTER}{bounds}", torch.float32, (piece.numel,))
            stored.append(StoredTensor(spec, record.master, flat=True))
        for key, slot in record.slots.items():
            flat = slot.shape == piece.shape
            shape = (piece.numel,) if flat else slot.shape
            spec = TensorSpec(f"{name}/{key}{bounds if flat else ''}", slot.dtype, shape)
            stored.append(StoredTensor(spec, slot, flat))
    return stored


def read_chunk(
    optimizer: GroupOptimizer, group: GroupShard, chunk: Chunk, stored: Iterable[StoredTensor]
) -> Iterator[Tensor]:
    """The current values, one tensor at a time. The store is synchronized."""
    tensors = optimizer.store_of(group.index).read(chunk.id)
    for item in stored:
        yield item.view(tensors)


def scalars_by_parameter(optimizer: GroupOptimizer) -> dict[str, Any]:
    """``{parameter: {key: value}}``, JSON-able: "step" and its like, of parameters with a piece here."""
    scalars: dict[str, Any] = {}
    for group in optimizer.groups.values():
        for chunk in group.chunks:
            for piece, record in zip(chunk.pieces, optimizer.records[chunk.id], strict=True):
                name = group.members[piece.member].name
                if name not in scalars and (record.scalars or record.slots):
                    scalars[name] = _encode_scalars(name, record.scalars)
    return scalars


def _encode_scalars(name: str, scalars: Mapping[str, Any]) -> Any:
    for key, value in scalars.items():
        try:
            encode(value)
        except TypeError as error:
            raise CheckpointError(
                f"the optimizer's state {key!r} of {name!r} cannot be saved: {error}"
            ) from None
    return encode(dict(scalars))


def extras_by_group(optimizer: GroupOptimizer) -> list[dict[str, Any]]:
    """What the optimizer keeps in its param_groups, per layer group."""
    return [
        {"group": index, "param_group": position, "values": encode(values)}
        for index, by_group in optimizer.extras.items()
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
        self._open: dict[Path, Any] = {}
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
        """``None`` if the parameter was never updated."""
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
            (shard.start, self._open[shard.file].get_tensor(shard.name))
            for shard in self._flat.get((param, key), ())
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


def check_reachable(
    optimizer: GroupOptimizer, saved: SavedStates, updated: Collection[str], where: Path
) -> None:
    """Before anything is changed: the files in this folder hold all that this rank will ask for.

    Args:
        updated: parameters that had been updated when the checkpoint was saved, so that a state is to be
            expected.

    Raises:
        CheckpointError: they do not; with node-local storage the rest is on other nodes.
    """
    for group in optimizer.groups.values():
        for piece in (piece for chunk in group.chunks for piece in chunk.pieces):
            name = group.members[piece.member].name
            keys = saved.keys(name)
            lost = next((key for key in keys if not saved.covers(name, key, piece.start, piece.numel)), None)
            if lost is None and (keys or not saved.has_states or name not in updated):
                continue
            raise CheckpointError(
                f"{where}: {lost or 'the state'} of {name!r} is in none of the files here; to resume on "
                "other ranks bring the files of all nodes together in one folder"
            )


@torch.no_grad()
def restore_states(optimizer: GroupOptimizer, saved: SavedStates, *, load_states: bool = True) -> None:
    """Give every chunk of this rank the saved masters and states of its pieces; forget what it had.

    The weights have been loaded. The host holds one state of one chunk at a time. A whole key is written at
    once, so that a store which encodes values in blocks encodes each block once.

    Args:
        load_states: ``False``: masters only; optimizer states stay as they are.
    """
    for group in optimizer.groups.values():
        store = optimizer.store_of(group.index)
        store.synchronize()
        optimizer.parameters.begin_update(group)
        for chunk in group.chunks:
            _restore_masters(optimizer, group, chunk, saved)
            if load_states:
                _restore_chunk(optimizer, group, chunk, saved)
        optimizer.parameters.abandon_update(group)


def _restore_masters(optimizer: GroupOptimizer, group: GroupShard, chunk: Chunk, saved: SavedStates) -> None:
    """All masters of a chunk, or none. One not saved is made from the weight, as a first visit would."""
    records = optimizer.records[chunk.id]
    names = [group.members[piece.member].name for piece in chunk.pieces]
    optimizer.masters_filled.discard(chunk.id)
    if not any(saved.has_master(name) for name, record in zip(names, records, strict=True) if record.master):
        return
    parts = []
    for piece, record, name in zip(chunk.pieces, records, names, strict=True):
        if record.master is None:
            continue
        if saved.has_master(name):
            parts.append(saved.master(name, piece.start, piece.numel))
        else:
            parts.append(optimizer.parameters.weight(group, piece).reshape(-1).float().cpu())
    optimizer.store_of(group.index).write(chunk.id, MASTER, torch.cat(parts))
    optimizer.masters_filled.add(chunk.id)


def _restore_chunk(optimizer: GroupOptimizer, group: GroupShard, chunk: Chunk, saved: SavedStates) -> None:
    records = [PieceRecord(record.master) for record in optimizer.records[chunk.id]]
    optimizer.records[chunk.id] = records
    names = [group.members[piece.member].name for piece in chunk.pieces]
    for key in sorted(set().union(*(saved.keys(name) for name in names)) - {MASTER}):
        _restore_key(optimizer, group, chunk, saved, key)
    for piece, record, name in zip(chunk.pieces, records, names, strict=True):
        param_group = optimizer.param_groups[group.members[piece.member].param_group]
        scalars = saved.scalars(name) or {}
        record.scalars = {k: _placed(k, v, param_group, optimizer.update_device) for k, v in scalars.items()}


def _restore_key(
    optimizer: GroupOptimizer, group: GroupShard, chunk: Chunk, saved: SavedStates, key: str
) -> None:
    """One state of all pieces of a chunk: assembled on the host, then written in one go."""
    store = optimizer.store_of(group.index)
    buffers: dict[str, Tensor] = {}  # by store key
    for i, piece in enumerate(chunk.pieces):
        name = group.members[piece.member].name
        if key not in saved.keys(name):
            continue
        flat = saved.is_flat(name, key)
        value = (
            saved.elements(name, key, piece.start, piece.numel).view(piece.shape)
            if flat
            else saved.shaped(name, key)
        )
        slot = optimizer.new_view(group, chunk, i, key, value)
        if slot.key not in buffers:
            numel = sum(p.numel for p in chunk.pieces) if slot.key == key else value.numel()
            store.ensure(chunk.id, slot.key, numel, value.dtype)
            buffers[slot.key] = torch.zeros(numel, dtype=value.dtype)
        buffers[slot.key][slot.offset : slot.offset + value.numel()] = value.reshape(-1)
        optimizer.records[chunk.id][i].slots[key] = slot
    for store_key, values in buffers.items():
        store.write(chunk.id, store_key, values)


def _placed(key: str, value: Any, group: Mapping[str, Any], update_device: torch.device) -> Any:
    """Torch's rule: tensors are on the device, the step count only for kernels that read it there."""
    if not isinstance(value, Tensor):
        return value
    on_device = key != "step" or group.get("fused") or group.get("capturable")
    return value.to(update_device) if on_device else value


def restore_extras(
    optimizer: GroupOptimizer, saved: Iterable[Mapping[str, Any]], group_of_saved: Mapping[int, int | None]
) -> None:
    """Args: group_of_saved: where each saved group's parameters are now; ``None`` for nowhere."""
    optimizer.extras = {index: {} for index in optimizer.groups}
    for entry in saved:
        index = entry["group"] if entry["group"] == ALWAYS else group_of_saved.get(entry["group"])
        if index in optimizer.extras and entry["param_group"] < len(optimizer.param_groups):
            optimizer.extras[index].setdefault(entry["param_group"], decode(entry["values"]))


def restore_coverage(optimizer: GroupOptimizer, updates: Mapping[str, int]) -> None:
    for index, group in optimizer.groups.items():
        optimizer.num_updates[index] = [updates.get(member.name, 0) for member in group.members]
