"""Running any ``torch.optim.Optimizer`` on pieces of parameters whose states come and go.

Torch's optimizers read two attributes in ``step``: ``param_groups`` and ``state``. Here both are substituted for
the duration of a step by ones that hold the active pieces only, so one optimizer object serves all layer groups
and nothing of a class needs to be known in advance.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from hift_ds.errors import ConfigError

logger = logging.getLogger(__name__)

PieceState = dict[str, Any]  # as in Optimizer.state[param]: tensors, and small scalars such as "step"
# What a step keeps in its param_groups beside the options that it was made with, by param_group.
Extras = dict[int, dict[str, Any]]


def weights_are_fixed() -> ConfigError:
    """The error of an optimizer whose weights were changed after the engine was made."""
    return ConfigError(
        "the optimizer's parameters are fixed when the engine is made: give it all of them, and freeze what is to "
        "stay with requires_grad_(False) until it is to move"
    )


def states_are_the_engines() -> ConfigError:
    """The error of an optimizer to which states were given after the engine was made."""
    return ConfigError("optimizer.load_state_dict: states are restored by engine.load_checkpoint")


def refuse_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Refuse a step past the engine: a hook of an optimizer whose steps the engine makes."""
    raise ConfigError("optimizer.step() was called, and the engine has the gradients and states; call engine.step()")


def say_without_states(optimizer: torch.optim.Optimizer) -> None:
    """Warn of a ``state_dict`` without states: a hook of an optimizer whose states the engine has."""
    logger.warning("optimizer.state_dict() has no states, which the engine keeps; use engine.save_checkpoint")


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
    _groups: list[dict[str, Any]] = field(init=False)
    _members: list[list[int]] = field(init=False)  # ids of the weights by param_group
    _said_no_gradients: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        # An earlier engine has taken them.
        self.makes_states_in_constructor = len(self.base.state) > 0 or isinstance(self.base, torch.optim.Adagrad)
        self.base.state.clear()
        self._groups, self._members = self.base.param_groups, self._members_now()

    def begin_step(self) -> None:
        """See that the optimizer still has the weights that it had, and call the hooks that its user registered to be
        called before a step.

        Raises:
            ConfigError: it was changed in a way that has no effect.
        """
        base = self.base
        if has_replaced_step(base):
            raise ConfigError(
                "optimizer.step was replaced on the object and is not called; use register_step_post_hook"
            )
        if base.param_groups is not self._groups and any(base.state.values()):
            raise states_are_the_engines()
        self._groups = base.param_groups
        if self._members_now() != self._members:
            raise weights_are_fixed()
        own = [hook for hook in base._optimizer_step_pre_hooks.values() if hook is not refuse_step]
        hooks = [*_global_optimizer_pre_hooks.values(), *own]
        if hooks and not self._said_no_gradients:
            self._said_no_gradients = True
            logger.warning(
                "an optimizer's step_pre_hook finds no gradients, which the engine has taken; to change a gradient use "
                "the weight's own hook (register_hook)"
            )
        self._call(hooks)

    def end_step(self) -> None:
        """Call the hooks that the optimizer's user registered to be called after a step."""
        own = self.base._optimizer_step_post_hooks
        self._call([*own.values(), *_global_optimizer_post_hooks.values()])

    def _call(self, hooks: Sequence[Callable[..., Any]]) -> None:
        with torch.enable_grad():  # as where torch calls them
            for hook in hooks:
                hook(self.base, (self.base,), {})

    def _members_now(self) -> list[list[int]]:
        return [[id(param) for param in group["params"]] for group in self.base.param_groups]

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
            step_without_hooks(self.base)
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


def step_without_hooks(optimizer: torch.optim.Optimizer) -> None:
    """Step ``optimizer``; its hooks and torch's global ones are for whole steps."""
    step: Any = type(optimizer).step
    (step.__wrapped__ if getattr(step, "hooked", False) else step)(optimizer)


def has_replaced_step(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the object has a ``step`` that is not its class's; torch's schedulers put a wrapper there."""
    step: Any = vars(optimizer).get("step")
    if getattr(step, "__globals__", {}).get("__name__") == "torch.optim.lr_scheduler":
        step = step.__wrapped__
    return step is not None and getattr(step, "__func__", step) is not type(optimizer).step


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
