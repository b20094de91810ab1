"""The engine on one rank equals hift_ds/reference.py bit for bit, whatever is switched on."""

import copy
import functools
import math
import re
import warnings

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import hift_ds
from hift_ds.errors import ConfigError, GroupingError
from hift_ds.reference import ReferenceHiFT
from tests.helpers.engines import ds_config, largest_difference, make_engine, train_step, weights_of
from tests.helpers.toy import Toy, loss_of, make_batches

CYCLES = 5


def adamw(lr=1e-2, **options):
    return lambda named: torch.optim.AdamW([p for _, p in named], lr=lr, **options)


def compare(config, make_optimizer, *, model=None, gas=1, reference_options=None, cycles=CYCLES, prepare=None):
    """Step both and compare every weight after every step. Returns the engine."""
    model = model or Toy()
    twin = copy.deepcopy(model)
    if prepare:
        prepare(twin)
    engine = make_engine(model, config)
    try:
        reference = ReferenceHiFT(
            twin, [group.param_names for group in engine.groups], make_optimizer, **(reference_options or {})
        )
        batches = make_batches(7 * gas)
        for step in range(cycles * engine.schedule.steps_per_cycle):
            micro_batches = [batches[(step * gas + i) % len(batches)] for i in range(gas)]
            loss = train_step(engine, micro_batches)
            expected = reference.step(micro_batches, loss_of)
            assert loss == pytest.approx(expected, rel=1e-6), step
            assert largest_difference(model, twin) == 0.0, (step, engine.last_report)
    finally:
        engine.destroy()
    return engine


def test_fp32_over_five_cycles():
    engine = compare(ds_config(), adamw())
    assert set(engine.coverage().values()) == {CYCLES}


@pytest.mark.parametrize("stage", [1, 2])
def test_stages_one_and_two_are_the_same_computation(stage):
    compare(ds_config(stage=stage), adamw(), cycles=2)


@pytest.mark.parametrize("order", ["top2down", "random"])
def test_orders_and_ragged_last_group(order):
    """Five groups in groups of two: the last has one."""
    hift = {"order": order, "reshuffle": order == "random", "seed": 5, "group_size": 2}
    options = {"order": order, "reshuffle": order == "random", "seed": 5}
    engine = compare(ds_config(hift=hift), adamw(), reference_options=options)
    assert len(engine.groups) == 3


def test_accumulation_clipping_and_turns_together():
    config = ds_config(gas=3, clip=0.05, hift={"steps_per_group": 2}, params={"weight_decay": 0.1})
    compare(
        config,
        adamw(weight_decay=0.1),
        gas=3,
        reference_options={"steps_per_group": 2, "max_grad_norm": 0.05},
        cycles=3,
    )


def test_updates_in_slices_change_nothing():
    config = ds_config(clip=0.05, hift={"state": {"slice_numel": 17}})
    engine = compare(config, adamw(), reference_options={"max_grad_norm": 0.05})
    assert max(len(group.chunks) for group in engine.optimizer.groups.values()) > 5


@pytest.mark.parametrize("state", [{"residency": "device"}, {"step_on": "host"}, {"pin_memory": False}])
def test_where_states_live_changes_nothing(state):
    compare(ds_config(hift={"state": state}), adamw(), cycles=2)


def test_tied_weights_are_trained_once_with_the_bottom_group():
    engine = compare(ds_config(), adamw(), model=Toy(tied=True))
    assert "embed.weight" in engine.groups[0].param_names
    assert sum(names.count("head.weight") for names in (g.param_names for g in engine.groups)) == 0


def test_frozen_weights_stay_and_flags_come_back():
    model = Toy()
    model.layers[1].up.weight.requires_grad_(False)
    model.norm.requires_grad_(False)
    frozen_before = weights_of(model)
    flags = {name: param.requires_grad for name, param in model.named_parameters()}
    compare(ds_config(params={"weight_decay": 0.5}), adamw(weight_decay=0.5), model=model, cycles=2)
    for name in ("layers.1.up.weight", "norm.weight", "norm.bias"):
        assert torch.equal(dict(model.named_parameters())[name], frozen_before[name])
    assert {name: param.requires_grad for name, param in model.named_parameters()} == flags


OPTIMIZERS = {
    "Adam": (
        {"adam_w_mode": False, "weight_decay": 0.1},
        lambda ps: torch.optim.Adam(ps, lr=1e-2, weight_decay=0.1),
    ),
    "SGD": ({}, lambda ps: torch.optim.SGD(ps, lr=1e-2)),
    "SGDM": (
        {"momentum": 0.9, "nesterov": True},
        lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=0.9, nesterov=True),
    ),
    "Adagrad": ({}, lambda ps: torch.optim.Adagrad(ps, lr=1e-2)),
    "Adafactor": ({}, lambda ps: torch.optim.Adafactor(ps, lr=1e-2)),
    "RMSprop": ({}, lambda ps: torch.optim.RMSprop(ps, lr=1e-2)),
    "Lion": ({"weight_decay": 0.1}, lambda ps: hift_ds.optim.lion.Lion(ps, lr=1e-2, weight_decay=0.1)),
    "torch.optim.Adamax": ({}, lambda ps: torch.optim.Adamax(ps, lr=1e-2)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_keeps_its_states_over_cycles(name):
    params, build = OPTIMIZERS[name]
    config = ds_config(optimizer="SGD" if name == "SGDM" else name, params=params)
    compare(config, lambda named: build([p for _, p in named]), cycles=3)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="Muon comes with torch 2.9")
