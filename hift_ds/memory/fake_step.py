"""Building a model on the fake device and stepping the real engine there. Runs in the simulation's process."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hift_ds.memory import fake_device
from hift_ds.memory.flops import FlopCounter
from hift_ds.memory.simulation import GroupPeaks, Result, Setting
from hift_ds.memory.tracker import GRADIENTS, STATES, WEIGHTS, MemoryTracker, Timeline

VISITS = 2  # the first update of a group makes its states, later ones find them


def run(setting: Setting) -> Result:
    """Step the layer groups of ``setting`` and report their peaks."""
    with fake_device.fake_device():
        _join(setting.world_size)
        device, host, flops = MemoryTracker(fake_device.NAME), MemoryTracker("cpu", block_bytes=1), FlopCounter()
        with device, host:
            device.mark("build")
            model = build_model(setting)
            device.see_all([*model.parameters(), *model.buffers()], WEIGHTS)
            weight_bytes = device.live_bytes
            engine = _engine(setting, model)
            _mark_blocks(model, device)
            _watch_states(engine, device)
            order = _indices(setting, len(engine.groups))
            result = Result(_num_blocks(model), len(engine.groups), weight_bytes, 0)
            result.groups = [_train(engine, setting, index, device, flops) for index in order]
            result.host_bytes = Timeline(host).peak(0, len(host.events)).num_bytes
            engine.destroy()
    return result


def build_model(setting: Setting) -> nn.Module:
    """The model that the setting names, on the fake device, in training mode."""
    from hift_ds.arch import find_arch
    from hift_ds.model_structure import build_on_meta, read_config

    config = read_config(setting.model, trust_remote_code=setting.trust_remote_code)
    with _real_tensors():
        model = build_on_meta(config, trust_remote_code=setting.trust_remote_code)
    if setting.num_blocks is not None:
        cut_blocks(model, find_arch(model).blocks, setting.num_blocks)
    move_to_fake_device(model, getattr(torch, setting.weight_dtype))
    return model.train()


def cut_blocks(model: nn.Module, blocks: Any, num_blocks: int) -> None:
    """Keep the first ``num_blocks`` of each stack."""
    stacks = {names[0].rpartition(".")[0] for names in blocks}
    for name in stacks:
        stack = model.get_submodule(name)
        for child in list(stack._modules)[num_blocks:]:
            del stack._modules[child]


def move_to_fake_device(model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters in ``dtype``, buffers in their own; tied ones stay tied."""
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            is_weight = isinstance(tensor, nn.Parameter)
            new = torch.empty(
                tensor.shape, dtype=dtype if is_weight and tensor.is_floating_point() else tensor.dtype,
                device=fake_device.NAME,
            )  # fmt: skip
            made[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if is_weight else new
        return made[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers, module.__dict__):
            for key, tensor in list(tensors.items()):
                if isinstance(tensor, Tensor):
                    tensors[key] = fake(tensor)


@contextmanager
def _real_tensors() -> Iterator[None]:
    """Meta tensors are made outside of the fake world, so that they cost nothing in it."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily(), torch.utils._python_dispatch._disable_current_modes():
        yield


def _join(world_size: int) -> None:
    """Be rank 0 of ``world_size`` in a process group that moves nothing."""
    import torch.distributed as dist

    from hift_ds.engine.fake_accelerator import use_fake_accelerator

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    if dist.is_initialized():
        dist.destroy_process_group()
    use_fake_accelerator(world_size)


def _engine(setting: Setting, model: nn.Module) -> Any:
    import hift_ds

    config = {
        **{k: v for k, v in setting.engine_config.items() if k != "train_batch_size"},
        "train_micro_batch_size_per_gpu": setting.batch,
        "gradient_accumulation_steps": setting.micro_batches,
    }
    engine, *_ = hift_ds.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    return engine


def _num_blocks(model: nn.Module) -> int:
    from hift_ds.arch import find_arch

    return len(find_arch(model).blocks)


def _indices(setting: Setting, num_groups: int) -> list[int]:
    if setting.groups is None:
        return list(range(num_groups))
    return [index % num_groups for index in setting.groups]


# -- watching -------------------------------------------------------------------------------------------------


def _mark_blocks(model: nn.Module, tracker: MemoryTracker) -> None:
    """Note in the log which block runs, forward and backward. No tensor is kept or made for it."""
    from hift_ds.arch import find_arch

    def before(module: nn.Module, args: Any, name: str) -> None:
        tracker.mark("forward", name)

    def after(module: nn.Module, args: Any, out: Any, name: str) -> None:
        tracker.mark("forward", "after " + name)
        first = out if isinstance(out, Tensor) else next((x for x in out if isinstance(x, Tensor)), None)
        if first is not None and first.grad_fn is not None:
            first.grad_fn.register_prehook(lambda grads: tracker.mark("backward", name))

    for names in find_arch(model).blocks:
        block = model.get_submodule(names[0])
        block.register_forward_pre_hook(lambda m, a, n=names[0]: before(m, a, n))
        block.register_forward_hook(lambda m, a, o, n=names[0]: after(m, a, o, n))
    for param in model.parameters():
        if param.requires_grad or True:
            _watch_gradient(param, tracker)


def _watch_gradient(param: nn.Parameter, tracker: MemoryTracker) -> None:
    flag = param.requires_grad
    param.requires_grad_(True)
    param.register_post_accumulate_grad_hook(lambda p: p.grad is not None and tracker.see(p.grad, GRADIENTS))
    param.requires_grad_(flag)


def _watch_states(engine: Any, tracker: MemoryTracker) -> None:
    """What a store hands out for an update is state."""
    optimizer = engine.optimizer
    for store in {id(s): s for s in (optimizer.store, optimizer.always_store)}.values():
        fetch = store.fetch

        def watched(unit: int, fetch: Any = fetch) -> dict[str, Tensor]:
            tensors = fetch(unit)
            tracker.see_all(tensors.values(), STATES)
            return tensors

        store.fetch = watched


# -- stepping -------------------------------------------------------------------------------------------------


def _train(engine: Any, setting: Setting, index: int, tracker: MemoryTracker, flops: FlopCounter) -> GroupPeaks:
    """Both visits of one group; the higher one counts."""
    visits = []
    for _ in range(VISITS):
        _activate(engine, index)
        start = len(tracker.events)
        first_mark = len(tracker.marks)
        with ExitStack() as stack:
            stack.enter_context(flops)
            _step(engine, setting, tracker, flops)
        visits.append(_peaks(engine, index, tracker, start, first_mark, flops.take()))
    return max(visits, key=lambda visit: visit.peak_bytes)


def _activate(engine: Any, index: int) -> None:
    """Make ``index`` the active group, wherever the schedule stands."""
    from hift_ds.schedule import Cursor

    schedule = engine.optimizer.schedule
    schedule.cursor = Cursor(schedule.cursor.cycle, schedule.order_of_cycle.index(index), 0)
    engine.optimizer.activate()


def _step(engine: Any, setting: Setting, tracker: MemoryTracker, flops: FlopCounter) -> None:
    for _ in range(setting.micro_batches):
        tracker.mark("forward", "below")
        flops.phase = "forward"
        loss = engine(**make_batch(engine.module, setting)).loss
        tracker.mark("backward", "head")
        flops.phase = "backward"
        engine.backward(loss)
        del loss
        if engine.is_gradient_accumulation_boundary():
            tracker.mark("update")
            flops.phase = "update"
        engine.step()


def make_batch(model: nn.Module, setting: Setting) -> dict[str, Tensor]:
    """Tokens and the labels that the model's head wants, no padding."""
    shape = (setting.batch, setting.length)
    tokens = torch.zeros(shape, dtype=torch.long, device=fake_device.NAME)
    kind = type(model).__name__
    if kind.endswith("ForSequenceClassification"):
        return {"input_ids": tokens, "labels": torch.zeros(shape[:1], dtype=torch.long, device=fake_device.NAME)}
    if kind.endswith("ForQuestionAnswering"):
        at = torch.zeros(shape[:1], dtype=torch.long, device=fake_device.NAME)
        return {"input_ids": tokens, "start_positions": at, "end_positions": at}
    return {"input_ids": tokens, "labels": tokens}


def _peaks(
    engine: Any, index: int, tracker: MemoryTracker, start: int, first_mark: int, flops: dict[str, int]
) -> GroupPeaks:
    timeline = Timeline(tracker)
    phases: dict[str, int] = {}
    stretches: dict[str, int] = {}
    best = timeline.peak(start, start)
    for mark, begin, end in timeline.stretches()[first_mark:]:
        peak = timeline.peak(begin, end)
        phases[mark.phase] = max(peak.num_bytes, phases.get(mark.phase, 0))
        place = f"{mark.phase}:{mark.place}"
        stretches[place] = max(peak.num_bytes, stretches.get(place, 0))
        best = max(best, peak, key=lambda p: p.num_bytes)
    group = engine.groups[index]
    return GroupPeaks(index, group.name, group.numel, phases, timeline.categories_at(best.event), stretches, flops)
