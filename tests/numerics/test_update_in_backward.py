"""``"update": "in_backward"`` is another order of the same arithmetic: bit for bit torch's for all weights, and bit for
bit ``after_backward`` for any other group, with every switch; what cannot be the same is refused."""

from __future__ import annotations

import copy
import tempfile
import threading
import time
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import model_zoo
from hift_ds.engine.auto_groups import measured_costs
from hift_ds.engine.engine import HiFTEngine
from hift_ds.errors import ConfigError, HiFTError, StateStoreError, TrainingError
from hift_ds.optim.host_gradients import ROOM_BYTES
from hift_ds.reference import ReferenceHiFT
from hift_ds.store.hiding import BackwardCosts, HiddenLayers, fastest_share, layers_hidden
from hift_ds.store.machine import HostBytes, Machine
from hift_ds.store.speeds import Link
from tests.distributed.test_partitioned import KEEP_NOTHING
from tests.helpers.engines import ds_config, largest_difference, make_engine, train_step, weights_of
from tests.helpers.toy import Toy, loss_of, make_batches
from tests.numerics.test_savings import without_cache


def in_backward(config, **more):
    return {**config, "hift": {**config["hift"], "update": "in_backward", **more}}


# -- full fine-tuning ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_all_layers_are_torch_adamw_bit_for_bit(tied):
    model = Toy(tied=tied)
    twin = copy.deepcopy(model)
    engine = make_engine(model, in_backward(ds_config(params={"weight_decay": 0.1}), group_size="all"))
    assert len(engine.groups) == 1
    plain = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.1)
    for batch in make_batches(6):
        assert train_step(engine, [batch]) == float(loss_of(twin, batch).detach())
        loss_of(twin, batch).backward()
        norm = nn.utils.get_total_norm([param.grad for param in twin.parameters()])
        plain.step()
        plain.zero_grad()
        assert largest_difference(model, twin) == 0.0
        assert engine.last_report.grad_norm == float(norm)
    assert set(engine.coverage().values()) == {6}
    engine.destroy()


@pytest.mark.parametrize("name", model_zoo.FAMILIES)
def test_every_family_is_torch_adamw_bit_for_bit(name):
    model = model_zoo.tiny.build(name, model_zoo.FAMILIES[name].heads[0], attn_implementation="eager")
    twin = copy.deepcopy(model)
    engine = make_engine(model, in_backward(ds_config(params={"weight_decay": 0.1}), group_size="all"))
    plain = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.1)
    batch = without_cache(model, model_zoo.tiny.batch(model))
    for step in range(3):
        torch.manual_seed(step)  # of dropout
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        torch.manual_seed(step)
        twin(**batch).loss.backward()
        plain.step()
        plain.zero_grad()
        assert largest_difference(model, twin) == 0.0
    engine.destroy()


