"""A run that has done all its steps, started again, trains none.

transformers' loop asks whether it is done only after a step, so that each start of a finished run trains one more.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.trainer_utils import get_last_checkpoint

if TYPE_CHECKING:
    from transformers.trainer_utils import TrainOutput

logger = logging.getLogger(__name__)


class StopsWhenDone:
    """Mixin before a Trainer class.

    Attributes:
        had_no_step_left: the last :meth:`train` has trained nothing.
    """

    had_no_step_left = False
    _resumed_from: str | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as the Trainer does. From a checkpoint with all steps of this run done it loads, and trains nothing."""
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(self.args.output_dir)
        self.had_no_step_left = False
        self._resumed_from = folder or None  # type: ignore[assignment]  # declared as a folder alone
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Nothing: the engine's checkpoint has the loss scale. A ``scaler.pt`` in the folder is none of this run's."""

    def set_initial_training_values(self, *args: Any, **kwargs: Any) -> tuple:
        """The Trainer's: first its number of epochs, last its number of steps. No epoch if no step is left."""
        values = super().set_initial_training_values(*args, **kwargs)
        done, steps = _steps_done(self._resumed_from), values[-1]
        if done is None or steps is None or done < steps:
            return values
        self.had_no_step_left = True
        self.has_no_step_left(done, steps)
        return (0, *values[1:])

    def has_no_step_left(self, done: int, steps: int) -> None:
        """Called before a :meth:`train` that will train nothing, with the steps of the checkpoint and of the run."""
        if self.args.process_index == 0 and done > steps:
            logger.warning(
                "%s has done %d steps, more than the %d of this run: nothing is trained",
                self._resumed_from, done, steps,
            )  # fmt: skip
        elif self.args.process_index == 0:
            logger.warning("%s has done all %d steps of this run: nothing is trained", self._resumed_from, steps)


def _steps_done(folder: str | None) -> int | None:
    if folder is None:
        return None
    try:
        return int(json.loads((Path(folder) / "trainer_state.json").read_text(encoding="utf-8"))["global_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # the Trainer says what is wrong with it, or begins at step 0
