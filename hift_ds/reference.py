"""HiFT in plain torch on one process: the executable specification. Read this first.

Algorithm 1 of arXiv 2401.15207, with the points it leaves open decided as the engine decides them:

* one optimizer step per turn (``steps_per_group`` of them), then the next group; never per micro-batch;
* only the active group has ``requires_grad``, so backward stops at it and only its gradients exist;
* an optimizer state is kept for the whole run; Adam's step count is the parameter's own;
* the gradient norm is clipped over the active group;
* one learning rate per cycle;
* low-precision weights have an fp32 master, which the optimizer updates (the paper's Mixed^Hi).

``"update": "in_backward"`` is another order of the same arithmetic, so this file is its specification too: what a step
computes does not depend on when a part of the group is updated, except for clipping by less than the group's norm.

Everything is resident and nothing is fast. The engine is tested against this file step by step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hift_ds.schedule import GroupSchedule


class ReferenceHiFT:
    """Trains ``model`` in place.

    Args:
        model: any module; its weights may be fp32, bf16 or fp16.
        groups: bottom to top, the parameter names of each layer group.
        make_optimizer: called once with [(name, parameter to update)]; the parameters are the model's own when
            they are fp32 (or ``master_weights`` is off) and fp32 masters otherwise.
        rate: learning rate as a function of the optimizer step; ``None`` keeps the optimizer's.
        max_grad_norm: 0 for no clipping.
        clipping: by which norm: the group's (``"exact"``), the group's at its last visit (``"last_visit"``, at the
            first its own), or that of each part by itself (``"per_part"``).
        parts: of ``"per_part"``: the parameter names of each embedding, block and head.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Sequence[str]],
        make_optimizer: Callable[[list[tuple[str, nn.Parameter]]], torch.optim.Optimizer],
        *,
        order: str = "bottom2up",
        reshuffle: bool = False,
        seed: int = 0,
        steps_per_group: int = 1,
        rate: Callable[[int], float] | None = None,
        max_grad_norm: float = 0.0,
        master_weights: bool = True,
        clipping: str = "exact",
        parts: Sequence[Sequence[str]] = (),
    ) -> None:
        self.model = model
        self.weights = dict(model.named_parameters())
        self.groups = [list(names) for names in groups]
        self.schedule = GroupSchedule(len(groups), order, reshuffle, seed, steps_per_group)
        self.rate = rate
        self.max_grad_norm = max_grad_norm
        self.num_steps = 0
        self.clipping = clipping
        self.parts = [list(names) for names in parts]
        self.norm_at_last_visit: dict[int, Tensor] = {}

        self.updated: dict[str, nn.Parameter] = {}  # what the optimizer updates, by parameter name
        for name in (n for group in self.groups for n in group):
            weight = self.weights[name]
            needs_master = master_weights and weight.dtype != torch.float32
            self.updated[name] = nn.Parameter(weight.detach().float().clone()) if needs_master else weight
        self.optimizer = make_optimizer(list(self.updated.items()))

    def step(self, micro_batches: Sequence[Any], loss_of: Callable[[nn.Module, Any], Tensor]) -> float:
        """Make one optimizer step over ``micro_batches``, and return the mean loss before the update. ``loss_of(model,
        micro-batch)`` is 0-dim."""
        # 1. Unfreeze the active group only.
        active = self.groups[self.schedule.active]
        for name, weight in self.weights.items():
            weight.requires_grad_(name in active)
            weight.grad = None

        # 2. Accumulate its gradients, in fp32.
        grads: dict[str, Tensor] = {}
        total_loss = 0.0
        for batch in micro_batches:
            loss = loss_of(self.model, batch) / len(micro_batches)
            loss.backward()
            total_loss += float(loss.detach())
            for name in active:
                if (grad := self.weights[name].grad) is not None:
                    grads[name] = grads[name] + grad.float() if name in grads else grad.float()
                    self.weights[name].grad = None

        # 3. Clip and update. The optimizer skips parameters without a gradient, that is, all other groups.
        for name, grad in grads.items():
            self._take_over(name)
            self.updated[name].grad = grad.to(self.updated[name].dtype)
        if self.max_grad_norm > 0:
            self._clip(list(grads))
        if self.rate is not None and self.schedule.starts_cycle:
            for param_group in self.optimizer.param_groups:
                param_group["lr"] = self.rate(self.num_steps)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

        # 4. Weights from masters; rotate.
        with torch.no_grad():
            for name in grads:
                if self.updated[name] is not self.weights[name]:
                    self.weights[name].copy_(self.updated[name])
        self.num_steps += 1
        self.schedule.advance()
        return total_loss

    @torch.no_grad()
    def _take_over(self, name: str) -> None:
        """A 16-bit weight that is not the rounding of its master has been changed by hand: it is the master now."""
        master, weight = self.updated[name], self.weights[name]
        changed = master.to(weight.dtype) != weight
        master[changed] = weight[changed].to(master.dtype)

    def _clip(self, names: list[str]) -> None:
        if self.clipping == "per_part":
            for part in self.parts:
                together = [self.updated[name] for name in names if name in part]
                nn.utils.clip_grad_norm_(together, self.max_grad_norm)
            return
        params = [self.updated[name] for name in names]
        norm = nn.utils.get_total_norm([param.grad for param in params if param.grad is not None])
        if self.clipping == "last_visit":
            group = self.schedule.active
            before, self.norm_at_last_visit[group] = self.norm_at_last_visit.get(group, norm), norm
            norm = before
        nn.utils.clip_grads_with_norm_(params, self.max_grad_norm, norm)