class Seen(torch.optim.SGD):
    """Keeps a number in its param_groups that its next step depends on: its topmost weight's gradients so far."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            earlier = group.get("seen", 0.0)
            group["seen"] = earlier + float(group["params"][-1].grad.float().abs().max())
            for param in group["params"]:
                param.add_(param.grad, alpha=-group["lr"] / (1 + earlier))


# -- every other group: after_backward, bit for bit ----------------------------------------------------------------

BF16 = {"bf16": {"enabled": True}}
BF16_SUMS = {"data_types": {"grad_accum_dtype": "bf16"}}
# name -> options of ds_config; of the "hift" block; of the model
CASES = {
    "two layers a group, ragged": ({}, {"group_size": 2}, {}),
    "random, turns of two": ({}, {"group_size": 2, "order": "random", "reshuffle": True, "steps_per_group": 2}, {}),
    "top down, one layer": ({}, {"order": "top2down"}, {}),
    "always active": ({}, {"group_size": 2, "always_active": ["^embed", "^head", "gain"]}, {}),
    "explicit groups": ({}, {"groups": [["layers", "embed"], ["norm", "head"]]}, {}),
    "on the device": ({}, {"group_size": "all", "state": {"residency": "device"}}, {}),
    "on disk, no prefetch": ({}, {"group_size": "all", "state": {"residency": "disk", "prefetch": False}}, {}),
    "on disk": ({}, {"group_size": 3, "state": {"residency": "disk", "slots": 2}}, {}),
    "slices, two slots": ({}, {"group_size": 3, "state": {"slice_numel": 17, "slots": 2}}, {}),
    "step on the host": (BF16, {"group_size": "all", "state": {"step_on": "host"}}, {}),
    "split master, int8 moments": (BF16, {"group_size": 2, "state": {"codec": "split_master+int8_moments"}}, {}),
    "bf16 moments, slices": (BF16, {"group_size": "all", "state": {"codec": "bf16_moments", "slice_numel": 40}}, {}),
    "no masters, stochastic": (BF16, {"group_size": 2, "master_weights": False, "stochastic_rounding": True}, {}),
    "accumulation in bf16, tied": ({**BF16, "gas": 3}, {"group_size": 2}, {"tied": True}),
    "accumulation in fp32, clipping": ({"gas": 3, "clip": 0.05}, {"group_size": "all"}, {}),
    "clipping": ({**BF16, "clip": 0.05}, {"group_size": 2, "state": {"slice_numel": 30}}, {}),
    "Muon": ({"optimizer": "Muon", "params": {"weight_decay": 0.1}}, {"group_size": "all"}, {}),
    "Adafactor": ({"optimizer": "Adafactor", "clip": 0.05}, {"group_size": 3}, {}),
    "Adagrad": ({"optimizer": "Adagrad"}, {"group_size": 3}, {}),
    "Lion": ({"optimizer": "Lion", "params": {"weight_decay": 0.1}}, {"group_size": "all"}, {}),
    "SGD": ({"optimizer": "SGD", "params": {"momentum": 0.9}}, {"group_size": 2}, {}),
    "RMSprop": ({"optimizer": "RMSprop"}, {"group_size": 2}, {}),
    "values in param_groups": ({"optimizer": f"{__name__}.Seen", "lr": 0.3}, {"group_size": 2}, {}),
    "stage 1": ({**BF16, "stage": 1}, {"group_size": "all"}, {}),
    "stage 3": ({"stage": 3}, {"group_size": "all"}, {"tied": True}),
    "stage 3, weights on the host": (
        {**BF16, "stage": 3, "gas": 2, "clip": 0.05, "zero": {**KEEP_NOTHING, "offload_param": {"device": "cpu"}}},
        {"group_size": "all", "state": {"slots": 2}}, {"tied": True},
    ),
    "stage 3, weights on disk": (
        {**BF16, "stage": 3, "zero": {**KEEP_NOTHING, "offload_param": {"device": "nvme", "nvme_path": "FOLDER"}}},
        {"group_size": 2}, {},
    ),
    "recomputed": ({}, {"group_size": "all", "activations": {"checkpointing": True}}, {}),
}  # fmt: skip


def same_weights(*engines):
    first, second = ([e.optimizer.parameters.whole_weight(p) for p in e.module.parameters()] for e in engines)
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


OTHER_OPTIMIZERS = ("Adadelta", "Adam", "Adamax", "ASGD", "NAdam", "RAdam", "Rprop")
CASES |= {name: ({"optimizer": name, **BF16}, {"group_size": 3}, {}) for name in OTHER_OPTIMIZERS}
FEW = [pytest.param(name, marks=pytest.mark.slow if name in OTHER_OPTIMIZERS else ()) for name in CASES]


@pytest.mark.parametrize("name", FEW)
def test_same_bits_as_after_backward(name):
    options, hift, model_options = copy.deepcopy(CASES[name])
    gas, zero = options.get("gas", 1), options.pop("zero", {})
    with tempfile.TemporaryDirectory() as folder:
        if hift.get("state", {}).get("residency") == "disk":
            hift["state"]["path"] = folder
        if "nvme_path" in zero.get("offload_param", {}):
            zero["offload_param"]["nvme_path"] = folder
        config = ds_config(**{"lr": 1e-3, "hift": hift, **options})
        config["zero_optimization"].update(zero)
        pair = [make_engine(Toy(**model_options), c) for c in (copy.deepcopy(config), in_backward(config))]
        batches = make_batches(5 * gas)
        for step in range(3 * pair[0].schedule.steps_per_cycle + 1):
            micro_batches = [batches[(step * gas + i) % len(batches)] for i in range(gas)]
            losses = [train_step(engine, micro_batches) for engine in pair]
            after, during = (engine.last_report for engine in pair)
            assert losses[0] == losses[1] and after.grad_norm == during.grad_norm, step
            assert (after.group, after.lr) == (during.group, during.lr)
            assert same_weights(*pair), step
            assert all(param.grad is None for param in pair[1].module.parameters())
            states = pair[1].optimizer.states  # and know that nobody else has written the weights
            assert not any(map(states.may_be_changed, states._versions))
        assert pair[0].coverage() == pair[1].coverage()
        for engine in pair:
            engine.destroy()


@pytest.mark.parametrize("name", ["bf16", "fp32"])
def test_sums_of_micro_batches_are_in_the_dtype_that_is_asked_for(name):
    """bf16: as torch itself sums up the gradients of bf16 weights. fp32: each rounded once, when it is made."""
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
    model = Toy()
    twin, masters = copy.deepcopy(model).bfloat16(), copy.deepcopy(model)
    config = ds_config(gas=3, optimizer="SGD", lr=0.3, data_types={"grad_accum_dtype": name}, **BF16)
    engine = make_engine(model, in_backward(config, group_size="all"))
    for step in range(3):
        batches = make_batches(9)[3 * step : 3 * step + 3]
        sums = [torch.zeros_like(param, dtype=dtype) for param in twin.parameters()]
        for batch in batches:
            (loss_of(twin, batch) / 3).backward()
            for total, param in zip(sums, twin.parameters(), strict=True):
                total.add_(param.grad)
                param.grad = None
        with torch.no_grad():
            for master, param, total in zip(masters.parameters(), twin.parameters(), sums, strict=True):
                param.copy_(master.sub_(0.3 * total.float()))
        for batch in batches[:2]:
            train_step(engine, [batch])
        assert {engine.optimizer.sums.get(param).dtype for param in model.parameters()} == {dtype}
        train_step(engine, batches[2:])
        assert largest_difference(model, twin) == 0.0
    engine.destroy()


CLIPPING_LINES = {
    "exact": "wait until backward has ended",
    "speculative": "taken back and made again",
    "last_visit": "when it was last trained, not by this step's",
    "per_part": "not by the step's",
}


@pytest.mark.parametrize("clipping", CLIPPING_LINES)
def test_the_log_says_which_norm_clips(clipping, caplog):
    caplog.set_level("INFO", logger="hift_ds.engine")
    engine = make_engine(Toy(), in_backward(ds_config(clip=0.5), group_size="all", clipping=clipping))
    (line,) = [text for text in caplog.messages if "clipping" in text]
    assert line.startswith(f"clipping {clipping}: gradients are scaled down to 0.5 by the norm ")
    assert CLIPPING_LINES[clipping] in line and line in engine.lines_at_start()
    engine.destroy()
    for config in (in_backward(ds_config(), clipping=clipping), ds_config(clip=0.5)):  # none; no choice
        engine = make_engine(Toy(), config)
        assert not engine.optimizer.clipping_line
        engine.destroy()


@pytest.mark.parametrize("clipping", ["last_visit", "per_part"])
def test_cheap_clipping_is_the_references(clipping):
    model = Toy()
    twin = copy.deepcopy(model)
    config = in_backward(ds_config(clip=0.05), group_size=2, clipping=clipping)
    engine = make_engine(model, config)
    parts = [[m.name for m in part.members] for g in engine.optimizer.groups.values() for part in g.parts]
    assert len(parts) == 5
    reference = ReferenceHiFT(
        twin,
        [group.param_names for group in engine.groups],
        lambda named: torch.optim.AdamW([p for _, p in named], lr=1e-2),
        max_grad_norm=0.05,
        clipping=clipping,
        parts=parts,
    )
    for batch in make_batches(9):
        train_step(engine, [batch])
        reference.step([batch], loss_of)
        assert largest_difference(model, twin) == 0.0
    engine.destroy()


TRIALS = {
    "resident": ({}, {"group_size": "all", "state": {"residency": "device"}}),
    "host, one slot": ({}, {"group_size": 2, "params": {"weight_decay": 0.1}}),
    "host, two slots, slices": (BF16, {"group_size": "all", "state": {"slots": 2, "slice_numel": 17}}),
    "no prefetch": (BF16, {"group_size": "all", "state": {"prefetch": False}}),
    "disk": (BF16, {"group_size": "all", "state": {"residency": "disk", "slots": 2}}),
    "turns of three": ({}, {"group_size": 3, "steps_per_group": 3}),
    "split master": (BF16, {"group_size": "all", "state": {"codec": "split_master+bf16_moments", "slots": 2}}),
    "int8 moments on disk": (BF16, {"group_size": 3, "state": {"residency": "disk", "codec": "int8_moments"}}),
    "no masters, stochastic": (BF16, {"group_size": 2, "master_weights": False, "stochastic_rounding": True}),
    "step on the host, accumulation": ({**BF16, "gas": 2}, {"group_size": "all", "state": {"step_on": "host"}}),
    "always active": ({}, {"group_size": 2, "always_active": ["^head", "gain"]}),
    "Muon": ({"optimizer": "Muon"}, {"group_size": "all", "state": {"slots": 2}}),
    "Adafactor": ({"optimizer": "Adafactor"}, {"group_size": 3}),
    "RMSprop": ({"optimizer": "RMSprop"}, {"group_size": "all"}),
    "values in param_groups": ({"optimizer": f"{__name__}.Seen"}, {"group_size": "all"}),
    "stage 3": ({"stage": 3}, {"group_size": "all"}),
}  # fmt: skip


@pytest.mark.parametrize("name", TRIALS)
def test_trials_that_are_taken_back_leave_the_same_bits(name, tmp_path):
    """A threshold among the norms, so that some trials stand and some are taken back: all as with ``exact`` and after
    backward."""
    options, hift = copy.deepcopy(TRIALS[name])
    params, gas = hift.pop("params", None), options.get("gas", 1)
    if hift.get("state", {}).get("residency") == "disk":
        hift["state"]["path"] = str(tmp_path)
    batches = make_batches(16 * gas)
    norms = []
    engine = make_engine(Toy(), ds_config(lr=1e-3, params=params, hift=copy.deepcopy(hift), **options))
    for step in range(16):
        train_step(engine, batches[step * gas : (step + 1) * gas])
        norms.append(engine.last_report.grad_norm)
    engine.destroy()
    config = ds_config(lr=1e-3, params=params, clip=sorted(norms)[9], hift=hift, **options)
    variants = [copy.deepcopy(config), in_backward(config), in_backward(config, clipping="speculative")]
    engines = [make_engine(Toy(), variant) for variant in variants]
    outcomes = []
    for step in range(16):
        for engine in engines:
            train_step(engine, batches[step * gas : (step + 1) * gas])
        reports = [engine.last_report for engine in engines]
        assert len({report.grad_norm for report in reports}) == 1, step
        assert same_weights(engines[0], engines[2]) and same_weights(engines[0], engines[1]), step
        optimizer, report = engines[2].optimizer, reports[2]
        outcomes.append((report.tried, report.undone))
        assert report.undone == (report.undone_s > 0) and report.grad_bytes_out > 0
        assert (report.grad_bytes_in > 0) == (report.undone or not report.tried or gas > 1)
        assert not len(optimizer.held_back.gradients) and not len(optimizer.held_back.weights)
    assert {(True, True), (True, False), (False, False)} == set(outcomes)
    assert engines[0].coverage() == engines[2].coverage()
    trials = engines[2].optimizer.trials
    assert trials.num_made == sum(made for made, _ in outcomes)
    assert trials.num_undone == sum(undone for _, undone in outcomes) and trials.undone_s > 0
    for engine in engines:
        engine.destroy()


# -- graphs that a naive update gets wrong --------------------------------------------------------------------------


class UsedTwice(Toy):
    """The lowest block runs again above all others."""

    def forward(self, tokens, targets):
        h = self.embed(tokens)
        for layer in [*self.layers, self.layers[0]]:
            h = layer(h)
        return nn.functional.cross_entropy(self.head(self.norm(h)).flatten(0, 1), targets.flatten())


class SkipsABlock(Toy):
    """A batch whose first token is odd does not reach block 1."""

    def forward(self, tokens, targets):
        h = self.embed(tokens)
        for i, layer in enumerate(self.layers):
            if i != 1 or int(tokens[0, 0]) % 2 == 0:
                h = layer(h)
        return nn.functional.cross_entropy(self.head(self.norm(h)).flatten(0, 1), targets.flatten())


class HoldsABlock(Toy):
    """For a batch whose first token is odd the weights of block 1 are constants."""

    def forward(self, tokens, targets):
        h = self.embed(tokens)
        for i, layer in enumerate(self.layers):
            constants = {name: param.detach() for name, param in layer.named_parameters()}
            holds = i == 1 and int(tokens[0, 0]) % 2
            h = torch.func.functional_call(layer, constants, h) if holds else layer(h)
        return nn.functional.cross_entropy(self.head(self.norm(h)).flatten(0, 1), targets.flatten())


class Recomputed(Toy):
    def forward(self, tokens, targets):
        h = self.embed(tokens)
        for layer in self.layers:
            h = checkpoint(layer, h, use_reentrant=False)
        return nn.functional.cross_entropy(self.head(self.norm(h)).flatten(0, 1), targets.flatten())


class NeedsAWeightLater(Toy):
    """The head's weight is also a constant of the lowest block: backward reads it after its gradient is complete."""

    def forward(self, tokens, targets):
        h = self.embed(tokens)
        h = h + nn.functional.linear(
            nn.functional.linear(h, self.head.weight.detach()), self.layers[0].up.weight[:7, :1].expand(7, 11)
        )
        for layer in self.layers:
            h = layer(h)
        return nn.functional.cross_entropy(self.head(self.norm(h)).flatten(0, 1), targets.flatten())


