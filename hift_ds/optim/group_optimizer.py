"""The optimizer of a HiFT run: one layer group per step, everything else parked.

Hops from the training loop to the arithmetic: ``HiFTEngine.step`` -> ``GroupOptimizer.step`` ->
``PiecewiseOptimizer.step`` -> the ``torch.optim`` class.

On N ranks each rank owns 1/N of every master and state: gradients of the active group are reduce-scattered,
each rank updates its pieces, the new weights are gathered (ZeRO, arXiv 1910.02054, over one group at a time).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hift_ds.lr import CycleLR
from hift_ds.optim.clip import agree_on_norm, grad_factor
from hift_ds.optim.host_step import HostStep
from hift_ds.optim.parameters import Chunk, GroupShard, Piece, ReplicatedParameters
from hift_ds.optim.piecewise import PieceState, PieceUpdate, PiecewiseOptimizer
from hift_ds.optim.trainable_flags import TrainableFlags
from hift_ds.precision import LossScaler, PrecisionPolicy, write_weight_
from hift_ds.schedule import GroupSchedule
from hift_ds.store.base import MASTER, StateStore, Weights

ALWAYS = -1  # index of the group that is trained in every turn
RUN_NUMEL = 1 << 24  # elements stepped at once: 64 MiB in fp32


@dataclass(frozen=True)
class StateView:
    """Where one state tensor of one piece is: elements [offset, offset + numel) of the store's ``key``."""

    key: str
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    def view(self, tensors: Mapping[str, Tensor]) -> Tensor:
        numel = 1
        for length in self.shape:
            numel *= length
        return tensors[self.key][self.offset : self.offset + numel].view(self.shape)


@dataclass
class PieceRecord:
    """What is known of a piece's state between its turns."""

    master: StateView | None
    slots: dict[str, StateView] = field(default_factory=dict)  # state tensors, by the optimizer's key
    scalars: PieceState = field(default_factory=dict)  # "step" and the like: tiny, they stay where they are


