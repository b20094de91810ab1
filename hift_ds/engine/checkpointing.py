"""``save_checkpoint`` and ``load_checkpoint`` with DeepSpeed's calls and folder habits, and our own files in the folder.

docs/checkpoints.md describes the format and the promises. Reading order: here (who does what, and that all ranks
agree), ``checkpoint/snapshot.py`` (what is written), ``checkpoint/training_state.py`` (states by parameter name),
``checkpoint/staging.py`` and ``manifest.py`` (whole or not there).
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hift_ds.checkpoint import manifest as manifests
from hift_ds.checkpoint.durable_files import write_errors
from hift_ds.checkpoint.json_state import decode, encode, split_encodable
from hift_ds.checkpoint.random_state import random_state, set_random_state
from hift_ds.checkpoint.saved_checkpoint import (
    SavedCheckpoint,
    check_same_model,
    check_same_optimizer,
    grouping_differences,
    groups_now,
    option_differences,
)
from hift_ds.checkpoint.snapshot import Snapshot, saved_tensors, shape_of
from hift_ds.checkpoint.staging import VISIBLE_AFTER_S, Staging
from hift_ds.checkpoint.training_state import (
    extras_by_unit,
    restore_coverage,
    restore_extras,
    restore_states,
    scalars_by_parameter,
)
from hift_ds.checkpoint.writer import CheckpointWriter
from hift_ds.errors import CheckpointError
from hift_ds.schedule import Cursor
from hift_ds.version import __version__

logger = logging.getLogger(__name__)

# Which kernel runs, not what it computes: the run's own choice, since another device may resume.
_KERNEL_OPTIONS = ("params", "fused", "foreach", "capturable", "differentiable")


class Checkpointing:
    """What :class:`HiFTEngine` inherits to save and resume."""

    # -- save -------------------------------------------------------------------------------------------------

    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: str | None = None,
        client_state: Mapping[str, Any] = {},  # noqa: B006  (DeepSpeed's signature; never changed)
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """As DeepSpeed's: every rank calls it, ``<save_dir>/<tag>`` appears, ``<save_dir>/latest`` names it.

        Nothing has its final name before all of it is on disk: whatever happens, the previous checkpoint is whole.

        Args:
            tag: ``global_step<N>`` by default. The same on all ranks.
            client_state: of the caller's; given back by :meth:`load_checkpoint`. JSON values (tuples, infinities and
                0-dim tensors too) or what ``torch.load(weights_only=True)`` reads. The first rank's is kept.
            exclude_frozen_parameters: leave out the weights that the user froze. (Inactive groups are not frozen.)

        Raises:
            CheckpointError: on all ranks, naming the rank and the reason; nothing of the new checkpoint stays.
        """
        if not save_dir:
            raise ValueError(f"save_dir must be a non-empty string, got {save_dir!r}")
        self._check_between_steps()
        started = time.perf_counter()
        staging = self._stage(Path(save_dir), f"global_step{self.global_steps}" if tag is None else str(tag))
        try:
            writer = self._on_all_ranks(lambda: self._writer(staging, client_state, exclude_frozen_parameters))
            self._on_all_ranks(lambda: self._write_all(writer))
            self._on_all_ranks(lambda: self._publish(staging, save_latest))
        except CheckpointError:
            if staging.leads:
                staging.discard()
            raise
        if self.global_rank == 0:
            seconds = time.perf_counter() - started
            logger.info("saved %s (%.2f GiB by this rank, %.1f s)", staging.final, writer.num_bytes / 2**30, seconds)
        return True

    def _check_between_steps(self) -> None:
        if self.optimizer._reduced:
            raise CheckpointError("save_checkpoint between backward() and step(): call it after engine.step()")

    def _stage(self, save_dir: Path, tag: str) -> Staging:
        """Agree on a temporary folder and on who leads."""
        asked = self._gather((tag, uuid.uuid4().hex[:12]))
        tags = {other for other, _ in asked}
        if len(tags) > 1:
            raise CheckpointError(f"save_checkpoint: tag must be the same on all ranks, got {sorted(tags)}")
        if not tag or "/" in tag or tag.startswith("."):
            raise CheckpointError(f"save_checkpoint: tag {tag!r} is not a folder name")
        staging = Staging(save_dir, tag, token=asked[0][1], rank=self.global_rank)
        may_lead = self.global_rank == 0 or (self.use_node_local_storage() and self.local_rank == 0)

        def create() -> None:
            with write_errors(save_dir):
                if may_lead:
                    staging.create()

        self._on_all_ranks(create)
        try:
            staging.join(self._gather(self._on_all_ranks(staging.find_leader)))
        except CheckpointError:
            if may_lead:
                staging.discard()
            raise
        if staging.leads:
            staging.remove_leftovers()
        return staging

    def _writer(self, staging: Staging, client_state: Mapping[str, Any], exclude_frozen: bool) -> CheckpointWriter:
        """Everything small is captured here; the tensors are read when they are written."""
        tensors = saved_tensors(self.module)
        excluded: list[str] = []
        if exclude_frozen:
            trained = self.optimizer.coverage()
            excluded = [name for name, t in tensors.items() if isinstance(t, nn.Parameter) and name not in trained]
            tensors = {name: tensor for name, tensor in tensors.items() if name not in excluded}
        snapshot = Snapshot(self.optimizer, tensors, staging.leads, self.optimizer.parameters.whole_weight)
        encoded, rest = split_encodable(client_state)
        common = {**self._common_state(tensors), "excluded": excluded, "client_state": encoded}
        own = {"scalars": scalars_by_parameter(self.optimizer), "random": random_state(self.device)}
        writer = CheckpointWriter(staging, snapshot, common, own, rest)
        try:
            writer.open(self._pending_gradients())
            return writer
        except BaseException:
            writer.discard()
            raise

    def _write_all(self, writer: CheckpointWriter) -> None:
        try:
            writer.add(writer.snapshot.fixed())
            for unit in writer.snapshot.units:
                writer.add(writer.snapshot.of_unit(unit))
            writer.close()
        except BaseException:
            writer.discard()
            raise

    def _publish(self, staging: Staging, save_latest: bool) -> None:
        if staging.leads:
            with write_errors(staging.save_dir):
                staging.publish(self.global_steps, save_latest, self.use_node_local_storage(), VISIBLE_AFTER_S)

    def _common_state(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        optimizer, coverage = self.optimizer, self.optimizer.coverage()
        scheduler = None if self.lr_scheduler is None else _encode_scheduler(self.lr_scheduler.state_dict())
        return {
            "format": manifests.FORMAT,
            "hift_ds": __version__,
            "world_size": self.world_size,
            "global_steps": self.global_steps,
            "global_samples": self.global_samples,
            "micro_steps": self.micro_steps,
            "gradient_accumulation_steps": self.gradient_accumulation_steps(),
            "skipped_steps": self.skipped_steps,
            "applied_steps": optimizer.num_applied,
            "precision": optimizer.precision.name,
            "tensors": {
                name: {
                    "shape": list(shape_of(tensor)),
                    "dtype": str(tensor.dtype).removeprefix("torch."),
                    "trained": name in coverage,
                    "updates": coverage.get(name, 0),
                }
                for name, tensor in tensors.items()
            },
            "groups": [{"index": g.index, "name": g.name, "parameters": list(g.param_names)} for g in self.groups],
            "always_active": list(self.partition.always.param_names) if self.partition.always else [],
            "schedule": self.schedule.state_dict(),
            "learning_rate": encode(optimizer.lr.state_dict()),
            "scheduler": scheduler,
            "loss_scaler": encode(optimizer.scaler.state_dict()),
            "optimizer": {
                "class": _class_name(optimizer.optimizer),
                "param_groups": [encode(_options(group)) for group in optimizer.param_groups],
                "extras": extras_by_unit(optimizer),
            },
        }

    def _pending_gradients(self) -> dict[str, Tensor]:
        """Of a run saved between two micro-batches of one step."""
        pending = {}
        for unit in self.optimizer.active_units:
            for member in unit.members:
                grad = self.optimizer.parameters.pending(member.param)
                if grad is not None:
                    pending[member.name] = grad
        return pending

    # -- load -------------------------------------------------------------------------------------------------

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

        Every file is compared with its checksum before anything is changed. Without ``tag`` a damaged newest checkpoint
        is reported and the newest whole one is loaded instead.

        Args:
            load_module_strict: the names of weights must agree with the model's.
            load_module_only: only the weights (and, for 16-bit ones, their fp32 masters).
            custom_load_fn: ``fn(src=weights by name, dst=module)`` instead of copying by name.

        Returns:
            (folder, client_state), or (None, None) if there is no checkpoint at all.

        Raises:
            CheckpointError: a damaged checkpoint asked for by tag, no whole one, one of another model or optimizer, or one
                of a newer version. The run is as it was.
        """
        folder = self._choose_checkpoint(Path(load_dir), tag)
        if folder is None:
            logger.warning("no checkpoint in %s (no 'latest' file, no complete folder); nothing was loaded", load_dir)
            return None, None
        saved = SavedCheckpoint(folder)
        with_states = load_optimizer_states and not load_module_only
        check_same_model(saved, {n: shape_of(t) for n, t in saved_tensors(self.module).items()}, load_module_strict)
        if with_states:
            check_same_optimizer(saved, _class_name(self.optimizer.optimizer))
        self.optimizer._reduced.clear()
        self.optimizer.zero_grad()
        self._load_weights(saved, custom_load_fn)
        restore_states(self.optimizer, saved.states, load_states=with_states)
        if not load_module_only:
            self._load_progress(saved, with_states, load_lr_scheduler_states)
        self.optimizer.activate()
        self.optimizer.store.prefetch(self.optimizer.units[self.schedule.active].chunks[0].id)
        return str(folder), saved.client_state()

    def _choose_checkpoint(self, load_dir: Path, tag: str | None) -> Path | None:
        """The checkpoint to load, verified. All ranks choose the same."""
        latest = manifests.latest_tag(load_dir)
        tags = [tag] if tag is not None else list(dict.fromkeys([latest, *manifests.tags_by_age(load_dir)]))
        seen = self._gather([t for t in tags if t])
        tags = [t for t in seen[0] if all(t in other for other in seen)]
        damage: list[str] = []
        for candidate in tags:
            reason = self._verify(load_dir / candidate)
            if reason is None:
                if damage and self.global_rank == 0:
                    logger.warning("%s; resuming from %s instead", "; ".join(damage), load_dir / candidate)
                return load_dir / candidate
            damage.append(reason)
        if damage:
            raise CheckpointError("; ".join(damage) + ("" if tag is not None else f"; no whole checkpoint in {load_dir}"))
        return None

    def _verify(self, folder: Path) -> str | None:
        """What is damaged, as any rank found it; each verifies its share of the files."""

        def check() -> None:
            if any(folder.glob("mp_rank_*_model_states.pt")):
                raise CheckpointError(f'{folder} was saved by DeepSpeed without a "hift" block: only such an engine loads it')
            manifest = manifests.read_manifest(folder)
            if not manifest.node_local:
                names = manifests.share_of_files(manifest, self.global_rank, self.world_size)
            else:
                names = list(manifest.files) if self.local_rank == 0 else []
            manifests.verify_files(folder, manifest, names)

        try:
            self._on_all_ranks(check)
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
        restore_coverage(optimizer, {name: entry["updates"] for name, entry in common["tensors"].items()})
        optimizer.scaler.load_state_dict(decode(common["loss_scaler"]))
        if with_states:
            self._load_options(common["optimizer"]["param_groups"], with_scheduler)
            restore_extras(optimizer, common["optimizer"]["extras"], groups_now(saved, self.groups))
        if with_scheduler:
            optimizer.lr.load_state_dict(decode(common["learning_rate"]))
            if self.lr_scheduler is not None and common["scheduler"] is not None:
                self.lr_scheduler.load_state_dict(decode(common["scheduler"]))
        self._load_cursor(saved)
        self._load_pending_gradients(saved)
        own = saved.of_rank(self.global_rank)
        if own is not None:
            set_random_state(own["random"], self.device)

    def _load_options(self, saved_groups: list, with_scheduler: bool) -> None:
        """What the saved run's optimizer computed with, as torch's ``load_state_dict`` does it."""
        now = [_options(group) for group in self.optimizer.param_groups]
        then = [decode(options) for options in saved_groups]
        if len(then) != len(now):
            self._say(f"param_groups: {len(then)} -> {len(now)}; their options are the run's, not the checkpoint's")
            return
        if differences := option_differences(then, now):
            self._say(f"{'; '.join(differences)}: going on with the checkpoint's values")
        for group, options in zip(self.optimizer.param_groups, then, strict=True):
            group.update({key: value for key, value in options.items() if with_scheduler or key not in ("lr", "initial_lr")})

    def _load_cursor(self, saved: SavedCheckpoint) -> None:
        schedule = self.schedule
        differences = grouping_differences(saved, self.groups, schedule.differences(saved.common["schedule"]))
        schedule.load_state_dict(saved.common["schedule"])
        if differences:
            schedule.cursor = Cursor(schedule.cursor.cycle)
            self._say(
                f"{'; '.join(differences)}: masters and states go with their parameters, the schedule starts cycle "
                f"{schedule.cursor.cycle} from its first group"
            )

    def _load_pending_gradients(self, saved: SavedCheckpoint) -> None:
        common, steps = saved.common, self.gradient_accumulation_steps()
        self.micro_steps = common["micro_steps"]
        gradients = saved.gradients(self.global_rank, self.world_size)
        active = {m.name: m.param for unit in self._units_about_to_train() for m in unit.members}
        if common["gradient_accumulation_steps"] == steps and gradients.keys() <= active.keys():
            for name, grad in gradients.items():
                self.optimizer.parameters.set_pending(active[name], grad)
            return
        self.micro_steps = self.global_steps * steps
        if gradients:
            self._say("saved in the middle of an accumulation that this run does not have: that step starts over")

    def _units_about_to_train(self) -> list:
        self.optimizer.activate()
        return self.optimizer.active_units

    # -- ranks ------------------------------------------------------------------------------------------------

    def _gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def _on_all_ranks(self, action: Callable[[], Any]) -> Any:
        """This rank's result, once all have one. If any fails all raise, so that none waits for another in vain."""
        result = failure = None
        try:
            result = action()
        except CheckpointError as error:
            failure = error
        except Exception as error:  # ours or the system's: other ranks must still learn of it
            logger.exception("checkpoint")
            failure = CheckpointError(f"{type(error).__name__}: {error}")
        failures = self._gather(failure)
        first = next((rank for rank, error in enumerate(failures) if error is not None), None)
        if first is not None:
            where = f"rank {first}: " if self.world_size > 1 else ""
            raise type(failures[first])(f"{where}{failures[first]}") from failure
        return result

    def _say(self, line: str) -> None:
        if self.global_rank == 0:
            logger.warning("checkpoint: %s", line)


def _options(param_group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in param_group.items() if key not in _KERNEL_OPTIONS}


def _class_name(optimizer: torch.optim.Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def _encode_scheduler(state: Mapping[str, Any]) -> Any:
    try:
        return encode(dict(state))
    except TypeError as error:
        raise CheckpointError(f"the learning-rate scheduler's state cannot be saved: {error}") from None
