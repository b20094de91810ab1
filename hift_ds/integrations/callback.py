"""``HiFTCallback``: any Trainer trains through our engine, by a callback alone.

    SFTTrainer(model, args=SFTConfig(deepspeed="bf16_host.json", ...), callbacks=[HiFTCallback()])

transformers calls ``on_init_end`` of its callbacks before accelerate builds an engine with ``deepspeed.initialize``,
and ``on_train_begin`` once it has. Between the two ``deepspeed.initialize`` is ours; afterwards nothing is. No trainer
class and no method of one is replaced.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from transformers.trainer_callback import CallbackHandler

from hift_ds.checkpoint.manifest import latest_tag
from hift_ds.checkpoint.trainer_folder import SEAL, seal_folder
from hift_ds.checkpoint.writer import WEIGHTS_FILE
from hift_ds.config import BLOCK
from hift_ds.engine.engine import HiFTEngine
from hift_ds.engine.initialize import hift_engines
from hift_ds.errors import ConfigError
from hift_ds.integrations.arguments import check_arguments, check_given
from hift_ds.integrations.before_saving import ready_to_save, saved_by_trainer
from hift_ds.integrations.disk_room import DiskRoomCallback
from hift_ds.integrations.events import EngineEvents, callers, disable_input_require_grads, loop_above
from hift_ds.integrations.going_on import checks_files
from hift_ds.integrations.loops import kept_from_accelerate
from hift_ds.integrations.weights_once import keep_once
from hift_ds.ranks import gather
from hift_ds.version import __version__

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainerControl, TrainerState, TrainingArguments

PREPARED_BY_ITSELF = (
    "it has its engine built in its own constructor, as TRL's PPOTrainer does; put `with hift_ds.accelerate(BLOCK):` "
    "around that and leave our callback or mixin out"
)
_waiting: weakref.WeakSet[HiFTCallback] = weakref.WeakSet()  # for their trainers' engines


class HiFTCallback(EngineEvents):
    """Give it to a Trainer whose DeepSpeed config (``TrainingArguments(deepspeed=...)``) has a ``"hift"`` block.

    The result is :class:`HiFTMixin`'s, bit for bit. Reference and reward models, which have no optimizer, get
    DeepSpeed's own engine. What only the mixin has: evaluation before training, several ``train()`` calls of one
    trainer, states given back when training ends in an exception (here: when the model is next called), optimizers that
    the trainer is given, numbers that only the loss reads unrounded, rotation that counts whole checkpoints only, a
    look at the rows of evaluation before the first step, and ``save_model`` without a copy of the model.

    Args:
        optional: do nothing for a Trainer whose config has no block, instead of raising an error.

    Attributes:
        engine: the engine of the training, or None before it begins. As :attr:`HiFTMixin.engine`.

    Raises:
        ConfigError: when the Trainer is made: no block, a bad one, or settings that contradict it; when a second
            ``train()`` of the same trainer begins.
    """

    def __init__(self, optional: bool = False) -> None:
        super().__init__(lambda: self.engine)
        self.engine: HiFTEngine | None = None
        self.optional = optional
        self.is_on = False
        self._entered = contextlib.ExitStack()
        self._was_told = False  # that the Trainer is there
        self._room = DiskRoomCallback(lambda: self.engine, twice_at_first=True)
        self._sealing = threading.Lock()  # between the Trainer's thread and that of an asynchronous save
        self._saving = contextlib.ExitStack()
        self._model: Callable[[], nn.Module | None] = lambda: None
        self._loop: FrameType | None = None

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        self._was_told = True
        if self.optional and not _has_block(args):
            return
        check_arguments(args)
        check_given(args, kwargs.get("optimizer"), kwargs.get("lr_scheduler"))
        if kwargs.get("optimizer") is not None or kwargs.get("lr_scheduler") is not None:
            raise ConfigError(
                "optimizers=: transformers drops both where DeepSpeed is configured; use HiFTTrainer or HiFTMixin, "
                "which keep them, or optim= and lr_scheduler_type="
            )
        self.is_on = True
        plugin = args.deepspeed_plugin
        zero = plugin.deepspeed_config["zero_optimization"]
        if zero["stage"] == 3:
            # Else transformers' save_model has no weights to write once training has ended.
            zero.setdefault("stage3_gather_16bit_weights_on_model_save", True)
        self._entered.enter_context(kept_from_accelerate(plugin.deepspeed_config))
        self._model = (lambda: None) if model is None else weakref.ref(model)
        _waiting.add(self)
        me = weakref.ref(self)

        def take(engine: HiFTEngine) -> None:
            callback = me()
            owners = [one for one in _waiting if any(module is one._model() for module in engine.module.modules())]
            if callback is not None and (callback in owners or not owners):  # model_init makes another model
                callback._took(engine)

        self._entered.enter_context(hift_engines(on_made=take))
        for borrowed in (self._entered, self._saving):
            weakref.finalize(self, borrowed.close)  # of a trainer that is thrown away
        if model is not None:
            disable_input_require_grads(model)
        self._goes_first()

    def _goes_first(self) -> None:
        """Put this first among the Trainer's callbacks, so that loggers get what ``on_log`` adds: the Trainer puts its
        own loggers first, and tells a callback nothing of the others."""
        frame = inspect.currentframe()
        while frame is not None:
            handler = frame.f_locals.get("self")
            if isinstance(handler, CallbackHandler) and self in handler.callbacks:
                handler.callbacks.remove(self)
                handler.callbacks.insert(0, self)
                return
            frame = frame.f_back

    def leave(self) -> None:
        """Undo ``on_init_end``."""
        _waiting.discard(self)
        self._entered.close()

    def _let_go(self) -> None:
        self.leave()
        self._saving.close()
        self._loop = None

    def _is_under_way(self) -> bool:
        """Whether the Trainer's loop, which tells nobody of an exception that ends it, still runs in some thread."""
        if self._loop is None or any(self._loop in callers(frame) for frame in sys._current_frames().values()):
            return True
        self._let_go()
        return False

    def _took(self, engine: HiFTEngine) -> None:
        engine.life.is_under_way = self._is_under_way
        engine.checkpointer.restores_generators = False  # the Trainer does, once it has drawn an epoch's order
        checks_files(engine)
        engine.checkpointer.on_whole = self._weights_once
        self.engine = engine

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._was_told and (not self.optional or _has_block(args)):
            raise ConfigError(
                f"HiFTCallback was not told when this trainer was made: give it to the constructor (callbacks=). If it "
                f"was: {PREPARED_BY_ITSELF}"
            )
        if not self.is_on:
            return
        if self.engine is not None and self.engine.has_ended:
            raise ConfigError(
                "HiFTCallback serves one train(): for another make a new trainer with a new callback, or a trainer "
                "class with HiFTMixin"
            )
        self._loop = loop_above(sys._getframe())
        try:
            super().on_train_begin(args, state, control, **kwargs)
            self._make_sure_of_saving(args, state, control, **kwargs)
        except BaseException:
            self._let_go()
            if self.engine is not None:
                self.engine.end_training(failed=True)
            raise
        if not args.auto_find_batch_size:  # which may have another engine built
            self.leave()

    def _make_sure_of_saving(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        collate = getattr(kwargs.get("train_dataloader"), "collate_fn", None)
        processing = saved_by_trainer(kwargs.get("processing_class"), collate)
        self._saving.close()  # of a batch that was too large
        self._saving.enter_context(ready_to_save(args, kwargs.get("model"), processing, saves_generation_config=True))
        self._room.on_train_begin(args, state, control, **kwargs)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if self.is_on:
            super().on_step_begin(*args, **kwargs)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if self.is_on:
            super().on_step_end(*args, **kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.is_on:
            super().on_log(args, state, control, logs, **kwargs)
        if self.is_on and logs is not None and "learning_rate" in logs:
            fields = self.fields()
            logs.update(fields)  # for the callbacks after this one
            if state.log_history:
                state.log_history[-1].update(fields)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self.is_on:
            return
        gather(None)  # each rank has written its random state
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if args.should_save and folder.is_dir():
            with self._sealing:
                under_way = self.engine.checkpointer.is_saving and latest_tag(folder) is None
                seal_folder(folder, but=(WEIGHTS_FILE,) if under_way else ())

    def _weights_once(self, checkpoint: Path) -> None:
        """The engine's checkpoint is whole; the Trainer has written its weights beside it before."""
        folder = checkpoint.parent
        with self._sealing:
            keep_once(folder)
            if (folder / SEAL).exists():
                seal_folder(folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._let_go()
        if not self.is_on or self.engine is None:
            return
        super().on_train_end(args, state, control, **kwargs)
        self.engine.end_training()
        if self.engine.zero_optimization_stage() != 3:  # partitioned weights are still gathered for evaluation
            self.engine.destroy()


def _has_block(args: TrainingArguments) -> bool:
    plugin = getattr(args, "deepspeed_plugin", None)
    return plugin is not None and BLOCK in plugin.deepspeed_config


class AnnouncedCallback(HiFTCallback):
    """The callback for a program that does not know of us: acts if there is a block, and says so.

    Attributes:
        num_on: Trainers of this process that train through our engine.
    """

    num_on = 0

    def __init__(self) -> None:
        super().__init__(optional=True)

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_init_end(args, state, control, **kwargs)
        AnnouncedCallback.num_on += self.is_on

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.is_on and state.is_world_process_zero:
            groups = self.engine.groups
            print(
                f"hift_ds {__version__}: HiFT is on, {len(groups)} layer groups, one trained per optimizer step",
                file=sys.stderr,
            )
