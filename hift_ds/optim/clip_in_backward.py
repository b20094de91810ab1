"""Clipping where updates are made in backward, before the norm of the step is known (the norm itself is in
:mod:`hift_ds.optim.clip`, the step in :mod:`hift_ds.optim.in_backward`).

:class:`ClippingRule` says which norm clips, and whether updates wait for it, are made on trial, or need not wait.
:class:`HeldBack` has what the first two keep in host memory until it is known: gradients, and weights that an update on
trial is taken back with. (States are held where they rest: ``GroupStates.hold``.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hift_ds.config import HiFTConfig, sum_dtype
from hift_ds.dtypes import torch_dtype
from hift_ds.optim.group_shard import GroupShard
from hift_ds.optim.group_states import GroupStates
from hift_ds.optim.host_gradients import HostGradients, waiting_bytes

_NORMS = {  # by which gradients are clipped
    "exact": "the norm of the step, for which updates wait until backward has ended",
    "speculative": "the norm of the step; updates are made in backward, and taken back and made again where it says so",
    "last_visit": "the norm that the group had when it was last trained, not by this step's (a first visit waits for "
    "its own)",
    "per_part": "the norm of each embedding, block and head, not by the step's",
}


def parked_bytes(
    hift: HiFTConfig, config: Mapping[str, Any], max_grad_norm: float, weight: torch.dtype, micro_batches: int,
    num_ranks: int,
) -> int | None:  # fmt: skip
    """What of a step waits until backward has ended: bytes of an element of a gradient that rests in host memory until
    then; 0 if it is on the device, and only its update comes then; ``None`` if updates are made in backward.

    Args:
        config: DeepSpeed's.
        max_grad_norm: 0 for no clipping.
        weight: dtype of the weights.
        micro_batches: of a step.
    """
    if hift.update == "after_backward":
        return 0
    if not ClippingRule(hift.clipping, max_grad_norm).always_waits:
        return None
    return waiting_bytes(weight, torch_dtype(sum_dtype(config)), micro_batches, num_ranks)


@dataclass(frozen=True)
class ClippingRule:
    """Which norm gradients are clipped by, and what of a step must wait for it.

    Attributes:
        mode: ``"exact"``, ``"speculative"``, ``"last_visit"`` or ``"per_part"``.
        max_grad_norm: 0 for no clipping.
    """

    mode: str
    max_grad_norm: float

    @property
    def is_on(self) -> bool:
        """True if gradients are clipped."""
        return self.max_grad_norm > 0

    @property
    def speculates(self) -> bool:
        """True if some updates are made on trial."""
        return self.is_on and self.mode == "speculative"

    @property
    def keeps_gradients(self) -> bool:
        """True if some gradients are kept until the norm of the step is known."""
        return self.is_on and self.mode != "per_part"

    @property
    def always_waits(self) -> bool:
        """Every update waits until backward has ended."""
        return self.is_on and self.mode == "exact"

    @property
    def looks_back(self) -> bool:
        """True if the norm of a group's last visit is asked for."""
        return self.mode in ("last_visit", "speculative")

    @property
    def line(self) -> str:
        """The rule in a sentence; empty without clipping."""
        if not self.is_on:
            return ""
        return f"clipping {self.mode}: gradients are scaled down to {self.max_grad_norm:g} by {_NORMS[self.mode]}"

    def tries(self, last_norm: float | None) -> bool:
        """Whether updates are made before the norm is known: where the group's last visit was not clipped, as most are
        not that follow such a one. The others wait, since a second update costs more.

        Args:
            last_norm: of the group's gradients when it was last trained; ``None``: it has not been.
        """
        return self.speculates and last_norm is not None and last_norm <= self.max_grad_norm

    def waits(self, last_norm: float | None) -> bool:
        """Whether updates wait until backward has ended.

        Args:
            last_norm: as for :meth:`tries`.
        """
        if self.mode == "speculative":
            return self.is_on and not self.tries(last_norm)
        return self.always_waits or (self.is_on and self.mode == "last_visit" and last_norm is None)


class HeldBack:
    """What a step keeps in host memory until its norm is known. Empty between steps.

    Args:
        states: of the parts that are updated.
        device: where gradients come from and weights are.
        pin_memory, on_threads: as for :class:`GroupOptimizer`.
        room_bytes: as for :class:`HostGradients`.

    Attributes:
        gradients: this rank's shards, by (group, position of the member).
        weights: as they were before an update on trial, by (chunk, position of the piece); those that states do not
            tell.
    """

    def __init__(
        self, states: GroupStates, device: torch.device, pin_memory: bool, on_threads: bool, room_bytes: int
    ) -> None:
        self.states = states
        self.gradients = HostGradients(device, None, pin_memory, on_threads, room_bytes)
        self.weights = HostGradients(device, None, pin_memory, on_threads, room_bytes)

    def park(self, key: tuple[int, int], shard: Tensor) -> None:
        """Keep a gradient (a flat shard) for an update that waits or may be made again.

        Args:
            key: (group, position of the member).
        """
        self.gradients.add(key, shard, is_ours=True)

    def take_gradients(self, part: GroupShard, device: torch.device) -> list[Tensor | None]:
        """Give back what was parked of ``part``, by member, as it was, on ``device``, and forget it here."""
        taken = {key: self.gradients.take(key, device) for key in self.gradients.in_order(part.keys)}
        return [taken.get(key) for key in part.keys]

    def before_trial(self, part: GroupShard, shards: Sequence[Tensor | None]) -> None:
        """Keep what an update of ``part`` by ``shards`` is taken back with, its states among it."""
        parameters = self.states.parameters
        parameters.held([])  # weights in host memory are there: what was on its way has come
        for chunk in part.chunks:
            for i, piece in enumerate(chunk.pieces):
                param = part.members[piece.member].param
                told = self.states.tells_weight(chunk, i) and not self.states.may_be_changed(param)
                if shards[piece.member] is not None and not told:
                    weight = parameters.weight(part, piece)
                    on_host = weight.device.type == "cpu"  # else the copy leaves while the update is under way
                    self.weights.add((chunk.id, i), weight if on_host else weight.clone())
        self.states.hold(part)

    def let_stand(self, parts: Iterable[GroupShard]) -> None:
        """Let the updates of ``parts`` on trial stand: what they would be taken back with goes."""
        for part in parts:
            self.states.release(part)
        self.gradients.forget()
        self.weights.forget()

    def take_back(self, parts: Iterable[GroupShard]) -> None:
        """The states of ``parts`` are again what they were before the trial; weights that they do not tell are brought
        back by :meth:`restore_weights`."""
        for part in parts:
            self.states.take_back(part)
        self.states.end_writing()  # of the trial

    def restore_weights(self, part: GroupShard) -> None:
        """The weights of ``part`` are what they were before the trial, as far as they were kept; else nothing
        happens."""
        parameters = self.states.parameters
        if len(self.weights):
            parameters.held([])
        for chunk in part.chunks:
            for i, piece in enumerate(chunk.pieces):
                weight = parameters.weight(part, piece)
                before = self.weights.take((chunk.id, i), weight.device)
                if before is not None:
                    weight.copy_(before.view(piece.shape))

    def clear(self) -> None:
        """Forget everything. A trial that an error has ended stands as far as it came."""
        for group in self.states.groups.values():
            self.states.release(group)
        self.gradients.clear()
        self.weights.clear()

    def close(self) -> None:
        """Take nothing any more."""
        self.gradients.close()
        self.weights.close()
