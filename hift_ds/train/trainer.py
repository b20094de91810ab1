"""The Trainer of a run file: transformers' loop, our engine (or DeepSpeed's own with ``hift: false``), our
reports."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, IterableDataset
from transformers import EarlyStoppingCallback, TrainingArguments

from hift_ds.data.packing import collator
from hift_ds.dtypes import torch_dtype
from hift_ds.engine.deepspeed_seam import checkpoints_without_code
from hift_ds.errors import ConfigError, DataError
from hift_ds.hf.export import savable_generation_config
from hift_ds.integrations.disk_room import DiskRoomCallback
from hift_ds.integrations.finished_run import StopsWhenDone
from hift_ds.integrations.transformers import HiFTMixin
from hift_ds.report.callback import ReportCallback, report_instead_of_printing
from hift_ds.train.evaluate import TokenMeanEvaluation
from hift_ds.train.preemption import LeavesEvaluation, PreemptionCallback
from hift_ds.train.preflight import CheckedRun
from hift_ds.train.tasks import TASKS, Task
from hift_ds.train.watchdog import NotesProgress, WatchdogCallback

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerControl, TrainerState
    from transformers.trainer_utils import TrainOutput

    from hift_ds.data.prepare import PreparedData
    from hift_ds.engine.engine import HiFTEngine

    class RunTrainer(Trainer):
        """What :func:`build_trainer` makes: the trainer of a task, with the mixins below before it.

        Attributes:
            engine: ``None`` before training, and with ``hift: false``.
            preemption: knows whether a signal ended the training.
            had_no_step_left: the last ``train()`` has trained nothing.
        """

        engine: HiFTEngine | None
        preemption: PreemptionCallback
        had_no_step_left: bool


ONLY_AT_THE_END = (
    1_000_000_000  # save_steps that no run reaches; with "steps" the Trainer saves after the last step too
)


class _DecayMatricesOnly:
    """Mixin: with an optimizer in the DeepSpeed config too, biases and norms are not decayed, as without
    one."""

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        from accelerate.utils import DummyOptim

        optimizer = super().create_optimizer(*args, **kwargs)
        if isinstance(optimizer, DummyOptim):  # without decay too: a run that goes on may have another
            decayed = set(self.get_decay_parameter_names(self.model))
            trainable = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
            optimizer.params = [
                {"params": [p for name, p in trainable if name in decayed]},
                {"params": [p for name, p in trainable if name not in decayed], "weight_decay": 0.0},
            ]
        return optimizer


class _ReadsStreams:
    """Mixin: of a stream every rank has its own rows already, which accelerate would divide once more."""

    def get_train_dataloader(self) -> DataLoader:
        if not isinstance(self.train_dataset, IterableDataset):
            return super().get_train_dataloader()
        args = self.args
        workers = {"num_workers": args.dataloader_num_workers, "prefetch_factor": args.dataloader_prefetch_factor,
                   "persistent_workers": args.dataloader_persistent_workers,
                   "pin_memory": args.dataloader_pin_memory}  # fmt: skip
        loader = DataLoader(
            self.train_dataset, batch_size=self._train_batch_size, collate_fn=self.data_collator, **workers
        )
        return prepare_data_loader(
            loader, self.accelerator.device, num_processes=1, process_index=0, put_on_device=True
        )


class _RefusesToGoBack:
    """Mixin: fewer steps than the checkpoint has done are a mistake in the run file."""

    def has_no_step_left(self, done: int, steps: int) -> None:
        if done > steps:
            raise ConfigError(
                f"the run ends at step {steps} (train.max_steps, train.epochs), but {self._resumed_from} has done "
                f"{done}; raise it, or choose another train.output_dir"
            )


class _AllAtOnce(StopsWhenDone):
    """Mixin for ``hift: false``: every weight in every step, by DeepSpeed alone; what HiFT is compared with."""

    engine = None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = output_dir or self.args.output_dir
        with savable_generation_config(self.model, folder if self.args.should_save else None):
            super().save_model(output_dir, _internal_call)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        with checkpoints_without_code():
            return super().train(*args, **kwargs)


class _OneGroupAtATime(HiFTMixin):
    """Mixin: one layer group in every step."""

    says_coverage = False  # the report does
    is_ready_to_save = True  # finetune has made sure, and counts the export too


class _WithoutTelemetry:
    """Mixin for TRL's trainers, which tell their makers of each run: a run file's run asks the network for nothing."""

    def _send_telemetry(self) -> None:
        pass


def trainer_class(task: Task, *, hift: bool) -> type[RunTrainer]:
    """The task's trainer with our engine below it, or DeepSpeed's own.

    Raises:
        ConfigError: the package that has it is not installed.
    """
    parts: list[type] = [LeavesEvaluation, _RefusesToGoBack, _WithoutTelemetry]
    if task.is_language_modelling:
        parts += [TokenMeanEvaluation, _ReadsStreams]
    parts += [_DecayMatricesOnly, _OneGroupAtATime if hift else _AllAtOnce, task.trainer_class()]
    return type(f"{'Group' if hift else 'Full'}{task.trainer.rpartition('.')[2]}", tuple(parts), {})


def build_trainer(
    checked: CheckedRun,
    arguments: TrainingArguments,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
) -> RunTrainer:
    """The trainer of the run's task, with our callbacks.

    Raises:
        ConfigError, DataError: the task's trainer refuses its arguments or its data.
    """
    task = TASKS[checked.run.task]
    kind = data.model_options.get("problem_type", "single_label_classification")
    if arguments.label_smoothing_factor and kind != "single_label_classification":
        raise ConfigError(
            f"train.arguments.label_smoothing_factor: is for one class a row, and the labels are for {kind}; remove it"
        )
    options: dict[str, Any] = {"data_collator": data.collator}
    if task.is_language_modelling:
        options["eval_collator"] = collator(tokenizer, packing=False)
    elif data.score is not None and data.eval is not None:
        options["compute_metrics"] = data.score
    if not (task.is_language_modelling or task.uses_trl):
        # These models take any keyword, so that the Trainer passes the number of labels of a step and expects a sum
        # over it; their losses are means all the same. A step's loss would count once for every rank and every pass.
        model.accepts_loss_kwargs = False
    if hasattr(data.collator, "model"):  # it makes the decoder's input of the labels where the model does not
        data.collator.model = model
    try:
        trainer = trainer_class(task, hift=checked.run.hift is not False)(
            model=model,
            args=arguments,
            train_dataset=data.train,
            eval_dataset=data.eval,
            processing_class=tokenizer,
            **options,
        )
    except (ValueError, ImportError) as error:
        if not task.uses_trl:
            raise
        raise ConfigError(f"task: {checked.run.task}: {' '.join(str(error).split())[:300]}") from error
    if task.uses_trl:
        _say_what_is_dropped(checked, trainer, data)
    _add_callbacks(trainer, checked)
    return trainer


def _add_callbacks(trainer: RunTrainer, checked: CheckedRun) -> None:
    """Ours, in the order in which the Trainer calls them."""
    run, task, is_first = checked.run, TASKS[checked.run.task], trainer.args.process_index == 0
    if run.hift is not False:
        export_bytes = checked.model.numel * torch_dtype(checked.export_dtype).itemsize
        say = print if is_first else lambda line: None
        trainer.add_callback(
            DiskRoomCallback(lambda: trainer.engine, run.export_dir, export_bytes, say=say, section="train.")
        )
    report = ReportCallback(
        run.output_dir,
        get_engine=lambda: trainer.model_wrapped,
        # What the simulation steps are language models on one batch.
        largest_batch=(checked.batch.micro_batch_size, checked.max_length) if task.is_language_modelling else None,
        padded=not run.data.packing,
        shown=task.metrics[:2],
        plots=lambda: trainer.preemption.stopped_by is None,  # whoever stops a run does not wait for pictures
    )
    report_instead_of_printing(trainer, report)
    stopping = run.train.early_stopping
    if stopping.patience is not None:
        trainer.add_callback(EarlyStopping.of(stopping.patience, stopping.threshold))
    trainer.preemption = PreemptionCallback(lambda: trainer.model_wrapped, leaves_evaluation=True)
    trainer.add_callback(trainer.preemption)
    trainer.add_callback(NotesProgress(lambda: trainer.model_wrapped))
    if run.hift is not False:
        policy, timeout_s = run.train.on_divergence, run.train.hang_timeout_s
        trainer.add_callback(WatchdogCallback(lambda: trainer.engine, policy, hang_timeout_s=timeout_s))


class EarlyStopping(EarlyStoppingCallback):
    """transformers' callback, which also says that it ends the run, and has a checkpoint of its end saved.

    A run that goes on restores the number of evaluations that were no better, which transformers does with the settings
    of the checkpoint; those of this run stand in ``settings``.
    """

    settings: tuple[int, float]

    @classmethod
    def of(cls, patience: int, threshold: float) -> EarlyStopping:
        """A callback with the run file's ``patience`` and ``threshold``."""
        return type(cls.__name__, (cls,), {"settings": (patience, threshold)})()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Begin without transformers' warning where the best weights are not kept, which is the user's choice."""
        self.early_stopping_patience, self.early_stopping_threshold = self.settings

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        super().on_evaluate(args, state, control, metrics, **kwargs)
        if not control.should_training_stop or state.global_step >= state.max_steps:
            return
        control.should_save = True
        if state.is_world_process_zero:
            print(
                f"stopped early at step {state.global_step}: {args.metric_for_best_model} has not become better by "
                f"{self.early_stopping_threshold:g} in {self.early_stopping_patience} evaluations",
                flush=True,
            )


def _say_what_is_dropped(checked: CheckedRun, trainer: RunTrainer, data: PreparedData) -> None:
    """TRL's trainers drop rows that do not fit, and say nothing."""
    for name, given, kept in (("train", data.train, trainer.train_dataset), ("eval", data.eval, trainer.eval_dataset)):
        if given is None:
            continue
        pairs = checked.run.task == "kto" and "chosen" in given.column_names
        lost = len(given) * (2 if pairs else 1) - len(kept)
        if not len(kept):
            raise DataError(
                f"data.{name}: nothing of {len(given)} rows fits data.max_length {checked.max_length}; raise it"
            )
        if lost and trainer.args.process_index == 0:
            print(f"{name}: {lost:,} dropped: nothing to learn within {checked.max_length:,} tokens")


