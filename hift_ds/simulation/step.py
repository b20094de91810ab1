"""Building a model on the fake device and stepping the real engine there. Runs in the simulation's process."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from hift_ds.engine.engine import HiFTEngine
from hift_ds.engine.initialize import building
from hift_ds.forecast.setting import (
    BETWEEN,
    Bytes,
    GroupStep,
    Result,
    Setting,
    deepspeed_config,
    make_batch,
    model_config,
)
from hift_ds.hf.model_structure import build_on_meta
from hift_ds.layers.arch import ArchSpec, find_arch
from hift_ds.ranks import launch_variables
from hift_ds.simulation import device as fake_device
from hift_ds.simulation.accelerator import join_fake_ranks, use_fake_accelerator
from hift_ds.simulation.flops import FlopCounter
from hift_ds.simulation.tracker import GRADIENTS, STATES, WEIGHTS, MemoryTracker, Peak, Timeline, Watch
from hift_ds.store.encoded import EncodedStateStore
from hift_ds.store.machine import HostBytes, Machine
from hift_ds.store.split import SplitStateStore

PHASES = ("forward", "backward", "update")
PARKED = "parked"  # a category that is not reported


def run(setting: Setting) -> Result:
    """Step the layer groups of ``setting`` and report what was alive when."""
    with fake_device.fake_device(setting.on_host) as name:
        _join(setting)
        device, host, flops = MemoryTracker(name), MemoryTracker("cpu", 1, page_locked=True), FlopCounter()
        with Watch(host, device, flops=flops):
            device.mark("build")
            model = build_model(setting, name)
            device.see_all([*model.parameters(), *model.buffers()], WEIGHTS)
            weight_bytes, numel = device.live_bytes, sum(param.numel() for param in model.parameters())
            arch = find_arch(model)
            engine = _engine(setting, model)
            device.see_all(engine.optimizer.parameters.held(model.parameters()), WEIGHTS)
            _mark_blocks(model, arch, device)
            _mark_gradients(engine, device)
            _mark_states(engine, device)
            _mark_parked(engine, device)
            result = Result(weight_bytes, numel)
            _warm_up(engine, device)
            engine.optimizer.skip_updates = not setting.updates
            for index in _indices(setting, len(engine.groups)):
                for _ in range(setting.visits):
                    step = _train(engine, setting, index, device, host, flops)
                result.steps.append(step)
            engine.destroy()
    return result


# -- the model ------------------------------------------------------------------------------------------------


def build_model(setting: Setting, device: str) -> nn.Module:
    """The model that the setting names, on ``device``, in training mode."""
    config = model_config(setting)
    with unset_fake_temporarily():
        model = build_on_meta(config, trust_remote_code=setting.trust_remote_code)
    if setting.num_blocks is not None:
        cut_blocks(model, find_arch(model), setting.num_blocks)
    make_real(model, getattr(torch, setting.weight_dtype), device)
    return model.train()


def cut_blocks(model: nn.Module, arch: ArchSpec, num_blocks: int) -> None:
    """Keep the first ``num_blocks`` of each stack."""
    for name in {names[0].rpartition(".")[0] for names in arch.blocks}:
        stack = model.get_submodule(name)
        for child in list(stack._modules)[num_blocks:]:
            del stack._modules[child]


def make_real(model: nn.Module, dtype: torch.dtype, device: str) -> None:
    """Bring a model from meta to ``device``: parameters in ``dtype``, buffers in their own; tied ones stay tied."""
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            is_weight = isinstance(tensor, nn.Parameter)
            dtype_of_new = dtype if is_weight and tensor.is_floating_point() else tensor.dtype
            new = torch.empty(tensor.shape, dtype=dtype_of_new, device=device)
            made[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if is_weight else new
        return made[id(tensor)]

    for module in model.modules():
        places: list[dict[str, Any]] = [module._parameters, module._buffers, module.__dict__]
        for tensors in places:
            for key, tensor in list(tensors.items()):
                if isinstance(tensor, Tensor):
                    tensors[key] = fake(tensor)


# -- the engine -----------------------------------------------------------------------------------------------


def _join(setting: Setting) -> None:
    """Be rank 0 in a process group that moves nothing."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    os.environ.update(launch_variables(rank=0, world_size=setting.world_size, port=29500))  # no socket is made
    if not dist.is_initialized():
        join_fake_ranks(setting.world_size)
        if not setting.on_host:
            use_fake_accelerator()
    assert dist.get_world_size() == setting.world_size, "one process simulates one number of ranks"


