"""Muon for the matrices inside blocks, AdamW for everything else, as its author prescribes.

``torch.optim.Muon`` takes 2-D parameters only; a language model also has embeddings, a head, norms and biases.
This optimizer is torch's two, side by side over one list of param_groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from hift_ds.optim.piecewise import step_without_hooks

ALGORITHM = "algorithm"


class MuonWithAuxAdamW(torch.optim.Optimizer):
    """Muon for param_groups with ``algorithm: "muon"``, AdamW for those with ``"adamw"``.

    Args:
        muon_groups: param_groups of 2-D parameters.
        adamw_groups: param_groups of all others.
        muon: keyword arguments of ``torch.optim.Muon``.
        adamw: keyword arguments of ``torch.optim.AdamW``.
    """

    def __init__(
        self,
        muon_groups: Iterable[dict[str, Any]],
        adamw_groups: Iterable[dict[str, Any]],
        muon: dict[str, Any],
        adamw: dict[str, Any],
    ) -> None:
        self._parts: dict[str, torch.optim.Optimizer] = {}
        groups: list[dict[str, Any]] = []
        for name, cls, members, options in (
            ("muon", torch.optim.Muon, list(muon_groups), muon),
            ("adamw", torch.optim.AdamW, list(adamw_groups), adamw),
        ):
            if members:
                part = cls([{**group, ALGORITHM: name} for group in members], **options)
                self._parts[name] = part
                groups += part.param_groups
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # as torch's
        """Update every parameter that has a gradient; returns what ``closure`` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for name, part in self._parts.items():
            part.param_groups = [group for group in self.param_groups if group[ALGORITHM] == name]
            part.state = self.state
            step_without_hooks(part)
        return loss