def zero_stage(arguments: TrainingArguments) -> int:
    """DeepSpeed's ZeRO stage of the run, 0 to 3."""
    return int(arguments.deepspeed_plugin.zero_stage)


def make_arguments(checked: CheckedRun, *, fresh: bool) -> TrainingArguments:
    """The arguments of the run's trainer. ``fresh``: the run begins at step 0.

    Raises:
        ConfigError: transformers does not accept them, or a logger is not there.
    """
    options = deepcopy(dict(checked.arguments))
    if checked.run.hift is False and options["deepspeed"]["zero_optimization"].get("stage", 0) == 3:
        raise ConfigError('hift: false with "zero_optimization.stage": 3 in the DeepSpeed config: use stage 0, 1 or 2')
    if checked.run.hift is False and options["deepspeed"]["optimizer"]["type"].lower() in ("adam", "adamw"):
        # DeepSpeed would compile its own.
        options["deepspeed"]["optimizer"]["params"].setdefault("torch_adam", True)
    # Nodes that keep their checkpoints to themselves need the Trainer's own files too, to resume.
    saving = options["deepspeed"].get("checkpoint") or {}
    options["save_on_each_node"] = bool(saving.get("use_node_local_storage"))
    if options["save_strategy"] == "no":  # "null: only at the end"
        options |= {"save_strategy": "steps", "save_steps": ONLY_AT_THE_END}
    if (
        "activation_checkpointing" not in TrainingArguments.__dataclass_fields__
    ):  # its name in the first releases of transformers 5
        for suffix in ("", "_kwargs"):
            options[f"gradient_checkpointing{suffix}"] = options.pop(f"activation_checkpointing{suffix}")
    _check_loggers(checked.run.train.report_to)
    task = TASKS[checked.run.task]
    if task.uses_trl:  # whose own default is on
        options |= {
            "gradient_checkpointing": checked.run.train.gradient_checkpointing,
            "max_length": checked.max_length,
        }
    if "generation_max_length" not in options and checked.run.task == "seq2seq":  # transformers' 20 cuts most texts
        options["generation_max_length"] = checked.max_length
    try:
        return task.arguments_class()(
            **{"eval_on_start": checked.has_eval and fresh} | options,
            include_num_input_tokens_seen="non_padding",
            label_names=list(task.label_names) if task.label_names else None,
            log_level="error",  # also of DeepSpeed; what a run has to say is said by our own callback
            log_level_replica="error",
            disable_tqdm=True,
        )
    except (ValueError, TypeError, ImportError) as error:  # an accelerator without bf16, say
        raise ConfigError(f"transformers does not accept this run's settings: {error}") from error


def _check_loggers(names: list[str]) -> None:
    """Unknown ones, and those whose package is not installed."""
    from transformers.integrations import get_reporting_integration_callbacks

    for name in names:
        try:
            for callback in get_reporting_integration_callbacks([name]):
                callback()
        except (ValueError, RuntimeError, ImportError, AssertionError) as error:
            raise ConfigError(f"train.report_to: {name}: {error}") from error
