"""What only a checkpoint does, tried before the first step: hours later it would end the training."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hift_ds.checkpoint.folder_lock import FolderLock
from hift_ds.errors import ConfigError
from hift_ds.ranks import on_all_ranks

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase, ProcessorMixin, TrainingArguments


@contextlib.contextmanager
def ready_to_save(
    args: TrainingArguments, model: nn.Module, processing: ProcessorMixin | PreTrainedTokenizerBase | None
) -> Iterator[None]:
    """Inside, ``args.output_dir`` is there and has this job alone as its writer, and a checkpoint's small files can be
    written. Nothing is done where the Trainer saves nothing.

    Args:
        args: ``TrainingArguments``.
        processing: the Trainer's tokenizer or processor; None: it has none.

    Raises:
        ConfigError: on all ranks; the folder is another job's or cannot be written, or the config or the tokenizer
            refuse to be saved.
    """
    if args.save_strategy == "no":
        yield
        return

    def begin() -> FolderLock | None:
        if not args.should_save:
            return None
        _rehearse({"model.config": getattr(model, "config", None), "processing_class": processing})
        return FolderLock(Path(args.output_dir), key="output_dir")

    lock = on_all_ranks(begin)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def _rehearse(parts: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, part in parts.items():
            save = getattr(part, "save_pretrained", None)
            if save is None:
                continue
            try:
                save(folder)
            except Exception as error:  # whatever a class of its own, or a check of transformers, raises
                reason = " ".join(str(error).split()) or type(error).__name__
                raise ConfigError(f"{name}: a checkpoint could not hold it: {reason[:300]}") from error
