"""The learning rate of a HiFT run: one value per cycle, held for all groups of it.

HiFT delays the schedule so that all layers get the same update amplitude (arXiv 2401.15207, Algorithm 1).
A scheduler, whichever it is, ticks once per optimizer step as its users expect, and its horizon is the
run's optimizer steps. :class:`CycleLR` decides which of its values an update uses:

``cycle``      the value at the start of the cycle; full decay over the run. While the schedule rises
               (warm-up) the value it will have at the cycle's last step is used instead, so that a warm-up
               from 0 does not waste a whole cycle at rate 0. For a falling schedule the two rules agree.
``step``       no latch: the scheduler's value at every step.
``reference``  the authors' code: a schedule built for max_steps but ticked once per cycle, so cycle c uses
               the scheduler's c-th value. Nearly constant; kept to reproduce published runs.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any, Protocol

MODES = ("cycle", "step", "reference")


class Scheduler(Protocol):
    """What torch's and DeepSpeed's schedulers have in common."""

    def step(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class CycleLR:
    """Latches the learning rate of each param_group.

    Args:
        mode: one of ``MODES``.
        param_groups: the optimizer's, whose ``lr`` the scheduler writes. Read, and restored after a look ahead.
    """

    def __init__(self, mode: str, param_groups: list[dict[str, Any]]) -> None:
        assert mode in MODES
        self.mode = mode
        self.param_groups = param_groups
        self.scheduler: Scheduler | None = None  # only to look ahead during warm-up; its owner steps it
        self.latched: list[float] = self._current()
        self._history: list[list[float]] = []  # "reference": the scheduler's values by optimizer step

    def before_step(self, starts_cycle: bool, cycle: int, steps_per_cycle: int) -> list[float]:
        """The rates, one per param_group, that the coming update uses."""
        now = self._current()
        if self.mode == "step":
            self.latched = now
        elif self.mode == "reference":
            self._history.append(now)
            if starts_cycle:
                self.latched = self._history[cycle] if cycle < len(self._history) else now
        elif starts_cycle:
            last = self._after(steps_per_cycle - 1)
            self.latched = [max(a, b) for a, b in zip(now, last, strict=True)]
        return self.latched

    def state_dict(self) -> dict[str, Any]:
        return {"mode": self.mode, "latched": self.latched, "history": self._history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.latched = list(state["latched"])
        if self.mode == "reference":
            self._history = [list(values) for values in state["history"]]

    def _current(self) -> list[float]:
        return [float(group["lr"]) for group in self.param_groups]

    def _after(self, num_steps: int) -> list[float]:
        """The rates after ``num_steps`` more ticks, by running the scheduler ahead and back again."""
        scheduler = self.scheduler
        if scheduler is None or num_steps <= 0 or _needs_a_metric(scheduler):
            return self._current()
        saved_state = copy.deepcopy(scheduler.state_dict())
        saved_rates = [group["lr"] for group in self.param_groups]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns of a tick without an optimizer step
                for _ in range(num_steps):
                    scheduler.step()
            return self._current()
        finally:
            scheduler.load_state_dict(saved_state)
            for group, rate in zip(self.param_groups, saved_rates, strict=True):
                group["lr"] = rate


def _needs_a_metric(scheduler: Scheduler) -> bool:
    """ReduceLROnPlateau and its like cannot be run ahead."""
    import inspect

    parameters = inspect.signature(scheduler.step).parameters.values()
    return any(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
