"""Whether all ranks gather the same weights. One that calls a module which others do not call (an expert of its own, a
branch that depends on the data) would be sent parts of other weights for it, without a word where the sizes agree;
where they do not, gloo ends the process and NCCL waits for ever. DeepSpeed looks at the end of a module trace only."""

from __future__ import annotations

import contextlib
import itertools
import zlib
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import comm as deepspeed_comm
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import z3_leaf_module
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from hift_ds.engine.zero3.shards import PartitionedWeight, num_shards, partitioned_weights
from hift_ds.errors import ConfigError

OTHERS_HAVE_S = 60.0  # to come to the place where this rank has left the trace
_numbers = itertools.count()


class SameOnRanks:
    """Compares what ranks are about to gather, before they do.

    While a trace of modules is recorded, every gather, by a collective of 8 bytes. A rank that follows a whole trace,
    which is every rank's, need not ask; one that leaves it looks whether the others leave it there too, in the store
    through which ranks find each other, since those that follow the trace take part in no collective for that.

    Args:
        model: its weights are in shards.

    Attributes:
        is_needed: there are several ranks.
    """

    can_ask = True  # a simulation has no others

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        first = next(partitioned_weights(model))
        self._group = first.ds_process_group
        self.is_needed = self.can_ask and num_shards(first) > 1
        self._engine = next(_numbers)  # the same on every rank: they make their engines in the same order
        self._num_left = 0

    def about_to_gather(self, params: Iterable[PartitionedWeight], module: nn.Module) -> None:
        """All ranks call this, each with its own ``params``.

        Raises:
            ConfigError: they differ.
        """
        numbers = sorted(param.ds_id for param in params)
        mine = torch.tensor([zlib.crc32(repr(numbers).encode())], device=get_accelerator().current_device_name())
        of_all = mine.new_empty(dist.get_world_size(self._group))
        deepspeed_comm.all_gather_into_tensor(of_all, mine, group=self._group)
        if len(set(of_all.tolist())) > 1:
            raise self._error(module)

    def leaves_trace(self, step: int, module: nn.Module) -> None:
        """Call this on a rank that runs ``module`` where its trace has another one at place ``step``.

        Raises:
            ConfigError: not all ranks do that.
        """
        store = dist.distributed_c10d._get_default_store()
        ranks, number = dist.get_process_group_ranks(self._group), self._num_left
        self._num_left += 1

        def keys(number: int) -> list[str]:
            return [f"hift_ds/trace/{self._engine}/{number}/{rank}" for rank in ranks]

        place, mine = f"{step} {module.ds_id}", keys(number)[dist.get_rank(self._group)]
        store.set(mine, place)
        try:
            store.wait(keys(number), timedelta(seconds=OTHERS_HAVE_S))
        except RuntimeError as error:
            raise self._error(module) from error
        if any(store.get(key).decode() != place for key in keys(number)):
            raise self._error(module)
        with contextlib.suppress(RuntimeError):  # every rank has read those of the time before last
            store.delete_key(keys(number - 2)[dist.get_rank(self._group)])

    def _error(self, module: nn.Module) -> ConfigError:
        name = next((name for name, one in self._model.named_modules() if one is module), "") or type(module).__name__
        return ConfigError(
            f"ZeRO-3: the ranks do not run the same modules (this one is at {name}), so that each would gather weights "
            "that the others do not send; a module that only some ranks call (an expert, a branch that depends on the "
            'data) must be gathered with one around it that all call: "zero_optimization": {"leaf_module": {"classes": '
            '["my_model.MoEBlock"]}}, or use stage 0, 1 or 2'
        )


class _Tied(torch.autograd.Function):
    """``tensor`` as it is, in a graph that leads to ``weights`` too and brings them nothing."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, *weights: Tensor) -> Tensor:
        ctx.num_weights = len(weights)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return (grads[0], *[None] * ctx.num_weights)


def tie_leaf_modules(model: nn.Module) -> list[RemovableHandle]:
    """Have backward reach every leaf module (DeepSpeed's) that is trained, from now on, also on a rank that ran nothing
    in it: that one would have no graph, do no backward, and leave the others waiting for its shards.

    Returns:
        The hooks.
    """

    def tie(module: nn.Module, inputs: Any, output: Any) -> Any:
        weights = [param for param in module.parameters() if param.requires_grad]
        has_graph = any(isinstance(value, Tensor) and value.requires_grad for value in tree_leaves(output))
        if has_graph or not (weights and torch.is_grad_enabled()):
            return output

        def tied(value: Any) -> Any:
            return _Tied.apply(value, *weights) if isinstance(value, Tensor) and value.is_floating_point() else value

        return tree_map(tied, output)

    # Before DeepSpeed's own hook, whose function in the graph gathers the weights for backward.
    return [module.register_forward_hook(tie, prepend=True) for module in model.modules() if z3_leaf_module(module)]
