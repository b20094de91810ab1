"""The update in backward on several ranks is ``after_backward`` within rounding, whatever each rank's batch reaches.

One process start per world size: every case runs in the same processes.
"""

from __future__ import annotations

import copy

import pytest
import torch
from deepspeed import comm as deepspeed_comm
from torch import nn

from hift_ds.errors import TrainingError
from hift_ds.ranks import gather
from hift_ds.store import host
from hift_ds.store.speeds import Link
from tests.distributed.test_partitioned import KEEP_NOTHING, values
from tests.helpers.distributed import run_distributed
from tests.helpers.engines import ds_config, make_engine, train_step
from tests.helpers.toy import Toy, make_batches, rows_of_rank

pytestmark = pytest.mark.distributed

HOST = {"offload_param": {"device": "cpu"}}
# name -> options of ds_config, "hift" block, ZeRO block, model's
CASES: dict[str, tuple[dict, dict, dict, dict]] = {
    "all": ({"params": {"weight_decay": 0.1}}, {"group_size": "all"}, {}, {}),
    "experts": ({"params": {"weight_decay": 0.1}}, {"group_size": "all"}, {}, {"experts": True}),
    "reached by the first micro-batch": ({"gas": 2}, {"group_size": "all"}, {}, {"alternates": True}),
    "reached by the first, stage 3": ({"gas": 2, "stage": 3}, {"group_size": 2}, KEEP_NOTHING, {"alternates": True}),
    "a block's weights held on one rank": ({"gas": 2}, {"group_size": "all"}, {}, {"holds": True}),
    "stage 2, accumulation, clipping": ({"stage": 2, "gas": 2, "clip": 0.05}, {"group_size": 2}, {}, {"tied": True}),
    "stage 3": ({"stage": 3, "gas": 2}, {"group_size": "all"}, KEEP_NOTHING, {"tied": True}),
    "stage 3, persistent": ({"stage": 3, "clip": 0.05}, {"group_size": "all"}, {}, {}),
    "stage 3, weights on the host": ({"stage": 3}, {"group_size": "all"}, {**KEEP_NOTHING, **HOST}, {}),
    "stage 3, recomputed": (
        {"stage": 3}, {"group_size": "all", "activations": {"checkpointing": True}}, KEEP_NOTHING, {},
    ),
    "Muon": ({"optimizer": "Muon"}, {"group_size": "all", "always_active": ["head"]}, {}, {}),
    "Muon, stage 3": ({"optimizer": "Muon", "stage": 3}, {"group_size": "all"}, KEEP_NOTHING, {}),
    "split, slices, experts": (
        {"params": {"weight_decay": 0.1}},
        {"group_size": "all", "state": {"step_on": "split", "host_share": 0.4, "slots": 2, "slice_numel": 17}},
        {}, {"experts": True},
    ),
    "split, stage 3, taken back": (
        {"stage": 3, "clip": 0.1},
        {"group_size": 2, "clipping": "speculative", "state": {"step_on": "split", "host_share": 0.4}},
        KEEP_NOTHING, {},
    ),
    "taken back, Muon": ({"optimizer": "Muon", "clip": 0.1}, {"group_size": 3, "clipping": "speculative"}, {}, {}),
    "turns, slices": ({}, {"group_size": 2, "steps_per_group": 2, "state": {"slice_numel": 11, "slots": 2}}, {}, {}),
}  # fmt: skip
FEW = (
    "all", "experts", "reached by the first micro-batch", "a block's weights held on one rank",
    "stage 2, accumulation, clipping", "stage 3", "Muon, stage 3", "split, slices, experts",
    "split, stage 3, taken back", "taken back, Muon",
)  # fmt: skip


class WithExperts(Toy):
    """Block 1 has one weight a rank, which that rank's batches reach and no other's, and one that none reaches."""

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__()
        self.rank = rank
        self.layers[1].experts = nn.ParameterList(
            nn.Parameter(torch.full((7,), 1.0 + i)) for i in range(world_size + 1)
        )

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        h = self.embed(tokens)
        for i, layer in enumerate(self.layers):
            h = layer(h)
            if i == 1:
                h = h * self.layers[1].experts[self.rank]
        return nn.functional.cross_entropy(self.head(self.norm(h)).flatten(0, 1), targets.flatten())


class Alternates(Toy):
    """Every other batch does not reach block 1, on any rank."""

    num_calls = 0

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        h = self.embed(tokens)
        for i, layer in enumerate(self.layers):
            h = layer(h) if i != 1 or self.num_calls % 2 == 0 else h
        self.num_calls += 1
        return nn.functional.cross_entropy(self.head(self.norm(h)).flatten(0, 1), targets.flatten())


