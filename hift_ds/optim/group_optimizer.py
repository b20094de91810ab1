"""The optimizer of a HiFT run: one layer group per step, everything else parked.

Hops from the training loop to the arithmetic: ``HiFTEngine.step`` -> ``GroupOptimizer.step`` ->
``PiecewiseOptimizer.step`` -> the ``torch.optim`` class.

On N ranks each rank owns 1/N of every master and state: gradients of the active group are reduce-scattered,
each rank updates its pieces, the new weights are gathered (ZeRO, arXiv 1910.02054, over one group at a time).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hift_ds.layers.grouping import ALWAYS
from hift_ds.lr import CycleLR
from hift_ds.optim.clip import agree_on_norm, grad_factor
from hift_ds.optim.group_states import GroupStates, StateView, part_of
from hift_ds.optim.host_step import HostStep, HostUpdates
from hift_ds.optim.parameters import Chunk, GroupShard, Piece
from hift_ds.optim.piecewise import Extras, PieceUpdate, PiecewiseOptimizer
from hift_ds.optim.trainable_flags import TrainableFlags
from hift_ds.optim.trials import Trials
from hift_ds.precision import LossScaler
from hift_ds.schedule import GroupSchedule
from hift_ds.store.arithmetic import StateArithmetic
from hift_ds.store.base import StateStore
from hift_ds.store.movers import Waits

# Per member of a group: this rank's shard of its mean gradient, and whether this rank's backward reached it.
Reduced = tuple[list[Tensor | None], list[bool]]
RUN_NUMEL = 1 << 24  # elements stepped at once: 64 MiB in fp32


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
        self.seed = seed

        self.groups = states.groups
        self.parameters = states.parameters
        self.piecewise = states.piecewise
        self.precision = states.precision
        self.update_device = states.update_device
        self.optimizer = states.piecewise.base  # DeepSpeed's name for it; its schedulers look for it
        self.num_updates = {index: [0] * len(group.members) for index, group in self.groups.items()}
        self.num_applied = 0  # applied optimizer steps
        self.overflow = False  # the last step was skipped
        self.grad_norm = 0.0
        self.skip_updates = False  # steps drop the gradients instead of using them
        # What ranks ask each other, by name: each step's read of the norm brings home whether any rank says yes.
        self.questions: dict[str, Callable[[], bool | Tensor]] = {}
        self.answers: dict[str, bool] | None = None  # at the last step, the same on every rank; None: it did not ask
        # By group, at its last visit, if gradients are clipped by that.
        self.last_norms: dict[int, float] = {}
        self.trials = Trials()
        self._reduced: dict[int, Reduced] = {}
        self.host_step = self._build_host_step(pin_memory)
        self.waits = Waits(self._weight_device())
        self.parameters.note_waits(self.waits)
        # What the host updates beside the device, and the scalars that this has changed so far in the step, by group.
        self.host_updates: HostUpdates[tuple[int, Extras]] | None = None
        if states.split is not None:
            weights_on = next(member.param.device for group in self.groups.values() for member in group.members)
            self.host_updates = HostUpdates(self.optimizer, weights_on, on_threads)
        self._changed_on_host: list[tuple[int, Extras]] = []
        self._scratch = Scratch()

    # -- what DeepSpeed and schedulers read -------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The stepped optimizer's param_groups, over the whole model."""
        return self.optimizer.param_groups

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
        """No update was cut short."""

    def begin_backward(self, loss: Tensor, step_loss: Tensor, is_boundary: bool, retain_graph: bool) -> None:
        """Called before each backward; at the boundary gradients may be reduced while it goes on."""
        if is_boundary:
            self.parameters.begin_reduction(self.active_groups[::-1], loss)

    def end_backward(self, is_boundary: bool) -> None:
        """A micro-batch's backward is over; at the boundary gradients are reduced, once."""
        self.parameters.end_backward()
        if is_boundary:
            self.reduce_gradients()

    def backward_failed(self, error: BaseException) -> None:
        """An error has ended a backward."""
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
        self.answers = None
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
        if norm.device != self.update_device:
            norm = torch.tensor(value, dtype=torch.float32, device=self.update_device)
        norm = norm / self.scaler.scale
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
            self.states.extras[group.index] |= self.update(group, shards, factor, rates)
            self.finish_copies()
            with self.waiting_for_ranks():
                self.parameters.publish(group)
        self._take_changes_on_host()
        self.num_applied += 1
        self.schedule.advance()
        self.states.prefetch(self.groups[self.schedule.active])
        return True

    def arithmetic(self) -> StateArithmetic:
        """What a step moves, for the line at the start."""
        return self.states.arithmetic(self.updates_in_backward)

    def waiting_for_ranks(self) -> contextlib.AbstractContextManager[None]:
        """Around what ranks do together: the computation stands still for it."""
        alone = self.parameters.ranks.world_size == 1
        return contextlib.nullcontext() if alone else self.waits.around("reduction")

    def take_waits(self) -> dict[str, float]:
        """Seconds, by cause, that the computation stood still since the last call, for other things than states."""
        waits = self.waits.traffic.take().waits
        return {cause: seconds for cause, seconds in waits.items() if seconds}

    def ask(self) -> list[bool | Tensor]:
        """What this rank says to the ``questions``, by name."""
        return [self.questions[name]() for name in sorted(self.questions)]

    def _take_changes_on_host(self) -> None:
        for index, changed in self._changed_on_host:
            self.states.extras[index] |= changed
        self._changed_on_host.clear()

    def _take_reduced(self) -> list[tuple[list[Tensor | None], list[bool]]]:
        # ``step()`` without a backward: nothing to do, but every rank does the same nothing.
        if not self._reduced:
            self.reduce_gradients()
        reduced, self._reduced = self._reduced, {}
        return [reduced[group.index] for group in self.active_groups]

    def _weight_device(self) -> torch.device:
        return self.active_groups[0].members[0].param.device

    def update(
        self,
        group: GroupShard,
        shards: list[Tensor | None],
        factor: Tensor | None,
        rates: list[float],
        then: Sequence[GroupShard] = (),
    ) -> Extras:
        """Chunk by chunk: states in, step, weights out, states back.

        Args:
            shards: this rank's part of each member's gradient; ``None``: the member is left alone.
            factor: of the gradients.
            rates: per param_group.
            then: what is updated after it in the same step.

        Returns:
            By param_group, the scalars that the optimizer has changed there: for ``extras`` when the step is over.
        """
        states = self.states
        changed: Extras = {}
        ahead = self._download_ahead(group, [c for c in group.chunks if c.id not in states.on_host], shards)
        for position, chunk in enumerate(group.chunks):
            if chunk.id in states.on_host:
                assert self.host_updates is not None
                states.prefetch(group, position, then)
                self.host_updates.submit(
                    functools.partial(self._update_on_host, group, position, list(shards), factor, list(rates))
                )
                continue
            tensors = states.fetch(group, position, then)
            changed |= self._update_chunk(group, chunk, tensors, shards, factor, rates, self.piecewise, ahead)
            states.evict(group, position, self.num_applied)
        if then:  # with one slot there was no room before
            states.prefetch(then[0], then=then[1:])
        return changed

    def _update_on_host(
        self, group: GroupShard, position: int, shards: list[Tensor | None], factor: Tensor | None, rates: list[float]
    ) -> tuple[int, Extras]:
        """One chunk, beside those that are updated on the device. Returns the group, and what its scalars became."""
        assert self.host_updates is not None
        chunk = group.chunks[position]
        tensors = self.states.bring(group, chunk)
        factor = None if factor is None else factor.to("cpu")
        ahead = self._download_ahead(group, [chunk], shards)
        changed = self._update_chunk(group, chunk, tensors, shards, factor, rates, self.host_updates.piecewise, ahead)
        self.states.evict(group, position, self.num_applied)
        return group.index, changed

    def _update_chunk(
        self,
        group: GroupShard,
        chunk: Chunk,
        tensors: Mapping[str, Tensor],
        shards: list[Tensor | None],
        factor: Tensor | None,
        rates: list[float],
        piecewise: PiecewiseOptimizer,
        ahead: Iterator[None],
    ) -> Extras:
        """Step, and weights out.

        Args:
            tensors: the chunk's states, where they are updated.
            ahead: sets gradients on their way down, one at a time.
        """
        states, extras, device = self.states, self.states.extras[group.index], self.states.device_of(chunk)
        changed: Extras = {}
        before = [record.copy() for record in states.records[chunk.id]]
        for together in self._batches(chunk, shards, device):
            next(ahead, None)
            if self._converts_in_scratch:
                self._scratch.begin()
            updates = [
                PieceUpdate(
                    target=self._target(group, chunk.pieces[i], run, before[i].master, tensors, device),
                    grad=self._gradient(group, run, shard, factor, device),
                    param_group=group.members[run.member].param_group,
                    state=before[i].state(tensors, chunk.pieces[i], run),
                )
                for i, run, shard in together
            ]
            changed |= piecewise.step(updates, rates, extras)
            for (i, run, _), update in zip(together, updates, strict=True):
                assert update.state is not None
                states.keep(group, chunk, i, run, update.state)
                update.state = None
                self._publish_run(group, run, update.target)
            del updates, update  # each holds a gradient: not beside the next batch's
        return changed

    def _batches(
        self, chunk: Chunk, shards: list[Tensor | None], device: torch.device
    ) -> Iterator[list[tuple[int, Piece, Tensor]]]:
        """What is stepped in one call of the optimizer: (position of the piece, the run of it, its gradient's shard),
        ``RUN_NUMEL`` elements at most or one run. A call a tensor would cost a millisecond each."""
        together: list[tuple[int, Piece, Tensor]] = []
        numel, through_buffer = 0, self.host_step is not None and device.type == "cpu"
        for i, piece in enumerate(chunk.pieces):
            if (shard := shards[piece.member]) is None:
                continue
            for run in self._runs(piece):
                # A gradient on the host is in a buffer that the next one takes.
                if together and (numel + run.numel > RUN_NUMEL or through_buffer):
                    yield together
                    together, numel = [], 0
                together.append((i, run, shard))
                numel += run.numel
        if together:
            yield together

    def _publish_run(self, group: GroupShard, run: Piece, target: Tensor) -> None:
        """Write what the optimizer has made of ``run`` into the weight, unless that is what it changed."""
        weight = self.parameters.weight(group, run)
        if target.data_ptr() != weight.data_ptr():
            generator = self._rounding_generator(group.members[run.member].name, run.start, target.device)
            self._write_weight(weight, target, generator)

    def finish_copies(self) -> None:
        """See that what is computed from here on has the new weights."""
        if self.host_updates is not None:
            with self.waits.around("host_update"):
                self._changed_on_host += self.host_updates.finish()
        if self.host_step is not None:
            self.host_step.finish()
        self.parameters.finish_writes()

    def _write_weight(self, weight: Tensor, value: Tensor, generator: torch.Generator | None) -> None:
        if self.host_step is not None and value.device.type == "cpu" and weight.device.type != "cpu":
            self.host_step.send_weight(weight, value, generator)
        else:
            self.parameters.write_weight(weight, value, generator)

    def _runs(self, piece: Piece) -> list[Piece]:
        """The piece in parts that are stepped one after the other, so that beside the chunk's buffers only one part's
        fp32 gradient and new states exist. Elementwise optimizers cannot tell; others get the whole tensor."""
        if self.parameters.whole_tensors or piece.numel <= RUN_NUMEL:
            return [piece]
        starts = range(piece.start, piece.start + piece.numel, RUN_NUMEL)
        lengths = [min(RUN_NUMEL, piece.start + piece.numel - start) for start in starts]
        return [Piece(piece.member, start, length, (length,)) for start, length in zip(starts, lengths, strict=True)]

    def _target(
        self,
        group: GroupShard,
        piece: Piece,
        run: Piece,
        master: StateView | None,
        tensors: Mapping[str, Tensor],
        device: torch.device,
    ) -> Tensor:
        """What the optimizer changes, fp32, of ``run``, a part of ``piece``."""
        if master is not None:
            return part_of(master.view(tensors), piece, run)
        # An fp32 weight is its own master; a bf16 one without masters is fp32 only while it is updated.
        weight = self.parameters.weight(group, run)
        if weight.device.type == "cpu":  # 16 bits travel, and nobody waits
            weight = weight.to(device, non_blocking=True)
        return weight.to(device, torch.float32)

    def _gradient(
        self, group: GroupShard, run: Piece, shard: Tensor, factor: Tensor | None, device: torch.device
    ) -> Tensor:
        """The run's part of a reduced gradient, fp32, on ``device``, multiplied with ``factor``."""
        grad = self.parameters.grad(group, run, shard)
        if self.host_step is not None and device.type == "cpu" and grad.device.type != "cpu":
            grad = self.host_step.gradient(grad)
        # A simulation's tensors have a type of their own.
        if self._converts_in_scratch and type(grad) is Tensor and grad.device.type == "cpu":
            grad = self._scratch.fp32(grad)
        grad = grad.to(device, torch.float32)
        return grad if factor is None else grad.mul_(factor)

    @property
    def _converts_in_scratch(self) -> bool:
        """All updates run on a CPU, and on this thread."""
        return self.update_device.type == "cpu" and self.host_updates is None

    def _download_ahead(
        self, group: GroupShard, chunks: Sequence[Chunk], shards: list[Tensor | None]
    ) -> Iterator[None]:
        """Where the host updates: at the n-th step, the gradient of the part after the n-th is on its way down."""
        step = self.host_step
        if step is None or any(self.states.device_of(chunk).type != "cpu" for chunk in chunks):
            return
        pieces = [piece for chunk in chunks for piece in chunk.pieces if shards[piece.member] is not None]
        for at, run in enumerate(run for piece in pieces for run in self._runs(piece)):
            shard = shards[run.member]
            assert shard is not None
            grad = self.parameters.grad(group, run, shard)
            if grad.device.type != "cpu":
                step.expect(grad)
            if at:
                yield

    def _rounding_generator(self, name: str, start: int, device: torch.device) -> torch.Generator | None:
        """Seeded by the run's seed, the step and the first element that is rounded, so that a resumed run rounds alike,
        and one that updates in another order too."""
        if not self.precision.stochastic_rounding:
            return None
        what = f"{self.seed}:{self.num_applied}:{name}:{start}".encode()
        generator = torch.Generator(device=device)
        generator.manual_seed(int.from_bytes(hashlib.blake2b(what, digest_size=8).digest(), "little") >> 1)
        return generator

    def _build_host_step(self, pin_memory: bool) -> HostStep | None:
        """If updates run on the host and weights are elsewhere."""
        devices = {member.param.device for group in self.groups.values() for member in group.members}
        elsewhere = [device for device in devices if device.type != "cpu"]
        if not (self.update_device.type == "cpu" or self.states.split is not None) or not elsewhere:
            return None
        return HostStep(self.store.traffic, elsewhere[0], pin_memory, beside=self.states.split is not None)

    # -- bookkeeping ------------------------------------------------------------------------------------------

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
        self.groups = self.states.groups
        self.set_coverage(coverage)
        self.schedule.regroup(len([index for index in groups if index != ALWAYS]))
        self.last_norms.clear()
        self.parameters.forget_groups()

    @property
    def is_mid_step(self) -> bool:
        """Gradients were reduced and their update has not been made."""
        return bool(self._reduced)

    def drop_gradients(self) -> None:
        """Reduced or not: another state is about to be loaded."""
        if self.host_updates is not None:
            self.host_updates.abandon()
        self._changed_on_host.clear()
        self._reduced.clear()
        self.zero_grad()
        self.flags.end_step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients; ``set_to_none`` is torch's, and always true here."""
        self.parameters.drop_grads(self.groups.values())

    def end_training(self, keep_states: bool = False) -> None:
        """Gradients, hooks on weights, states and what moves them: gone."""
        if self.flags.step_began:  # else they may be another engine's by now
            self.drop_gradients()
        self.flags.show()
        self._scratch = Scratch()
        self.parameters.end_training()
        if self.host_updates is not None:
            self.host_updates.close()
        if not keep_states:
            self.states.close()
        if self.host_step is not None:
            self.host_step.close()

    def close(self) -> None:
        """Let go of the weights too, after ``end_training``."""
        self.parameters.close()


class Scratch:
    """Memory of the CPU in which 16-bit gradients are fp32 while they are used: fresh memory would cost a page fault
    for every 1,024 of them, more than the conversion."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)
        self._used = 0

    def begin(self) -> None:
        """What ``fp32`` gave before is not used any more."""
        self._used = 0

    def fp32(self, values: Tensor) -> Tensor:
        """``values`` in fp32, in their shape; what was converted is there until ``begin``."""
        if values.dtype == torch.float32:
            return values
        start, self._used = self._used, self._used + values.numel()
        if self._used > self._memory.numel():  # what was given out keeps the old memory
            self._memory = torch.empty(self._used)
        return self._memory[start : self._used].view(values.shape).copy_(values)


def _added(before: Reduced | None, now: Reduced) -> Reduced:
    """Both reductions of one group as if they were one."""
    if before is None:
        return now
    grads = [b if a is None else a if b is None else a.float().add_(b) for a, b in zip(before[0], now[0], strict=True)]
    return grads, [a or b for a, b in zip(before[1], now[1], strict=True)]
