"""What comes out of a checkpoint: which folder, whether it fits, what goes where.

Begin with :mod:`hift_ds.engine.checkpointer`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from hift_ds.checkpoint import manifest as manifests
from hift_ds.checkpoint.json_state import decode
from hift_ds.checkpoint.random_state import set_random_state
from hift_ds.checkpoint.saved_checkpoint import (
    SavedCheckpoint,
    block_differences,
    check_same_model,
    check_same_optimizer,
    grouping_differences,
    groups_now,
    option_differences,
)
from hift_ds.checkpoint.state_files import (
    check_reachable,
    class_name,
    options_of,
    restore_extras,
)
from hift_ds.checkpoint.write_plan import saved_tensors
from hift_ds.engine.deepspeed_seam import SeamEngine
from hift_ds.errors import CheckpointError
from hift_ds.layers.arch import whole_shape
from hift_ds.optim.trials import Trials
from hift_ds.ranks import gather, on_all_ranks
from hift_ds.schedule import Cursor

logger = logging.getLogger(__name__)


def choose_checkpoint(engine: SeamEngine, load_dir: Path, tag: str | None) -> Path | None:
    """The checkpoint to load, verified. All ranks choose the same."""
    tags = [tag] if tag is not None else _newest_first(load_dir)
    seen = gather(tags)
    damage: list[str] = []
    for candidate in seen[0]:
        lacking = next((rank for rank, theirs in enumerate(seen) if candidate not in theirs), None)
        reason = (
            _verify(engine, load_dir / candidate)
            if lacking is None
            else (f"{load_dir / candidate} is not there for rank {lacking}")
        )
        if reason is None:
            if damage:
                say(engine, f"{'; '.join(damage)}; resuming from {load_dir / candidate} instead")
            return load_dir / candidate
        damage.append(reason)
    if damage:
        raise CheckpointError("; ".join(damage) + ("" if tag is not None else f"; no whole checkpoint in {load_dir}"))
    return None


def _verify(engine: SeamEngine, folder: Path) -> str | None:
    """What is damaged, as any rank found it; each verifies its share of the files."""

    def check() -> None:
        if any(folder.glob("mp_rank_*_model_states.pt")):
            raise CheckpointError(
                f'{folder} was saved by DeepSpeed without a "hift" block: only such an engine loads it'
            )
        manifest = manifests.read_manifest(folder)
        if not manifest.node_local:
            names = manifests.share_of_files(manifest, engine.global_rank, engine.world_size)
        else:
            names = list(manifest.files) if engine.local_rank == 0 else []
        manifests.verify_files(folder, manifest, names)

    try:
        on_all_ranks(check, CheckpointError)
    except manifests.DamagedCheckpoint as error:
        return str(error)
    return None


def check_fits(engine: SeamEngine, saved: SavedCheckpoint, strict: bool, with_states: bool) -> None:
    """See that the checkpoint is one of this model and optimizer, and that all of it is here, before anything is
    changed.

    Raises:
        CheckpointError: it is not; on all ranks.
    """
    shapes = {name: whole_shape(tensor) for name, tensor in saved_tensors(engine.module).items()}
    check_same_model(saved, shapes, strict)
    if with_states:
        check_same_optimizer(saved, class_name(engine.optimizer.optimizer))
    updated = {name for name, entry in saved.parameters.items() if entry["updates"]}
    on_all_ranks(lambda: check_reachable(engine.optimizer.states, saved.states, updated, saved.folder), CheckpointError)


@torch.no_grad()
def load_weights(engine: SeamEngine, saved: SavedCheckpoint, custom_load_fn: Callable[..., None] | None) -> None:
    """Load the saved weights and buffers into the model; or do whatever ``custom_load_fn(src=, dst=)`` does."""
    if custom_load_fn is not None:
        custom_load_fn(src=dict(saved.weights()), dst=engine.module)
        return
    parameters = engine.optimizer.parameters
    tensors = {name: t for name, t in saved_tensors(engine.module).items() if name in saved.parameters}
    parameters.begin_loading(tensors.values())
    for name, tensor in tensors.items():
        parameters.set_weight(tensor, saved.weight(name, best=tensor.dtype == torch.float32))


def load_progress(
    engine: SeamEngine, saved: SavedCheckpoint, with_states: bool, with_scheduler: bool, with_generators: bool
) -> None:
    """Take over where the saved run stood: counters, schedule, learning rate, options, pending gradients.

    Args:
        with_states: the optimizer's options and extras too.
        with_scheduler: the learning rates and their scheduler too.
        with_generators: the global random generators too.
    """
    common, optimizer = saved.common, engine.optimizer
    engine.global_steps, engine.global_samples = common["global_steps"], common["global_samples"]
    engine.skipped_steps, optimizer.num_applied = common["skipped_steps"], common["applied_steps"]
    optimizer.set_coverage({name: entry["updates"] for name, entry in common["tensors"].items()})
    optimizer.trials = Trials(**common["optimizer"].get("trials", {}))
    optimizer.scaler.load_state_dict(decode(common["loss_scaler"]))
    if with_states:
        _load_options(engine, common["optimizer"]["param_groups"], with_scheduler)
        restore_extras(optimizer.states, common["optimizer"]["extras"], groups_now(saved, engine.partition.groups))
    if with_scheduler:
        optimizer.lr.load_state_dict(decode(common["learning_rate"]))
        if engine.lr_scheduler is not None and common["scheduler"] is not None:
            engine.lr_scheduler.load_state_dict(decode(common["scheduler"]))
            optimizer.lr.catch_up()
        elif engine.lr_scheduler is not None:
            say(engine, "saved without a scheduler of the engine's: this run's begins at its first step")
    _load_cursor(engine, saved)
    _load_pending_gradients(engine, saved)
    own = saved.of_rank(engine.global_rank)
    if own is not None and with_generators:
        set_random_state(own["random"], engine.device)


def _load_options(engine: SeamEngine, saved_groups: list, with_scheduler: bool) -> None:
    """What the saved run's optimizer computed with, as torch's ``load_state_dict`` does it."""
    now = [options_of(group) for group in engine.optimizer.param_groups]
    then = [decode(options) for options in saved_groups]
    if len(then) != len(now):
        say(
            engine,
            f"param_groups: {len(then)} -> {len(now)}; their options are the run's, not the checkpoint's",
        )
        return
    if differences := option_differences(then, now):
        say(engine, f"{'; '.join(differences)}: going on with the checkpoint's values")
    for group, options in zip(engine.optimizer.param_groups, then, strict=True):
        group.update(
            {key: value for key, value in options.items() if with_scheduler or key not in ("lr", "initial_lr")}
        )


def _load_cursor(engine: SeamEngine, saved: SavedCheckpoint) -> None:
    schedule = engine.optimizer.schedule
    differences = grouping_differences(saved, engine.partition.groups, schedule.differences(saved.common["schedule"]))
    schedule.load_state_dict(saved.common["schedule"])
    norms = {} if differences else saved.common["optimizer"].get("last_norms", {})
    engine.optimizer.last_norms = {int(index): norm for index, norm in norms.items()}
    if block := block_differences(saved, engine.hift.model_dump(mode="json"), bool(differences)):
        say(engine, f"\"hift\" settings are the run's, not the checkpoint's: {'; '.join(block)}")
    if differences:
        schedule.cursor = Cursor(schedule.cursor.cycle)
        say(
            engine,
            f"{'; '.join(differences)}: masters and states go with their parameters, the schedule "
            f"starts cycle {schedule.cursor.cycle} from its first group",
        )


def _load_pending_gradients(engine: SeamEngine, saved: SavedCheckpoint) -> None:
    common, steps = saved.common, engine.gradient_accumulation_steps()
    engine.micro_steps = common["micro_steps"]
    gradients = saved.gradients(engine.global_rank, engine.world_size)
    active = {m.name: m.param for group in engine.optimizer.active_groups for m in group.members}
    if common["gradient_accumulation_steps"] == steps and gradients.keys() <= active.keys():
        for name, grad in gradients.items():
            engine.optimizer.set_pending(active[name], grad)
        return
    engine.micro_steps = engine.global_steps * steps
    if gradients:
        say(
            engine,
            "saved in the middle of an accumulation that this run does not have: that step starts over",
        )


def say(engine: SeamEngine, line: str) -> None:
    """Warn once in a job, not once a rank."""
    if engine.global_rank == 0:
        logger.warning("checkpoint: %s", line)


def _newest_first(load_dir: Path) -> list[str]:
    """What ``latest`` names, then every other complete checkpoint."""
    latest = manifests.latest_tag(load_dir)
    return list(dict.fromkeys([*([latest] if latest else []), *manifests.tags_by_age(load_dir)]))
