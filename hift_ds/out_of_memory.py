"""Out of memory: how such an error is told from others, and the line that takes its place.

The engine's calls are wrapped (:func:`explains_out_of_memory`); the error that comes out is still a ``RuntimeError``
whose text says "out of memory.", so that loops which try a smaller batch (accelerate's ``find_executable_batch_size``,
the Trainer's ``auto_find_batch_size``) go on as before. What the line advises is :mod:`hift_ds.forecast.advice`'s.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import torch
from torch import nn

from hift_ds.errors import HiFTError, NoRoomForModel, OutOfMemory

LESS_IN_EVALUATION = (
    'would need less: a smaller evaluation batch, or prediction_loss_only with "hift.activations.chunked_loss": true'
)
OTHER_WORDS = {  # of errors that torch gives no type of its own, and where they say that there is no room
    "CUDA error: out of memory": "CUDA",
    "CUBLAS_STATUS_ALLOC_FAILED": "CUDA",
    "DefaultCPUAllocator: can't allocate memory": "CPU",
}


class _Advised(Protocol):
    """An engine, as far as it is asked for advice."""

    @property
    def adviser(self) -> _Adviser: ...


class _Adviser(Protocol):
    def answer(self, engine: _Advised, doing: str, device: str) -> str: ...


EngineT = TypeVar("EngineT", bound=_Advised)
Params = ParamSpec("Params")
Result = TypeVar("Result")


def full_device(error: BaseException | None) -> str | None:
    """The kind of device that ``error`` says has no memory left ("CUDA", "XPU", "CPU"); ``None`` for any other
    error."""
    if isinstance(error, torch.OutOfMemoryError):
        return str(error).partition(" out of memory")[0].split("\n")[-1] or "device"
    if isinstance(error, RuntimeError):
        return next((device for words, device in OTHER_WORDS.items() if words in str(error)), None)
    return None


@contextlib.contextmanager
def _answered(answer: Callable[[str], HiFTError]) -> Iterator[None]:
    """An out-of-memory error becomes ``answer(kind of device)``; one that is an answer comes through as it was."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, OutOfMemory) or (device := full_device(error)) is None:
            raise
        raise answer(device) from error


@contextlib.contextmanager
def no_traceback_when_full(doing: str) -> Iterator[None]:
    """A context for work outside of the engine's calls: an out-of-memory error in it becomes an :class:`OutOfMemory` in
    a line.

    One that the engine has explained comes through as it was, also from beneath an error of a library's.
    """
    hint = "hift-ds estimate RUN.yaml says what needs less"
    with _answered(lambda device: OutOfMemory(f"{device} out of memory. HiFT: {doing}; {hint}")):
        try:
            yield
        except RuntimeError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OutOfMemory):
                cause = cause.__cause__
            if cause is None or cause is error:
                raise
            raise cause from cause.__cause__  # not from the library's error, which it is the cause of


@contextlib.contextmanager
def explains_evaluation(rows: int) -> Iterator[None]:
    """A context around an evaluation in batches of ``rows``, which need not go through the engine.

    Raises:
        OutOfMemory: in place of an out-of-memory error.
    """
    where = f"in evaluation, at most {rows} rows at once"
    with _answered(lambda device: OutOfMemory(f"{device} out of memory. HiFT: {where}; {LESS_IN_EVALUATION}")):
        yield


@contextlib.contextmanager
def says_when_no_room(model: nn.Module | None) -> Iterator[None]:
    """A context around the building of an engine for ``model``.

    Raises:
        NoRoomForModel: in place of an out-of-memory error.
    """

    def answer(device: str) -> NoRoomForModel:
        params = () if model is None else model.parameters()
        num_bytes = sum(param.numel() * param.element_size() for param in params)
        return NoRoomForModel(
            f"the {device} device has no room for the weights ({num_bytes / 2**30:.1f} GiB) and the states that stay "
            'on it, whatever the batch; "hift.state.residency": "host", 16-bit weights, or '
            '"zero_optimization.stage": 3 need less'
        )

    with _answered(answer):
        yield


def explains_out_of_memory(
    doing: str,
) -> Callable[[Callable[Concatenate[EngineT, Params], Result]], Callable[Concatenate[EngineT, Params], Result]]:
    """A decorator for a method of the engine: an out-of-memory error in it says what would fit.

    Args:
        doing: what the method does, in words: "forward", "the update".
    """

    def decorate(
        method: Callable[Concatenate[EngineT, Params], Result],
    ) -> Callable[Concatenate[EngineT, Params], Result]:
        @functools.wraps(method)
        def wrapped(engine: EngineT, *args: Params.args, **kwargs: Params.kwargs) -> Result:
            with _answered(lambda device: OutOfMemory(engine.adviser.answer(engine, doing, device))):
                return method(engine, *args, **kwargs)

        return wrapped

    return decorate
