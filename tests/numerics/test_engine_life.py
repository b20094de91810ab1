"""What an engine borrows from its surroundings (flags, hooks, memory) and how it gives that back; a loop of one's
own, one rank."""

from __future__ import annotations

import copy
import gc
from types import SimpleNamespace

import deepspeed
import pytest
import torch
from accelerate import PartialState
from torch import nn

from hift_ds.engine import lifetime
from hift_ds.errors import ConfigError, HiFTError
from hift_ds.process_group import as_single_process
from hift_ds.train.worker import _leave_job
from tests.helpers.engines import ds_config, make_engine, train_step, weights_of
from tests.helpers.toy import Toy, loss_of, make_batches

BATCH = make_batches(1)[0]


def flags_of(model: nn.Module) -> dict[str, bool]:
    return {name: param.requires_grad for name, param in model.named_parameters()}


def hooks_of(model: nn.Module) -> dict[str, int]:
    names = [n for n in vars(model) if n.endswith("_hooks")]
    found = {f"{m}.{n}": len(vars(mod).get(n, ())) for m, mod in model.named_modules() for n in names}
    found |= {n: len(p._post_accumulate_grad_hooks or ()) for n, p in model.named_parameters()}
    return {name: count for name, count in found.items() if count}


def rotate(engine, steps: int) -> None:
    for _ in range(steps):
        train_step(engine, [BATCH])


@pytest.mark.parametrize("how", ["module", "method", "attribute"])
@pytest.mark.parametrize(("gas", "update"), [(1, "after_backward"), (2, "after_backward"), (2, "in_backward")])
def test_what_the_caller_freezes_between_steps_stays_from_the_next_step_on(how, gas, update):
    model = Toy()
    block = model.layers[1]
    engine = make_engine(model, ds_config(gas=gas, hift={"update": update}))

    def freeze(flag: bool) -> None:
        if how == "module":
            block.requires_grad_(flag)
        for param in block.parameters():
            if how == "method":
                param.requires_grad_(flag)
            elif how == "attribute":
                param.requires_grad = flag

    def steps(num: int) -> None:
        for _ in range(num):
            train_step(engine, [BATCH] * gas)

    steps(6)  # the block is the third of five groups: updated once, and not at the time of the freeze
    freeze(False)
    before = weights_of(model)
    steps(10)
    assert all(torch.equal(before[n], w) for n, w in weights_of(model).items() if n.startswith("layers.1."))
    assert not torch.equal(before["layers.0.up.weight"], model.layers[0].up.weight)
    assert not any(flag for n, flag in flags_of(model).items() if n.startswith("layers.1."))
    freeze(True)
    steps(5)
    assert {engine.coverage()[n] for n in before if n.startswith("layers.1.")} == {2}
    assert {engine.coverage()[n] for n in before if not n.startswith("layers.1.")} == {4, 5}
    freeze(False)
    engine.destroy()
    assert not any(p.requires_grad for p in block.parameters()) and model.head.weight.requires_grad


def test_frozen_in_the_middle_of_an_accumulation_counts_from_the_next_step_on():
    """Half of a step's gradients must not become an update."""
    model, twin = Toy(), Toy()
    engine, plain = make_engine(model, ds_config(gas=2)), make_engine(twin, ds_config(gas=2))
    for micro in range(2):
        for e in (engine, plain):
            e.backward(loss_of(e, BATCH))
            e.step()
        if micro == 0:
            model.embed.requires_grad_(False)
    assert torch.equal(model.embed.weight, twin.embed.weight) and engine.coverage()["embed.weight"] == 1


def test_unfreezing_what_no_group_has_is_an_error_at_once():
    model = Toy()
    model.norm.weight.requires_grad_(False)
    engine = make_engine(model, ds_config())
    rotate(engine, 1)
    model.norm.weight.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"norm.weight: requires_grad was set after"):
        rotate(engine, 1)


def test_only_the_active_group_gets_gradients_where_a_forward_goes_past_the_engine():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = Toy()
            self.extra = nn.Linear(3, 3)

        def forward(self, *batch):
            return self.backbone(*batch) + 0 * self.extra.weight.sum()

    model = Wrapped()
    engine = make_engine(model, ds_config(hift={"groups": [["embed"], ["layers", "norm", "head", "extra"]]}))
    seen = []
    model.backbone.layers[0].register_forward_hook(lambda m, a, out: seen.append(out.requires_grad))
    model.backbone.embed.register_forward_hook(lambda m, a, out: seen.append(out.requires_grad))
    engine.optimizer.schedule.advance()  # the upper group is active: nothing below may need a gradient
    engine.backward(model.backbone(*BATCH))
    assert seen == [False, True]
    engine.step()


