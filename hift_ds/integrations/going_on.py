"""What transformers reads of a ``checkpoint-N`` once the engine has loaded its own part: looked at before either."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers.trainer_pt_utils import safe_globals

from hift_ds.checkpoint.trainer_folder import is_sealed, why_incomplete
from hift_ds.errors import CheckpointError
from hift_ds.ranks import on_all_ranks

if TYPE_CHECKING:
    from hift_ds.engine.engine import HiFTEngine

_STATES = ("scheduler.pt", "rng_state*.pth")


def checks_files(engine: HiFTEngine) -> None:
    """Have the engine look at the Trainer's own files before it loads the checkpoint that training goes on from. Once
    training has begun (the best checkpoint, at its end) nobody reads them."""

    def check(folder: Path) -> None:
        reason = why_incomplete(folder) or _why_unreadable(folder, engine.lr_scheduler is None)
        if reason is not None:
            raise CheckpointError(f"resume_from_checkpoint: {reason}; choose another checkpoint")

    engine.checkpointer.before_load = lambda folder: on_all_ranks(lambda: check(folder), CheckpointError)


def _why_unreadable(folder: Path, reads_scheduler: bool) -> str | None:
    """What transformers would end in a traceback of; None if all can be read. What is sealed is what was written."""
    if reads_scheduler and not (folder / "scheduler.pt").is_file():
        return f"{folder} has no scheduler.pt: it was saved with the scheduler of a DeepSpeed config"
    if is_sealed(folder):
        return None
    for path in sorted(path for pattern in _STATES for path in folder.glob(pattern)):
        try:
            with safe_globals():
                torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever torch's readers of archives and pickles raise
            return f"{path} is damaged ({type(error).__name__})"
    return None
