"""A checkpoint that meets another model, another config or another precision: what fits is kept, what
does not is said."""

import copy
import functools
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pydantic import BaseModel
from torch import nn

from hift_ds.checkpoint.saved_checkpoint import SavedCheckpoint, block_differences
from hift_ds.config import HiFTConfig
from hift_ds.errors import CheckpointError
from hift_ds.schedule import Cursor
from tests.checkpoint.runs import Case, advance, assert_same_end, end_of, states_of, whole_weights
from tests.checkpoint.test_exact_resume import partly_frozen
from tests.helpers.engines import ds_config
from tests.helpers.toy import Toy

BF16 = {"enabled": True}


def hift(**block):
    return ds_config(hift=block)


def save(case, folder, steps=8):
    engine = case.engine(seed=0)
    advance(engine, 0, steps)
    engine.save_checkpoint(folder)
    return engine


def load(case, folder, caplog=None, **options):
    """The engine and the lines that the load had to say."""
    engine = case.engine(seed=7)
    if caplog is None:
        engine.load_checkpoint(folder, **options)
        return engine
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="hift_ds"):
        engine.load_checkpoint(folder, **options)
    return engine, [record.getMessage() for record in caplog.records if record.name.startswith("hift_ds")]


def same_tensors(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def whole_states(engine):
    """By (parameter, state), joined over slices."""
    joined = {}
    for name, tensor in states_of(engine).items():
        param, _, rest = name.rpartition("/")
        key, _, bounds = rest.partition("[")
        start = int(bounds.split(":")[0]) if bounds else 0
        joined.setdefault((param, key), []).append((start, tensor.reshape(-1)))
    return {key: torch.cat([t for _, t in sorted(parts, key=lambda p: p[0])]) for key, parts in joined.items()}


# -- another model ---------------------------------------------------------------------------------


class Wider(Toy):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.layers[1].up = nn.Linear(7, 14)
        self.layers[1].down = nn.Linear(14, 7, bias=False)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            Wider,
            r"another model: 'layers.1.up.weight' has shape \(13, 7\) there and \(14, 7\) here \(and 2 "
            r"more\)",
        ),
        (functools.partial(Toy, num_layers=4), r"another model: it lacks 'layers.3.gain' \(and 3 more\)"),
        (functools.partial(Toy, num_layers=2), r"another model: it has 'layers.2.gain' \(and 3 more\)"),
        (functools.partial(Toy, tied=True), r"another model: it has 'head.weight' \(and 1 more\)"),
    ],
)
def test_another_model_is_refused_before_anything_changes(tmp_path, model, message):
    save(Case(), tmp_path).destroy()
    engine = Case(model=model).engine(seed=7)
    before = whole_weights(engine)
    with pytest.raises(CheckpointError, match=message):
        engine.load_checkpoint(tmp_path)
    same_tensors(whole_weights(engine), before)
    engine.destroy()


def test_what_fits_is_loaded_if_asked(tmp_path):
    saved = save(Case(), tmp_path)
    engine = Case(model=functools.partial(Toy, num_layers=4)).engine(seed=7)
    fresh = whole_weights(engine)
    engine.load_checkpoint(tmp_path, load_module_strict=False)
    weights, theirs = whole_weights(engine), whole_weights(saved)
    for name, weight in weights.items():
        assert torch.equal(weight, theirs.get(name, fresh[name])), name
    same_tensors(whole_states(engine), whole_states(saved))
    advance(engine, 8, 20)
    for one in (engine, saved):
        one.destroy()