@pytest.mark.parametrize("cls", [UsedTwice, SkipsABlock, Recomputed])
@pytest.mark.parametrize("group_size", [2, "all"])
def test_graphs_of_many_shapes(cls, group_size):
    config = ds_config(params={"weight_decay": 0.1}, hift={"group_size": group_size})
    pair = [make_engine(cls(), c) for c in (config, in_backward(config))]
    for batch in make_batches(8):
        assert len({train_step(engine, [batch]) for engine in pair}) == 1
        assert largest_difference(*(engine.module for engine in pair)) == 0.0
    assert pair[0].coverage() == pair[1].coverage()
    for engine in pair:
        engine.destroy()


def test_two_forwards_before_one_backward():
    config = ds_config(hift={"group_size": "all"})
    pair = [make_engine(Toy(), c) for c in (config, in_backward(config))]
    for first, second in zip(make_batches(4), make_batches(4, seed=9), strict=True):
        for engine in pair:
            engine.backward(loss_of(engine, first) - 0.5 * loss_of(engine, second))
            engine.step()
        assert largest_difference(*(engine.module for engine in pair)) == 0.0
    for engine in pair:
        engine.destroy()


def test_two_forwards_before_two_backwards():
    """Blocks are recomputed in the second with the flags that they were run with."""
    config = ds_config(gas=2)
    engines = [make_engine(Toy(), config), *(make_engine(Recomputed(), c) for c in (config, in_backward(config)))]
    for step in range(6):
        for engine in engines:
            for loss in [loss_of(engine, batch) for batch in make_batches(2, seed=step)]:
                engine.backward(loss)
                engine.step()
        assert same_weights(*engines[:2]) and same_weights(*engines[1:])
    for engine in engines:
        engine.destroy()


