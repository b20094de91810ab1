"""A run file and its DeepSpeed JSON, put together: one value for each setting that both can make.

A key of the run file that the user wrote and a value in the JSON must agree; a default of the run file gives
way to the JSON; ``"auto"`` in the JSON takes the run file's value.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from hift_ds.config import BLOCK, HiFTConfig, check_against_deepspeed, parse_block, parsed, read_json_file
from hift_ds.dtypes import Dtype
from hift_ds.errors import ConfigError, unknown_key
from hift_ds.optim.build import takes_option
from hift_ds.shipped import file_or_shipped
from hift_ds.train.passed_arguments import checked_arguments
from hift_ds.train.run_config import RunConfig
from hift_ds.train.tasks import TASKS

DEFAULT_MAX_LENGTH = 2048
DEFAULT_OPTIMIZER = "AdamW"
_AUTO = (None, "auto")


@dataclass(frozen=True)
class BatchSizes:
    """Rows: in one forward pass, passes in one optimizer step, rows in one optimizer step over all ranks."""

    micro_batch_size: int
    gradient_accumulation_steps: int
    global_batch_size: int


def read_deepspeed(run: RunConfig) -> dict[str, Any]:
    """The contents of the run's DeepSpeed JSON, as written there.

    Raises:
        ConfigError: no such file, or no JSON in it.
    """
    if run.deepspeed is None:
        return {}
    if isinstance(run.deepspeed, Mapping):
        return deepcopy(dict(run.deepspeed))
    try:
        file = file_or_shipped(run.deepspeed, "deepspeed", *([run.file.parent] if run.file else []))
    except ConfigError as error:
        raise ConfigError(f"deepspeed: {error}") from None
    content = read_json_file(file)
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: expected an object, got {type(content).__name__}")
    return content


@dataclass(frozen=True)
class Settings:
    """What a run file and its DeepSpeed JSON come to on so many ranks. Made once in a run, by :func:`resolve`; whoever
    needs a setting afterwards is given this, or values out of it.

    Attributes:
        run: the run file.
        world_size: ranks of the job.
        written: the DeepSpeed JSON as it was read; not to be changed.
        batch: the three batch sizes, which multiply out.
        hift: the "hift" block: the run file's keys over the JSON's; ``None`` with ``hift: false``.
    """

    run: RunConfig
    world_size: int
    written: Mapping[str, Any]
    batch: BatchSizes
    hift: HiFTConfig | None


def resolve(run: RunConfig, world_size: int) -> Settings:
    """Read the DeepSpeed JSON of ``run`` and settle what can be settled without its model.

    Raises:
        ConfigError: no such file or no JSON in it; the run file and the JSON disagree; the batch sizes do not multiply
            out; an unknown key or a wrong value in the "hift" block.
    """
    written = read_deepspeed(run)
    return Settings(run, world_size, written, _batch_sizes(run, written, world_size), _hift_block(run, written))


def _batch_sizes(run: RunConfig, ds: Mapping[str, Any], world_size: int) -> BatchSizes:
    """global = micro x accumulation x ``world_size``."""
    micro = _agreed(run, "train.micro_batch_size", ds, "train_micro_batch_size_per_gpu")
    accumulation = _agreed(run, "train.gradient_accumulation_steps", ds, "gradient_accumulation_steps")
    total = _agreed(run, "train.global_batch_size", ds, "train_batch_size")
    ranks = f"{world_size} rank{'s' if world_size > 1 else ''}"
    if total is None:
        micro, accumulation = micro or 1, accumulation or 1
        return BatchSizes(micro, accumulation, micro * accumulation * world_size)
    if micro is not None and accumulation is not None:
        if micro * accumulation * world_size != total:
            raise ConfigError(
                f"train.global_batch_size: {total} is not micro_batch_size {micro} x "
                "gradient_accumulation_steps "
                f"{accumulation} x {ranks} = {micro * accumulation * world_size}; leave one of them out"
            )
        return BatchSizes(micro, accumulation, total)
    one = (micro or accumulation or 1) * world_size
    if total % one:
        name = "gradient_accumulation_steps" if micro is None and accumulation is not None else "micro_batch_size"
        below = total // one * one
        nearest = f"are {below} and {below + one}" if below else f"is {one}"
        raise ConfigError(
            f"train.global_batch_size: {total} is not a multiple of {name} {one // world_size} x {ranks}; "
            f"the nearest {nearest}"
        )
    if micro is None and accumulation is not None:
        return BatchSizes(total // one, accumulation, total)
    return BatchSizes(one // world_size, total // one, total)


def gives_passes(settings: Settings) -> bool:
    """Whether run file or DeepSpeed JSON decide how the rows of an optimizer step are cut into forward passes. They do
    not where they give ``global_batch_size`` alone."""
    run, ds = settings.run, settings.written
    keys = {"train.micro_batch_size": "train_micro_batch_size_per_gpu",
            "train.gradient_accumulation_steps": "gradient_accumulation_steps"}  # fmt: skip
    if any(_agreed(run, key, ds, ds_key) is not None for key, ds_key in keys.items()):
        return True
    return _agreed(run, "train.global_batch_size", ds, "train_batch_size") is None


def resolve_dtype(settings: Settings, stored: Dtype) -> Dtype:
    """The dtype of the weights in training.

    Args:
        stored: of the weights in the model's files.

    Raises:
        ConfigError: ``model.dtype`` and the DeepSpeed JSON disagree.
    """
    ds = settings.written
    means: dict[str, Dtype] = {"torch_autocast": "fp32", "bf16": "bf16", "fp16": "fp16"}
    why = next((name for name in means if (ds.get(name) or {}).get("enabled") is True), None)
    from_json = means[why] if why else None
    wanted = settings.run.model.dtype
    if wanted == "auto":
        return from_json or stored
    if from_json is not None and wanted != from_json:
        raise ConfigError(
            f"model.dtype: {wanted}, but {why!r} is enabled in the DeepSpeed config, which means "
            f"{from_json}; change one"
        )
    for name in ("bf16", "fp16"):
        if wanted == name and (ds.get(name) or {}).get("enabled") is False:
            raise ConfigError(
                f'model.dtype: {wanted}, but "{name}.enabled" is false in the DeepSpeed config; change one'
            )
    return wanted


def resolve_max_length(run: RunConfig, limit: int | None) -> int:
    """Tokens of the longest sample.

    Args:
        limit: what the model's positions allow; None: any length.

    Raises:
        ConfigError: ``data.max_length`` is more than that.
    """
    wanted = run.data.max_length
    if wanted is not None and limit is not None and wanted > limit:
        raise ConfigError(
            f"data.max_length: {wanted} is longer than the {limit} positions that the model in {run.model.path!r} has"
        )
    return length_or_default(wanted, limit)


def max_grad_norm(settings: Settings) -> float:
    """The norm to which gradients are clipped; 0 for no clipping.

    Raises:
        ConfigError: the run file and the DeepSpeed JSON disagree.
    """
    return _agreed(settings.run, "train.max_grad_norm", settings.written, "gradient_clipping")


def length_or_default(wanted: int | None, limit: int | None) -> int:
    """Tokens of the longest sample: ``wanted``; for a run that does not say, the default within the model's
    ``limit``."""
    return wanted or min(DEFAULT_MAX_LENGTH, limit or DEFAULT_MAX_LENGTH)


def _hift_block(run: RunConfig, ds: Mapping[str, Any]) -> HiFTConfig | None:
    if run.hift is False:
        return None
    return parse_block(_merged(ds.get(BLOCK) or {}, run.hift_block))


def deepspeed_config(settings: Settings, dtype: Dtype) -> dict[str, Any]:
    """The DeepSpeed config of a run, with nothing left "auto" that the run file decides.

    Args:
        dtype: from :func:`resolve_dtype`.

    Raises:
        ConfigError: the run file and the JSON disagree, or the "hift" block contradicts the keys beside it.
    """
    run, batch, ds = settings.run, settings.batch, deepcopy(dict(settings.written))
    ds["train_micro_batch_size_per_gpu"] = batch.micro_batch_size
    ds["gradient_accumulation_steps"] = batch.gradient_accumulation_steps
    ds["train_batch_size"] = batch.global_batch_size
    ds.setdefault("zero_optimization", {"stage": 0})  # accelerate insists on the block
    ds["gradient_clipping"] = max_grad_norm(settings)
    for name in ("bf16", "fp16"):
        if dtype == name or name in ds:
            ds[name] = {**(ds.get(name) or {}), "enabled": dtype == name}
    ds["optimizer"] = _optimizer_block(run, ds.get("optimizer"))
    if run.is_given("train.lr_scheduler") and ds.get("scheduler"):
        raise ConfigError('train.lr_scheduler: the DeepSpeed config has a "scheduler" too; remove one')
    ds.pop(BLOCK, None)
    if settings.hift is not None:
        ds[BLOCK] = parsed(settings.hift)
        check_against_deepspeed(settings.hift, ds)
    return ds


def training_arguments(settings: Settings, dtype: Dtype, *, has_eval: bool) -> dict[str, Any]:
    """Keyword arguments of ``transformers.TrainingArguments``, its DeepSpeed config included.

    Args:
        dtype: from :func:`resolve_dtype`.
        has_eval: there is evaluation data.

    Raises:
        ConfigError: as :func:`deepspeed_config`, or evaluation is asked for without data.
    """
    import torch

    run, train = settings.run, settings.run.train
    stops = train.early_stopping.patience is not None
    if not has_eval and (train.eval_steps or train.load_best_model_at_end or stops):
        name = "eval_steps" if train.eval_steps else "load_best_model_at_end"
        name, value = ("early_stopping", "it") if stops else (name, getattr(train, name))
        raise ConfigError(f"train.{name}: {value} needs data.eval or data.val_size")
    measured = ("loss", *TASKS[run.task].metrics)
    if train.best_metric.removeprefix("eval_") not in measured:
        raise unknown_key(train.best_metric, measured, f"train.best_metric of task {run.task}", "score")
    metric = f"eval_{train.best_metric.removeprefix('eval_')}"
    ds = deepspeed_config(settings, dtype)
    if train.auto_find_batch_size:
        _check_finding_a_batch(ds, settings.world_size)
    options = ds["optimizer"]["params"]
    betas = options.get("betas", (0.9, 0.999))
    task = TASKS[run.task]
    given = checked_arguments(train.arguments, task.arguments_class())
    if given.get("label_smoothing_factor") and "labels" not in (task.label_names or ()):
        own = "; its own is label_smoothing" if run.task == "dpo" else ""
        raise ConfigError(
            f"train.arguments.label_smoothing_factor: has no effect on the loss of task {run.task}; remove it{own}"
        )
    return {
        **task.options,
        "output_dir": str(run.output_dir),
        "num_train_epochs": train.epochs,
        "max_steps": train.max_steps or -1,
        "per_device_train_batch_size": ds["train_micro_batch_size_per_gpu"],
        "per_device_eval_batch_size": train.eval_batch_size or ds["train_micro_batch_size_per_gpu"],
        "gradient_accumulation_steps": ds["gradient_accumulation_steps"],
        "auto_find_batch_size": train.auto_find_batch_size,
        # transformers compares these with the DeepSpeed config
        "learning_rate": options["lr"],
        "weight_decay": options.get("weight_decay", 0.0),
        "adam_beta1": betas[0],
        "adam_beta2": betas[1],
        "adam_epsilon": options.get("eps", 1e-8),
        "max_grad_norm": ds["gradient_clipping"],
        "bf16": dtype == "bf16",
        "fp16": dtype == "fp16",
        "lr_scheduler_type": train.lr_scheduler,
        "lr_scheduler_kwargs": train.lr_scheduler_args or None,
        "warmup_steps": train.warmup_steps or train.warmup_ratio,  # below 1 it is a share of all steps
        "activation_checkpointing": train.gradient_checkpointing,
        "activation_checkpointing_kwargs": {"use_reentrant": False} if train.gradient_checkpointing else None,
        "logging_strategy": "steps",
        "logging_steps": train.logging_steps,
        "eval_strategy": "no" if not has_eval else "steps" if train.eval_steps else "epoch",
        "eval_steps": train.eval_steps,
        "save_strategy": "steps" if train.save_steps else "no",
        "save_steps": train.save_steps or 500,
        "save_total_limit": train.save_total_limit,
        "load_best_model_at_end": train.load_best_model_at_end,
        "metric_for_best_model": metric if train.load_best_model_at_end or stops else None,
        "greater_is_better": not metric.endswith(("loss", "perplexity", "mse")),
        "restore_callback_states_from_checkpoint": stops,  # its count of evaluations that were no better
        "seed": train.seed,
        "data_seed": run.data.seed,
        "report_to": list(train.report_to) or "none",
        "prediction_loss_only": task.is_language_modelling or task.uses_trl,
        "remove_unused_columns": False,  # packed rows have a column for the collator that no model knows
        "use_cpu": not torch.accelerator.is_available(),
        "deepspeed": ds,
        **_of_the_data(run),
        **given,
    }


def _of_the_data(run: RunConfig) -> dict[str, Any]:
    """Arguments that say how the trainer reads its data."""
    task, data = TASKS[run.task], run.data
    found: dict[str, Any] = {} if data.shuffle else {"train_sampling_strategy": "sequential"}
    if task.uses_trl:
        found |= {
            "trust_remote_code": run.model.trust_remote_code,
            "dataset_num_proc": data.num_workers if data.num_workers > 1 else None,
        }
        if (
            data.truncation != ("drop" if run.task == "reward" else "keep_start")
            and "truncation" in data.model_fields_set
        ):
            how = "drops rows that are longer" if run.task == "reward" else "keeps the start of longer rows"
            raise ConfigError(f"data.truncation: {data.truncation}, but task {run.task} {how}; leave the key out")
    return found


def _check_finding_a_batch(ds: Mapping[str, Any], world_size: int) -> None:
    """Where a smaller batch can be tried."""
    if world_size > 1:
        raise ConfigError(
            f"train.auto_find_batch_size: true on {world_size} ranks: one that runs out of memory would leave the "
            "others waiting; find the size on one rank, or with hift-ds estimate"
        )
    if ds["zero_optimization"].get("stage", 0) == 3:
        raise ConfigError(
            'train.auto_find_batch_size: true with "zero_optimization.stage": 3, for which transformers does not '
            "have it; use stage 0, 1 or 2, or hift-ds estimate"
        )


def _optimizer_block(run: RunConfig, block: Mapping[str, Any] | None) -> dict[str, Any]:
    train = run.train
    if block is not None and (train.optimizer is not None or train.optimizer_args):
        raise ConfigError('train.optimizer: the DeepSpeed config has an "optimizer" too; remove one')
    if block is None:
        block = {"type": train.optimizer or DEFAULT_OPTIMIZER, "params": train.optimizer_args}
    options = dict(block.get("params") or {})
    options["lr"] = _agreed(run, "train.learning_rate", options, "lr", "optimizer.params.lr")
    # 0 too: the default of torch's AdamW is 0.01.
    if "weight_decay" in options or train.weight_decay or takes_option(block["type"], "weight_decay"):
        options["weight_decay"] = _agreed(
            run, "train.weight_decay", options, "weight_decay", "optimizer.params.weight_decay"
        )
    # transformers' meaning of "auto" for the rest: the optimizer's own default
    return {**block, "params": {name: value for name, value in options.items() if value != "auto"}}


def _agreed(run: RunConfig, key: str, ds: Mapping[str, Any], ds_key: str, ds_name: str | None = None) -> Any:
    section, name = key.split(".")
    ours, theirs = getattr(getattr(run, section), name), ds.get(ds_key)
    if theirs in _AUTO:
        return ours
    if run.is_given(key) and ours is not None and ours != theirs:
        raise ConfigError(f'{key}: {ours}, but "{ds_name or ds_key}" is {theirs} in the DeepSpeed config; change one')
    return theirs


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``above`` over ``below``, key by key at every level."""
    out = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = _merged(out[key], value) if both else value
    return out
