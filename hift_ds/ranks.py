"""The processes of a job: which one this is, what it needs to be alone, and doing things so that all fail together.

Loads no library until a function needs one: the processes that start others import this too.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import socket
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from hift_ds.errors import ConfigError, HiFTError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
HOST_TIMEOUT = timedelta(days=30)  # who waits for a rank that lives waits rightly; one that hangs has its own watchdog
_host_groups: dict[str, Any] = {}


def rank_and_world_size(env: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """This process's rank and the number of ranks, from the launcher's variables; (0, 1) for a process that no
    launcher started."""
    return int(env.get("RANK", "0")), int(env.get("WORLD_SIZE", "1"))


def launch_variables(rank: int, world_size: int, port: int) -> dict[str, str]:
    """The environment variables that a launcher would set for rank ``rank`` of a job on one machine, whose ranks meet
    at ``port``."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


def free_port() -> int:
    """A port of this machine that nobody listens on, below those that the system hands out by itself: seconds pass
    until the ranks meet there, in which another program must not get it.

    Raises:
        ConfigError: none was found.
    """
    choose = random.SystemRandom()
    for _ in range(100):
        port = choose.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise ConfigError("no free port between 20000 and 32000; choose one with --master-port")


def gather(value: Result) -> list[Result]:
    """Every rank's picklable ``value``, by rank, on every rank; only this one's where there is no process group. It
    travels through host memory (:func:`host_group`)."""
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Result] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value, group=host_group())
    return values


def host_group() -> ProcessGroup | None:
    """A process group of all ranks for what is in host memory: ``None``, the default one, where that is gloo's; else a
    gloo group beside it, which the first call makes, on every rank alike.

    NCCL would take such values through device memory, on a stream of the training. Its watchdog would kill a rank that
    waits for long, or leave it waiting for ever for one that has died; gloo raises at once.
    """
    import torch.distributed as dist

    if "nccl" not in dist.get_backend():
        return None
    world = dist.group.WORLD
    if _host_groups.get("of") is not world:
        _host_groups.update(of=world, group=dist.new_group(backend="gloo", timeout=HOST_TIMEOUT))
    return _host_groups["group"]


def avoid_broken_links() -> None:
    """Several consumer GPUs under an old driver cannot talk to each other directly; NCCL is told not to try, as
    ``accelerate launch`` does, where accelerate would refuse to begin. Before the first collective."""
    import torch
    from accelerate import utils

    if torch.cuda.is_available() and not utils.check_cuda_p2p_ib_support():
        for name in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE"):
            os.environ.setdefault(name, "1")


def on_all_ranks(action: Callable[[], Result], failures_are: type[HiFTError] | None = None) -> Result:
    """The result of ``action`` on this rank, once every rank has one. If it fails anywhere all ranks raise, so that
    none waits for another in vain.

    Args:
        failures_are: what any exception becomes. ``None``: the errors of hift_ds are agreed upon as they are, and
            the first rank's message stays as it is; any other exception is a bug, which ends its rank with a
            traceback.

    Raises:
        HiFTError: of the class that the lowest failing rank raised, with its number and message.
    """
    result: Result
    failure: HiFTError | None = None
    try:
        result = action()
    except Exception as error:
        if isinstance(error, failures_are or HiFTError):
            failure = error
        elif failures_are is not None:
            failure = failures_are(_reason(error))
        else:
            raise
    found = gather(None if failure is None else (type(failure), str(failure)))
    failures = [(rank, *one) for rank, one in enumerate(found) if one is not None]
    if not failures:
        return result
    failed, cls, message = failures[0]
    numbered = len(found) > 1 and (failed > 0 or failures_are is not None)
    agreed = cls(f"rank {failed}: {message}" if numbered else message)
    agreed.seen_by_all_ranks = True
    raise agreed from failure


def _reason(error: Exception) -> str:
    """One line for an exception that is not ours: a bug, which is logged, or something that the system said."""
    from hift_ds.out_of_memory import full_device

    if full_device(error) is not None:
        return ". ".join(str(error).split(". ")[:2])  # torch goes on with a dump of what is allocated
    logger.exception("an unexpected error on this rank")
    return f"{type(error).__name__}: {error}"
