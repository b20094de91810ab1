"""What can be known of ``TrainingArguments`` to be wrong before a model is touched."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections import UserDict
from typing import Any

import torch
from accelerate import DeepSpeedPlugin
from transformers import TrainingArguments
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from hift_ds.config import BLOCK, HiFTConfig, check_against_deepspeed, parse_block, parsed
from hift_ds.errors import ConfigError

logger = logging.getLogger(__name__)


def zero_optimization_may_be_left_out() -> None:
    """Let a DeepSpeed config with a "hift" block leave out "zero_optimization", whose default is stage 0, from now on.

    accelerate insists on that key while TrainingArguments are made, before any of our classes sees them.
    """
    made = DeepSpeedPlugin.__post_init__
    if hasattr(made, "__wrapped__"):
        return

    @functools.wraps(made)
    def with_stage_0(plugin: DeepSpeedPlugin) -> None:
        given = plugin.hf_ds_config
        config = given if isinstance(given, dict) else getattr(given, "config", None)
        if isinstance(config, dict) and BLOCK in config and config.get("zero_optimization") is None:
            config["zero_optimization"] = {"stage": 0}
        made(plugin)

    DeepSpeedPlugin.__post_init__ = with_stage_0


zero_optimization_may_be_left_out()


def auto_is_the_dtype_of_training() -> None:
    """Let ``"bf16": {"enabled": "auto"}`` of a DeepSpeed config with a "hift" block, and fp16's, be what training is to
    be in, from now on.

    transformers fills it with ``bf16 or bf16_full_eval`` while TrainingArguments are made: who asks for evaluation in
    bf16 alone would train in bf16 too.
    """
    process = HfTrainerDeepSpeedConfig.trainer_config_process
    if hasattr(process, "__wrapped__"):
        return

    @functools.wraps(process)
    def for_training(config: HfTrainerDeepSpeedConfig, args: TrainingArguments, *more: Any, **options: Any) -> None:
        autos = [dtype for dtype in ("fp16", "bf16") if BLOCK in config.config and config.is_auto(f"{dtype}.enabled")]
        process(config, args, *more, **options)
        for dtype in autos:
            if getattr(args, f"{dtype}_full_eval") and not getattr(args, dtype):
                config.config[dtype]["enabled"] = False
        if autos:  # what floating-point inputs become
            low = {"bf16": torch.bfloat16, "fp16": torch.float16}
            config._dtype = next((low[dtype] for dtype in low if config.is_true(f"{dtype}.enabled")), torch.float32)

    HfTrainerDeepSpeedConfig.trainer_config_process = for_training  # type: ignore[method-assign,assignment]  # of wraps


auto_is_the_dtype_of_training()


def check_arguments(args: TrainingArguments | None) -> None:
    """Find what can be known to be wrong before a model is touched."""
    _check_numbers(args)
    plugin = getattr(args, "deepspeed_plugin", None)
    if args is None or plugin is None:
        raise ConfigError(
            "TrainingArguments(deepspeed=...) is missing: pass a DeepSpeed config (dict or path) "
            f'with a "{BLOCK}" block'
        )
    config = plugin.deepspeed_config
    if BLOCK not in config:
        raise ConfigError(
            f'the DeepSpeed config has no "{BLOCK}" block: add "{BLOCK}": {{}} for the defaults, '
            "or use the plain Trainer"
        )
    check_against_deepspeed(_parse_for_all(config), config)
    _check_output(args)
    _complete(args, config)
    _check_agreement(args, config)
    _check_dtype_of_evaluation(args, config)
    _check_processes(args)
    _require_non_reentrant_checkpointing(args)


def _check_numbers(args: TrainingArguments | None) -> None:
    """transformers takes whatever it is given, and fails with it in the middle of a step."""
    for field in () if args is None else dataclasses.fields(args):
        value, kind = getattr(args, field.name, None), str(field.type)
        if isinstance(field.default, bool) or not isinstance(field.default, int | float):
            continue
        if isinstance(value, str) and "str" not in kind:
            raise ConfigError(
                f"{field.name}: expected a number, got the text {value!r}; write it without quotes, and in YAML with a "
                "point (1.0e-3, not 1e-3)"
            )
        if value is None and not ("None" in kind or "Optional" in kind):
            instead = "0 for no clipping" if field.name == "max_grad_norm" else f"leave it out for {field.default}"
            raise ConfigError(f"{field.name}: expected a number, got None; {instead}")
        if isinstance(value, float) and field.type in (int, "int"):
            raise ConfigError(f"{field.name}: expected a whole number, got {value!r}; write {value:.0f}")
    if args is not None and args.gradient_accumulation_steps < 1:
        raise ConfigError(f"gradient_accumulation_steps: expected at least 1, got {args.gradient_accumulation_steps}")


def _parse_for_all(config: dict[str, Any]) -> HiFTConfig:
    """Parse the block of ``config`` and leave it there parsed, for the engine."""
    block = config[BLOCK]
    if isinstance(block, UserDict):  # hidden from accelerate, for another trainer with this config
        block.data = parsed(block.data)
    else:
        config[BLOCK] = parsed(block)
    return parse_block(config[BLOCK])


def check_given(args: TrainingArguments, optimizer: object, scheduler: object) -> None:
    """Refuse an optimizer or a scheduler that a Trainer was given where the DeepSpeed config has its own: transformers
    would drop it without a word.

    Raises:
        ConfigError: there are both.
    """
    assert args.deepspeed_plugin is not None, "check_arguments has been called"
    config = args.deepspeed_plugin.deepspeed_config
    for key in ("optimizer", "scheduler"):
        given = scheduler if optimizer is None or key == "scheduler" else optimizer  # a scheduler is of an optimizer
        if given is not None and key in config:
            raise ConfigError(
                f'optimizers= or optimizer_cls_and_kwargs= was given, and the DeepSpeed config has "{key}" too, which '
                "would be used in its place; remove one of the two"
            )


def _complete(args: TrainingArguments, config: dict[str, Any]) -> None:
    """What the config leaves out and DeepSpeed insists on is the TrainingArguments', as if it said "auto".
    (accelerate sees to "gradient_accumulation_steps".)"""
    config.setdefault("zero_optimization", {}).setdefault("stage", 0)
    if "train_batch_size" not in config:
        config.setdefault("train_micro_batch_size_per_gpu", args.per_device_train_batch_size)


def _check_output(args: TrainingArguments) -> None:
    """The Trainer makes its folder when it is made, and would not say whose setting that is."""
    try:
        if args.should_save and args.output_dir is not None:
            os.makedirs(args.output_dir, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"output_dir: {args.output_dir!r} cannot be made or written: {error.strerror}; choose a folder this user "
            "may write to"
        ) from None


def _check_agreement(args: TrainingArguments, config: dict[str, Any]) -> None:
    """What transformers says only when training begins, or never."""
    differences = getattr(getattr(args, "hf_deepspeed_config", None), "mismatches", [])
    if differences:
        listed = "; ".join(difference.removeprefix("- ") for difference in differences)
        raise ConfigError(
            f'DeepSpeed config and TrainingArguments disagree: {listed}; change one, or write "auto" in the config'
        )
    if args.max_grad_norm and "gradient_clipping" not in config and args.process_index == 0:
        logger.warning(
            "max_grad_norm=%s has no effect: DeepSpeed clips, and its config has no "
            '"gradient_clipping"; add it as "auto"',
            args.max_grad_norm,
        )


def _check_dtype_of_evaluation(args: TrainingArguments, config: dict[str, Any]) -> None:
    for dtype in ("bf16", "fp16"):
        asked, trains = f"{dtype}_full_eval", (config.get(dtype) or {}).get("enabled") is True
        if not getattr(args, asked):
            continue
        if not trains and config["zero_optimization"]["stage"] == 3:
            raise ConfigError(
                f'{asked}: with "zero_optimization.stage": 3 the weights are evaluated in the shards, and so in the '
                f"dtype, that training has left; leave it out, or train with {dtype}=True"
            )
        if trains and not getattr(args, dtype) and args.process_index == 0:
            logger.warning(
                '%s is of evaluation alone, but "%s.enabled" is true in the DeepSpeed config, so that training is in '
                '%s too; write "auto" there to train in fp32',
                asked, dtype, dtype,
            )  # fmt: skip


def _check_processes(args: TrainingArguments) -> None:
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != args.world_size:
        raise ConfigError(
            f"{started} processes were started, but TrainingArguments counts {args.world_size}: without an "
            "accelerator it needs use_cpu=True (else every process would train on the same data)"
        )
    if args.n_gpu > 1:
        raise ConfigError(
            f"one process sees {args.n_gpu} accelerators: start it with `deepspeed SCRIPT`, or show it one"
        )


def _require_non_reentrant_checkpointing(args: TrainingArguments) -> None:
    """Reentrant checkpointing gives the blocks of a layer group no gradient when its inputs need none."""
    # In transformers 5.23 and before.
    for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        if not hasattr(args, name):
            continue
        options = dict(getattr(args, name) or {})
        if options.setdefault("use_reentrant", False):
            raise ConfigError(f'{name}: "use_reentrant": true gives frozen-input layers no gradient; remove it')
        if getattr(args, name.removesuffix("_kwargs")):
            setattr(args, name, options)
