"""What the line of an out-of-memory error advises: the forecast at the batch that did not fit, and what would fit."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import nn

from hift_ds.forecast.setting import SWITCHES, Setting, is_on, with_switch
from hift_ds.forecast.steps import GIB, Request, Slope, Steps, read_structure, run_requests, worst_step
from hift_ds.layers.grouping import LayerGroup
from hift_ds.out_of_memory import LESS_IN_EVALUATION
from hift_ds.schedule import GroupSchedule

logger = logging.getLogger(__name__)

MAY_ALLOCATE = 0.95  # share of what the device has that the allocator can hand out
RUN_FILE_KEYS = {
    "slice_numel": '"hift.state.slice_numel": 16777216',
    "checkpointing": '"hift.activations.checkpointing": true',
    "chunked_loss": '"hift.activations.chunked_loss": true',
    "offload": '"hift.activations.offload": true',
    "everything": "all switches of docs/memory.md",
}
TOKENS = 64  # a row's length is advised in multiples of this


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

    def answers(self, batch: int, length: int) -> bool:
        """Whether the forecasts are of such a batch. One row, which packing makes of many, may be shorter."""
        return length == self.setting.length or (batch == self.setting.batch == 1 and length < self.setting.length)

    def text(self, batch: int, length: int, budget_bytes: float) -> str:
        """The forecast at ``batch`` x ``length``, and what would stay within the budget."""
        by_tokens = Slope(tuple((rows * self.setting.length, steps) for rows, steps in self.slope.points))
        fits = []
        if 0 < (rows := self.slope.largest(budget_bytes)) < batch:
            fits.append(f"micro-batches of {rows}")
        elif batch == 1 and 0 < (tokens := by_tokens.largest(budget_bytes, TOKENS, length)) < length:
            fits.append(f"{tokens} tokens at once")
        here = (batch, length) == (self.setting.batch, self.setting.length)
        at = "" if here else f" at {self.setting.batch} x {self.setting.length}"
        for name, steps in self.switched.items():
            if worst_step(steps).peak_bytes <= budget_bytes:
                fits.append(f"{RUN_FILE_KEYS[name]} ({worst_step(steps).peak_bytes / GIB:.1f} GiB{at})")
        answer = (
            f"would fit: {'; '.join(fits)}"
            if fits
            else "no switch makes it fit: shorter sequences, or more GPUs with ZeRO-3"
        )
        peak = by_tokens.peak_bytes(batch * length) / GIB
        return f"forecast {peak:.1f} GiB of {budget_bytes / GIB:.1f} usable; {answer}"


class Memory(Protocol):
    """What an engine knows of its memory."""

    last_shape: tuple[int, int] | None

    def setting(self, folder: str, batch: int, length: int) -> Setting: ...

    def device_bytes(self) -> int: ...


class Stopped(Protocol):
    """An engine that has run out of memory, as far as it is asked about that."""

    memory: Memory
    module: nn.Module

    @property
    def groups(self) -> tuple[LayerGroup, ...]: ...

    @property
    def schedule(self) -> GroupSchedule: ...


class Adviser:
    """Answers the out-of-memory errors of one run. It outlives an engine that a smaller batch replaces.

    Attributes:
        announces: log each answer, since the loop around the engine catches the error and goes on.
        last: the last answer.
    """

    def __init__(self) -> None:
        self.announces = False
        self.last: str | None = None
        self._advice: Advice | None = None

    def answer(self, engine: Stopped, doing: str, device: str) -> str:
        """One line that begins as the allocator's: "CUDA out of memory."."""
        batch, length = engine.memory.last_shape or (0, 0)
        if doing == "forward" and not engine.module.training:
            where, advice = f"in evaluation at {batch} x {length} tokens", LESS_IN_EVALUATION
        else:
            group = engine.groups[engine.schedule.active]
            where = f"in {doing} at {batch} x {length} tokens while group {group.index} ({group.name}) trains"
            advice = self._forecast(engine, batch, length)
        self.last = f"{device} out of memory. HiFT: {where}; {advice}"
        if self.announces:
            logger.warning("%s", self.last)
        return self.last

    def _forecast(self, engine: Stopped, batch: int, length: int) -> str:
        """Made once for a length; never an error of its own."""
        try:
            if self._advice is None or not self._advice.answers(batch, length):
                with tempfile.TemporaryDirectory() as folder:
                    self._advice = Advice.make(engine.memory.setting(folder, batch, length))
            return self._advice.text(batch, length, MAY_ALLOCATE * engine.memory.device_bytes())
        # Whatever keeps a forecast from being made must not hide the error that asked for it.
        except Exception as error:
            logger.debug("no forecast", exc_info=error)
            return f"no forecast could be made ({type(error).__name__}: {error}); docs/memory.md lists what needs less"
