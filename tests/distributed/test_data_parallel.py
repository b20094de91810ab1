"""Two and three ranks equal one; what travels is the active group's, exactly.

One process start per world size: every case runs in the same pair (or triple) of processes.
"""

from __future__ import annotations

import copy
import math
import os

import pytest
import torch
import torch.distributed as dist
from deepspeed import comm as deepspeed_comm

from hift_ds.process_group import nothing_compiled
from hift_ds.ranks import free_port, gather
from hift_ds.reference import ReferenceHiFT
from tests.helpers.distributed import run_distributed
from tests.helpers.engines import ds_config, largest_difference, make_engine, train_step
from tests.helpers.toy import Toy, loss_of, make_batches

pytestmark = pytest.mark.distributed

# Adam divides by the gradient's own size, so an element whose gradient is only rounding noise still moves by up to
# lr; sums over ranks round differently, and 1e-6 can hold only where lr is small.
LR = 1e-3

# name -> (config options, reference options, torch optimizer, micro-batches per step)
CASES = {
    "fp32": ({}, {}, lambda ps: torch.optim.AdamW(ps, lr=LR), 1),
    "stage 1": ({"stage": 1}, {}, lambda ps: torch.optim.AdamW(ps, lr=LR), 1),
    "stage 2, accumulation, clipping, decay": (
        {"stage": 2, "gas": 3, "clip": 0.05, "params": {"weight_decay": 0.2}},
        {"max_grad_norm": 0.05},
        lambda ps: torch.optim.AdamW(ps, lr=LR, weight_decay=0.2),
        3,
    ),
    "small buckets, slices, random order": (
        {
            "hift": {"order": "random", "reshuffle": True, "group_size": 2, "state": {"slice_numel": 11}},
            "bucket": 16,
        },
        {"order": "random", "reshuffle": True},
        lambda ps: torch.optim.AdamW(ps, lr=LR),
        1,
    ),
    "SGD with momentum": (
        {"optimizer": "SGD", "params": {"momentum": 0.9}},
        {},
        lambda ps: torch.optim.SGD(ps, lr=LR, momentum=0.9),
        1,
    ),
    "Adafactor, whole tensors": (
        {"optimizer": "Adafactor"},
        {},
        lambda ps: torch.optim.Adafactor(ps, lr=LR),
        1,
    ),
    "tied": ({"tied": True}, {}, lambda ps: torch.optim.AdamW(ps, lr=LR), 1),
}


def equals_reference(name: str, rank: int, world_size: int) -> list[str]:
    """Differences found over three cycles; none expected."""
    options, reference_options, build, gas = copy.copy(CASES[name])
    options = dict(options)
    model, bucket = Toy(tied=options.pop("tied", False)), options.pop("bucket", None)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for param in model.parameters():  # DeepSpeed broadcasts rank 0's weights
            param.add_(rank)
    config = ds_config(lr=LR, world_size=world_size, **options)
    if bucket:
        config["zero_optimization"]["reduce_bucket_size"] = bucket
    engine = make_engine(model, config)
    reference = ReferenceHiFT(
        twin,
        [g.param_names for g in engine.groups],
        lambda named: build([p for _, p in named]),
        **reference_options,
    )
    batches, errors = make_batches(7 * gas), []
    for step in range(3 * engine.schedule.steps_per_cycle):
        micro_batches = [batches[(step * gas + i) % len(batches)] for i in range(gas)]
        train_step(engine, micro_batches, rank, world_size)
        reference.step(micro_batches, loss_of)
        if (difference := largest_difference(model, twin)) > 1e-6:
            errors.append(f"{name}: step {step}: {difference}")
            break
    engine.destroy()
    return errors


