"""What the engine wants of a ``transformers.Trainer``'s events, whichever way it came to be below that Trainer."""

from __future__ import annotations

import functools
import logging
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from hift_ds.engine.engine import HiFTEngine
from hift_ds.errors import ConfigError
from hift_ds.forecast.advice import Adviser
from hift_ds.integrations.row_lengths import check_rows
from hift_ds.report.coverage import kept_step, make_coverage
from hift_ds.step_report import StepReport

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)


class EngineEvents(TrainerCallback):
    """Tells the engine what the Trainer knows, and the logs what the engine knows.

    ``on_train_begin`` comes again after ``auto_find_batch_size`` made a new engine.

    Args:
        get_engine: the engine of the training that begins.
        says_coverage: warn if the run is too short for its groups, and at its end if weights were never updated.
    """

    def __init__(self, get_engine: Callable[[], HiFTEngine | None], says_coverage: bool = True) -> None:
        self.get_engine = get_engine
        self.says_coverage = says_coverage
        self.adviser = Adviser()
        self._reports: list[StepReport] = []  # since the last log
        self._rise = RisingLoss()
        self._mark = time.monotonic()
        self._step_time_s = 0.0
        self._clips_by: float | None = None  # what max_grad_norm was when that was last said

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        engine = self.get_engine()
        if engine is None:
            raise ConfigError(
                "the Trainer did not build its engine with deepspeed.initialize: pass the DeepSpeed config as "
                "TrainingArguments(deepspeed=...), and start with deepspeed, torchrun or plain python "
                "(accelerate launch: with --use_deepspeed, or with use_cpu=True in place of --cpu)"
            )
        engine.checkpointer.before_load = None
        engine.adviser = self.adviser
        self.adviser.announces = args.auto_find_batch_size and state.is_world_process_zero
        if args.auto_find_batch_size:  # the config still has the number that was tried first
            engine.set_train_micro_batch_size(state.train_batch_size)
        if engine.lr_scheduler is None:  # the Trainer steps one of its own
            engine.optimizer.lr.watch(kwargs.get("lr_scheduler"), lambda: state.max_steps - engine.global_steps)
        disable_input_require_grads(engine.module)
        if (rows := kwargs.get("train_dataloader")) is not None:
            _refuse_no_batch(rows, args)
            check_rows("train_dataset", getattr(rows, "dataset", None), rows.collate_fn, engine.module)
        loop = loop_above(sys._getframe())
        _add_up_micro_batches(loop)
        if state.is_world_process_zero:
            _say_what_comes_too_late(loop)
        warning = engine.schedule.too_few_turns(state.max_steps)
        if self.says_coverage and warning and state.is_world_process_zero:
            logger.warning("%s", warning)
        self._reports.clear()
        self._rise = RisingLoss()
        self._mark = time.monotonic()
        self._clips_by = args.max_grad_norm

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        rise = self._rise.after((logs or {}).get("loss"))
        if rise is not None and state.is_world_process_zero:
            logger.warning(
                "the loss is %.3g at step %d, and was %.3g at the beginning: the run diverges; lower the learning "
                "rate, or clip gradients",
                rise[1], state.global_step, rise[0],
            )  # fmt: skip

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._reports:
            self._mark = time.monotonic()
        if args.max_grad_norm != self._clips_by and state.is_world_process_zero:
            logger.warning(
                "max_grad_norm was changed from %s to %s in training, which has no effect: the engine clips by what it "
                "was made with; train() again, from a checkpoint, to change it",
                self._clips_by, args.max_grad_norm,
            )  # fmt: skip
            self._clips_by = args.max_grad_norm

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        engine = self.get_engine()
        if engine is not None and engine.last_report is not None:
            self._reports.append(engine.last_report)
            self._step_time_s = (time.monotonic() - self._mark) / len(self._reports)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse a stream that ends before its first step: the Trainer would begin it again for ever."""
        stops = control.should_training_stop or control.should_epoch_stop
        if state.global_step == 0 and not stops and self.get_engine() is not None:
            raise ConfigError(
                "train_dataset: ends before the first optimizer step: it has fewer batches than "
                f"gradient_accumulation_steps={args.gradient_accumulation_steps}; lower that, or give more rows"
            )

    def fields(self) -> dict[str, float]:
        """What a log line of training gets besides the Trainer's: of the last step its learning rate, ``group`` and
        ``cycle``; of the steps since the last line their mean seconds, the seconds they waited for states and for
        anything, and the highest memory."""
        reports, self._reports = self._reports, []
        if not reports:
            return {}
        return {
            "learning_rate": reports[-1].lr,
            "group": reports[-1].group,
            "cycle": reports[-1].cycle,
            "step_time_s": round(self._step_time_s, 4),
            "stalled_s": round(sum(report.stalled_s for report in reports), 4),
            "waited_s": round(sum(sum(report.waits.values()) for report in reports), 4),
            "peak_memory_gib": round(max(report.peak_bytes for report in reports) / 2**30, 4),
        }

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        engine = self.get_engine()
        if engine is None or not self.says_coverage or not state.is_world_process_zero:
            return
        coverage = make_coverage(engine.coverage(), kept_step(args, state), engine.groups)
        logger.info(coverage.summary())
        if (warning := coverage.warning(written=False)) is not None:
            logger.warning(warning)


class RisingLoss:
    """Finds once that a loss has risen far above where it began, though it is a number still: too high a rate."""

    NEEDED, TIMES = 5, 2.0

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._said = False

    def after(self, loss: object) -> tuple[float, float] | None:
        """Take in the next logged loss.

        Returns:
            The medians of the first and the last ones (single batches vary) if that is so and was not told before.
        """
        if not isinstance(loss, int | float) or self._said:
            return None
        self._losses.append(float(loss))
        if len(self._losses) < 2 * self.NEEDED:
            return None
        first, last = (statistics.median(part) for part in (self._losses[: self.NEEDED], self._losses[-self.NEEDED :]))
        if not last > self.TIMES * first > 0:
            return None
        self._said = True
        return first, last


def disable_input_require_grads(model: nn.Module) -> None:
    """Undo what transformers 5 does to the embeddings with activation checkpointing.

    Every layer below the active group would need gradients again: with the head active, a step of a 7B model
    costs 2.7 times as much.
    """
    modules: Iterable[nn.Module] = model.modules()
    for module in modules:  # an encoder inside may have hooks of its own
        if hasattr(module, "disable_input_require_grads") and getattr(module, "_require_grads_hooks", None):
            module.disable_input_require_grads()


def callers(frame: FrameType | None) -> Iterator[FrameType]:
    """``frame`` and all that wait for it, the nearest first."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def loop_above(frame: FrameType | None) -> FrameType | None:
    """The method of a Trainer that has the callbacks called; None if none does."""
    return next((one for one in callers(frame) if hasattr(one.f_locals.get("self"), "callback_handler")), None)


