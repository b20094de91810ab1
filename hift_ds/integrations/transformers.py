"""``HiFTTrainer``: the Hugging Face loop over the HiFT engine, and the mixin that does the same for any
Trainer subclass.

    args = TrainingArguments("out", deepspeed={"zero_optimization": {"stage": 0}, "hift": {}}, ...)
    HiFTTrainer(model, args, train_dataset=dataset).train()

    class HiFTSFTTrainer(HiFTMixin, trl.SFTTrainer): ...

The loop itself (accumulation, evaluation, callbacks, loggers, checkpoint folders) is transformers'; nothing
of it is copied. The mixin only has the engine built, keeps input gradients off and corrects what is logged.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME

from hift_ds.config import BLOCK, check_against_deepspeed, parse_block
from hift_ds.engine.engine import HiFTEngine
from hift_ds.engine.initialize import ensure_process_group, hift_engines, join_as_single_process
from hift_ds.engine.zero3.export import export_partitioned
from hift_ds.engine.zero3.shards import is_partitioned
from hift_ds.errors import ConfigError, OutOfMemory
from hift_ds.forecast.advice import Adviser
from hift_ds.integrations.checkpoint_rotation import WholeCheckpointsStay
from hift_ds.integrations.finished_run import StopsWhenDone
from hift_ds.out_of_memory import explains_evaluation

logger = logging.getLogger(__name__)

NO_BATCH_FITS = "No executable batch size found"  # accelerate's words


class HiFTMixin(StopsWhenDone, WholeCheckpointsStay):
    """Put it before a Trainer class: ``class MyTrainer(HiFTMixin, Seq2SeqTrainer)``.

    The DeepSpeed config of the TrainingArguments (``deepspeed=`` a dict or a path) must have a ``"hift"``
    block; ``"auto"`` values are filled in from the TrainingArguments as usual. Training logs show the
    learning rate that updates use (one per cycle), and the ``group`` and ``cycle`` of the logged step.

    Raises:
        ConfigError: from the constructor, before any model or data work of the Trainer: no block, a bad
            block, settings that contradict it, or processes that the TrainingArguments do not count.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = next((value for value in args if isinstance(value, TrainingArguments)), None)
        _check_arguments(kwargs.get("args") or given)
        super().__init__(*args, **kwargs)
        self.add_callback(_AtTrainBegin(self))

    @property
    def engine(self) -> HiFTEngine | None:
        """The engine of the current or last :meth:`train`; ``None`` before the first."""
        engine = getattr(self, "deepspeed", None)
        return engine if isinstance(engine, HiFTEngine) else None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's. May be called again; the earlier engine is destroyed then."""
        join_as_single_process()
        self.model_wrapped = self.model  # else a second train() would go on with the engine of the first
        disable_input_require_grads(self.model)  # enabling again forgets the earlier hooks
        with _block_set_aside(self.args.deepspeed_plugin) as block, hift_engines(block):
            try:
                output = super().train(*args, **kwargs)
            except RuntimeError as error:
                if NO_BATCH_FITS not in str(error) or self.engine is None:
                    raise
                raise OutOfMemory(f"not even one row at a time fits: {self.engine.adviser.last}") from error
            self.finish_checkpoints()
            return output

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, and possible before :meth:`train` too, with the model as it was given."""
        with explains_evaluation(self.args.per_device_eval_batch_size):
            return self._evaluation_loop(*args, **kwargs)

    def _evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, "deepspeed", None) is not None:
            return super().evaluation_loop(*args, **kwargs)
        if any(is_partitioned(param) for param in self.model.parameters()):
            raise ConfigError(
                "evaluate() before train(): the weights are partitioned (ZeRO-3) and nothing gathers them "
                "yet; use TrainingArguments(eval_on_start=True)"
            )
        ensure_process_group()
        with self._deepspeed_set_aside():  # the Trainer would build a ZeRO-3 inference engine or refuse
            return super().evaluation_loop(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's: safetensors that ``from_pretrained`` loads. Rank 0 writes its replica of the
        weights; with DeepSpeed the Trainer would first copy the whole model to the host, on every rank."""
        if self.engine is not None and self.engine.zero_optimization_stage() == 3:
            self._save_partitioned(output_dir or self.args.output_dir, is_checkpoint=_internal_call)
            return
        with self._deepspeed_set_aside():
            super().save_model(output_dir, _internal_call)

    def _save_partitioned(self, output_dir: str, is_checkpoint: bool) -> None:
        """All ranks gather, one weight at a time; rank 0 writes. The Trainer's checkpoints hold the weights
        in the engine's own files already, so that they are gathered for those only if DeepSpeed's key says
        so."""
        tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if not is_checkpoint or self.engine.zero_gather_16bit_weights_on_model_save():
            export_partitioned(self.model, output_dir, tokenizer=tokenizer)
        elif self.args.should_save:
            self.model.config.save_pretrained(output_dir)
            if tokenizer is not None:
                tokenizer.save_pretrained(output_dir)
        if self.args.should_save:
            torch.save(self.args, os.path.join(output_dir, TRAINING_ARGS_NAME))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the Trainer's, with the rate that the step used instead of the scheduler's next value."""
        report = self.engine.last_report if self.engine is not None else None
        if report is not None and "learning_rate" in logs:
            logs["learning_rate"] = report.lr
            logs["group"], logs["cycle"] = report.group, report.cycle
        super().log(logs, *args, **kwargs)

    @contextlib.contextmanager
    def _deepspeed_set_aside(self) -> Iterator[None]:
        """For what the Trainer does with the plain model just as well, or better."""
        self.is_deepspeed_enabled = False
        try:
            yield
        finally:
            self.is_deepspeed_enabled = True


class HiFTTrainer(HiFTMixin, Trainer):
    """``transformers.Trainer``, training one layer group per optimizer step."""


class _AtTrainBegin(TrainerCallback):
    """What is possible only once the engine exists and must be done before the first forward.

    Also after ``auto_find_batch_size`` made a new engine: ``on_train_begin`` comes again then.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.adviser = Adviser()

    def on_train_begin(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        engine = trainer.engine
        assert engine is not None, "the Trainer did not build its engine with deepspeed.initialize"
        engine.adviser = self.adviser
        self.adviser.announces = args.auto_find_batch_size and state.is_world_process_zero
        if args.auto_find_batch_size:  # the config still has the number that was tried first
            engine.set_train_micro_batch_size(state.train_batch_size)
        if engine.lr_scheduler is None:  # the Trainer steps one of its own
            engine.watch_scheduler(trainer.lr_scheduler)
        disable_input_require_grads(trainer.model)


@contextlib.contextmanager
def _block_set_aside(plugin: Any) -> Iterator[Any]:
    """The "hift" block, out of the DeepSpeed config meanwhile: accelerate would fill in every "auto"."""
    block = plugin.deepspeed_config.pop(BLOCK)
    try:
        yield block
    finally:
        plugin.deepspeed_config[BLOCK] = block


def disable_input_require_grads(model: Any) -> None:
    """Undo what transformers 5 does to the embeddings with activation checkpointing.

    Every layer below the active group would need gradients again: with the head active, a step of a 7B model
    costs 2.7 times as much.
    """
    for module in model.modules():  # an encoder inside may have hooks of its own
        if hasattr(module, "disable_input_require_grads") and getattr(module, "_require_grads_hooks", None):
            module.disable_input_require_grads()


def _check_arguments(args: TrainingArguments | None) -> None:
    """Everything that can be known to be wrong before a model is touched."""
    plugin = getattr(args, "deepspeed_plugin", None)
    if plugin is None:
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
    check_against_deepspeed(parse_block(config[BLOCK]), config)
    _check_agreement(args, config)
    _check_processes(args)
    _require_non_reentrant_checkpointing(args)


def _check_agreement(args: TrainingArguments, config: Any) -> None:
    """What transformers says only when training begins, or never."""
    differences = getattr(getattr(args, "hf_deepspeed_config", None), "mismatches", [])
    if differences:
        listed = "; ".join(difference.removeprefix("- ") for difference in differences)
        raise ConfigError(
            f"DeepSpeed config and TrainingArguments disagree: {listed}; change one, "
            'or write "auto" in the config'
        )
    if args.max_grad_norm and "gradient_clipping" not in config and args.process_index == 0:
        logger.warning(
            "max_grad_norm=%s has no effect: DeepSpeed clips, and its config has no "
            '"gradient_clipping"; add it as "auto"',
            args.max_grad_norm,
        )


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
            raise ConfigError(
                f'{name}: "use_reentrant": true gives frozen-input layers no gradient; remove it'
            )
        if getattr(args, name.removesuffix("_kwargs")):
            setattr(args, name, options)
