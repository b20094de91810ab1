"""Out of memory, answered: what was running, what the forecast says, and what would fit.

The engine's calls are wrapped (:func:`explains_out_of_memory`); the error that comes out is still a ``RuntimeError`` whose
text says "out of memory.", so that loops which try a smaller batch (accelerate's ``find_executable_batch_size``,
the Trainer's ``auto_find_batch_size``) go on as before.
"""

from __future__ import annotations

import functools
import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hift_ds.errors import HiFTError
from hift_ds.memory.estimate_input import SWITCHES, is_on, with_switch
from hift_ds.memory.forecast import GIB, Request, Slope, Steps, read_structure, run_requests, worst_step
from hift_ds.memory.simulation import Setting

logger = logging.getLogger(__name__)

MAY_ALLOCATE = 0.95  # share of what the device has that the allocator can hand out
RUN_FILE_KEYS = {
    "slice_numel": '"hift.state.slice_numel": 16777216',
    "checkpointing": '"hift.activations.checkpointing": true',
    "chunked_loss": '"hift.activations.chunked_loss": true',
    "offload": '"hift.activations.offload": true',
    "everything": "all switches of docs/memory.md",
}


class OutOfMemory(HiFTError, RuntimeError):
    """The device has no room. The message says what would fit."""


@dataclass
class Advice:
    """Forecasts of one run, made when it first runs out of memory, and used again for other batches.

    Attributes:
        setting: at the batch and length that did not fit.
        slope: peaks at other batches.
        switched: with each switch on that is off, and with all on.
    """

    setting: Setting
    slope: Slope
    switched: dict[str, Steps] = field(default_factory=dict)

    @classmethod
    def make(cls, setting: Setting) -> Advice:
        """Step the run on the fake device: seconds."""
        structure = read_structure(setting)
        changed = {name: with_switch(setting, name, on=True) for name in SWITCHES if not is_on(setting, name)}
        everything = setting
        for name in SWITCHES:
            everything = with_switch(everything, name, on=True)
        if len(changed) > 1:
            changed["everything"] = everything
        settings = [setting, replace(setting, batch=2 * setting.batch), *changed.values()]
        here, there, *others = run_requests([Request(s, structure, ends_only=True) for s in settings], num_processes=2)
        slope = Slope(((setting.batch, here), (2 * setting.batch, there)))
        return cls(setting, slope, dict(zip(changed, others, strict=True)))

    def text(self, batch: int, budget_bytes: float) -> str:
        """The forecast at ``batch``, and what would stay within the budget."""
        peak = self.slope.peak_bytes(batch) / GIB
        largest = self.slope.largest(budget_bytes)
        fits = []
        if 0 < largest < batch:
            fits.append(f"micro-batches of {largest}")
        for name, steps in self.switched.items():
            if worst_step(steps).peak_bytes <= budget_bytes:
                fits.append(f"{RUN_FILE_KEYS[name]} ({worst_step(steps).peak_bytes / GIB:.1f} GiB)")
        answer = f"would fit: {'; '.join(fits)}" if fits else "no switch makes it fit: shorter sequences, or more GPUs with ZeRO-3"
        return f"forecast {peak:.1f} GiB of {budget_bytes / GIB:.1f} usable; {answer}"


def explains_out_of_memory(doing: str) -> Callable[[Callable], Callable]:
    """For a method of the engine: an out-of-memory error in it says what would fit."""

    def decorate(method: Callable) -> Callable:
        @functools.wraps(method)
        def wrapped(engine: Any, *args: Any, **kwargs: Any) -> Any:
            if doing == "forward":
                engine.last_shape = _token_shape([*args, *kwargs.values()]) or engine.last_shape
            try:
                return method(engine, *args, **kwargs)
            except torch.OutOfMemoryError as error:
                raise OutOfMemory(explanation(engine, doing, str(error))) from error

        return wrapped

    return decorate


def explanation(engine: Any, doing: str, message: str) -> str:
    """One line that begins as the allocator's: "CUDA out of memory."."""
    batch, length = engine.last_shape or (0, 0)
    group = engine.groups[engine.schedule.active]
    where = f"in {doing} at {batch} x {length} tokens while group {group.index} ({group.name}) trains"
    if doing == "forward" and not engine.module.training:
        where = f"in evaluation at {batch} x {length} tokens"
        advice = (
            'would need less: a smaller evaluation batch, or prediction_loss_only with "hift.activations.chunked_loss": true'
        )
    else:
        advice = _advice(engine, batch, length)
    return f"{message.partition(' out of memory')[0]} out of memory. HiFT: {where}; {advice}"


def _advice(engine: Any, batch: int, length: int) -> str:
    """From the engine's cache of forecasts; never an error of its own."""
    try:
        if engine.memory_advice is None or engine.memory_advice.setting.length != length:
            with tempfile.TemporaryDirectory() as folder:
                engine.memory_advice = Advice.make(engine.memory_setting(folder, batch, length))
        return engine.memory_advice.text(batch, MAY_ALLOCATE * engine.device_bytes())
    except Exception as error:  # whatever keeps a forecast from being made must not hide the error that asked for it
        logger.debug("no forecast", exc_info=error)
        return f"no forecast could be made ({type(error).__name__}: {error}); docs/memory.md lists what needs less"


def _token_shape(values: list[Any]) -> tuple[int, int] | None:
    """(sequences, tokens) of the first batch of token ids among the inputs."""
    for value in values:
        if isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point():
            return tuple(value.shape)
    return None
