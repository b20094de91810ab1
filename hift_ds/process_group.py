"""The process group of a job, as DeepSpeed makes it; here also for a process that no launcher started, and without a
compiler.

Below the engine, for who talks to all ranks before there is one. :func:`nothing_compiled` and
:func:`forget_ended_groups` rebind names that DeepSpeed does not document (``tests/unit/test_deepspeed_seam.py``).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed
from deepspeed import comm as deepspeed_comm
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import groups as deepspeed_groups
from torch import Tensor
from torch.distributed import ProcessGroup

from hift_ds.collectives import Ranks, all_gather_shards, plan_buckets, shard_bounds
from hift_ds.errors import ConfigError
from hift_ds.ranks import free_port, launch_variables

# (processes, this one's number) as MPI and SLURM's srun tell them.
_OTHER_LAUNCHERS = {
    "mpirun": (("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"), ("OMPI_COMM_WORLD_RANK", "PMI_RANK")),
    "srun": (("SLURM_STEP_NUM_TASKS",), ("SLURM_PROCID",)),
}


def ensure_process_group(timeout_s: float | None = None) -> None:
    """The process group that an engine would make, for collectives before there is an engine (evaluation, say).

    Args:
        timeout_s: of its collectives, unless DEEPSPEED_TIMEOUT says another. DeepSpeed's is 10 minutes, after which
            NCCL kills a rank without a word while it waits for one that prepares data, exports, or writes a checkpoint.
    """
    options = {}
    if timeout_s is not None and "DEEPSPEED_TIMEOUT" not in os.environ:
        options["timeout"] = timedelta(seconds=timeout_s)
    with as_single_process(), nothing_compiled():
        get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", "0")))
        deepspeed.init_distributed(**options)


@contextlib.contextmanager
def as_single_process() -> Iterator[None]:
    """Inside this block a process that no launcher started is a job of one rank (DeepSpeed would ask for mpi4py): it
    has the variables that a launcher would have set, with a free port. They are gone afterwards, since programs that
    this one starts must not take themselves for ranks; a process group that was made meanwhile does without them.
    Groups of a job that this process was in before are forgotten.

    Raises:
        ConfigError: srun or mpirun started several processes, and nothing says which of them this is.
    """
    forget_ended_groups()
    in_job = world_rank_and_size()[1] > 1
    if "RANK" in os.environ or in_job or _launched_otherwise():
        yield
        return
    variables = launch_variables(rank=0, world_size=1, port=free_port())
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def forget_ended_groups() -> None:
    """Have DeepSpeed make anew the process groups that torch has ended.

    It keeps each group that it ever made, and hands it to the next engine of the process. After
    ``torch.distributed.destroy_process_group``, which accelerate's ``end_training`` calls too, that engine would be
    refused ("Group is not registered"); only DeepSpeed's own ``destroy_process_group`` forgets them, of late.
    """
    sequence_parallel = sys.modules.get("deepspeed.runtime.sequence_parallel.parallel_state_sp")
    found = False
    for module in filter(None, (deepspeed_groups, sequence_parallel)):
        for name, kept in list(vars(module).items()):
            if has_ended(kept):
                found = True
                setattr(module, name, None)
            elif isinstance(kept, dict) and name.startswith("_"):
                for key in [key for key, group in kept.items() if has_ended(group)]:
                    found = True
                    del kept[key]
                    vars(module).get(f"{name}_RANKS", {}).pop(key, None)
    if found:
        # Made of such groups; every engine says anew whether it has them.
        deepspeed_groups.mpu = deepspeed_groups.mesh_device = None
        for name in ("_MPU_TENSOR_MODEL_PARALLEL_WORLD_SIZE", "_MPU_TENSOR_MODEL_PARALLEL_RANK"):
            setattr(deepspeed_groups, name, None)
        deepspeed_groups.expert_tensor_parallel_world_size = 1


def has_ended(kept: Any) -> bool:
    """Whether it is a process group, and one that torch has ended."""
    if not isinstance(kept, ProcessGroup):
        return False
    try:
        torch.distributed.get_process_group_ranks(kept)
    except (KeyError, ValueError):  # the latter: there is no group at all
        return True
    return False


@contextlib.contextmanager
def nothing_compiled() -> Iterator[None]:
    """Process groups made inside this block do without DeepSpeed's shared-memory operator for CPU ranks, which it
    would compile on first use (half a minute, and a C++ compiler); it serves inference only."""
    if get_accelerator().device_name() != "cpu":
        yield
        return
    table = "__compatible_ops__"  # made by a module-level __getattr__, which test-compiles every operator
    module = vars(deepspeed.ops)
    was = module.get(table)
    module[table] = {}
    try:
        yield
    finally:
        del module[table]
        if was is not None:
            module[table] = was


def world_rank_and_size() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) where there is no process group."""
    if not deepspeed_comm.is_initialized():
        return 0, 1
    return deepspeed_comm.get_rank(), deepspeed_comm.get_world_size()


def broadcast_from_first_rank(tensor: Tensor) -> None:
    """Give ``tensor``, of the same shape and dtype on every rank, the values that it has on global rank 0, in place."""
    if world_rank_and_size()[1] > 1:
        deepspeed_comm.broadcast(tensor, src=0)


def gather_whole(shard: Tensor, numel: int, device: torch.device) -> Tensor:
    """The flat tensor of ``numel`` elements of which every rank gives its ``shard_bounds`` part; on the host."""
    ranks = Ranks(deepspeed_comm)
    rank, world_size = world_rank_and_size()
    whole = torch.empty(numel, dtype=shard.dtype, device=device)
    start, end = shard_bounds(numel, world_size, rank)
    whole[start:end].copy_(shard)
    all_gather_shards(ranks, [whole], plan_buckets([numel], world_size, max(numel, 1)))
    return whole.cpu()


def _launched_otherwise() -> bool:
    """Whether this process is one of several that MPI started. A shell inside a SLURM or MPI job, or a batch script
    without srun, has such variables too, and is one process."""
    for launcher, (sizes, numbers) in _OTHER_LAUNCHERS.items():
        size = max(int(os.environ.get(name) or 1) for name in sizes)
        number = max(int(os.environ.get(name) or 0) for name in numbers)
        if size <= 1 and number == 0:
            continue
        if launcher == "mpirun" and importlib.util.find_spec("mpi4py") is not None:
            return True
        raise ConfigError(
            f"{launcher} started {max(size, number + 1)} processes, and RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and "
            "MASTER_PORT are not set: set them as launch/slurm.sbatch does, or start with torchrun or deepspeed"
        )
    return False
