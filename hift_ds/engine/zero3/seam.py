"""ZeRO-3 without its optimizer, in names that DeepSpeed does not document: what is gathered when, and for how long.

``DeepSpeedZeRoOffload`` cuts the weights over the ranks and gathers each module's around its forward and backward.
What its own optimizer adds to that (gradients, masters, writing shards) is ours; nine things it does for training of
all weights are wrong or costly when backward stops at one layer group, and are put right here:

* It prefetches by a trace of the modules as they ran, one trace for all steps. Backward stops elsewhere for each
  group, so a shared trace is thrown away every other step, or promises uses that never come and keeps the whole model
  gathered. Here each group has a coordinator of its own, and one more serves evaluation.
* A module whose input needs no gradient never tells that its backward is over, so its weights stay gathered.
  :meth:`WeightShards.release` ends that after each backward.
* Its linear function keeps every input for the weight's gradient, which frozen weights never get. torch's own
  function is put back, and saved weights become references (:meth:`WeightShards.saved_by_reference`).
* A recomputed block loses its frozen weights after the first module of its backward
  (:meth:`_Coordinator._keep_recomputed`), and the weights of its last module too if more is recomputed after that.
* The host waits for each shard that comes from its memory (:meth:`_Coordinator._gather`).
* What it prefetches together is on the device twice for a while; large weights are gathered alone (``ALONE_NUMEL``).
* It lets no gather wait for the update that wrote the shards (:meth:`WeightShards._wait_for_updates`).
* Its module hooks close over the first engine that a model had, and outlive it. ``close`` removes them.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.partition_parameters import (
    InsertPostInitMethodToModuleSubClasses,
    ZeroParamStatus,
)
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator, iter_params
from deepspeed.utils import z3_leaf_module
from torch import Tensor, nn

from hift_ds.engine.zero3.host_shards import Gathered, on_the_accelerator, start_copies
from hift_ds.engine.zero3.same_on_ranks import SameOnRanks, tie_leaf_modules
from hift_ds.engine.zero3.shards import PartitionedWeight, num_shards, partitioned_weights, weight_file_of, whole_of
from hift_ds.engine.zero3.weight_file import WeightFile
from hift_ds.process_group import as_single_process
from hift_ds.store.movers import Waits

EVALUATION = -1  # the coordinator of forward passes without gradients
ALONE_NUMEL = 1 << 22  # a weight with more elements is gathered by a collective of its own


class _Coordinator(PartitionedParameterCoordinator):
    """DeepSpeed's, with a count of what it gathers and a word to us when weights have arrived."""

    shards: WeightShards
    had_trace = False
    _fetching: nn.Module | None = None  # the module for which weights are gathered

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.in_backward: set[nn.Module] = set()  # whose backward has begun and has not told of its end

    def trace_prologue(self, sub_module: nn.Module) -> None:
        if self.is_complete_trace() and self.shards.same.is_needed:
            order = self._PartitionedParameterCoordinator__submodule_order
            step = self._PartitionedParameterCoordinator__step_id
            if step >= len(order) or order[step] is not sub_module:
                self.shards.same.leaves_trace(step, sub_module)
        super().trace_prologue(sub_module)

    def fetch_sub_module(self, current_submodule: nn.Module, forward: bool) -> None:
        self._fetching = current_submodule
        if not forward:
            self.in_backward.add(current_submodule)
        params = iter_params(current_submodule, recurse=z3_leaf_module(current_submodule))
        waits = any(param.ds_status is not ZeroParamStatus.AVAILABLE for param in params)
        with self.shards.waiting() if waits else contextlib.nullcontext():
            super().fetch_sub_module(current_submodule, forward)
        self.shards.arrived(current_submodule)

    def release_sub_module(self, submodule: nn.Module, forward: bool = False) -> None:
        if forward and submodule in self.in_backward:
            return  # recomputed for that backward, which uses the weights next
        if not forward:
            self.in_backward.discard(submodule)
            if self.is_complete_trace():
                self._keep_recomputed(submodule)
        super().release_sub_module(submodule, forward)
        self.shards.left(submodule)

    def _keep_recomputed(self, submodule: nn.Module) -> None:
        """When a block is recomputed, DeepSpeed has all its frozen weights wait for the module whose backward asked for
        that, the last of the block, and releases them with it: before the rest of the block's backward, which would
        gather them again. Here those that the trace finds within ``stage3_max_reuse_distance`` wait for their own
        modules."""
        waiting: set[PartitionedWeight] = getattr(submodule, "ds_recompute_parameters", set())
        if waiting:
            own: set[PartitionedWeight] = set(iter_params(submodule, recurse=z3_leaf_module(submodule)))
            for param in (waiting & self._used_soon()) - own:
                waiting.discard(param)
                param.ds_active_sub_modules.discard(submodule.ds_id)

    def _used_soon(self) -> set[PartitionedWeight]:
        """Weights of the next modules in DeepSpeed's recorded order, up to ``stage3_max_reuse_distance`` elements."""
        left = self._PartitionedParameterCoordinator__max_reuse_dist_in_numel
        soon: set[PartitionedWeight] = set()
        order = self._PartitionedParameterCoordinator__submodule_order
        for module in itertools.islice(order, self._PartitionedParameterCoordinator__step_id, None):
            if left <= 0:
                break
            for param in iter_params(module, recurse=z3_leaf_module(module)):
                soon.add(param)
                left -= param.ds_numel
        return soon

    def upcoming(self, numel: int) -> Iterator[PartitionedWeight]:
        """The next weights of the trace that have not been asked for, about ``numel`` elements of them."""
        for entry in self._PartitionedParameterCoordinator__param_queue or ():
            if numel <= 0:
                break
            numel -= entry.param.ds_numel
            yield entry.param

    def reset_step(self) -> None:
        with as_single_process():  # it compares traces over the ranks, and reads LOCAL_RANK for that
            super().reset_step()
        self.had_trace = self.had_trace or self.is_complete_trace()

    def _PartitionedParameterCoordinator__all_gather_params(
        self, params: Iterable[PartitionedWeight], forward: bool
    ) -> None:  # noqa: N802
        missing = [param for param in params if param.ds_status is ZeroParamStatus.NOT_AVAILABLE]
        self.shards.numel_gathered += sum(param.ds_numel for param in missing)
        if missing and self.shards.same.is_needed and not self.is_complete_trace():
            assert self._fetching is not None, "gathers are a module's"
            self.shards.same.about_to_gather(missing, self._fetching)
        # DeepSpeed gathers several into one buffer and copies them out of it. A large one gains nothing by company.
        large = sorted((p for p in missing if p.ds_numel > ALONE_NUMEL), key=lambda p: p.ds_id)
        for part in [*([param] for param in large), [p for p in missing if p.ds_numel <= ALONE_NUMEL]]:
            self._gather(part, forward)

    def _gather(self, params: list[PartitionedWeight], forward: bool) -> None:
        """Gather as DeepSpeed does; where the shards are in host memory, or are all there is, without waiting for
        them."""
        plain = not params or any(hasattr(param.ds_tensor, "ds_quant_scale") for param in params)
        on_host = not plain and all(param.ds_tensor.device.type == "cpu" for param in params)
        alone = not plain and all(num_shards(param) == 1 for param in params)
        if get_accelerator().device_name() == "cpu" or not (on_host or alone):
            super()._PartitionedParameterCoordinator__all_gather_params(params, forward)
            return
        registry = self._PartitionedParameterCoordinator__inflight_param_registry
        if alone:
            with get_accelerator().stream(self.shards.copies):
                copied = start_copies(params)
            self._PartitionedParameterCoordinator__n_available_params += sum(param.ds_numel for param in params)
            registry.update(dict.fromkeys(params, copied))
            return
        assert self.shards.copies is not None
        name = "_PartitionedParameterCoordinator__allgather_stream"
        gathers = getattr(self, name)
        setattr(self, name, self.shards.copies)
        try:
            with get_accelerator().stream(self.shards.copies), on_the_accelerator(params) as sent:
                super()._PartitionedParameterCoordinator__all_gather_params(params, forward)
        finally:
            setattr(self, name, gathers)
        for handle in {registry[param] for param in params}:
            gathered = Gathered(handle, self.shards.copies, sent)
            for param in [param for param in params if registry[param] is handle]:
                registry.pop(param)
                registry[param] = gathered


