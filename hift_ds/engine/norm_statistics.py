"""The running statistics of batch norm on several ranks: the first rank's count, as with ``DistributedDataParallel``.
Else each rank would keep those of its own rows, evaluate with them, and resume with the first one's."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from hift_ds.process_group import broadcast_from_first_rank


class NormStatistics:
    """Brings the buffers of a model's batch norms to all ranks at the beginning of each step.

    Args:
        model: whose forward changes them in training.
    """

    def __init__(self, model: nn.Module) -> None:
        norms = [module for module in model.modules() if isinstance(module, _NormBase)]
        self._norms = [module for module in norms if module.track_running_stats]
        self._step = -1  # that has begun

    def before_forward(self, step: int) -> None:
        """Do so if this is the first forward of optimizer step ``step`` with gradients that changes them. All ranks
        call this."""
        is_training = torch.is_grad_enabled() and any(norm.training for norm in self._norms)
        if self._step == step or not is_training:
            return
        self._step = step
        with torch.no_grad():
            for norm in self._norms:
                for buffer in norm.buffers():
                    broadcast_from_first_rank(buffer)
