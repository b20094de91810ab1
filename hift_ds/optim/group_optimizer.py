"""The optimizer of a HiFT run: one layer group per step, everything else parked.

Hops from the training loop to the arithmetic: ``HiFTEngine.step`` -> ``GroupOptimizer.step`` ->
``GroupUpdates.update`` -> ``PiecewiseOptimizer.step`` -> the ``torch.optim`` class.

On N ranks each rank owns 1/N of every master and state: gradients of the active group are reduce-scattered,
each rank updates its pieces, the new weights are gathered (ZeRO, arXiv 1910.02054, over one group at a time).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hift_ds.layers.grouping import ALWAYS
from hift_ds.lr import CycleLR
from hift_ds.optim.clip import agree_on_norm, grad_factor
from hift_ds.optim.group_shard import GroupShard
from hift_ds.optim.group_states import GroupStates
from hift_ds.optim.group_update import GroupUpdates, StepValues
from hift_ds.optim.parameters import Parameters
from hift_ds.optim.piecewise import refuse_step, say_without_states
from hift_ds.optim.trainable_flags import TrainableFlags
from hift_ds.optim.trials import Trials
from hift_ds.precision import LossScaler
from hift_ds.schedule import GroupSchedule
from hift_ds.store.arithmetic import StateArithmetic
from hift_ds.store.base import StateStore
from hift_ds.store.movers import Waits

# Per member of a group: this rank's shard of its mean gradient, and whether this rank's backward reached it.
Reduced = tuple[list[Tensor | None], list[bool]]


class GroupOptimizer:
    """Updates the active layer group.

    Args:
        states: of all layer groups; with them the optimizer that is stepped, and how gradients and weights travel.
        flags: ``requires_grad`` of the model.
        schedule: which group is active; advanced by each applied step.
        max_grad_norm: 0 for no clipping.
        seed: of stochastic rounding.
        pin_memory: page-lock what gradients and weights travel through when the host updates.
        on_threads: what the host updates beside the device is updated on a thread, and what it sums up summed on one.
    """

    def __init__(
        self,
        states: GroupStates,
        flags: TrainableFlags,
        schedule: GroupSchedule,
        lr: CycleLR,
        scaler: LossScaler,
        max_grad_norm: float = 0.0,
        seed: int = 0,
        pin_memory: bool = True,
        on_threads: bool = True,
    ) -> None:
        self.states = states
        self.flags = flags
        self.schedule = schedule
        self.lr = lr
        self.scaler = scaler
        self.max_grad_norm = max_grad_norm
        self.waits = Waits(self._weight_device())
        self.updates = GroupUpdates(states, self.waits, seed, pin_memory, on_threads)
        self.optimizer = states.piecewise.base  # DeepSpeed's name for it; its schedulers look for it
        self._guards: list[RemovableHandle] = []
        self.num_updates = {index: [0] * len(group.members) for index, group in self.groups.items()}
        self.num_applied = 0  # applied optimizer steps
        self.overflow = False  # the last step was skipped
        self.grad_norm = 0.0
        self.skip_updates = False  # steps drop the gradients instead of using them
        # What ranks ask each other, by name: each step's read of the norm brings home whether any rank says yes.
        self.questions: dict[str, Callable[[], bool | Tensor]] = {}
        self.answers: dict[str, bool] | None = None  # at the last step, the same on every rank; None before it
        # By group, at its last visit, if gradients are clipped by that.
        self.last_norms: dict[int, float] = {}
        self.trials = Trials()
        self._reduced: dict[int, Reduced] = {}
        self.parameters.note_waits(self.waits)

    # -- what DeepSpeed and schedulers read -------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The stepped optimizer's param_groups, over the whole model."""
        return self.optimizer.param_groups

    @property
    def groups(self) -> Mapping[int, GroupShard]:
        """This rank's shards of the layer groups, by index, and of the always-active one."""
        return self.states.groups

    @property
    def parameters(self) -> Parameters:
        """How gradients and weights travel."""
        return self.states.parameters

    @property
    def active_groups(self) -> list[GroupShard]:
        """This rank's shards of what the coming step trains: the always-active group, if there is one, and the
        schedule's."""
        return [self.groups[index] for index in (ALWAYS, self.schedule.active) if index in self.groups]

    @property
    def store(self) -> StateStore:
        """The states of the rotating groups."""
        return self.states.store

    # -- one step ---------------------------------------------------------------------------------------------

    updates_in_backward = False

    @property
    def clipping_line(self) -> str:
        """Which norm gradients are clipped by, in a sentence, where that is a choice; else nothing."""
        return ""

    def kept_on_host(self, group: GroupShard, micro_batches: int) -> int:
        """Bytes of host memory that a step of ``group`` takes beside states."""
        return 0

    def check_whole(self) -> None:
        """See that no update was cut short."""

    def begin_backward(self, loss: Tensor, step_loss: Tensor, is_boundary: bool, retain_graph: bool) -> None:
        """Get ready for a backward; at the boundary gradients may be reduced while it goes on."""
        self.parameters.sums.hooks.come_last()
        if is_boundary:
            self.parameters.begin_reduction(self.active_groups[::-1], loss)

    def end_backward(self, is_boundary: bool) -> None:
        """End a micro-batch's backward; at the boundary gradients are reduced, once."""
        self.parameters.end_backward()
        if is_boundary:
            self.reduce_gradients()

    def backward_failed(self, error: BaseException) -> None:
        """Give up a backward that an error has ended."""
        self.parameters.abandon_reduction()

    def pending(self, param: nn.Parameter) -> Tensor | None:
        """The sum of the gradients of the micro-batches since the last step, of the parameter's shape; ``None`` without
        any."""
        return self.parameters.pending(param)

    def set_pending(self, param: nn.Parameter, grad: Tensor) -> None:
        """Go on from ``grad``, which :meth:`pending` gave."""
        self.parameters.set_pending(param, grad)

    def take_gradient_traffic(self) -> tuple[int, int]:
        """Bytes of gradients that went to host memory and came back since this was last asked. Before
        :meth:`take_waits`, which has the waits for them."""
        return 0, 0

    def guard(self) -> None:
        """Have calls of the stepped optimizer answered that do not do what they say, until training ends."""
        self._guards = [
            self.optimizer.register_step_pre_hook(refuse_step),
            self.optimizer.register_state_dict_pre_hook(say_without_states),
        ]

    def activate(self) -> None:
        """Let gradients flow to the active groups and to no other, so that backward stops at the lowest of them."""
        self.flags.take(member.param for group in self.active_groups for member in group.members)

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Average the active groups' gradients over ranks, once, at the accumulation boundary."""
        for group in self.active_groups:
            # A second backward of the same step adds to what the first has left.
            with self.waiting_for_ranks():
                reduced = self.parameters.reduce(group)
            self._reduced[group.index] = _added(self._reduced.get(group.index), reduced)

    @torch.no_grad()
    def step(self) -> bool:
        """Update the active groups. Returns False if the step was skipped because of an overflow.

        1. agree on the global norm;  2. skip if it is not finite under a loss scale;  3. latch the learning rate;
        4. update this rank's pieces, bringing their states in and sending them back;  5. publish the weights;
        6. rotate.
        """
        if self.skip_updates:
            self.drop_gradients()
            return False
        reduced = self._take_reduced()
        self.flags.end_step()
        norm, value, reached, answers = agree_on_norm(
            self.parameters.ranks,
            [grad for grads, _ in reduced for grad in grads],
            [present for _, present in reduced],
            self._weight_device(),
            self.ask(),
        )
        self.answers = dict(zip(sorted(self.questions), answers, strict=True))
        self.grad_norm = value / self.scaler.scale  # a power of two
        if norm.device != (update_device := self.states.update_device):
            norm = torch.tensor(value, dtype=torch.float32, device=update_device)
        norm = norm / self.scaler.scale
        self.overflow = self.scaler.overflowed(self.grad_norm)
        factor = grad_factor(norm, self.max_grad_norm, self.scaler.scale)
        self.scaler.update(self.overflow)
        if self.overflow:
            return False

        values = StepValues(self.num_applied, self._rates(), factor)
        for group, (grads, _), flags in zip(self.active_groups, reduced, reached, strict=True):
            counts = self.num_updates[group.index]
            self.num_updates[group.index] = [n + flag for n, flag in zip(counts, flags, strict=True)]
            shards = [grad if flag else None for grad, flag in zip(grads, flags, strict=True)]
            self.parameters.begin_update(group)
            self.states.extras[group.index] |= self.updates.update(group, shards, values)
            self.updates.finish()
            with self.waiting_for_ranks():
                self.parameters.publish(group)
        self.states.end_writing()
        self.num_applied += 1
        self.schedule.advance()
        self.states.prefetch(self.groups[self.schedule.active])
        self.states.piecewise.end_step()
        return True

    def _rates(self) -> list[float]:
        """The rates, one per param_group, of the update that begins; the optimizer's user may set them in a hook."""
        self.states.piecewise.begin_step()
        self.lr.param_groups = self.param_groups  # which load_state_dict replaces
        schedule = self.schedule
        return self.lr.before_step(schedule.starts_cycle, schedule.cursor.cycle, schedule.steps_per_cycle)

    def arithmetic(self) -> StateArithmetic:
        """What a step moves, for the line at the start."""
        return self.states.arithmetic(self.updates_in_backward)

    def waiting_for_ranks(self) -> contextlib.AbstractContextManager[None]:
        """A context around what ranks do together: the computation stands still for it."""
        alone = self.parameters.ranks.world_size == 1
        return contextlib.nullcontext() if alone else self.waits.around("reduction")

    def take_waits(self) -> dict[str, float]:
        """Seconds, by cause, that the computation stood still since the last call, for other things than states."""
        waits = self.waits.traffic.take().waits
        return {cause: seconds for cause, seconds in waits.items() if seconds}

    def ask(self) -> list[bool | Tensor]:
        """What this rank says to the ``questions``, by name."""
        return [self.questions[name]() for name in sorted(self.questions)]

    def _take_reduced(self) -> list[tuple[list[Tensor | None], list[bool]]]:
        # ``step()`` without a backward: nothing to do, but every rank does the same nothing.
        if not self._reduced:
            self.reduce_gradients()
        reduced, self._reduced = self._reduced, {}
        return [reduced[group.index] for group in self.active_groups]

    def _weight_device(self) -> torch.device:
        return self.active_groups[0].members[0].param.device

    # -- bookkeeping ------------------------------------------------------------------------------------------

    def weight_names(self) -> dict[int, Sequence[str]]:
        """The names of each group's weights, by group index."""
        return {index: [member.name for member in group.members] for index, group in self.groups.items()}

    def coverage(self) -> dict[str, int]:
        """How often each parameter was updated, by name."""
        return {
            member.name: count
            for index, group in self.groups.items()
            for member, count in zip(group.members, self.num_updates[index], strict=True)
        }

    def set_coverage(self, updates: Mapping[str, int]) -> None:
        """Take over what :meth:`coverage` gave; parameters that ``updates`` does not name were never updated."""
        for index, group in self.groups.items():
            self.num_updates[index] = [updates.get(member.name, 0) for member in group.members]

    def regroup(self, groups: Mapping[int, GroupShard]) -> None:
        """Train the same weights in other groups from now on, from the first group of a new cycle; their states stay
        where they are.

        Args:
            groups: by index, and ``ALWAYS``, of the same chunks.
        """
        coverage = self.coverage()
        self.states.regroup(groups)
        self.set_coverage(coverage)
        self.schedule.regroup(len([index for index in groups if index != ALWAYS]))
        self.last_norms.clear()
        self.parameters.forget_groups()

    @property
    def is_mid_step(self) -> bool:
        """True if gradients were reduced and their update has not been made."""
        return bool(self._reduced)

    def drop_gradients(self) -> None:
        """Drop gradients, reduced or not: another state is about to be loaded."""
        self.updates.abandon()
        self._reduced.clear()
        self.zero_grad()
        self.flags.end_step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients; ``set_to_none`` is torch's, and always true here."""
        self.parameters.drop_grads(self.groups.values())

    def end_training(self, keep_states: bool = False) -> None:
        """Give back gradients, hooks on weights, states and what moves them."""
        if self.flags.step_began:  # else they may be another engine's by now
            self.drop_gradients()
        self.flags.show()
        for guard in self._guards:
            guard.remove()
        self.parameters.end_training()
        self.updates.close()
        if not keep_states:
            self.states.close()

    def close(self) -> None:
        """Let go of the weights too, after ``end_training``."""
        self.parameters.close()


def _added(before: Reduced | None, now: Reduced) -> Reduced:
    """Both reductions of one group as if they were one."""
    if before is None:
        return now
    grads = [b if a is None else a if b is None else a.float().add_(b) for a, b in zip(before[0], now[0], strict=True)]
    return grads, [a or b for a, b in zip(before[1], now[1], strict=True)]
