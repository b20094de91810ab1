"""The fp32 bits of weights that DeepSpeed rounds to 16: kept before it does, and given to the masters."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hift_ds.collectives import shard_bounds
from hift_ds.engine.deepspeed_seam import HiFTOptimizer
from hift_ds.engine.zero3.exact_values import exact_values
from hift_ds.optim.fill_states import set_masters
from hift_ds.process_group import broadcast_from_first_rank, gather_whole, world_rank_and_size


def cast_and_keep_bits(model: nn.Module, dtype: torch.dtype | None, device: torch.device) -> dict[str, Tensor]:
    """Lay every weight out row by row (shards are ranges of elements in that order), cast the trainable fp32 weights to
    ``dtype`` and keep the fp32 bits of this rank's shards of them.

    Args:
        dtype: bf16 or fp16; ``None``: nothing is cast and no bit kept.

    Returns:
        By parameter name, flat, on the host.
    """
    for param in model.parameters():
        # Dimensions of size 1 may have any stride; DeepSpeed broadcasts weights as bytes, and needs the last one's.
        if not param.is_contiguous() or (param.ndim and param.stride(-1) != 1):
            param.data = param.data.contiguous().view(-1).view(param.shape)
    shards: dict[str, Tensor] = {}
    if dtype is None:
        return shards
    rank, world_size = world_rank_and_size()
    for name, param in model.named_parameters():
        if param.requires_grad and param.dtype == torch.float32:
            whole = param.detach().to(device)
            # Ranks may have initialised differently; DeepSpeed takes rank 0's.
            broadcast_from_first_rank(whole)
            start, end = shard_bounds(whole.numel(), world_size, rank)
            shards[name] = whole.view(-1)[start:end].to("cpu", copy=True)
            # Cast here, one by one and on the device: DeepSpeed would cast on the host, all of them, on every rank.
            param.data = whole.to(dtype)
    return shards


def give_masters_their_bits(
    optimizer: HiFTOptimizer, model: nn.Module, shards: Mapping[str, Tensor], device: torch.device
) -> None:
    """Fill the masters from the fp32 values that the 16-bit weights lack, if there are any.

    Args:
        shards: what :func:`cast_and_keep_bits` returned: cut for elementwise optimizers; owners of whole tensors get
            the other ranks' parts here.
        device: where ranks talk to each other.
    """
    exact = exact_values(model)
    if not (shards or (exact is not None and optimizer.states.precision.keep_masters)):
        return
    rank, world_size = world_rank_and_size()
    parameters = optimizer.parameters
    numel_of = {name: math.prod(parameters.shape_of(param)) for name, param in model.named_parameters()}
    if parameters.whole_tensors:
        shards = {name: gather_whole(shard, numel_of[name], device) for name, shard in shards.items()}

    def values(name: str, start: int, numel: int) -> Tensor | None:
        if name not in shards:
            return exact(name, start, numel) if exact is not None else None
        whole = shards[name].numel() == numel_of[name]
        offset = 0 if whole else shard_bounds(numel_of[name], world_size, rank)[0]
        return shards[name][start - offset : start - offset + numel]

    set_masters(optimizer.states, values)
