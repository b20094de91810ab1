"""Fine-tuning as a run file says, from a safetensors folder to a safetensors folder. Every rank of the job
runs this.

:func:`finetune` reads as its phases. What can be wrong with the input is found in the first one, before any
weight is read; the loop is transformers' (:mod:`hift_ds.train.trainer`), the step the engine's. The model is loaded
in :mod:`hift_ds.train.load_model`; evaluation, export and results are in :mod:`hift_ds.train.after_training`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import DefaultFlowCallback

from hift_ds.checkpoint.files import replace_json, replace_text
from hift_ds.checkpoint.folder_lock import LOCK_FILE, FolderLock
from hift_ds.checkpoint.trainer_folder import find_checkpoints
from hift_ds.data.prepare import PreparedData, prepare_data, prepare_stream
from hift_ds.data.task_data import Preparation
from hift_ds.data.tokenizers import add_tokens, load_tokenizer
from hift_ds.errors import CheckpointError, ConfigError
from hift_ds.forecast.fit import accumulation
from hift_ds.hf.export import check_files_can_be_written
from hift_ds.hf.model_structure import build_on_meta, read_task_config, turn_cache_off
from hift_ds.integrations.disk_room import DiskRoomCallback
from hift_ds.integrations.events import EngineEvents
from hift_ds.layers.grouping import partition_model
from hift_ds.out_of_memory import no_traceback_when_full
from hift_ds.process_group import as_single_process, ensure_process_group
from hift_ds.ranks import avoid_broken_links, gather, on_all_ranks, rank_and_world_size
from hift_ds.report.progress import print_line
from hift_ds.report.run_summary import DEEPSPEED_FILE, RESULTS_FILE, versions
from hift_ds.train.after_training import closing_lines, data_counts, evaluate, export, training_results, write_results
from hift_ds.train.card import card_here
from hift_ds.train.fit import CHOSEN, FIT_FILE, Chosen, Facts, apply, choose
from hift_ds.train.group_size import tokens_per_step
from hift_ds.train.load_model import ChecksPacking, check_attention, load_model
from hift_ds.train.preflight import CheckedRun, check_run, with_settings
from hift_ds.train.resumed_settings import (
    SETTINGS_FILE,
    compare,
    fingerprint,
    read_settings,
    settings_of,
    settings_text,
)
from hift_ds.train.run_config import RUN_FILE_COPY, RunConfig
from hift_ds.train.settings import gives_passes
from hift_ds.train.tasks import TASKS
from hift_ds.train.trainer import build_trainer, make_arguments, zero_stage
from hift_ds.train.watchdog import collective_timeout_s, lost_rank_error
from hift_ds.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainerControl, TrainerState

    from hift_ds.train.trainer import RunTrainer

logger = logging.getLogger(__name__)


@as_single_process()
def finetune(run: RunConfig, dry_run: bool = False) -> dict[str, Any]:
    """Check, load, train, evaluate, export, report.

    Args:
        dry_run: end where the first step would begin, with the run folder as it was.

    Returns:
        The contents of ``all_results.json``, on every rank. If a signal ended the training early there is no
        evaluation and no export, and ``stopped_by`` names it. Of a dry run: the number of steps to come.

    Raises:
        HiFTError: one line for the user, on every rank alike wherever the ranks could agree on it.
    """
    avoid_broken_links()
    ensure_process_group(collective_timeout_s(run.train.hang_timeout_s))
    checked = on_all_ranks(lambda: _check(run))
    is_first = rank_and_world_size()[0] == 0
    # (Path.exists would raise for a name that is too long, before the line that says so.)
    made = is_first and not os.path.exists(run.output_dir)
    locks = on_all_ranks(lambda: _lock_folders(run) if is_first else [])
    try:
        return _finetune(checked, print_line if is_first else _silent, dry_run)
    finally:
        for lock in locks:
            lock.release()
        if dry_run and made:
            (run.output_dir / LOCK_FILE).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # it is not empty: somebody else is there by now
                run.output_dir.rmdir()


def _lock_folders(run: RunConfig) -> list[FolderLock]:
    """What two runs would write into at the same time is found before either has trained."""
    locks = [FolderLock(run.output_dir)]
    try:
        return [FolderLock(run.export_dir, key="export.dir", leaves_file=False), *locks]
    except ConfigError:
        locks[0].release()
        raise


def _finetune(checked: CheckedRun, say: Callable[[str], None], dry_run: bool) -> dict[str, Any]:
    run = checked.run
    checkpoints, finished = _checkpoints(run)
    if finished is not None:
        say(
            f"{run.output_dir} is complete: {finished['steps']} steps, exported to {run.export_dir}; nothing is "
            "left to do (raise train.max_steps or train.epochs to go on)"
        )
        return finished
    arguments = on_all_ranks(lambda: make_arguments(checked, fresh=not checkpoints))
    _introduce(checked, arguments, say)
    tokenizer, data = on_all_ranks(lambda: _load_data(checked, arguments))
    for report in data.reports:
        say(str(report))
    chosen = _choose(checked, data, checkpoints)
    for line in chosen.lines:
        say(line)
    if keys := chosen.keys | tokens_per_step(checked.settings, data.tokens_per_row):
        checked = with_settings(checked, apply(checked.settings, keys))
        arguments = on_all_ranks(lambda: make_arguments(checked, fresh=not checkpoints))

    model = on_all_ranks(lambda: load_model(checked, arguments, tokenizer, data.model_options, say))
    on_all_ranks(lambda: check_files_can_be_written(model, tokenizer) if arguments.process_index == 0 else None)
    restore_cache = turn_cache_off(model.config)
    trainer = build_trainer(checked, arguments, model, tokenizer, data)
    if run.data.packing and zero_stage(arguments) == 3:
        trainer.add_callback(ChecksPacking(lambda: trainer.engine))
    if dry_run:
        return _rehearse(trainer, checkpoints, say)
    assert isinstance(arguments.deepspeed, dict), "make_arguments gives one"
    settings = settings_of(run, arguments.deepspeed, model.config.to_dict(), fingerprint(data.train))
    settings[CHOSEN] = chosen.record
    results = _train(trainer, run, checkpoints, settings)
    if trainer.preemption.stopped_by is not None:
        results["stopped_by"] = trainer.preemption.stopped_by
        say(f"saved after step {results['steps']}; the same command goes on from there")
        return results

    results |= evaluate(trainer, data)
    restore_cache()
    results |= data_counts(data)
    results["environment"] = versions()
    on_all_ranks(lambda: export(checked, trainer, model, tokenizer))
    say(f"exported to {run.export_dir}")
    if arguments.process_index == 0:
        write_results(run, results)
    for line in closing_lines(run, results):
        say(line)
    return results


def _silent(line: str) -> None:
    """Stands for ``say`` on ranks other than the first."""


# -- before any weight is read -------------------------------------------------------------------------------


def _check(run: RunConfig) -> CheckedRun:
    checked = check_run(run, rank_and_world_size()[1])
    block = checked.settings.hift
    if block is not None:
        trust, auto_class = run.model.trust_remote_code, TASKS[run.task].auto_class
        config = read_task_config(str(checked.model.path), auto_class, trust_remote_code=trust)
        if run.model.attn_implementation:
            check_attention(config, run)
        structure = build_on_meta(config, trust_remote_code=trust)
        partition_model(
            structure, group_size=block.first_group_size, patterns=block.groups, always_active=block.always_active
        )
    return checked


def _checkpoints(run: RunConfig) -> tuple[list[Path], dict[str, Any] | None]:
    """The checkpoints to go on from, newest first; and the results of a run that has nothing left to do."""
    checkpoints, damage = on_all_ranks(lambda: find_checkpoints(run.output_dir, run.train.resume))
    if run.train.resume != "auto":
        return checkpoints, None
    checkpoints = _agree_on_checkpoints(checkpoints, damage)
    return checkpoints, gather(_results_of_finished(run, checkpoints))[0]


def _results_of_finished(run: RunConfig, checkpoints: list[Path]) -> dict[str, Any] | None:
    """What the run folder says of a run with these very settings that has been exported; None if there is none.

    The results are written after the export, and removed before a run trains, so that they stand for a whole run.
    """
    try:
        results = json.loads((run.output_dir / RESULTS_FILE).read_text(encoding="utf-8"))
        settings = yaml.safe_load((run.output_dir / RUN_FILE_COPY).read_text(encoding="utf-8"))
        exported = any(run.export_dir.glob("*.safetensors"))
        is_last = bool(checkpoints) and checkpoints[0].name == f"checkpoint-{results['steps']}"
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        return None
    return results if exported and is_last and settings == run.model_dump(mode="json") else None


def _agree_on_checkpoints(checkpoints: list[Path], damage: list[str]) -> list[Path]:
    """Nodes that keep checkpoints to themselves may not have the same ones: what one lacks none resumes from."""
    seen = gather([folder.name for folder in checkpoints])
    everywhere = [folder for folder in checkpoints if all(folder.name in theirs for theirs in seen)]
    damage = [
        *damage,
        *(f"{folder} is not on every node" for folder in checkpoints if folder not in everywhere),
    ]
    if damage and rank_and_world_size()[0] == 0:
        logger.warning("%s; going on from %s", "; ".join(damage), everywhere[0] if everywhere else "the beginning")
    return everywhere


def _introduce(checked: CheckedRun, arguments: TrainingArguments, say: Callable[[str], None]) -> None:
    """What is about to run, on the terminal."""
    batch, model = checked.batch, checked.model
    device = arguments.device.type.upper()
    if arguments.device.type == "cuda":
        device = torch.cuda.get_device_name(arguments.device)
    processes = f"{checked.world_size} process{'es' if checked.world_size > 1 else ''}"
    say(f"hift_ds {__version__}, {processes} on {device}")
    say(f"{model.path}: {model.numel:,} weights in {model.dtype}, trained in {checked.dtype}")
    is_open = checked.run.fit is not None and not gives_passes(checked.settings)  # said when it is chosen
    passes = f"micro-batch {batch.micro_batch_size} x {accumulation(batch.gradient_accumulation_steps)}"
    parts = "" if is_open else f": {passes} x {processes}"
    rows = f"{batch.global_batch_size} row{'s' if batch.global_batch_size > 1 else ''}"
    say(f"{rows} in an optimizer step{parts}, up to {checked.max_length:,} tokens each")


def _load_data(checked: CheckedRun, arguments: TrainingArguments) -> tuple[PreTrainedTokenizerBase, PreparedData]:
    """The first process of each node prepares, the others read what it left in the cache."""
    run = checked.run
    with arguments.main_process_first(local=True, desc="preparing data"):
        tokenizer = load_tokenizer(checked.tokenizer_folder, trust_remote_code=run.model.trust_remote_code)
        add_tokens(tokenizer, run.model.added_tokens, run.model.added_special_tokens)
        task = TASKS[run.task]
        if not task.is_language_modelling:
            return tokenizer, task.prepare(Preparation(run.data, tokenizer, checked.max_length, checked.model.config))
        vocab_size = checked.model.vocab_size
        if vocab_size is not None and (run.model.added_tokens or run.model.added_special_tokens):
            vocab_size = max(vocab_size, len(tokenizer))
        if run.data.streaming:
            return tokenizer, prepare_stream(
                run.data_of_task, tokenizer, checked.max_length, vocab_size, *rank_and_world_size()
            )
        return tokenizer, prepare_data(run.data_of_task, tokenizer, checked.max_length, vocab_size)


def _choose(checked: CheckedRun, data: PreparedData, checkpoints: list[Path]) -> Chosen:
    """What the run leaves open, by the first rank for all."""
    longest = max((report.longest_tokens for report in data.reports), default=checked.max_length)
    is_full = checked.run.data.packing or data.is_streamed
    length = checked.max_length if is_full else min(max(longest, 1), checked.max_length)
    facts = Facts(checked.settings, checked.dtype, str(checked.model.path), length, data.num_rows)
    before = (read_settings(checkpoints[0]) or {}).get(CHOSEN) if checkpoints else None
    cards = gather(on_all_ranks(lambda: card_here(checked.settings, checked.dtype)))
    least = min(cards, key=lambda card: card.usable_bytes)
    first = rank_and_world_size()[0] == 0
    chosen = gather(on_all_ranks(lambda: choose(facts, least, before) if first else None))[0]
    assert chosen is not None, "the first rank's"
    return chosen


# -- training ------------------------------------------------------------------------------------------------


class _Began(TrainerCallback):
    """Whether training got past the loading of its checkpoint; then the run folder is this run's, and so is every
    checkpoint, beside which stands what it was saved with."""

    began = False

    def __init__(self, run: RunConfig, settings: dict[str, Any]) -> None:
        self.run, self.settings = run, settings

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert args.output_dir is not None
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if args.process_index == 0 and folder.is_dir():
            with contextlib.suppress(OSError):  # it says what would differ, no more
                replace_text(folder / SETTINGS_FILE, settings_text(self.settings))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self.began and args.process_index == 0:
            assert isinstance(args.deepspeed, dict)
            _write_settings(self.run, args.deepspeed, self.settings.get(CHOSEN))
        self.began = True


def _write_settings(run: RunConfig, deepspeed: Mapping[str, Any], chosen: Mapping[str, Any] | None) -> None:
    """What the run folder is the run of. Nothing before: a run that is refused changes nothing."""
    (run.output_dir / RESULTS_FILE).unlink(missing_ok=True)  # of a run that ended before this one goes on
    origin = f"# {run.file} {' '.join(run.overrides)}".rstrip()
    content = yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    replace_text(run.output_dir / RUN_FILE_COPY, f"{origin}\n# every key, defaults included\n{content}")
    replace_json(run.output_dir / DEEPSPEED_FILE, deepspeed)
    if chosen:
        replace_json(run.output_dir / FIT_FILE, chosen)


@no_traceback_when_full("in training")
def _train(trainer: RunTrainer, run: RunConfig, checkpoints: list[Path], settings: dict[str, Any]) -> dict[str, Any]:
    """Train, from the newest checkpoint whose checksums are right, else from the start."""
    progress = _Began(run, settings)
    trainer.add_callback(progress)
    try:
        for position, folder in enumerate(checkpoints):
            try:
                on_all_ranks(functools.partial(_compare_settings, folder, settings))
                if trainer.args.process_index == 0:
                    print(f"resuming from {folder}", flush=True)
                return training_results(trainer, run, trainer.train(resume_from_checkpoint=str(folder)))
            except (CheckpointError, pickle.UnpicklingError, EOFError) as found:
                error = found if isinstance(found, CheckpointError) else _unreadable(folder, found)
                if progress.began or position + 1 == len(checkpoints):
                    raise error from None
                logger.warning("%s; trying %s", error, checkpoints[position + 1])
        return training_results(trainer, run, trainer.train())
    except RuntimeError as error:
        lost = lost_rank_error(error, trainer.engine) if trainer.engine is not None else None
        if lost is None:
            raise
        raise lost from error


class _AtTheFirstStep(Exception):
    """Everything before it went well."""


class _StopsThere(TrainerCallback):
    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        raise _AtTheFirstStep


@no_traceback_when_full("before the first step")
def _rehearse(trainer: RunTrainer, checkpoints: list[Path], say: Callable[[str], None]) -> dict[str, Any]:
    """Training up to its first step, a checkpoint's loading included. No callback that writes or reports is told."""
    handler = trainer.callback_handler
    quiet = (EngineEvents, DiskRoomCallback, DefaultFlowCallback, ChecksPacking)
    handler.callbacks = [callback for callback in handler.callbacks if isinstance(callback, quiet)]
    handler.callbacks.append(_StopsThere())
    with contextlib.suppress(_AtTheFirstStep):
        trainer.train(resume_from_checkpoint=str(checkpoints[0]) if checkpoints else None)
    state, engine = trainer.state, trainer.engine
    if checkpoints:
        say(f"would go on from {checkpoints[0]}, step {state.global_step}")
    if engine is not None:
        turns = [group.name for group in engine.groups]
        shown = ", ".join(turns[:3]) + (f", ... {turns[-1]}" if len(turns) > 3 else "")
        cycles = state.max_steps / engine.schedule.steps_per_cycle
        say(f"{len(turns)} layer groups, bottom to top: {shown}; {cycles:.1f} cycles over all of them")
        if warning := engine.schedule.too_few_turns(state.max_steps):
            say(f"WARNING: {warning}")
    left = state.max_steps - state.global_step
    say(f"dry run: everything up to the first of {left:,} steps is in order; nothing was trained or written")
    return {"steps": left}


def _compare_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Say what is another than when ``folder`` was saved; refuse what cannot be."""
    if rank_and_world_size()[0] != 0:
        return
    then = read_settings(folder)
    if then is None:
        logger.warning(
            "%s: %s is missing or is not what was written, so that settings which differ from the checkpoint's are not "
            "noticed",
            folder, SETTINGS_FILE,
        )  # fmt: skip
        return
    differences = compare(then, settings)
    differences.raise_refused(folder)
    for line in differences.lines(folder):
        logger.warning("%s", line)


def _unreadable(folder: Path, error: Exception) -> CheckpointError:
    """The error for a file that only transformers or DeepSpeed read, with torch."""
    reason = str(error).strip().splitlines()
    refused = "unsupported" in str(error).lower() or "weights only" in str(error).lower()
    why = (
        "names code to run when it is read, and is not loaded"
        if refused
        else f"is damaged ({(reason or ['it is empty'])[0]})"
    )
    return CheckpointError(f"{folder}: a file with states in it {why}; remove the folder to go on from an earlier one")