def counts_traffic(rank: int, world_size: int) -> list[str]:
    """Count what goes through deepspeed.comm: gradients of the active group once per optimizer step, nothing else."""
    counted = {"reduce": 0, "gather": 0, "other": 0}
    originals = {
        n: getattr(deepspeed_comm, n)
        for n in ("reduce_scatter_tensor", "all_gather_into_tensor", "all_reduce", "broadcast")
    }

    def spy(name, bucket, full_size_argument):
        def counting(*args, **kwargs):
            counted[bucket] += args[full_size_argument].numel()
            return originals[name](*args, **kwargs)

        setattr(deepspeed_comm, name, counting)

    model = Toy()
    engine = make_engine(model, ds_config(world_size=world_size, gas=2, clip=1.0))
    for _ in range(engine.schedule.steps_per_cycle):  # in the first cycle ranks agree in which order they send
        train_step(engine, make_batches(2), rank, world_size)
    sent, errors = 0, []
    try:
        spy("reduce_scatter_tensor", "reduce", 1)
        spy("all_gather_into_tensor", "gather", 0)
        spy("all_reduce", "other", 0)
        spy("broadcast", "other", 0)
        batches = make_batches(20)
        for step in range(engine.schedule.steps_per_cycle):
            counted.update(reduce=0, gather=0, other=0)
            group = engine.groups[engine.schedule.active]
            padded = sum(
                world_size * math.ceil(p.numel() / world_size)
                for n, p in model.named_parameters()
                if n in group.param_names
            )
            train_step(engine, batches[2 * step : 2 * step + 2], rank, world_size)
            if (counted["reduce"], counted["gather"]) != (padded, padded):
                errors.append(f"{group.name}: {counted}, expected {padded} each way")
            if engine.last_report.grad_numel_sent != group.numel:
                errors.append(
                    f"{group.name}: report says {engine.last_report.grad_numel_sent}, group has {group.numel}"
                )
            if counted["other"] != 1 + len(group.param_names):  # the norm, and who got a gradient
                errors.append(f"{group.name}: {counted['other']} other elements")
            sent += engine.last_report.grad_numel_sent
        if sent != sum(p.numel() for p in model.parameters()):
            errors.append(f"a cycle sent {sent}")
    finally:
        for name, function in originals.items():
            setattr(deepspeed_comm, name, function)
        engine.destroy()
    return errors


def unused_on_one_rank(rank: int, world_size: int) -> list[str]:
    """A parameter that only rank 0's micro-batch reaches (an expert without a token elsewhere): no hang, and the
    same weights on all ranks."""
    model = Toy()

    def sometimes(tokens, targets):
        skip = rank != 0
        kept = model.layers[1].forward
        if skip:
            model.layers[1].forward = lambda h: h
        try:
            return engine(tokens, targets)
        finally:
            model.layers[1].forward = kept

    engine = make_engine(model, ds_config(world_size=world_size))
    before = model.layers[1].up.weight.detach().clone()
    for batch in make_batches(10):
        loss = sometimes(*(part.chunk(world_size)[rank] for part in batch))
        engine.backward(loss)
        engine.step()
    mine = torch.cat([p.detach().flatten() for p in model.parameters()])
    theirs = mine.clone()
    dist.broadcast(theirs, 0)
    errors = [] if torch.equal(mine, theirs) else ["ranks differ"]
    if torch.equal(before, model.layers[1].up.weight):
        errors.append("the layer reached on rank 0 did not move")
    engine.destroy()
    return errors


def early_equals_late(rank: int, world_size: int, optimizer: str) -> list[str]:
    """Gradients sent while backward goes on, or after it: the same bits, also when ranks reach other weights."""
    weights, in_backward = [], 0
    original = {name: getattr(deepspeed_comm, name) for name in ("reduce_scatter_tensor", "reduce")}

    def spy(name):
        def counting(*args, **kwargs):
            nonlocal in_backward
            in_backward += torch._C._current_graph_task_id() != -1
            return original[name](*args, **kwargs)

        return counting

    for name in original:
        setattr(deepspeed_comm, name, spy(name))
    counts = []
    try:
        for overlap in (True, False):
            model = Toy()
            config = ds_config(world_size=world_size, gas=2, clip=0.05, optimizer=optimizer, bf16={"enabled": True})
            config["zero_optimization"] |= {"overlap_comm": overlap, "reduce_bucket_size": 64}
            engine = make_engine(model, config)
            forward, in_backward = model.layers[1].forward, 0
            for step, batch in enumerate(make_batches(20)):
                if rank == 1:
                    model.layers[1].forward = (lambda h: h) if step % 4 == 0 else forward
                train_step(engine, [batch, batch], rank, world_size)
            weights.append([p.detach().clone() for p in model.parameters()])
            counts.append(in_backward)
            engine.destroy()
    finally:
        for name, function in original.items():
            setattr(deepspeed_comm, name, function)
    errors = [] if all(torch.equal(a, b) for a, b in zip(*weights, strict=True)) else [f"{optimizer}: other bits"]
    return errors + ([] if counts[0] > 40 and counts[1] == 0 else [f"{optimizer}: sent in backward {counts}"])


