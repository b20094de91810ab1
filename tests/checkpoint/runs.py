"""Runs that are interrupted and resumed, and what must be equal at their end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers.engines import ds_config, make_engine
from tests.helpers.toy import Toy, loss_of, make_batches, rows_of_rank

BATCHES = make_batches(40)


@dataclass(frozen=True)
class Case:
    """A run. ``at``: micro-batches after which it is saved."""

    config: dict[str, Any] = field(default_factory=ds_config)
    model: Callable[..., nn.Module] = Toy
    num_micro_batches: int = 16
    at: Sequence[int] = (3, 10)
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None  # the client's
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None  # the client's

    def engine(self, seed: int):
        model = self.model(seed=seed)
        client = {} if self.optimizer is None else {"optimizer": self.optimizer(model)}
        if self.scheduler is not None:
            client["lr_scheduler"] = self.scheduler
        return make_engine(model, self.config, **client)


@dataclass
class End:
    weights: dict[str, Tensor]
    coverage: dict[str, int]
    losses: list[float]
    facts: dict[str, Any]


def advance(engine, start: int, stop: int, rank: int = 0, world_size: int = 1, on_batch=None) -> list[float]:
    """Micro-batches [start, stop). ``on_batch(i)`` comes after each."""
    losses = []
    for i in range(start, stop):
        loss = loss_of(engine, rows_of_rank(BATCHES[i % len(BATCHES)], rank, world_size))
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
        if on_batch:
            on_batch(i + 1)
    return losses


def whole_weights(engine) -> dict[str, Tensor]:
    return {n: engine.optimizer.parameters.whole_weight(p).cpu().clone() for n, p in engine.module.named_parameters()}


def end_of(engine, losses: list[float]) -> End:
    optimizer = engine.optimizer
    facts = {
        "cursor": engine.schedule.cursor,
        "lr": optimizer.lr.state_dict(),
        "scaler": optimizer.scaler.state_dict(),
        "options": [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups],
        "scheduler": engine.lr_scheduler.state_dict() if engine.lr_scheduler else None,
        "counters": (engine.global_steps, engine.global_samples, engine.micro_steps, engine.skipped_steps),
        "applied": optimizer.num_applied,
        "extras": optimizer.states.extras,
        "last_norms": optimizer.last_norms,
        "trials": (optimizer.trials.num_made, optimizer.trials.num_undone),
    }
    return End(whole_weights(engine), engine.coverage(), losses, facts)


def states_of(engine) -> dict[str, Tensor]:
    """This rank's masters and states by name, cloned."""
    from hift_ds.checkpoint.state_files import spec_of

    found, states = {}, engine.optimizer.states
    for group in engine.optimizer.groups.values():
        states.store_of(group).synchronize()
        for chunk in group.chunks:
            tensors = states.tensors_of(group, chunk)
            for tensor, values in zip(tensors, states.read(group, chunk, tensors), strict=True):
                found[spec_of(tensor).name] = values.clone()
    return found


def assert_same_end(resumed: End, expected: End, tolerance: float = 0.0) -> None:
    for name, weight in expected.weights.items():
        if tolerance == 0.0:
            assert torch.equal(resumed.weights[name], weight), name
        else:
            assert (resumed.weights[name].float() - weight.float()).abs().max().item() <= tolerance, name
    assert resumed.coverage == expected.coverage
    if tolerance == 0.0:
        assert resumed.losses == expected.losses[-len(resumed.losses) :]
        assert resumed.facts == expected.facts
    else:
        assert resumed.facts["cursor"] == expected.facts["cursor"] and resumed.facts["lr"] == expected.facts["lr"]


def interrupted_and_whole(case: Case, folder, rank: int = 0, world_size: int = 1) -> None:
    """Save on the way, resume from each save in a fresh engine with other weights, compare the ends bit for
    bit."""
    engine = case.engine(seed=0)
    saved = []

    def save(i: int) -> None:
        if i in case.at:
            assert engine.save_checkpoint(folder / str(i), client_state={"micro_batch": i})
            saved.append(i)

    losses = advance(engine, 0, case.num_micro_batches, rank, world_size, save)
    expected, expected_states = end_of(engine, losses), states_of(engine)
    engine.destroy()
    assert saved == sorted(case.at)
    for i in case.at:
        engine = case.engine(seed=1 + i)
        torch.manual_seed(1000 + i)
        path, client_state = engine.load_checkpoint(folder / str(i))
        assert path and client_state == {"micro_batch": i}
        losses = advance(engine, i, case.num_micro_batches, rank, world_size)
        assert_same_end(end_of(engine, losses), expected)
        states = states_of(engine)
        assert states.keys() == expected_states.keys()
        for name, state in expected_states.items():
            assert torch.equal(states[name], state), name
        engine.destroy()
