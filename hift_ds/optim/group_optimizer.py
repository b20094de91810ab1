"""The optimizer of a HiFT run: one layer group per step, everything else parked.

Hops from the training loop to the arithmetic: ``HiFTEngine.step`` -> ``GroupOptimizer.step`` ->
``PiecewiseOptimizer.step`` -> the ``torch.optim`` class.

On N ranks each rank owns 1/N of every master and state: gradients of the active group are reduce-scattered,
each rank updates its pieces, the new weights are gathered (ZeRO, arXiv 1910.02054, over one group at a time).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hift_ds.lr import CycleLR
from hift_ds.optim.clip import agree_on_norm, clip_
from hift_ds.optim.parameters import Piece, ReplicatedParameters, Unit
from hift_ds.optim.piecewise import PieceState, PieceUpdate, PiecewiseOptimizer
from hift_ds.precision import LossScaler, PrecisionPolicy, write_weight_
from hift_ds.schedule import GroupSchedule
from hift_ds.store.base import StateStore

ALWAYS = -1  # index of the unit that is trained in every turn
MASTER = "master"


@dataclass(frozen=True)
class Slot:
    """Where one state tensor of one piece is: elements [offset, offset + numel) of the store's ``key``."""

    key: str
    offset: int
    shape: tuple[int, ...]

    def view(self, tensors: Mapping[str, Tensor]) -> Tensor:
        numel = 1
        for length in self.shape:
            numel *= length
        return tensors[self.key][self.offset : self.offset + numel].view(self.shape)


@dataclass
class PieceRecord:
    """What is known of a piece's state between its turns."""

    master: Slot | None
    slots: dict[str, Slot] = field(default_factory=dict)  # state tensors, by the optimizer's key
    scalars: PieceState = field(default_factory=dict)  # "step" and the like: tiny, they stay where they are
    num_updates: int = 0


