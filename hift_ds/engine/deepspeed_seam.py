"""The file that touches names DeepSpeed does not document; ``zero3/seam.py`` and ``zero3/shards.py`` do so for stage 3.

``SeamEngine`` overrides the few engine methods at which HiFT differs from stock ZeRO; everything else (config,
launcher, process groups, batch arithmetic, monitors, timers) stays DeepSpeed's. Stock ZeRO with toggled
``requires_grad`` is silently wrong (inactive weights drift), so its optimizers are never built: this engine puts
its own in their place. ``tests/unit/test_deepspeed_seam.py`` checks every name used here.

Two names are rebound, each for a ``with`` block: ``deepspeed.initialize`` has no plug-in point for the engine class,
but looks it up as a global of the ``deepspeed`` module (``engine_class``, while one engine is built); and frameworks
call ``deepspeed.initialize`` by themselves (``initialize_becomes``, while they may).
"""

from __future__ import annotations

import base64
import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import hjson
import torch
from deepspeed import comm as deepspeed_comm
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.base_optimizer import DeepSpeedOptimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from hift_ds.activations.switches import ActivationSavings
from hift_ds.collectives import Ranks
from hift_ds.config import HiFTConfig, read_json_file
from hift_ds.engine.zero3.seam import WeightShards
from hift_ds.engine.zero3.shards import (
    as_if_parked_on_host,
    into_page_locked_slabs,
    into_this_job,
    num_shards,
    page_locks_weights,
    partitioned_weights,
    weights_folder,
)
from hift_ds.errors import ConfigError
from hift_ds.layers.arch import whole_shape
from hift_ds.layers.grouping import Partition
from hift_ds.optim.group_optimizer import GroupOptimizer
from hift_ds.optim.in_backward import InBackwardOptimizer
from hift_ds.optim.piecewise import PieceState, states_are_the_engines, weights_are_fixed
from hift_ds.process_group import world_rank_and_size
from hift_ds.store.machine import THIS_MACHINE, Machine

logger = logging.getLogger(__name__)

# What ``deepspeed.initialize`` takes as ``model_parameters``, and as ``optimizer``.
ParamEntries = Sequence[nn.Parameter] | Sequence[dict[str, Any]]
ClientOptimizer = torch.optim.Optimizer | Callable[[ParamEntries], torch.optim.Optimizer] | None


class HiFTOptimizer(DeepSpeedOptimizer, GroupOptimizer):
    """What ``engine.optimizer`` is: a :class:`GroupOptimizer` under the names that DeepSpeed's engine reads.

    Not a ``ZeROOptimizer``: that would make the engine count gradient hooks, which change between releases.
    """

    dp_process_group: ProcessGroup | None = None  # read by _configure_checkpointing

    @property
    def cur_scale(self) -> float:
        """The loss scale; 1.0 without one."""
        return self.scaler.scale

    @property
    def _global_grad_norm(self) -> float:
        return self.grad_norm

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Do nothing: the engine's own answer is asked for in ``allreduce_gradients``."""

    @property
    def parameter_offload(self) -> DeepSpeedZeRoOffload:
        """What gathers weights with stage 3, under the name at which TRL looks for it; else there is no such name."""
        shards = getattr(self.parameters, "shards", None)
        if shards is None:
            raise AttributeError("parameter_offload")
        return shards.offload

    # Of a torch optimizer, for schedulers and libraries that look:

    @property
    def defaults(self) -> dict[str, Any]:
        """The options that the optimizer was made with."""
        return self.optimizer.defaults

    @property
    def state(self) -> dict[Tensor, PieceState]:
        """Empty: states rest in the store, and are there for an update only."""
        return self.optimizer.state

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's; options may be changed between steps, as schedulers do."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        if [list(map(id, g["params"])) for g in groups] != [list(map(id, g["params"])) for g in self.param_groups]:
            self.add_param_group({})
        for mine, new in zip(self.param_groups, groups, strict=True):
            mine.update(new)

    def add_param_group(self, group: dict[str, Any]) -> None:
        """Refuse: the parameters are fixed when the engine is made.

        Raises:
            ConfigError: always.
        """
        raise weights_are_fixed()

    def state_dict(self) -> dict[str, Any]:
        """Empty: states are saved per group by :mod:`hift_ds.checkpoint`."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Accept what ``state_dict`` gave, which is empty.

        Raises:
            ConfigError: it is another optimizer's.
        """
        if state:
            raise states_are_the_engines()

    def enter(self) -> None:
        """Get ready for a forward that begins. If it is one with gradients, the active groups get their flags; the
        first such forward of a step starts the step's count of memory."""
        if not torch.is_grad_enabled():
            self.waits.skip()
        elif self.flags.shown:
            if not self.flags.step_began:  # what came before, an evaluation say, is not this step's
                restart_peak_bytes()
                self.store.busy()
                self.waits.busy()
            self.activate()

    def leave(self) -> None:
        """Note that a step's work has been given to the device, all of it."""
        self.store.idle()
        self.waits.idle()

    def destroy(self) -> None:
        """Let go of the weights; DeepSpeed's engine calls this."""
        self.close()