def test_muon_takes_the_matrices_of_blocks():
    from hift_ds.optim.muon import MuonWithAuxAdamW

    def build(named):
        matrices = [p for n, p in named if n.startswith("layers") and p.dim() == 2]
        rest = [p for n, p in named if not (n.startswith("layers") and p.dim() == 2)]
        return MuonWithAuxAdamW(
            [{"params": matrices}],
            [{"params": rest}],
            {"lr": 1e-2, "weight_decay": 0.1},
            {"lr": 1e-2, "weight_decay": 0.1},
        )

    compare(ds_config(optimizer="Muon", params={"weight_decay": 0.1}), build, cycles=3)


def test_client_optimizer_with_decay_and_no_decay_groups():
    model = Toy()
    twin = copy.deepcopy(model)

    def build(named):
        decay = [p for _, p in named if p.dim() > 1]
        rest = [p for _, p in named if p.dim() <= 1]
        return torch.optim.AdamW(
            [{"params": decay, "weight_decay": 0.3}, {"params": rest, "weight_decay": 0.0, "lr": 3e-3}],
            lr=1e-2,
        )

    client = build(list(model.named_parameters()))
    engine = make_engine(model, ds_config(optimizer=None), optimizer=client)
    reference = ReferenceHiFT(twin, [g.param_names for g in engine.groups], build)
    for batch in make_batches(15):
        train_step(engine, [batch])
        reference.step([batch], loss_of)
        assert largest_difference(model, twin) == 0.0
    assert engine.optimizer.param_groups is client.param_groups and engine.get_lr() == [1e-2, 3e-3]
    engine.destroy()


def like_torch(change, *, steps=6, **hift):
    """Train with AdamW on all weights in every step, and with torch's own loop; both equal after every step.

    Args:
        change: (step, the model, the optimizer) -> what a user does before each step, in both.
    """
    model, twin = Toy(), Toy()
    own, reference = (torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, twin))
    hift = {"group_size": "all", "lr_update": "step", **hift}
    engine = make_engine(model, ds_config(optimizer=None, hift=hift), optimizer=own)
    try:
        for step, batch in enumerate(make_batches(steps)):
            change(step, model, own)
            change(step, twin, reference)
            train_step(engine, [batch])
            reference.zero_grad()
            loss_of(twin, batch).backward()
            reference.step()
            assert largest_difference(model, twin) == 0.0, step
    finally:
        engine.destroy()


@pytest.mark.parametrize("update", ["after_backward", "in_backward"])
def test_step_hooks_of_the_callers_optimizer_are_called_once_a_step(update, caplog):
    seen = []

    def register(step, model, optimizer):
        def set_rate(given, args, kwargs):
            assert given is optimizer and args == (optimizer,) and kwargs == {}
            optimizer.param_groups[0]["lr"] *= 0.8

        def clamp(given, args, kwargs):
            assert given is optimizer and torch.is_grad_enabled()
            seen.append([len(group["params"]) for group in given.param_groups])
            with torch.no_grad():
                for param in given.param_groups[0]["params"]:
                    param.clamp_(-0.3, 0.3)

        if step == 1:
            optimizer.register_step_pre_hook(set_rate)
            optimizer.register_step_post_hook(clamp)

    like_torch(register, update=update, state={"slice_numel": 16})
    assert len(seen) == 2 * 5 and all(entry == [17] for entry in seen)
    assert caplog.text.count("step_pre_hook finds no gradients") == 1


@pytest.mark.parametrize("name", ["AdamW", "Muon"])
def test_torchs_global_step_hooks_are_called_once_a_step(name):
    if not hasattr(torch.optim, name):
        pytest.skip("Muon comes with torch 2.9")
    seen = []
    engine = make_engine(Toy(), ds_config(optimizer=name, hift={"state": {"slice_numel": 16}}))
    hooks = [
        register(lambda optimizer, args, kwargs: seen.append(type(optimizer)))
        for register in (register_optimizer_step_pre_hook, register_optimizer_step_post_hook)
    ]
    for batch in make_batches(2):
        train_step(engine, [batch])
    for hook in hooks:
        hook.remove()
    assert seen == [type(engine.optimizer.optimizer)] * 4
    engine.destroy()


