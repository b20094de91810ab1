"""Masters and optimizer states of the layer groups: which of them hold values, and bringing them in and out of a store.

Here the store's flat buffers are cut into the tensors that an optimizer sees (:mod:`hift_ds.optim.state_layout` says
where each lies), and a checkpoint reads them by parameter name; saved values come in by
:mod:`hift_ds.optim.fill_states`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hift_ds.layers.grouping import ALWAYS
from hift_ds.optim.group_shard import Chunk, GroupShard, Piece
from hift_ds.optim.host_step import SplitUpdates
from hift_ds.optim.parameters import Parameters
from hift_ds.optim.piecewise import Extras, PieceState, PiecewiseOptimizer
from hift_ds.optim.state_layout import PieceRecord, StateTensor, StateView, by_part, copied, part_of, shared_key
from hift_ds.precision import PrecisionPolicy
from hift_ds.store.arithmetic import StateArithmetic
from hift_ds.store.base import MASTER, StateStore, Weights
from hift_ds.store.disk import DiskStateStore
from hift_ds.store.encoded import EncodedStateStore
from hift_ds.store.machine import Machine
from hift_ds.store.split import SplitStateStore

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class HeldRecords:
    """What was known of a chunk's states before an update that may be taken back."""

    records: list[PieceRecord]
    has_masters: bool  # they held values


