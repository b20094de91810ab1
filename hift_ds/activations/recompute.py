"""Recomputation of blocks ("activation checkpointing") that follows the active layer group.

Below the lowest active parameter nothing is kept for backward, so there is nothing to recompute: it stays
off there. At and above it blocks are recomputed in backward (arXiv 1604.06174), except the topmost ``blocks_kept``,
whose activations backward consumes first. So every group needs about the same memory, and only the lower ones pay
for it with a second forward.

The second forward of a block finds its buffers (running statistics, power iterations, averages) as the first one did,
and what it does to them is forgotten: else they would count its rows twice, and gradients be of another function.

Always torch's non-reentrant form. The reentrant one needs an input that requires a gradient, which transformers gives
it by ``enable_input_require_grads``; that would carry backward down to the embedding, whichever group is active.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class BlockRecompute:
    """Switches the recomputation of each block of ``model`` on and off.

    Args:
        blocks: bottom to top, the names of the modules of each block.
        blocks_kept: of the blocks at and above the active group, the topmost so many are not recomputed.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Sequence[str]], blocks_kept: int = 0) -> None:
        self.blocks_kept = blocks_kept
        modules = dict(model.named_modules())  # of a list of bare weights the blocks are no modules
        self._switches = [[_switch(modules[name]) for name in names if name in modules] for names in blocks]
        self.recomputed: range = range(0)  # of the blocks, by index; what ``from_block`` last chose

    def from_block(self, lowest: int) -> None:
        """Recompute from block ``lowest`` (0 if something below all blocks is active, their number for the head)."""
        num_blocks = len(self._switches)
        self.recomputed = range(lowest, max(lowest, num_blocks - self.blocks_kept))
        for index, switches in enumerate(self._switches):
            for switch in switches:
                switch(index in self.recomputed)

    def off(self) -> None:
        """Recompute nothing."""
        self.from_block(len(self._switches))


def _switch(module: nn.Module) -> Callable[[bool], None]:
    """A function that turns the recomputation of a block on or off."""
    block: Any = module  # what is set here torch does not declare
    run = functools.partial(checkpoint, use_reentrant=False)
    if buffers := _state_of(module):
        run = functools.partial(run, context_fn=lambda: (contextlib.nullcontext(), _BuffersAsBefore(buffers)))
    # transformers' layers know how, and drop their caches for it.
    if hasattr(block, "gradient_checkpointing"):
        block._gradient_checkpointing_func = run

        return lambda on: setattr(block, "gradient_checkpointing", on)
    forward = block.forward

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        return run(forward, *args, **kwargs) if block.training else forward(*args, **kwargs)

    def switch(on: bool) -> None:
        if on:
            block.forward = recomputed
        else:
            block.__dict__.pop("forward", None)

    return switch


def _state_of(block: nn.Module) -> list[tuple[dict[str, Tensor | None], str]]:
    """Where ``block`` has the buffers that its forward may change: the persistent ones, as others are tables. Whole
    numbers but counters are constants (quantized weights) and may be large."""
    return [
        (module._buffers, name)
        for module in block.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
        and name not in module._non_persistent_buffers_set
        and (buffer.is_floating_point() or buffer.numel() == 1)
    ]


class _BuffersAsBefore:
    """A context with copies of ``buffers`` as they were when this was made, in their places. The tensors themselves are
    left alone: backward may have them saved."""

    def __init__(self, buffers: Sequence[tuple[dict[str, Tensor | None], str]]) -> None:
        self._before = [(owner, name, _copy(owner[name])) for owner, name in buffers]
        self._now: list[Tensor | None] = []

    def __enter__(self) -> None:
        self._now = [owner[name] for owner, name, _ in self._before]
        for owner, name, value in self._before:
            owner[name] = _copy(value)  # a graph that is retained is recomputed again

    def __exit__(self, *error: object) -> None:
        for (owner, name, _), now in zip(self._before, self._now, strict=True):
            owner[name] = now


def _copy(buffer: Tensor | None) -> Tensor | None:
    return None if buffer is None else buffer.detach().clone()


def take_over_from_transformers(model: nn.Module) -> bool:
    """Turn off what ``gradient_checkpointing_enable()`` did, its gradients of inputs included. True if it was on."""
    was_on = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    if was_on:
        for module in model.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.__dict__["gradient_checkpointing"] = False
        disable = getattr(model, "disable_input_require_grads", None)
        if disable is not None and getattr(model, "_require_grads_hook", None) is not None:
            disable()
    return was_on
