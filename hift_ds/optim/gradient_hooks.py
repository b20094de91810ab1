"""Functions that autograd calls when it has added a gradient to a weight, after everybody else's."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn
from torch.utils.hooks import RemovableHandle

Hook = Callable[[nn.Parameter], None]


class GradientHooks:
    """Post-accumulate-grad hooks that take gradients off their weights: whoever else has such a hook, made before ours
    or later, must find the gradient in ``.grad`` and may change it there."""

    def __init__(self) -> None:
        self._handles: dict[nn.Parameter, list[RemovableHandle]] = {}

    def add(self, params: Iterable[nn.Parameter], hook: Hook) -> None:
        """Call ``hook`` with each of ``params``, which are trained, that has got a gradient, after the hooks added here
        before."""
        for param in params:
            self._handles.setdefault(param, []).append(param.register_post_accumulate_grad_hook(hook))

    def come_last(self) -> None:
        """Go behind the hooks that others have made since."""
        for param, handles in self._handles.items():
            hooks = param._post_accumulate_grad_hooks
            assert hooks is not None
            ours = [handle.id for handle in handles]
            if list(hooks)[-len(ours) :] != ours:
                for key in ours:
                    hooks[key] = hooks.pop(key)

    def remove(self) -> None:
        """Call nothing any more."""
        for handles in self._handles.values():
            for handle in handles:
                handle.remove()
