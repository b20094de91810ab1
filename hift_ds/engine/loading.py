"""The engine's ``load_checkpoint``: which folder, whether it fits, what goes where.

Begin with :mod:`hift_ds.engine.checkpointing`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from hift_ds.errors import CheckpointError
from hift_ds.layers.arch import whole_shape
from hift_ds.ranks import gather, on_all_ranks
from hift_ds.schedule import Cursor

logger = logging.getLogger(__name__)


class Loading:
    """The part of :class:`HiFTEngine` that resumes."""

    def load_checkpoint(
        self,
        load_dir: str | Path,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Callable[..., None] | None = None,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """As DeepSpeed's, on any number of ranks, whatever the number that saved.

        Every file is compared with its checksum before anything is changed. Without ``tag`` a damaged newest
        checkpoint is reported and the newest whole one is loaded instead.

        Args:
            load_module_strict: the names of weights must agree with the model's.
            load_module_only: only the weights (and, for 16-bit ones, their fp32 masters).
            custom_load_fn: ``fn(src=weights by name, dst=module)`` instead of copying by name.

        Returns:
            (folder, client_state), or (None, None) if there is no checkpoint at all.

        Raises:
            CheckpointError: a damaged checkpoint asked for by tag, no whole one, one of another model or
                optimizer, or one of a newer version. The run is as it was.
        """
        self._refuse_if_ended()
        self.wait_for_checkpoint()
        folder = self._choose_checkpoint(Path(load_dir), tag)
        if folder is None and (Path(load_dir) / manifests.MANIFEST).exists():
            parent, name = Path(load_dir).parent, Path(load_dir).name
            raise CheckpointError(
                f'{load_dir} is itself a checkpoint: load_checkpoint("{parent}", tag="{name}") loads it'
            )
        if folder is None:
            self._say(f"none in {load_dir} (no 'latest' file, no complete folder); nothing was loaded")
            return None, None
        saved = SavedCheckpoint(folder)
        with_states = load_optimizer_states and not load_module_only
        check_same_model(
            saved, {n: whole_shape(t) for n, t in saved_tensors(self.module).items()}, load_module_strict
        )
        if with_states:
            check_same_optimizer(saved, class_name(self.optimizer.optimizer))
        updated = {name for name, entry in saved.parameters.items() if entry["updates"]}
        on_all_ranks(
            lambda: check_reachable(self.optimizer.states, saved.states, updated, folder), CheckpointError
        )
        client_state = saved.client_state()
        self.optimizer.drop_gradients()
        self._load_weights(saved, custom_load_fn)
        self.optimizer.states.load(saved.states, with_states=with_states)
        if not load_module_only:
            self._load_progress(saved, with_states, load_lr_scheduler_states)
        self.optimizer.states.prefetch(self.optimizer.groups[self.schedule.active])
        self.last_checkpoint = folder
        return str(folder), client_state

    def _choose_checkpoint(self, load_dir: Path, tag: str | None) -> Path | None:
        """The checkpoint to load, verified. All ranks choose the same."""
        tags = [tag] if tag is not None else _newest_first(load_dir)
        seen = gather(tags)
        damage: list[str] = []
        for candidate in seen[0]:
            lacking = next((rank for rank, theirs in enumerate(seen) if candidate not in theirs), None)
            reason = (
                self._verify(load_dir / candidate)
                if lacking is None
                else (f"{load_dir / candidate} is not there for rank {lacking}")
            )
            if reason is None:
                if damage:
                    self._say(f"{'; '.join(damage)}; resuming from {load_dir / candidate} instead")
                return load_dir / candidate
            damage.append(reason)
        if damage:
            raise CheckpointError(
                "; ".join(damage) + ("" if tag is not None else f"; no whole checkpoint in {load_dir}")
            )
        return None

    def _verify(self, folder: Path) -> str | None:
        """What is damaged, as any rank found it; each verifies its share of the files."""

        def check() -> None:
            if any(folder.glob("mp_rank_*_model_states.pt")):
                raise CheckpointError(
                    f'{folder} was saved by DeepSpeed without a "hift" block: only such an engine loads it'
                )
            manifest = manifests.read_manifest(folder)
            if not manifest.node_local:
                names = manifests.share_of_files(manifest, self.global_rank, self.world_size)
            else:
                names = list(manifest.files) if self.local_rank == 0 else []
            manifests.verify_files(folder, manifest, names)

        try:
            on_all_ranks(check, CheckpointError)
        except manifests.DamagedCheckpoint as error:
            return str(error)
        return None

    @torch.no_grad()
    def _load_weights(self, saved: SavedCheckpoint, custom_load_fn: Callable[..., None] | None) -> None:
        if custom_load_fn is not None:
            custom_load_fn(src=dict(saved.weights()), dst=self.module)
            return
        parameters = self.optimizer.parameters
        tensors = {name: t for name, t in saved_tensors(self.module).items() if name in saved.parameters}
        parameters.begin_loading(tensors.values())
        for name, tensor in tensors.items():
            parameters.set_weight(tensor, saved.weight(name, best=tensor.dtype == torch.float32))

    def _load_progress(self, saved: SavedCheckpoint, with_states: bool, with_scheduler: bool) -> None:
        common, optimizer = saved.common, self.optimizer
        self.global_steps, self.global_samples = common["global_steps"], common["global_samples"]
        self.skipped_steps, optimizer.num_applied = common["skipped_steps"], common["applied_steps"]
        optimizer.set_coverage({name: entry["updates"] for name, entry in common["tensors"].items()})
        optimizer.scaler.load_state_dict(decode(common["loss_scaler"]))
        if with_states:
            self._load_options(common["optimizer"]["param_groups"], with_scheduler)
            restore_extras(optimizer.states, common["optimizer"]["extras"], groups_now(saved, self.groups))
        if with_scheduler:
            optimizer.lr.load_state_dict(decode(common["learning_rate"]))
            if self.lr_scheduler is not None and common["scheduler"] is not None:
                self.lr_scheduler.load_state_dict(decode(common["scheduler"]))
                optimizer.lr.catch_up()
        self._load_cursor(saved)
        self._load_pending_gradients(saved)
        own = saved.of_rank(self.global_rank)
        if own is not None and self.restores_generators:
            set_random_state(own["random"], self.device)

    def _load_options(self, saved_groups: list, with_scheduler: bool) -> None:
        """What the saved run's optimizer computed with, as torch's ``load_state_dict`` does it."""
        now = [options_of(group) for group in self.optimizer.param_groups]
        then = [decode(options) for options in saved_groups]
        if len(then) != len(now):
            self._say(
                f"param_groups: {len(then)} -> {len(now)}; their options are the run's, not the checkpoint's"
            )
            return
        if differences := option_differences(then, now):
            self._say(f"{'; '.join(differences)}: going on with the checkpoint's values")
        for group, options in zip(self.optimizer.param_groups, then, strict=True):
            group.update(
                {
                    key: value
                    for key, value in options.items()
                    if with_scheduler or key not in ("lr", "initial_lr")
                }
            )

    def _load_cursor(self, saved: SavedCheckpoint) -> None:
        schedule = self.schedule
        differences = grouping_differences(saved, self.groups, schedule.differences(saved.common["schedule"]))
        schedule.load_state_dict(saved.common["schedule"])
        norms = {} if differences else saved.common["optimizer"].get("last_norms", {})
        self.optimizer.last_norms = {int(index): norm for index, norm in norms.items()}
        block = block_differences(saved, self.hift.model_dump(mode="json"), bool(differences))
        if block:
            self._say(f"\"hift\" settings are the run's, not the checkpoint's: {'; '.join(block)}")
        if differences:
            schedule.cursor = Cursor(schedule.cursor.cycle)
            self._say(
                f"{'; '.join(differences)}: masters and states go with their parameters, the schedule "
                f"starts cycle {schedule.cursor.cycle} from its first group"
            )

    def _load_pending_gradients(self, saved: SavedCheckpoint) -> None:
        common, steps = saved.common, self.gradient_accumulation_steps()
        self.micro_steps = common["micro_steps"]
        gradients = saved.gradients(self.global_rank, self.world_size)
        active = {m.name: m.param for group in self.optimizer.active_groups for m in group.members}
        if common["gradient_accumulation_steps"] == steps and gradients.keys() <= active.keys():
            for name, grad in gradients.items():
                self.optimizer.set_pending(active[name], grad)
            return
        self.micro_steps = self.global_steps * steps
        if gradients:
            self._say(
                "saved in the middle of an accumulation that this run does not have: that step starts over"
            )

    def _say(self, line: str) -> None:
        if self.global_rank == 0:
            logger.warning("checkpoint: %s", line)


def _newest_first(load_dir: Path) -> list[str]:
    """What ``latest`` names, then every other complete checkpoint."""
    latest = manifests.latest_tag(load_dir)
    return list(dict.fromkeys([*([latest] if latest else []), *manifests.tags_by_age(load_dir)]))
