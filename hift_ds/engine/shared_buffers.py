"""The buffers that a forward changes (running statistics, averages, counters) on several ranks: the first rank's count,
as with ``DistributedDataParallel``. Else each rank would keep those of its own rows, compute with them, and resume with
the first one's. DeepSpeed brings no buffer from one rank to another, not even when its engine is made."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from hift_ds.process_group import broadcast_from_first_rank, world_rank_and_size


class SharedBuffers:
    """Brings the buffers of a model to all ranks at the beginning of each step.

    Before the first step all of them, which ranks may have made with other random numbers. Then the persistent ones,
    which are what a checkpoint has; others are tables that are made once, or anew for the rows at hand (rotary
    frequencies that grow with the length), and must stay those of the rank's own rows.

    Args:
        model: whose forward changes them.
        device: where ranks talk to each other.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._modules = [module for module in model.modules() if module._buffers]
        self._device = device
        self._step = -1  # that has begun

    def before_forward(self, step: int) -> None:
        """Do so if this is the first forward of optimizer step ``step`` with gradients. All ranks call this."""
        if self._step == step or not torch.is_grad_enabled() or world_rank_and_size()[1] == 1:
            return
        for module, name, buffer in list(self._named(with_tables=self._step < 0)):
            module._buffers[name] = self._first_ranks(buffer)
        self._step = step

    def _named(self, with_tables: bool) -> Iterator[tuple[nn.Module, str, Tensor]]:
        for module in self._modules:
            for name, buffer in module._buffers.items():
                is_kept = with_tables or name not in module._non_persistent_buffers_set
                if is_kept and buffer is not None and buffer.numel() and not buffer.is_meta:
                    yield module, name, buffer

    @torch.no_grad()
    def _first_ranks(self, buffer: Tensor) -> Tensor:
        """``buffer`` with the first rank's values; another tensor if its elements do not lie one after the other."""
        there = buffer.to(self._device).contiguous()
        broadcast_from_first_rank(there.view(-1).view(torch.uint8))  # of any dtype
        if there is buffer or not buffer.is_contiguous():
            return there.to(buffer.device)
        return buffer.copy_(there)
