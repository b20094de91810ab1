"""Running any ``torch.optim.Optimizer`` on pieces of parameters whose states come and go.

Torch's optimizers read two attributes in ``step``: ``param_groups`` and ``state``. Here both are substituted for
the duration of a step by ones that hold the active pieces only, so one optimizer object serves all layer groups
and nothing of a class needs to be known in advance.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hift_ds.errors import ConfigError

PieceState = dict[str, Any]  # as in Optimizer.state[param]: tensors, and small scalars such as "step"
# What a step keeps in its param_groups beside the options that it was made with, by param_group.
Extras = dict[int, dict[str, Any]]


@dataclass
class PieceUpdate:
    """One piece to update."""

    target: Tensor  # fp32, changed in place
    grad: Tensor  # like target
    param_group: int
    state: PieceState | None  # None: never updated before; filled by the step


@dataclass
class PiecewiseOptimizer:
    """Steps ``base`` on given pieces.

    Args:
        base: built over the whole model's parameters; its ``param_groups`` are the user's and are not touched.
    """

    base: torch.optim.Optimizer
    makes_states_in_constructor: bool = field(init=False)

    def __post_init__(self) -> None:
        self.makes_states_in_constructor = len(self.base.state) > 0  # Adagrad
        self.base.state.clear()

    def step(
        self,
        pieces: Sequence[PieceUpdate],
        rates: Sequence[float],
        extras: Extras,
    ) -> Extras:
        """Update ``pieces`` in place.

        Args:
            rates: learning rate per param_group.
            extras: what earlier steps have kept in the param_groups.

        Returns:
            What this step has kept there anew or otherwise.
        """
        state: defaultdict[Tensor, PieceState] = defaultdict(dict)
        groups = [
            {**self._options(index), **extras.get(index, {}), "lr": rates[index], "params": []}
            for index in range(len(self.base.param_groups))
        ]
        params = []
        for piece in pieces:
            param = nn.Parameter(piece.target)
            param.grad = piece.grad
            if piece.state is not None:
                state[param] = piece.state
            elif self.makes_states_in_constructor:
                state[param] = self._constructed_state(param, groups[piece.param_group])
            groups[piece.param_group]["params"].append(param)
            params.append(param)
        before = [dict(group) for group in groups]
        with self._substituted([g for g in groups if g["params"]], state):
            type(self.base).step(self.base)
        # What torch's schedulers look for; they wrap ``base.step``, which is not called.
        self.base._opt_called = True  # type: ignore[attr-defined]  # torch sets it without declaring it
        for piece, param in zip(pieces, params, strict=True):
            piece.state = state[param]
        return {
            i: changed for i, g in enumerate(groups) if (changed := _changed(before[i], g, type(self.base).__name__))
        }

    def elementwise_keys(self, device: torch.device) -> dict[str, torch.dtype]:
        """State keys with one entry per weight, found by stepping a 3-element parameter (learning rate 0)."""
        probe = PieceUpdate(torch.zeros(3, device=device), torch.ones(3, device=device), 0, None)
        self.step([probe], [0.0] * len(self.base.param_groups), {})
        assert probe.state is not None
        return {k: v.dtype for k, v in probe.state.items() if isinstance(v, Tensor) and v.shape == (3,)}

    def placed(self, key: str, value: Any, param_group: int, device: torch.device) -> Any:
        """A saved state scalar where ``Optimizer.load_state_dict`` puts it: tensors on the device, the step count only
        for kernels that read it there."""
        if not isinstance(value, Tensor):
            return value
        options = self.base.param_groups[param_group]
        on_device = key != "step" or options.get("fused") or options.get("capturable")
        return value.to(device) if on_device else value

    def _options(self, index: int) -> dict[str, Any]:
        return {k: v for k, v in self.base.param_groups[index].items() if k != "params"}

    def _constructed_state(self, param: nn.Parameter, group: dict[str, Any]) -> PieceState:
        accepted = inspect.signature(type(self.base).__init__).parameters
        options = {k: v for k, v in group.items() if k in accepted and k != "params"}
        return type(self.base)([param], **options).state[param]

    @contextlib.contextmanager
    def _substituted(self, groups: list[dict[str, Any]], state: defaultdict[Tensor, PieceState]) -> Iterator[None]:
        base = self.base
        saved = base.param_groups, base.state
        base.param_groups, base.state = groups, state
        try:
            yield
        finally:
            base.param_groups, base.state = saved


def _changed(before: dict[str, Any], after: dict[str, Any], name: str) -> dict[str, Any]:
    """Scalars that a step wrote into its param_group (a step count, say): they belong to the layer group."""
    changed = {}
    for key, value in after.items():
        if key in ("params", "lr") or (key in before and (value is before[key] or value == before[key])):
            continue
        if not isinstance(value, int | float | bool | str):
            raise ConfigError(
                f'"optimizer": {name} keeps {key!r} ({type(value).__name__}) in its param_groups; not supported'
            )
        changed[key] = value
    return changed