# -- another config --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "said", "cursor"),
    [
        ({"order": "top2down"}, "order: bottom2up -> top2down", Cursor(1, 0, 0)),
        (
            {"group_size": 2},
            r"num_groups: 5 -> 3; groups: 5 -> 3, different first in group 0 (embed..layers.0)",
            Cursor(1, 0, 0),
        ),
        ({"steps_per_group": 2}, "steps_per_group: 1 -> 2", Cursor(1, 0, 0)),
        ({"always_active": ["embed"]}, "num_groups: 5 -> 4", Cursor(1, 0, 0)),
        ({"seed": 5}, None, Cursor(1, 3, 0)),  # no random order, so no difference
        ({"state": {"slice_numel": 17}}, None, Cursor(1, 3, 0)),
    ],
)
def test_another_grouping_keeps_states_by_name_and_says_so(tmp_path, caplog, block, said, cursor):
    saved = save(Case(ds_config(bf16=BF16)), tmp_path)
    saved.optimizer.last_norms = {0: 1.0}  # the first group's
    saved.save_checkpoint(tmp_path)
    engine, lines = load(Case(ds_config(bf16=BF16, hift=block)), tmp_path, caplog)
    assert engine.optimizer.last_norms == ({0: 1.0} if said is None else {})
    same_tensors(whole_weights(engine), whole_weights(saved))
    same_tensors(whole_states(engine), whole_states(saved))
    assert engine.coverage() == saved.coverage()
    assert engine.schedule.cursor == cursor
    if said is None:
        (line,) = lines  # nothing but that it is another
        assert line.startswith("checkpoint: \"hift\" settings are the run's, not the checkpoint's: ")
    else:
        assert (
            len(lines) == 1
            and said in lines[0]
            and "states go with their parameters, the schedule starts cycle 1" in lines[0]
        )
    advance(engine, 8, 20)
    for one in (engine, saved):
        one.destroy()


@pytest.mark.parametrize(
    "block",
    [{"state": {"slice_numel": 17}}, {"state": {"residency": "device"}}, {"state": {"prefetch": False}}],
)
def test_another_place_for_states_is_exact(tmp_path, block):
    engine = save(Case(ds_config(bf16=BF16)), tmp_path)
    expected = end_of(engine, advance(engine, 8, 16))
    engine.destroy()
    engine = load(Case(ds_config(bf16=BF16, hift=block)), tmp_path)
    assert_same_end(end_of(engine, advance(engine, 8, 16)), expected)
    engine.destroy()


def test_another_optimizer(tmp_path):
    saved = save(Case(ds_config(bf16=BF16)), tmp_path)
    case = Case(ds_config(optimizer="Adafactor", bf16=BF16))
    with pytest.raises(CheckpointError, match=r"states of torch.optim.AdamW, the run uses torch.optim.Adafactor"):
        load(case, tmp_path)
    engine = load(case, tmp_path, load_optimizer_states=False)
    same_tensors(whole_weights(engine), whole_weights(saved))
    masters = {key: value for key, value in whole_states(saved).items() if key[1] == "master"}
    same_tensors(whole_states(engine), masters)
    assert engine.schedule.cursor == saved.schedule.cursor and engine.global_steps == 8
    advance(engine, 8, 16)
    for one in (engine, saved):
        one.destroy()


def test_other_options_are_the_checkpoints_and_said(tmp_path, caplog):
    save(Case(ds_config(params={"weight_decay": 0.25, "betas": [0.8, 0.9]})), tmp_path).destroy()
    engine, lines = load(Case(ds_config(params={"weight_decay": 0.5})), tmp_path, caplog)
    assert lines == ["checkpoint: param_groups[0].weight_decay: 0.25 -> 0.5: going on with the checkpoint's values"]
    assert engine.optimizer.param_groups[0]["weight_decay"] == 0.25 and engine.optimizer.param_groups[0]["betas"] == (
        0.8,
        0.9,
    )
    engine.destroy()


def test_a_longer_schedule_goes_on_at_its_own_rate(tmp_path):
    def falls_to_0(optimizer, steps):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)

    cases = [Case(scheduler=functools.partial(falls_to_0, steps=steps)) for steps in (10, 20)]
    save(cases[0], tmp_path).destroy()
    engine = load(cases[1], tmp_path)
    assert engine.optimizer.param_groups[0]["lr"] == 1e-2 * (1 - 8 / 20)
    engine.destroy()


def test_a_fresh_learning_rate_schedule(tmp_path):
    warmup = {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 20}}
    save(Case(ds_config(scheduler=warmup)), tmp_path).destroy()
    engine = load(Case(ds_config(scheduler=warmup)), tmp_path, load_lr_scheduler_states=False)
    fresh = Case(ds_config(scheduler=warmup)).engine(seed=7)
    assert engine.lr_scheduler.state_dict() == fresh.lr_scheduler.state_dict() and engine.get_lr() == fresh.get_lr()
    assert engine.global_steps == 8
    for one in (engine, fresh):
        one.destroy()