def _refuse_no_batch(rows: Any, args: TrainingArguments) -> None:
    """The Trainer would end at once, as if it had trained."""
    try:
        num_batches = len(rows)
    except TypeError:  # of a stream
        return
    if num_batches == 0:
        raise ConfigError(
            f"train_dataset: has no batch for every rank ({args.per_device_train_batch_size} rows a rank, "
            f"dataloader_drop_last={args.dataloader_drop_last}); lower per_device_train_batch_size, or give more rows"
        )


def _add_up_micro_batches(loop: FrameType | None) -> None:
    """Have losses that a ``training_step`` of the Trainer's own gives to ``accelerator.backward`` added up, as without
    DeepSpeed: its engine would divide each by the accumulation steps, which is why transformers' own one says
    ``scale_wrt_gas=False``."""
    wrapped = None if loop is None else loop.f_locals["self"].accelerator.deepspeed_engine_wrapped
    if wrapped is not None:
        wrapped.backward = functools.partial(wrapped.backward, scale_wrt_gas=False)


def _say_what_comes_too_late(loop: FrameType | None) -> None:
    """Warn of callbacks that look at gradients or change them: with DeepSpeed the step is a part of the backward."""
    for callback in () if loop is None else loop.f_locals["self"].callback_handler.callbacks:
        if type(callback).on_pre_optimizer_step is not TrainerCallback.on_pre_optimizer_step:
            logger.warning(
                "%s.on_pre_optimizer_step is called after the engine's step, and finds no gradients; use the weights' "
                "own hooks (register_hook)",
                type(callback).__name__,
            )