class SimulatedEngine(HiFTEngine):
    """The real engine where this machine's memory says nothing about the one that is asked about."""

    machine = Machine(HostBytes(1 << 60, 1 << 60), copies_on_threads=False)  # fake tensors are for one thread
    hollow_weights = False


def _engine(setting: Setting, model: nn.Module) -> HiFTEngine:
    config = deepspeed_config(setting)
    config["hift"] = _parked_in_host_memory(config["hift"])
    arguments = {"model": model, "model_parameters": list(model.parameters())}
    with building(arguments, config, SimulatedEngine):
        engine, *_ = deepspeed.initialize(**arguments, config=config)
    return engine


def _parked_in_host_memory(block: dict[str, Any]) -> dict[str, Any]:
    """The block with states in host memory. On the device, those that rest on disk look the same, and no file is wanted
    here. Nor are page-locked slabs."""
    state = {**(block.get("state") or {}), "pin_memory": False}
    if state.get("residency") in ("disk", "auto"):
        state["residency"] = "host"
        state.pop("path", None)
        state.pop("io", None)
    return {**block, "state": state}


# -- watching -------------------------------------------------------------------------------------------------


def _mark_blocks(model: nn.Module, arch: ArchSpec, tracker: MemoryTracker) -> None:
    """Note in the log which block runs, forward and backward. No tensor is kept or made for it."""

    def before(place: str) -> None:
        tracker.mark("forward", place)

    def after(out: Tensor | tuple[object, ...], place: str) -> None:
        tracker.mark("forward", f"after {place}")
        first = out if isinstance(out, Tensor) else next((x for x in out if isinstance(x, Tensor)), None)
        if first is not None and first.grad_fn is not None:
            first.grad_fn.register_prehook(lambda grads: tracker.mark("backward", place))

    for index, names in enumerate(arch.blocks):
        block = model.get_submodule(names[0])
        block.register_forward_pre_hook(lambda module, args, place=str(index): before(place))
        block.register_forward_hook(lambda module, args, out, place=str(index): after(out, place))


def _mark_gradients(engine: HiFTEngine, tracker: MemoryTracker) -> None:
    def mark(param: nn.Parameter) -> None:
        grad = param.grad if param.grad is not None else engine.optimizer.parameters.pending(param)
        if grad is not None:
            tracker.see(grad, GRADIENTS)

    model = engine.module
    engine.optimizer.parameters.sums.hooks.add(model.parameters(), mark)


def _mark_states(engine: HiFTEngine, tracker: MemoryTracker) -> None:
    """What a store hands out for an update is state."""
    for store in (engine.optimizer.states.store, engine.optimizer.states.always_store):
        store.on_fetch = lambda tensors: tracker.see_all(tensors.values(), STATES)


def _mark_parked(engine: HiFTEngine, tracker: MemoryTracker) -> None:
    """States at rest in host memory are not on the device, even where the host stands in for it."""
    tracker.see_all(engine.optimizer.states.store.tensors_at_rest(), PARKED)


# -- stepping -------------------------------------------------------------------------------------------------


def _indices(setting: Setting, num_groups: int) -> list[int]:
    if setting.groups is None:
        return list(range(num_groups))
    return sorted({index % num_groups for index in setting.groups if -num_groups <= index < num_groups})


def _train(
    engine: HiFTEngine, setting: Setting, index: int, device: MemoryTracker, host: MemoryTracker, flops: FlopCounter
) -> GroupStep:
    """A step of one group."""
    first_mark, host_start, host_bytes = len(device.marks), len(host.events), host.live_bytes
    gathered = -_numel_gathered(engine)
    _activate(engine, index)
    _step(engine, setting, device, flops)
    gathered += _numel_gathered(engine)
    flops.phase = None
    if setting.updates and setting.second_update:
        _activate(engine, index)
        if engine.optimizer.updates_in_backward:
            _step(engine, setting, device, FlopCounter())
        else:
            _update_again(engine, setting, device)
    offloaded = Timeline(host).peak(host_start, len(host.events)).num_bytes - host_bytes
    group, places = engine.groups[index], _places(engine, setting, index, device, first_mark)
    states = state_bytes(engine, index)
    return GroupStep(index, group.name, group.numel, places, flops.take(), states, offloaded, gathered)