# -- another precision -----------------------------------------------------------------------------


def test_from_bf16_to_fp32_the_masters_become_the_weights(tmp_path):
    saved = save(Case(ds_config(bf16=BF16)), tmp_path)
    masters = {name: value for (name, key), value in whole_states(saved).items() if key == "master"}
    engine = load(Case(ds_config()), tmp_path)
    for name, weight in whole_weights(engine).items():
        assert weight.dtype == torch.float32 and torch.equal(weight.reshape(-1), masters[name]), name
    for one in (engine, saved):
        one.destroy()


def test_from_fp32_to_bf16_the_weights_become_the_masters(tmp_path):
    saved = save(Case(ds_config()), tmp_path)
    engine = load(Case(ds_config(bf16=BF16)), tmp_path)
    weights = whole_weights(saved)
    masters = {name: value for (name, key), value in whole_states(engine).items() if key == "master"}
    same_tensors(masters, {name: weight.reshape(-1) for name, weight in weights.items()})
    same_tensors(whole_weights(engine), {name: weight.bfloat16() for name, weight in weights.items()})
    for one in (engine, saved):
        one.destroy()


# -- DeepSpeed's switches --------------------------------------------------------------------------


def test_module_only(tmp_path):
    case = Case(ds_config(bf16=BF16, hift={"group_size": "all"}))  # whose states stay on the update device
    saved = save(case, tmp_path)
    engine = load(case, tmp_path, load_module_only=True)
    same_tensors(whole_weights(engine), whole_weights(saved))
    assert engine.global_steps == 0 and engine.schedule.cursor == Cursor() and set(engine.coverage().values()) == {0}
    assert {key for _, key in whole_states(engine)} == {"master"}
    twin = save(case, tmp_path)
    for one in (saved, twin):
        advance(one, 8, 9)
    saved.load_checkpoint(tmp_path, load_module_only=True)  # the moments of the last update stay
    same_tensors(whole_weights(engine), whole_weights(saved))
    moments = [{key: t for key, t in whole_states(one).items() if key[1] != "master"} for one in (saved, twin)]
    assert moments[0]
    same_tensors(*moments)
    for one in (engine, saved, twin):
        one.destroy()


def bf16_toy(seed):
    return Toy(seed=seed).to(torch.bfloat16)


@pytest.mark.parametrize(
    "case", [Case(ds_config(gas=2)), Case(ds_config(gas=2, bf16=BF16, stage=3), model=bf16_toy)], ids=["fp32", "bf16"]
)
def test_a_running_engine_goes_back(tmp_path, case):
    """What a rollback does: nothing of the later state may survive, moments and step counts of other groups
    included, nor masters that the checkpoint has not."""
    engine = save(case, tmp_path, steps=4)
    expected = end_of(engine, advance(engine, 4, 30))
    advance(engine, 30, 39)  # ends in the middle of an accumulation
    engine.checkpointer.last = None
    engine.load_checkpoint(tmp_path)
    assert engine.last_checkpoint == tmp_path / "global_step2"  # where the next rollback goes
    assert_same_end(end_of(engine, advance(engine, 4, 30)), expected)
    engine.destroy()


def test_frozen_weights_can_be_left_out(tmp_path):
    case = Case(model=partly_frozen)
    engine = case.engine(seed=0)
    advance(engine, 0, 3)
    engine.save_checkpoint(tmp_path / "all")
    engine.save_checkpoint(tmp_path / "trained", exclude_frozen_parameters=True)
    frozen = {"layers.1.up.weight", "norm.weight", "norm.bias"}
    names = set(dict(engine.module.named_parameters()))
    assert set(SavedCheckpoint(tmp_path / "all" / "global_step3").weight_names) == names
    assert set(SavedCheckpoint(tmp_path / "trained" / "global_step3").weight_names) == names - frozen
    other = case.engine(seed=7)
    fresh = whole_weights(other)
    other.load_checkpoint(tmp_path / "trained")
    weights, theirs = whole_weights(other), whole_weights(engine)
    for name in names:
        assert torch.equal(weights[name], fresh[name] if name in frozen else theirs[name]), name
    for one in (engine, other):
        one.destroy()


