"""How ZeRO-3 keeps a weight, in names that DeepSpeed does not document: read it, gather it, or make it from nothing.

Of a parameter of ``numel`` elements each rank has a shard of ``ceil(numel / ranks)``, zero padded, in ``ds_tensor``;
the parameter's own data is empty unless it is gathered.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeGuard, cast

import torch
from deepspeed import DeepSpeedEngine, zero
from deepspeed import comm as deepspeed_comm
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig, get_zero_config
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from hift_ds.engine.zero3.weight_file import WeightFile
from hift_ds.process_group import has_ended
from hift_ds.store.page_locked import PageLockedMemory

_FILE = "hift_weight_file"  # attribute of a module whose shards are in one


class Shard(Tensor):
    """What DeepSpeed adds to the tensor of a rank's shard. Declared for readers and type checkers; never made."""

    ds_numel: int  # with padding
    status: PartitionedParamStatus
    final_location: OffloadDeviceEnum | None


class PartitionedWeight(nn.Parameter):
    """What DeepSpeed adds to a parameter that it cuts over the ranks. Declared for readers and type checkers; never
    made."""

    ds_id: int
    ds_numel: int  # of the whole
    ds_numel_aligned: int  # of all shards with their padding
    ds_shape: torch.Size  # of the whole
    ds_tensor: Shard  # flat
    ds_status: ZeroParamStatus  # whether the parameter's own data is the whole now
    ds_persist: bool  # small: stays gathered ("stage3_param_persistence_threshold")
    ds_active_sub_modules: set[int]
    ds_process_group: ProcessGroup
    ds_zero_partition_rank: int
    ds_zero_partition_world_size: int
    partition: Callable[[], None]


def is_partitioned(weight: Tensor) -> TypeGuard[PartitionedWeight]:
    """True for a weight that ZeRO-3 (or ``deepspeed.zero.Init``) has cut over the ranks."""
    return hasattr(weight, "ds_id")


def as_partitioned(weight: Tensor) -> PartitionedWeight:
    """``weight``, of which it is known that ZeRO-3 has cut it."""
    assert is_partitioned(weight)
    return weight


def partitioned_weights(module: nn.Module, recurse: bool = True) -> Iterator[PartitionedWeight]:
    """The parameters of ``module``, all of which ZeRO-3 has cut."""
    return map(as_partitioned, module.parameters(recurse))


def num_shards(param: PartitionedWeight) -> int:
    """Ranks over which the weight is cut."""
    return param.ds_zero_partition_world_size


def shard_of(param: PartitionedWeight) -> Tensor:
    """This rank's elements of a partitioned weight, flat, without padding."""
    per_rank = param.ds_tensor.ds_numel
    start = min(per_rank * param.ds_zero_partition_rank, param.ds_numel)
    return param.ds_tensor.detach()[: min(per_rank, param.ds_numel - start)]


def whole_of(param: PartitionedWeight) -> Tensor:
    """A new tensor with the whole of a partitioned weight, on the accelerator. All its ranks call this together."""
    shard = param.ds_tensor.detach()
    if num_shards(param) == 1:
        return shard.to(param.device, copy=True).view(param.ds_shape)
    flat = torch.empty(shard.numel() * num_shards(param), dtype=shard.dtype, device=param.device)
    deepspeed_comm.all_gather_into_tensor(flat, shard.to(param.device).contiguous(), group=param.ds_process_group)
    return flat[: param.ds_numel].view(param.ds_shape)


def into_this_job(module: nn.Module) -> None:
    """Weights of ``module`` that were cut over the ranks of a job that has ended are gathered from this job's."""
    for param in module.parameters():
        if is_partitioned(param) and has_ended(param.ds_process_group):
            param.ds_process_group = deepspeed_comm.get_world_group()


def accelerator_device() -> torch.device:
    """Where this rank computes."""
    return torch.device(get_accelerator().current_device_name())


