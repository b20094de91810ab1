"""The engine: DeepSpeed's, training one layer group per optimizer step.

The calls are DeepSpeed's: ``loss = engine(batch)``, ``engine.backward(loss)``, ``engine.step()``.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hift_ds.activations.switches import ActivationSavings
from hift_ds.config import BLOCK, check_against_deepspeed, parse_block
from hift_ds.engine import build
from hift_ds.engine.auto_groups import AutoGroups
from hift_ds.engine.checkpointer import Checkpointer
from hift_ds.engine.deepspeed_seam import HiFTOptimizer, SeamEngine, restart_peak_bytes
from hift_ds.engine.memory_forecast import MemoryForecast
from hift_ds.engine.state_arithmetic import gather_state_arithmetic
from hift_ds.engine.step_notes import StepNotes
from hift_ds.errors import HiFTError
from hift_ds.forecast.advice import Adviser
from hift_ds.layers.grouping import LayerGroup
from hift_ds.optim.trainable_flags import containers_of
from hift_ds.out_of_memory import explains_out_of_memory, says_when_no_room
from hift_ds.schedule import GroupSchedule
from hift_ds.step_report import StepReport
from hift_ds.store.arithmetic import StateArithmetic
from hift_ds.store.machine import THIS_MACHINE

logger = logging.getLogger(__name__)

_engine_of: weakref.WeakKeyDictionary[nn.Module, weakref.ref[HiFTEngine]] = weakref.WeakKeyDictionary()


class HiFTEngine(SeamEngine):
    """Made by :func:`hift_ds.initialize`.

    DeepSpeed's engine (config, process groups, batch arithmetic, monitors) with these calls overridden: ``forward``,
    ``backward``, ``step``, ``get_lr``, ``save_checkpoint``, ``load_checkpoint`` and ``destroy`` here; gradient
    reduction, clipping and the choice of optimizers in :class:`SeamEngine`, which asks ``before_cast`` and
    ``build_optimizers`` here.

    Attributes:
        hift: the ``"hift"`` block of the config.
        partition: the layer groups of the model.
        last_report: what the last optimizer step did; ``None`` before the first.
        step_loss: sum of the losses of this step's micro-batches so far, on this rank; ``None`` before the first.
        savings: the switches of ``"activations"`` at work.
        checkpointer: saves and resumes.
        auto_groups: finds the size of groups, if that is left to it.
        memory: what steps are expected to need.
        adviser: answers when there is no memory left. A loop that builds another engine for a smaller batch hands
            it on, so that the forecast is made once.
    """

    # What a simulation has otherwise: what the state store knows of where it runs, and whether an optimizer's
    # constructor is shown weights without elements.
    machine = THIS_MACHINE
    hollow_weights = True

    def __init__(self, *args: Any, config: Any = None, **kwargs: Any) -> None:
        self.hift = parse_block(config[BLOCK])
        check_against_deepspeed(self.hift, config)
        self.last_report: StepReport | None = None
        self.step_loss: Tensor | None = None
        self._mean_of_losses = True
        self._ended = self._destroyed = False
        self._entrances: list[Any] = []  # hooks
        self._fp32_shards: dict[str, Tensor] = {}  # bits that casting the weights would lose
        self.checkpointer = Checkpointer(self)
        self.auto_groups = AutoGroups(self)
        self.memory = MemoryForecast(self)
        self.adviser = Adviser()
        self._notes = StepNotes(self)
        _end_earlier_engine(kwargs.get("model"))
        try:
            with says_when_no_room(kwargs.get("model")):
                super().__init__(*args, config=config, **kwargs)
            if self.lr_scheduler is not None:
                self.watch_scheduler(self.lr_scheduler)
            self.auto_groups.settle_by_config()
            if self.global_rank == 0 and logger.isEnabledFor(logging.INFO):
                logger.info(self.state_arithmetic.line())
            names = {index: [m.name for m in group.members] for index, group in self.optimizer.groups.items()}
            self.savings = ActivationSavings(self.module, self.hift.activations, names)
        except BaseException:
            self._let_go()
            self.remove_deepspeed_hooks()
            raise
        _engine_of[self.module] = weakref.ref(self)

    @property
    def groups(self) -> tuple[LayerGroup, ...]:
        """The layer groups, bottom to top."""
        return self.partition.groups

    @property
    def schedule(self) -> GroupSchedule:
        """Which group is active; ``schedule.cursor`` says where the run stands."""
        return self.optimizer.schedule

    @property
    def has_ended(self) -> bool:
        """Training is over: :meth:`end_training` or :meth:`destroy` was called."""
        return self._ended

    @functools.cached_property
    def state_arithmetic(self) -> StateArithmetic:
        """What a step moves and when computing hides it, on this rank; measured when first asked for."""
        return gather_state_arithmetic(self.optimizer, self.module, self.hift.state, self.device)

    # -- construction: what SeamEngine asks -------------------------------------------------------------------

    def before_cast(self, model: nn.Module) -> None:
        """Keep the fp32 bits of this rank's shards of weights that DeepSpeed is about to round to 16 bits."""
        for param in model.parameters():
            if not param.is_contiguous():
                param.data = param.data.contiguous()
        if (dtype := self.low_dtype()) is not None and self.hift.master_weights:
            self._fp32_shards = build.cast_and_keep_bits(model, dtype, self.device)

    def build_optimizers(
        self, client_optimizer: Any, model_parameters: list[Any]
    ) -> tuple[torch.optim.Optimizer, HiFTOptimizer]:
        """The optimizer that is stepped, and the group optimizer around it."""
        shards, self._fp32_shards = self._fp32_shards, {}
        self.partition, base, optimizer = build.build_optimizers(
            build.facts_of(self),
            self.module,
            client_optimizer,
            model_parameters,
            self.partition_weights,
            shards,
        )
        self._watch_entrances(optimizer)
        return base, optimizer

    def _watch_entrances(self, optimizer: HiFTOptimizer) -> None:
        """A forward may enter the model elsewhere than through the engine (TRL calls its backbone, say)."""
        groups = ([member.param for member in group.members] for group in optimizer.groups.values())
        for module in [self.module, *containers_of(self.module, groups)]:
            self._entrances.append(module.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True))

    def _enter(self, module: nn.Module, inputs: tuple[Any, ...], named_inputs: dict[str, Any]) -> None:
        if self.optimizer.flags.shown and torch.is_grad_enabled() and not self._ended:
            self.auto_groups.settle_by_inputs([*inputs, *named_inputs.values()])
            if not self.optimizer.flags.step_began:  # what came before, an evaluation say, is not this step's
                restart_peak_bytes()
                self.optimizer.store.busy()
            self.optimizer.activate()

    # -- training ---------------------------------------------------------------------------------------------

    def watch_scheduler(self, scheduler: Any, steps_left: Callable[[], int] | None = None) -> None:
        """Let the learning-rate latch look ahead on ``scheduler`` during warm-up. The engine does this for its own;
        a loop that steps a scheduler by itself (the Trainer's) calls it once.

        Args:
            steps_left: optimizer steps that the run still makes, the coming one included: no look goes further.
        """
        self.optimizer.lr.scheduler, self.optimizer.lr.steps_left = scheduler, steps_left
        self.optimizer.lr.catch_up()

    @explains_out_of_memory("forward")
    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """As DeepSpeed's."""
        if self._ended:
            return self.module(*inputs, **kwargs)
        self._enter(self.module, inputs, kwargs)
        self.memory.note_shape([*inputs, *kwargs.values()])
        active = [group.index for group in self.optimizer.active_groups]
        try:
            with self.savings.during_forward(active), self.optimizer.parameters.saved_by_reference():
                return super().forward(*inputs, **kwargs)
        except BaseException:  # Ctrl-C too: nobody may call destroy
            self.optimizer.flags.show()
            raise

    @explains_out_of_memory("backward")
    def backward(self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Tensor:
        """As DeepSpeed's. Only the active group gets gradients.

        Returns:
            The loss divided by the accumulation steps (not multiplied by the fp16 loss scale).
        """
        self._refuse_if_ended()
        self.step_loss = loss.detach() if self.step_loss is None else self.step_loss + loss.detach()
        self._mean_of_losses = scale_wrt_gas
        # Never the tensor that the model returned: DeepSpeed divides its gradient by the accumulation steps (0.19.8).
        scaled = loss * self.optimizer.scaler.scale if self.optimizer.scaler.active else loss.view_as(loss)
        self.optimizer.activate()  # for blocks that are recomputed, and in case no forward entered the model
        try:
            is_boundary = self.is_gradient_accumulation_boundary()
            if self.optimizer.updates_in_backward and is_boundary:
                self.checkpointer.before_step()
            self.optimizer.begin_backward(scaled, self.step_loss, is_boundary, retain_graph)
            if loss.requires_grad:
                super().backward(scaled, retain_graph=retain_graph, scale_wrt_gas=scale_wrt_gas)
            else:  # the active group did not take part in this loss (an unused pooler, say)
                self.finish_backward_without_graph()
        except BaseException as error:
            self.optimizer.backward_failed(error)
            raise
        finally:
            self.optimizer.flags.show()
        return loss / self.gradient_accumulation_steps() if scale_wrt_gas else loss

    @explains_out_of_memory("the update")
    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """As DeepSpeed's: at the accumulation boundary updates the active group and rotates; else does nothing."""
        self._refuse_if_ended()
        if not self.is_gradient_accumulation_boundary():
            super().step(lr_kwargs)
            return
        began = self._notes.before()
        self.checkpointer.before_step()
        super().step(lr_kwargs)
        if self.step_loss is not None:
            self._notes.write_loss(self.step_loss, self._losses_of_step())
        self.step_loss = None
        self.optimizer.store.idle()
        expected, waited_s = self.memory.peak_bytes(began.group), self.checkpointer.take_waited_s()
        self.last_report = self._notes.after(began, expected, waited_s)
        self.memory.use_spare()

    def _losses_of_step(self) -> int:
        """How many losses the sum of a step's is the mean of."""
        return self.gradient_accumulation_steps() if self._mean_of_losses else 1

    def get_lr(self) -> list[float]:
        """The latched learning rate of each param_group: what updates use, and so what logs show."""
        return list(self.optimizer.lr.latched)

    def coverage(self) -> dict[str, int]:
        """How often each trainable parameter was updated, by name."""
        return self.optimizer.coverage()

    def start_forecast(self, batch: int, length: int) -> None:
        """Expect a peak of each step, in ``last_report.forecast_bytes`` (:meth:`MemoryForecast.start`)."""
        self.memory.start(batch, length)

    # -- checkpoints ------------------------------------------------------------------------------------------

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> bool:
        """As DeepSpeed's: writes ``<save_dir>/<tag>``. :meth:`Checkpointer.save` has the arguments and the promises."""
        self._refuse_if_ended()
        return self.checkpointer.save(*args, **kwargs)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> tuple[str | None, dict[str, Any] | None]:
        """As DeepSpeed's: (folder, client_state). :meth:`Checkpointer.load` has the arguments and the promises."""
        self._refuse_if_ended()
        return self.checkpointer.load(*args, **kwargs)

    def wait_for_checkpoint(self) -> bool:
        """Wait until the asynchronous save under way, if any, is whole on disk (:meth:`Checkpointer.wait`)."""
        return self.checkpointer.wait()

    @property
    def last_checkpoint(self) -> Path | None:
        """The last folder that this run has saved or loaded whole."""
        return self.checkpointer.last

    # -- the end ----------------------------------------------------------------------------------------------

    def end_training(self, failed: bool = False) -> None:
        """Give back what only training needs: states and their memory, gradients, hooks, threads, and the model's
        ``requires_grad`` flags. A second call does nothing. The engine still evaluates and answers ``coverage()``.

        Args:
            failed: this rank leaves training by itself, by an error or Ctrl-C: nothing that waits for others is done.
                On several ranks an asynchronous checkpoint under way keeps the states it still has to copy.
        """
        if self._ended:
            return
        try:
            if not (failed and self.world_size > 1):
                self.checkpointer.wait()
        finally:
            self._let_go()

    def _let_go(self) -> None:
        """Also of an engine that was only made in part."""
        self._ended = True
        for hook in self._entrances:
            hook.remove()
        if hasattr(self, "savings"):
            self.savings.close()
        self.memory.stop()
        if getattr(self, "optimizer", None) is not None:
            self.optimizer.end_training(keep_states=self.checkpointer.is_saving)

    def destroy(self) -> None:
        """:meth:`end_training`, and let go of the model altogether: with ZeRO-3 its weights stay in shards, and are not
        gathered for a forward any more."""
        if self._destroyed:
            return
        self._destroyed = True
        try:
            self.end_training()
        finally:
            self.remove_deepspeed_hooks()
            super().destroy()

    def _refuse_if_ended(self) -> None:
        if self._ended:
            raise HiFTError("this engine's training has ended and its states are gone: make a new engine to go on")


def _end_earlier_engine(model: Any) -> None:
    """A loop that was interrupted and begun again has left one: the model must be its owner's again first."""
    reference = _engine_of.get(model) if isinstance(model, nn.Module) else None
    earlier = reference() if reference is not None else None
    if earlier is not None:
        earlier.destroy()