def _numel_gathered(engine: HiFTEngine) -> int:
    """The elements of partitioned weights that were gathered so far."""
    return getattr(getattr(engine.optimizer.parameters, "shards", None), "numel_gathered", 0)


def _warm_up(engine: HiFTEngine, tracker: MemoryTracker) -> None:
    """Allocate the prefetch slots before the first counted step: in a run they exist from the first update on."""
    optimizer = engine.optimizer
    for group in list(optimizer.groups.values())[:2]:  # as many as there are slots
        optimizer.states.prefetch(group)
    tracker.see_all(optimizer.states.store.slot_tensors(), STATES)


def _activate(engine: HiFTEngine, index: int) -> None:
    """Make ``index`` the active group, wherever the schedule stands."""
    engine.schedule.move_to(index)
    engine.optimizer.activate()


def state_bytes(engine: HiFTEngine, index: int) -> int:
    """Bytes of the masters and states of group ``index``, in the form in which they rest."""
    optimizer = engine.optimizer
    store = optimizer.states.store_of(optimizer.groups[index])
    assert isinstance(store, EncodedStateStore | SplitStateStore)
    return sum(store.num_bytes(chunk.id) for chunk in optimizer.groups[index].chunks)


def _step(engine: HiFTEngine, setting: Setting, tracker: MemoryTracker, flops: FlopCounter) -> None:
    for _ in range(setting.micro_batches):
        batch = make_batch(engine.module, setting.batch, setting.length, tracker.device_type, setting.padded)
        tracker.mark("forward", "-1")
        flops.phase = "forward"
        loss = engine(**batch).loss
        tracker.mark("backward", "loss")
        flops.phase = "backward"
        engine.backward(loss)
        del loss
        if engine.is_gradient_accumulation_boundary():
            tracker.mark("update")
            flops.phase = "update"
        engine.step()


def _update_again(engine: HiFTEngine, setting: Setting, tracker: MemoryTracker) -> None:
    """The update alone, with gradients as backward would leave them."""
    optimizer = engine.optimizer
    tracker.mark("gradients")
    for group in optimizer.active_groups:
        for member in group.members:
            sums = setting.micro_batches > 1 and member.param.is_floating_point()
            dtype = torch.float32 if sums else member.param.dtype
            grad = torch.empty(member.shape, dtype=dtype, device=tracker.device_type)
            tracker.see(grad, GRADIENTS)
            optimizer.parameters.set_pending(member.param, grad)
            del grad
    tracker.mark("update")
    optimizer.reduce_gradients()
    optimizer.step()
    tracker.mark("between steps")


def _places(
    engine: HiFTEngine, setting: Setting, index: int, tracker: MemoryTracker, first_mark: int
) -> dict[str, Bytes]:
    """What was alive at the peak of each place, the places named as seen from the active group."""
    timeline = Timeline(tracker)
    num_blocks = len(find_arch(engine.module).blocks)
    blocks = range(engine.savings.lowest_block(index), num_blocks)
    kept = engine.hift.activations.blocks_kept
    phases = PHASES if setting.updates else PHASES[:-1]
    peaks: dict[str, Peak] = {}
    for mark, begin, end in timeline.stretches()[first_mark:]:
        if mark.phase not in phases:
            continue
        peak = timeline.peak(begin, end)
        place = f"{mark.phase}:{_seen_from(blocks, kept, mark.place)}"
        peaks[place] = max(peaks.get(place, peak), peak, key=lambda p: p.num_bytes)
    found = {place: timeline.categories_at(peak.event) for place, peak in peaks.items()}
    return {place: {name: n for name, n in sums.items() if name != PARKED} for place, sums in found.items()}


def _seen_from(blocks: range, kept: int, place: str) -> str:
    """A block's place as seen from the active group; ``blocks`` are those that its gradients pass. Between the places
    named here memory is linear in the block, so they stand for all."""
    name = place.removeprefix("after ")
    if not name.lstrip("-").isdigit():
        return place
    block, last = int(name), blocks.stop - 1
    if place.startswith("after ") and block == last:
        return "head"
    if block < blocks.start:
        return "below"
    if block == blocks.start:
        return "lowest block"
    if block == last:
        return "last block"
    if block == last - kept:
        return "last recomputed block"
    return "second block" if block == blocks.start + 1 else BETWEEN
