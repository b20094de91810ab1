"""``requires_grad`` of a model's weights: the caller's between steps, the active groups' from forward to backward.

HiFT needs the flag for itself: backward stops at the lowest weight that has it. Whoever looks at the model between
two steps (a callback that freezes a block, a count of trainable weights, the next trainer) must find the flags that
they set, and what they change there must count.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

from torch import nn

from hift_ds.errors import ConfigError


class TrainableFlags:
    """Changes ``requires_grad`` of ``model`` and gives it back.

    Args:
        model: with the flags that its owner set.

    Attributes:
        shown: the caller's flags are in place.
        step_began: the coming step has had a forward.
    """

    def __init__(self, model: nn.Module) -> None:
        self.shown = True
        self._names: Mapping[nn.Parameter, str] = {p: name for name, p in model.named_parameters()}
        self._wanted = {param: param.requires_grad for param in self._names}  # by the caller
        self._trainable = {param for param, flag in self._wanted.items() if flag}
        self._of_this_step = dict(self._wanted)
        self.step_began = False

    def take(self, active: Iterable[nn.Parameter]) -> None:
        """Give ``active`` weights alone the flag from now on, without those that the caller has frozen. What the caller
        changed since ``show`` counts from the next step on, so that no step has half of its micro-batches' gradients.

        Raises:
            ConfigError: the caller unfroze a weight that is in no layer group.
        """
        if self.shown:
            self._read_changes()
        if not self.step_began:
            self._of_this_step, self.step_began = dict(self._wanted), True
        wanted = {param for param in active if self._of_this_step[param]}
        for param in self._names:
            if param.requires_grad is not (param in wanted):
                param.requires_grad_(param in wanted)
        self.shown = False

    def show(self) -> None:
        """Put the caller's flags in place."""
        if self.shown:
            return
        for param, flag in self._wanted.items():
            if param.requires_grad is not flag:
                param.requires_grad_(flag)
        self.shown = True

    @contextlib.contextmanager
    def shown_on_error(self) -> Iterator[None]:
        """Put the caller's flags in place if this block fails, by Ctrl-C too: nobody may call destroy."""
        try:
            yield
        except BaseException:
            self.show()
            raise

    def end_step(self) -> None:
        """Note that the gradients so far are used up."""
        self.step_began = False

    def _read_changes(self) -> None:
        changed = [p for p, flag in self._wanted.items() if p.requires_grad is not flag]
        unknown = [self._names[p] for p in changed if p not in self._trainable]
        if unknown:
            raise ConfigError(
                f"{unknown[0]}: requires_grad was set after the engine was made, and no layer group has this weight "
                f"({len(unknown)} such): unfreeze it before, or destroy the engine and make a new one"
            )
        for param in changed:
            self._wanted[param] = param.requires_grad


def containers_of(model: nn.Module, groups: Iterable[Iterable[nn.Parameter]]) -> list[nn.Module]:
    """The modules below ``model`` that hold weights of several ``groups``: where a forward may enter the model."""
    group_of = {param: index for index, params in enumerate(groups) for param in params}
    return [
        module
        for module in model.modules()
        if module is not model
        and not isinstance(module, nn.ModuleList | nn.ModuleDict)
        and len({group_of[p] for p in module.parameters() if p in group_of}) > 1
    ]