def states_are_sharded(rank: int, world_size: int) -> list[str]:
    model = Toy()
    engine = make_engine(model, ds_config(world_size=world_size, bf16={"enabled": True}))
    for batch in make_batches(5):
        train_step(engine, [batch], rank, world_size)
    store = engine.optimizer.store
    errors = []
    for group in engine.optimizer.groups.values():
        for chunk in group.chunks:
            tensors = store.read(chunk.id)
            mine = sum(member.numel for member in group.members)
            for key in ("master", "exp_avg", "exp_avg_sq"):
                held = sum(t.numel() for name, t in tensors.items() if name.partition(":")[0] == key)
                if held != mine:
                    errors.append(f"{group.name} {key}: {held}, shard has {mine}")
    total = torch.tensor(sum(m.numel for g in engine.optimizer.groups.values() for m in g.members))
    dist.all_reduce(total)
    if int(total) != sum(p.numel() for p in model.parameters()):
        errors.append(f"shards of all ranks hold {int(total)} elements")
    engine.destroy()
    return errors


def fp32_bits_survive_on_every_rank(rank: int, world_size: int, optimizer: str) -> list[str]:
    """Masters of a model that comes in fp32, for sharded and whole-tensor optimizers."""
    exact = dict(Toy().named_parameters())
    model = Toy()
    engine = make_engine(model, ds_config(world_size=world_size, optimizer=optimizer, bf16={"enabled": True}))
    errors = []
    for group in engine.optimizer.groups.values():
        for chunk in group.chunks:
            tensors = engine.optimizer.store.read(chunk.id)
            for piece, record in zip(chunk.pieces, engine.optimizer.states.records[chunk.id], strict=True):
                name = group.members[piece.member].name
                expected = exact[name].detach().flatten()[piece.start : piece.start + piece.numel]
                if not torch.equal(record.master.view(tensors).flatten(), expected):
                    errors.append(f"{optimizer}: {name}")
    engine.destroy()
    return errors


def a_change_by_hand_stays(rank: int, world_size: int, optimizer: str) -> list[str]:
    """16-bit weights that every rank clamps: updates begin from those, not from the masters as they were."""
    model = Toy()
    config = ds_config(lr=LR, stage=2, world_size=world_size, optimizer=optimizer, bf16={"enabled": True})
    engine, errors = make_engine(model, config), []
    batches = make_batches(2 * engine.schedule.steps_per_cycle)
    for step, batch in enumerate(batches):
        if step == 3:
            with torch.no_grad():
                for param in model.parameters():
                    param.clamp_(-0.05, 0.05)
        train_step(engine, [batch], rank, world_size)
    for name, param in model.named_parameters():
        if (largest := param.detach().abs().max().item()) > 0.06:
            errors.append(f"{optimizer}: {name} has {largest} again")
    engine.destroy()
    return errors


def a_second_job_goes_on_with_the_model(rank: int, world_size: int) -> list[str]:
    """The process group ends, as accelerate's ``end_training`` has it, and another begins. Leaves none."""
    errors, batches = [], make_batches(2)
    for stage in (0, 3):
        seen = []
        for ends in (False, True):
            model, losses = Toy(), []
            for _ in range(2):
                with nothing_compiled():
                    deepspeed_comm.init_distributed("gloo")
                engine = make_engine(model, ds_config(stage=stage, world_size=world_size))
                losses += [train_step(engine, [batch], rank, world_size) for batch in batches]
                engine.destroy()
                if ends:
                    port = gather(free_port())[0]
                    dist.barrier()
                    dist.destroy_process_group()
                    os.environ["MASTER_PORT"] = str(port)  # the one before may be in use for a moment yet
            seen.append(losses)
        if seen[0] != seen[1]:
            errors.append(f"stage {stage}, a second job: {seen}")
    return errors


def every_case(world_size: int) -> list[str]:
    rank = dist.get_rank()
    errors = [error for name in CASES for error in equals_reference(name, rank, world_size)]
    errors += counts_traffic(rank, world_size)
    errors += unused_on_one_rank(rank, world_size)
    errors += states_are_sharded(rank, world_size)
    for optimizer in ("AdamW", "Adafactor"):
        errors += early_equals_late(rank, world_size, optimizer)
        errors += fp32_bits_survive_on_every_rank(rank, world_size, optimizer)
        errors += a_change_by_hand_stays(rank, world_size, optimizer)
    return errors + a_second_job_goes_on_with_the_model(rank, world_size)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks(world_size):
    assert run_distributed(every_case, world_size, world_size) == [[]] * world_size