class HiFTInBackwardOptimizer(HiFTOptimizer, InBackwardOptimizer):
    """:class:`HiFTOptimizer` with the update in backward."""


class SeamEngine(DeepSpeedEngine):
    """DeepSpeed's engine with its optimizer, gradient reduction and clipping handed over to hooks.

    Attributes that a subclass sets, and that its collaborators read: ``hift`` (the config's block), ``partition`` (the
    model's layer groups) and ``savings`` (the switches of ``"activations"`` at work). A simulation has other values of
    ``machine`` (what the state store knows of where it runs) and ``hollow_weights`` (an optimizer's constructor is
    shown weights without elements).
    """

    hift: HiFTConfig
    partition: Partition
    savings: ActivationSavings
    optimizer: HiFTOptimizer
    machine: Machine = THIS_MACHINE
    hollow_weights = True

    def before_cast(self, model: torch.nn.Module) -> None:
        """Look at the model, which has its checkpoint's dtypes and may still be on the host."""
        raise NotImplementedError

    def build_optimizers(
        self, client_optimizer: ClientOptimizer, model_parameters: ParamEntries
    ) -> tuple[torch.optim.Optimizer, HiFTOptimizer]:
        """Make (basic optimizer, what ``engine.optimizer`` becomes). The model is cast, placed and broadcast."""
        raise NotImplementedError

    def _do_sanity_check(self) -> None:
        accelerator = get_accelerator()
        # Computes in fp16 too, slowly; DeepSpeed says it does not.
        on_cpu = accelerator.device_name() == "cpu"
        if self.fp16_enabled() and not (on_cpu or accelerator.is_fp16_supported()):
            raise ConfigError('"fp16.enabled": this accelerator does not compute in fp16; use "bf16" or neither')
        if self.bfloat16_enabled() and not (on_cpu or accelerator.is_bf16_supported()):
            raise ConfigError('"bf16.enabled": this accelerator does not compute in bf16; use "fp16" or neither')
        if not self.client_optimizer and self.optimizer_name() is None:
            raise ConfigError('"optimizer": missing; add one to the DeepSpeed config or pass optimizer= to initialize')
        self._assert_valid_mixed_precision_config()
        self._leave_the_device_running()

    def _leave_the_device_running(self) -> None:
        """DeepSpeed's throughput timer synchronizes the device at the start of every forward and at the end of every
        step, side streams included: no copy of states would be behind anything. It measures without, unless told to."""
        told = (self.config.get("timers") or {}).get("throughput") or {}
        self._config.timers_config.synchronized = bool(told.get("synchronized", False))
        if told.get("enabled", True) and self._config.timers_config.synchronized and world_rank_and_size()[0] == 0:
            logger.warning(
                '"timers.throughput.synchronized": true waits for the device twice a step, so that no transfer of '
                "optimizer states is hidden; leave it out"
            )

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the whole model as DeepSpeed does, and say what that leads to."""
        self._say_what_compiling_leads_to()
        super().compile(*args, **kwargs)

    def _say_what_compiling_leads_to(self) -> None:
        if self.hift.group_size != "all" and world_rank_and_size()[0] == 0:
            logger.warning(
                "a model that is compiled whole is compiled anew for each layer group, and after eight of them runs "
                "uncompiled without a word; compile the blocks: for block in model.model.layers: block.compile()"
            )

    def _configure_distributed_model(self, model: torch.nn.Module) -> None:
        if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
            self._say_what_compiling_leads_to()
        self.before_cast(model)
        with _without_scalars(model):
            super()._configure_distributed_model(model)
        if self.has_moe_layers:
            raise ConfigError('DeepSpeed MoE layers (expert parallelism) are not supported with a "hift" block')

    def _configure_optimizer(self, client_optimizer: ClientOptimizer, model_parameters: ParamEntries) -> None:
        self.torch_autocast_z0_gradscaler = None  # fp16 autocast uses our loss scale, which skips exactly
        self.basic_optimizer, self.optimizer = self.build_optimizers(client_optimizer, model_parameters)
        self.optimizer.dp_process_group = self.seq_data_parallel_group

    def allreduce_gradients(self, bucket_size: int = 0) -> None:
        """Called by DeepSpeed after each micro-batch's backward; gradients are reduced at the accumulation boundary."""
        self.optimizer.end_backward(self.is_gradient_accumulation_boundary())

    def gradient_clipping(self) -> float:
        """The largest gradient norm: what the config says, and 0 (no clipping) if it says nothing. DeepSpeed's own
        default became 1.0."""
        return float(self.config.get("gradient_clipping") or 0.0)

    def clip_fp32_gradients(self) -> None:
        """Clipping is part of the optimizer's step, where the global norm is known."""

    def run_backward(self, loss: Tensor, retain_graph: bool, scale_wrt_gas: bool) -> None:
        """Do DeepSpeed's ``backward`` of ``loss`` (0-dim). For one that no active parameter contributed to (an unused
        pooler, say) do only what comes after it, so that all ranks run the same collectives."""
        if loss.requires_grad:
            with self.optimizer.parameters.during_backward():
                super().backward(loss, retain_graph=retain_graph, scale_wrt_gas=scale_wrt_gas)
        else:
            self._backward_epilogue()

    def begin_step_again(self) -> None:
        """Let the next micro-batch be the first of its optimizer step."""
        self.micro_steps -= self.micro_steps % self.gradient_accumulation_steps()

    def partition_weights(self, active_group: Callable[[], int]) -> WeightShards:
        """Cut the weights over the ranks (stage 3), those that ``deepspeed.zero.Init`` has not cut already."""
        folder = weights_folder(self._config.zero_config)
        page_locks = not folder and page_locks_weights(self._config.zero_config)
        into_this_job(self.module)
        for name, param in self.module.named_parameters():
            if param.ndim == 0 or 0 in whole_shape(param):
                what = "a dimension" if param.ndim == 0 else "elements"
                raise ConfigError(f"{name}: ZeRO-3 cannot cut a weight without {what}; use stage 0, 1 or 2")
        with as_if_parked_on_host(self) if folder or page_locks else contextlib.nullcontext():
            # With optimizer=None ZeRO-3 gathers and releases weights and steps nothing: stepping is ours.
            offload = self._configure_zero_optimizer(optimizer=None)
        ranks = self.replica_ranks().world_size
        if any(num_shards(param) != ranks for param in partitioned_weights(self.module)):
            raise ConfigError(
                f"deepspeed.zero.Init: weights are cut over other ranks than the {ranks} data-parallel ones; "
                "leave data_parallel_group= out"
            )
        shards = WeightShards(offload, active_group, keep_linear=self.torch_autocast_enabled())
        if folder:
            shards.park_in_file(folder)
        if page_locks:
            into_page_locked_slabs(self.module)
        return shards

    def remove_deepspeed_hooks(self) -> None:
        """Remove the hooks on the model, which ``destroy`` leaves there."""
        for name in ("module_forward_pre_hook", "module_forward_post_hook"):
            hook = getattr(self, name, None)
            if hook is not None:
                hook.remove()

    # -- facts ------------------------------------------------------------------------------------------------

    def replica_ranks(self) -> Ranks:
        """The ranks that hold replicas of the weights."""
        return Ranks(deepspeed_comm, self.seq_data_parallel_group, self.sequence_parallel_size)

    def requested_comm_dtype(self) -> torch.dtype:
        """``communication_data_type`` if the user set one, else fp32."""
        return self._config.communication_data_type or torch.float32

    def low_dtype(self) -> torch.dtype | None:
        """bf16 or fp16, if the config asks for weights in it."""
        if self.bfloat16_enabled():
            return torch.bfloat16
        return torch.float16 if self.fp16_enabled() else None


