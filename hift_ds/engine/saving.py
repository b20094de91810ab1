"""The engine's ``save_checkpoint``: who writes what, and that all ranks agree.

Begin with :mod:`hift_ds.engine.checkpointing`.
"""

from __future__ import annotations

import functools
import logging
import math
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hift_ds.checkpoint import manifest as manifests
from hift_ds.checkpoint.background_save import BackgroundSave
from hift_ds.checkpoint.files import second_name, write_errors
from hift_ds.checkpoint.json_state import encode, split_encodable
from hift_ds.checkpoint.random_state import random_state
from hift_ds.checkpoint.shared_folder import VISIBLE_AFTER_S, Staging
from hift_ds.checkpoint.state_files import class_name, extras_by_group, options_of, scalars_by_parameter
from hift_ds.checkpoint.write_plan import Snapshot, saved_tensors
from hift_ds.checkpoint.writer import WEIGHTS_FILE, CheckpointWriter
from hift_ds.errors import CheckpointError
from hift_ds.layers.arch import whole_shape
from hift_ds.ranks import gather, on_all_ranks
from hift_ds.version import __version__

logger = logging.getLogger(__name__)

SLOWEST_RANK_S = 3600.0  # an asynchronous save waits so long for the files of a rank that is behind


class Saving:
    """The part of :class:`HiFTEngine` that saves."""

    weights_beside = False
    """The weights of a checkpoint get a second name, in its parent folder, where ``from_pretrained`` looks for them. For a
    caller who knows that they have the names and the form that it reads."""
    last_checkpoint: Path | None = None  # the last folder that this run has saved or loaded whole
    _background: BackgroundSave | None = None
    _checkpoint_s = 0.0  # that training waited for checkpoints since the last report

    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: str | None = None,
        client_state: Mapping[str, Any] = {},  # noqa: B006  (DeepSpeed's signature; never changed)
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """As DeepSpeed's: every rank calls it, ``<save_dir>/<tag>`` appears, ``<save_dir>/latest`` names it.

        Nothing has its final name before all of it is on disk: whatever happens, the previous checkpoint is
        whole. With ``"hift": {"checkpoint": {"asynchronous": true}}`` it returns when training may go on; the
        names appear within a cycle, or at the next save, :meth:`wait_for_checkpoint`, ``destroy`` or the end
        of the program.

        Args:
            tag: ``global_step<N>`` by default. The same on all ranks.
            client_state: of the caller's; given back by ``load_checkpoint``. JSON values (tuples, infinities
                and 0-dim tensors too) or what ``torch.load(weights_only=True)`` reads. The first rank's is
                kept.
            exclude_frozen_parameters: leave out the weights that the user froze. (Inactive groups are not
                frozen.)

        Returns:
            True; False after an error that ``"checkpoint": {"on_error": "continue"}`` only reports.

        Raises:
            CheckpointError: on all ranks, naming the rank and the reason; nothing of the new checkpoint
                stays.
        """
        self._refuse_if_ended()
        if not save_dir:
            raise ValueError(f"save_dir must be a non-empty string, got {save_dir!r}")
        self.optimizer.check_whole()
        if self.optimizer.is_mid_step:
            raise CheckpointError(
                "save_checkpoint between backward() and step(): call it after engine.step()"
            )
        good = self.wait_for_checkpoint()
        started = time.perf_counter()
        try:
            tag = str(tag or f"global_step{self.global_steps}")
            self._save(Path(save_dir), tag, client_state, save_latest, exclude_frozen_parameters)
        except CheckpointError as error:
            self._report_failure(error)
            good = False
        self._checkpoint_s += time.perf_counter() - started
        return good

    def wait_for_checkpoint(self) -> bool:
        """Until the asynchronous save under way, if any, is whole on disk. All ranks call this together.

        Returns:
            False after an error that ``"on_error": "continue"`` only reports.

        Raises:
            CheckpointError: it failed on some rank.
        """
        if self._background is None:
            return True
        background, self._background = self._background, None
        started = time.perf_counter()
        try:
            on_all_ranks(
                background.finish_files, CheckpointError
            )  # a rank that has died is noticed here, and not waited for
            self.last_checkpoint = on_all_ranks(background.finish, CheckpointError)
        except CheckpointError as error:
            self._report_failure(error)
            return False
        finally:
            background.forget()
            self._checkpoint_s += time.perf_counter() - started
        return True

    def checkpoint_bytes(self) -> int:
        """Of a checkpoint's tensors over all ranks, once every group has its states. All ranks call this together."""
        weights = sum(
            t.element_size() * math.prod(whole_shape(t)) for t in saved_tensors(self.module).values()
        )
        return weights + sum(gather(self.optimizer.states.num_bytes()))

    def _report_failure(self, error: CheckpointError) -> None:
        if self.hift.checkpoint.on_error == "raise":
            raise error
        if self.global_rank == 0:
            logger.error("checkpoint not saved, training goes on: %s", error)

    def _copy_before_step(self) -> None:
        """What the coming step changes, for the asynchronous save under way."""
        if self._background is not None and self.is_gradient_accumulation_boundary():
            started = time.perf_counter()
            self._background.before_step({group.index for group in self.optimizer.active_groups})
            self._checkpoint_s += time.perf_counter() - started

    def take_checkpoint_s(self) -> float:
        """Seconds that training waited for checkpoints since this was last asked."""
        taken, self._checkpoint_s = self._checkpoint_s, 0.0
        return taken

    # -- one save ----------------------------------------------------------------------------------

    def _save(
        self, save_dir: Path, tag: str, client_state: Mapping[str, Any], save_latest: bool, exclude: bool
    ) -> None:
        """1. agree on a folder; 2. capture what is small; 3. write; 4. publish: now or in the background."""
        staging = self._stage(save_dir, tag)
        steps, node_local = self.global_steps, self.use_node_local_storage()

        beside = self.weights_beside

        def publish(timeout_s: float, given_up: Callable[[], bool] = lambda: False) -> None:
            if staging.leads:
                with write_errors(save_dir):
                    staging.publish(steps, save_latest, node_local, timeout_s, given_up)
                    if beside:
                        second_name(staging.final / WEIGHTS_FILE, save_dir / WEIGHTS_FILE)
                logger.info("saved %s (%.2f GiB by this rank)", staging.final, writer.num_bytes / 2**30)

        try:
            writer = on_all_ranks(lambda: self._open_writer(staging, client_state, exclude), CheckpointError)
            if self.hift.checkpoint.asynchronous:
                collective = self.zero_optimization_partition_weights()
                self._background = BackgroundSave(
                    writer, functools.partial(publish, SLOWEST_RANK_S), collective
                )
                return
            on_all_ranks(writer.write_all, CheckpointError)
            on_all_ranks(lambda: publish(VISIBLE_AFTER_S), CheckpointError)
            self.last_checkpoint = staging.final
        except CheckpointError:
            if staging.leads:
                staging.discard()
            raise

    def _stage(self, save_dir: Path, tag: str) -> Staging:
        """Agree on a temporary folder and on who leads."""
        asked = gather((tag, uuid.uuid4().hex[:12]))
        tags = {other for other, _ in asked}
        if len(tags) > 1:
            raise CheckpointError(f"save_checkpoint: tag must be the same on all ranks, got {sorted(tags)}")
        if reason := manifests.why_no_tag(tag):
            raise CheckpointError(f"save_checkpoint: tag {tag[:80]!r} is {reason}")
        staging = Staging(save_dir, tag, token=asked[0][1], rank=self.global_rank)
        may_lead = self.global_rank == 0 or (self.use_node_local_storage() and self.local_rank == 0)

        def create() -> None:
            with write_errors(save_dir):
                if may_lead:
                    if (save_dir / manifests.LATEST).is_dir():
                        raise CheckpointError(
                            f"{save_dir / manifests.LATEST} is a folder, where a file names the newest checkpoint; move it"
                        )
                    staging.create()

        on_all_ranks(create, CheckpointError)
        try:
            staging.join(gather(on_all_ranks(staging.find_leader, CheckpointError)))
        except CheckpointError:
            if may_lead:
                staging.discard()
            raise
        if staging.leads:
            staging.remove_leftovers()
        return staging

    def _open_writer(
        self, staging: Staging, client_state: Mapping[str, Any], exclude_frozen: bool
    ) -> CheckpointWriter:
        """Everything small is captured here; the tensors are read when they are written or copied."""
        tensors = saved_tensors(self.module)
        excluded: list[str] = []
        if exclude_frozen:
            trained = self.optimizer.coverage()
            excluded = [
                name for name, t in tensors.items() if isinstance(t, nn.Parameter) and name not in trained
            ]
            tensors = {name: tensor for name, tensor in tensors.items() if name not in excluded}
        snapshot = Snapshot(self.optimizer, tensors, staging.leads, self.optimizer.parameters.whole_weight)
        encoded, rest = split_encodable(client_state)
        common = {**self._common_state(tensors), "excluded": excluded, "client_state": encoded}
        own = {"scalars": scalars_by_parameter(self.optimizer.states), "random": random_state(self.device)}
        writer = CheckpointWriter(staging, snapshot, common, own, rest)
        writer.open(self._pending_gradients())
        return writer

    def _common_state(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        optimizer, coverage = self.optimizer, self.optimizer.coverage()
        scheduler = None if self.lr_scheduler is None else _encode_scheduler(self.lr_scheduler.state_dict())
        return {
            "format": manifests.FORMAT,
            "hift_ds": __version__,
            "hift": self.hift.model_dump(mode="json"),
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
                    "shape": list(whole_shape(tensor)),
                    "dtype": str(tensor.dtype).removeprefix("torch."),
                    "trained": name in coverage,
                    "updates": coverage.get(name, 0),
                }
                for name, tensor in tensors.items()
            },
            "groups": [
                {"index": g.index, "name": g.name, "parameters": list(g.param_names)} for g in self.groups
            ],
            "always_active": list(self.partition.always.param_names) if self.partition.always else [],
            "schedule": self.schedule.state_dict(),
            "learning_rate": encode(optimizer.lr.state_dict()),
            "scheduler": scheduler,
            "loss_scaler": encode(optimizer.scaler.state_dict()),
            "optimizer": {
                "class": class_name(optimizer.optimizer),
                "param_groups": [encode(options_of(group)) for group in optimizer.param_groups],
                "extras": extras_by_group(optimizer.states),
                "last_norms": {str(index): norm for index, norm in optimizer.last_norms.items()},
            },
        }

    def _pending_gradients(self) -> dict[str, Tensor]:
        """Of a run saved between two micro-batches of one step."""
        pending = {}
        for group in self.optimizer.active_groups:
            for member in group.members:
                grad = self.optimizer.pending(member.param)
                if grad is not None:
                    pending[member.name] = grad
        return pending


def _encode_scheduler(state: Mapping[str, Any]) -> Any:
    try:
        return encode(dict(state))
    except TypeError as error:
        raise CheckpointError(f"the learning-rate scheduler's state cannot be saved: {error}") from None
