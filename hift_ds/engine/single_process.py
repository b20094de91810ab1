"""Processes that no launcher started, as DeepSpeed would like them."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator

import deepspeed

from hift_ds.errors import ConfigError
from hift_ds.ranks import free_port, launch_variables

# (processes, this one's number) as MPI and SLURM's srun tell them.
_OTHER_LAUNCHERS = {
    "mpirun": (("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"), ("OMPI_COMM_WORLD_RANK", "PMI_RANK")),
    "srun": (("SLURM_STEP_NUM_TASKS",), ("SLURM_PROCID",)),
}


@contextlib.contextmanager
def as_single_process() -> Iterator[None]:
    """Inside this block a process that no launcher started is a job of one rank (DeepSpeed would ask for mpi4py): it
    has the variables that a launcher would have set, with a free port. They are gone afterwards, since programs that
    this one starts must not take themselves for ranks; a process group that was made meanwhile does without them.

    Raises:
        ConfigError: srun or mpirun started several processes, and nothing says which of them this is.
    """
    in_job = deepspeed.comm.is_initialized() and deepspeed.comm.get_world_size() > 1
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
