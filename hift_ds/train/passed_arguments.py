"""``train.arguments``: any field of the task's own arguments class but those that the run file or the engine has."""

from __future__ import annotations

import dataclasses
import importlib.util
import typing
from collections.abc import Mapping
from typing import Any

from hift_ds.errors import ConfigError, unknown_key

KEY = "train.arguments"

# Fields that the run file has a key for.
_HAVE_A_KEY = {
    "output_dir": "train.output_dir", "num_train_epochs": "train.epochs", "max_steps": "train.max_steps",
    "per_device_train_batch_size": "train.micro_batch_size", "per_device_eval_batch_size": "train.eval_batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "auto_find_batch_size": "train.auto_find_batch_size", "learning_rate": "train.learning_rate",
    "weight_decay": "train.weight_decay", "optim": "train.optimizer", "optim_args": "train.optimizer_args",
    "adam_beta1": "train.optimizer_args", "adam_beta2": "train.optimizer_args", "adam_epsilon": "train.optimizer_args",
    "max_grad_norm": "train.max_grad_norm", "lr_scheduler_type": "train.lr_scheduler",
    "lr_scheduler_kwargs": "train.lr_scheduler_args", "warmup_steps": "train.warmup_steps",
    "activation_checkpointing": "train.gradient_checkpointing",
    "gradient_checkpointing": "train.gradient_checkpointing", "logging_steps": "train.logging_steps",
    "logging_strategy": "train.logging_steps", "eval_steps": "train.eval_steps", "eval_strategy": "train.eval_steps",
    "save_steps": "train.save_steps", "save_strategy": "train.save_steps",
    "save_total_limit": "train.save_total_limit", "load_best_model_at_end": "train.load_best_model_at_end",
    "metric_for_best_model": "train.best_metric", "greater_is_better": "train.best_metric", "seed": "train.seed",
    "data_seed": "data.seed", "report_to": "train.report_to", "resume_from_checkpoint": "train.resume",
    "deepspeed": "deepspeed", "bf16": "model.dtype", "fp16": "model.dtype", "max_length": "data.max_length",
    "truncation_mode": "data.truncation", "dataset_num_proc": "data.num_workers", "chat_template_path": "data.template",
    "trust_remote_code": "model.trust_remote_code", "model_init_kwargs": "model",
}  # fmt: skip

# Fields that the engine or this program decides, with the reason.
_REFUSED = {
    "activation_checkpointing_kwargs": "reentrant checkpointing gives frozen layers no gradient",
    "gradient_checkpointing_kwargs": "reentrant checkpointing gives frozen layers no gradient",
    "optim_target_modules": "the engine builds the optimizer, one layer group at a time",
    "fsdp": "DeepSpeed partitions here", "fsdp_config": "DeepSpeed partitions here",
    "parallelism_config": "DeepSpeed partitions here", "accelerator_config": "the engine sets it",
    "bf16_full_eval": "evaluation is in the dtype of training",
    "fp16_full_eval": "evaluation is in the dtype of training",
    "average_tokens_across_devices": "the loss over ranks would be another number",
    "remove_unused_columns": "the data have what their collator takes",
    "label_names": "the task says which", "prediction_loss_only": "the task says what is measured",
    "batch_eval_metrics": "scores are of all rows", "include_for_metrics": "the task says what is measured",
    "include_num_input_tokens_seen": "the run's token counts need it", "disable_tqdm": "the run has its own progress",
    "log_level": "the run says what is to be said", "log_level_replica": "the run says what is to be said",
    "use_cpu": "the accelerator that is there is used", "local_rank": "the launcher says it",
    "ddp_backend": "DeepSpeed's, not DDP's engine", "ddp_timeout": "train.hang_timeout_s sets it",
    "save_only_model": "a checkpoint could not be resumed", "save_on_each_node": "the DeepSpeed JSON says it",
    "restore_callback_states_from_checkpoint": "the run sets it", "ignore_data_skip": "rows would be met twice",
    "enable_jit_checkpoint": "hift_ds saves on signals itself", "padding_free": "TRL has switched it off",
    "do_train": "the command says it", "do_eval": "data.eval says it", "do_predict": "hift-ds predict does it",
    "pad_token": "the tokenizer says it", "eos_token": "the tokenizer says it",
}  # fmt: skip

_NEED_A_PACKAGE = {"use_liger_kernel": ("liger_kernel", "liger-kernel"), "trackio_space_id": ("trackio", "trackio")}


def checked_arguments(given: Mapping[str, Any], cls: type) -> dict[str, Any]:
    """``given``, all of it fields of ``cls`` that may be passed on, of the types that ``cls`` declares.

    Raises:
        ConfigError: an unknown field (the message has the nearest), one that the run file has a key for or that the
            engine decides, or a value of another type.
    """
    fields = {field.name for field in dataclasses.fields(cls) if field.init}
    for name, value in given.items():
        if name in _HAVE_A_KEY:
            raise ConfigError(f"{KEY}.{name}: the run file has a key of its own for it: {_HAVE_A_KEY[name]}")
        if name in _REFUSED or name.startswith("ddp_"):
            raise ConfigError(f"{KEY}.{name}: cannot be set here: {_REFUSED.get(name, _REFUSED['ddp_backend'])}")
        if name not in fields:
            raise unknown_key(name, sorted(fields - _HAVE_A_KEY.keys() - _REFUSED.keys()), f"{KEY} ({cls.__name__})")
        _check_type(name, value, cls)
        module, package = _NEED_A_PACKAGE.get(name, (None, None))
        if value and module is not None and importlib.util.find_spec(module) is None:
            raise ConfigError(f"{KEY}.{name}: needs the package {package}; pip install {package}")
    return dict(given)


def _check_type(name: str, value: object, cls: type) -> None:
    """transformers takes whatever it is given, and fails later with it or not at all."""
    from pydantic import TypeAdapter, ValidationError

    try:
        check = TypeAdapter(typing.get_type_hints(cls)[name]).validate_python
    except Exception:  # a type that is no type for pydantic: left to the class
        return
    try:
        check(value, strict=not isinstance(value, str))
    except ValidationError as error:
        expected = error.errors()[0]["msg"].removeprefix("Input should be ").removeprefix("a valid ")
        raise ConfigError(f"{KEY}.{name}: expected {expected}, got {value!r}") from None