class WeightShards:
    """A model's weights in ZeRO-3's shards: ``ceil(numel / ranks)`` elements of each on every rank.

    Args:
        offload: made by DeepSpeed's engine; owns the module hooks.
        active_group: names the coordinator of the next forward with gradients.
        keep_linear: leave DeepSpeed's linear function in place (autocast: torch's would save casted copies).

    Attributes:
        waits: where it is noted for how long the computation waits for weights.
        copies: the stream of shards that come from host memory; ``None`` on a CPU.
        numel_gathered: elements of whole weights that this rank has asked for so far.
        same: looks whether all ranks gather the same weights.
    """

    def __init__(self, offload: DeepSpeedZeRoOffload, active_group: Callable[[], int], keep_linear: bool) -> None:
        self._offload = offload
        self._module: nn.Module = offload.module
        self.same = SameOnRanks(self._module)
        self._ties = tie_leaf_modules(self._module) if self.same.is_needed else []
        self._active_group = active_group
        self._coordinators: dict[int, _Coordinator] = {}
        self._registered_as = self._module.ds_id  # DeepSpeed numbers modules when it registers its hooks
        self._storage_of: dict[PartitionedWeight, int] = {}
        self._param_in: dict[int, PartitionedWeight] = {}  # by address of the storage of a gathered weight
        self._file: WeightFile | None = None
        self._num_written: dict[nn.Parameter, int] = {}
        self.waits: Waits | None = None
        self.copies = get_accelerator().Stream() if get_accelerator().device_name() != "cpu" else None
        self.numel_gathered = 0
        if not keep_linear:
            restore_torch_linear()
        self._hook = self._module.register_forward_pre_hook(self._choose_coordinator, prepend=True)

    def waiting(self) -> contextlib.AbstractContextManager[None]:
        """A context around what gives the computation nothing to do but to wait for weights."""
        return contextlib.nullcontext() if self.waits is None else self.waits.around("gather")

    # -- traces -----------------------------------------------------------------------------------------------

    def _choose_coordinator(self, *_: Any) -> None:
        """Choose the active group's coordinator. Called before each forward of the whole model."""
        if self._module.ds_id != self._registered_as:  # again, by TRL after a generation: traces name modules by number
            self._registered_as = self._module.ds_id
            self._coordinators.clear()
        group = self._active_group() if torch.is_grad_enabled() else EVALUATION
        coordinator = self._coordinators.get(group)
        if coordinator is None or (coordinator.had_trace and coordinator.is_invalid_trace()):
            # DeepSpeed remembers per trace step what may be released and never forgets it: a coordinator whose trace
            # turned out wrong is not used again.
            coordinator = self._coordinators[group] = self._new_coordinator()
        self._offload.param_coordinator = coordinator
        self._wait_for_updates()

    def _wait_for_updates(self) -> None:
        """Gathers read the shards on a stream of their own, which DeepSpeed never lets wait for what wrote them: its
        optimizer synchronizes the device after each update, and ours does not."""
        for stream in (self._offload._DeepSpeedZeRoOffload__allgather_stream, self.copies):
            if stream is not None:
                stream.wait_stream(get_accelerator().current_stream())

    def _new_coordinator(self) -> _Coordinator:
        offload = self._offload
        coordinator = _Coordinator(
            prefetch_bucket_sz=offload._prefetch_bucket_sz,
            max_reuse_distance_in_numel=offload._max_reuse_distance_in_numel,
            max_available_parameters_in_numel=offload._max_available_parameters_in_numel,
            allgather_stream=offload._DeepSpeedZeRoOffload__allgather_stream,
            inflight_param_registry=offload._DeepSpeedZeRoOffload__inflight_param_registry,
            prefetch_nvme=False,
            timers=offload.timers,
            zero_quantized_weights=offload.zero_quantized_weights,
            zero_quantized_nontrainable_weights=offload.zero_quantized_nontrainable_weights,
            fast_sharding_for_leaf_module=offload.fast_sharding_for_leaf_module,
            log_trace_cache_warnings=offload.log_trace_cache_warnings,
        )
        coordinator.shards = self
        return coordinator

    # -- release ----------------------------------------------------------------------------------------------

    def release(self, changing: Iterable[Tensor] = ()) -> None:
        """Let go of every gathered weight but the persistent ones, and of those too that are about to be changed:
        a whole copy would go on being used in place of the new shards."""
        changing = set(changing)
        coordinator = self._offload.get_param_coordinator()
        if hasattr(coordinator, "release_backward_leftovers"):
            coordinator.release_backward_leftovers()
        if isinstance(coordinator, _Coordinator):
            coordinator.in_backward.clear()
        in_flight = self._offload._DeepSpeedZeRoOffload__inflight_param_registry
        for param in partitioned_weights(self._module):
            if param in in_flight:
                in_flight.pop(param).wait()
            param.ds_active_sub_modules.clear()
            if param.ds_status is ZeroParamStatus.AVAILABLE and (not param.ds_persist or param in changing):
                param.partition()

    def gathered(self) -> list[PartitionedWeight]:
        """The weights of which this rank holds a whole copy now."""
        return [p for p in partitioned_weights(self._module) if p.ds_status is not ZeroParamStatus.NOT_AVAILABLE]

    def written(self, params: Iterable[nn.Parameter]) -> None:
        """Note that the shards of weights are changed while backward goes on: what it has saved of them may not be read
        any more."""
        for param in params:
            self._num_written[param] = self._num_written.get(param, 0) + 1

    # -- weights in a file ------------------------------------------------------------------------------------

    def park_in_file(self, folder: Path) -> None:
        """Move this rank's shards from host memory to a file in ``folder``. Persistent weights stay where they are.

        Raises:
            StateStoreError: the folder cannot hold them.
        """
        self._file = weight_file_of(self._module)
        if self._file is not None:
            return  # loaded into it
        weights = partitioned_weights(self._module)
        parked = [p for p in weights if not p.ds_persist and p.ds_tensor.device.type == "cpu"]
        self._file = WeightFile(folder, sum(WeightFile.room(p.ds_tensor.nbytes) for p in parked))
        for param in parked:
            placed = self._file.reserve(param.ds_tensor.numel(), param.dtype)
            placed.copy_(param.ds_tensor)
            self._file.let_go(placed)
            param.ds_tensor.data = placed

    def _read_ahead(self) -> None:
        coordinator = self._offload.get_param_coordinator()
        if self._file is not None and isinstance(coordinator, _Coordinator):
            for param in coordinator.upcoming(self._offload._prefetch_bucket_sz):
                self._file.will_need(param.ds_tensor)

    def left(self, module: nn.Module) -> None:
        """Note that ``module`` is done with its weights for now."""
        if self._file is not None:
            for param in partitioned_weights(module, recurse=z3_leaf_module(module)):
                if param.ds_status is ZeroParamStatus.NOT_AVAILABLE:
                    self._file.let_go(param.ds_tensor)

    # -- saved weights ----------------------------------------------------------------------------------------

    def arrived(self, module: nn.Module) -> None:
        """Note that the weights of ``module`` are whole now; those of its children too if it is a leaf to DeepSpeed
        (MoE)."""
        self._read_ahead()
        for param in partitioned_weights(module, recurse=z3_leaf_module(module)):
            if param.ds_status is not ZeroParamStatus.AVAILABLE or param.data_ptr() == param.ds_tensor.data_ptr():
                # On one rank without offload the shard is the weight: nothing is ever copied or released.
                continue
            address = param.untyped_storage().data_ptr()
            before = self._storage_of.get(param)
            if before is not None and before != address and self._param_in.get(before) is param:
                del self._param_in[before]
            self._storage_of[param] = address
            self._param_in[address] = param  # may have been another weight's meanwhile

    @contextlib.contextmanager
    def saved_by_reference(self) -> Iterator[None]:
        """Inside this block autograd saves a gathered weight, or a view of one, as "that weight, these strides".

        Saving the tensor itself (a linear layer saves its transposed weight, an expert its slice of all experts)
        would keep the gathered copy alive from forward to backward, for every layer at once.
        """
        outer = torch._C._autograd._top_saved_tensors_default_hooks(False)
        pack_other, unpack_other = outer if outer is not None else (_with_version, _unwritten)

        def pack(tensor: Tensor) -> object:
            param = self._param_in.get(tensor.untyped_storage().data_ptr()) if tensor.numel() else None
            if param is None or param.ds_status is not ZeroParamStatus.AVAILABLE or not _shares(tensor, param):
                return pack_other(tensor)
            offset = int(tensor.storage_offset() - param.storage_offset())
            return _WeightView(param, tensor.shape, tensor.stride(), offset, self._num_written.get(param, 0))

        def unpack(saved: object) -> Tensor:
            if not isinstance(saved, _WeightView):
                return unpack_other(saved)
            if saved.version != self._num_written.get(saved.param, 0):
                raise RuntimeError(f"{_MODIFIED}: a weight of shape {tuple(saved.param.ds_shape)}")
            available = saved.param.ds_status is ZeroParamStatus.AVAILABLE
            return saved.of(saved.param.data if available else whole_of(saved.param))

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield

    @contextlib.contextmanager
    def saved_weights_say_that_they_are_whole(self) -> Iterator[None]:
        """Inside this block, which is a backward, a tensor that is no parameter answers ``ds_status``.

        What autograd gives back of a saved parameter that was packed is a plain tensor, here a whole one; a function
        with a backward of its own (TRL's chunked losses) asks of it whether it must be gathered.
        """
        if hasattr(Tensor, "ds_status"):
            yield
            return
        Tensor.ds_status = ZeroParamStatus.AVAILABLE  # type: ignore[attr-defined]  # DeepSpeed's name, on parameters only
        try:
            yield
        finally:
            del Tensor.ds_status  # type: ignore[attr-defined]  # set above

    @property
    def offload(self) -> DeepSpeedZeRoOffload:
        """DeepSpeed's object with the module hooks: TRL takes them off for the time in which a model generates."""
        return self._offload

    def close(self) -> None:
        """Give back a model without hooks. The weights stay in shards."""
        self.release(self._module.parameters())
        for hook in (self._hook, *self._ties):
            hook.remove()
        self._offload.destroy()
        for module in self._module.modules():
            for name in ("pre_bwd_fn", "post_bwd_fn"):
                module.__dict__.pop(name, None)
        self._coordinators.clear()
        self._param_in.clear()
        self._storage_of.clear()


