"""Giving the states of layer groups values that come from elsewhere: a checkpoint's, or fp32 bits that the weights
themselves no longer have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from hift_ds.optim.group_shard import Chunk, GroupShard
from hift_ds.optim.group_states import GroupStates
from hift_ds.optim.piecewise import PieceState
from hift_ds.optim.state_layout import PieceRecord, by_part, shared_key
from hift_ds.store.base import MASTER


class SavedStates(Protocol):
    """What :func:`load_states` reads: masters and states of whole parameters, by name and range."""

    def keys(self, param: str) -> set[str]:
        """The keys saved for ``param``, ``MASTER`` among them."""

    def scalars(self, param: str) -> PieceState | None:
        """The saved scalars of ``param``, by the optimizer's key."""

    def has_master(self, param: str) -> bool:
        """True if there is a master of ``param``."""

    def master(self, param: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of a master, fp32, flat."""

    def is_flat(self, param: str, key: str) -> bool:
        """True if the state has an entry for each element of ``param``."""

    def elements(self, param: str, key: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of a flat state."""

    def shaped(self, param: str, key: str) -> Tensor:
        """A state with a shape of its own, whole."""


@torch.no_grad()
def set_masters(states: GroupStates, whole: Callable[[str, int, int], Tensor | None]) -> None:
    """Fill all masters from fp32 values that the weights themselves no longer have.

    Args:
        whole: (parameter name, start, numel) -> those elements, flat, or ``None`` to take the weight's.
    """
    for group in states.groups.values():
        states.parameters.begin_update(group)
        for chunk in group.chunks:
            for piece, record in states.pieces_of(chunk):
                if record.master is None:
                    continue
                values = whole(group.members[piece.member].name, piece.start, piece.numel)
                if values is None:
                    values = states.parameters.weight(group, piece)
                flat = values.reshape(-1).float()
                states.store_of(group).write(chunk.id, record.master.key, flat, record.master.offset)
            states.masters_filled.add(chunk.id)
        states.parameters.abandon_update(group)


@torch.no_grad()
def load_states(states: GroupStates, saved: SavedStates, *, with_states: bool = True) -> None:
    """Give every chunk of this rank the saved masters and states of its pieces; forget what it had.

    The weights have been loaded. The host holds one state of one chunk at a time. A whole key is written at
    once, so that a store which encodes values in blocks encodes each block once.

    Args:
        with_states: ``False``: masters only; optimizer states stay as they are.
    """
    for group in states.groups.values():
        for chunk in group.chunks:  # one that an update which failed has left fetched
            states.store_of(group).evict(chunk.id)
        states.store_of(group).synchronize()
        states.parameters.begin_update(group)
        for chunk in group.chunks:
            _load_masters(states, group, chunk, saved)
            if with_states:
                _load_chunk(states, group, chunk, saved)
        states.parameters.abandon_update(group)


def _load_masters(states: GroupStates, group: GroupShard, chunk: Chunk, saved: SavedStates) -> None:
    """All masters of a chunk, or none. One not saved is made from the weight, as a first visit would."""
    states.masters_filled.discard(chunk.id)
    mastered = [
        (piece, record.master.key, group.members[piece.member].name)
        for piece, record in states.pieces_of(chunk)
        if record.master is not None
    ]
    if not any(saved.has_master(name) for _, _, name in mastered):
        return
    for key in dict.fromkeys(key for _, key, _ in mastered):
        values = [
            saved.master(name, piece.start, piece.numel)
            if saved.has_master(name)
            else states.parameters.weight(group, piece).reshape(-1).float().cpu()
            for piece, its_key, name in mastered
            if its_key == key
        ]
        states.store_of(group).write(chunk.id, key, torch.cat(values))
    states.masters_filled.add(chunk.id)


def _load_chunk(states: GroupStates, group: GroupShard, chunk: Chunk, saved: SavedStates) -> None:
    states.records[chunk.id] = [PieceRecord(record.master) for record in states.records[chunk.id]]
    names = [group.members[piece.member].name for piece in chunk.pieces]
    for key in sorted(set().union(*(saved.keys(name) for name in names)) - {MASTER}):
        _load_key(states, group, chunk, saved, key)
    for piece, record in states.pieces_of(chunk):
        member = group.members[piece.member]
        record.scalars = {
            key: states.piecewise.placed(key, value, member.param_group, states.device_of(chunk))
            for key, value in (saved.scalars(member.name) or {}).items()
        }


def _load_key(states: GroupStates, group: GroupShard, chunk: Chunk, saved: SavedStates, key: str) -> None:
    """One state of all pieces of a chunk: assembled on the host, then written in one go."""
    store = states.store_of(group)
    buffers: dict[str, Tensor] = {}  # by the store's key
    for i, (piece, record) in enumerate(states.pieces_of(chunk)):
        name = group.members[piece.member].name
        if key not in saved.keys(name):
            continue
        if saved.is_flat(name, key):
            value = saved.elements(name, key, piece.start, piece.numel).view(piece.shape)
        else:
            value = saved.shaped(name, key)
        view = record.slots[key] = states.new_view(group, chunk, i, key, value)
        if view.key not in buffers:
            shared = next(together for together in by_part(group, chunk) if i in together)
            is_shared = view.key == shared_key(group, chunk, shared, key)
            numel = sum(chunk.pieces[j].numel for j in shared) if is_shared else value.numel()
            store.ensure(chunk.id, view.key, numel, value.dtype)
            buffers[view.key] = torch.zeros(numel, dtype=value.dtype)
        buffers[view.key][view.offset : view.offset + value.numel()] = value.reshape(-1)
    for store_key, values in buffers.items():
        store.write(chunk.id, store_key, values)