@pytest.mark.parametrize("late", [False, True])
def test_a_backward_in_several_calls(late):
    """As DeepSpeed has it: all but the last are not the boundary. Set after the last, ``step`` itself updates, by
    gradients that are all sums of micro-batches by then."""
    config = ds_config(hift={"group_size": "all"})
    pair = [make_engine(Toy(), c) for c in (config, in_backward(config))]
    for first, second in zip(make_batches(4), make_batches(4, seed=9), strict=True):
        for engine in pair:
            engine.set_gradient_accumulation_boundary(False)
            engine.backward(loss_of(engine, first))
            engine.set_gradient_accumulation_boundary(not late)
            engine.backward(loss_of(engine, second))
            engine.set_gradient_accumulation_boundary(True)
            engine.step()
        assert largest_difference(*(engine.module for engine in pair)) == 0.0
    engine = pair[1]
    engine.backward(loss_of(engine, first))
    with pytest.raises(HiFTError, match="second backward"):
        engine.backward(loss_of(engine, second))
    for engine in pair:
        engine.destroy()


EARLIER_ONLY = {
    "one step": {},
    "stage 3": {"stage": 3},
    "clipped": {"clip": 0.05},
    "bf16": BF16,
}


def reaching(batch, all_blocks):
    """The batch, so that :class:`SkipsABlock` skips none, or the second."""
    tokens, targets = batch
    return torch.where(torch.ones_like(tokens).cumsum(1) == 1, 2 if all_blocks else 1, tokens), targets


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (cls, name)
        for cls in (SkipsABlock, HoldsABlock)
        for name in EARLIER_ONLY
        if (cls, name) != (HoldsABlock, "stage 3")
    ],
)
def test_a_weight_that_the_last_micro_batch_does_not_reach_keeps_its_gradient(cls, name):
    config = ds_config(gas=2, params={"weight_decay": 0.1}, hift={"group_size": "all"}, **EARLIER_ONLY[name])
    pair = [make_engine(cls(), c) for c in (config, in_backward(config))]
    batches = make_batches(8)
    for i in range(4):
        micro_batches = [reaching(batches[2 * i], True), reaching(batches[2 * i + 1], False)]
        assert len({train_step(engine, micro_batches) for engine in pair}) == 1
        assert same_weights(*pair)
    assert pair[0].coverage() == pair[1].coverage() and set(pair[0].coverage().values()) == {4}
    for engine in pair:
        engine.destroy()


@pytest.mark.parametrize("options", [{}, BF16, {"stage": 3}])
@pytest.mark.parametrize("group_size", [1, "all"])
@pytest.mark.parametrize("update", ["after_backward", "in_backward"])
def test_a_hook_of_the_callers_finds_the_gradient_and_may_change_it(options, group_size, update):
    """Whether it is registered before the engine is made or after."""
    pair = []
    for early in (True, False):
        model = Toy()
        config = ds_config(gas=2, hift={"group_size": group_size, "update": update}, **options)
        engine = None if early else make_engine(model, config)
        for param in model.parameters():
            param.register_post_accumulate_grad_hook(_halve)
        pair.append(engine or make_engine(model, config))
    plain = make_engine(Toy(), ds_config(gas=2, hift={"group_size": group_size, "update": update}, **options))
    batches = make_batches(4)
    for i in range(2):
        norms = []
        for engine in (*pair, plain):
            train_step(engine, batches[2 * i : 2 * i + 2])
            norms.append(engine.last_report.grad_norm)
        assert norms[0] == norms[1] and same_weights(*pair)
        assert i or norms[0] < 0.9 * norms[2]
    for engine in (*pair, plain):
        engine.destroy()


def _halve(param):
    param.grad.mul_(0.5)


@pytest.mark.parametrize("group_size", [1, 2, "all"])
def test_a_term_of_all_weights_that_is_made_before_the_forward(group_size):
    """Its graph leads to weights that were not yet frozen for the step."""
    config = ds_config(hift={"group_size": group_size})
    pair = [make_engine(Toy(), c) for c in (config, in_backward(config))]
    for batch in make_batches(7):
        for engine in pair:
            penalty = sum(param.square().sum() for param in engine.module.parameters())
            engine.backward(loss_of(engine, batch) + 0.01 * penalty)
            engine.step()
        assert largest_difference(*(engine.module for engine in pair)) == 0.0
    for engine in pair:
        engine.destroy()


@pytest.mark.parametrize("stage", [0, 3])
def test_a_graph_that_needs_an_updated_weight_fails_and_says_so(stage):
    """At stage 3 on one rank autograd has kept the shard itself, through hooks that it does not look behind."""
    model = NeedsAWeightLater()
    engine = make_engine(model, in_backward(ds_config(stage=stage), group_size="all"))
    batches = make_batches(2)
    with pytest.raises(HiFTError, match="after_backward") as caught:
        train_step(engine, [batches[0]])
    assert "\n" not in str(caught.value) and isinstance(caught.value.__cause__, RuntimeError)
    for action in (lambda: engine(*batches[1]), engine.step, lambda: engine.save_checkpoint("never")):
        with pytest.raises(HiFTError, match="load_checkpoint"):
            action()
    engine.destroy()


@pytest.mark.parametrize(
    ("where", "hift"),
    [
        ("backward", {"clipping": "last_visit"}),
        ("backward", {"clipping": "speculative", "state": {"step_on": "split", "host_share": 0.4}}),
        ("update", {"clipping": "last_visit"}),
        ("update", {"clipping": "speculative"}),
        ("after backward", {"clipping": "exact"}),
        ("after backward", {"update": "after_backward"}),
    ],
)
def test_a_run_goes_on_from_a_checkpoint_after_a_step_that_was_cut_short(where, hift, tmp_path, monkeypatch):
    """As one that never failed. In backward some parts are updated by then, in the update some states fetched. Weights
    that are frozen before the checkpoint is loaded stay."""
    config = in_backward(ds_config(clip=100.0, **({} if where == "update" else BF16)), **{"group_size": "all", **hift})
    engine, twin = (make_engine(Toy(), copy.deepcopy(config)) for _ in range(2))
    batches = make_batches(4)
    for one in (engine, twin):
        train_step(one, batches[:1])
    engine.save_checkpoint(str(tmp_path))
    if where == "after backward":
        engine.backward(loss_of(engine, batches[1]))
    else:
        update = engine.optimizer.updates._update_beside
        engine.optimizer.updates._update_beside = lambda *args: (time.sleep(0.1), update(*args))  # is late
        hook = engine.module.layers[0].register_forward_hook(_fails_in_backward)
        with monkeypatch.context() as patch, pytest.raises(HiFTError, match="of 5 parts were updated .no room.*load_c"):
            if where == "update":
                patch.setattr(engine.optimizer.states, "keep", lambda *args: _no_room(args))
            train_step(engine, batches[1:2])
        hook.remove()
        with pytest.raises(HiFTError, match="load_checkpoint"):
            train_step(engine, batches[1:2])
    for one in (engine, twin):
        one.module.head.requires_grad_(False)
    engine.load_checkpoint(str(tmp_path))
    optimizer = engine.optimizer
    if optimizer.updates_in_backward:
        kept = optimizer._unpublished, optimizer.sums, optimizer.held_back.gradients, optimizer.held_back.weights
        assert not any(map(len, kept))
    for batch in batches[2:]:
        for one in (engine, twin):
            train_step(one, [batch])
        assert same_weights(engine, twin)
    for one in (engine, twin):
        one.destroy()


