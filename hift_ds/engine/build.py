"""What an engine is put together from: groups, optimizer, states. Free functions over a few facts of the run."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from hift_ds.engine.deepspeed_seam import (
    ClientOptimizer,
    HiFTInBackwardOptimizer,
    HiFTOptimizer,
    ParamEntries,
)
from hift_ds.engine.facts import EngineFacts
from hift_ds.engine.fp32_bits import give_masters_their_bits
from hift_ds.engine.zero3.parameters import PartitionedParameters
from hift_ds.engine.zero3.seam import WeightShards
from hift_ds.errors import ConfigError
from hift_ds.layers.arch import whole_shape
from hift_ds.layers.grouping import ALWAYS, Partition, partition_model
from hift_ds.lr import CycleLR
from hift_ds.optim.build import build_optimizer, check_usable, is_elementwise
from hift_ds.optim.early_reduction import EarlyReducedParameters
from hift_ds.optim.group_shard import GroupShard
from hift_ds.optim.group_states import GroupStates
from hift_ds.optim.host_step import SplitUpdates
from hift_ds.optim.parameters import Parameters, ReplicatedParameters
from hift_ds.optim.piecewise import PiecewiseOptimizer
from hift_ds.optim.trainable_flags import TrainableFlags
from hift_ds.precision import LossScaler, PrecisionPolicy
from hift_ds.ranks import gather
from hift_ds.schedule import GroupSchedule
from hift_ds.store.choose import build_resident_store, build_split_store, build_store
from hift_ds.store.hiding import UNKNOWN_TOKENS, costs_before_states, fastest_share, layers_hidden
from hift_ds.store.machine import Machine

logger = logging.getLogger(__name__)

Optimizer = torch.optim.Optimizer


def build_optimizers(
    facts: EngineFacts,
    model: nn.Module,
    client_optimizer: ClientOptimizer,
    model_parameters: ParamEntries,
    partition_weights: Callable[[Callable[[], int]], WeightShards],
    fp32_shards: Mapping[str, Tensor],
) -> tuple[Partition, Optimizer, HiFTOptimizer]:
    """Cut the model, and build what trains its groups. If that fails the weights are a plain model's again.

    Args:
        client_optimizer: the caller's, a function of ``model_parameters`` that makes it, or ``None`` for the config's.
        model_parameters: parameters, or param_group dicts.
        partition_weights: for ZeRO-3: given a function that tells the active group, cuts the weights over the ranks.
        fp32_shards: what :func:`~hift_ds.engine.fp32_bits.cast_and_keep_bits` returned.

    Returns:
        (the model's layer groups, the optimizer that is stepped, the group optimizer around it).
    """
    if client_optimizer is not None:
        if callable(client_optimizer) and not isinstance(client_optimizer, Optimizer):
            client_optimizer = client_optimizer(model_parameters)
        check_usable(client_optimizer)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            raise ConfigError(f"{name}: sparse gradients (sparse=True) are not supported; set sparse=False")
    for name, param in model.named_parameters():
        if param.is_complex() and param.requires_grad:
            raise ConfigError(
                f"{name}: complex weights are not trained; keep torch.view_as_real of it, and torch.view_as_complex in "
                "the forward"
            )
        if param.dtype == torch.float64 and param.requires_grad:
            raise ConfigError(
                f"{name}: float64 weights would be rounded to the fp32 of masters and states; call model.float() first"
            )
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state and facts.rank == 0:
            logger.warning(
                "%s: %s has a state besides weights and buffers (get_extra_state), which checkpoints do not hold; keep "
                "it in a buffer, or in client_state=",
                name or "the model", type(module).__name__,
            )  # fmt: skip
            break
    flags = TrainableFlags(model)
    entries = model_parameters if client_optimizer is None else client_optimizer.param_groups
    refuse_foreign(model, entries, "model_parameters" if client_optimizer is None else "optimizer")
    with unmanaged_set_aside(model, entries, facts.rank), contextlib.ExitStack() as on_failure:
        partition = cut_model(facts, model)
        base = client_optimizer or base_optimizer(facts, model, partition, model_parameters)
        schedule = build_schedule(facts, len(partition.groups))
        shards = partition_weights(lambda: schedule.active) if facts.partitioned else None
        parameters = build_parameters(facts, model, base, shards)
        on_failure.callback(parameters.close)
        groups = group_shards(model, partition, base, parameters)
        optimizer = group_optimizer(facts, model, base, parameters, groups, flags, schedule)
        give_masters_their_bits(optimizer, model, fp32_shards, facts.device)
        on_failure.pop_all()
    optimizer.guard()
    return partition, base, optimizer


def refuse_shared_memory(model: nn.Module) -> None:
    """See that each weight has memory of its own. Two parameters on the same (``head.weight.data = embed.weight.data``)
    would each be updated, one over the other, and come apart where weights are rounded, cut or moved.

    Raises:
        ConfigError: two have not.
    """
    name_of: dict[tuple[Any, ...], str] = {}
    for name, param in model.named_parameters():
        if param.numel() and not param.is_meta:
            other = name_of.setdefault((param.untyped_storage()._cdata, param.storage_offset()), name)
            if other != name:
                raise ConfigError(
                    f"{other} and {name} are two parameters on the same memory: let both names be one parameter, as "
                    "tied weights are, or give one a copy of the values"
                )


# -- the groups and the optimizer that is stepped -------------------------------------------------------------


@contextlib.contextmanager
def unmanaged_set_aside(model: nn.Module, entries: ParamEntries, rank: int) -> Iterator[None]:
    """Trainable weights that are in no entry of the optimizer are not trained; inside this block they ask for no
    gradient either.

    Args:
        entries: parameters, or param_group dicts.
    """
    managed = _params_of(entries)
    aside = {n: p for n, p in model.named_parameters() if p.requires_grad and p not in managed}
    if aside and rank == 0:
        shown = ", ".join(list(aside)[:3]) + (" ..." if len(aside) > 3 else "")
        logger.warning("%d trainable parameters are not in the optimizer and stay as they are: %s", len(aside), shown)
    for param in aside.values():
        param.requires_grad_(False)
    try:
        yield
    finally:
        for param in aside.values():
            param.requires_grad_(True)


def refuse_foreign(model: nn.Module, entries: ParamEntries, argument: str) -> None:
    """Refuse weights that ask for gradients and are not the model's: no layer group would have them.

    Args:
        entries: parameters, or param_group dicts.
        argument: of :func:`hift_ds.initialize`, for the message.

    Raises:
        ConfigError: there are such weights.
    """
    own = set(model.parameters())
    foreign = [param for param in _params_of(entries) if param not in own and param.requires_grad]
    if foreign:
        shapes = sorted(" x ".join(map(str, whole_shape(param))) or "1" for param in foreign)
        shown = ", ".join(shapes[:3]) + (", ..." if len(shapes) > 3 else "")
        raise ConfigError(
            f"{argument}=: {len(foreign)} weights ({shown}) are not the model's and would not be trained: give "
            "initialize one module that has them all, or make the optimizer of model.parameters()"
        )


def _params_of(entries: ParamEntries) -> set[Tensor]:
    params: set[Tensor] = set()
    for entry in entries:
        inner = entry["params"] if isinstance(entry, dict) else entry
        inner = [inner] if isinstance(inner, Tensor) else list(inner)
        if wrong := [param for param in inner if not isinstance(param, Tensor)]:
            raise ConfigError(
                "model_parameters=: expected parameters, or param_group dicts of them, without names; found "
                f"{type(wrong[0]).__name__}"
            )
        params.update(inner)
    return params


def cut_model(facts: EngineFacts, model: nn.Module) -> Partition:
    """The layer groups of the model.

    Raises:
        GroupingError: it cannot be cut as asked.
    """
    hift = facts.hift
    partition = partition_model(
        model, group_size=hift.first_group_size, patterns=hift.groups, always_active=hift.always_active
    )
    if len(partition.groups) == 1 and hift.group_size not in (1, "all", "auto") and facts.rank == 0:
        logger.warning(
            '"hift.group_size": %d takes in the whole model: all weights are one group, which is full fine-tuning',
            hift.group_size,
        )
    return partition


def base_optimizer(
    facts: EngineFacts, model: nn.Module, partition: Partition, model_parameters: ParamEntries
) -> Optimizer:
    """The optimizer of the config, over the trainable weights.

    Args:
        model_parameters: parameters, or param_group dicts.

    Raises:
        ConfigError: no such optimizer, or one that cannot train one group at a time.
    """
    entries: Sequence[dict[str, Any]] = [{"params": model_parameters}]
    if isinstance(model_parameters[0], dict):
        entries = cast("Sequence[dict[str, Any]]", model_parameters)
    param_groups = []
    for entry in entries:
        params = entry["params"]
        params = [params] if isinstance(params, Tensor) else params
        trainable = [param for param in params if param.requires_grad]
        if trainable:
            param_groups.append({**entry, "params": trainable})
    weights = dict(model.named_parameters())
    name, options = facts.optimizer
    assert name is not None, "SeamEngine has refused a config without one"
    return build_optimizer(
        name,
        dict(options),
        param_groups,
        matrices=frozenset(id(weights[name]) for name in partition.matrices),
        update_device=facts.update_device.type,
        on_accelerator=facts.device.type != "cpu",
        hollow_weights=facts.hollow_weights,
    )


# -- parameters, states, and the group optimizer --------------------------------------------------------------


def build_parameters(facts: EngineFacts, model: nn.Module, base: Optimizer, shards: WeightShards | None) -> Parameters:
    """How gradients and weights travel.

    Args:
        shards: the weights, if they are cut over the ranks (ZeRO-3).
    """
    whole_tensors = not is_elementwise(base)
    trainable = [param for param in model.parameters() if param.requires_grad]
    shared = (
        facts.ranks,
        facts.comm_dtype,
        facts.bucket_numel,
        whole_tensors,
        facts.hift.state.slice_numel,
        facts.in_backward or facts.hift.state.step_on == "split",
    )
    if shards is not None:
        partitioned = PartitionedParameters(*shared, shards=shards)
        if not facts.in_backward:
            partitioned.take_gradients(trainable)
        return partitioned
    if facts.in_backward:
        return ReplicatedParameters(*shared)
    replicated = EarlyReducedParameters(*shared) if facts.overlaps_reduction else ReplicatedParameters(*shared)
    if facts.micro_batches > 1:
        replicated.accumulate_in_fp32(trainable)
    if isinstance(replicated, EarlyReducedParameters):
        replicated.watch(trainable)
    return replicated


def group_shards(
    model: nn.Module, partition: Partition, base: Optimizer, parameters: Parameters
) -> dict[int, GroupShard]:
    """This rank's shard of every group, by group index."""
    weights = dict(model.named_parameters())
    param_group_of = {p: i for i, entry in enumerate(base.param_groups) for p in entry["params"]}
    always = [partition.always] if partition.always else []
    return {
        group.index: parameters.group_shard(
            group.index,
            group.name,
            [(name, weights[name], param_group_of[weights[name]]) for name in group.param_names],
            group.parts,
        )
        for group in [*partition.groups, *always]
    }


def build_schedule(facts: EngineFacts, num_groups: int) -> GroupSchedule:
    """Which group is trained when."""
    hift = facts.hift
    return GroupSchedule(num_groups, hift.order, hift.reshuffle, hift.seed, hift.steps_per_group)


def group_optimizer(
    facts: EngineFacts, model: nn.Module, base: Optimizer, parameters: Parameters,
    groups: Mapping[int, GroupShard], flags: TrainableFlags, schedule: GroupSchedule,
) -> HiFTOptimizer:  # fmt: skip
    """What trains ``groups`` in turn, with room for their states.

    Raises:
        StateStoreError: there is no room for them.
    """
    state, device = facts.hift.state, facts.update_device
    rounding_seed = facts.hift.seed * 65_537 + facts.rank
    piecewise = PiecewiseOptimizer(base)
    split, machine = None, _machine_before_states(facts.machine)
    if state.step_on == "split":
        make_store = functools.partial(build_split_store, state, device, seed=rounding_seed, machine=machine)
        split = SplitUpdates(host_share(facts, groups, parameters, piecewise), state.host_share is not None, make_store)
    states = GroupStates(
        groups,
        parameters,
        piecewise,
        _precision(facts, model),
        device,
        store=split.make_store()
        if split is not None
        else build_store(state, device, seed=rounding_seed, machine=machine),
        always_store=build_resident_store(state, device, seed=rounding_seed),
        split=split,
        may_hold=facts.hift.clipping == "speculative" and facts.max_grad_norm > 0,
    )
    make: Callable[..., HiFTOptimizer] = HiFTOptimizer
    if facts.in_backward:
        make = functools.partial(HiFTInBackwardOptimizer, clipping=facts.hift.clipping, sum_dtype=facts.sum_dtype)
    optimizer = make(
        states,
        flags,
        schedule,
        CycleLR(facts.hift.lr_update, base.param_groups),
        _loss_scaler(facts),
        max_grad_norm=facts.max_grad_norm,
        seed=facts.hift.seed,
        pin_memory=state.pin_memory,
        on_threads=facts.machine.copies_on_threads,
    )
    check_room(facts, optimizer)
    return optimizer


def check_room(facts: EngineFacts, optimizer: HiFTOptimizer) -> None:
    """See that host memory has room for what steps of the groups of today keep there.

    Raises:
        StateStoreError: it has not.
    """
    if optimizer.updates_in_backward:
        groups = optimizer.groups.values()
        kept = max(optimizer.kept_on_host(group, facts.micro_batches) for group in groups)
        optimizer.states.check_room(facts.machine, kept)


def _machine_before_states(machine: Machine) -> Machine:
    """The machine with the host memory that is free now. No rank takes any for states before all have looked: one that
    comes late would find what is meant for it taken."""
    if machine.host is not None:
        return machine
    found = machine.host_bytes()
    gather(None)
    return replace(machine, noted=found)


def host_share(
    facts: EngineFacts, groups: Mapping[int, GroupShard], parameters: Parameters, piecewise: PiecewiseOptimizer
) -> float:
    """The share of the parameters that the host updates beside the device: as configured, or what measured speeds say
    is fastest, on all ranks alike."""
    hift, state, device = facts.hift, facts.hift.state, facts.device
    if state.host_share is not None:
        return state.host_share
    rotating = [groups[index] for index in sorted(groups) if index != ALWAYS]
    parts = [part for group in rotating for part in group.parts]
    numels = [sum(member.whole_numel for member in part.members) for part in parts]
    weight = parts[0].members[0].param
    keys = {} if parameters.whole_tensors else piecewise.elementwise_keys(device)
    moments = sum(dtype.itemsize for dtype in keys.values()) or 4
    costs = costs_before_states(
        device, weight.dtype, moments, state, max(numels), facts.ranks.world_size, hift.master_weights,
        facts.parked_bytes(weight.dtype),
    )  # fmt: skip
    if hift.group_size == "auto" and hift.tokens_per_step is not None:
        share = layers_hidden(costs, numels, hift.tokens_per_step, split=True).costs.share
    else:
        # Where a step's tokens are not known: as if nothing hid the link. "auto" then finds its size for this share.
        size = len(parts) if hift.group_size == "auto" else max(len(group.parts) for group in rotating)
        share = fastest_share(costs, numels, size, UNKNOWN_TOKENS)
    share = gather(share)[0]
    if facts.rank == 0:
        logger.info("step_on split: the host updates %.0f %% of the parameters (%s)", 100 * share, costs.rates())
    return share


def _precision(facts: EngineFacts, model: nn.Module) -> PrecisionPolicy:
    masters = facts.hift.master_weights
    any_low = facts.low_dtype is not None or any(
        param.dtype != torch.float32 for param in model.parameters() if param.requires_grad
    )
    if any_low:
        name = "mixed_hi" if masters else "bf16"
    else:
        name = "fp32" if facts.autocast_dtype is None else "mixed"
    return PrecisionPolicy(name, masters, facts.hift.stochastic_rounding)


def _loss_scaler(facts: EngineFacts) -> LossScaler:
    if facts.low_dtype == torch.float16:
        return LossScaler.from_fp16_block(facts.config["fp16"])
    if facts.autocast_dtype == torch.float16:
        return LossScaler.from_fp16_block({})
    return LossScaler()