class HoldsOnOneRank(Toy):
    """The weights of block 1 are constants of rank 0's graphs, which need them when rank 1's gradients are complete."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        h = self.embed(tokens)
        for i, layer in enumerate(self.layers):
            constants = {name: param.detach() for name, param in layer.named_parameters()}
            holds = i == 1 and self.rank == 0
            h = torch.func.functional_call(layer, constants, (h,)) if holds else layer(h)
        return nn.functional.cross_entropy(self.head(self.norm(h)).flatten(0, 1), targets.flatten())


def built(options: dict, rank: int, world_size: int) -> Toy:
    if "experts" in options:
        return WithExperts(rank, world_size)
    if "holds" in options:
        return HoldsOnOneRank(rank)
    return Alternates() if "alternates" in options else Toy(**options)


def difference(name: str, rank: int, world_size: int) -> str:
    options, hift, zero, model = copy.deepcopy(CASES[name])
    config = ds_config(lr=1e-3, world_size=world_size, hift=hift, **options)
    config["zero_optimization"].update(zero)
    gas, batches, results = options.get("gas", 1), make_batches(6), []
    for update in ("after_backward", "in_backward"):
        block = {**hift, "update": update}
        if update == "after_backward":  # the exact norm, and one processor for all
            block.pop("clipping", None)
            block["state"] = {**hift.get("state", {}), "step_on": "device"}
            block["state"].pop("host_share", None)
        engine = make_engine(built(model, rank, world_size), {**config, "hift": block})
        reports = []
        for step in range(2 * engine.schedule.steps_per_cycle + 1):
            train_step(engine, [batches[(step * gas + i) % 6] for i in range(gas)], rank, world_size)
            reports.append(engine.last_report.grad_norm)
        results.append((values(engine), reports, engine.coverage()))
        engine.destroy()
    (weights, norms, coverage), (weights2, norms2, coverage2) = results
    worst = max((weights[key].float() - weights2[key].float()).abs().max().item() for key in weights)
    worst_norm = max(abs(a - b) / a for a, b in zip(norms, norms2, strict=True))
    return "" if worst < 1e-6 and worst_norm < 1e-6 and coverage == coverage2 else f"{name}: {worst} {worst_norm}"


def job(names: list[str]) -> list[str]:
    rank, world_size = deepspeed_comm.get_rank(), deepspeed_comm.get_world_size()
    found = [text for name in names if (text := difference(name, rank, world_size))]
    checks = (bad_loss_on_one_rank, auto_size_of_ranks, boundary_after_the_last_backward)
    return found + [text for check in checks for text in check(rank, world_size)]


def auto_size_of_ranks(rank: int, world_size: int) -> list[str]:
    """The last rank's link hides fewer layers: all take what it does."""
    speed = 1e3 if rank == world_size - 1 else 1e15
    host.measure_link = lambda *args: Link(speed, speed)
    config = ds_config(
        world_size=world_size, hift={"group_size": "auto", "update": "in_backward", "tokens_per_step": 1}
    )
    engine = make_engine(Toy(), config)
    train_step(engine, make_batches(1), rank, world_size)
    sizes = gather(engine.hift.group_size)
    engine.destroy()
    return [] if len(set(sizes)) == 1 and sizes[0] != "all" else [f"group sizes {sizes}"]


def boundary_after_the_last_backward(rank: int, world_size: int) -> list[str]:
    """All gradients of the step are sums of micro-batches by then."""
    results = []
    for update in ("after_backward", "in_backward"):
        config = ds_config(lr=1e-3, world_size=world_size, hift={"group_size": "all", "update": update})
        engine = make_engine(Toy(), config)
        for _ in range(3):
            engine.set_gradient_accumulation_boundary(False)
            for batch in make_batches(2):
                engine.backward(engine(*rows_of_rank(batch, rank, world_size)))
            engine.set_gradient_accumulation_boundary(True)
            engine.step()
        results.append(values(engine))
        engine.destroy()
    after, during = results
    worst = max((after[key] - during[key]).abs().max().item() for key in after)
    return [] if worst < 1e-6 else [f"a boundary that is set after the last backward: {worst}"]


def bad_loss_on_one_rank(rank: int, world_size: int) -> list[str]:
    model = Toy()
    engine = make_engine(model, ds_config(world_size=world_size, hift={"group_size": "all", "update": "in_backward"}))
    start = {name: param.detach().clone() for name, param in model.named_parameters()}
    tokens, targets = make_batches(1, rows=4)[0]
    try:
        engine.backward(engine(tokens, targets) * (float("inf") if rank == 1 else 1.0))
    except TrainingError as error:
        same = all(torch.equal(param, start[name]) for name, param in model.named_parameters())
        return [] if same and "1 of" in str(error) else [str(error)]
    finally:
        engine.destroy()
    return ["a loss that is not finite was not noticed"]


@pytest.mark.parametrize(
    ("world_size", "names"),
    [
        (2, FEW),
        pytest.param(2, tuple(CASES), marks=pytest.mark.slow),
        pytest.param(3, tuple(CASES), marks=pytest.mark.slow),
    ],
)
def test_ranks_agree_with_after_backward(world_size: int, names: tuple[str, ...]) -> None:
    assert run_distributed(job, world_size, list(names)) == [[]] * world_size