@contextlib.contextmanager
def _without_scalars(model: torch.nn.Module) -> Iterator[None]:
    """Inside this block weights without a dimension (CLIP's ``logit_scale``) have one: DeepSpeed broadcasts weights as
    bytes, and cannot view those so (0.19.8)."""
    scalars = [param for param in model.parameters() if param.ndim == 0]
    for param in scalars:
        param.data = param.data.view(1)
    try:
        yield
    finally:
        for param in scalars:
            param.data = param.data.view(())


def restart_peak_bytes() -> None:
    """:func:`peak_bytes` counts from here on. So does ``torch.cuda.max_memory_allocated``: there is one counter."""
    get_accelerator().reset_peak_memory_stats()


def peak_bytes() -> int:
    """Highest allocation on the accelerator since ``restart_peak_bytes``; of host memory on a CPU-only machine."""
    return int(get_accelerator().max_memory_allocated() or 0)


def finish_device_work() -> None:
    """Wait until the accelerator has done all that it was given; without one there is nothing to wait for."""
    get_accelerator().synchronize()


def device_bytes() -> int:
    """Memory of the accelerator; of the host on a CPU-only machine."""
    return int(get_accelerator().total_memory())


def config_dict(config: Any, args: Any, config_params: Any) -> dict[str, Any]:
    """The DeepSpeed config as a dict, from wherever ``deepspeed.initialize`` would take it.

    Raises:
        ConfigError: no config, or two; a path that does not exist or does not parse.
    """
    source, named = config if config is not None else config_params, getattr(args, "deepspeed_config", None)
    if source is not None and named is not None:
        raise ConfigError(f"config= was given, and --deepspeed_config {named} too; leave one of the two out")
    if source is None:
        source = named
    if source is None:
        raise ConfigError("no DeepSpeed config: pass config= (a dict or the path of a JSON file) or --deepspeed_config")
    if isinstance(source, Mapping):
        return dict(source)
    if isinstance(source, str | Path) and os.path.isfile(source):
        return read_json_file(Path(source))
    if isinstance(source, Path):
        source = str(source)
    try:  # DeepSpeed's launcher hands a config on as base64
        return hjson.loads(base64.urlsafe_b64decode(source).decode())
    except (TypeError, ValueError):
        raise ConfigError(f"DeepSpeed config {source!r}: expected a dict or an existing JSON file") from None


