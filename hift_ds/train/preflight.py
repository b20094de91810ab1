"""Everything about a run that can be found wrong before a model is loaded, in one call."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hift_ds.checkpoint.trainer_folder import broken_seal
from hift_ds.data.sources import check_source
from hift_ds.data.tokenizers import check_tokenizer_folder
from hift_ds.dtypes import Dtype
from hift_ds.errors import CheckpointError, ConfigError
from hift_ds.hf.model_folder import ModelFolder, check_model_folder, resolve_model
from hift_ds.train.run_config import RunConfig
from hift_ds.train.settings import (
    BatchSizes,
    Settings,
    resolve,
    resolve_dtype,
    resolve_max_length,
    training_arguments,
)
from hift_ds.train.tasks import TASKS


@dataclass(frozen=True)
class CheckedRun:
    """The settings of a run together with what its inputs turned out to be."""

    settings: Settings
    model: ModelFolder
    tokenizer_folder: Path
    dtype: Dtype
    """Dtype of the weights in training."""
    export_dtype: Dtype
    max_length: int
    """Tokens of the longest sample."""
    arguments: Mapping[str, Any]
    """Keyword arguments of ``transformers.TrainingArguments``, with the DeepSpeed config; not to be changed."""

    @property
    def run(self) -> RunConfig:
        """The run file."""
        return self.settings.run

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self.settings.world_size

    @property
    def batch(self) -> BatchSizes:
        """The batch sizes on these ranks."""
        return self.settings.batch

    @property
    def has_eval(self) -> bool:
        """Whether there is evaluation data."""
        return _has_eval(self.run)


def _has_eval(run: RunConfig) -> bool:
    return run.data.eval is not None or run.data.val_size > 0


def check_run(run: RunConfig, world_size: int) -> CheckedRun:
    """Check the run file, its DeepSpeed JSON, the model folder, the tokenizer; do the data exist?

    A model given by a Hub name is downloaded first. Nothing else reaches the network, and no weight is read.

    Raises:
        ConfigError: a setting is wrong or contradicts another.
        CheckpointError: the model's weights are missing, damaged or pickled.
        DataError: a data file is not there.
    """
    trust = run.model.trust_remote_code
    settings = resolve(run, world_size)
    for source in [*run.data.train_sources(), *run.data.eval_sources()]:
        check_source(source)
    _check_output(run)
    folder = resolve_model(run.model.path, trust_remote_code=trust)
    model = check_model_folder(folder, trust_remote_code=trust, auto_class=TASKS[run.task].auto_class)
    if reason := broken_seal(folder, weights=True):  # of a run's checkpoint-N, the only folders that have one
        raise CheckpointError(f"model.path: {reason}")
    tokenizer = resolve_tokenizer_folder(run, folder)
    dtype = resolve_dtype(settings, model.dtype)
    checked = CheckedRun(
        settings=settings,
        model=model,
        tokenizer_folder=tokenizer,
        dtype=dtype,
        export_dtype=model.dtype if run.export.dtype == "auto" else run.export.dtype,
        max_length=resolve_max_length(run, model.max_length),
        arguments=training_arguments(settings, dtype, has_eval=_has_eval(run)),
    )
    if settings.hift is not None:
        _check_optimizer(run, checked.arguments["deepspeed"]["optimizer"])
    return checked


def with_settings(checked: CheckedRun, settings: Settings) -> CheckedRun:
    """The same run with what was chosen since it was checked."""
    arguments = training_arguments(settings, checked.dtype, has_eval=checked.has_eval)
    return replace(checked, settings=settings, arguments=arguments)


def resolve_tokenizer_folder(run: RunConfig, model_folder: Path) -> Path:
    """The folder with the run's tokenizer, which is there.

    Raises:
        ConfigError: it is not, or has no tokenizer.
    """
    folder = model_folder
    if run.model.tokenizer is not None:
        folder = resolve_model(
            run.model.tokenizer, key="model.tokenizer", trust_remote_code=run.model.trust_remote_code
        )
    check_tokenizer_folder(folder)
    return folder


def _check_output(run: RunConfig) -> None:
    if glob.has_magic(str(run.output_dir.absolute())):
        raise ConfigError(
            f"train.output_dir: {str(run.output_dir.absolute())!r} has one of * ? [ in it, which transformers takes "
            "for a pattern when it looks for a checkpoint to resume from; choose another folder"
        )
    for key, folder in (("train.output_dir", run.output_dir), ("export.dir", run.export_dir)):
        existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if os.path.exists(parent))
        if not existing.is_dir():
            raise ConfigError(f"{key}: {str(existing)!r} is a file, expected a folder")
        if not os.access(existing, os.W_OK):
            raise ConfigError(f"{key}: no permission to write into {str(existing)!r}")
    if run.export_dir.resolve() == Path(run.model.path).expanduser().resolve():
        raise ConfigError(
            f"export.dir: {str(run.export_dir)!r} is model.path, which would be written over; choose another folder"
        )
    if run.train.resume not in ("auto", "never") and not Path(run.train.resume).expanduser().is_dir():
        raise ConfigError(f"train.resume: expected auto, never or a checkpoint's folder, got {run.train.resume!r}")


def _check_optimizer(run: RunConfig, block: dict[str, Any]) -> None:
    """Build it once for a single matrix: unknown names and options come out now, under the key that has them."""
    import torch

    from hift_ds.optim.build import build_optimizer

    matrix = torch.nn.Parameter(torch.zeros(2, 2))
    try:
        build_optimizer(block["type"], block["params"], [{"params": [matrix]}], matrices=frozenset([id(matrix)]))
    except ConfigError as error:
        if run.train.optimizer is None and not run.train.optimizer_args:
            raise
        line = str(error).replace('"optimizer.type"', "train.optimizer")
        raise ConfigError(line.replace('"optimizer.params', '"train.optimizer_args')) from None
