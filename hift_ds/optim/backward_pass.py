"""How far the backward pass has come that ends a step and updates weights on its way."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from hift_ds.optim.group_shard import GroupShard
from hift_ds.optim.piecewise import Extras


@dataclass
class Backward:
    """The backward pass that ends a step: how far it has come.

    Attributes:
        parts: of the active groups, top to bottom.
        reached: by part and member, whether any rank's graph leads to it, or an earlier micro-batch's has.
        waiting: by part, the weights whose gradients are still to come on this rank.
        passed: by part, whether backward passes it on this rank, as far as its gradients tell.
        num_done: parts whose gradients have been taken.
        num_updated: parts whose weights have changed.
        norms: by (group, position of the member), of this rank's shard of the gradient.
        present: by (group, position), whether backward brought a gradient here.
        changed: by group, see ``GroupUpdates.update``.
        rates: per param_group, from the first update on.
        consumed: gradients of earlier micro-batches have been added in, which cannot be done twice.
        waits: updates are made when the norm is known.
        tries: updates are made in backward as if nothing were clipped, and may be taken back.
    """

    parts: list[GroupShard]
    reached: list[list[bool]]
    waiting: list[set[nn.Parameter]]
    passed: list[bool] = field(init=False)
    num_done: int = 0
    num_updated: int = 0
    norms: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    present: dict[tuple[int, int], bool] = field(default_factory=dict)
    changed: dict[int, Extras] = field(default_factory=dict)
    rates: list[float] = field(default_factory=list)
    consumed: bool = False
    waits: bool = False
    tries: bool = False

    def __post_init__(self) -> None:
        self.passed = [bool(params) for params in self.waiting]

    def num_complete(self) -> int:
        """Parts, from the top, whose gradients are complete. One without any here counts when one below it does: its
        weights may be constants of this graph, which backward needs until it has come by."""
        complete = self.num_done
        for index in range(self.num_done, len(self.parts)):
            if self.waiting[index]:
                break
            if self.passed[index]:
                complete = index + 1
        return complete