class GroupOptimizer:
    """Updates the active layer group.

    Args:
        base: any optimizer over the model's parameters.
        parameters: how gradients and weights travel.
        flags: ``requires_grad`` of the model.
        groups: by group index, and ``ALWAYS`` if some parameters are trained in every turn.
        schedule: which group is active; advanced by each applied step.
        store: states of the rotating groups.
        always_store: states of the always-active group; they never leave the update device.
        update_device: where the arithmetic runs.
        max_grad_norm: 0 for no clipping.
        seed: of stochastic rounding.
        pin_memory: page-lock what gradients and weights travel through when the host updates.
    """

    def __init__(
        self,
        base: torch.optim.Optimizer,
        parameters: ReplicatedParameters,
        flags: TrainableFlags,
        groups: Mapping[int, GroupShard],
        schedule: GroupSchedule,
        store: StateStore,
        always_store: StateStore,
        lr: CycleLR,
        precision: PrecisionPolicy,
        scaler: LossScaler,
        update_device: torch.device,
        max_grad_norm: float = 0.0,
        seed: int = 0,
        pin_memory: bool = True,
    ) -> None:
        self.optimizer = base  # DeepSpeed's name for the wrapped optimizer; its schedulers look for it
        self.parameters = parameters
        self.flags = flags
        self.groups = dict(groups)
        self.schedule = schedule
        self.store = store
        self.always_store = always_store
        self.lr = lr
        self.precision = precision
        self.scaler = scaler
        self.update_device = update_device
        self.max_grad_norm = max_grad_norm
        self.seed = seed

        self.piecewise = PiecewiseOptimizer(base)
        self.records: dict[int, list[PieceRecord]] = {}  # by chunk id, per piece
        self.extras: dict[int, dict[int, dict[str, Any]]] = {index: {} for index in self.groups}
        self.num_updates: dict[int, list[int]] = {
            index: [0] * len(group.members) for index, group in self.groups.items()
        }
        self.masters_filled: set[int] = set()  # chunks whose masters hold values
        self.num_applied = 0  # applied optimizer steps
        self.overflow = False  # the last step was skipped
        self.grad_norm = 0.0
        self._reduced: dict[int, tuple[list[Tensor | None], list[bool]]] = {}
        self._reserve_states()
        self.host_step = self._build_host_step(pin_memory)

    # -- what DeepSpeed and schedulers read -------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @property
    def active_groups(self) -> list[GroupShard]:
        return [self.groups[index] for index in (ALWAYS, self.schedule.active) if index in self.groups]

    def store_of(self, index: int) -> StateStore:
        return self.always_store if index == ALWAYS else self.store

    # -- one step ---------------------------------------------------------------------------------------------

    def activate(self) -> None:
        """Let gradients flow to the active groups and to no other, so that backward stops at the lowest of them."""
        self.flags.take(member.param for group in self.active_groups for member in group.members)

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """At the accumulation boundary: average the active groups' gradients over ranks, once."""
        for group in self.active_groups:
            self._reduced[group.index] = self.parameters.reduce(group)

    @torch.no_grad()
    def step(self) -> bool:
        """Update the active groups. Returns False if the step was skipped because of an overflow.

        1. agree on the global norm;  2. skip if it is not finite under a loss scale;  3. latch the learning rate;
        4. update this rank's pieces, bringing their states in and sending them back;  5. publish the weights;
        6. rotate.
        """
        reduced = self._take_reduced()
        self.flags.end_step()
        norm, reached = agree_on_norm(
            self.parameters.ranks,
            [grad for grads, _ in reduced for grad in grads],
            [present for _, present in reduced],
            self._weight_device(),
        )
        norm = norm / self.scaler.scale
        self.grad_norm = float(norm)
        self.overflow = self.scaler.overflowed(self.grad_norm)
        factor = grad_factor(norm, self.max_grad_norm, self.scaler.scale)
        self.scaler.update(self.overflow)
        if self.overflow:
            return False

        rates = self.lr.before_step(
            self.schedule.starts_cycle, self.schedule.cursor.cycle, self.schedule.steps_per_cycle
        )
        for group, (grads, _), flags in zip(self.active_groups, reduced, reached, strict=True):
            counts = self.num_updates[group.index]
            self.num_updates[group.index] = [n + flag for n, flag in zip(counts, flags, strict=True)]
            shards = [grad if flag else None for grad, flag in zip(grads, flags, strict=True)]
            self.parameters.begin_update(group)
            self._update(group, shards, factor, rates)
            self.parameters.publish(group)
        self.num_applied += 1
        self.schedule.advance()
        self.store.prefetch(self.groups[self.schedule.active].chunks[0].id)
        return True

    def _take_reduced(self) -> list[tuple[list[Tensor | None], list[bool]]]:
        # ``step()`` without a backward: nothing to do, but every rank does the same nothing.
        if not self._reduced:
            self.reduce_gradients()
        reduced, self._reduced = self._reduced, {}
        return [reduced[group.index] for group in self.active_groups]

    def _weight_device(self) -> torch.device:
        return self.active_groups[0].members[0].param.device

    def _update(
        self, group: GroupShard, shards: list[Tensor | None], factor: Tensor | None, rates: list[float]
    ) -> None:
        """Chunk by chunk: states in, step, weights out, states back."""
        store = self.store_of(group.index)
        generator = self._rounding_generator()
        extras = after = self.extras[group.index]
        for position, chunk in enumerate(group.chunks):
            tensors = store.fetch(chunk.id)
            if position + 1 < len(group.chunks):
                store.prefetch(group.chunks[position + 1].id)
            if chunk.id not in self.masters_filled:
                self._fill_masters(group, chunk, tensors)
            for i, piece in enumerate(chunk.pieces):
                if (shard := shards[piece.member]) is None:
                    continue
                record = self.records[chunk.id][i]
                before = replace(record, slots=dict(record.slots), scalars=dict(record.scalars))
                for run in self._runs(piece):
                    update = self._run_update(group, piece, run, before, shard, factor, tensors)
                    after = {**after, **self.piecewise.step([update], rates, extras)}
                    self._keep_state(group, chunk, i, run, update)
                    weight = self.parameters.weight(group, run)
                    if update.target.data_ptr() != weight.data_ptr():
                        self._write_weight(weight, update.target, generator)
            store.evict(chunk.id, self.num_applied)
        if self.host_step is not None:
            self.host_step.finish()
        self.extras[group.index] = after

    def _write_weight(self, weight: Tensor, value: Tensor, generator: torch.Generator | None) -> None:
        if self.host_step is not None and weight.device != self.update_device:
            self.host_step.send_weight(weight, value, generator)
        else:
            write_weight_(weight, value, generator)

    def _runs(self, piece: Piece) -> list[Piece]:
        """The piece in parts that are stepped one after the other, so that beside the chunk's buffers only one part's
        fp32 gradient and new states exist. Elementwise optimizers cannot tell; others get the whole tensor."""
        if self.parameters.whole_tensors or piece.numel <= RUN_NUMEL:
            return [piece]
        starts = range(piece.start, piece.start + piece.numel, RUN_NUMEL)
        lengths = [min(RUN_NUMEL, piece.start + piece.numel - start) for start in starts]
        return [
            Piece(piece.member, start, length, (length,))
            for start, length in zip(starts, lengths, strict=True)
        ]

    def _run_update(
        self,
        group: GroupShard,
        piece: Piece,
        run: Piece,
        before: PieceRecord,
        shard: Tensor,
        factor: Tensor | None,
        tensors: Mapping[str, Tensor],
    ) -> PieceUpdate:
        """What the optimizer is given of ``run``, a part of ``piece`` whose record was ``before`` its first run."""
        if before.master is not None:
            target = _part(before.master.view(tensors), piece, run)
        else:  # an fp32 weight is its own master; a bf16 one without masters is fp32 only while it is updated
            target = self.parameters.weight(group, run).to(self.update_device, torch.float32)
        grad = self.parameters.grad(group, run, shard)
        if self.host_step is not None and grad.device != self.update_device:
            grad = self.host_step.gradient(grad)
        grad = grad.to(self.update_device, torch.float32)
        if factor is not None:
            grad.mul_(factor.to(grad.device))
        state = None
        if before.slots or before.scalars:
            state = {key: _part(slot.view(tensors), piece, run) for key, slot in before.slots.items()}
            # Each run counts its own step.
            state |= before.scalars if run is piece else _copied(before.scalars)
        return PieceUpdate(target, grad, group.members[piece.member].param_group, state)

    def _keep_state(self, group: GroupShard, chunk: Chunk, i: int, run: Piece, update: PieceUpdate) -> None:
        """Tensors that the step replaced or created go into the chunk's buffers; scalars stay as they are."""
        record, piece, store = self.records[chunk.id][i], chunk.pieces[i], self.store_of(group.index)
        assert update.state is not None
        for key, value in update.state.items():
            if not isinstance(value, Tensor) or value.dim() == 0:
                record.scalars[key] = value
                continue
            if key not in record.slots:
                # The shape is all that is asked for.
                whole = value if run is piece else value[:1].expand(piece.shape)
                record.slots[key] = self.new_view(group, chunk, i, key, whole)
            view = _part(record.slots[key].view(store.fetch(chunk.id)), piece, run)
            if view.data_ptr() != value.data_ptr():
                view.copy_(value)
        update.state = None

    # -- state layout -----------------------------------------------------------------------------------------

    def _reserve_states(self) -> None:
        """Lay out every chunk's states and reserve their buffers now, not in the middle of a backward."""
        elementwise = (
            {} if self.parameters.whole_tensors else self.piecewise.elementwise_keys(self.update_device)
        )
        for group in self.groups.values():
            store = self.store_of(group.index)
            for chunk in group.chunks:
                offset = 0
                records = []
                for piece in chunk.pieces:
                    needs_master = self._needs_master(group.members[piece.member].param)
                    records.append(
                        PieceRecord(StateView(MASTER, offset, piece.shape) if needs_master else None)
                    )
                    offset += piece.numel if needs_master else 0
                self.records[chunk.id] = records
                if offset:
                    store.ensure(
                        chunk.id, MASTER, offset, torch.float32, self._weights_of_masters(group, chunk)
                    )
                for key, dtype in elementwise.items():
                    store.ensure(chunk.id, key, sum(piece.numel for piece in chunk.pieces), dtype)
        self.store = self.store.start()
        self.always_store = self.always_store.start()

    def _build_host_step(self, pin_memory: bool) -> HostStep | None:
        """If updates run on the host and weights are elsewhere."""
        devices = {member.param.device for group in self.groups.values() for member in group.members}
        elsewhere = [device for device in devices if device.type != self.update_device.type]
        if self.update_device.type != "cpu" or not elsewhere:
            return None
        return HostStep(self.store.traffic, elsewhere[0], pin_memory)

    def _weights_of_masters(self, group: GroupShard, chunk: Chunk) -> Weights | None:
        """For stores that keep of a master only what its bf16 weight lacks."""
        mastered = [
            piece
            for piece, record in zip(chunk.pieces, self.records[chunk.id], strict=True)
            if record.master is not None
        ]
        in_bf16 = all(group.members[piece.member].param.dtype == torch.bfloat16 for piece in mastered)
        if not (in_bf16 and self.parameters.weights_are_always_here):
            return None
        return lambda: [self.parameters.weight(group, piece).reshape(-1) for piece in mastered]

    def _needs_master(self, param: torch.nn.Parameter) -> bool:
        elsewhere = param.device.type != self.update_device.type  # step_on host: mirror fp32 weights too
        return self.precision.has_master(param.dtype) or (elsewhere and param.dtype == torch.float32)

    def new_view(self, group: GroupShard, chunk: Chunk, i: int, key: str, value: Tensor) -> StateView:
        """One flat buffer per key for states with an entry per weight, one per parameter and key for other shapes."""
        piece = chunk.pieces[i]
        if not self.parameters.whole_tensors and value.shape == piece.shape:
            return StateView(key, sum(p.numel for p in chunk.pieces[:i]), piece.shape, value.dtype)
        store_key = f"{key}:{group.members[piece.member].name}"
        self.store_of(group.index).ensure(chunk.id, store_key, value.numel(), value.dtype)
        return StateView(store_key, 0, tuple(value.shape), value.dtype)

    def _fill_masters(self, group: GroupShard, chunk: Chunk, tensors: Mapping[str, Tensor]) -> None:
        """First visit: masters are the weights, unless ``set_masters`` gave the bits that a cast would lose."""
        for piece, record in zip(chunk.pieces, self.records[chunk.id], strict=True):
            if record.master is not None:
                record.master.view(tensors).copy_(self.parameters.weight(group, piece))
        self.masters_filled.add(chunk.id)

    @torch.no_grad()
    def set_masters(self, whole: Callable[[str, int, int], Tensor | None]) -> None:
        """Masters from fp32 values that the weights themselves no longer have.

        Args:
            whole: (parameter name, start, numel) -> those elements, flat, or ``None`` to take the weight's.
        """
        for group in self.groups.values():
            self.parameters.begin_update(group)
            for chunk in group.chunks:
                for piece, record in zip(chunk.pieces, self.records[chunk.id], strict=True):
                    if record.master is None:
                        continue
                    values = whole(group.members[piece.member].name, piece.start, piece.numel)
                    if values is None:
                        values = self.parameters.weight(group, piece)
                    self.store_of(group.index).write(
                        chunk.id, MASTER, values.reshape(-1).float(), record.master.offset
                    )
                self.masters_filled.add(chunk.id)
            self.parameters.abandon_update(group)

    def _rounding_generator(self) -> torch.Generator | None:
        """Seeded by (seed, step, rank) alone, so that a resumed run rounds alike."""
        if not self.precision.stochastic_rounding:
            return None
        generator = torch.Generator(device=self.update_device)
        generator.manual_seed(
            ((self.seed * 1_000_003 + self.num_applied) * 65_537 + self.parameters.ranks.rank) % (1 << 63)
        )
        return generator

    # -- bookkeeping ------------------------------------------------------------------------------------------

    def coverage(self) -> dict[str, int]:
        """How often each parameter was updated, by name."""
        return {
            member.name: count
            for index, group in self.groups.items()
            for member, count in zip(group.members, self.num_updates[index], strict=True)
        }

    @property
    def is_mid_step(self) -> bool:
        """Gradients were reduced and their update has not been made."""
        return bool(self._reduced)

    def drop_gradients(self) -> None:
        """Reduced or not: another state is about to be loaded."""
        self._reduced.clear()
        self.zero_grad()
        self.flags.end_step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.parameters.drop_grads(self.groups.values())

    def end_training(self, keep_states: bool = False) -> None:
        """Gradients, hooks on weights, states and what moves them: gone."""
        if self.flags.step_began:  # else they may be another engine's by now
            self.drop_gradients()
        self.flags.show()
        self.parameters.end_training()
        if not keep_states:
            self.store.close()
            self.always_store.close()
        if self.host_step is not None:
            self.host_step.close()

    def close(self) -> None:
        """After ``end_training``: let go of the weights too."""
        self.parameters.close()


def _copied(scalars: PieceState) -> PieceState:
    return {
        key: value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)
        for key, value in scalars.items()
    }


def _part(whole: Tensor, piece: Piece, run: Piece) -> Tensor:
    """The elements of ``run``, a part of ``piece``, in a tensor that has the piece's."""
    return whole if run is piece else whole[run.start - piece.start :][: run.numel]