def test_param_groups_that_were_replaced_count():
    def replace(step, model, optimizer):
        if step == 2:
            optimizer.param_groups = [{**group, "lr": 3e-3, "weight_decay": 0.5} for group in optimizer.param_groups]

    like_torch(replace)


@pytest.mark.parametrize(
    "change,expected",
    [
        (lambda model, own: own.add_param_group({"params": [nn.Parameter(torch.ones(2))]}), "parameters are fixed"),
        (lambda model, own: own.param_groups[0]["params"].pop(), "parameters are fixed"),
        (lambda model, own: own.load_state_dict(_stepped(Toy()).state_dict()), "restored by engine.load_checkpoint"),
        (lambda model, own: setattr(own, "step", lambda: None), "step was replaced on the object"),
    ],
)
@pytest.mark.parametrize("update", ["after_backward", "in_backward"])
def test_changes_of_the_callers_optimizer_without_effect_are_refused(change, expected, update):
    model = Toy()
    own = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine = make_engine(model, ds_config(optimizer=None, hift={"update": update}), optimizer=own)
    train_step(engine, make_batches(1))
    before = weights_of(model)
    change(model, own)
    with pytest.raises(ConfigError, match=expected):
        train_step(engine, make_batches(1))
    assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())
    engine.destroy()


def test_the_callers_optimizer_is_stepped_and_saved_by_the_engine_alone(caplog):
    model = Toy()
    own = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine = make_engine(model, ds_config(optimizer=None), optimizer=own)
    engine.backward(loss_of(engine, make_batches(1)[0]))
    with pytest.raises(ConfigError, match=r"call engine.step\(\)"):
        own.step()
    engine.step()
    assert "finds no gradients" not in caplog.text  # no hook of the caller's
    own.state_dict()
    assert caplog.text.count("has no states, which the engine keeps") == 1
    engine.destroy()
    with pytest.raises(ConfigError, match="another optimizer"):  # an engine that is not made leaves no trace
        scheduler = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(Toy().parameters()), 1)
        make_engine(model, ds_config(optimizer=None), optimizer=own, lr_scheduler=scheduler)
    own.step()  # the caller's again
    own.state_dict()
    assert caplog.text.count("has no states, which the engine keeps") == 1


def _stepped(model, make=torch.optim.AdamW, **options):
    optimizer = make(model.parameters(), lr=1e-2, **options)
    loss_of(model, make_batches(1)[0]).backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def test_an_optimizer_with_states_of_earlier_steps_is_refused():
    for make, options in (
        (torch.optim.AdamW, {}),
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.Adagrad, {}),
    ):
        model = Toy()
        with pytest.raises(ConfigError, match=f"{make.__name__} has states "):
            make_engine(model, ds_config(optimizer=None), optimizer=_stepped(model, make, **options))
    model = Toy()
    make_engine(model, ds_config(optimizer=None), optimizer=_stepped(model, torch.optim.SGD)).destroy()  # it has none


def test_an_optimizer_whose_constructor_makes_states_serves_two_engines():
    model, twin = Toy(), Toy()
    own = torch.optim.Adagrad(model.parameters(), lr=1e-2, initial_accumulator_value=0.1)
    for _ in range(2):
        engine = make_engine(model, ds_config(optimizer=None, hift={"group_size": "all"}), optimizer=own)
        reference = torch.optim.Adagrad(twin.parameters(), lr=1e-2, initial_accumulator_value=0.1)
        for batch in make_batches(3):
            train_step(engine, [batch])
            reference.zero_grad()
            loss_of(twin, batch).backward()
            reference.step()
            assert largest_difference(model, twin) == 0.0
        assert not own.state  # the engine has them
        engine.destroy()


def test_weights_that_are_not_the_models_are_refused():
    model, other = Toy(tied=True), nn.Linear(3, 4)
    weights = [*model.parameters(), *other.parameters()]
    with pytest.raises(ConfigError, match=r"optimizer=: 2 weights \(4, 4 x 3\) are not the model's"):
        make_engine(model, ds_config(optimizer=None), optimizer=torch.optim.AdamW(weights))
    with pytest.raises(ConfigError, match=r"model_parameters=: 2 weights"):
        make_engine(model, ds_config(), model_parameters=weights)
    assert all(param.requires_grad for param in weights)
    other.requires_grad_(False)
    make_engine(model, ds_config(optimizer=None), optimizer=torch.optim.AdamW(weights)).destroy()


