"""What a finished model of a task other than language modelling loses and scores on held-out rows, as its run counts
it: by the task's own trainer."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from hift_ds.data.config import DataConfig
from hift_ds.data.task_data import Preparation
from hift_ds.errors import ConfigError, DataError
from hift_ds.hf.model_folder import max_sequence_length, resolve_model
from hift_ds.train.passed_arguments import checked_arguments
from hift_ds.train.settings import length_or_default
from hift_ds.train.tasks import TASKS, Task
from hift_ds.train.trained_model import TrainedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

    from hift_ds.data.prepare import PreparedData


def task_data(trained: TrainedModel, data: str | None) -> DataConfig:
    """The run's own held-out rows, or those of ``data`` read as the run reads its data.

    Raises:
        ConfigError: a model folder alone, and no ``data``.
        DataError: the run has held out nothing.
    """
    given = {} if trained.run is None else trained.run.data.model_dump()
    if data is not None:
        return DataConfig(**{**given, "train": data, "eval": data, "val_size": 0.0, "max_samples": None})
    if trained.run is None:
        raise ConfigError(
            f"{trained.folder} is a model and not a run, which would say what was held out; give --data FILE"
        )
    if trained.run.data.eval is None and not trained.run.data.val_size:
        raise DataError("nothing is held out: data.eval and data.val_size are both empty; give --data FILE")
    return trained.run.data


def evaluate_task(
    trained: TrainedModel, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: DataConfig, batch_size: int
) -> dict[str, float]:
    """``loss``, and what the task measures.

    Raises:
        ConfigError: ``data`` has other labels than the model, or cannot be read with this tokenizer.
        DataError: data is missing or malformed.
    """
    task, config = TASKS[trained.task], model.config.to_dict()
    max_length = length_or_default(data.max_length, max_sequence_length(config))
    prepared = task.prepare(Preparation(data, tokenizer, max_length, config))
    names = prepared.model_options.get("id2label")
    known = {int(number): name for number, name in (model.config.id2label or {}).items()}
    if names is not None and dict(names) != known:
        raise ConfigError(
            f"{trained.folder} knows the labels {', '.join(known.values())}; the data have {', '.join(names.values())}"
        )
    collate: Any = prepared.collator
    if hasattr(collate, "model"):
        collate.model = model
    with tempfile.TemporaryDirectory() as folder, _without_deepspeed():
        args = task.arguments_class()(folder, **_options(trained, task, model, batch_size, max_length))
        trainer = _plain_trainer(task)(
            model=model, args=args, train_dataset=prepared.train, eval_dataset=prepared.eval,
            processing_class=tokenizer, data_collator=collate, **_reference(trained, task, model, prepared),
        )  # fmt: skip
        found = trainer.evaluate()
    measured = ("loss", *task.metrics)
    named = {name: found[f"eval_{name}"] for name in measured if f"eval_{name}" in found}
    return {**named, "rows": prepared.reports[-1].num_rows}


@contextlib.contextmanager
def _without_deepspeed() -> Iterator[None]:
    """Inside this block the Trainer does without DeepSpeed: under the variable that a run of this process has left,
    accelerate would build an engine of DeepSpeed."""
    name = "ACCELERATE_USE_DEEPSPEED"
    before = os.environ.pop(name, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before


def _options(
    trained: TrainedModel, task: Task, model: PreTrainedModel, batch_size: int, max_length: int
) -> dict[str, Any]:
    cls = task.arguments_class()
    given = {} if trained.run is None else checked_arguments(trained.run.train.arguments, cls)
    options: dict[str, Any] = {**task.options, **given}
    if trained.task == "seq2seq":
        options.setdefault("generation_max_length", max_length)
    if task.uses_trl:
        options |= {"max_length": max_length, "gradient_checkpointing": False}
    return options | {
        "per_device_eval_batch_size": batch_size, "per_device_train_batch_size": batch_size, "report_to": "none",
        "bf16": False, "fp16": False, "use_cpu": model.device.type == "cpu", "disable_tqdm": True,
        "log_level": "error", "remove_unused_columns": False, "prediction_loss_only": task.uses_trl,
        "label_names": list(task.label_names) if task.label_names else None,
    }  # fmt: skip


def _plain_trainer(task: Task) -> type[Trainer]:
    """The task's own class, which asks the network for nothing and prints nothing."""
    from transformers import PrinterCallback

    def silent(trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        base.__init__(trainer, *args, **kwargs)
        trainer.remove_callback(PrinterCallback)

    base = task.trainer_class()
    return type(f"Plain{base.__name__}", (base,), {"__init__": silent, "_send_telemetry": lambda trainer: None})


def _reference(trained: TrainedModel, task: Task, model: PreTrainedModel, prepared: PreparedData) -> dict[str, Any]:
    """What the trainer is given besides: scores, or the model that the run began with."""
    if not task.uses_trl:
        return {"compute_metrics": prepared.score}
    if trained.task not in ("dpo", "kto"):
        return {}
    assert trained.run is not None  # a folder alone is never taken for these
    path = trained.run.model.path
    base = resolve_model(path, trust_remote_code=trained.run.model.trust_remote_code)
    reference = task.model_class().from_pretrained(
        base, dtype=model.dtype, use_safetensors=True, local_files_only=True,
        trust_remote_code=trained.run.model.trust_remote_code,
    )  # fmt: skip
    return {"ref_model": reference.to(model.device).eval()}
