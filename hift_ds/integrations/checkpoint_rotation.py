"""``save_total_limit`` that counts whole checkpoints only.

The Trainer keeps the newest folders by name. After a kill the newest may be half a checkpoint, and an
asynchronous save may still be writing it: the only one to resume from would be deleted.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from hift_ds.checkpoint.files import is_temporary, remove_folder
from hift_ds.checkpoint.sealed_folder import SEAL, seal_folder
from hift_ds.checkpoint.trainer_folder import why_incomplete, why_unusable

_NAME = re.compile(r"checkpoint-(\d+)")


def rotate_checkpoints(
    output_dir: str | Path, limit: int | None, best: str | Path | None = None, model_only: bool = False
) -> list[Path]:
    """Delete ``checkpoint-N`` folders older than the ``limit`` newest whole ones. Each goes in one step.

    Args:
        limit: whole checkpoints that stay; None or 0: nothing is deleted.
        best: stays too, and counts.
        model_only: folders without the engine's checkpoint are whole too, as ``save_only_model`` writes them; sealed ones.

    Returns:
        What was deleted.
    """
    output_dir = Path(output_dir)
    if not limit or limit < 0:
        return []
    for path in output_dir.iterdir():
        if is_temporary(path) and path.name.startswith(".checkpoint-"):  # a deletion that was killed
            shutil.rmtree(path, ignore_errors=True)
    folders = sorted(
        (int(m[1]), p) for p in output_dir.iterdir() if p.is_dir() and (m := _NAME.fullmatch(p.name))
    )

    def is_whole(path: Path) -> bool:
        return why_unusable(path) is None or (
            model_only and (path / SEAL).is_file() and why_incomplete(path) is None
        )

    whole = [path for _, path in folders if is_whole(path)]
    if not whole:
        return []
    kept = {whole[-1].name, *([Path(best).name] if best else [])}
    for path in reversed(whole):
        if len(kept) < limit:
            kept.add(path.name)
    newest = int(_NAME.fullmatch(whole[-1].name)[1])
    deleted = [path for number, path in folders if number < newest and path.name not in kept]
    for path in deleted:
        remove_folder(path)
    return deleted


class WholeCheckpointsStay:
    """Mixin before a Trainer class: checkpoints are sealed when complete, and rotated by what is whole."""

    def _save_checkpoint(self, model: Any, trial: Any, *args: Any, **kwargs: Any) -> None:
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial, *args, **kwargs)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()  # each rank has written its random state
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save and folder.is_dir():
            seal_folder(folder)
        self._rotate()

    def finish_checkpoints(self) -> None:
        """At the end of training: an asynchronous save is whole after this, and older ones may go."""
        if self.engine is not None and self.engine.wait_for_checkpoint():
            self._rotate()

    def _rotate(self) -> None:
        if self.args.should_save and Path(self.args.output_dir).is_dir():
            rotate_checkpoints(
                self.args.output_dir,
                self.args.save_total_limit,
                self.state.best_model_checkpoint,
                self.args.save_only_model,
            )
