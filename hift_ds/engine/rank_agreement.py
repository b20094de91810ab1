"""Doing things on all ranks so that they fail together."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from hift_ds.errors import CheckpointError
from hift_ds.out_of_memory import full_device

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


def gather(value: Any) -> list[Any]:
    """Every rank's value, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_all_ranks(action: Callable[[], Result]) -> Result:
    """This rank's result, once all have one. If any fails all raise, so that none waits for another in vain.

    Raises:
        CheckpointError: of the class that the first failing rank raised, with its number and reason.
    """
    result: Any = None
    failure: CheckpointError | None = None
    try:
        result = action()
    except CheckpointError as error:
        failure = error
    except Exception as error:  # a bug, or something the system said: other ranks must still learn of it
        if full_device(error) is None:
            logger.exception("checkpoint")
            failure = CheckpointError(f"{type(error).__name__}: {error}")
        else:
            # The rest lists what is allocated.
            failure = CheckpointError(". ".join(str(error).split(". ")[:2]))
    failures = gather(None if failure is None else (type(failure), str(failure)))
    first = next((rank for rank, found in enumerate(failures) if found is not None), None)
    if first is None:
        return result
    cls, message = failures[first]
    raise cls(f"rank {first}: {message}" if len(failures) > 1 else message) from failure
