"""The update of a layer group by gradients that have been reduced: chunk by chunk, states in, the optimizer's step, new
weights out, states back; on the update device, or by a thread on the host beside it.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hift_ds.optim.group_shard import Chunk, GroupShard, Piece
from hift_ds.optim.group_states import GroupStates
from hift_ds.optim.host_step import HostStep, HostUpdates
from hift_ds.optim.piecewise import Extras, PieceUpdate, PiecewiseOptimizer
from hift_ds.optim.state_layout import StateView, part_of
from hift_ds.store.movers import Waits

RUN_NUMEL = 1 << 24  # elements stepped at once: 64 MiB in fp32

Shards = list[Tensor | None]  # this rank's part of each member's gradient; None: the member is left alone


@dataclass(frozen=True)
class StepValues:
    """What the updates of one optimizer step have in common.

    Attributes:
        number: optimizer steps applied before; seeds stochastic rounding, here and in compact states.
        rates: learning rate per param_group.
        factor: of the gradients, 0-dim, fp32; ``None`` for 1.
        keeps_gradients: they may be wanted again, whatever the optimizer does to what it is given.
    """

    number: int
    rates: Sequence[float]
    factor: Tensor | None = None
    keeps_gradients: bool = False

    def on(self, device: torch.device) -> StepValues:
        """The same values, with the factor where updates run."""
        return self if self.factor is None else replace(self, factor=self.factor.to(device))


class GroupUpdates:
    """Updates groups, or parts of them, one after the other.

    Args:
        states: of all layer groups.
        waits: where it is noted for how long the computation stands still for the host's updates.
        seed: of stochastic rounding.
        pin_memory: page-lock what gradients and weights travel through when the host updates.
        on_threads: what the host updates beside the device is updated on a thread.

    Attributes:
        beside: updates chunks on the host beside those on the device; ``None`` where there are none.
    """

    def __init__(self, states: GroupStates, waits: Waits, seed: int, pin_memory: bool, on_threads: bool) -> None:
        self.states = states
        self.waits = waits
        self.seed = seed
        devices = {member.param.device for group in states.groups.values() for member in group.members}
        self.host_step = self._build_host_step(devices, pin_memory)
        self.beside: HostUpdates | None = None
        if states.split is not None:
            weights_on = next(member.param.device for group in states.groups.values() for member in group.members)
            self.beside = HostUpdates(states.piecewise.base, weights_on, on_threads)

    def _build_host_step(self, devices: set[torch.device], pin_memory: bool) -> HostStep | None:
        """If updates run on the host and weights are elsewhere."""
        elsewhere = [device for device in devices if device.type != "cpu"]
        if not (self.states.update_device.type == "cpu" or self.states.split is not None) or not elsewhere:
            return None
        return HostStep(self.states.store.traffic, elsewhere[0], pin_memory, beside=self.states.split is not None)

    def update(self, group: GroupShard, shards: Shards, step: StepValues, then: Sequence[GroupShard] = ()) -> Extras:
        """Update ``group``, between ``parameters.begin_update`` and ``finish``.

        Args:
            then: what is updated after it in the same step.

        Returns:
            What the optimizer has changed in its param_groups: for ``extras`` when the step is over.
        """
        states = self.states
        states.begin_writing(m.param for m, shard in zip(group.members, shards, strict=True) if shard is not None)
        changed: Extras = {}
        ahead = self._download_ahead(group, [c for c in group.chunks if c.id not in states.on_host], shards)
        for position, chunk in enumerate(group.chunks):
            if chunk.id in states.on_host:
                assert self.beside is not None
                states.prefetch(group, position, then)
                self.beside.submit(functools.partial(self._update_beside, group, position, list(shards), step))
                continue
            tensors = states.fetch(group, position, then)
            changed |= self._update_chunk(group, chunk, tensors, shards, step, states.piecewise, ahead)
            states.evict(group, position, step.number)
        if then:  # with one slot there was no room before
            states.prefetch(then[0], then=then[1:])
        return changed

    def _update_beside(self, group: GroupShard, position: int, shards: Shards, step: StepValues) -> None:
        """One chunk, on the host, beside those that are updated on the device."""
        assert self.beside is not None
        chunk = group.chunks[position]
        tensors = self.states.bring(group, chunk)
        ahead = self._download_ahead(group, [chunk], shards)
        changed = self._update_chunk(group, chunk, tensors, shards, step, self.beside.piecewise, ahead)
        self.states.evict(group, position, step.number)
        assert not changed, "no optimizer that has a twin keeps anything in its param_groups"

    def _update_chunk(
        self, group: GroupShard, chunk: Chunk, tensors: Mapping[str, Tensor], shards: Shards, step: StepValues,
        piecewise: PiecewiseOptimizer, ahead: Iterator[None],
    ) -> Extras:  # fmt: skip
        """Step, and weights out.

        Args:
            tensors: the chunk's states, where they are updated.
            ahead: sets gradients on their way down, one at a time.
        """
        states, extras, device = self.states, self.states.extras[group.index], self.states.device_of(chunk)
        step, changed = step.on(device), Extras()
        before = [record.copy() for record in states.records[chunk.id]]
        scratch = Scratch()  # gone when the chunk is done: not beside the next backward's activations
        for together in self._batches(chunk, shards, device):
            next(ahead, None)
            scratch.begin()
            updates = [
                PieceUpdate(
                    target=self._target(group, chunk.pieces[i], run, before[i].master, tensors, device),
                    grad=self._gradient(group, run, shard, step, device, scratch),
                    param_group=group.members[run.member].param_group,
                    state=before[i].state(tensors, chunk.pieces[i], run),
                )
                for i, run, shard in together
            ]
            changed |= piecewise.step(updates, step.rates, extras)
            for (i, run, _), update in zip(together, updates, strict=True):
                assert update.state is not None
                states.keep(group, chunk, i, run, update.state)
                update.state = None
                self._publish_run(group, run, update.target, step.number)
            del updates, update  # each holds a gradient: not beside the next batch's
        return changed

    # -- what is stepped at once --------------------------------------------------------------------------------

    def _batches(self, chunk: Chunk, shards: Shards, device: torch.device) -> Iterator[list[tuple[int, Piece, Tensor]]]:
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

    def _runs(self, piece: Piece) -> list[Piece]:
        """The piece in parts that are stepped one after the other, so that beside the chunk's buffers only one part's
        fp32 gradient and new states exist. Elementwise optimizers cannot tell; others get the whole tensor."""
        if self.states.parameters.whole_tensors or piece.numel <= RUN_NUMEL:
            return [piece]
        starts = range(piece.start, piece.start + piece.numel, RUN_NUMEL)
        lengths = [min(RUN_NUMEL, piece.start + piece.numel - start) for start in starts]
        return [Piece(piece.member, start, length, (length,)) for start, length in zip(starts, lengths, strict=True)]

    def _target(
        self, group: GroupShard, piece: Piece, run: Piece, master: StateView | None, tensors: Mapping[str, Tensor],
        device: torch.device,
    ) -> Tensor:  # fmt: skip
        """What the optimizer changes, fp32, of ``run``, a part of ``piece``."""
        if master is not None:
            target = part_of(master.view(tensors), piece, run)
            self.states.take_over(group, run, target)
            return target
        # An fp32 weight is its own master; a bf16 one without masters is fp32 only while it is updated.
        weight = self.states.parameters.weight(group, run)
        if weight.device.type == "cpu":  # 16 bits travel, and nobody waits
            weight = weight.to(device, non_blocking=True)
        return weight.to(device, torch.float32)

    # -- gradients in -------------------------------------------------------------------------------------------

    def _gradient(
        self, group: GroupShard, run: Piece, shard: Tensor, step: StepValues, device: torch.device, scratch: Scratch
    ) -> Tensor:
        """The run's part of a reduced gradient, fp32, on ``device``, multiplied with the step's factor."""
        grad = self.states.parameters.grad(group, run, shard)
        if self.host_step is not None and device.type == "cpu" and grad.device.type != "cpu":
            grad = self.host_step.gradient(grad)
        # A simulation's tensors have a type of their own.
        if self._converts_in_scratch and type(grad) is Tensor and grad.device.type == "cpu":
            grad = scratch.fp32(grad)
        grad = grad.to(device, torch.float32)
        if step.factor is not None:
            grad = grad.mul_(step.factor)
        shared = grad.untyped_storage().data_ptr() == shard.untyped_storage().data_ptr()
        return grad.clone() if step.keeps_gradients and shared else grad

    @property
    def _converts_in_scratch(self) -> bool:
        """All updates run on a CPU, and on this thread."""
        return self.states.update_device.type == "cpu" and self.beside is None

    def in_fp32_on_cpu(self, shards: Shards) -> Shards:
        """The 16-bit gradients of a part as its update wants them, for the norm too: each is converted once. Those of a
        large part are left to the update, which converts some at a time."""
        given = [shard for shard in shards if shard is not None]
        on_cpu = self._converts_in_scratch and all(type(s) is Tensor and s.device.type == "cpu" for s in given)
        if not on_cpu or sum(shard.numel() for shard in given) > RUN_NUMEL:
            return shards
        return [None if shard is None else shard.float() for shard in shards]

    def _download_ahead(self, group: GroupShard, chunks: Sequence[Chunk], shards: Shards) -> Iterator[None]:
        """Where the host updates: at the n-th step, the gradient of the part after the n-th is on its way down."""
        host_step = self.host_step
        if host_step is None or any(self.states.device_of(chunk).type != "cpu" for chunk in chunks):
            return
        pieces = [piece for chunk in chunks for piece in chunk.pieces if shards[piece.member] is not None]
        for at, run in enumerate(run for piece in pieces for run in self._runs(piece)):
            shard = shards[run.member]
            assert shard is not None
            grad = self.states.parameters.grad(group, run, shard)
            if grad.device.type != "cpu":
                host_step.expect(grad)
            if at:
                yield

    # -- weights out --------------------------------------------------------------------------------------------

    def _publish_run(self, group: GroupShard, run: Piece, target: Tensor, step_number: int) -> None:
        """Write what the optimizer has made of ``run`` into the weight, unless that is what it changed."""
        parameters = self.states.parameters
        weight = parameters.weight(group, run)
        if target.data_ptr() == weight.data_ptr():
            return
        name = group.members[run.member].name
        generator = self._rounding_generator(f"{self.seed}:{step_number}:{name}:{run.start}", target.device)
        if self.host_step is not None and target.device.type == "cpu" and weight.device.type != "cpu":
            self.host_step.send_weight(weight, target, generator)
        else:
            parameters.write_weight(weight, target, generator)

    def _rounding_generator(self, what: str, device: torch.device) -> torch.Generator | None:
        """Seeded by what is rounded and when, so that a resumed run rounds alike, and one that updates in another order
        too."""
        if not self.states.precision.stochastic_rounding:
            return None
        generator = torch.Generator(device=device)
        generator.manual_seed(int.from_bytes(hashlib.blake2b(what.encode(), digest_size=8).digest(), "little") >> 1)
        return generator

    def finish(self) -> None:
        """See that what is computed from here on has the new weights."""
        if self.beside is not None:
            with self.waits.around("host_update"):
                self.beside.finish()
        if self.host_step is not None:
            self.host_step.finish()
        self.states.parameters.finish_writes()

    # -- the end of a step --------------------------------------------------------------------------------------

    def abandon(self) -> None:
        """Wait for the updates under way; what they made is not wanted."""
        if self.beside is not None:
            self.beside.abandon()

    def close(self) -> None:
        """Take no update any more. Called before the states' memory goes: a thread may still use it."""
        if self.beside is not None:
            self.beside.close()
        if self.host_step is not None:
            self.host_step.close()


class Scratch:
    """Memory of the CPU in which 16-bit gradients are fp32 while they are used: fresh memory would cost a page fault
    for every 1,024 of them, more than the conversion."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)
        self._used = 0

    def begin(self) -> None:
        """Use the memory again: what ``fp32`` gave before is not used any more."""
        self._used = 0

    def fp32(self, values: Tensor) -> Tensor:
        """``values`` in fp32, in their shape; what was converted is there until ``begin``."""
        if values.dtype == torch.float32:
            return values
        start, self._used = self._used, self._used + values.numel()
        if self._used > self._memory.numel():  # what was given out keeps the old memory
            self._memory = torch.empty(self._used)
        return self._memory[start : self._used].view(values.shape).copy_(values)