# -- what is alive when ---------------------------------------------------------------------------------------------


def test_gradients_and_states_of_one_part_at_a_time():
    """Whatever autograd has handed over is gone before the next part's first gradient, and so are its states."""
    model = Toy(num_layers=4)
    engine = make_engine(model, in_backward(ds_config(), group_size="all", state={"slots": 2}))
    optimizer, alive, at_once, lent = engine.optimizer, {}, [], []
    part_of = {member.param: part.height for part in optimizer.groups[0].parts for member in part.members}
    update = optimizer.update_part

    def arrived(param):
        alive[param] = weakref.ref(param.grad.untyped_storage())
        at_once.append({part_of[p] for p, grad in alive.items() if grad() is not None})

    def watched(*args, **kwargs):
        lent.append(len([slot for slot in optimizer.store._slots if slot.fetched]))
        update(*args, **kwargs)
        lent.append(len([slot for slot in optimizer.store._slots if slot.fetched]))

    optimizer.update_part = watched
    hooks = [param.register_post_accumulate_grad_hook(arrived) for param in part_of]
    train_step(engine, [make_batches(1)[0]])
    assert len(at_once) == len(part_of) and all(len(parts) == 1 for parts in at_once)
    assert not any(grad() is not None for grad in alive.values())
    assert set(lent) == {0} and len(lent) == 12 and len(optimizer.store._slots) == 2
    for hook in hooks:
        hook.remove()
    engine.destroy()


def test_backward_goes_on_after_a_part_was_updated():
    """Top to bottom, each before the gradients of the next exist."""
    model = Toy()
    engine = make_engine(model, in_backward(ds_config(), group_size="all"))
    start, seen = weights_of(model), []

    def see(name):
        def hook(grad):
            seen.append((name, [n for n, p in model.named_parameters() if not torch.equal(p, start[n])]))

        return hook

    model.layers[0].register_forward_hook(lambda m, args, out: out.register_hook(see("layers.0")) and None)
    train_step(engine, [make_batches(1)[0]])
    ((_, changed),) = seen
    assert {n.split(".")[0] for n in changed} == {"layers", "norm", "head"}
    assert not any(n.startswith("layers.0") for n in changed) and "layers.1.down.weight" in changed
    engine.destroy()


# -- some updates on the host, some on the device -------------------------------------------------------------------

SPLITS = {
    "after backward": ({}, {"update": "after_backward", "group_size": 2}),
    "after backward, slices": (BF16, {"update": "after_backward", "state": {"slice_numel": 17, "slots": 2}}),
    "all": ({}, {"group_size": "all", "state": {"slots": 2}}),
    "slices, accumulation": ({**BF16, "gas": 2}, {"group_size": "all", "state": {"slots": 2, "slice_numel": 17}}),
    "states on the device": (BF16, {"group_size": 3, "state": {"residency": "device"}}),
    "split master, int8 moments": (BF16, {"group_size": "all", "state": {"codec": "split_master+int8_moments"}}),
    "no masters, stochastic": (BF16, {"group_size": 3, "master_weights": False, "stochastic_rounding": True}),
    "clipped": ({"clip": 0.05}, {"group_size": "all"}),
    "clipped per part": ({"clip": 0.05}, {"group_size": "all", "clipping": "per_part"}),
    "clipped by speculation": ({"clip": 0.3, **BF16}, {"group_size": 3, "clipping": "speculative"}),
    "always active": ({}, {"group_size": 2, "always_active": ["gain"]}),
    "Muon": ({"optimizer": "Muon"}, {"group_size": "all"}),
    "Adafactor": ({"optimizer": "Adafactor"}, {"group_size": "all"}),
    "stage 3": ({"stage": 3}, {"group_size": "all"}),
}  # fmt: skip


@pytest.mark.parametrize("name", SPLITS)
def test_an_update_is_the_same_on_the_host(name):
    """Bit for bit what ``step_on: device`` makes, here where both are one processor; and both places have work."""
    options, hift = copy.deepcopy(SPLITS[name])
    gas = options.get("gas", 1)
    hift = {"update": "in_backward", **hift}
    split = {**hift, "state": {**hift.get("state", {}), "step_on": "split", "host_share": 0.4}}
    pair = [make_engine(Toy(), ds_config(lr=1e-3, hift=block, **options)) for block in (hift, split)]
    threads, updates = set(), pair[1].optimizer.updates._update_beside

    def update_on_host(*args):
        threads.add(threading.current_thread().name)
        return updates(*args)

    pair[1].optimizer.updates._update_beside = update_on_host
    on_host = pair[1].optimizer.states.on_host
    chunks = {c.id for g in pair[1].optimizer.groups.values() for c in g.chunks}
    assert on_host and chunks - on_host
    batches = make_batches(6 * gas)
    for step in range(2 * pair[0].schedule.steps_per_cycle + 2):
        micro_batches = [batches[(step * gas + i) % len(batches)] for i in range(gas)]
        losses = [train_step(engine, micro_batches) for engine in pair]
        assert losses[0] == losses[1] and same_weights(*pair), step
        assert pair[0].last_report.grad_norm == pair[1].last_report.grad_norm
        assert not getattr(pair[1].optimizer, "_unpublished", ())
    assert all("host-updates" in thread for thread in threads) and threads
    assert pair[0].coverage() == pair[1].coverage()
    for engine in pair:
        engine.destroy()


def test_a_checkpoint_keeps_the_hosts_share(tmp_path, monkeypatch, caplog):
    """As it keeps the group size; a share that is given counts as it is given."""
    shares = iter([0.3, 0.7])
    monkeypatch.setattr("hift_ds.engine.build.fastest_share", lambda *args: next(shares))
    config = in_backward(ds_config(), group_size="all", state={"step_on": "split", "slots": 2})
    engine = make_engine(Toy(), copy.deepcopy(config))
    batches = make_batches(6)
    for batch in batches[:3]:
        train_step(engine, [batch])
    engine.save_checkpoint(str(tmp_path))
    resumed = make_engine(Toy(seed=4), copy.deepcopy(config))
    assert resumed.optimizer.states.on_host != engine.optimizer.states.on_host
    store = resumed.optimizer.store
    resumed.load_checkpoint(str(tmp_path))
    assert not store.total_bytes()  # it is closed
    assert resumed.optimizer.states.on_host == engine.optimizer.states.on_host
    assert "30%" in caplog.text
    given = copy.deepcopy(config)
    given["hift"]["state"]["host_share"] = 1.0
    other = make_engine(Toy(seed=4), given)
    other.load_checkpoint(str(tmp_path))
    for batch in batches[3:]:
        for one in (engine, resumed, other):
            train_step(one, [batch])
        assert same_weights(engine, resumed) and same_weights(engine, other)
    assert len(other.optimizer.states.on_host) == 5
    for one in (engine, resumed, other):
        one.destroy()