def allocate_shards(module: nn.Module, config: dict[str, Any]) -> None:
    """Turn the parameters of ``module``, which are on the meta device, into ZeRO-3 weights with undefined values: what
    ``deepspeed.zero.Init`` does while a model is built, without ever making, filling or broadcasting a whole weight.

    Args:
        module: its parameters are replaced; tied ones stay tied.
        config: DeepSpeed's, complete. With ``"offload_param": {"device": "nvme"}`` the shards are in a file from the
        start.
    """
    zero_config = get_zero_config(config)
    folder = weights_folder(zero_config)
    init = zero.Init(config_dict_or_path=with_weights_on_host(config) if folder else config)
    new: dict[nn.Parameter, PartitionedWeight] = {}
    for param in module.parameters():
        # The shape without the memory: DeepSpeed notes it, then the data goes.
        hollow = torch.empty(1, dtype=param.dtype, device=init.local_device).expand(param.shape)
        weight = nn.Parameter(hollow, requires_grad=param.requires_grad)
        init._convert_to_deepspeed_param(weight)
        new[param] = as_partitioned(weight)
    in_file = [p for p in new.values() if folder and p.ds_numel > zero_config.param_persistence_threshold]
    file = None
    if folder:
        file = WeightFile(folder, sum(WeightFile.room(_shard_numel(p) * p.element_size()) for p in in_file))
        module.__dict__[_FILE] = file
    placed, locked = (
        set(in_file),
        PageLockedMemory(sum(_shard_numel(p) * p.element_size() for p in new.values())),
    )
    for param in new.values():
        _give_shard(param, init, file if param in placed else None, locked)
    for submodule in module.modules():
        for name, replaced in submodule._parameters.items():
            if replaced is not None:
                submodule._parameters[name] = new[replaced]


def _shard_numel(param: PartitionedWeight) -> int:
    return -(-param.ds_numel // num_shards(param))


def _give_shard(param: PartitionedWeight, init: zero.Init, file: WeightFile | None, locked: PageLockedMemory) -> None:
    """Leave ``param`` as DeepSpeed's first partitioning of a whole weight leaves one."""
    numel = _shard_numel(param)
    if file is not None:
        elements = file.reserve(numel, param.dtype)
    else:
        on_host = init.remote_device == OffloadDeviceEnum.cpu
        if on_host and init.pin_memory and get_accelerator().device_name() != "cpu":
            elements = locked.whole(numel, param.dtype)
        else:
            elements = torch.empty(numel, dtype=param.dtype, device="cpu" if on_host else init.local_device)
    shard = cast(Shard, elements)
    shard.ds_numel, shard.status, shard.final_location = numel, PartitionedParamStatus.AVAILABLE, None
    param.ds_tensor, param.ds_numel_aligned = shard, numel * num_shards(param)
    param.data = torch.empty(0, dtype=param.dtype, device=param.device)
    param.ds_status = ZeroParamStatus.NOT_AVAILABLE


def into_page_locked_slabs(module: nn.Module) -> PageLockedMemory:
    """Move the shards that are in ordinary host memory into page-locked memory, one by one: a block of its own for each
    would be rounded up to a power of two."""
    here = [p for p in partitioned_weights(module) if p.ds_tensor.device.type == "cpu" and not p.ds_tensor.is_pinned()]
    locked = PageLockedMemory(sum(p.ds_tensor.nbytes for p in here))
    for param in here:
        shard = param.ds_tensor
        shard.data = locked.whole(shard.numel(), shard.dtype).copy_(shard)
    return locked


def with_weights_on_host(config: dict[str, Any]) -> dict[str, Any]:
    """``config`` as DeepSpeed is to read it when we keep the parked weights in a file: its own swapper compiles an
    operator at run time, and cannot hold a tensor larger than its buffers."""
    zero_block = {**config["zero_optimization"], "offload_param": {"device": "cpu", "pin_memory": False}}
    return {**config, "zero_optimization": zero_block}


def weights_folder(zero_config: DeepSpeedZeroConfig) -> Path | None:
    """Where ``"offload_param": {"device": "nvme", "nvme_path": ...}`` wants parked weights; ``None`` otherwise."""
    offload = zero_config.offload_param
    return Path(offload.nvme_path) if offload is not None and offload.device == OffloadDeviceEnum.nvme else None


def page_locks_weights(zero_config: DeepSpeedZeroConfig) -> bool:
    """``"offload_param": {"device": "cpu", "pin_memory": true}``, where there is an accelerator to copy them."""
    offload = zero_config.offload_param
    wanted = offload is not None and offload.device == OffloadDeviceEnum.cpu and offload.pin_memory
    return bool(wanted) and get_accelerator().device_name() != "cpu"


@contextlib.contextmanager
def as_if_parked_on_host(engine: DeepSpeedEngine) -> Iterator[None]:
    """Inside this block DeepSpeed's ``engine`` puts weights into ordinary host memory, whatever its config says."""
    zero_config, config = engine._config.zero_config, engine.config
    offload = zero_config.offload_param
    zero_config.offload_param, engine.config = (
        type(offload)(device="cpu", pin_memory=False),
        with_weights_on_host(config),
    )
    try:
        yield
    finally:
        zero_config.offload_param, engine.config = offload, config


def weight_file_of(module: nn.Module) -> WeightFile | None:
    """The file that :func:`allocate_shards` put the shards of ``module`` in, if it did."""
    return module.__dict__.get(_FILE)
