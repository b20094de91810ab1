"""The engine: DeepSpeed's, training one layer group per optimizer step.

The calls are DeepSpeed's: ``loss = engine(batch)``, ``engine.backward(loss)``, ``engine.step()``.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hift_ds import collectives
from hift_ds.activations.switches import ActivationSavings
from hift_ds.config import BLOCK, HiFTConfig, check_against_deepspeed, parse_block
from hift_ds.engine.checkpointing import Checkpointing
from hift_ds.engine.deepspeed_seam import (
    HiFTInBackwardOptimizer,
    HiFTOptimizer,
    SeamEngine,
    broadcast_from_first_rank,
    gather_whole,
    peak_bytes,
    restart_peak_bytes,
    world_rank_and_size,
)
from hift_ds.engine.memory_reports import MemoryReports
from hift_ds.engine.state_arithmetic import gather_state_arithmetic
from hift_ds.engine.zero3.exact_values import exact_values
from hift_ds.engine.zero3.parameters import PartitionedParameters
from hift_ds.errors import ConfigError, HiFTError
from hift_ds.layers.grouping import LayerGroup, Partition, partition_model
from hift_ds.lr import CycleLR
from hift_ds.optim.build import build_optimizer, is_elementwise
from hift_ds.optim.group_states import GroupStates
from hift_ds.optim.parameters import DEFAULT_BUCKET_NUMEL, GroupShard, Parameters, ReplicatedParameters
from hift_ds.optim.piecewise import PiecewiseOptimizer
from hift_ds.optim.trainable_flags import TrainableFlags, containers_of
from hift_ds.out_of_memory import explains_out_of_memory, says_when_no_room
from hift_ds.precision import LossScaler, PrecisionPolicy
from hift_ds.schedule import GroupSchedule
from hift_ds.step_report import StepReport
from hift_ds.store.arithmetic import StateArithmetic
from hift_ds.store.choose import build_resident_store, build_store
from hift_ds.store.machine import THIS_MACHINE, Machine

logger = logging.getLogger(__name__)

_SUM_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

_engine_of: weakref.WeakKeyDictionary[nn.Module, weakref.ref[HiFTEngine]] = weakref.WeakKeyDictionary()


class HiFTEngine(Checkpointing, MemoryReports, SeamEngine):
    """Made by :func:`hift_ds.initialize`.

    Attributes:
        partition: the layer groups of the model.
        schedule: which group is active; ``schedule.cursor`` says where the run stands.
        last_report: what the last optimizer step did; ``None`` before the first.
        step_loss: sum of the losses of this step's micro-batches so far, on this rank; ``None`` before the first.
        savings: the switches of ``"activations"`` at work.
        restores_generators: ``load_checkpoint`` also sets the global random generators, to where they were when the
            checkpoint was saved. A loop that draws before it goes on (the Trainer, an epoch's order) does so itself.
    """

    # What a simulation has otherwise: what the state store knows of where it runs, and whether an optimizer's constructor
    # is shown weights without elements.
    machine: Machine = THIS_MACHINE
    hollow_weights = True

    optimizer: HiFTOptimizer
    step_loss: Tensor | None = None
    restores_generators = True
    _mean_of_losses = True
    _said_not_finite = False
    _ended = _destroyed = False
    _weights_made: Parameters | None = None

    def __init__(self, *args: Any, config: Any = None, **kwargs: Any) -> None:
        self.hift: HiFTConfig = parse_block(config[BLOCK])
        check_against_deepspeed(self.hift, config)
        self.partition: Partition | None = None
        self.last_report: StepReport | None = None
        self._entrances: list[Any] = []  # hooks
        self._fp32_shards: dict[str, Tensor] = {}  # bits that casting the weights would lose
        _end_earlier_engine(kwargs.get("model"))
        try:
            with says_when_no_room(kwargs.get("model")):
                super().__init__(*args, config=config, **kwargs)
            if self.lr_scheduler is not None:
                self.watch_scheduler(self.lr_scheduler)
            if self.global_rank == 0 and logger.isEnabledFor(logging.INFO):
                logger.info(self.state_arithmetic.line())
            names = {
                index: [member.name for member in group.members]
                for index, group in self.optimizer.groups.items()
            }
            self.savings = ActivationSavings(self.module, self.hift.activations, names)
        except BaseException:
            self._let_go()
            self.remove_deepspeed_hooks()
            raise
        _engine_of[self.module] = weakref.ref(self)

    @property
    def groups(self) -> tuple[LayerGroup, ...]:
        """Bottom to top."""
        return self.partition.groups

    @property
    def has_ended(self) -> bool:
        """Training is over: :meth:`end_training` or :meth:`destroy` was called."""
        return self._ended

    @property
    def schedule(self) -> GroupSchedule:
        return self.optimizer.schedule

    # -- construction -----------------------------------------------------------------------------------------

    def before_cast(self, model: nn.Module) -> None:
        """Keep the fp32 bits of this rank's shards of weights that DeepSpeed is about to round to 16 bits."""
        for param in model.parameters():
            if not param.is_contiguous():
                param.data = param.data.contiguous()
        if not (self.fp16_enabled() or self.bfloat16_enabled()) or not self.hift.master_weights:
            return
        rank, world_size = world_rank_and_size()
        for name, param in model.named_parameters():
            if param.requires_grad and param.dtype == torch.float32:
                whole = param.detach().to(self.device)
                # Ranks may have initialised differently; DeepSpeed takes rank 0's.
                broadcast_from_first_rank(whole)
                start, end = collectives.shard_bounds(whole.numel(), world_size, rank)
                self._fp32_shards[name] = whole.view(-1)[start:end].to("cpu", copy=True)
                # Cast here, one by one and on the device: DeepSpeed would cast on the host, all of them, on every rank.
                param.data = whole.to(torch.bfloat16 if self.bfloat16_enabled() else torch.float16)

    def build_optimizers(
        self, client_optimizer: Any, model_parameters: list
    ) -> tuple[torch.optim.Optimizer, HiFTOptimizer]:
        """Groups, base optimizer, and the group optimizer around it."""
        if callable(client_optimizer) and not isinstance(client_optimizer, torch.optim.Optimizer):
            client_optimizer = client_optimizer(model_parameters)
        managed = _params_of(
            client_optimizer.param_groups if client_optimizer is not None else model_parameters
        )
        flags = TrainableFlags(self.module)
        with self._unmanaged_set_aside(managed):
            self.partition = partition_model(
                self.module,
                group_size=self.hift.group_size,
                patterns=self.hift.groups,
                always_active=self.hift.always_active,
            )
            self._say_if_one_group()
            base = client_optimizer or self._build_from_config(model_parameters)
            optimizer = self._build_group_optimizer(base, flags)
        if self._fp32_shards or (self.hift.master_weights and exact_values(self.module) is not None):
            self._give_masters_their_bits(optimizer)
        return base, optimizer

    def _say_if_one_group(self) -> None:
        if len(self.groups) == 1 and self.hift.group_size not in (1, "all") and self.global_rank == 0:
            logger.warning(
                '"hift.group_size": %d is more than the model has: all weights are one group, which is full fine-tuning',
                self.hift.group_size,
            )

    @functools.cached_property
    def state_arithmetic(self) -> StateArithmetic:
        """What a step moves and when computing hides it, on this rank; measured when first asked for."""
        return gather_state_arithmetic(self.optimizer, self.module, self.hift.state, self.device)

    def _give_masters_their_bits(self, optimizer: HiFTOptimizer) -> None:
        """The shards were cut for elementwise optimizers; whole-tensor owners need the other ranks' parts."""
        shards, self._fp32_shards = self._fp32_shards, {}
        _, world_size = world_rank_and_size()
        numel_of = {
            name: math.prod(optimizer.parameters.shape_of(p)) for name, p in self.module.named_parameters()
        }
        if optimizer.parameters.whole_tensors:
            shards = {
                name: gather_whole(shard, numel_of[name], self.device) for name, shard in shards.items()
            }

        exact = exact_values(self.module)

        def values(name: str, start: int, numel: int) -> Tensor | None:
            if name not in shards:
                return exact(name, start, numel) if exact is not None else None
            whole = shards[name].numel() == numel_of[name]
            offset = 0 if whole else collectives.shard_bounds(numel_of[name], world_size, self.global_rank)[0]
            return shards[name][start - offset : start - offset + numel]

        optimizer.states.set_masters(values)

    @contextlib.contextmanager
    def _unmanaged_set_aside(self, managed: set[nn.Parameter]) -> Iterator[None]:
        """Trainable weights that the optimizer was not given are not trained; they must not get gradients either."""
        aside = {n: p for n, p in self.module.named_parameters() if p.requires_grad and p not in managed}
        if aside and self.global_rank == 0:
            shown = ", ".join(list(aside)[:3]) + (" ..." if len(aside) > 3 else "")
            logger.warning(
                "%d trainable parameters are not in the optimizer and stay as they are: %s", len(aside), shown
            )
        for param in aside.values():
            param.requires_grad_(False)
        try:
            yield
        finally:
            for param in aside.values():
                param.requires_grad_(True)

    def _build_from_config(self, model_parameters: list) -> torch.optim.Optimizer:
        entries = (
            model_parameters if isinstance(model_parameters[0], dict) else [{"params": model_parameters}]
        )
        param_groups = []
        for entry in entries:
            params = entry["params"]
            params = [params] if isinstance(params, Tensor) else params
            trainable = [p for p in params if p.requires_grad]
            if trainable:
                param_groups.append({**entry, "params": trainable})
        weights = dict(self.module.named_parameters())
        return build_optimizer(
            self.optimizer_name(),
            self.optimizer_params() or {},
            param_groups,
            matrices=frozenset(id(weights[name]) for name in self.partition.matrices),
            update_device=self._update_device().type,
            on_accelerator=self.device.type != "cpu",
            hollow_weights=self.hollow_weights,
        )

    def _build_group_optimizer(self, base: torch.optim.Optimizer, flags: TrainableFlags) -> HiFTOptimizer:
        hift, device = self.hift, self._update_device()
        rounding_seed = hift.seed * 65_537 + self.global_rank
        parameters = self._weights_made = self._build_parameters(base)
        groups = self._group_shards(base, parameters)
        self._watch_entrances([member.param for member in group.members] for group in groups.values())
        states = GroupStates(
            groups,
            parameters,
            PiecewiseOptimizer(base),
            self._precision(),
            device,
            store=build_store(hift.state, device, seed=rounding_seed, machine=self.machine),
            always_store=build_resident_store(hift.state, device, seed=rounding_seed),
        )
        make: Callable[..., HiFTOptimizer] = HiFTOptimizer
        if hift.update == "in_backward":
            make = functools.partial(
                HiFTInBackwardOptimizer, clipping=hift.clipping, sum_dtype=self._sum_dtype()
            )
        return make(
            states,
            flags,
            GroupSchedule(
                len(self.partition.groups), hift.order, hift.reshuffle, hift.seed, hift.steps_per_group
            ),
            CycleLR(hift.lr_update, base.param_groups),
            self._loss_scaler(),
            max_grad_norm=self.gradient_clipping(),
            seed=hift.seed,
            pin_memory=hift.state.pin_memory,
        )

    def _watch_entrances(self, groups: Iterable[list[nn.Parameter]]) -> None:
        """A forward may enter the model elsewhere than through the engine (TRL calls its backbone, say)."""
        for module in [self.module, *containers_of(self.module, groups)]:
            self._entrances.append(module.register_forward_pre_hook(self._enter, prepend=True))

    def _enter(self, *_: Any) -> None:
        if self.optimizer.flags.shown and torch.is_grad_enabled() and not self._ended:
            if not self.optimizer.flags.step_began:  # what came before, an evaluation say, is not this step's
                restart_peak_bytes()
                self.optimizer.store.busy()
            self.optimizer.activate()

    def _build_parameters(self, base: torch.optim.Optimizer) -> Parameters:
        options = {
            "ranks": self.replica_ranks(),
            "comm_dtype": self.requested_comm_dtype(),
            "bucket_numel": self._bucket_numel(),
            "whole_tensors": not is_elementwise(base),
            "slice_numel": self.hift.state.slice_numel,
            "by_part": self.hift.update == "in_backward",
        }
        trainable = [p for p in self.module.parameters() if p.requires_grad]
        if self.zero_optimization_partition_weights():
            shards = self.partition_weights(active_group=lambda: self.schedule.active)
            partitioned = PartitionedParameters(shards, **options)
            if self.hift.update == "after_backward":
                partitioned.take_gradients(trainable)
            return partitioned
        replicated = ReplicatedParameters(**options)
        if self.gradient_accumulation_steps() > 1 and self.hift.update == "after_backward":
            replicated.accumulate_in_fp32(trainable)
        return replicated

    def _group_shards(self, base: torch.optim.Optimizer, parameters: Parameters) -> dict[int, GroupShard]:
        weights = dict(self.module.named_parameters())
        param_group_of = {p: i for i, group in enumerate(base.param_groups) for p in group["params"]}
        always = [self.partition.always] if self.partition.always else []
        return {
            group.index: parameters.group_shard(
                group.index,
                group.name,
                [(name, weights[name], param_group_of[weights[name]]) for name in group.param_names],
                group.parts,
            )
            for group in [*self.partition.groups, *always]
        }

    def _sum_dtype(self) -> torch.dtype:
        """Of gradients of several micro-batches in host memory: DeepSpeed's ``data_types.grad_accum_dtype``, or fp32."""
        name = (self.config.get("data_types") or {}).get("grad_accum_dtype") or "fp32"
        if name not in _SUM_DTYPES:
            raise ConfigError(f'"data_types.grad_accum_dtype": expected fp32 or bf16, got {name!r}')
        return _SUM_DTYPES[name]

    def _update_device(self) -> torch.device:
        return torch.device("cpu") if self.hift.state.step_on == "host" else self.device

    def _bucket_numel(self) -> int:
        configured = (self.config.get("zero_optimization") or {}).get("reduce_bucket_size")
        return int(configured) if isinstance(configured, int | float) else DEFAULT_BUCKET_NUMEL

    def _precision(self) -> PrecisionPolicy:
        low = self.bfloat16_enabled() or self.fp16_enabled()
        any_low = low or any(p.dtype != torch.float32 for p in self.module.parameters() if p.requires_grad)
        if any_low:
            name = "mixed_hi" if self.hift.master_weights else "bf16"
        else:
            name = "mixed" if self.torch_autocast_enabled() else "fp32"
        return PrecisionPolicy(name, self.hift.master_weights, self.hift.stochastic_rounding)

    def _loss_scaler(self) -> LossScaler:
        if self.fp16_enabled():
            return LossScaler.from_fp16_block(self.config["fp16"])
        if self.torch_autocast_enabled() and self.torch_autocast_dtype() == torch.float16:
            return LossScaler.from_fp16_block({})
        return LossScaler()

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
        self._enter()
        self.note_shape([*inputs, *kwargs.values()])
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
            if self.optimizer.updates_in_backward:
                self._copy_before_step()
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
        is_boundary = self.is_gradient_accumulation_boundary()
        before = self._report_before_step() if is_boundary else None
        super().step(lr_kwargs)
        if before is not None:
            self._write_loss()
            self.step_loss = None
            self.optimizer.store.idle()
            self.last_report = self._report_after_step(before)
            self._say_if_not_finite(self.last_report)
            self.use_spare_memory()

    def _write_loss(self) -> None:
        """To DeepSpeed's monitors (``"csv_monitor"`` and the others), which get the rate from DeepSpeed alone: the loss
        of this step on the first rank."""
        if self.monitor.enabled and self.global_rank == 0 and self.step_loss is not None:
            parts = self.gradient_accumulation_steps() if self._mean_of_losses else 1
            self.monitor.write_events(
                [("Train/Samples/train_loss", self.step_loss.item() / parts, self.global_samples)]
            )

    def _say_if_not_finite(self, report: StepReport) -> None:
        """At once: a Trainer's logs leave such losses out, and the group's weights are lost from here on."""
        if self._said_not_finite or report.skipped or math.isfinite(report.grad_norm) or self.global_rank:
            return
        self._said_not_finite = True
        logger.warning(
            "step %d (group %s): the gradient norm is %s and no loss scale skips the step: its weights are not numbers "
            "any more; lower the learning rate, clip gradients, or look at this step's rows",
            report.step + 1, report.group_name, report.grad_norm,
        )  # fmt: skip

    def _report_before_step(self) -> StepReport:
        cursor, group = self.schedule.cursor, self.groups[self.schedule.active]
        return StepReport(
            step=self.global_steps,
            cycle=cursor.cycle,
            position=cursor.position,
            group=group.index,
            group_name=group.name,
            lr=0.0,
            grad_norm=0.0,
            loss_scale=self.optimizer.scaler.scale,
            skipped=False,
            state_bytes_in=0,
            state_bytes_out=0,
            grad_numel_sent=0,
            transfer_s=0.0,
            stalled_s=0.0,
            peak_bytes=0,
        )

    def _report_after_step(self, report: StepReport) -> StepReport:
        optimizer = self.optimizer
        traffic = optimizer.store.traffic.take()
        ranks = optimizer.parameters.ranks
        report.lr = optimizer.lr.latched[0]
        report.grad_norm = optimizer.grad_norm
        report.skipped = optimizer.overflow
        report.state_bytes_in, report.state_bytes_out = traffic.bytes_in, traffic.bytes_out
        report.transfer_s, report.stalled_s = traffic.transfer_s, traffic.stalled_s
        report.grad_numel_sent, ranks.grad_numel_sent = ranks.grad_numel_sent, 0
        report.peak_bytes, report.forecast_bytes = peak_bytes(), self.forecast_bytes(report.group)
        report.checkpoint_s = self.take_checkpoint_s()
        return report

    def get_lr(self) -> list[float]:
        """The latched learning rate of each param_group: what updates use, and so what logs show."""
        return list(self.optimizer.lr.latched)

    def coverage(self) -> dict[str, int]:
        """How often each trainable parameter was updated, by name."""
        return self.optimizer.coverage()

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
                self.wait_for_checkpoint()
        finally:
            self._let_go()

    def _let_go(self) -> None:
        """Also of an engine that was only made in part."""
        self._ended = True
        for hook in self._entrances:
            hook.remove()
        if hasattr(self, "savings"):
            self.savings.close()
        self.stop_forecast()
        if getattr(self, "optimizer", None) is not None:
            self.optimizer.end_training(keep_states=self._background is not None)
        elif self._weights_made is not None:
            self._weights_made.close()

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
            raise HiFTError(
                "this engine's training has ended and its states are gone: make a new engine to go on"
            )


def _end_earlier_engine(model: Any) -> None:
    """A loop that was interrupted and begun again has left one: the model must be its owner's again first."""
    reference = _engine_of.get(model) if isinstance(model, nn.Module) else None
    earlier = reference() if reference is not None else None
    if earlier is not None:
        earlier.destroy()


def _params_of(entries: Iterable[Any]) -> set[nn.Parameter]:
    """All parameters in a list of parameters or of param_group dicts."""
    params: set[nn.Parameter] = set()
    for entry in entries:
        inner = entry["params"] if isinstance(entry, dict) else [entry]
        params.update([inner] if isinstance(inner, Tensor) else inner)
    return params
