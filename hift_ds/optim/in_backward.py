"""The update in backward: each embedding, block and head of the active groups (a part) is updated as soon as its
gradients are complete, top to bottom, while backward goes on below.

At no time do the gradients and states of more than one part exist on the device (and what prefetching holds there), so
a group may be as large as the link to the states allows: all layers is exact full fine-tuning. LOMO (arXiv 2306.09782)
updates so without states; here it is any optimizer, on any number of ranks, and the same bits as after backward.

The order of updates, and so of collectives, is by position and never by arrival: ranks whose batches reach other
weights still meet. Which weights a backward will reach is read from the graph before it begins, and agreed on.

Which norm clips such updates, and what is kept until it is known, is in :mod:`hift_ds.optim.clip_in_backward`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hift_ds.collectives import join_norms_and_flags
from hift_ds.errors import ConfigError, HiFTError, TrainingError
from hift_ds.optim.autograd_graph import weights_below
from hift_ds.optim.backward_pass import Backward
from hift_ds.optim.clip import fp32_norm, grad_factor
from hift_ds.optim.clip_in_backward import ClippingRule, HeldBack
from hift_ds.optim.group_optimizer import GroupOptimizer
from hift_ds.optim.group_shard import GroupShard
from hift_ds.optim.group_update import StepValues
from hift_ds.optim.host_gradients import ROOM_BYTES, HostGradients, waiting_bytes

_SLOT_BYTES = 12  # of a parameter's states in a slot, with AdamW and masters


class InBackwardOptimizer(GroupOptimizer):
    """Updates each part of the active groups while backward goes on below it. Arguments are those of
    :class:`GroupOptimizer`, and:

    Args:
        clipping: by which norm gradients are clipped, and when: ``"exact"``, ``"speculative"``, ``"last_visit"`` or
            ``"per_part"``.
        sum_dtype: in which gradients of micro-batches are summed, in host memory.

    Raises:
        ConfigError: there is a loss scale, whose overflows could not be taken back.
    """

    updates_in_backward = True

    def __init__(
        self, *args: Any, clipping: str = "exact", sum_dtype: torch.dtype = torch.float32, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.scaler.active:
            raise ConfigError(
                '"hift.update": in_backward is not supported with a loss scale (float16), since an overflow could not '
                'be taken back; use bf16, or "update": "after_backward"'
            )
        self.clipping = ClippingRule(clipping, self.max_grad_norm)
        self._part_of = self._find_parts()
        device = next(iter(self._part_of)).device
        how = kwargs.get("pin_memory", True), kwargs.get("on_threads", True), self._room_for_gradients()
        self._sum_dtype = sum_dtype
        self.sums = HostGradients(device, sum_dtype, *how)  # by weight
        self.held_back = HeldBack(self.states, device, *how)
        self._unpublished: list[GroupShard] = []  # parts whose updates are still being made on the host
        self._accumulating = False  # a backward that is not the step's last is under way
        self._backward: Backward | None = None
        self._interrupted = ""
        self.parameters.sums.hooks.add(self._part_of, self._arrived)

    @property
    def clipping_line(self) -> str:
        return self.clipping.line

    def kept_on_host(self, group: GroupShard, micro_batches: int) -> int:
        """Bytes that a step of ``group`` (or a part) keeps in host memory on this rank beside states, at most: sums of
        micro-batches, gradients that wait for the norm or may be wanted again, and weights that an update is taken back
        with."""
        several = micro_batches > 1
        num_bytes = 0
        for member in group.members:
            num_bytes += self._sum_dtype.itemsize * member.whole_numel if several else 0
            if self.clipping.keeps_gradients:
                num_bytes += self._waiting_bytes(member.param, micro_batches) * member.numel
            if self.clipping.speculates:
                num_bytes += member.param.element_size() * member.numel  # at the first visit masters do not tell them
        return num_bytes

    def _waiting_bytes(self, param: nn.Parameter, micro_batches: int) -> int:
        return waiting_bytes(param.dtype, self._sum_dtype, micro_batches, self.parameters.ranks.world_size)

    def _room_for_gradients(self) -> int:
        """Bytes on the device of gradients that are leaving for host memory or coming back, besides those in use: who
        has the states of whole blocks there has room for so many, who has them in slices for little."""
        chunks = (chunk for part in self._part_of.values() for chunk in part.chunks)
        largest = max((sum(piece.numel for piece in chunk.pieces) for chunk in chunks), default=0)
        return min(_SLOT_BYTES * largest, ROOM_BYTES)

    # -- backward -----------------------------------------------------------------------------------------------

    def activate(self) -> None:
        self.check_whole()
        super().activate()

    @torch.no_grad()
    def begin_backward(self, loss: Tensor, step_loss: Tensor, is_boundary: bool, retain_graph: bool) -> None:
        """Read from the graph what the coming backward will reach. Called before each backward.

        Args:
            loss: what backward starts from.
            step_loss: of all micro-batches of the step so far.
            is_boundary: this backward ends the step: it updates.

        Raises:
            HiFTError: this backward cannot be followed, or comes after the one that has updated.
            TrainingError: the loss is not finite on some rank; nothing has changed.
        """
        if retain_graph:
            raise HiFTError(
                "backward(retain_graph=True): a second backward through this graph would meet updated weights; "
                'leave it out, or use "hift": {"update": "after_backward"}'
            )
        if self._backward is not None:
            raise HiFTError(
                "a second backward() before step(): the first has updated the weights; add the losses up, or call "
                "engine.set_gradient_accumulation_boundary(False) before all but the last"
            )
        self.parameters.sums.hooks.come_last()
        reached = weights_below(loss)
        self._accumulating = not is_boundary
        if is_boundary:
            self._begin(reached, step_loss)

    def _begin(self, reached: set[Tensor], step_loss: Tensor | None) -> None:
        groups = {group.index: group for group in self.active_groups}
        parts = sorted(
            (part for group in groups.values() for part in group.parts),
            key=lambda part: (part.height, part.index),
            reverse=True,
        )
        params = [member.param for part in parts for member in part.members]
        waiting = {param for param in params if param in reached and param.requires_grad}
        by_any = self._agree_before([param in waiting or self._has_gradient(param) for param in params], step_loss)
        ends = list(itertools.accumulate(len(part.members) for part in parts))
        last_norm = self.last_norms.get(self.schedule.active)
        self._backward = Backward(
            parts,
            [by_any[end - len(part.members) : end] for part, end in zip(parts, ends, strict=True)],
            [waiting & {member.param for member in part.members} for part in parts],
            waits=self.clipping.waits(last_norm),
            tries=self.clipping.tries(last_norm),
        )
        self.trials.begin(self._backward.tries)

    def _has_gradient(self, param: nn.Parameter) -> bool:
        """Whether earlier micro-batches have brought ``param`` one, or the caller has given it one in ``.grad``."""
        return self.sums.has(param) or self.parameters.pending(param) is not None

    def _agree_before(self, flags: list[bool], step_loss: Tensor | None) -> list[bool]:
        """Over ranks: which of ``flags`` are set on any; and that the loss is finite on all."""
        ranks, device = self.parameters.ranks, self._weight_device()
        good = torch.ones((), device=device) if step_loss is None else torch.isfinite(step_loss.to(device)).float()
        # The norm of 1 / sqrt(ranks) from each rank whose loss is finite is the root of their share.
        norm, root, flags = join_norms_and_flags(ranks, good / ranks.world_size**0.5, flags)
        root = float(norm) if root is None else root
        if num_bad := round(ranks.world_size * (1 - root**2)):
            self.drop_gradients()
            raise TrainingError(
                f"the loss is not finite on {num_bad} of {ranks.world_size} ranks (optimizer step "
                f"{self.num_applied + 1}): nothing was updated; lower the learning rate, or look at that batch"
            )
        return flags

    @torch.no_grad()
    def _arrived(self, param: nn.Parameter) -> None:
        """Autograd has added all that this backward brings ``param``."""
        grad, param.grad = param.grad, None
        if grad is None:  # the graph led here and brought nothing: a weight that was frozen after it was made, say
            return
        if self._accumulating:
            self.sums.add(param, grad)
            return
        backward = self._backward
        if backward is None:
            raise HiFTError('"hift.update": in_backward needs engine.backward(loss) in place of loss.backward()')
        index = next(i for i, part in enumerate(backward.parts) if part is self._part_of[param])
        if param not in backward.waiting[index]:
            raise HiFTError(
                f"{self._name_of(param)}: a gradient came that the graph did not promise (a backward within a "
                'backward); use "hift": {"update": "after_backward"}'
            )
        total = self.sums.take(param, grad.device)
        backward.consumed |= total is not None
        self._complete(backward, param, grad if total is None else total.add_(grad))
        backward.waiting[index].discard(param)
        while backward.num_done < backward.num_complete():
            self._take_part(backward)

    def _complete(self, backward: Backward, param: nn.Parameter, grad: Tensor) -> None:
        """The gradient of ``param`` is complete on this rank, and waits for the others of its part. One that ranks do
        not share and that waits for the norm has nothing to do with those: it leaves for host memory alone, so that
        the device never holds all of a part's, which as sums of micro-batches are fp32."""
        if not (backward.waits and self.parameters.ranks.world_size == 1) or self.skip_updates:
            self.parameters.set_pending(param, grad)
            return
        part = self._part_of[param]
        key = next(key for key, member in zip(part.keys, part.members, strict=True) if member.param is param)
        backward.norms[key] = fp32_norm(shard := grad.reshape(-1))
        self.held_back.park(key, shard)

    def _take_part(self, backward: Backward) -> None:
        """The next part's gradients are complete: reduce them, and update unless that waits for the norm."""
        part, reached = backward.parts[backward.num_done], backward.reached[backward.num_done]
        for member in part.members:  # summed up by earlier micro-batches, and not reached by the last
            if (total := self.sums.take(member.param, member.param.device)) is not None:
                backward.consumed = True
                self._complete(backward, member.param, total)
        keys = part.keys
        with self.waiting_for_ranks():
            shards, present = self.parameters.reduce(part)
        if self.parameters.ranks.world_size == 1:
            present = [here or key in backward.norms for here, key in zip(present, keys, strict=True)]  # it has left
            reached = backward.reached[backward.num_done] = present
        backward.num_done += 1
        shards = [shard if flag else None for shard, flag in zip(shards, reached, strict=True)]
        waits = backward.waits or backward.tries or self.skip_updates
        used = shards if waits else self.updates.in_fp32_on_cpu(shards)
        for key, shard, converted, here in zip(keys, shards, used, present, strict=True):
            backward.present[key] = here
            if shard is not None:
                backward.norms[key] = fp32_norm(shard, None if converted is shard else converted)
        shards = used
        if self.skip_updates:
            return
        if backward.waits or backward.tries:
            for key, shard in zip(keys, shards, strict=True):
                if shard is not None:
                    self.held_back.park(key, shard)
        if backward.waits:
            return
        self.parameters.begin_part(part)
        if backward.tries:
            self.held_back.before_trial(part, shards)
        self.update_part(part, shards, self._factor_now(backward, part))

    def update_part(self, part: GroupShard, shards: list[Tensor | None], factor: Tensor | None) -> None:
        """Bring the part's states in, update it, and send states and weights out; autograd is told that the weights
        have changed."""
        backward = self._backward
        assert backward is not None
        if not backward.rates:
            backward.rates = list(self._rates())
        backward.num_updated += 1
        below = backward.parts[backward.num_updated :]
        values = StepValues(self.num_applied, backward.rates, factor, keeps_gradients=backward.tries)
        changed = self.updates.update(part, shards, values, below)
        before = backward.changed.setdefault(part.index, {})
        backward.changed[part.index] = {**changed, **before}  # the topmost part's last, as after backward
        if self.updates.beside is not None and not self.parameters.whole_tensors:
            self._unpublished.append(part)  # which chunks the host has differs from rank to rank: all later, in order
        else:
            if self.parameters.ranks.world_size > 1 or self.updates.beside is not None:
                self.updates.finish()
            with self.waiting_for_ranks():
                self.parameters.publish(part)
        for member, shard in zip(part.members, shards, strict=True):
            if shard is not None or self.parameters.ranks.world_size > 1:
                torch.autograd.graph.increment_version(member.param)

    def _finish_updates(self) -> None:
        """The host has made its part of the updates so far, and all ranks have them."""
        self.updates.finish()
        for part in self._unpublished:
            with self.waiting_for_ranks():
                self.parameters.publish(part)
        self._unpublished.clear()

    @torch.no_grad()
    def end_backward(self, is_boundary: bool) -> None:
        """End a micro-batch's backward."""
        self._accumulating = False
        if is_boundary and self._backward is not None:
            self._finish_parts(self._backward)
        self.parameters.end_backward()

    def _finish_parts(self, backward: Backward) -> None:
        while backward.num_done < len(backward.parts):
            self._take_part(backward)

    def backward_failed(self, error: BaseException) -> None:
        """Give up a backward that an error has ended.

        Raises:
            HiFTError: weights had been updated already: this run can only go on from a checkpoint.
        """
        backward, self._backward = self._backward, None
        if backward is None:
            return
        if not backward.num_updated and not backward.consumed:  # as if it had not begun: earlier sums stay
            self.held_back.clear()
            self.parameters.drop_grads(self.groups.values())
            return
        self._interrupted = (
            f"backward of optimizer step {self.num_applied + 1} failed after {backward.num_updated} of "
            f"{len(backward.parts)} parts were updated "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}); go on from load_checkpoint()"
        )
        if "modified by an inplace operation" in str(error):
            self._interrupted += (
                ', with "hift": {"update": "after_backward"}: this graph needs a weight after its gradient is complete'
            )
        if isinstance(error, Exception):
            raise HiFTError(self._interrupted) from error

    def check_whole(self) -> None:
        if self._interrupted:
            raise HiFTError(self._interrupted)

    # -- clipping -----------------------------------------------------------------------------------------------

    def _end_trial(self, backward: Backward, factor: Tensor | None) -> None:
        """The norm is known: let the updates stand, or take them all back and make them again, clipped."""
        self._finish_updates()
        started = time.perf_counter()
        if self._stands(factor):
            self.held_back.let_stand(backward.parts)
            return
        self.held_back.take_back(backward.parts)
        backward.num_updated, backward.changed = 0, {}
        self._update_parked(backward, factor)
        self._finish_updates()
        self.trials.undo(time.perf_counter() - started)

    @staticmethod
    def _stands(factor: Tensor | None) -> bool:
        """Whether an update by unclipped gradients is the one that ``factor`` wants."""
        return factor is None or float(factor) == 1.0

    def _factor_now(self, backward: Backward, part: GroupShard) -> Tensor | None:
        """The factor of the gradients of ``part``, where that is known before the norm of the step is."""
        if not self.clipping.is_on or backward.tries:
            return None
        device = self._weight_device()
        if self.clipping.mode == "last_visit":
            norm = torch.tensor(self.last_norms[self.schedule.active], dtype=torch.float32, device=device)
        else:
            norms = [backward.norms[key] for key in part.keys if key in backward.norms]
            norm, *_ = self._norm_over_ranks(norms, [])
        return grad_factor(norm, self.max_grad_norm, 1.0)

    def _norm_over_ranks(
        self, norms: list[Tensor], flags: list[bool | Tensor]
    ) -> tuple[Tensor, float | None, list[bool]]:
        """The norm of ``norms``, all ranks' together, its value if it was read, and for each flag whether it is set on
        any."""
        device = self._weight_device()
        norm = torch.linalg.vector_norm(torch.stack(norms)).to(device) if norms else torch.zeros((), device=device)
        return join_norms_and_flags(self.parameters.ranks, norm, flags)

    # -- the end of a step --------------------------------------------------------------------------------------

    def reduce_gradients(self) -> None:
        """Do nothing: ``end_backward`` has."""

    @torch.no_grad()
    def step(self) -> bool:
        """End the step: 1. agree on the norm; 2. update what has waited for it; 3. count and rotate."""
        self.check_whole()
        if self.skip_updates:
            self.drop_gradients()
            return False
        if self._backward is None:  # no backward: every rank does the same nothing
            self._begin(set(), None)
        backward = self._backward
        assert backward is not None
        self._finish_parts(backward)
        self.flags.end_step()
        norm = self._agree_after(backward)
        if backward.waits:
            self._update_parked(backward, grad_factor(norm, self.max_grad_norm, 1.0))
        elif backward.tries:
            self._end_trial(backward, grad_factor(norm, self.max_grad_norm, 1.0))
        if self.clipping.looks_back:
            self.last_norms[self.schedule.active] = self.grad_norm
        self._finish_updates()
        self.states.end_writing()
        for index, changed in backward.changed.items():
            self.states.extras[index] |= changed
        for part, reached in zip(backward.parts, backward.reached, strict=True):
            for (group, i), flag in zip(part.keys, reached, strict=True):
                self.num_updates[group][i] += flag
        self._backward = None
        self.num_applied += 1
        self.schedule.advance()
        first, *others = reversed(self.groups[self.schedule.active].parts)
        self.states.prefetch(first, then=others)
        self.states.piecewise.end_step()
        return True

    def _agree_after(self, backward: Backward) -> Tensor:
        """The norm over all ranks; and that backward has brought what the graph promised."""
        in_order = [key for group in self.active_groups for key in group.keys]
        norms = [backward.norms[key] for key in in_order if key in backward.norms]
        asked = self.ask()
        norm, value, present = self._norm_over_ranks(norms, [*(backward.present[key] for key in in_order), *asked])
        self.answers = dict(zip(sorted(self.questions), present[len(in_order) :], strict=True))
        self.grad_norm = float(norm) if value is None else value
        reached = {
            key: flag
            for part, flags in zip(backward.parts, backward.reached, strict=True)
            for key, flag in zip(part.keys, flags, strict=True)
        }
        for (group, i), flag in zip(in_order, present, strict=False):
            if reached[group, i] and not flag:  # on several ranks it has been updated as if by a gradient of zeros
                self._interrupted = (
                    f"{self.groups[group].members[i].name}: the graph leads to it and backward brought no gradient, on "
                    'any rank; go on from load_checkpoint(), with "hift": {"update": "after_backward"}'
                )
                raise HiFTError(self._interrupted)
        return norm

    def _update_parked(self, backward: Backward, factor: Tensor | None) -> None:
        for part in backward.parts:
            self.parameters.begin_update(part)
            self.held_back.restore_weights(part)
            self.update_part(part, self.held_back.take_gradients(part, self._weight_device()), factor)

    def take_gradient_traffic(self) -> tuple[int, int]:
        kept = (self.sums, self.held_back.gradients, self.held_back.weights)
        taken = [tensors.traffic.take() for tensors in kept]
        for traffic in taken:
            for cause, seconds in traffic.waits.items():
                self.waits.traffic.waited(cause, seconds)
        return sum(traffic.bytes_out for traffic in taken), sum(traffic.bytes_in for traffic in taken)

    # -- bookkeeping --------------------------------------------------------------------------------------------

    def regroup(self, groups: Mapping[int, GroupShard]) -> None:
        super().regroup(groups)
        self._part_of = self._find_parts()

    def _find_parts(self) -> dict[nn.Parameter, GroupShard]:
        parts = [part for group in self.groups.values() for part in group.parts]
        return {member.param: part for part in parts for member in part.members}

    @property
    def is_mid_step(self) -> bool:
        return self._backward is not None

    def pending(self, param: nn.Parameter) -> Tensor | None:
        return self.sums.get(param)

    def set_pending(self, param: nn.Parameter, grad: Tensor) -> None:
        self.sums.set(param, grad)

    def drop_gradients(self) -> None:
        self._backward, self._interrupted = None, ""
        self._unpublished.clear()
        super().drop_gradients()

    def zero_grad(self, set_to_none: bool = True) -> None:
        if self._backward is None:
            self.sums.clear()
            self.held_back.clear()
        super().zero_grad(set_to_none)

    def end_training(self, keep_states: bool = False) -> None:
        super().end_training(keep_states)
        self.sums.close()
        self.held_back.close()

    def _name_of(self, param: nn.Parameter) -> str:
        return next(member.name for member in self._part_of[param].members if member.param is param)
