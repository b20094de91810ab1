"""``save_checkpoint`` and ``load_checkpoint``: DeepSpeed's calls and folder habits, our own files.

docs/checkpoints.md describes the format and the promises. Reading order: this file (who does what, and that all
ranks agree), ``engine/saving.py`` and ``engine/loading.py`` (what a save and a load consist of),
``checkpoint/write_plan.py`` (what is written), ``checkpoint/state_files.py`` (states by parameter name),
``checkpoint/shared_folder.py`` and ``checkpoint/manifest.py`` (whole or not there).
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hift_ds.checkpoint import manifest as manifests
from hift_ds.checkpoint.background_save import BackgroundSave
from hift_ds.checkpoint.files import write_errors
from hift_ds.checkpoint.saved_checkpoint import SavedCheckpoint
from hift_ds.checkpoint.shared_folder import VISIBLE_AFTER_S
from hift_ds.checkpoint.write_plan import saved_tensors
from hift_ds.engine.deepspeed_seam import SeamEngine
from hift_ds.engine.loading import check_fits, choose_checkpoint, load_progress, load_weights, say
from hift_ds.engine.saving import agree_on_folder, open_writer
from hift_ds.errors import CheckpointError
from hift_ds.layers.arch import whole_shape
from hift_ds.optim.fill_states import load_states
from hift_ds.ranks import gather, on_all_ranks

logger = logging.getLogger(__name__)

SLOWEST_RANK_S = 3600.0  # an asynchronous save waits so long for the files of a rank that is behind


class Checkpointer:
    """Saves and resumes one engine's training. Every method but ``before_step`` and ``take_waited_s`` is called by all
    ranks together.

    Attributes:
        last: the last folder that this run has saved or loaded whole.
        restores_generators: ``load`` also sets the global random generators, to where they were when the checkpoint was
            saved. A loop that draws before it goes on (the Trainer, an epoch's order) does so itself.
        before_load: called with the folder that ``load`` is given, on every rank, before anything is read. For callers
            who go on with files of their own beside it.
        on_whole: called with a checkpoint's folder as soon as it is whole, by the process that has given it its name;
            of an asynchronous save in the thread that writes. For callers who have files of their own beside it.
    """

    def __init__(self, engine: SeamEngine) -> None:
        self._engine = engine
        self.last: Path | None = None
        self.restores_generators = True
        self.before_load: Callable[[Path], None] | None = None
        self.on_whole: Callable[[Path], None] | None = None
        self._background: BackgroundSave | None = None
        self._waited_s = 0.0

    # -- save -------------------------------------------------------------------------------------------------

    def save(
        self,
        save_dir: str | Path,
        tag: str | None = None,
        client_state: Mapping[str, Any] = {},  # noqa: B006  (DeepSpeed's signature; never changed)
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Save a checkpoint as DeepSpeed's call does: every rank calls it, ``<save_dir>/<tag>`` appears,
        ``<save_dir>/latest`` names it.

        Nothing has its final name before all of it is on disk: whatever happens, the previous checkpoint is
        whole. With ``"hift": {"checkpoint": {"asynchronous": true}}`` it returns when training may go on; the
        names appear within a cycle, or at the next save, :meth:`wait`, ``destroy`` or the end
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
        engine = self._engine
        if not save_dir:
            raise ValueError(f"save_dir must be a non-empty string, got {save_dir!r}")
        engine.optimizer.check_whole()
        if engine.optimizer.is_mid_step:
            raise CheckpointError("save_checkpoint between backward() and step(): call it after engine.step()")
        engine.optimizer.waits.skip()
        good = self.wait()
        started = time.perf_counter()
        try:
            tag = str(tag or f"global_step{engine.global_steps}")
            self._save(Path(save_dir), tag, client_state, save_latest, exclude_frozen_parameters)
        except CheckpointError as error:
            self._report_failure(error)
            good = False
        self._waited_s += time.perf_counter() - started
        return good

    def _save(
        self, save_dir: Path, tag: str, client_state: Mapping[str, Any], save_latest: bool, exclude: bool
    ) -> None:
        """1. agree on a folder; 2. capture what is small; 3. write; 4. publish: now or in the background."""
        engine, on_whole = self._engine, self.on_whole
        shared_folder = agree_on_folder(engine, save_dir, tag)
        steps, node_local = engine.global_steps, engine.use_node_local_storage()

        def publish(timeout_s: float, given_up: Callable[[], bool] = lambda: False) -> None:
            if shared_folder.leads:
                with write_errors(save_dir):
                    shared_folder.publish(steps, save_latest, node_local, timeout_s, given_up)
                    if on_whole is not None:
                        on_whole(shared_folder.final)
                logger.info("saved %s (%.2f GiB by this rank)", shared_folder.final, writer.num_bytes / 2**30)

        try:
            writer = on_all_ranks(lambda: open_writer(engine, shared_folder, client_state, exclude), CheckpointError)
            if engine.hift.checkpoint.asynchronous:
                collective = engine.zero_optimization_partition_weights()
                publish_late = functools.partial(publish, SLOWEST_RANK_S)
                self._background = BackgroundSave(writer, publish_late, collective)
                return
            on_all_ranks(writer.write_all, CheckpointError)
            on_all_ranks(lambda: publish(VISIBLE_AFTER_S), CheckpointError)
            self.last = shared_folder.final
        except CheckpointError:
            if shared_folder.leads:
                shared_folder.discard()
            raise

    def before_step(self) -> None:
        """Copy what the coming step changes, for the asynchronous save under way."""
        if self._background is not None:
            started = time.perf_counter()
            self._background.before_step({group.index for group in self._engine.optimizer.active_groups})
            self._waited_s += time.perf_counter() - started

    def wait(self) -> bool:
        """Wait until the asynchronous save under way, if any, is whole on disk. All ranks call this together.

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
            # A rank that has died is noticed here, and not waited for.
            on_all_ranks(background.finish_files, CheckpointError)
            self.last = on_all_ranks(background.finish, CheckpointError)
        except CheckpointError as error:
            # Every rank's files have ended now. A leader that failed first cleared up while others still wrote.
            background.discard()
            self._report_failure(error)
            return False
        finally:
            background.forget()
            self._waited_s += time.perf_counter() - started
        return True

    @property
    def is_saving(self) -> bool:
        """True while an asynchronous save is under way, which still reads states."""
        return self._background is not None

    def take_waited_s(self) -> float:
        """Seconds that training waited for checkpoints since this was last asked."""
        taken, self._waited_s = self._waited_s, 0.0
        return taken

    def num_bytes(self) -> int:
        """Bytes of a checkpoint's tensors over all ranks, once every group has its states."""
        tensors = saved_tensors(self._engine.module).values()
        weights = sum(tensor.element_size() * math.prod(whole_shape(tensor)) for tensor in tensors)
        return weights + sum(gather(self._engine.optimizer.states.num_bytes()))

    def _report_failure(self, error: CheckpointError) -> None:
        if self._engine.hift.checkpoint.on_error == "raise":
            raise error
        if self._engine.global_rank == 0:
            logger.error("checkpoint not saved, training goes on: %s", error)

    # -- load -------------------------------------------------------------------------------------------------

    def load(
        self,
        load_dir: str | Path,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Callable[..., None] | None = None,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Load a checkpoint as DeepSpeed's call does, on any number of ranks, whatever the number that saved.

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
        engine, load_dir = self._engine, Path(load_dir)
        self.wait()
        if self.before_load is not None:
            self.before_load(load_dir)
        folder = choose_checkpoint(engine, load_dir, tag)
        if folder is None and (load_dir / manifests.MANIFEST).exists():
            parent, name = load_dir.parent, load_dir.name
            raise CheckpointError(
                f'{load_dir} is itself a checkpoint: load_checkpoint("{parent}", tag="{name}") loads it'
            )
        if folder is None:
            say(engine, f"none in {load_dir} (no 'latest' file, no complete folder); nothing was loaded")
            return None, None
        saved = SavedCheckpoint(folder)
        with_states = load_optimizer_states and not load_module_only
        check_fits(engine, saved, load_module_strict, with_states)
        client_state = saved.client_state()
        engine.optimizer.drop_gradients()
        engine.auto_groups.settle_by_checkpoint(saved.common.get("auto_group_size"))
        split, share = engine.optimizer.states.split, saved.common.get("host_share")
        if with_states and split is not None and not split.given and share not in (None, split.share):
            say(engine, f"step_on split: the host updates {share:.0%} of the parameters, as the checkpoint has it")
            engine.optimizer.states.move(share)
        load_weights(engine, saved, custom_load_fn)
        load_states(engine.optimizer.states, saved.states, with_states=with_states)
        if not load_module_only:
            load_progress(engine, saved, with_states, load_lr_scheduler_states, self.restores_generators)
        engine.optimizer.states.prefetch(engine.optimizer.groups[engine.optimizer.schedule.active])
        self.last = folder
        return str(folder), client_state
