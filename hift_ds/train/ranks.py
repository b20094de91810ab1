"""Which process of a job this is, and doing things on all ranks so that they fail together."""

from __future__ import annotations

import contextlib
import os
import random
import socket
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from hift_ds.errors import ConfigError, HiFTError

Result = TypeVar("Result")


def rank_and_world_size(env: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """From the launcher's variables, before any library is loaded; (0, 1) for a process that none started."""
    return int(env.get("RANK", "0")), int(env.get("WORLD_SIZE", "1"))


def on_all_ranks(action: Callable[[], Result]) -> Result:
    """This rank's result, once every rank has one. If any fails with an error of the user's, all raise that
    error, so that none waits for another in vain and the first rank can report it.

    Needs the process group.
    """
    result: Any = None
    failure: HiFTError | None = None
    try:
        result = action()
    except HiFTError as error:
        failure = error
    failures = gather(None if failure is None else (type(failure), str(failure)))
    failed = next((rank for rank, found in enumerate(failures) if found is not None), None)
    if failed is None:
        return result
    cls, message = failures[failed]
    agreed = cls(message if failed == 0 else f"rank {failed}: {message}")
    agreed.seen_by_all_ranks = True
    raise agreed from failure


def gather(value: Any) -> list[Any]:
    """Every rank's picklable ``value``, on every rank."""
    import torch.distributed as dist

    values: list[Any] = [value]
    if dist.is_initialized() and dist.get_world_size() > 1:
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def free_port() -> int:
    """A port of this machine that nobody listens on, below those that the system hands out by itself: seconds
    pass until the ranks meet there, in which another program must not get it."""
    choose = random.SystemRandom()
    for _ in range(100):
        port = choose.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise ConfigError("no free port between 20000 and 32000; choose one with --master-port")