def test_a_deep_copy_is_nothing_of_the_engines():
    """An average of the weights, made and evaluated while training goes on, maybe on one rank alone."""
    model = Toy()
    engine = make_engine(model, ds_config())
    rotate(engine, 1)
    twin = copy.deepcopy(model)
    twin(*BATCH).backward()
    assert all(flags_of(model).values()) and all(param.grad is not None for param in twin.parameters())
    with torch.no_grad():
        assert torch.equal(twin(*BATCH), model(*BATCH))
    rotate(engine, 4)
    assert set(engine.coverage().values()) == {1}
    engine.destroy()


class Stop(BaseException):
    """Stands for Ctrl-C."""


@pytest.mark.parametrize("where", ["forward", "backward", "between", "after"])
def test_a_loop_that_is_interrupted_and_begun_again(where):
    """A cell run twice: the earlier engine was never destroyed, and was stopped anywhere."""
    model = Toy()
    engine = make_engine(model, ds_config())
    rotate(engine, 2)

    def stop(*_):
        raise Stop

    handle = None
    if where == "forward":
        handle = model.layers[1].register_forward_hook(stop)
    try:
        loss = loss_of(engine, BATCH)
        if where == "backward":
            loss.register_hook(stop)
        if where != "between":
            engine.backward(loss)
        if where == "after":
            engine.step()
    except Stop:
        pass
    if handle is not None:
        handle.remove()
    if where != "between":
        assert all(flags_of(model).values())
    again = make_engine(model, ds_config())
    assert len(again.groups) == 5 and len(again.coverage()) == len(list(model.parameters()))
    rotate(again, 5)
    assert set(again.coverage().values()) == {1}
    with pytest.raises(HiFTError, match="training has ended"):
        engine.backward(loss_of(engine, BATCH))
    del engine
    gc.collect()
    rotate(again, 5)
    again.destroy()
    assert all(flags_of(model).values()) and not hooks_of(model)


@pytest.mark.parametrize("update", ["after_backward", "in_backward"])
def test_an_engine_leaves_no_hook_no_gradient_and_no_state_and_another_engine_goes_on(update):
    model = Toy()
    model.layers[0].gain.requires_grad_(False)
    flags = flags_of(model)
    hift = {"activations": {"checkpointing": False}, "state": {"residency": "host"}, "update": update}
    engine = make_engine(model, ds_config(hift=hift, gas=2))
    rotate(engine, 5)
    engine.backward(loss_of(engine, BATCH))
    store = engine.optimizer.store
    assert store._host
    for _ in range(2):
        engine.destroy()
        assert flags_of(model) == flags and not hooks_of(model)
        assert all(p.grad is None for p in model.parameters()) and not store._host and not store._slots
    with torch.no_grad():
        assert torch.equal(engine(*BATCH), model(*BATCH))
    config = {k: v for k, v in ds_config().items() if k != "hift"}
    config["optimizer"]["params"]["torch_adam"] = True
    with as_single_process():  # DeepSpeed wants a launcher's variables
        stock = deepspeed.initialize(model=model, config=config)[0]
    before = weights_of(model)
    stock.backward(loss_of(stock, BATCH))
    stock.step()
    changed = [n for n, w in weights_of(model).items() if not torch.equal(before[n], w)]
    assert set(changed) == {n for n, flag in flags.items() if flag}


@pytest.mark.parametrize("failed", [False, True])
def test_memory_of_states_goes_back_to_the_system_when_nothing_uses_it(failed, monkeypatch):
    """Another engine of the same process counts what is free. A rank that leaves by an error waits for no device, on
    which another rank's collective may never end."""
    happened = []
    engine = make_engine(Toy(), ds_config(hift={"state": {"residency": "host"}}))
    store = engine.optimizer.store
    monkeypatch.setattr(lifetime, "finish_device_work", lambda: happened.append("device"))
    monkeypatch.setattr(lifetime, "return_page_locked", lambda device: happened.append(len(store._host)))
    rotate(engine, 2)
    assert store._host and not happened
    engine.end_training(failed)
    engine.destroy()
    assert happened == ([0] if failed else ["device", 0])