@pytest.mark.parametrize(
    ("hift", "num_parts"),
    [({"group_size": 1}, 1), ({"group_size": 2}, 2), ({"group_size": 9}, 5), ({"group_size": "all"}, 5),
     ({"group_size": "auto"}, 5), ({"groups": [["layers", "embed"], ["norm", "head"]]}, 4),
     ({"group_size": 1, "update": "after_backward"}, 1), ({"group_size": 1, "always_active": ["gain"]}, 1)],
)  # fmt: skip
def test_the_hosts_share_is_that_of_the_groups_that_are_trained(hift, num_parts, monkeypatch):
    """Forward takes 1.5 s, a block's states 1.2 s and its backward 0.8 s: one layer a group waits for nothing and
    leaves the host nothing to do; several wait."""
    link, host_link = Link(2000, 2000), Link(1e9, 1e9)
    costs = BackwardCosts(12, 200, flops_s=1000, link=link, host_link=host_link, device_s=0, host_s=1e-4)
    monkeypatch.setattr("hift_ds.engine.build.costs_before_states", lambda *args: costs)
    engine = make_engine(Toy(), in_backward(ds_config(), state={"step_on": "split", "slots": 2}, **hift))
    share, block = engine.optimizer.states.split.share, 195 if "always_active" in hift else 196
    assert share == fastest_share(costs, [77, block, block, block, 102], num_parts, 1)
    assert (share == 0.0) == (num_parts == 1)
    engine.destroy()


def test_the_hosts_share_is_found_with_the_group_size_where_tokens_are_known(monkeypatch):
    """Both at once, as an estimate finds them, and not the share of steps of all layers."""
    link, host_link = Link(400, 400), Link(1e9, 1e9)
    costs = BackwardCosts(12, 400, flops_s=1000, link=link, host_link=host_link, device_s=0, host_s=0.02)
    monkeypatch.setattr("hift_ds.engine.build.costs_before_states", lambda *args: costs)
    hift = {"group_size": "auto", "tokens_per_step": 2, "state": {"step_on": "split", "slots": 2}}
    engine = make_engine(Toy(), in_backward(ds_config(), **hift))
    numels = [77, 196, 196, 196, 102]
    found = layers_hidden(costs, numels, 2, split=True)
    assert found.group_size < 5 and found.costs.share != fastest_share(costs, numels, 5, 2)
    assert engine.optimizer.states.split.share == found.costs.share
    engine.destroy()


def test_the_host_takes_part_by_what_is_measured(monkeypatch):
    """On the first rank: all have the same part of the model there."""
    measured = []

    def gather(own):
        measured.append(own)
        return [0.25, own]

    monkeypatch.setattr("hift_ds.engine.build.gather", gather)
    engine = make_engine(Toy(), in_backward(ds_config(), group_size="all", state={"step_on": "split"}))
    assert 0.0 <= measured[-1] <= 1.0 and engine.optimizer.states.split.share == 0.25
    engine.destroy()


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"step_on": "split", "residency": "disk", "path": "x"}, "residency"),
        ({"step_on": "split", "residency": "auto"}, "residency"),
        ({"host_share": 0.5}, "host_share"),
    ],
)
def test_what_a_split_is_refused_with(state, words):
    with pytest.raises(ConfigError, match=words):
        make_engine(Toy(), ds_config(hift={"state": state}))


def test_an_optimizer_that_two_threads_may_not_step_is_not_split():
    class Own(torch.optim.SGD):
        pass

    model = Toy()
    config = ds_config(optimizer=None, hift={"state": {"step_on": "split", "host_share": 0.5}})
    with pytest.raises(ConfigError, match="two threads"):
        make_engine(model, config, optimizer=Own(model.parameters(), lr=0.1))


def test_a_failed_update_on_the_host_is_the_steps_error():
    engine = make_engine(Toy(), in_backward(ds_config(), group_size="all", state={"step_on": "split", "host_share": 1}))
    engine.optimizer.updates.beside.piecewise.step = lambda *args: 1 / 0
    with pytest.raises(ZeroDivisionError):
        train_step(engine, make_batches(1))
    engine.destroy()


# -- as many layers as the link hides ---------------------------------------------------------------------------------