def test_custom_load_fn(tmp_path):
    saved = save(Case(), tmp_path)
    seen = {}
    engine = Case().engine(seed=7)
    engine.load_checkpoint(tmp_path, custom_load_fn=lambda src, dst: seen.update(src=src, dst=dst))
    same_tensors(seen["src"], whole_weights(saved))
    assert seen["dst"] is engine.module
    for one in (engine, saved):
        one.destroy()


def test_another_accumulation_drops_what_it_cannot_use(tmp_path, caplog):
    engine = save(Case(ds_config(gas=3)), tmp_path, steps=7)
    engine.destroy()
    engine, lines = load(Case(ds_config(gas=2)), tmp_path, caplog)
    assert engine.global_steps == 2 and engine.micro_steps == 4
    assert lines == [
        "checkpoint: saved in the middle of an accumulation that this run does not have: that step starts over"
    ]
    engine.destroy()


def test_a_step_that_was_begun_with_another_group_starts_over(tmp_path, caplog):
    save(Case(ds_config(gas=3)), tmp_path, steps=7).destroy()
    engine, lines = load(Case(ds_config(gas=3, hift={"order": "top2down"})), tmp_path, caplog)
    assert engine.micro_steps == 6 and "that step starts over" in lines[-1]
    assert not any(map(engine.optimizer.pending, engine.module.parameters()))
    engine.destroy()


def test_the_folder_can_be_read_without_this_package(tmp_path):
    """What docs/checkpoints.md says of the format, with safetensors and json alone."""
    import json

    from safetensors.torch import load_file

    engine = save(Case(ds_config(bf16=BF16, hift={"state": {"slice_numel": 50}})), tmp_path)
    folder = tmp_path / Path((tmp_path / "latest").read_text())
    common = json.loads((folder / "checkpoint.json").read_text())
    weights = load_file(folder / "model.safetensors")
    assert {n for n in weights if not n.startswith("$padding.")} == set(common["tensors"])
    states = load_file(folder / "states-rank-00000.safetensors")
    name = "layers.0.up.weight"
    parts = {n: t for n, t in states.items() if n.startswith(f"{name}/master[")}
    assert len(parts) >= 2  # 91 elements in slices of at most 50
    whole = torch.cat([parts[n] for n in sorted(parts, key=lambda n: int(n.split("[")[1].split(":")[0]))])
    assert torch.equal(whole.view(common["tensors"][name]["shape"]).bfloat16(), weights[name])
    engine.destroy()


# -- settings of the block -------------------------------------------------------------------------------------


def keys_of_block(model, prefix=""):
    for name, info in model.model_fields.items():
        nested = isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)
        yield from keys_of_block(info.annotation, f"{prefix}{name}.") if nested else [prefix + name]


def test_every_key_of_the_block_that_differs_is_said():
    block = HiFTConfig().model_dump(mode="json")
    saved = SimpleNamespace(common={"hift": block})
    assert block_differences(saved, block) == [] == block_differences(SimpleNamespace(common={}), block)
    keys = list(keys_of_block(HiFTConfig))
    assert len(keys) > 20
    for key in keys:
        now = copy.deepcopy(block)
        *above, last = key.split(".")
        functools.reduce(lambda place, part: place[part], above, now)[last] = "another"
        (line,) = block_differences(saved, now)
        assert line.startswith(f"{key}: ") and line.endswith(" -> another")
        before = copy.deepcopy(block)  # of a version that did not have the key: as its default
        del functools.reduce(lambda place, part: place[part], above, before)[last]
        assert block_differences(SimpleNamespace(common={"hift": before}), block) == []
        (line,) = block_differences(SimpleNamespace(common={"hift": before}), now)
        assert line.startswith(f"{key}: ") and line.endswith(" -> another")


def test_settings_that_differ_are_the_runs_and_said_in_one_line(tmp_path, caplog):
    save(Case(hift()), tmp_path).destroy()
    block = {"lr_update": "step", "seed": 3, "state": {"slots": 2}, "checkpoint": {"on_error": "continue"}}
    engine, lines = load(Case(hift(**block)), tmp_path, caplog)
    assert lines == [
        "checkpoint: \"hift\" settings are the run's, not the checkpoint's: checkpoint.on_error: raise -> continue; "
        "lr_update: cycle -> step; seed: 0 -> 3; state.slots: None -> 2"
    ]
    engine.destroy()
