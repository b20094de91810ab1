"""``HiFTTrainer``: the Hugging Face loop over the HiFT engine, and the mixin that does the same for any
Trainer subclass.

    args = TrainingArguments("out", deepspeed={"zero_optimization": {"stage": 0}, "hift": {}}, ...)
    HiFTTrainer(model, args, train_dataset=dataset).train()

    class HiFTSFTTrainer(HiFTMixin, trl.SFTTrainer): ...

The loop itself (accumulation, evaluation, callbacks, loggers, checkpoint folders) is transformers'; nothing
of it is copied. It calls the engine through accelerate: ``Trainer.training_step`` the model, which is the engine, and
``accelerator.backward(loss)``, which is ``engine.backward`` and then ``engine.step``. The mixin only has the engine
built, keeps input gradients off and corrects what is logged.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from accelerate.utils import DummyOptim, DummyScheduler
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME

from hift_ds.checkpoint.files import write_errors
from hift_ds.engine.deepspeed_seam import DeepSpeedEngine
from hift_ds.engine.engine import HiFTEngine
from hift_ds.engine.initialize import hift_engines
from hift_ds.engine.zero3.export import export_partitioned, under_all_names, whole_weights
from hift_ds.engine.zero3.shards import is_partitioned
from hift_ds.errors import CheckpointError, ConfigError, OutOfMemory
from hift_ds.hf.export import savable_generation_config
from hift_ds.integrations.arguments import check_arguments, check_given
from hift_ds.integrations.before_saving import ready_to_save, saved_by_trainer
from hift_ds.integrations.callback import PREPARED_BY_ITSELF, HiFTCallback
from hift_ds.integrations.checkpoint_rotation import WholeCheckpointsStay
from hift_ds.integrations.disk_room import DiskRoomCallback
from hift_ds.integrations.events import EngineEvents, disable_input_require_grads
from hift_ds.integrations.finished_run import StopsWhenDone
from hift_ds.integrations.going_on import checks_files
from hift_ds.integrations.loops import kept_from_accelerate
from hift_ds.integrations.row_lengths import check_rows
from hift_ds.integrations.weights_once import (
    WeightsOnce,
    has_save_pretrained,
    has_the_form_of_a_checkpoint,
    name_beside,
)
from hift_ds.out_of_memory import explains_evaluation
from hift_ds.process_group import as_single_process, ensure_process_group, nothing_compiled
from hift_ds.ranks import on_all_ranks

if TYPE_CHECKING:
    from transformers.trainer_utils import EvalLoopOutput, TrainOutput

NO_BATCH_FITS = "No executable batch size found"  # accelerate's words


class HiFTMixin(StopsWhenDone, WholeCheckpointsStay, WeightsOnce):
    """Put it before a Trainer class: ``class MyTrainer(HiFTMixin, Seq2SeqTrainer)``.

    The DeepSpeed config of the TrainingArguments (``deepspeed=`` a dict or a path) must have a ``"hift"``
    block; ``"auto"`` values are filled in from the TrainingArguments as usual. Training logs show the
    learning rate that updates use (one per cycle), and the ``group`` and ``cycle`` of the logged step.

    Raises:
        ConfigError: from the constructor, before any model or data work of the Trainer: no block, a bad
            block, settings that contradict it, or processes that the TrainingArguments do not count.
    """

    says_coverage = True  # at the end of training; a subclass with a report of its own turns it off
    is_ready_to_save = False  # a program that has made sure of it says so
    _given_optimizer: Any = None  # of the class: constructors of trainers may make theirs
    _given_scheduler: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = next((value for value in args if isinstance(value, TrainingArguments)), None)
        check_arguments(kwargs.get("args") or given)
        with (
            as_single_process(),
            nothing_compiled(),
        ):  # some trainers make an engine for a reference model here
            super().__init__(*args, **kwargs)
        if isinstance(self.model, DeepSpeedEngine):
            raise ConfigError(f"{type(self).__name__}: {PREPARED_BY_ITSELF}")
        check_given(self.args, self.optimizer or self.optimizer_cls_and_kwargs, self.lr_scheduler)
        while (callback := self.pop_callback(HiFTCallback)) is not None:  # launch_with gives one to every Trainer
            callback.leave()
        self._kept = contextlib.ExitStack()
        self._events = EngineEvents(lambda: self.engine, self.says_coverage)
        self.add_callback(self._events)
        if not self.is_ready_to_save:
            self.add_callback(DiskRoomCallback(lambda: self.engine))

    @property
    def engine(self) -> HiFTEngine | None:
        """The engine of the current or last :meth:`train`; ``None`` before the first. When training has ended it has
        given its states back, and still answers ``coverage()``, ``last_report``, ``groups`` and ``schedule``."""
        engine = getattr(self, "deepspeed", None)
        return engine if isinstance(engine, HiFTEngine) else None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as the Trainer does; from the newest whole checkpoint, or from the one that is named if its files are
        what was written. Whichever way it ends, the model's ``requires_grad`` flags, the environment and the memory are
        its caller's again. May be called again: that is a new engine, with fresh states."""
        if hasattr(self.train_dataset, "__len__") and len(self.train_dataset) == 0:
            raise ConfigError("train_dataset: has no rows; expected at least one")
        self.model_wrapped = self.model  # else a second train() would go on with the engine of the first
        self.deepspeed = None
        if self.model is not None:  # each trial of a hyperparameter search makes its own
            disable_input_require_grads(self.model)  # enabling again forgets the earlier hooks
        if not isinstance(self.optimizer, AcceleratedOptimizer | DummyOptim | None):
            self._given_optimizer = self.optimizer
        if not (self._created_lr_scheduler or isinstance(self.lr_scheduler, AcceleratedScheduler | DummyScheduler)):
            self._given_scheduler = self.lr_scheduler
        failed = True
        ready = contextlib.nullcontext()
        if not self.is_ready_to_save:
            ready = ready_to_save(self.args, self.model, saved_by_trainer(self.processing_class, self.data_collator))
            self._check_evaluation_rows()
            if resume_from_checkpoint:
                resume_from_checkpoint = self._whole_checkpoint(resume_from_checkpoint)
        with ready, self._kept, hift_engines(on_made=_draws_itself):
            self._keep_block()
            try:
                output = super().train(resume_from_checkpoint, *args, **kwargs)
                self.finish_checkpoints()
                failed = False
            except RuntimeError as error:
                if NO_BATCH_FITS not in str(error) or self.engine is None:
                    raise
                raise OutOfMemory(f"not even one row at a time fits: {self.engine.adviser.last}") from error
            finally:
                self._end_training(failed)
        return output

    def _keep_block(self) -> None:
        self._kept.enter_context(kept_from_accelerate(self.args.deepspeed_plugin.deepspeed_config))

    def _hp_search_setup(self, trial: Any) -> None:
        """Set up a trial as the Trainer does, which reads the DeepSpeed config again for each."""
        before = self.args.deepspeed_plugin
        super()._hp_search_setup(trial)
        if self.args.deepspeed_plugin is not before:
            check_arguments(self.args)
            self._keep_block()

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Bring a batch to the device, as the Trainer does. With DeepSpeed that rounds every number of it to the dtype
        of the weights: right for what the model reads (pixels), and not for labels and for what only the loss reads
        (DPO's reference log-probabilities, which are hundreds)."""
        prepared = super()._prepare_inputs(inputs)
        if not isinstance(inputs, Mapping) or not isinstance(prepared, Mapping):
            return prepared
        changed = [name for name, value in inputs.items() if _has_other_dtype(value, prepared.get(name))]
        if not changed:
            return prepared
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        kinds = inspect.signature(base.forward).parameters.values()
        read = {one.name for one in kinds if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
        for name in changed:
            if name in self.label_names or (name not in read and read):
                prepared[name] = inputs[name].to(prepared[name].device)
        return prepared

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Make the optimizer as the Trainer does; one that it was given (``optimizers=``) is kept, which transformers
        drops where DeepSpeed is configured."""
        if self.optimizer is None:
            self.optimizer = self._given_optimizer
        return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """Make the scheduler as the Trainer does, or keep the given one, as :meth:`create_optimizer`."""
        if self.lr_scheduler is None:
            self.lr_scheduler = self._given_scheduler
        return super().create_scheduler(*args, **kwargs)

    def _check_evaluation_rows(self) -> None:
        if self.args.eval_strategy == "no" and not self.args.eval_on_start:
            return
        collate = self._get_collator_with_removed_columns(self.data_collator)
        several = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        for name, rows in several.items():
            if rows is not None:
                check_rows(f"eval_dataset{f'[{name!r}]' if name else ''}", rows, collate, self.model)

    def _end_training(self, failed: bool) -> None:
        if self.engine is not None:
            self.engine.end_training(failed)
            if self.engine.zero_optimization_stage() != 3:  # partitioned weights are still gathered for evaluation
                self.engine.destroy()
        if failed:
            self.is_in_train = False
            if self.neftune_noise_alpha is not None and getattr(self, "neftune_hook_handle", None) is not None:
                self.neftune_hook_handle.remove()

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate as the Trainer does; possible before :meth:`train` too, with the model as it was given. Outside of
        training in 16 bits if the arguments say so (``bf16_full_eval``), after which the weights are again what they
        were: the Trainer would leave them rounded, to be saved and trained on."""
        casts = not self.is_in_train and (self.args.bf16_full_eval or self.args.fp16_full_eval)
        kept = _weights_come_back(self.model) if casts else contextlib.nullcontext()
        with explains_evaluation(self.args.per_device_eval_batch_size), kept:
            return self._evaluation_loop(*args, **kwargs)

    def _evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
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
        """Save as the Trainer does: safetensors that ``from_pretrained`` loads. Rank 0 writes its replica of the
        weights; with DeepSpeed the Trainer would first copy the whole model to the host, on every rank."""
        folder = output_dir or self.args.output_dir
        if self.engine is not None and self.engine.zero_optimization_stage() == 3:
            self._save_partitioned(folder, is_checkpoint=_internal_call)
            return
        if not _internal_call:
            self._write_model(output_dir)
            return
        # Of a checkpoint, for which the ranks meet next: none must wait for a first one whose disk is full.
        on_all_ranks(lambda: self._write_checkpoints_model(folder), CheckpointError)

    def _write_checkpoints_model(self, folder: str) -> None:
        with write_errors(Path(folder)):
            self._write_model(folder, _internal_call=True)

    def _write_model(self, output_dir: str | None, **options: Any) -> None:
        folder = output_dir or self.args.output_dir
        written = savable_generation_config(self.model, folder if self.args.should_save else None)
        with self._deepspeed_set_aside(), written:
            super().save_model(output_dir, **options)

    def _save_partitioned(self, output_dir: str, is_checkpoint: bool) -> None:
        """All ranks gather, one weight at a time; rank 0 writes. The Trainer's checkpoints hold the weights in the
        engine's own file already, which gets a second name; where ``from_pretrained`` would want other tensors they are
        gathered for those too, if DeepSpeed's key says so."""
        gathers = not is_checkpoint or self.engine.zero_gather_16bit_weights_on_model_save()
        of_transformers = has_save_pretrained(self.model)
        if _has_adapters(self.model) or (gathers and not of_transformers):
            self._save_gathered(output_dir)
            return
        tokenizer = saved_by_trainer(self.processing_class, self.data_collator)
        shared = is_checkpoint and not self.args.save_only_model and has_the_form_of_a_checkpoint(self.model)
        self.engine.checkpointer.on_whole = name_beside if shared else None
        if not is_checkpoint or (not shared and gathers):
            export_partitioned(self.model, output_dir, tokenizer=tokenizer)
        elif self.args.should_save:
            if of_transformers:
                self.model.config.save_pretrained(output_dir)
            if getattr(self.model, "generation_config", None) is not None:
                with savable_generation_config(self.model, output_dir):
                    self.model.generation_config.save_pretrained(output_dir)
            if tokenizer is not None:
                tokenizer.save_pretrained(output_dir)
        if self.args.should_save:
            torch.save(self.args, os.path.join(output_dir, TRAINING_ARGS_NAME))

    def _save_gathered(self, output_dir: str) -> None:
        """Save what is chosen from all weights, which rank 0 has in host memory for that: those that PEFT saves, or the
        whole ``state_dict`` of a model that is none of transformers'."""

        def write() -> None:
            weights = whole_weights(self.model)
            try:
                if self.args.process_index == 0:
                    self._save(output_dir, state_dict=under_all_names(self.model, dict(weights)))
            finally:
                for _ in weights:  # take part in what is left to gather, also when rank 0 could not write
                    pass

        on_all_ranks(write, CheckpointError)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as the Trainer does, with the rate that the step used instead of the scheduler's next value, and what
        only the engine knows (docs/trainer.md)."""
        if "learning_rate" in logs:
            logs |= self._events.fields()
        super().log(logs, *args, **kwargs)

    @contextlib.contextmanager
    def _deepspeed_set_aside(self) -> Iterator[None]:
        """Inside this block the Trainer does without DeepSpeed what it does with the plain model just as well, or
        better."""
        self.is_deepspeed_enabled = False
        try:
            yield
        finally:
            self.is_deepspeed_enabled = True


class HiFTTrainer(HiFTMixin, Trainer):
    """``transformers.Trainer``, training one layer group per optimizer step."""


def _has_adapters(model: Any) -> bool:
    """Whether PEFT has put adapters into ``model``, around it or by ``add_adapter``."""
    return getattr(model, "_hf_peft_config_loaded", False) or bool(getattr(model, "peft_config", None))


def _has_other_dtype(given: Any, prepared: Any) -> bool:
    tensors = isinstance(given, torch.Tensor) and isinstance(prepared, torch.Tensor)
    return tensors and prepared.shape == given.shape and prepared.dtype != given.dtype


@contextlib.contextmanager
def _weights_come_back(model: torch.nn.Module) -> Iterator[None]:
    """Inside this block the model may be cast to another dtype; afterwards its tensors are those from before."""
    weights = [(param, param.data) for param in model.parameters()]
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    try:
        yield
    finally:
        for param, data in weights:
            param.data = data
        for module, named in buffers:
            module._buffers.update(named)


def _draws_itself(engine: HiFTEngine) -> None:
    """A Trainer that goes on draws its epoch's order first, and then sets the generators to the checkpoint's."""
    engine.checkpointer.restores_generators = False
    checks_files(engine)