class GroupOptimizer:
    """Updates the active layer group.

    Args:
        base: any optimizer over the model's parameters.
        parameters: how gradients and weights travel.
        units: by group index, and ``ALWAYS`` if some parameters are trained in every turn.
        schedule: which group is active; advanced by each applied step.
        store: states of the rotating groups.
        always_store: states of the always-active unit; they never leave the update device.
        update_device: where the arithmetic runs.
        max_grad_norm: 0 for no clipping.
        seed: of stochastic rounding.
    """

    def __init__(
        self,
        base: torch.optim.Optimizer,
        parameters: ReplicatedParameters,
        units: Mapping[int, Unit],
        schedule: GroupSchedule,
        store: StateStore,
        always_store: StateStore,
        lr: CycleLR,
        precision: PrecisionPolicy,
        scaler: LossScaler,
        update_device: torch.device,
        max_grad_norm: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.optimizer = base  # DeepSpeed's name for the wrapped optimizer; its schedulers look for it
        self.parameters = parameters
        self.units = dict(units)
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
        self.records: dict[int, list[PieceRecord]] = {}
        self.extras: dict[int, dict[int, dict[str, Any]]] = {index: {} for index in self.units}
        self.masters_filled: set[int] = set()  # units whose masters hold values
        self.num_applied = 0  # applied optimizer steps
        self.overflow = False  # the last step was skipped
        self.grad_norm = 0.0
        self._reduced: dict[int, tuple[list[Tensor | None], list[bool]]] = {}
        self._active: tuple[int, ...] = ()
        self._reserve_states()
        self.activate()

    # -- what DeepSpeed and schedulers read -------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @property
    def active_units(self) -> list[Unit]:
        return [self.units[index] for index in self._active]

    def store_of(self, index: int) -> StateStore:
        return self.always_store if index == ALWAYS else self.store

    # -- one step ---------------------------------------------------------------------------------------------

    def activate(self) -> None:
        """Let gradients flow to the active units and to no other, so that backward stops at the lowest of them."""
        active = tuple(i for i in (ALWAYS, self.schedule.active) if i in self.units)
        for index in set(self._active) | (set(self.units) if not self._active else set()):
            if index not in active:
                for piece in self.units[index].pieces:
                    piece.param.requires_grad_(False)
        for index in active:
            for piece in self.units[index].pieces:
                piece.param.requires_grad_(True)
        self._active = active

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """At the accumulation boundary: average the active units' gradients over ranks, once."""
        for unit in self.active_units:
            self._reduced[unit.index] = self.parameters.reduce(unit)

    @torch.no_grad()
    def step(self) -> bool:
        """Update the active units. Returns False if the step was skipped because of an overflow.

        1. unscale, and agree on the global norm;  2. skip if it is not finite under a loss scale;  3. clip;
        4. update this rank's pieces, bringing their states in and sending them back;  5. publish the weights;
        6. rotate.
        """
        grads, present = self._unscaled()
        flat_grads = [grad for unit_grads in grads.values() for grad in unit_grads]
        norm, anywhere = agree_on_norm(
            self.parameters.ranks, flat_grads, [p for unit_present in present.values() for p in unit_present], self._norm_device()
        )
        self.grad_norm = float(norm)
        self.overflow = self.scaler.overflowed(self.grad_norm)
        self.scaler.update(self.overflow)
        if self.overflow:
            return False

        if self.max_grad_norm > 0:
            clip_(flat_grads, norm, self.max_grad_norm)
        rates = self.lr.before_step(self.schedule.starts_cycle, self.schedule.cursor.cycle, self.schedule.steps_per_cycle)
        reached = iter(anywhere)
        for unit in self.active_units:
            self._update(unit, grads[unit.index], [next(reached) for _ in unit.pieces], rates)
            self.parameters.publish(unit)
        self.num_applied += 1
        self.schedule.advance()
        self.activate()
        self.store.prefetch(self.schedule.active)
        return True

    def _unscaled(self) -> tuple[dict[int, list[Tensor | None]], dict[int, list[bool]]]:
        if not self._reduced:  # step() without a backward: nothing to do, but every rank does the same nothing
            self.reduce_gradients()
        reduced, self._reduced = self._reduced, {}
        if self.scaler.scale != 1.0:
            for grads, _ in reduced.values():
                for grad in grads:
                    if grad is not None:
                        grad.mul_(1.0 / self.scaler.scale)
        return {i: g for i, (g, _) in reduced.items()}, {i: p for i, (_, p) in reduced.items()}

    def _norm_device(self) -> torch.device:
        return self.active_units[0].pieces[0].param.device

    def _update(self, unit: Unit, grads: list[Tensor | None], reached: list[bool], rates: list[float]) -> None:
        store = self.store_of(unit.index)
        tensors = store.fetch(unit.index)
        if unit.index not in self.masters_filled:
            self._fill_masters(unit, tensors)
        updates: dict[int, PieceUpdate] = {}
        for i, (piece, grad) in enumerate(zip(unit.pieces, grads, strict=True)):
            if reached[i]:
                self.records[unit.index][i].num_updates += 1
                if piece.numel and grad is not None:
                    updates[i] = self._piece_update(piece, self.records[unit.index][i], grad, tensors)
        self._step_pieces(unit, updates, rates)
        generator = self._rounding_generator()
        for i, update in updates.items():
            weight = self.parameters.weight(unit.pieces[i])
            if update.target.data_ptr() != weight.data_ptr():
                write_weight_(weight, update.target.to(weight.device, non_blocking=True), generator)
        store.evict(unit.index)

    def _piece_update(self, piece: Piece, record: PieceRecord, grad: Tensor, tensors: Mapping[str, Tensor]) -> PieceUpdate:
        if record.master is not None:
            target = record.master.view(tensors)
        else:  # an fp32 weight is its own master; a bf16 one without masters is fp32 only while it is updated
            target = self.parameters.weight(piece).to(self.update_device, torch.float32)
        state = None
        if record.slots or record.scalars:
            state = {key: slot.view(tensors) for key, slot in record.slots.items()} | record.scalars
        return PieceUpdate(target, grad.to(self.update_device), piece.param_group, state)

    def _step_pieces(self, unit: Unit, updates: dict[int, PieceUpdate], rates: list[float]) -> None:
        """Known pieces in one call; those without a state yet one by one, so that at most one new state exists
        beside the unit's buffers."""
        extras = self.extras[unit.index]
        known = [update for update in updates.values() if update.state is not None]
        fresh = [i for i, update in updates.items() if update.state is None]
        after = extras
        if known:
            after = self.piecewise.step(known, rates, extras)
        for i in fresh:
            after = self.piecewise.step([updates[i]], rates, extras)
        self.extras[unit.index] = {**extras, **after}
        for i, update in updates.items():
            self._keep_state(unit, i, update)

    def _keep_state(self, unit: Unit, i: int, update: PieceUpdate) -> None:
        """Tensors that the step replaced or created go into the unit's buffers; scalars stay as they are."""
        record, store = self.records[unit.index][i], self.store_of(unit.index)
        assert update.state is not None
        for key, value in update.state.items():
            if not isinstance(value, Tensor) or value.dim() == 0:
                record.scalars[key] = value
                continue
            if key not in record.slots:
                record.slots[key] = self._slot(unit, i, key, value)
            view = record.slots[key].view(store.fetch(unit.index))
            if view.data_ptr() != value.data_ptr():
                view.copy_(value)
        update.state = None

    # -- state layout -----------------------------------------------------------------------------------------

    def _reserve_states(self) -> None:
        """Lay out every unit's states and reserve their buffers now, not in the middle of a backward."""
        elementwise = {} if self.parameters.whole_tensors else self.piecewise.elementwise_keys(self.update_device)
        for unit in self.units.values():
            store = self.store_of(unit.index)
            offset = 0
            records = []
            for piece in unit.pieces:
                needs_master = piece.numel > 0 and self._needs_master(piece)
                records.append(PieceRecord(Slot(MASTER, offset, piece.shape) if needs_master else None))
                offset += piece.numel if needs_master else 0
            self.records[unit.index] = records
            if offset:
                store.ensure(unit.index, MASTER, offset, torch.float32)
            for key, dtype in elementwise.items():
                store.ensure(unit.index, key, sum(piece.numel for piece in unit.pieces), dtype)

    def _needs_master(self, piece: Piece) -> bool:
        elsewhere = piece.param.device.type != self.update_device.type  # step_on host: mirror fp32 weights too
        return self.precision.has_master(piece.param.dtype) or (elsewhere and piece.param.dtype == torch.float32)

    def _slot(self, unit: Unit, i: int, key: str, value: Tensor) -> Slot:
        """One flat buffer per key for states with an entry per weight, one per piece and key for other shapes."""
        piece = unit.pieces[i]
        if not self.parameters.whole_tensors and value.shape == (piece.numel,):
            return Slot(key, sum(p.numel for p in unit.pieces[:i]), piece.shape)
        store_key = f"{key}:{piece.name}"
        self.store_of(unit.index).ensure(unit.index, store_key, value.numel(), value.dtype)
        return Slot(store_key, 0, tuple(value.shape))

    def _fill_masters(self, unit: Unit, tensors: Mapping[str, Tensor]) -> None:
        """First visit: masters are the weights, unless ``set_masters`` gave the bits that a cast would lose."""
        for piece, record in zip(unit.pieces, self.records[unit.index], strict=True):
            if record.master is not None:
                record.master.view(tensors).copy_(self.parameters.weight(piece))
        self.masters_filled.add(unit.index)

    @torch.no_grad()
    def set_masters(self, shards: Mapping[str, Tensor]) -> None:
        """Masters from fp32 weights taken before they were cast: this rank's flat shards, by parameter name."""
        for unit in self.units.values():
            owned = [(p, r.master) for p, r in zip(unit.pieces, self.records[unit.index], strict=True) if r.master]
            if not any(piece.name in shards for piece, _ in owned):
                continue
            for piece, slot in owned:
                values = shards[piece.name] if piece.name in shards else self.parameters.weight(piece)
                self.store_of(unit.index).write(unit.index, slot.key, values.reshape(-1).float(), slot.offset)
            self.masters_filled.add(unit.index)

    def _rounding_generator(self) -> torch.Generator | None:
        """Seeded by (seed, step, rank) alone, so that a resumed run rounds alike."""
        if not self.precision.stochastic_rounding:
            return None
        generator = torch.Generator(device=self._norm_device())
        generator.manual_seed(((self.seed * 1_000_003 + self.num_applied) * 65_537 + self.parameters.ranks.rank) % (1 << 63))
        return generator

    # -- bookkeeping ------------------------------------------------------------------------------------------

    def coverage(self) -> dict[str, int]:
        """How often each parameter was updated, by name."""
        return {
            piece.name: record.num_updates
            for index, unit in self.units.items()
            for piece, record in zip(unit.pieces, self.records[index], strict=True)
        }

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.parameters.drop_grads(self.units.values())

    def close(self) -> None:
        self.parameters.close()
        self.store.close()