def hiding(monkeypatch, num_layers):
    """Rates under which steps of so many layers are hidden, at any number of tokens."""

    def choose(costs, numels, tokens, largest):
        size = min(num_layers, largest)
        return HiddenLayers(size, -(-len(numels) // size), tokens, 1.0, 0.0, None, costs)

    monkeypatch.setattr("hift_ds.engine.auto_groups.layers_hidden", choose)


@pytest.mark.parametrize("options", [{}, {"always_active": ["gain"]}, {"tokens_per_step": 60}])
def test_group_size_auto_is_the_size_that_it_finds(options, monkeypatch, tmp_path, caplog):
    """Bit for bit; and a resumed run keeps it, whatever is measured then."""
    caplog.set_level("INFO", logger="hift_ds.engine.auto_groups")
    always = {"always_active": options["always_active"]} if "always_active" in options else {}
    config = ds_config(gas=2, params={"weight_decay": 0.1}, hift={"update": "in_backward", **always})
    given = copy.deepcopy(config)
    given["hift"]["group_size"] = 2
    config["hift"] |= {"group_size": "auto", **options}
    hiding(monkeypatch, 2)
    pair = [make_engine(Toy(), c) for c in (copy.deepcopy(given), copy.deepcopy(config))]
    assert len(pair[1].groups) == (3 if "tokens_per_step" in options else 5)
    batches = make_batches(12)
    for step in range(4):
        for engine in pair:
            train_step(engine, batches[2 * step : 2 * step + 2])
        assert same_weights(*pair)
    assert [g.param_names for g in pair[0].groups] == [g.param_names for g in pair[1].groups]
    assert pair[0].coverage() == pair[1].coverage()
    tokens = options.get("tokens_per_step", 12 * 5 * 2)
    assert len(caplog.messages) == 1 and f"at {tokens} tokens" in caplog.messages[0]
    pair[1].save_checkpoint(str(tmp_path))
    hiding(monkeypatch, 3)
    resumed = make_engine(Toy(seed=5), copy.deepcopy(config))
    resumed.load_checkpoint(str(tmp_path))
    for step in (4, 5):
        for engine in (pair[0], resumed):
            train_step(engine, batches[2 * step : 2 * step + 2])
        assert same_weights(pair[0], resumed) and pair[0].last_report.group == resumed.last_report.group
    for engine in (*pair, resumed):
        engine.destroy()


def test_group_size_auto_finds_more_layers_with_more_tokens(monkeypatch):
    """From what the machine was measured to do: the real arithmetic, with a slow link."""
    monkeypatch.setattr("hift_ds.store.host.measure_link", lambda *args: Link(100.0, 100.0))
    sizes = []
    for tokens in (1, 10**14):
        config = ds_config(hift={"update": "in_backward", "group_size": "auto", "tokens_per_step": tokens})
        engine = make_engine(Toy(), config)
        sizes.append(len(engine.groups))
        engine.destroy()
    assert sizes == [5, 1]


@pytest.mark.parametrize(
    ("options", "clipping", "num_bytes"),
    [({}, {}, None), ({"clip": 1.0}, {}, 4), ({"clip": 1.0, **BF16}, {}, 2), ({"clip": 1.0, "gas": 2, **BF16}, {}, 4),
     ({"clip": 1.0, "gas": 2, "data_types": {"grad_accum_dtype": "bf16"}, **BF16}, {}, 2),
     ({"clip": 1.0}, {"clipping": "per_part"}, None), ({"clip": 1.0}, {"clipping": "speculative"}, None),
     ({"clip": 1.0}, {"update": "after_backward"}, 0), ({}, {"update": "after_backward"}, 0)],
)  # fmt: skip
def test_what_waits_for_the_norm_is_known(options, clipping, num_bytes, monkeypatch):
    """Of a parameter's gradient in host memory until backward has ended: then nothing hides the updates. To the size
    that "auto" chooses, and to the host's share."""
    given = []
    monkeypatch.setattr("hift_ds.engine.build.fastest_share", lambda costs, *_: given.append(costs) or 0.5)
    for state in ({}, {"step_on": "split"}):
        config = ds_config(hift={"update": "in_backward", "state": state, **clipping}, **copy.deepcopy(options))
        engine = make_engine(Toy(), config)
        assert measured_costs(engine).parked_bytes == num_bytes
        engine.destroy()
    assert [costs.parked_bytes for costs in given] == [num_bytes]


@pytest.mark.parametrize("slice_numel", [None, 17, 1 << 20])
def test_gradients_that_travel_have_as_much_room_as_a_slot_of_states(slice_numel, monkeypatch):
    """Of the largest part, or a slice of it; and no more than a bound, however large that is."""
    toy = Toy()
    parts = [[toy.embed], *([layer] for layer in toy.layers), [toy.norm, toy.head]]
    largest = max(sum(param.numel() for module in part for param in module.parameters()) for part in parts)
    kept = []
    for bound in (ROOM_BYTES, 100):
        monkeypatch.setattr("hift_ds.optim.in_backward.ROOM_BYTES", bound)
        config = in_backward(ds_config(clip=1.0), group_size="all", state={"slice_numel": slice_numel})
        engine = make_engine(Toy(), config)
        held = engine.optimizer.held_back
        kept.append({k.room_bytes for k in (engine.optimizer.sums, held.gradients, held.weights)})
        engine.destroy()
    assert kept == [{12 * min(slice_numel or largest, largest)}, {100}]


@pytest.mark.parametrize(
    ("options", "num_bytes"),
    [({}, 4), (BF16, 2), ({"gas": 2, **BF16}, 4), ({"gas": 2, **BF16_SUMS, **BF16}, 2), ({"gas": 2, **BF16_SUMS}, 2)],
)
def test_what_waits_for_the_norm_takes_the_bytes_that_were_expected(options, num_bytes):
    engine = make_engine(Toy(), ds_config(hift={"update": "in_backward"}, clip=1.0, **options))
    *earlier, last = make_batches(options.get("gas", 1))
    for batch in earlier:
        train_step(engine, [batch])
    engine.backward(loss_of(engine, last))
    kept, (group,) = engine.optimizer.held_back.gradients, engine.optimizer.active_groups
    waiting = [kept.get((group.index, i)) for i in range(len(group.members))]
    assert {tensor.element_size() for tensor in waiting} == {num_bytes}
    assert measured_costs(engine).parked_bytes == num_bytes
    engine.step()
    engine.destroy()


@pytest.mark.parametrize("stage", [0, 3])
def test_a_gradient_that_waits_for_the_norm_leaves_alone(stage):
    """And not with those of its part, all of which would be on the device at once, in fp32 as sums of micro-batches."""
    engine = make_engine(Toy(), in_backward(ds_config(gas=2, clip=0.05, stage=stage, **BF16), group_size="all"))
    kept, num_kept = engine.optimizer.held_back.gradients, []
    params = [param for param in engine.module.parameters() if param.requires_grad]
    engine.optimizer.parameters.sums.hooks.add(params, lambda _: num_kept.append(len(kept)))
    for batch in make_batches(2):
        num_kept.clear()
        engine.backward(loss_of(engine, batch))
        engine.step()
    assert num_kept == list(range(1, len(params) + 1)) and not len(kept)
    engine.destroy()


ROOM = {  # bytes of host memory that a parameter of a step takes beside its states, in fp32 on one rank
    "no clipping": ({}, {}, 0),
    "exact": ({"clip": 1.0}, {}, 4),
    "per part": ({"clip": 1.0}, {"clipping": "per_part"}, 0),
    "speculation": ({"clip": 1.0}, {"clipping": "speculative"}, 4 + 4 + 8),
    "accumulation": ({"clip": 1.0, "gas": 2}, {}, 4 + 4),
}


@pytest.mark.parametrize("name", ROOM)
def test_host_memory_has_room_for_what_steps_keep_there(name, monkeypatch):
    """One byte less than a step of all layers takes is refused in a line; "auto" takes fewer layers there."""
    options, hift, kept = ROOM[name]
    numel = sum(param.numel() for param in Toy().parameters())

    def engine_with(room, **more):
        monkeypatch.setattr(HiFTEngine, "machine", Machine(HostBytes(room, room)))
        return make_engine(Toy(), in_backward(ds_config(hift=copy.deepcopy(hift), **options), **more))

    engine = engine_with(1 << 40, group_size="all")
    states = engine.optimizer.store.total_bytes()
    held = engine.optimizer.store.host_bytes() - states  # with what aligns their beginnings
    enough = states + (held + (kept - 8) * numel if held else kept * numel)
    assert (held >= 8 * numel) == (name == "speculation")
    engine.destroy()
    engine_with(enough, group_size="all").destroy()
    with pytest.raises(StateStoreError, match="of host memory") as caught:
        engine_with(enough - 1, group_size="all")
    assert "\n" not in str(caught.value)
    hiding(monkeypatch, 99)
    auto = [engine_with(room, group_size="auto", tokens_per_step=9) for room in (enough, enough - 1) if kept]
    assert [len(engine.groups) == 1 for engine in auto] == [True, False][: len(auto)]
    assert all("host memory has no room" in engine.lines_at_start()[-1] for engine in auto[1:])
    for engine in auto:
        engine.destroy()


def test_group_size_auto_needs_tokens_and_the_update_in_backward():
    class OfFeatures(nn.Sequential):
        def forward(self, x, y):
            return (super().forward(x) - y).square().mean()

    engine = make_engine(OfFeatures(nn.Linear(3, 3), nn.Linear(3, 3)), in_backward(ds_config(), group_size="auto"))
    with pytest.raises(ConfigError, match="tokens_per_step"):
        engine(torch.randn(2, 3), torch.randn(2, 3))
    engine.destroy()
    with pytest.raises(ConfigError, match="in_backward"):
        make_engine(Toy(), ds_config(hift={"group_size": "auto"}))
    with pytest.raises(ConfigError, match="tokens_per_step"):
        make_engine(Toy(), ds_config(hift={"tokens_per_step": 7}))


# -- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (ds_config(fp16={"enabled": True}), "loss scale"),
        (ds_config(torch_autocast={"enabled": True, "dtype": "float16"}), "loss scale"),
    ],
)
def test_a_loss_scale_is_refused(config, words):
    with pytest.raises(ConfigError, match=words):
        make_engine(Toy(), in_backward(config))