class _WeightView:
    """A view of a weight that may be released and gathered again meanwhile."""

    __slots__ = ("param", "shape", "strides", "offset", "version")

    def __init__(
        self, param: PartitionedWeight, shape: torch.Size, strides: tuple[int, ...], offset: int, version: int
    ) -> None:
        self.param, self.shape, self.strides = param, shape, strides
        self.offset, self.version = offset, version

    def of(self, weight: Tensor) -> Tensor:
        return weight.as_strided(self.shape, self.strides, weight.storage_offset() + self.offset)


_MODIFIED = "one of the variables needed for gradient computation has been modified by an inplace operation"


def _with_version(tensor: Tensor) -> tuple[Tensor, int]:
    """Through hooks autograd does not look for writes to what it has saved; without hooks it does."""
    return tensor, tensor._version


def _unwritten(saved: tuple[Tensor, int]) -> Tensor:
    """Raises RuntimeError, as autograd would, if it was written to."""
    tensor, version = saved
    if tensor._version != version:
        raise RuntimeError(f"{_MODIFIED}: a tensor of shape {tuple(tensor.shape)}")
    return tensor


def _shares(tensor: Tensor, param: nn.Parameter) -> bool:
    return tensor.dtype == param.dtype and tensor.untyped_storage().data_ptr() == param.untyped_storage().data_ptr()


def restore_torch_linear() -> None:
    """Undo the replacement of ``torch.nn.functional.linear`` that ZeRO-3 makes for the whole process."""
    original = getattr(InsertPostInitMethodToModuleSubClasses, "linear_bk", None)
    if original is not None:
        torch.nn.functional.linear = original
