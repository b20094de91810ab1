"""What a run does once its last step is made: the figures of its training, the last evaluation, the export, the files
and lines that say what came of it. :mod:`hift_ds.train.finetune` calls these in turn; the files of an export are
written in :mod:`hift_ds.hf.export`, the pages in :mod:`hift_ds.report`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hift_ds.checkpoint.files import replace_json
from hift_ds.checkpoint.manifest import latest_tag
from hift_ds.checkpoint.saved_checkpoint import SavedCheckpoint
from hift_ds.data.prepare import PreparedData
from hift_ds.dtypes import torch_dtype
from hift_ds.hf.export import export_model
from hift_ds.hf.safetensors_folder import tensor_dtypes
from hift_ds.hf.weight_names import skeleton
from hift_ds.out_of_memory import no_traceback_when_full
from hift_ds.report.coverage import kept_step
from hift_ds.report.groups import record_movement
from hift_ds.report.model_card import write_model_card
from hift_ds.report.page import FILE_NAME as REPORT_FILE
from hift_ds.report.page import next_commands, write_report
from hift_ds.report.plots import plot_run
from hift_ds.report.run_summary import RESULTS_FILE
from hift_ds.train.preflight import CheckedRun
from hift_ds.train.run_config import RunConfig
from hift_ds.train.spread_masters import gathered_weights
from hift_ds.train.tasks import TASKS
from hift_ds.train.trainer import zero_stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.trainer_utils import TrainOutput

    from hift_ds.train.trainer import RunTrainer


# -- figures ---------------------------------------------------------------------------------------------------------


def training_results(trainer: RunTrainer, run: RunConfig, output: TrainOutput) -> dict[str, Any]:
    """What ``all_results.json`` says of the training: transformers' figures, the evaluation before the first step, and
    how often the weights were updated."""
    state = trainer.state
    results: dict[str, Any] = {**output.metrics, "steps": state.global_step}
    if trainer.args.load_best_model_at_end and state.best_metric is not None:
        results["best_step"] = kept_step(trainer.args, state)
    if trainer.had_no_step_left:  # neither a loss nor a time to report
        results = {"steps": state.global_step}
    results.pop("total_flos", None)  # transformers' estimate is of full fine-tuning
    first = next((entry for entry in state.log_history if "eval_loss" in entry and entry["step"] == 0), None)
    if first is not None:
        measured = ("loss", *TASKS[run.task].metrics)
        results |= {f"eval_{name}_before": first[f"eval_{name}"] for name in measured if f"eval_{name}" in first}
    if trainer.args.auto_find_batch_size:
        results["micro_batch_size"] = state.train_batch_size
    if trainer.engine is not None:
        coverage = trainer.engine.coverage()
        results["cycles"] = trainer.engine.schedule.cursor.cycle
        results["num_groups"] = len(trainer.engine.groups)
        results["never_updated"] = sum(count == 0 for count in coverage.values())
        results["num_parameters"] = len(coverage)
    return results


@no_traceback_when_full("in evaluation")
def evaluate(trainer: RunTrainer, data: PreparedData) -> dict[str, float]:
    """Evaluate the weights that are exported, unless the last evaluation was of these very weights.

    Returns:
        What was measured, by names that begin with ``eval_``; nothing if no rows are held out.
    """
    if data.eval is None:
        return {}
    step, history = kept_step(trainer.args, trainer.state), reversed(trainer.state.log_history)
    last = next((entry for entry in history if "eval_loss" in entry and entry["step"] == step), None)
    if last is None:
        last = trainer.evaluate()
    return {key: value for key, value in last.items() if key.startswith("eval_")}


def data_counts(data: PreparedData) -> dict[str, int]:
    """The counts of the training data, for those who look at the run later; none of streamed rows."""
    if data.is_streamed:
        return {}
    report = data.reports[0]
    counted = {"train_samples": report.num_samples, "train_tokens": report.tokens}
    return counted | ({"train_learned_tokens": report.learned_tokens} if hasattr(report, "learned_tokens") else {})


# -- the export ------------------------------------------------------------------------------------------------------


@no_traceback_when_full("while the model is exported")
def export(
    checked: CheckedRun, trainer: RunTrainer, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Export, by the first rank: the weights as safetensors, and how far each layer group has moved. The others send it
    their masters where each node keeps its own checkpoints.

    Raises:
        CheckpointError: the export's folder cannot be written, or the disk is full.
    """
    tensors, best = None, _exports_masters(checked)
    first, spread = trainer.args.process_index == 0, trainer.args.save_on_each_node and best
    if not (first or spread):
        return
    if zero_stage(trainer.args) == 3:  # no rank has whole weights
        tensors, model = _saved_weights(trainer, best=best), skeleton(model.config, model)
    elif best and checked.dtype != "fp32":
        tensors = _saved_weights(trainer, best=True)
    try:
        if first:
            _write_export(checked, model, tensors, tokenizer)
    finally:
        if spread:
            for _ in tensors or ():  # what is left to send, also when the first rank could not write
                pass


