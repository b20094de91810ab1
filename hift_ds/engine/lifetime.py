"""From an engine's first hook on a model to the moment when the model is its owner's again."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from hift_ds.engine.checkpointer import Checkpointer
from hift_ds.engine.deepspeed_seam import HiFTOptimizer, SeamEngine, finish_device_work
from hift_ds.engine.memory_forecast import MemoryForecast
from hift_ds.engine.shared_buffers import SharedBuffers
from hift_ds.errors import HiFTError
from hift_ds.optim.trainable_flags import containers_of
from hift_ds.store.page_locked import return_page_locked

_engine_of: weakref.WeakKeyDictionary[nn.Module, weakref.ref[SeamEngine]] = weakref.WeakKeyDictionary()


class Lifetime:
    """Whether one engine still trains, and what it gives back when it does not.

    Attributes:
        has_ended: training is over, and its states are gone.
        is_over: the engine has let go of the model altogether.
        is_under_way: asked when the model is called: does whoever began the training still run? (A loop that an
            exception left tells nobody.)
        hooks: on the model while it is trained.
    """

    def __init__(self, engine: SeamEngine, checkpointer: Checkpointer, memory: MemoryForecast) -> None:
        self._engine, self._checkpointer, self._memory = engine, checkpointer, memory
        self.has_ended = self.is_over = False
        self.is_under_way: Callable[[], bool] = lambda: True
        self.hooks: list[RemovableHandle] = []

    @contextlib.contextmanager
    def begins(self) -> Iterator[None]:
        """Inside this block the engine is made, the only one of its model. If that fails nothing of it stays."""
        try:
            yield
        except BaseException:
            self.let_go()
            self._engine.remove_deepspeed_hooks()
            raise
        _engine_of[self._engine.module] = weakref.ref(self._engine)

    def refuse_if_ended(self) -> None:
        """Call this before anything that needs the states.

        Raises:
            HiFTError: they are gone.
        """
        if self.has_ended:
            raise HiFTError("this engine's training has ended and its states are gone: make a new engine to go on")

    def was_left(self) -> bool:
        """Whether the training is over without a word; then the engine lets go of the model, here and now: in a hook
        before a forward of the model."""
        if self.has_ended or self.is_under_way():
            return self.has_ended
        # torch is about to call the other hooks of this forward, and looks up how: a removed one is called once more.
        in_use = self._engine.module._forward_pre_hooks_with_kwargs
        with_kwargs = dict(in_use)
        self._engine.end_training(failed=True)
        if self._engine.zero_optimization_stage() != 3:  # whose hooks bring the weights
            self._engine.destroy()
        in_use.update(with_kwargs)
        return True

    def watch_entrances(
        self, optimizer: HiFTOptimizer, settle: Callable[[tuple[Any, ...], Mapping[str, Any]], None]
    ) -> None:
        """Tell ``optimizer`` of each forward, wherever it enters: at the model, or at what lies between the model and
        its groups (TRL calls the backbone, say, and not the engine). The first of a step brings the buffers too.

        Args:
            settle: called with the forward's arguments, before the active groups get their flags.
        """
        model = self._engine.module
        buffers = SharedBuffers(model, self._engine.device)
        entrances: weakref.WeakSet[nn.Module] = weakref.WeakSet()

        def enter(module: nn.Module, inputs: tuple[Any, ...], named_inputs: dict[str, Any]) -> None:
            if module not in entrances or self.was_left():  # a deep copy (an average of weights) has the hooks too
                return
            settle(inputs, named_inputs)
            buffers.before_forward(self._engine.global_steps)
            optimizer.enter()

        groups = ([member.param for member in group.members] for group in optimizer.groups.values())
        for module in (model, *containers_of(model, groups)):
            entrances.add(module)
            self.hooks.append(module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True))

    def end_training(self, failed: bool) -> None:
        """Give back what only training needs (``HiFTEngine.end_training``)."""
        if self.has_ended:
            return
        try:
            if not (failed and self._engine.world_size > 1):
                self._checkpointer.wait()
        finally:
            self.let_go(failed)

    def let_go(self, failed: bool = True) -> None:
        """Give back hooks, activations' switches, the forecast, the states and the memory in which they were; also of
        an engine that an error left half made.

        Args:
            failed: what the device was given last need not end: nothing waits for it.
        """
        engine, self.has_ended = self._engine, True
        for hook in self.hooks:
            hook.remove()
        if hasattr(engine, "savings"):
            engine.savings.close()
        self._memory.stop()
        if getattr(engine, "optimizer", None) is not None:
            engine.optimizer.end_training(keep_states=self._checkpointer.is_saving)
            if not failed:
                finish_device_work()
            return_page_locked(engine.device)


def end_earlier_engine(model: nn.Module | None) -> None:
    """Destroy the engine that a loop which was interrupted and begun again has left on ``model``: the model must be its
    owner's again before another engine takes it."""
    reference = _engine_of.get(model) if isinstance(model, nn.Module) else None
    earlier = reference() if reference is not None else None
    if earlier is not None:
        earlier.destroy()
