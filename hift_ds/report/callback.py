"""The run folder's files and the terminal, kept up to date from inside a ``transformers.Trainer``."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from hift_ds.checkpoint.files import explain_refusal
from hift_ds.errors import TrainingError
from hift_ds.report.coverage import kept_step, make_coverage, write_coverage
from hift_ds.report.groups import GroupSummary, summarize, write_groups
from hift_ds.report.metrics import EvalRecord, MetricsWriter, StepRecord, read_metrics, share_waited
from hift_ds.report.plots import plot_run
from hift_ds.report.progress import Progress, SilentProgress, clock, make_progress
from hift_ds.report.transfers import summary
from hift_ds.schedule import GroupSchedule

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

    from hift_ds.engine.engine import HiFTEngine

logger = logging.getLogger(__name__)

_SAME_NAME = (
    "cycle", "position", "group", "group_name", "lr", "grad_norm", "loss_scale", "skipped",
    "state_bytes_in", "state_bytes_out", "grad_numel_sent", "grad_bytes_out", "grad_bytes_in", "transfer_s",
    "stalled_s", "tried", "undone", "undone_s",
    "checkpoint_s",
)  # fmt: skip


class ReportCallback(TrainerCallback):
    """The callback that writes ``metrics.jsonl``, ``groups.json``, ``coverage.json`` and the plots, and shows progress;
    on rank 0 only.

    With a Trainer whose engine is not ours it works too: the fields that only HiFT knows are then absent.

    Args:
        run_dir: where the files go.
        get_engine: returns the ``HiFTEngine`` (``lambda: trainer.engine``); called at each event, as Trainer
            makes the engine only when training begins.
        tokens_seen: (state) -> input tokens of all ranks since the run began. By default what Trainer counts
            itself when ``include_num_input_tokens_seen`` is set ("non_padding" is the honest choice); without
            either there is no token rate.
        largest_batch: (rows, tokens) of the largest micro-batch. With it and on an accelerator the engine works out,
            beside the first steps, what each group's peak memory should be.
        padded: its rows may differ in length.
        progress: a ``Progress``; chosen by what the terminal can do if None.
        plots: whether to draw the pictures; asked when training ends.
        shown: what is printed of an evaluation besides its loss, by name without ``eval_``.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        get_engine: Callable[[], HiFTEngine | None] | None = None,
        tokens_seen: Callable[[TrainerState], int] | None = None,
        largest_batch: tuple[int, int] | None = None,
        padded: bool = False,
        progress: Progress | None = None,
        plots: Callable[[], bool] = lambda: True,
        shown: tuple[str, ...] = (),
    ) -> None:
        self.run_dir = Path(run_dir)
        self._get_engine: Callable[[], HiFTEngine | None] = get_engine or (lambda: None)
        self._tokens_seen = tokens_seen or (lambda state: state.num_input_tokens_seen)
        self._largest_batch, self._padded = largest_batch, padded
        self._progress = progress
        self._plots = plots
        self._shown = shown
        self._writer: MetricsWriter | None = None
        self._pending: StepRecord | None = None
        self._unwritten = False  # the last line was left out
        self._on_cpu = False
        self._mark = self._began = time.monotonic()
        self._tokens = 0
        self._kept_step: int | None = None  # after training

    # --- the Trainer's events, in the order in which they come -----------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            self._progress = SilentProgress()
            return
        self._writer, self._kept_step = MetricsWriter(self.run_dir, resume_step=state.global_step), None
        self._on_cpu = args.device.type == "cpu"
        self._progress = self._progress or make_progress()
        self._tokens = self._tokens_seen(state)
        engine = self._get_engine()  # DeepSpeed's own without a "hift" block
        if self._largest_batch is not None and not self._on_cpu and engine and hasattr(engine, "last_report"):
            rows, tokens = self._largest_batch
            # Fewer if others did not fit.
            engine.memory.start(state.train_batch_size or rows, tokens, self._padded)
        groups = self._groups()
        if groups:
            write_groups(self.run_dir, groups)
        turns = [group for group in groups if group.index >= 0]
        cycle_steps = len(turns) * getattr(getattr(self._get_engine(), "schedule", None), "steps_per_group", 1)
        self._announce(state, groups, cycle_steps)
        self._progress.start(state.max_steps, state.global_step, window=cycle_steps or 20)
        self._mark = self._began = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._writer is None:
            return
        self._flush()
        self._pending = self._make_record(state)
        # When Trainer is about to log, the loss is still to come; DefaultFlowCallback, which decides, ran
        # before us.
        if not control.should_log:
            self._flush()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        if self._pending is None or "loss" not in logs:
            return
        self._pending["loss"] = float(logs["loss"])
        if "learning_rate" in logs:
            self._pending.setdefault("lr", float(logs["learning_rate"]))
        if "grad_norm" in logs:
            self._pending.setdefault("grad_norm", float(logs["grad_norm"]))
        self._flush()

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not metrics or "eval_loss" not in metrics:
            return
        self._flush()
        if state.global_step != (step := self._kept_step or state.global_step):  # the best weights, once more
            progress = self._progress or make_progress()
            progress.note(f"evaluation of step {step}'s weights: loss {metrics['eval_loss']:.4f}", style="bold")
            return
        numbers = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
        record: EvalRecord = {"step": state.global_step, **numbers}  # type: ignore[typeddict-item]  # names that others choose
        # An evaluation after training finds the writer closed and is appended all the same.
        writer = self._writer or MetricsWriter(self.run_dir, resume_step=state.global_step)
        self._write(writer, record)
        if writer is not self._writer:
            writer.close()
        progress = self._progress or make_progress()
        measured = [("loss", metrics["eval_loss"])]
        measured += [(name, metrics[f"eval_{name}"]) for name in self._shown if f"eval_{name}" in metrics]
        told = ", ".join(f"{name} {value:.4f}" for name, value in measured)
        progress.note(f"evaluation at step {state.global_step}: {told}", style="bold")
        self._mark = time.monotonic()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._mark = time.monotonic()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._writer is None or self._progress is None:
            return
        self._flush()
        self._writer.close()
        self._writer = None
        self._progress.close()
        self._progress.note(f"trained to step {state.global_step} in {clock(time.monotonic() - self._began)}")
        self._kept_step = kept_step(args, state)
        if args.load_best_model_at_end and state.best_metric is not None:
            self._progress.note(
                f"best: {args.metric_for_best_model} {state.best_metric:.4f} at step {self._kept_step}, whose "
                f"weights are kept",
                style="bold",
            )
        self._report_coverage(self._kept_step)
        steps = read_metrics(self.run_dir).steps
        if share_waited(steps)[0] is not None and hasattr(self._get_engine(), "last_report"):
            self._progress.note(summary(steps))
        if self._plots() and state.global_step > 0:
            drawn = plot_run(self.run_dir)
            self._progress.note("drawn: " + ", ".join(str(path) for path in drawn))

    # --- one record ------------------------------------------------------------------------------------

    def _make_record(self, state: TrainerState) -> StepRecord:
        now = time.monotonic()
        record: StepRecord = {"step": state.global_step, "step_time_s": round(now - self._mark, 6)}
        self._mark = now
        if state.epoch is not None:
            record["epoch"] = state.epoch
        report = getattr(self._get_engine(), "last_report", None)
        if report is not None:
            record |= {name: getattr(report, name) for name in _SAME_NAME if hasattr(report, name)}  # type: ignore[typeddict-item]  # names that others choose
            if getattr(report, "waits", None) is not None:
                record["waits_s"] = {cause: round(seconds, 6) for cause, seconds in report.waits.items()}
            if hasattr(report, "peak_bytes"):
                record["peak_memory_gib"] = report.peak_bytes / 2**30
                if self._on_cpu:
                    record["memory_of_process"] = True
            if getattr(report, "forecast_bytes", None) is not None:
                record["forecast_memory_gib"] = report.forecast_bytes / 2**30
        tokens = self._tokens_seen(state)
        if tokens:
            record["num_tokens"] = tokens
            record["tokens_per_s"] = round((tokens - self._tokens) / max(record["step_time_s"], 1e-6), 1)
            self._tokens = tokens
        return record

    def _flush(self) -> None:
        if self._pending is not None and self._writer is not None and self._progress is not None:
            self._write(self._writer, self._pending)
            self._progress.update(self._pending)
        self._pending = None

    def _write(self, writer: MetricsWriter, record: StepRecord | EvalRecord) -> None:
        """A line that cannot be written is left out and said once, if a checkpoint that cannot be may be too.

        Raises:
            TrainingError: "hift.checkpoint.on_error" is not "continue".
        """
        try:
            writer.write(record)
            self._unwritten = False
        except OSError as error:
            line = explain_refusal(error, self.run_dir, "metrics")
            hift = getattr(self._get_engine(), "hift", None)
            if hift is None or hift.checkpoint.on_error == "raise":
                raise TrainingError(line) from error
            if not self._unwritten:
                logger.error("metrics not written, training goes on: %s", line)
            self._unwritten = True

    # --- beginning and end -----------------------------------------------------------------------------

    def _groups(self) -> list[GroupSummary]:
        engine = self._get_engine()
        groups = list(getattr(engine, "groups", None) or ())
        always = getattr(getattr(engine, "partition", None), "always", None)
        return summarize([*([always] if always is not None else []), *groups])

    def _announce(self, state: TrainerState, groups: list[GroupSummary], cycle_steps: int) -> None:
        """One line on what is about to happen, and a warning if the run is too short for its groups."""
        assert self._progress is not None
        line = f"{state.max_steps - state.global_step} steps"
        if state.global_step:
            line = f"resumed after step {state.global_step}, {line} to go"
        if groups:
            numel = sum(group.numel for group in groups)
            num_groups = sum(group.index >= 0 for group in groups)
            of_them = f"{num_groups} layer groups, one trained in each step" if num_groups > 1 else "one layer group"
            line = f"{_count(numel)} parameters in {of_them}; {line} = {state.max_steps / cycle_steps:.1f} cycles"
        self._progress.note(f"{line}; run folder {self.run_dir}")
        if groups:
            schedule = GroupSchedule(num_groups, steps_per_group=cycle_steps // num_groups)
            if warning := schedule.too_few_turns(state.max_steps):
                self._progress.note(f"WARNING: {warning}", style="bold yellow")
        for note in getattr(self._get_engine(), "lines_at_start", list)():
            self._progress.note(note)

    def _report_coverage(self, step: int) -> None:
        assert self._progress is not None
        engine = self._get_engine()
        if engine is None or not hasattr(engine, "coverage"):
            return
        trials = getattr(getattr(engine, "optimizer", None), "trials", None)
        counts = trials.state_dict() if trials is not None and trials.num_made else None
        coverage = make_coverage(engine.coverage(), step, getattr(engine, "groups", ()), counts)
        write_coverage(self.run_dir, coverage)
        self._progress.note(coverage.summary())
        warning = coverage.warning()
        if warning:
            self._progress.note(warning, style="bold red")


def report_instead_of_printing(trainer: Trainer, callback: ReportCallback) -> None:
    """Add ``callback`` to ``trainer`` in the place of Trainer's own bar and printed dictionaries."""
    for default in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(default)
    trainer.add_callback(callback)


def _count(number: int) -> str:
    """ "11.2K", "134.5M", "6.74B"."""
    for factor, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= factor:
            return f"{number / factor:,.{2 if unit == 'B' else 1}f}{unit}"
    return str(number)