def test_optimizers_that_train_nothing_piece_by_piece_are_refused():
    class Lookahead(torch.optim.Optimizer):
        def __init__(self, params, lr):
            self.fast = [torch.optim.SGD(params, lr=lr)]
            super().__init__(self.fast[0].param_groups, {"lr": lr})

        def step(self, closure=None):
            self.fast[0].step()

    class ScheduleFree(torch.optim.SGD):
        def train(self):
            pass

        eval = train

    class Other:
        def __init__(self, params, lr):
            self.param_groups = [{"params": list(params), "lr": lr}]

    def replaced(params, lr):
        optimizer = torch.optim.SGD(params, lr=lr)
        optimizer.step = lambda: None
        return optimizer

    for make, expected in (
        (Lookahead, "an optimizer inside it (SGD)"),
        (ScheduleFree, "its train() and eval() need the states"),
        (functools.partial(torch.optim.SGD, differentiable=True), "keeps a graph"),
        (replaced, "replaced on the object"),
        (Other, "expected a torch.optim.Optimizer, or a function of the parameters that makes one; got Other"),
    ):
        model = Toy()
        with pytest.raises(ConfigError, match=re.escape(expected)):
            make_engine(model, ds_config(optimizer=None), optimizer=make(model.parameters(), lr=0.1))


def test_arguments_that_would_train_otherwise_than_they_say_are_refused():
    def names_in_groups(model):
        return {"model_parameters": [{"params": list(model.named_parameters())}]}

    def schedule_of(make):
        def arguments(model):
            own, other = (torch.optim.AdamW(m.parameters()) for m in (model, Toy()))
            return {"optimizer": own, "lr_scheduler": make(other)}

        return arguments

    lr = torch.optim.lr_scheduler
    for make, expected in (
        (names_in_groups, "expected parameters, or param_group dicts of them, without names; found tuple"),
        (lambda model: {"optimizer": lambda params: None}, "that makes one; got NoneType"),
        (schedule_of(lambda o: lr.StepLR(o, 1)), "lr_scheduler=: StepLR sets the rates of another optimizer"),
        (
            schedule_of(lambda o: lr.SequentialLR(o, [lr.ConstantLR(o), lr.StepLR(o, 1)], [2])),
            "lr_scheduler=: SequentialLR sets the rates of another optimizer",
        ),
    ):
        model = Toy()
        config = ds_config(optimizer="AdamW" if make is names_in_groups else None)
        with pytest.raises(ConfigError, match=re.escape(expected)):
            make_engine(model, config, **make(model))


def test_a_scheduler_that_wants_a_metric_gets_it_or_is_refused():
    """DeepSpeed gives such a scheduler the batch size: never better, and the rate sinks."""
    model = Toy()
    own = torch.optim.AdamW(model.parameters(), lr=1e-2)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(own, patience=0, factor=0.5)
    engine = make_engine(model, ds_config(optimizer=None), optimizer=own, lr_scheduler=plateau)
    with pytest.raises(ConfigError, match=r"the step\(\) of ReduceLROnPlateau wants 'metrics'; call engine.step"):
        train_step(engine, make_batches(1))
    for metric, rate in ((1.0, 1e-2), (0.5, 1e-2), (0.6, 5e-3)):
        engine.step({"metrics": metric})
        assert own.param_groups[0]["lr"] == rate
        engine.backward(loss_of(engine, make_batches(1)[0]))
    engine.destroy()


def test_parameters_the_optimizer_was_not_given_stay_and_get_no_gradient():
    model = Toy()
    before = weights_of(model)
    engine = make_engine(model, ds_config(), model_parameters=list(model.layers.parameters()))
    assert len(engine.groups) == 3
    for batch in make_batches(6):
        train_step(engine, [batch])
    assert torch.equal(model.embed.weight, before["embed.weight"])
    assert not torch.equal(model.layers[0].up.weight, before["layers.0.up.weight"])
    engine.destroy()
    assert all(p.requires_grad for p in model.parameters())


def test_always_active_parameters_are_trained_in_every_turn():
    model = Toy()
    hift = {"always_active": ["^embed", "^head"], "order": "random", "reshuffle": True}
    engine = make_engine(model, ds_config(hift=hift))
    assert len(engine.groups) == 4
    for batch in make_batches(8):
        train_step(engine, [batch])
    coverage = engine.coverage()
    assert coverage["embed.weight"] == coverage["head.bias"] == 8
    assert coverage["layers.0.gain"] == coverage["norm.weight"] == 2
    assert model.embed.weight.requires_grad
    engine.destroy()


def test_explicit_groups():
    hift = {"groups": [["layers", "embed"], ["norm", "head"]]}
    engine = compare(ds_config(hift=hift), adamw(), cycles=3)
    assert [len(g.param_names) for g in engine.groups] == [13, 4]
    with pytest.raises(GroupingError, match="head"):
        make_engine(Toy(), ds_config(hift={"groups": [["layers", "embed"], ["norm"]]}))


