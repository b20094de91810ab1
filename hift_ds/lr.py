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
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

from hift_ds.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

logger = logging.getLogger(__name__)

MODES = ("cycle", "step", "reference")


class Scheduler(Protocol):
    """What torch's and DeepSpeed's schedulers have in common."""

    def step(self) -> None:
        """Set the rates of the next step."""

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's state."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""


class CycleLR:
    """Latches the learning rate of each param_group.

    Args:
        mode: one of ``MODES``.
        param_groups: the optimizer's, whose ``lr`` the scheduler writes. Never changed here.
    """

    def __init__(self, mode: str, param_groups: list[dict[str, Any]]) -> None:
        assert mode in MODES
        self.mode = mode
        self.param_groups = param_groups
        self.scheduler: Scheduler | None = None  # only to look ahead during warm-up; its owner steps it
        self.steps_left: Callable[[], int] | None = None  # of the run, the coming one included
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

    def watch(self, scheduler: Scheduler | None, steps_left: Callable[[], int] | None = None) -> None:
        """Look ahead on ``scheduler``, if there is one, during warm-up. The engine does this with its own; a loop that
        steps a scheduler by itself (the Trainer's) calls it once.

        Args:
            steps_left: optimizer steps that the run still makes, the coming one included: no look goes further.

        Raises:
            ConfigError: it sets the rates of another optimizer.
        """
        optimizers = [] if scheduler is None else list(_optimizers_of(scheduler))
        if optimizers and not any(optimizer.param_groups is self.param_groups for optimizer in optimizers):
            raise ConfigError(
                f"lr_scheduler=: {type(scheduler).__name__} sets the rates of another optimizer than the engine's; "
                "make it of the one given as optimizer=, or give a function of an optimizer that makes it"
            )
        self.scheduler, self.steps_left = scheduler, steps_left
        self.catch_up()

    def catch_up(self) -> None:
        """Give the param_groups the rates of this very step, where the schedule is a function of the step.

        A run that goes on with more steps has another schedule than the one whose last value was saved; torch would use
        that value for one step, and a latch for a whole cycle. Without a change the values stay as they are.
        """
        scheduler: Any = self.scheduler
        if not _is_function_of_step(scheduler) or len(scheduler.base_lrs) != len(self.param_groups):
            return
        for group, base, function in zip(self.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
            group["lr"] = base * function(scheduler.last_epoch)

    def state_dict(self) -> dict[str, Any]:
        """The latched rates, for a checkpoint."""
        return {"mode": self.mode, "latched": self.latched, "history": self._history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""
        self.latched = list(state["latched"])
        if self.mode == "reference":
            self._history = [list(values) for values in state["history"]]

    def _current(self) -> list[float]:
        return [float(group["lr"]) for group in self.param_groups]

    def _after(self, num_steps: int) -> list[float]:
        """The rates after ``num_steps`` more ticks if the schedule rises now, by running a copy of the scheduler ahead;
        the current ones if it falls, or cannot be run. Never past the end of the run or of the scheduler."""
        if self.steps_left is not None:
            num_steps = min(num_steps, self.steps_left() - 1)
        scheduler = self.scheduler
        if scheduler is None or num_steps <= 0 or missing_argument(scheduler):
            return self._current()
        now = rates = self._current()
        falls = [False] * len(now)
        try:
            ahead, groups = _detached_copy(scheduler, self.param_groups)
        except TypeError as error:  # it holds what Python cannot copy
            logger.warning("%s cannot be run ahead (%s)", type(scheduler).__name__, error)
            self.scheduler = None
            return now
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of a tick without an optimizer step
            for tick in range(num_steps):
                try:
                    ahead.step()
                except Exception:  # OneCycleLR after its last step, a table of values after its last entry
                    break
                rates = [float(group["lr"]) for group in groups]
                if tick == 0:
                    falls = [after < before for after, before in zip(rates, now, strict=True)]
        # A cosine that has come to its end rises again; so does one that restarts, for the next cycle.
        return [before if fell else after for before, fell, after in zip(now, falls, rates, strict=True)]


class _Rates:
    """All that schedulers use of an optimizer, without its weights."""

    def __init__(self, optimizer: Optimizer, groups: list[dict[str, Any]]) -> None:
        self.param_groups = groups
        self.defaults = copy.copy(getattr(optimizer, "defaults", {}))
        self.state: dict[Tensor, Any] = {}
        self._opt_called = True
        self._step_count = 1

    def step(self, *args: Any, **kwargs: Any) -> None:
        pass


def _detached_copy(scheduler: Scheduler, param_groups: list[dict[str, Any]]) -> tuple[Scheduler, list[dict[str, Any]]]:
    """``scheduler`` and the schedulers inside it, over copies of ``param_groups``. Whatever the copy does, to itself or
    to what it writes (momentum, say), leaves the original alone."""
    groups = [copy.deepcopy({k: v for k, v in group.items() if k != "params"}) for group in param_groups]
    for group in groups:
        group["params"] = []
    memo: dict[int, object] = {id(param_groups): groups}
    memo |= {id(old): new for old, new in zip(param_groups, groups, strict=True)}
    for optimizer in _optimizers_of(scheduler):
        memo[id(optimizer)] = _Rates(optimizer, groups)
    return copy.deepcopy(scheduler, memo), groups


def _optimizers_of(scheduler: object, seen: set[int] | None = None) -> Iterator[Optimizer]:
    """The optimizers of the scheduler and of all schedulers in its attributes (``SequentialLR``, wrappers)."""
    seen = set() if seen is None else seen
    if id(scheduler) in seen:
        return
    seen.add(id(scheduler))
    for value in vars(scheduler).values():
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(getattr(item, "param_groups", None), list):
                yield item
            elif hasattr(item, "step") and hasattr(item, "state_dict") and hasattr(item, "__dict__"):
                yield from _optimizers_of(item, seen)


def _is_function_of_step(scheduler: object) -> bool:
    """Not so for torch's ``MultiplicativeLR``, whose functions, under the same name, are factors of the rate before."""
    from torch.optim.lr_scheduler import LambdaLR

    return isinstance(scheduler, LambdaLR) and type(scheduler).get_lr is LambdaLR.get_lr


def missing_argument(scheduler: Scheduler) -> str | None:
    """What ``scheduler.step`` cannot be called without: ``ReduceLROnPlateau``'s metric, an epoch."""
    import inspect

    parameters = inspect.signature(scheduler.step).parameters.values()
    return next((p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD), None)
