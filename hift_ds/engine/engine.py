"""DeepSpeed's engine, training one layer group per optimizer step, by DeepSpeed's calls: ``loss = engine(batch)``,
``engine.backward(loss)``, ``engine.step()``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from hift_ds.activations.switches import ActivationSavings
from hift_ds.config import BLOCK, parse_block
from hift_ds.engine import build
from hift_ds.engine.auto_groups import AutoGroups
from hift_ds.engine.checkpointer import Checkpointer
from hift_ds.engine.deepspeed_seam import ClientOptimizer, HiFTOptimizer, ParamEntries, SeamEngine
from hift_ds.engine.facts import facts_of
from hift_ds.engine.fp32_bits import cast_and_keep_bits
from hift_ds.engine.lifetime import Lifetime, end_earlier_engine
from hift_ds.engine.memory_forecast import MemoryForecast
from hift_ds.engine.step_notes import StepNotes
from hift_ds.errors import ConfigError, HiFTError, TrainingError
from hift_ds.forecast.advice import Adviser
from hift_ds.layers.grouping import LayerGroup
from hift_ds.lr import missing_argument
from hift_ds.out_of_memory import explains_out_of_memory, says_when_no_room
from hift_ds.schedule import GroupSchedule
from hift_ds.step_report import StepReport


class HiFTEngine(SeamEngine):
    """DeepSpeed's engine (config, process groups, batch arithmetic, monitors) with these calls overridden: ``forward``,
    ``backward``, ``step``, ``get_lr``, ``save_checkpoint``, ``load_checkpoint`` and ``destroy`` here; gradient
    reduction, clipping and the choice of optimizers in :class:`SeamEngine`. Made by :func:`hift_ds.initialize`.

    Attributes:
        hift: the ``"hift"`` block of the config.
        partition: the layer groups of the model.
        last_report: what the last optimizer step did; ``None`` before the first.
        notes: what is told of steps, and the loss of the one under way.
        savings: the switches of ``"activations"`` at work.
        checkpointer: saves and resumes.
        auto_groups: finds the size of groups, if that is left to it.
        memory: what steps are expected to need.
        adviser: answers when there is no memory left; a loop that builds engine after engine hands it on.
    """

    def __init__(self, *args: Any, config: Any = None, **kwargs: Any) -> None:
        self.hift = parse_block(config[BLOCK])
        self.last_report: StepReport | None = None
        self._fp32_shards: dict[str, Tensor] = {}  # bits that casting the weights would lose
        self.checkpointer = Checkpointer(self)
        self.auto_groups = AutoGroups(self)
        self.memory = MemoryForecast(self)
        self.life = Lifetime(self, self.checkpointer, self.memory)
        self.adviser = Adviser()
        self.notes = StepNotes(self)
        end_earlier_engine(kwargs.get("model"))
        with self.life.begins():
            with says_when_no_room(kwargs.get("model")):
                super().__init__(*args, config=config, **kwargs)
            self.optimizer.lr.watch(self.lr_scheduler)
            self.auto_groups.settle_by_config()
            self.notes.say_at_start()
            self.savings = ActivationSavings(self.module, self.hift.activations, self.optimizer.weight_names())

    @property
    def groups(self) -> tuple[LayerGroup, ...]:
        """The layer groups, bottom to top."""
        return self.partition.groups

    def lines_at_start(self) -> list[str]:
        """What there is to say before a run's first step: of states, clipping, and a group size that was left open."""
        return [line for line in (*self.notes.at_start(), self.auto_groups.line) if line]

    @property
    def schedule(self) -> GroupSchedule:
        """Which group is active; ``schedule.cursor`` says where the run stands."""
        return self.optimizer.schedule

    @property
    def has_ended(self) -> bool:
        """Training is over: :meth:`end_training` or :meth:`destroy` was called."""
        return self.life.has_ended

    # -- construction: what SeamEngine asks -------------------------------------------------------------------

    def before_cast(self, model: nn.Module) -> None:
        """Keep the fp32 bits of this rank's shards of weights that DeepSpeed is about to round to 16 bits.

        Raises:
            ConfigError: two weights share their memory, which rounding would end without a word.
        """
        build.refuse_shared_memory(model)
        dtype = self.low_dtype() if self.hift.master_weights else None
        self._fp32_shards = cast_and_keep_bits(model, dtype, self.device)

    def build_optimizers(
        self, client_optimizer: ClientOptimizer, model_parameters: ParamEntries
    ) -> tuple[Optimizer, HiFTOptimizer]:
        """The optimizer that is stepped, and the group optimizer around it."""
        shards, self._fp32_shards = self._fp32_shards, {}
        self.partition, base, optimizer = build.build_optimizers(
            facts_of(self), self.module, client_optimizer, model_parameters, self.partition_weights, shards
        )
        self.life.watch_entrances(optimizer, self.auto_groups.settle_by_inputs)
        return base, optimizer

    # -- training ---------------------------------------------------------------------------------------------

    @explains_out_of_memory("forward")
    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Compute the model's output, as DeepSpeed's call does; below the lowest active group no graph is built."""
        if self.life.has_ended:
            return self.module(*inputs, **kwargs)
        self.auto_groups.settle_by_inputs(inputs, kwargs)
        self.optimizer.enter()
        self.memory.note_shape([*inputs, *kwargs.values()], has_mask=kwargs.get("attention_mask") is not None)
        active = [group.index for group in self.optimizer.active_groups]
        flags, parameters = self.optimizer.flags, self.optimizer.parameters
        with flags.shown_on_error(), self.savings.during_forward(active), parameters.saved_by_reference():
            return super().forward(*inputs, **kwargs)

    @explains_out_of_memory("backward")
    def backward(self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Tensor:
        """Compute gradients as DeepSpeed's call does, of the active group only.

        The step takes them along: after the last backward before it no parameter has a ``.grad``, and torch's
        ``clip_grad_norm_`` finds nothing. The config's ``"gradient_clipping"`` clips, ``get_global_grad_norm()``
        answers after the step, and a hook on a parameter (``register_hook``) may change its gradient.

        Args:
            loss: one element, of one micro-batch.
            retain_graph: another backward through the same graph will come.
            scale_wrt_gas: the losses of a step's micro-batches are averaged, not summed.

        Returns:
            The loss divided by the accumulation steps, if they are averaged, and not multiplied by the fp16 loss scale.

        Raises:
            HiFTError: ``loss`` is not one; or the update in backward cannot follow, or was cut short.
            TrainingError: with the update in backward, the loss is not finite on some rank. Nothing was updated, the
                step's gradients are gone, and the next micro-batch is the first of its step.
        """
        self.life.refuse_if_ended()
        if not (isinstance(loss, Tensor) and loss.numel() == 1):
            given = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise HiFTError(f"engine.backward() was given {given}; expected the loss: a tensor of one element")
        earlier_loss = self.notes.loss
        step_loss = self.notes.add_loss(loss.detach(), scale_wrt_gas)
        # Never the tensor that the model returned: DeepSpeed divides its gradient by the accumulation steps (0.19.8).
        scaled = loss * self.optimizer.scaler.scale if self.optimizer.scaler.active else loss.view_as(loss)
        self.optimizer.activate()  # for blocks that are recomputed, and in case no forward entered the model
        try:
            is_boundary = self.is_gradient_accumulation_boundary()
            if self.optimizer.updates_in_backward and is_boundary:
                self.checkpointer.before_step()
            self.optimizer.begin_backward(scaled, step_loss, is_boundary, retain_graph)
            self.run_backward(scaled, retain_graph, scale_wrt_gas)
        except TrainingError:  # all gradients of the step have been dropped
            self.notes.loss = None
            self.begin_step_again()
            raise
        except BaseException as error:
            self.notes.loss = earlier_loss
            self.optimizer.backward_failed(error)
            raise
        finally:
            self.optimizer.flags.show()
        return loss / self.gradient_accumulation_steps() if scale_wrt_gas else loss

    @explains_out_of_memory("the update")
    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """Update the active group and rotate, at the accumulation boundary; else do nothing, as DeepSpeed's call."""
        self.life.refuse_if_ended()
        if not self.is_gradient_accumulation_boundary():
            super().step(lr_kwargs)
            return
        if self.lr_scheduler is not None and not lr_kwargs and (missing := missing_argument(self.lr_scheduler)):
            # DeepSpeed would give it the batch size.
            raise ConfigError(
                f"engine.step(): the step() of {type(self.lr_scheduler).__name__} wants {missing!r}; "
                f"call engine.step({{{missing!r}: ...}}), or leave lr_scheduler= out and step it yourself"
            )
        began = self.notes.before()
        self.checkpointer.before_step()
        super().step(lr_kwargs)  # DeepSpeed's: our optimizer's step, its counters, the scheduler's tick
        self.notes.write_loss()
        self.optimizer.leave()
        expected, waited_s = self.memory.peak_bytes(began.group), self.checkpointer.take_waited_s()
        self.last_report = self.notes.after(began, expected, waited_s)
        self.memory.use_spare()

    def get_lr(self) -> list[float]:
        """The latched learning rate of each param_group: what updates use, and so what logs show."""
        return list(self.optimizer.lr.latched)

    def coverage(self) -> dict[str, int]:
        """How often each trainable parameter was updated, by name."""
        return self.optimizer.coverage()

    # -- checkpoints ------------------------------------------------------------------------------------------

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> bool:
        """Write ``<save_dir>/<tag>``. :meth:`Checkpointer.save` has the arguments and the promises."""
        self.life.refuse_if_ended()
        return self.checkpointer.save(*args, **kwargs)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> tuple[str | None, dict[str, Any] | None]:
        """Load a checkpoint; returns (folder, client_state). :meth:`Checkpointer.load` has arguments and promises."""
        self.life.refuse_if_ended()
        return self.checkpointer.load(*args, **kwargs)

    def wait_for_checkpoint(self) -> bool:
        """Wait until the asynchronous save under way, if any, is whole on disk (:meth:`Checkpointer.wait`)."""
        return self.checkpointer.wait()

    @property
    def last_checkpoint(self) -> Path | None:
        """The last folder that this run has saved or loaded whole."""
        return self.checkpointer.last

    def end_training(self, failed: bool = False) -> None:
        """Give back what only training needs: states and their memory, gradients, hooks, threads, and the model's
        ``requires_grad`` flags. A second call does nothing. The engine still evaluates and answers ``coverage()``.

        Args:
            failed: this rank leaves by an error or Ctrl-C: it waits for none, and a save under way keeps its states.
        """
        self.life.end_training(failed)

    def destroy(self) -> None:
        """:meth:`end_training`, and let go of the model altogether: with ZeRO-3 its weights stay in shards, and are not
        gathered for a forward any more."""
        if self.life.is_over:
            return
        self.life.is_over = True
        try:
            self.end_training()
        finally:
            self.remove_deepspeed_hooks()
            super().destroy()