# -- precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gas", [1, 3])
@pytest.mark.parametrize("state", [{}, {"slice_numel": 17}, {"step_on": "host"}])
def test_mixed_hi_in_bf16_keeps_the_fp32_bits_of_the_checkpoint(gas, state):
    """The model comes in fp32; its masters must start from those bits, not from the rounded weights."""
    exact = dict(Toy().named_parameters())

    def build(named):
        for name, master in named:
            master.data.copy_(exact[name])
        return torch.optim.AdamW([p for _, p in named], lr=1e-3)

    config = ds_config(lr=1e-3, gas=gas, clip=0.05, bf16={"enabled": True}, hift={"state": state})
    compare(
        config,
        build,
        gas=gas,
        reference_options={"max_grad_norm": 0.05},
        prepare=lambda twin: twin.to(torch.bfloat16),
        cycles=3,
    )


def _clamp(model):
    with torch.no_grad():
        for param in model.parameters():
            param.clamp_(-0.3, 0.3)


def _load(model):
    model.load_state_dict({name: value.roll(1) for name, value in model.state_dict().items()})


def _swap_in_and_back(model):
    kept = weights_of(model)
    _clamp(model)
    model.load_state_dict(kept)


@pytest.mark.parametrize("change", [_clamp, _load, _swap_in_and_back])
@pytest.mark.parametrize(
    "hift",
    [
        {},
        {"state": {"slice_numel": 16, "slots": 2}},
        {"update": "in_backward", "group_size": "all"},
        {"update": "in_backward", "group_size": "all", "clipping": "speculative"},
    ],
)
def test_16_bit_weights_that_are_changed_by_hand_are_the_masters_new_values(change, hift):
    clip = (0.2 if change is _clamp else 0.4) if "clipping" in hift else 0.0
    model, twin = Toy(), Toy()
    engine = make_engine(model, ds_config(clip=clip, bf16={"enabled": True}, hift=hift))
    groups = [group.param_names for group in engine.groups]
    reference = ReferenceHiFT(twin.to(torch.bfloat16), groups, adamw(), max_grad_norm=clip)
    for name, weight in Toy().named_parameters():  # masters keep the model's fp32 bits
        reference.updated[name].data.copy_(weight.detach())
    undone_after_change = 0
    for step, batch in enumerate(make_batches(17)):
        if is_changed := step % 3 != 2:
            change(model)
            change(twin)
        train_step(engine, [batch])
        reference.step([batch], loss_of)
        assert largest_difference(model, twin) == 0.0, step
        undone_after_change += is_changed and engine.last_report.undone > 0
    assert undone_after_change or not clip
    engine.destroy()


def test_a_change_by_hand_waits_for_the_update_of_its_weight():
    """The group's turn comes, but the loss does not reach the layer."""
    model = Toy().to(torch.bfloat16)
    twin = copy.deepcopy(model)
    engine = make_engine(model, ds_config(bf16={"enabled": True}, hift={"group_size": "all"}))
    reference = ReferenceHiFT(twin, [engine.groups[0].param_names], adamw())
    for step, batch in enumerate(make_batches(4)):
        for one in (model, twin):
            if step == 1:
                _clamp(one)
                one.layers[0].forward = lambda h: h
            if step == 2:
                del one.layers[0].forward
        train_step(engine, [batch])
        reference.step([batch], loss_of)
        assert largest_difference(model, twin) == 0.0, step
    engine.destroy()


def test_max_norm_of_an_embedding_holds_with_masters():
    """Forward renormalizes the rows that it reads; an update from the masters as they were would undo it."""
    model = Toy().to(torch.bfloat16)
    model.embed.max_norm = 0.5
    engine = compare(ds_config(lr=1e-3, bf16={"enabled": True}), adamw(1e-3), model=model, cycles=3)
    assert engine.module.embed.weight.float().norm(dim=1).max() < 0.52


def test_mixed_hi_from_a_bf16_checkpoint():
    compare(ds_config(bf16={"enabled": True}), adamw(), model=Toy().to(torch.bfloat16), cycles=2)


def test_fp16_under_a_static_scale_matches_unscaled_gradients():
    config = ds_config(fp16={"enabled": True, "loss_scale": 8}, clip=0.05)
    model, twin = Toy().half(), Toy().half()
    engine = make_engine(model, config)
    reference = ReferenceHiFT(twin, [g.param_names for g in engine.groups], adamw(), max_grad_norm=0.05)
    for batch in make_batches(15):
        train_step(engine, [batch])
        reference.step([batch], loss_of)
    assert largest_difference(model, twin) < 2e-3
    engine.destroy()


def test_overflow_moves_nothing_and_retries_the_group():
    """A scale of 2^24 overflows fp16 gradients; the same batch goes through once the scale has come down."""
    model = Toy().half()
    config = ds_config(
        fp16={"enabled": True, "initial_scale_power": 24, "hysteresis": 1},
        scheduler={
            "type": "WarmupLR",
            "params": {"warmup_min_lr": 0.0, "warmup_max_lr": 1e-2, "warmup_num_steps": 50},
        },
    )
    engine = make_engine(model, config)
    groups, skipped = [], 0
    for batch in make_batches(40):
        before, scale = weights_of(model), engine.optimizer.scaler.scale
        ticks = engine.lr_scheduler.last_batch_iteration
        train_step(engine, [batch])
        report = engine.last_report
        if not report.skipped:
            groups.append(report.group)
        else:
            skipped += 1
            assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
            assert engine.optimizer.scaler.scale == scale / 2 and engine.lr_scheduler.last_batch_iteration == ticks
            assert engine.schedule.active == report.group and not math.isfinite(report.grad_norm)
            assert all(p.grad is None for p in model.parameters())
    assert skipped >= 5 and engine.skipped_steps == skipped
    assert groups == [i % 5 for i in range(len(groups))]  # nobody lost a turn, nobody got two
    assert engine.coverage()["embed.weight"] == groups.count(0)
    engine.destroy()