def test_what_keeps_gradients_or_updates_on_the_host_is_closed_with_the_engine(monkeypatch):
    """Its buffers are page-locked memory too."""
    closed = []
    engine = make_engine(Toy(), ds_config(hift={"update": "in_backward"}))
    optimizer = engine.optimizer
    monkeypatch.setattr(optimizer.updates, "host_step", SimpleNamespace(close=lambda: closed.append("updates")))
    beside = SimpleNamespace(close=lambda: closed.append("beside"), abandon=int)
    monkeypatch.setattr(optimizer.updates, "beside", beside)
    monkeypatch.setattr(optimizer.sums, "close", lambda: closed.append("sums"))
    monkeypatch.setattr(optimizer.held_back, "close", lambda: closed.append("held back"))
    engine.destroy()
    assert sorted(closed) == ["beside", "held back", "sums", "updates"]


def test_gradients_that_are_not_the_engines_stay_when_it_ends():
    """Another's that trains the same weights by now."""
    engine = make_engine(Toy(), ds_config())
    rotate(engine, 1)
    for param in engine.module.parameters():
        param.grad = torch.ones_like(param)
    engine.destroy()
    assert all(param.grad is not None for param in engine.module.parameters())


ENDS = {
    "torch": torch.distributed.destroy_process_group,
    "deepspeed": lambda: deepspeed.comm.destroy_process_group(),
    "accelerate": lambda: PartialState().destroy_process_group(),
    "hift-ds train": _leave_job,
}


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("ends", [*ENDS, "torch, under an engine"])
def test_an_engine_after_the_process_group_has_ended(ends, stage):
    """DeepSpeed keeps the groups of the job that ended."""

    def losses_of_two_steps() -> tuple[list[float], object]:
        engine = make_engine(Toy(), ds_config(stage=stage))
        return [train_step(engine, [BATCH]) for _ in range(2)], engine

    before, engine = losses_of_two_steps()
    if "under" not in ends:
        engine.destroy()
    ENDS[ends.split(",")[0]]()
    assert not torch.distributed.is_initialized()
    after, engine = losses_of_two_steps()
    assert before == after
    engine.destroy()


def test_a_training_that_was_left_ends_at_the_next_forward_of_the_model():
    """In a hook of that forward, of which others are the engine's too."""
    model = Toy()
    engine = make_engine(model, ds_config(hift={"activations": {"checkpointing": True}}))
    rotate(engine, 2)
    engine.life.is_under_way = lambda: False
    with torch.no_grad():
        loss = model(*BATCH)
        assert engine.has_ended and not hooks_of(model) and torch.equal(loss, model(*BATCH))


def test_an_engine_that_cannot_be_made_leaves_the_model_as_it_was():
    model = Toy()
    with pytest.raises(HiFTError):
        make_engine(model, ds_config(hift={"groups": [["nothing like this"]]}))
    with pytest.raises(HiFTError):
        make_engine(model, ds_config(hift={"state": {"codec": "split_master"}}))
    another = torch.optim.SGD(Toy().parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="another optimizer"):  # found when all else is made
        make_engine(model, ds_config(), lr_scheduler=torch.optim.lr_scheduler.StepLR(another, 1))
    no_folder = {"state": {"residency": "disk", "path": "/dev/null/states"}}
    with pytest.raises(HiFTError, match="/dev/null"):  # when weights have hooks
        make_engine(model, ds_config(gas=2, bf16={"enabled": True}, hift=no_folder))
    assert all(flags_of(model).values()) and not hooks_of(model)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("as_returned", [True, False])
def test_a_gradient_does_not_depend_on_whether_the_loss_is_what_the_model_returned(scaled, as_returned):
    """DeepSpeed 0.19.8 divides by the accumulation steps once more if it is."""
    model, gas = Toy(), 3
    engine = make_engine(model, ds_config(gas=gas, lr=0.0, hift={"groups": [["."]]}))
    norm = torch.nn.utils.get_total_norm(torch.autograd.grad(loss_of(model, BATCH), list(model.parameters())))
    for _ in range(gas):
        loss = loss_of(engine, BATCH)
        engine.backward(loss if as_returned else loss * 1.0, scale_wrt_gas=scaled)
        engine.step()
    assert engine.last_report.grad_norm == pytest.approx(norm.item() * (1 if scaled else gas), rel=1e-6)