class GroupStates:
    """The states of all layer groups on this rank.

    Args:
        groups: by group index, and ``ALWAYS`` if some parameters are trained in every turn.
        parameters: how weights are reached; masters begin as copies of them.
        piecewise: the optimizer whose states these are.
        precision: which weights have an fp32 master.
        update_device: where the arithmetic runs.
        store: of the rotating groups.
        always_store: of the always-active group; its states never leave the update device.
        split: some chunks are updated on the host; ``store`` is then a :class:`SplitStateStore`.
        may_hold: all chunks of a step may be held at once (:meth:`hold`): stores need the room.

    Attributes:
        records: by chunk id, one per piece of the chunk.
        extras: scalars that the optimizer keeps in its param_groups, by group index and param_group index.
        masters_filled: chunks whose masters hold values, by id.
    """

    def __init__(
        self,
        groups: Mapping[int, GroupShard],
        parameters: Parameters,
        piecewise: PiecewiseOptimizer,
        precision: PrecisionPolicy,
        update_device: torch.device,
        store: StateStore,
        always_store: StateStore,
        may_hold: bool = False,
        split: SplitUpdates | None = None,
    ) -> None:
        self.groups = dict(groups)
        self.parameters = parameters
        self.piecewise = piecewise
        self.precision = precision
        self.update_device = update_device
        self.store = store
        self.always_store = always_store
        self.records: dict[int, list[PieceRecord]] = {}
        self.extras: dict[int, Extras] = {index: {} for index in self.groups}
        self.masters_filled: set[int] = set()
        self._held: dict[int, HeldRecords] = {}  # by chunk
        self.split = split
        self.on_host: frozenset[int] = frozenset()  # chunks that the host updates, of a split
        self._may_hold = may_hold
        self._changed: set[nn.Parameter] = set()  # by others, and their masters do not know
        self._written: set[nn.Parameter] = set()  # by the updates under way
        params = [member.param for group in self.groups.values() for member in group.members]
        self._versions = {param: parameters.version(param) for param in params}  # after their last update
        self._lay_out()

    def _lay_out(self) -> None:
        """Say which chunk is where, and reserve."""
        if self.split is not None:
            assert isinstance(self.store, SplitStateStore)
            self.on_host = self.store.on_host = self.split.chunks(self.groups)
        self._say_what_may_be_held()
        self._reserve()

    def _say_what_may_be_held(self) -> None:
        if self._may_hold:
            self.store.may_hold = [[chunk.id for chunk in group.chunks] for group in self.groups.values()]

    def move(self, host_share: float) -> None:
        """Update another share on the host from now on. What the states were is forgotten: they are about to be
        loaded."""
        assert self.split is not None
        self.store.close()
        self.split.share, self.store = host_share, self.split.make_store()
        self._lay_out()

    def device_of(self, chunk: Chunk) -> torch.device:
        """Where ``chunk`` is updated."""
        return _CPU if chunk.id in self.on_host else self.update_device

    def regroup(self, groups: Mapping[int, GroupShard]) -> None:
        """Take the same chunks for those of other groups from now on: what they keep stays. Of what the optimizer keeps
        in its param_groups a new group has what its lowest chunk's group had."""
        extras_of = {c.id: self.extras[index] for index, group in self.groups.items() for c in group.chunks}
        assert extras_of.keys() == {chunk.id for group in groups.values() for chunk in group.chunks}
        self.groups = dict(groups)
        self.extras = {index: dict(extras_of[group.chunks[0].id]) for index, group in groups.items()}

    def check_room(self, machine: Machine, beside: int) -> None:
        """See that host memory (or the disk) has room for all states, for what the groups of today may hold of them,
        and for ``beside`` bytes more.

        Raises:
            StateStoreError: it has not.
        """
        self._say_what_may_be_held()
        self.store.check_room(machine, beside)

    def held_bytes(self, group: GroupShard) -> int:
        """Bytes of the second copies of a group's states in host memory, if updates may be taken back."""
        store = self.store_of(group)
        if not self._may_hold or isinstance(store, DiskStateStore):
            return 0
        assert isinstance(store, EncodedStateStore | SplitStateStore)
        return sum(store.num_bytes(chunk.id) for chunk in group.chunks)

    def store_of(self, group: GroupShard) -> StateStore:
        """The store that keeps the states of ``group``."""
        return self.always_store if group.index == ALWAYS else self.store

    # -- layout -----------------------------------------------------------------------------------------------

    def _reserve(self) -> None:
        """Lay out every chunk's states and reserve their buffers now, not in the middle of a backward."""
        self._elementwise = elementwise = (
            {} if self.parameters.whole_tensors else self.piecewise.elementwise_keys(self.update_device)
        )
        for group in self.groups.values():
            store = self.store_of(group)
            for chunk in group.chunks:
                self.records[chunk.id] = [PieceRecord(None) for _ in chunk.pieces]
                for shared in by_part(group, chunk):
                    self._lay_out_masters(group, chunk, shared)
                    for key, dtype in elementwise.items():
                        numel = sum(chunk.pieces[i].numel for i in shared)
                        store.ensure(chunk.id, shared_key(group, chunk, shared, key), numel, dtype)
        self.store = self.store.start()
        self.always_store = self.always_store.start()

    def _lay_out_masters(self, group: GroupShard, chunk: Chunk, shared: list[int]) -> None:
        """Lay out the masters of the pieces at positions ``shared`` in one buffer, and reserve it."""
        key, offset, mastered = shared_key(group, chunk, shared, MASTER), 0, []
        for i in shared:
            piece = chunk.pieces[i]
            if self._needs_master(group.members[piece.member].param, chunk):
                self.records[chunk.id][i].master = StateView(key, offset, piece.shape)
                offset += piece.numel
                mastered.append(piece)
        if mastered:
            weights = self._weights_of_masters(group, mastered)
            self.store_of(group).ensure(chunk.id, key, offset, torch.float32, weights)

    def _needs_master(self, param: nn.Parameter, chunk: Chunk) -> bool:
        elsewhere = param.device.type != self.device_of(chunk).type  # step_on host: mirror fp32 weights too
        return self.precision.has_master(param.dtype) or (elsewhere and param.dtype == torch.float32)

    def _weights_of_masters(self, group: GroupShard, mastered: list[Piece]) -> Weights | None:
        """A function that gives the weights of the masters, for stores that keep of a master only what its bf16 weight
        lacks."""
        in_bf16 = all(group.members[piece.member].param.dtype == torch.bfloat16 for piece in mastered)
        if not (in_bf16 and self.parameters.weights_are_always_here):
            return None
        return lambda: [self.parameters.weight(group, piece).reshape(-1) for piece in mastered]

    def pieces_of(self, chunk: Chunk) -> Iterable[tuple[Piece, PieceRecord]]:
        """The pieces of ``chunk``, each with its record."""
        return zip(chunk.pieces, self.records[chunk.id], strict=True)

    def new_view(self, group: GroupShard, chunk: Chunk, i: int, key: str, like: Tensor) -> StateView:
        """Room for a state of piece ``i`` with the shape and dtype of ``like``: in the buffer that all pieces share,
        if it has an entry per weight; else in one of its own."""
        piece = chunk.pieces[i]
        if not self.parameters.whole_tensors and like.shape == piece.shape:
            shared = next(together for together in by_part(group, chunk) if i in together)
            offset = sum(chunk.pieces[j].numel for j in shared if j < i)
            return StateView(shared_key(group, chunk, shared, key), offset, piece.shape, like.dtype)
        own_key = f"{key}:{group.members[piece.member].name}"
        self.store_of(group).ensure(chunk.id, own_key, like.numel(), like.dtype)
        return StateView(own_key, 0, tuple(like.shape), like.dtype)

    def num_bytes(self) -> int:
        """Bytes of this rank's masters and states in a checkpoint, once all are filled. States to which an optimizer
        gives a shape of its own (Adafactor's rows and columns) are known after the first visits only, and counted then.
        """
        total = 0
        for _, piece, record in self.pieces():
            total += 4 * piece.numel if record.master is not None else 0
            total += sum(dtype.itemsize for dtype in self._elementwise.values()) * piece.numel
            shaped = [view for key, view in record.slots.items() if key not in self._elementwise]
            total += sum(view.dtype.itemsize * math.prod(view.shape) for view in shaped)
        return total

    def arithmetic(self, in_backward: bool = False) -> StateArithmetic:
        """What a step of a rotating group moves, on average over a cycle. The store's link is measured for it, once.

        Args:
            in_backward: updates are made in backward, which gives slots back before it has ended: what comes late then
                depends on its speed.
        """
        store = self.store
        assert isinstance(store, EncodedStateStore | SplitStateStore)
        rotating = [group for index, group in self.groups.items() if index != ALWAYS]
        moved = [[store.num_bytes(chunk.id) for chunk in group.chunks] for group in rotating]
        late = [] if in_backward else [sum(sizes[store.num_slots :]) for sizes in moved]
        return StateArithmetic(
            place=store.place,
            total_bytes=store.total_bytes(),
            step_bytes=sum(map(sum, moved)) / len(rotating),
            link=store.link,
            slots=store.num_slots,
            late_bytes=sum(late) / len(rotating),
        )

    # -- weights that are changed by hand ---------------------------------------------------------------------

    def begin_writing(self, params: Iterable[nn.Parameter]) -> None:
        """See which of ``params`` others have written, before an update does."""
        for param in params:
            if self.may_be_changed(param):
                self._changed.add(param)
            self._written.add(param)

    def end_writing(self) -> None:
        """The updates since the last call are over: the weights that they wrote are what their masters say."""
        self._versions.update({param: self.parameters.version(param) for param in self._written})
        self._changed -= self._written
        self._written.clear()

    def may_be_changed(self, param: nn.Parameter) -> bool:
        """Whether others may have written ``param`` since its last update."""
        return self.parameters.version(param) != self._versions[param]

    def take_over(self, group: GroupShard, run: Piece, master: Tensor) -> None:
        """Change the ``master`` of ``run`` where the weight is not its rounding: others have written that (a clamp,
        ``load_state_dict``, ``max_norm`` of an embedding), and an update would undo it."""
        if group.members[run.member].param in self._changed:
            weight = self.parameters.weight(group, run).to(master.device)
            master.copy_(torch.where(master.to(weight.dtype) == weight, master, weight))

    # -- in a step --------------------------------------------------------------------------------------------

    def fetch(self, group: GroupShard, position: int, then: Sequence[GroupShard] = ()) -> Mapping[str, Tensor]:
        """Bring the states of the group's chunk at ``position`` to the update device, and the next chunks' on their
        way.

        Args:
            then: what is updated after this group, in that order.

        Returns:
            The chunk's buffers by key, flat. On the first visit the masters are made from the weights.
        """
        # First, so that the last chunk leaves and the next ones arrive while this one is updated.
        self.prefetch(group, position, then)
        return self.bring(group, group.chunks[position])

    def bring(self, group: GroupShard, chunk: Chunk) -> Mapping[str, Tensor]:
        """Do what :meth:`fetch` does for ``chunk``, and set nothing else on its way."""
        tensors = self.store_of(group).fetch(chunk.id)
        if chunk.id not in self.masters_filled:
            for piece, record in self.pieces_of(chunk):
                if record.master is not None:
                    record.master.view(tensors).copy_(self.parameters.weight(group, piece))
            self.masters_filled.add(chunk.id)
        return tensors

    def keep(self, group: GroupShard, chunk: Chunk, i: int, run: Piece, state: PieceState) -> None:
        """Take over what a step left in ``state`` for ``run``, a part of piece ``i``: tensors that it replaced or
        created go into the chunk's buffers, scalars stay as they are."""
        record, piece, store = self.records[chunk.id][i], chunk.pieces[i], self.store_of(group)
        for key, value in state.items():
            if not isinstance(value, Tensor) or value.dim() == 0:
                record.scalars[key] = value
                continue
            if key not in record.slots:
                # ``new_view`` looks at shape and dtype alone: of the whole piece's state, which needs no memory here.
                like = value if run is piece else value[:1].expand(piece.shape)
                record.slots[key] = self.new_view(group, chunk, i, key, like)
            view = part_of(record.slots[key].view(store.fetch(chunk.id)), piece, run)
            if view.data_ptr() != value.data_ptr():
                view.copy_(value)

    def evict(self, group: GroupShard, position: int, version: int) -> None:
        """Send the states of the group's chunk at ``position`` back to where they rest.

        Args:
            version: a number that changes from update to update.
        """
        self.store_of(group).evict(group.chunks[position].id, version)

    def prefetch(self, group: GroupShard, position: int = 0, then: Sequence[GroupShard] = ()) -> None:
        """Start the first states of the group on their way: it will be updated next, from its chunk at ``position`` on,
        and after it ``then``."""
        store = self.store_of(group)
        chunks = [
            *group.chunks[position:],
            *(c for part in then if self.store_of(part) is store for c in part.chunks),
        ]
        store.prefetch(*(chunk.id for chunk in chunks))

    # -- updates that may be taken back -----------------------------------------------------------------------

    def hold(self, group: GroupShard) -> None:
        """Keep the states of ``group``, here and in the store, until ``release`` or ``take_back``. Called before an
        update that may be taken back."""
        for chunk in group.chunks:
            self.store_of(group).hold(chunk.id)
            records = [PieceRecord(r.master, dict(r.slots), copied(r.scalars)) for r in self.records[chunk.id]]
            self._held[chunk.id] = HeldRecords(records, chunk.id in self.masters_filled)

    def release(self, group: GroupShard) -> None:
        """Let the update stand: what ``hold`` kept goes, where it was called."""
        for chunk in group.chunks:
            if self._held.pop(chunk.id, None) is not None:
                self.store_of(group).release(chunk.id)

    def take_back(self, group: GroupShard) -> None:
        """Give the group's states the values that they had at ``hold``. Its weights are the caller's."""
        for chunk in group.chunks:
            self.store_of(group).take_back(chunk.id)
            held = self._held.pop(chunk.id)
            self.records[chunk.id] = held.records
            if not held.has_masters:
                self.masters_filled.discard(chunk.id)

    def tells_weight(self, chunk: Chunk, i: int) -> bool:
        """Whether the states of the chunk's piece ``i`` say by themselves what its weight is, so that an update which
        begins from them needs no other copy of it."""
        master = self.records[chunk.id][i].master
        return master is not None and chunk.id in self.masters_filled and not self.store.reads_weights

    # -- out --------------------------------------------------------------------------------------------------

    def tensors_of(self, group: GroupShard, chunk: Chunk) -> list[StateTensor]:
        """This rank's masters and states of ``chunk`` that hold values."""
        found = []
        for piece, record in self.pieces_of(chunk):
            name = group.members[piece.member].name
            if record.master is not None and chunk.id in self.masters_filled:
                found.append(StateTensor(name, MASTER, piece, record.master, flat=True))
            for key, view in record.slots.items():
                found.append(StateTensor(name, key, piece, view, flat=view.shape == piece.shape))
        return found

    def read(self, group: GroupShard, chunk: Chunk, tensors: Iterable[StateTensor]) -> Iterator[Tensor]:
        """The current values of ``tensors``, one at a time, flat if they are. The store is synchronized."""
        buffers = self.store_of(group).read(chunk.id)
        for tensor in tensors:
            yield tensor.view(buffers)

    def pieces(self) -> Iterator[tuple[str, Piece, PieceRecord]]:
        """(parameter name, piece, its record) of everything that this rank updates."""
        for group in self.groups.values():
            for chunk in group.chunks:
                for piece, record in self.pieces_of(chunk):
                    yield group.members[piece.member].name, piece, record

    def close(self) -> None:
        """Give back the states' memory and files, and what moves them."""
        self.store.close()
        self.always_store.close()
