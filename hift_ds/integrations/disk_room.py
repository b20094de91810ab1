"""Is there room on disk for what a run will leave? Counted and said before the first step, not found out hours
later."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from hift_ds.checkpoint.write_plan import saved_tensors
from hift_ds.errors import CheckpointError
from hift_ds.integrations.weights_once import has_the_form_of_a_checkpoint
from hift_ds.layers.arch import whole_shape
from hift_ds.ranks import on_all_ranks

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from hift_ds.engine.engine import HiFTEngine

GIB = 2**30
_CHECKPOINT = re.compile(r"checkpoint-\d+")


class DiskRoomCallback(TrainerCallback):
    """Refuses a run whose checkpoints and export will not fit.

    Args:
        get_engine: the engine in training; asked for a checkpoint's size.
        export_dir: of the fine-tuned model; None: the run exports none.
        export_bytes: of its weights.
        say: prints a line; on the first rank.
        section: before the names of settings in messages.
        twice_at_first: the Trainer writes a checkpoint's weights itself, before they become one file with the engine's.
    """

    def __init__(
        self, get_engine: Callable[[], HiFTEngine | None], export_dir: Path | None = None, export_bytes: int = 0,
        say: Callable[[str], None] = lambda line: None, section: str = "", twice_at_first: bool = False,
    ) -> None:  # fmt: skip
        self._get_engine, self._twice_at_first = get_engine, twice_at_first
        self._export_dir, self._export_bytes = export_dir, export_bytes
        self._say, self._section = say, section

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Raises CheckpointError on all ranks: too little is free."""
        engine = self._get_engine()
        if engine is None or args.save_strategy == "no":
            return
        assert model is not None and args.output_dir is not None
        each = 0 if args.save_only_model else engine.checkpointer.num_bytes()
        # With our mixin the Trainer writes no partitioned weights beside the engine's.
        partitioned = engine.zero_optimization_stage() == 3 and not self._twice_at_first
        weights = sum(t.element_size() * math.prod(whole_shape(t)) for t in saved_tensors(model).values())
        once = not args.save_only_model and has_the_form_of_a_checkpoint(model)
        if not partitioned and not once:
            each += weights
        meanwhile = weights if self._twice_at_first and once else 0
        every = math.ceil(args.save_steps) if args.save_steps >= 1 else math.ceil(args.save_steps * state.max_steps)
        left = max(state.max_steps - state.global_step, 0)
        saves = math.ceil(left / every) if args.save_strategy == "steps" else 1
        if args.save_strategy == "epoch":
            saves = math.ceil(args.num_train_epochs) if args.max_steps <= 0 else 1
        count = checkpoints_at_once(saves, args.save_total_limit, bool(args.load_best_model_at_end))
        folder = Path(args.output_dir)
        on_all_ranks(lambda: self._check(folder, each, count, args.should_save, meanwhile), CheckpointError)

    def _check(self, folder: Path, each: int, count: int, writes: bool, meanwhile: int) -> None:
        if not writes:
            return
        existing = [path for path in _existing(folder) if _CHECKPOINT.fullmatch(path.name)]
        needed = count * each + meanwhile - sum(map(bytes_on_disk, existing))
        export_dir = self._export_dir or folder
        export = self._export_bytes - bytes_on_disk(export_dir) if self._export_dir else 0
        there, here = _existing_parent(export_dir), _existing_parent(folder)
        together = os.stat(there).st_dev == os.stat(here).st_dev
        what = f"{count} checkpoint{'s' if count > 1 else ''} of {_gib(each)}"
        if meanwhile:
            what += f" (and {_gib(meanwhile)} while one is written)"
        exported = f" and a model of {_gib(self._export_bytes)}" if self._export_dir else ""
        free = shutil.disk_usage(here).free
        self._say(f"disk: {what}{exported}; {_gib(free)} free in {folder}")
        if needed + (export if together else 0) > free:
            raise CheckpointError(
                f"{self._section}output_dir: {str(folder)!r} will need {what}{exported if together else ''} at a time, "
                f"and {_gib(free)} are free: choose another folder, fewer of them ({self._section}save_total_limit, "
                f"{self._section}save_steps) or a smaller form of the states"
            )
        if not together and export > (free := shutil.disk_usage(there).free):
            raise CheckpointError(
                f"export.dir: {str(self._export_dir)!r} will need {_gib(export)}, and {_gib(free)} are free"
            )


def checkpoints_at_once(saves: int, limit: int | None, keeps_best: bool) -> int:
    """The most that are on disk together: a new one is written before the oldest goes.

    Args:
        saves: checkpoints that the run will write.
        limit: that are kept; None: all.
        keeps_best: the one with the best evaluation stays whatever its age.
    """
    if not limit:
        return saves
    return min(saves, max(limit, 2 if keeps_best else 1) + 1)


def bytes_on_disk(folder: Path) -> int:
    """Bytes of the files below ``folder``; a file with two names counts once."""
    files = {}
    for path in folder.rglob("*") if folder.is_dir() else ():
        if path.is_file() and not path.is_symlink():
            status = path.stat()
            files[status.st_dev, status.st_ino] = status.st_size
    return sum(files.values())


def _existing(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _existing_parent(folder: Path) -> Path:
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / 2**20:.1f} MiB"