def test_mixed_is_fp32_weights_under_autocast():
    config = ds_config(torch_autocast={"enabled": True, "dtype": "bfloat16"})
    model, twin = Toy(), Toy()
    engine = make_engine(model, config)

    def autocast_loss(module, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return module(*batch)

    reference = ReferenceHiFT(twin, [g.param_names for g in engine.groups], adamw())
    for batch in make_batches(10):
        train_step(engine, [batch])
        reference.step([batch], autocast_loss)
        assert largest_difference(model, twin) == 0.0
    assert model.embed.weight.dtype == torch.float32 and engine.optimizer.states.precision.name == "mixed"
    engine.destroy()


def train_pure_bf16(stochastic: bool) -> dict[str, torch.Tensor]:
    hift = {"master_weights": False, "stochastic_rounding": stochastic}
    model = Toy()
    engine = make_engine(model, ds_config(lr=1e-3, bf16={"enabled": True}, hift=hift, optimizer="SGD"))
    assert all(record.master is None for records in engine.optimizer.states.records.values() for record in records)
    for batch in make_batches(20):
        train_step(engine, [batch])
    engine.destroy()
    return weights_of(model)


def test_pure_bf16_has_no_masters_and_stochastic_rounding_keeps_small_steps():
    start = weights_of(Toy().to(torch.bfloat16))
    nearest, stochastic, again = train_pure_bf16(False), train_pure_bf16(True), train_pure_bf16(True)
    assert all(torch.equal(stochastic[n], again[n]) for n in start)  # seeded by step, not by luck
    moved = [sum(int((start[n] != after[n]).sum()) for n in start) for after in (nearest, stochastic)]
    assert moved[1] > 1.5 * moved[0] > 0


# -- learning rate ----------------------------------------------------------------------------------------------


def test_one_rate_per_cycle_through_a_deepspeed_scheduler():
    scheduler = {
        "type": "WarmupDecayLR",
        "params": {"warmup_min_lr": 0.0, "warmup_max_lr": 1e-2, "warmup_num_steps": 7, "total_num_steps": 50},
    }
    engine = make_engine(Toy(), ds_config(scheduler=scheduler))
    rates = []
    for batch in make_batches(50):
        train_step(engine, [batch])
        rates.append(engine.last_report.lr)
        assert engine.get_lr() == [engine.last_report.lr]
    by_cycle = [set(rates[i : i + 5]) for i in range(0, 50, 5)]
    assert all(len(values) == 1 for values in by_cycle) and len(set.union(*by_cycle)) == 10
    assert min(rates) > 0 and rates[-1] < 0.2 * max(rates)
    engine.destroy()


# -- what can go wrong ------------------------------------------------------------------------------------------


def test_a_group_that_takes_no_part_in_the_loss_is_skipped_and_shows_in_coverage():
    class WithUnusedTop(nn.Module):
        def __init__(self):
            super().__init__()
            self.toy = Toy(num_layers=2)
            self.unused_pooler = nn.Linear(7, 7)

        def forward(self, tokens, targets):
            return self.toy(tokens, targets)

    model = WithUnusedTop()
    hift = {"groups": [["embed"], ["layers"], ["norm", "head"], ["unused_pooler"]]}
    engine = make_engine(model, ds_config(hift=hift, params={"weight_decay": 0.5}))
    before = weights_of(model)
    for batch in make_batches(8):
        train_step(engine, [batch])
    assert engine.coverage()["unused_pooler.weight"] == 0 and engine.coverage()["toy.head.weight"] == 2
    assert torch.equal(before["unused_pooler.weight"], model.unused_pooler.weight)
    engine.destroy()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_of_the_models_own_is_said_in_the_first_cycle_if_it_keeps_layers_from_training(caplog, reentrant):
    """Reentrant: a layer whose input needs no gradient gets none, which only the last group's end would tell."""

    class Checkpointed(Toy):
        def forward(self, tokens, targets):
            h = self.embed(tokens)
            for layer in self.layers:
                h = torch.utils.checkpoint.checkpoint(layer, h, use_reentrant=reentrant)
            return nn.functional.cross_entropy(self.head(self.norm(h)).flatten(0, 1), targets.flatten())

    model, twin = Checkpointed(), Toy()
    engine, plain = make_engine(model, ds_config()), make_engine(twin, ds_config())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of inputs without gradients
        for batch in make_batches(10):
            train_step(engine, [batch]), train_step(plain, [batch])
    lines = [line for line in caplog.messages if "no gradient has reached group" in line]
    assert [line.split(":")[0] for line in lines] == ([f"step {step}" for step in (2, 3, 4)] if reentrant else [])
    assert all("use_reentrant=False" in line for line in lines)
    if not reentrant:
        assert largest_difference(model, twin) == 0
    engine.destroy(), plain.destroy()


def test_only_the_active_group_has_gradients_and_backward_stops_at_it():
    model = Toy()
    engine = make_engine(model, ds_config(hift={"order": "top2down"}))
    hidden, flags = [], []

    def see(module, args, output):
        hidden.append(output.requires_grad)
        flags.append({n for n, p in model.named_parameters() if p.requires_grad})

    model.layers[1].register_forward_hook(see)
    for batch in make_batches(5):
        active = set(engine.groups[engine.schedule.active].param_names)
        loss = loss_of(engine, batch)
        engine.backward(loss)
        # Taken at the boundary.
        assert {n for n, p in model.named_parameters() if p.grad is not None} == set()
        assert flags[-1] == active and all(p.requires_grad for p in model.parameters())
        engine.step()
    assert hidden == [False, False, True, True, True]  # head and top layer do not reach down to layer 1
    engine.destroy()


def test_two_backwards_before_one_step_add_up():
    """As plain torch and DeepSpeed have it; the gradients of the first used to be lost. One of them skips a block."""
    model = Toy()
    twin = copy.deepcopy(model)
    engine = make_engine(model, ds_config(hift={"groups": [["."]]}, optimizer="SGD"))
    plain = torch.optim.SGD(twin.parameters(), lr=1e-2)
    for step, batches in enumerate(zip(make_batches(3), make_batches(3, seed=9), strict=True)):
        for at, batch in enumerate(batches):
            for one in (model, twin):
                vars(one.layers[1]).pop("forward", None)
                if at == step % 2:
                    one.layers[1].forward = lambda h: h
            engine.backward(loss_of(engine, batch))
            loss_of(twin, batch).backward()
        engine.step()
        plain.step()
        plain.zero_grad()
        assert largest_difference(model, twin) == 0.0
    engine.destroy()


def test_groups_rotate_on_optimizer_steps_only():
    engine = make_engine(Toy(), ds_config(gas=4))
    for step, batch in enumerate(make_batches(12)):
        assert engine.schedule.active == step // 4
        train_step(engine, [batch])
    engine.destroy()


def test_without_a_block_it_is_plain_deepspeed():
    import deepspeed

    config = ds_config()
    del config["hift"]
    config["optimizer"]["params"]["torch_adam"] = True
    engine, *_ = hift_ds.initialize(model=Toy(), config=config)
    assert type(engine) is deepspeed.DeepSpeedEngine
    assert deepspeed.DeepSpeedEngine is deepspeed.runtime.engine.DeepSpeedEngine  # no lasting patch
    engine.destroy()


def test_config_from_a_path_and_from_args(tmp_path):
    import argparse
    import json

    path = tmp_path / "ds.json"
    path.write_text(json.dumps(ds_config()))
    for kwargs in (
        {"config": str(path)},
        {"config": path},
        {"args": argparse.Namespace(deepspeed_config=str(path), local_rank=0)},
    ):
        engine, *_ = hift_ds.initialize(model=Toy(), **kwargs)
        assert type(engine).__name__ == "HiFTEngine"
        engine.destroy()
    with pytest.raises(ConfigError, match="nowhere.json"):
        hift_ds.initialize(model=Toy(), config=str(tmp_path / "nowhere.json"))
    with pytest.raises(ConfigError, match="optimizer"):
        make_engine(Toy(), ds_config(optimizer=None))


@pytest.mark.parametrize("key", [{}, {"gradient_clipping": 0}, {"gradient_clipping": 0.0}, {"gradient_clipping": None}])
def test_nothing_is_clipped_unless_the_config_says_so(key):
    """DeepSpeed's own default became 1.0."""
    model, twin = Toy(), Toy()
    config = ds_config(optimizer="SGD", lr=0.03, hift={"groups": [["."]]})
    del config["gradient_clipping"]
    engine, plain = make_engine(model, config | key), torch.optim.SGD(twin.parameters(), lr=0.03)
    for batch in make_batches(3):
        engine.backward(30 * loss_of(engine, batch))
        engine.step()
        (30 * loss_of(twin, batch)).backward()
        plain.step()
        plain.zero_grad()
        assert engine.last_report.grad_norm > 1.0
    assert engine.gradient_clipping() == 0.0 and largest_difference(model, twin) == 0.0
    engine.destroy()


@pytest.mark.parametrize("scaled", [True, False])
def test_deepspeeds_monitors_get_the_loss(tmp_path, scaled):
    monitor = {"enabled": True, "output_path": str(tmp_path), "job_name": "run"}
    engine = make_engine(Toy(), ds_config(gas=2, csv_monitor=monitor))
    means = []
    for batch in make_batches(3):
        losses = []
        for _ in range(2):
            loss = loss_of(engine, batch)
            losses.append(loss.item())
            engine.backward(loss if scaled else loss / 2, scale_wrt_gas=scaled)
            engine.step()
        means.append(sum(losses) / 2)
    engine.destroy()
    lines = (tmp_path / "run" / "Train_Samples_train_loss.csv").read_text().split()[1:]
    assert [float(line.split(",")[1]) for line in lines] == pytest.approx(means)
    assert [int(line.split(",")[0]) for line in lines] == [24, 48, 72]


@pytest.mark.parametrize(("size", "is_said"), [(100, True), (5, True), (4, False), ("all", False)])
def test_a_group_size_that_takes_in_the_whole_model_is_said(caplog, size, is_said):
    update = {"update": "in_backward"} if size == "all" else {}
    make_engine(Toy(), ds_config(hift={"group_size": size, **update})).destroy()
    assert (f'"hift.group_size": {size} takes in the whole model' in caplog.text) == is_said


def test_weights_that_stop_being_numbers_are_said_at_once_and_once(caplog):
    engine = make_engine(Toy(), ds_config())
    for factor in (1.0, float("nan"), float("nan")):
        engine.backward(loss_of(engine, make_batches(1)[0]) * factor)
        engine.step()
    assert caplog.text.count("the gradient norm is nan") == 1
    assert "step 2 (group layers.0)" in caplog.text
    engine.destroy()


def test_a_group_size_beyond_the_model_is_said(caplog):
    for size, said in ((5, 1), (100, 2), (4, 2), (1, 2)):
        engine = make_engine(Toy(), ds_config(hift={"group_size": size}))
        assert caplog.text.count("which is full fine-tuning") == said, size
        engine.destroy()


class WithScale(Toy):
    """A weight without a dimension, as CLIP's ``logit_scale``; one whose last dimension has a stride other than 1, as
    small convolutions in ``channels_last``."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1.5))
        self.column = torch.nn.Parameter(torch.linspace(0.5, 1.5, 5).view(1, 5).t())

    def forward(self, tokens, targets):
        return super().forward(tokens, targets) * self.scale.exp() * self.column.square().mean()


@pytest.mark.parametrize("stage", [0, 2])
def test_a_weight_without_a_dimension(stage):
    model, twin = WithScale(), WithScale()
    with pytest.raises(ConfigError, match="scale: ZeRO-3 cannot cut a weight without a dimension"):
        make_engine(WithScale(), ds_config(stage=3))
    empty = Toy()
    empty.nothing = torch.nn.Parameter(torch.zeros(0, 3))
    with pytest.raises(ConfigError, match="nothing: ZeRO-3 cannot cut a weight without elements"):
        make_engine(empty, ds_config(stage=3))
    engine = make_engine(model, ds_config(stage=stage, gas=2, hift={"groups": [["."]]}))
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    for batch in make_batches(3):
        train_step(engine, [batch, batch])
        optimizer.zero_grad()
        loss_of(twin, batch).backward()
        optimizer.step()
    for (name, param), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert param.shape == expected.shape, name
        torch.testing.assert_close(param, expected, atol=2e-6, rtol=0, msg=name)


def with_complex():
    model = Toy()
    model.turn = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    return model


def with_float64():
    model = Toy()
    model.wide = nn.Parameter(torch.ones(3, dtype=torch.float64))
    return model


def with_sparse_embedding():
    model = Toy()
    model.embed = torch.nn.Embedding(11, 7, sparse=True)
    return model


@pytest.mark.parametrize(
    ("make_model", "make_optimizer", "message"),
    [
        (with_complex, lambda ps: torch.optim.AdamW(ps), "^turn: complex weights are not trained; keep torch.view_as"),
        (with_float64, lambda ps: torch.optim.AdamW(ps), r"^wide: float64 weights .*; call model.float\(\) first"),
        (Toy, lambda ps: torch.optim.LBFGS(ps), "LBFGS cannot train .* evaluates the loss several times"),
        (Toy, lambda ps: torch.optim.SparseAdam(ps), "SparseAdam cannot train .* needs sparse gradients"),
        (with_sparse_embedding, lambda ps: torch.optim.SGD(ps), "embed: sparse gradients"),
    ],
)
def test_what_cannot_be_stepped_is_refused_before_the_first_step(make_model, make_optimizer, message):
    model = make_model()
    with pytest.raises(ConfigError, match=message):
        make_engine(model, ds_config(optimizer=None), optimizer=make_optimizer(list(model.parameters())))
    assert all(param.requires_grad for param in model.parameters())
