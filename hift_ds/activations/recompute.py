"""Recomputation of blocks ("activation checkpointing") that follows the active layer group.

Below the lowest active parameter nothing is kept for backward, so there is nothing to recompute: it stays
off there. At and above it blocks are recomputed in backward (arXiv 1604.06174), except the topmost ``blocks_kept``,
whose activations backward consumes first. So every group needs about the same memory, and only the lower ones pay
for it with a second forward.

Always torch's non-reentrant form. The reentrant one needs an input that requires a gradient, which transformers gives
it by ``enable_input_require_grads``; that would carry backward down to the embedding, whichever group is active.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

_checkpoint = functools.partial(checkpoint, use_reentrant=False)


class BlockRecompute:
    """Switches the recomputation of each block of ``model`` on and off.

    Args:
        blocks: bottom to top, the names of the modules of each block.
        blocks_kept: of the blocks at and above the active group, the topmost so many are not recomputed.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Sequence[str]], blocks_kept: int = 0) -> None:
        self.blocks_kept = blocks_kept
        self._switches = [[_switch(model.get_submodule(name)) for name in names] for names in blocks]
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
    # transformers' layers know how, and drop their caches for it.
    if hasattr(block, "gradient_checkpointing"):
        block._gradient_checkpointing_func = _checkpoint

        return lambda on: setattr(block, "gradient_checkpointing", on)
    forward = block.forward

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        return _checkpoint(forward, *args, **kwargs) if block.training else forward(*args, **kwargs)

    def switch(on: bool) -> None:
        if on:
            block.forward = recomputed
        else:
            block.__dict__.pop("forward", None)

    return switch


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