@contextlib.contextmanager
def checkpoints_without_code() -> Iterator[None]:
    """Inside this block DeepSpeed's own checkpoints (``mp_rank_*.pt``) are read as tensors and plain values, and of its
    classes the few that it writes itself; DeepSpeed would execute whatever else their pickles name."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    name, written = (
        "TORCH_FORCE_WEIGHTS_ONLY_LOAD",
        [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address],
    )
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals(written):
            yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextlib.contextmanager
def engine_class(cls: type[DeepSpeedEngine]) -> Iterator[None]:
    """``deepspeed.initialize`` builds ``cls`` inside this block."""
    stock = deepspeed.DeepSpeedEngine
    deepspeed.DeepSpeedEngine = cls
    try:
        yield
    finally:
        deepspeed.DeepSpeedEngine = stock


_replacements: list[list[Any]] = []  # in the order of their blocks: what deepspeed.initialize is, and was before


@contextlib.contextmanager
def initialize_becomes(replacement: Callable[..., Any]) -> Iterator[None]:
    """``deepspeed.initialize`` is ``replacement`` inside this block. Of several blocks any may end first.
    ``DeepSpeedEngine`` stays what it is: libraries unwrap models by asking for it."""
    entry = [replacement, deepspeed.initialize]
    _replacements.append(entry)
    deepspeed.initialize = replacement
    try:
        yield
    finally:
        above = _replacements.index(entry) + 1
        if above < len(_replacements) and _replacements[above][1] is replacement:
            _replacements[above][1] = entry[1]
        elif deepspeed.initialize is replacement:
            deepspeed.initialize = entry[1]
        _replacements.remove(entry)