def test_clipping_names_need_in_backward():
    with pytest.raises(ConfigError, match="clipping"):
        make_engine(Toy(), ds_config(hift={"clipping": "per_part"}))


def test_retained_graphs_and_plain_backward_are_refused():
    model = Toy()
    engine = make_engine(model, in_backward(ds_config(stage=1, gas=2), group_size="all"))
    start, batch = weights_of(model), make_batches(1)[0]
    with pytest.raises(HiFTError, match="retain_graph"):
        engine.backward(loss_of(engine, batch), retain_graph=True)
    train_step(engine, [batch])  # the first micro-batch of a step
    with pytest.raises(HiFTError, match=r"engine\.backward"):
        loss_of(model, batch).backward()
    assert all(torch.equal(param, start[name]) for name, param in model.named_parameters())
    engine.destroy()


def test_a_loss_that_is_not_finite_changes_nothing():
    model = Toy()
    engine = make_engine(model, in_backward(ds_config(gas=2), group_size="all"))
    batches = make_batches(4)
    train_step(engine, batches[:2])
    start = weights_of(model)
    engine.backward(loss_of(engine, batches[2]) * float("nan"))
    engine.step()
    with pytest.raises(TrainingError, match="not finite"):
        engine.backward(loss_of(engine, batches[3]))
    assert all(torch.equal(param, start[name]) for name, param in model.named_parameters())
    twin = make_engine(Toy(), in_backward(ds_config(gas=2), group_size="all"))
    train_step(twin, batches[:2])
    for one in (engine, twin):  # the step has begun again: it is that of an engine that never saw the batch
        train_step(one, batches[:1])
        one.backward(loss_of(one, batches[1]))
    assert torch.equal(engine.notes.loss, twin.notes.loss)
    for one in (engine, twin):
        one.step()
    assert same_weights(engine, twin)
    for one in (engine, twin):
        one.destroy()


@pytest.mark.parametrize("update", ["after_backward", "in_backward"])
def test_a_backward_that_fails_at_its_start_can_be_tried_again(update):
    """The sums of earlier micro-batches are as they were, and so is the loss that is told."""
    config = ds_config(gas=3, hift={"group_size": "all", "update": update})
    engine, twin = (make_engine(Toy(), config) for _ in range(2))
    batches = make_batches(6)
    for i in range(2):
        *earlier, last = batches[3 * i : 3 * i + 3]
        for batch in earlier:
            train_step(engine, [batch])
        loss = loss_of(engine, last)
        hook = loss.grad_fn.register_prehook(_no_room)
        with pytest.raises(RuntimeError, match="no room"):
            engine.backward(loss)
        hook.remove()
        train_step(twin, earlier)
        for one in (engine, twin):
            one.backward(loss_of(one, last))
        assert torch.equal(engine.notes.loss, twin.notes.loss)
        for one in (engine, twin):
            one.step()
        assert same_weights(engine, twin)
    for one in (engine, twin):
        one.destroy()


@pytest.mark.parametrize(("clip", "where"), [(0.05, "layers.0"), (0.0, "norm")])
def test_a_backward_that_fails_before_the_first_update_leaves_no_gradient(clip, where):
    """Those that had come wait for the norm by then, or for others of their part, and would be added to the next ones.
    Between backward and step they are the step's, whoever drops gradients."""
    engine, twin = (make_engine(Toy(), in_backward(ds_config(clip=clip), group_size="all")) for _ in range(2))
    (batch,) = make_batches(1)
    hook = engine.module.get_submodule(where).register_forward_hook(_fails_in_backward)
    with pytest.raises(RuntimeError, match="no room"):
        engine.backward(loss_of(engine, batch))
    hook.remove()
    for one in (engine, twin):
        one.backward(loss_of(one, batch))
    engine.optimizer.zero_grad()
    for one in (engine, twin):
        one.step()
    assert same_weights(engine, twin) and engine.last_report.grad_norm == twin.last_report.grad_norm
    for one in (engine, twin):
        one.destroy()


def _no_room(_):
    raise RuntimeError("no room")


def _fails_in_backward(module, inputs, output):
    output.register_hook(_no_room)


@pytest.mark.parametrize("update", ["after_backward", "in_backward"])
@pytest.mark.parametrize("loss", [None, 1.5, torch.ones(2)])
def test_what_is_no_loss_is_refused(update, loss):
    engine = make_engine(Toy(), ds_config(hift={"update": update}))
    with pytest.raises(HiFTError, match=r"backward\(\) was given .*; expected the loss: a tensor of one element"):
        engine.backward(loss)
    engine.destroy()


@pytest.mark.parametrize("update", ["after_backward", "in_backward"])
def test_two_weights_on_one_memory_are_refused(update):
    model = Toy()
    model.head.weight.data = model.embed.weight.data
    with pytest.raises(ConfigError, match=r"embed\.weight and head\.weight are two parameters on the same memory"):
        make_engine(model, ds_config(hift={"update": update}, **BF16))


def test_reentrant_recomputation_is_refused_before_anything_changes():
    class Reentrant(Toy):
        def forward(self, tokens, targets):
            h = self.embed(tokens)
            for layer in self.layers:
                h = checkpoint(layer, h, use_reentrant=True)
            return nn.functional.cross_entropy(self.head(self.norm(h)).flatten(0, 1), targets.flatten())

    model = Reentrant()
    engine = make_engine(model, in_backward(ds_config(), group_size="all"))
    start = weights_of(model)
    with pytest.raises(HiFTError, match="use_reentrant"):
        train_step(engine, make_batches(1))
    assert all(torch.equal(param, start[name]) for name, param in model.named_parameters())
    engine.destroy()
