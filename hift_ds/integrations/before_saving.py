"""What only a checkpoint does, tried before the first step: hours later it would end the training."""

from __future__ import annotations

import contextlib
import functools
import io
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, modeling_utils

from hift_ds.checkpoint.folder_lock import FolderLock
from hift_ds.errors import ConfigError
from hift_ds.integrations.weights_once import has_save_pretrained
from hift_ds.ranks import on_all_ranks

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase, ProcessorMixin, TrainingArguments


@contextlib.contextmanager
def ready_to_save(
    args: TrainingArguments,
    model: nn.Module,
    processing: ProcessorMixin | PreTrainedTokenizerBase | None,
    saves_generation_config: bool = False,
) -> Iterator[None]:
    """Inside, ``args.output_dir`` is there and has this job alone as its writer, and a checkpoint's small files can be
    written. Nothing is done where the Trainer saves nothing.

    Args:
        args: ``TrainingArguments``.
        processing: the tokenizer or processor that the Trainer saves; None: it has none.
        saves_generation_config: by transformers' ``save_pretrained``, which refuses some; else by ours.

    Raises:
        ConfigError: on all ranks; the folder is another job's or cannot be written, or the config, the tokenizer or the
            arguments refuse to be saved.
    """
    if args.save_strategy == "no":
        yield
        return

    def begin() -> FolderLock | None:
        if not args.should_save:
            return None
        parts = {"model.config": getattr(model, "config", None), "processing_class": processing}
        if saves_generation_config:
            parts["model.generation_config"] = getattr(model, "generation_config", None)
        _refuse_unwritable(model, saved_by_transformers=saves_generation_config)
        _refuse_undeclared_ties(model, args)
        _rehearse(parts, args)
        assert args.output_dir is not None
        return FolderLock(Path(args.output_dir), key="output_dir")

    lock = on_all_ranks(begin)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def _rehearse(parts: dict[str, Any], args: TrainingArguments) -> None:
    try:
        folder = tempfile.TemporaryDirectory()
    except OSError as error:
        raise ConfigError(
            f"no temporary folder can be written ({error.strerror or error}); set the environment variable TMPDIR to "
            "one that can"
        ) from None
    with folder as name:
        for part, saved in parts.items():
            save = getattr(saved, "save_pretrained", None)
            if save is not None:
                _try(part, functools.partial(save, name))
        _try("args", lambda: torch.save(args, io.BytesIO()))


def _refuse_unwritable(model: nn.Module | None, saved_by_transformers: bool) -> None:
    """Refuse what safetensors does not take of a ``state_dict``, which the Trainer writes of a model that is none of
    transformers'. Our own saving separates tied weights."""
    if model is None or has_save_pretrained(model):
        return
    name_at: dict[int, str] = {}
    for name, value in model.state_dict().items():
        reason = ""
        if not isinstance(value, torch.Tensor):
            reason = f"is a {type(value).__name__} (get_extra_state) and no tensor: keep it in a buffer"
        elif saved_by_transformers and value.numel():
            other = name_at.setdefault(value.untyped_storage().data_ptr(), name)
            if other != name or not value.is_contiguous():
                what = f"is {other} too" if other != name else "is not contiguous"
                reason = f"{what}, which transformers cannot write: use HiFTTrainer or HiFTMixin"
        if reason:
            raise ConfigError(f'model: a checkpoint could not hold it: {name} {reason}, or save_strategy="no"')


def _refuse_undeclared_ties(model: nn.Module | None, args: TrainingArguments) -> None:
    """Refuse a model of transformers' whose class does not say which of its weights are tied: ``save_pretrained`` does.
    With ZeRO-3 it writes no weights."""
    check = getattr(modeling_utils, "remove_tied_weights_from_state_dict", None)  # of transformers 5
    plugin = getattr(args, "deepspeed_plugin", None)
    if check is None or not isinstance(model, PreTrainedModel) or (plugin is not None and plugin.zero_stage == 3):
        return
    ignored = model._keys_to_ignore_on_save or ()
    state = {name: value for name, value in model.state_dict().items() if name not in ignored}
    _try("model", lambda: check(state, model))


def _try(part: str, save: Callable[[], Any]) -> None:
    try:
        save()
    except Exception as error:  # whatever a class of its own, or a check of transformers, raises
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{part}: a checkpoint could not hold it: {reason[:300]}") from error


def saved_by_trainer(processing: Any, collate: Any) -> Any:
    """What a Trainer saves beside the weights: its tokenizer or processor, else its collator's."""
    collate = getattr(collate, "data_collator", collate)  # where a list of rows is stripped of columns
    return processing if processing is not None else getattr(collate, "tokenizer", None)
