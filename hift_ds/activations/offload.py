"""Activations in page-locked host memory between forward and backward: TRL's offloading of saved tensors, without the
weights, and with its side stream.

TRL enters one context around forward and backward together. Here one is entered around each forward, and three things
are done otherwise: a forward whose graph is still to be used keeps its context, and the next one gets another, so that
losses of several forwards have one backward; leaving a forward makes no host wait; and ``close`` takes the hooks off
the head. The names that TRL does not document are used here alone (``tests/unit/test_activation_offload.py``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from hift_ds.errors import ConfigError

# Tensors of checkpointed blocks that are on the device while they are moved; each is a block's input.
IN_FLIGHT = 2
STASHES = ("fwd_stash", "bwd_tensor_stash", "bwd_ev_stash")  # device memory that TRL's context keeps


class ActivationOffload:
    """Offloads what the forwards of ``model`` save.

    Args:
        model: on an accelerator.
        recomputes: blocks are checkpointed, so that each saves one tensor and there is a block's time to move it.
    """

    def __init__(self, model: nn.Module, recomputes: bool) -> None:
        from trl.models.activation_offloading import OffloadActivations, get_act_offloading_ctx_manager

        before = {module: [set(table) for table in _hooks_of(module)] for module in model.modules()}
        in_flight: dict[str, Any] = {"max_fwd_stash_size": IN_FLIGHT} if recomputes else {}
        self._context = _without_warning(get_act_offloading_ctx_manager(model, warn_if_no_head=False, **in_flight))
        self._new_context = lambda: _without_warning(OffloadActivations(**in_flight))
        self._added = [
            (table, key)
            for module, there in before.items()
            for table, keys in zip(_hooks_of(module), there, strict=True)
            for key in table
            if key not in keys
        ]

    @contextlib.contextmanager
    def during_forward(self) -> Iterator[None]:
        """A context for one forward, whose graph may be used at any later time, or never."""
        if self._context.tracker:  # of a forward that has not had its backward; its graph keeps it
            before, self._context = self._context, self._new_context()
            self._context.s1, self._context.param_storages = before.s1, before.param_storages
        context = self._context
        context.__enter__()
        try:
            yield
        finally:
            context.s0.wait_stream(context.s1)  # then what the stashes hold may go
            for name in STASHES:
                getattr(context, name).clear()
            saved_tensors_hooks.__exit__(context)

    def close(self) -> None:
        """Leave the model as it was."""
        for table, key in self._added:
            table.pop(key, None)
        self._added = []


def _without_warning(context: Any) -> Any:
    """TRL's context, which does not warn in backward when more than 60 % of the host's memory is used: its logger is
    accelerate's, which is an error in a program that does not use accelerate, and one within torch's engine."""
    context.virtual_memory_safe_pct = 100
    return context


def _hooks_of(module: nn.Module) -> list[dict]:
    return [module._forward_pre_hooks, module._forward_hooks, module._forward_hooks_always_called]


def build_offload(model: nn.Module, recomputes: bool) -> ActivationOffload | None:
    """An :class:`ActivationOffload` for the model; ``None`` on the CPU.

    Raises:
        ConfigError: TRL is not installed.
    """
    if next(model.parameters()).device.type == "cpu":
        return None
    try:
        return ActivationOffload(model, recomputes)
    except ImportError:
        raise ConfigError(
            '"hift.activations.offload": true uses TRL\'s activation offloading, which is not installed; '
            "pip install trl, or set it to false"
        ) from None