def _exports_masters(checked: CheckedRun) -> bool:
    """Some tensor is written as fp32: "auto" writes those that the input has as fp32, be it but a few."""
    if checked.run.export.dtype != "auto":
        return checked.export_dtype == "fp32"
    return torch.float32 in tensor_dtypes(checked.model.path).values()


def _saved_weights(trainer: RunTrainer, best: bool) -> Iterator[tuple[str, torch.Tensor]] | None:
    """The weights in the checkpoint that the run ends with, one at a time; None if DeepSpeed alone has written it.

    Args:
        best: the fp32 masters of 16-bit weights.
    """
    output_dir, best_folder = trainer.args.output_dir, trainer.state.best_model_checkpoint
    assert output_dir is not None
    folder = Path(output_dir) / f"checkpoint-{trainer.state.global_step}"
    if trainer.args.load_best_model_at_end:
        assert best_folder is not None
        folder = Path(best_folder)
    tag = latest_tag(folder)
    if tag is None or trainer.engine is None:
        return None
    saved = SavedCheckpoint(folder / tag)
    return gathered_weights(saved) if best and trainer.args.save_on_each_node else saved.weights(best=best)


def _write_export(
    checked: CheckedRun,
    model: PreTrainedModel,
    tensors: Iterable[tuple[str, torch.Tensor]] | None,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    run = checked.run
    export_model(
        model,
        run.export_dir,
        tensors=tensors,
        tokenizer=tokenizer,
        max_shard_size=run.export.max_shard_size,
        dtype=tensor_dtypes(checked.model.path) if run.export.dtype == "auto" else torch_dtype(checked.export_dtype),
    )
    record_movement(run.output_dir, checked.model.path, run.export_dir, model)
    plot_run(run.output_dir)


# -- what is left to read --------------------------------------------------------------------------------------------


def write_results(run: RunConfig, results: Mapping[str, Any]) -> None:
    """Write ``all_results.json``, which stands for a whole run, and the pages that are made of the run folder."""
    replace_json(run.output_dir / RESULTS_FILE, dict(sorted(results.items())))
    write_model_card(run.output_dir, run.export_dir, TASKS[run.task].auto_class)
    write_report(run.output_dir)


def closing_lines(run: RunConfig, results: Mapping[str, Any]) -> list[str]:
    """What came of the run, and what to type next."""
    lines = []
    task = TASKS[run.task]
    if "eval_loss_before" in results and "eval_loss" in results:
        before, after = (f"{results[key]:.4f}" for key in ("eval_loss_before", "eval_loss"))
        told = [f"held-out loss {before} -> {after}"]
        for name in task.metrics[:2]:
            if (key := f"eval_{name}") in results and f"{key}_before" in results:
                digits = 2 if name == "perplexity" else 4
                told.append(f"{name} {results[f'{key}_before']:,.{digits}f} -> {results[key]:,.{digits}f}")
        lines.append(", ".join(told))
    holds_out = run.data.eval is not None or bool(run.data.val_size)
    then = next_commands(run.output_dir, run.task, holds_out)
    return [*lines, f"report: {run.output_dir / REPORT_FILE}", f"next: {'    '.join(then)}"]
