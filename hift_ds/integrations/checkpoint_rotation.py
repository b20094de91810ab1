"""``save_total_limit`` that counts whole checkpoints only.

The Trainer keeps the newest folders by name. After a kill the newest may be half a checkpoint, and an
asynchronous save may still be writing it: the only one to resume from would be deleted.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from hift_ds.checkpoint.files import write_errors
from hift_ds.checkpoint.manifest import latest_tag
from hift_ds.checkpoint.trainer_folder import checkpoint_to_resume, rotate_checkpoints, seal_folder
from hift_ds.errors import CheckpointError
from hift_ds.ranks import gather, on_all_ranks

logger = logging.getLogger(__name__)


def _make_folder(folder: Path) -> None:
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)


def _seal(folder: Path, writes: bool, failure: CheckpointError | None) -> None:
    if failure is not None:
        raise failure
    if writes and folder.is_dir():
        with write_errors(folder):
            seal_folder(folder)


class WholeCheckpointsStay:
    """Mixin before a Trainer class: checkpoints are sealed when complete, and rotated by what is whole. One that cannot
    be written leaves nothing, and ends the run or not as ``"hift.checkpoint.on_error"`` says."""

    def _whole_checkpoint(self, asked: str | bool) -> str | bool:
        """The checkpoint to go on from (:func:`checkpoint_to_resume`), as the first rank finds it."""
        is_first = self.args.process_index == 0
        find = partial(checkpoint_to_resume, Path(self.args.output_dir), asked)
        found, reasons = gather(on_all_ranks(lambda: find() if is_first else (asked, [])))[0]
        for reason in reasons if is_first else ():
            logger.warning("%s; going on from %s", reason, found)
        return found

    def _save_checkpoint(self, model: Any, trial: Any, *args: Any, **kwargs: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        writes = self.args.should_save
        try:
            # Before the first collective, so that no rank waits for one that could not even begin.
            on_all_ranks(lambda: _make_folder(folder) if writes else None, CheckpointError)
            failure = self._written_by_the_trainer(folder, model, trial, *args, **kwargs)
            on_all_ranks(lambda: _seal(folder, writes, failure), CheckpointError)
        except CheckpointError as error:
            self._give_up(folder, error)
            return
        if self._lacks_states(folder):  # the engine has said why, and training goes on
            self._remove(folder)
            return
        self._rotate()

    def _written_by_the_trainer(
        self, folder: Path, model: Any, trial: Any, *args: Any, **kwargs: Any
    ) -> CheckpointError | None:
        """What went wrong, to be agreed upon: another rank may have been spared."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with write_errors(folder):
                super()._save_checkpoint(model, trial, *args, **kwargs)
        except CheckpointError as error:
            return error
        finally:
            self.args.save_total_limit = limit
        return None

    def _lacks_states(self, folder: Path) -> bool:
        """The same on all ranks."""
        checkpoint = getattr(getattr(self.engine, "hift", None), "checkpoint", None)
        if checkpoint is None or checkpoint.asynchronous or self.args.save_only_model:
            return False
        return not all(gather(not self.args.should_save or latest_tag(folder) is not None))

    def _give_up(self, folder: Path, error: CheckpointError) -> None:
        """Remove the checkpoint, and raise or go on without it as the config says; on all ranks alike."""
        if self.engine is not None:
            with contextlib.suppress(CheckpointError):
                self.engine.wait_for_checkpoint()  # it writes into the folder
        self._remove(folder)
        hift = getattr(self.engine, "hift", None)
        if hift is None or hift.checkpoint.on_error == "raise":
            raise error
        if self.args.process_index == 0:
            logger.error("checkpoint not saved, training goes on: %s", error)

    def _remove(self, folder: Path) -> None:
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)
        if self.state.best_model_checkpoint == str(folder):
            self.state.best_model_checkpoint = None

    def finish_checkpoints(self) -> None:
        """Wait for an asynchronous save, at the end of training, and delete older checkpoints that may go."""
        if self.engine is not None and self.engine.wait_for_checkpoint():
            self._rotate()

    def _rotate(self) -> None:
        # A trial of a hyperparameter search has a folder of its own. (transformers before 5.23 keeps no _trial.)
        folder = self._get_output_dir(trial=getattr(self, "_trial", None))
        if self.args.should_save and Path(folder).is_dir():
            rotate_checkpoints(
                folder,
                self.args.save_total_limit,
                self.state.best_model_checkpoint,
                self.args.save_only_model,
            )
