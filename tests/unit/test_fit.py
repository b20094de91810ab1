"""``hift.fit``: what is left open is chosen for a card, what is given is kept, and the steps stay the same."""

from __future__ import annotations

import json

import pytest

from hift_ds.errors import ConfigError, HiFTError
from hift_ds.forecast import fit as forecast
from hift_ds.forecast.fit import Question, Speeds, divisors_up_to, find_fit
from hift_ds.forecast.setting import GroupStep, Setting, is_on
from hift_ds.forecast.steps import Structure
from hift_ds.report.metrics import read_metrics
from hift_ds.train import fit as fitting
from hift_ds.train.card import card_of
from hift_ds.train.finetune import finetune
from hift_ds.train.fit import Facts, apply, choose
from hift_ds.train.group_size import ModelSizes, head_in_every_step
from hift_ds.train.run_config import RunConfig, load_run_config
from hift_ds.train.settings import resolve
from tests.unit.test_launch import inputs, own_cache, write_run  # noqa: F401  (fixtures)

ALL = frozenset({"chunked_loss", "slice_numel", "checkpointing", "offload", "residency"})
NUM_BLOCKS = 10


class MadeUp:
    """Steps of a model whose memory can be worked out by hand: 1000 of weights, 400 of visiting states (100 in
    slices), and for each row 50 of logits (5 in chunks) and 10 for each kept block."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def known(self):
        return [0, 1, 2]

    def step(self, index):
        setting, activations = self.setting, self.setting.engine_config["hift"].get("activations") or {}
        states = 100 if is_on(setting, "slice_numel") else 400
        kept = activations.get("blocks_kept", 0) if is_on(setting, "checkpointing") else NUM_BLOCKS
        rows = setting.batch * ((5 if is_on(setting, "chunked_loss") else 50) + 10 * kept)
        rows = rows // 5 if is_on(setting, "offload") else rows
        places = {
            "forward:": {"weights": 1000, "states": states, "activations": rows},
            "update:": {"weights": 1000, "states": states},
        }
        cost = 6 + is_on(setting, "chunked_loss") + 3 * is_on(setting, "checkpointing") * (1 - kept / NUM_BLOCKS)
        flops = {"forward": int(1000 * setting.batch * cost)}
        return GroupStep(index, str(index), 10, places, flops, 400, 7 * is_on(setting, "offload"))


@pytest.fixture
def made_up(monkeypatch):
    structure = Structure(("embed", *map(str, range(NUM_BLOCKS)), "head"), (10,) * (NUM_BLOCKS + 2), None, 1)
    monkeypatch.setattr(forecast, "read_structure", lambda setting: structure)
    asked = []

    def run_requests(requests, processes):
        asked.extend(requests)
        return [MadeUp(request.setting) for request in requests]

    monkeypatch.setattr(forecast, "run_requests", run_requests)
    return asked


def question(usable: int, free=ALL, batches=(1, 2, 4), **block) -> Question:
    setting = Setting("m", {"hift": block, "optimizer": {"type": "AdamW"}}, length=256)
    return Question(setting, free, batches, 4, usable, Speeds(1e6, 1e9), NUM_BLOCKS)


@pytest.mark.parametrize("usable, on, batch, kept, peak", [
    (10_000, ("residency",), 4, 0, 3440),
    (2000, (), 4, 0, 2000),
    (1999, ("chunked_loss",), 4, 0, 1820),
    (1700, ("chunked_loss", "slice_numel"), 4, 0, 1520),  # not a smaller pass
    (1510, ("chunked_loss", "checkpointing", "slice_numel"), 4, 9, 1480),
    (1250, ("chunked_loss", "checkpointing", "slice_numel"), 4, 3, 1240),
])  # fmt: skip
def test_the_fastest_that_fits_is_chosen(made_up, usable, on, batch, kept, peak):
    fit = find_fit(question(usable))
    one = fit.chosen
    assert (one.on, one.setting.batch, one.blocks_kept) == (on, batch, kept), one
    assert fit.fits and (peak == one.peak_bytes or on == ("residency",))
    assert one.seconds == min(other.seconds for other in fit.compared if other.peak_bytes <= usable)


def test_a_smaller_pass_is_taken_where_nothing_else_is_left_open(made_up):
    fit = find_fit(question(1700, free=frozenset()))
    assert (fit.fits, fit.chosen.setting.batch, fit.fastest.setting.batch) == (True, 2, 4)


def test_what_slices_save_is_added_up_and_not_stepped_again(made_up):
    fit = find_fit(question(1250))
    for one in fit.compared:
        if "residency" not in one.on:
            assert one.peak_bytes == MadeUp(one.setting).step(0).peak_bytes, one


def test_as_many_blocks_keep_their_activations_as_there_is_room_for(made_up):
    fit = find_fit(question(1235, batches=(2,)))
    assert fit.chosen.on == ("chunked_loss", "checkpointing", "slice_numel")
    assert fit.chosen.blocks_kept == 6 and "but for the top 6" in fit.chosen.words()
    assert MadeUp(fit.chosen.setting).step(0).peak_bytes == fit.chosen.peak_bytes == 1230


def test_what_is_given_is_not_touched(made_up):
    fit = find_fit(question(1150, free=frozenset({"chunked_loss"}), batches=(2,)))
    assert not fit.fits and fit.chosen.setting.batch == 2
    assert {one.on for one in fit.compared} == {(), ("chunked_loss",)}
    sliced = find_fit(question(1250, ALL - {"slice_numel"}, state={"slice_numel": 5}))
    assert {one.setting.engine_config["hift"]["state"]["slice_numel"] for one in sliced.compared} == {5}


def test_offloading_is_tried_where_nothing_else_fits_and_streaming_after_it(made_up):
    assert "offload" in find_fit(question(1104)).chosen.on
    fit = find_fit(question(900, free=ALL | {"streaming"}))
    assert not fit.fits
    streamed = [one for one in fit.compared if "streaming" in one.on]
    assert streamed and all("offload" not in one.on for one in streamed)
    assert {one.setting.engine_config["zero_optimization"]["stage"] for one in streamed} == {3}


def test_micro_batches_divide_the_rows():
    assert divisors_up_to(12, 6) == (1, 2, 3, 4, 6)
    assert divisors_up_to(7, 6) == (1,) and divisors_up_to(4, 0) == (1,)


# -- from a run file -------------------------------------------------------------------------------------------


def settings_of(hift=None, deepspeed=None, ranks=1, **train):
    content = {"model": {"path": "llama2_7b"}, "data": {"train": "y"}, "hift": hift or {}, "deepspeed": deepspeed}
    return resolve(RunConfig.model_validate({**content, "train": {"output_dir": "z", **train}}), ranks)


def chosen_for(settings, card=24, before=None, length=1024, model="llama2_7b"):
    return choose(Facts(settings, "bf16", model, length, None), card and card_of(card, settings.world_size), before)


def test_the_card_is_what_is_free_on_the_accelerator_or_what_the_file_names(monkeypatch):
    from types import SimpleNamespace

    import torch

    from hift_ds.store.speeds import Link
    from hift_ds.train import card as cards

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: SimpleNamespace(type="cuda"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(cards, "device_bytes_free", lambda device: 20 << 30)
    monkeypatch.setattr(cards, "measure_flops", lambda *args: 7e12)
    monkeypatch.setattr(cards, "measure_link", lambda *args: Link(9e9, 8e9))
    for ranks in (1, 2):
        here = cards.card_here(settings_of(ranks=ranks), "bf16")
        assert here.usable_bytes == int(forecast.budget_gib(20, ranks) * 2**30) and here.speeds == Speeds(7e12, 9e9)
        assert here.is_here and not here.is_host and "20.0 GiB free on the device" in here.words
    named = cards.card_here(settings_of({"fit": 24}), "bf16")
    assert named.usable_bytes == card_of(24, 1).usable_bytes and named.speeds == Speeds(7e12, 9e9) and not named.is_here


def test_a_small_model_needs_no_simulation(monkeypatch):
    monkeypatch.setattr(forecast, "run_requests", lambda *args: pytest.fail("simulated"))
    chosen = chosen_for(settings_of(global_batch_size=48, max_steps=999, ranks=2), 40, length=512, model="smollm2_135m")
    assert chosen.keys.pop("hift.state.residency") == "device"
    assert chosen.keys == {"hift.group_size": 1, "train.micro_batch_size": 12}  # of 24 rows a rank, 8192 tokens at most
    settings = apply(settings_of(global_batch_size=48, ranks=2), chosen.keys)
    assert (settings.batch.micro_batch_size, settings.batch.gradient_accumulation_steps) == (12, 2)
    assert settings.batch.global_batch_size == 48 and settings.hift.group_size == 1


def test_without_a_card_everything_that_saves_memory_is_on():
    chosen = chosen_for(settings_of({"group_size": 1, "activations": {"offload": False}}, global_batch_size=8), None)
    assert chosen.keys == {
        "hift.state.slice_numel": 1 << 24, "hift.activations.checkpointing": True,
        "hift.activations.chunked_loss": True, "train.micro_batch_size": 1,
    }  # fmt: skip
    json_says = settings_of(
        {"group_size": 1}, {"hift": {"state": {"slice_numel": 7}}, "train_micro_batch_size_per_gpu": 2}
    )
    assert set(chosen_for(json_says, None).keys) == {
        f"hift.activations.{name}" for name in ("checkpointing", "chunked_loss", "offload")
    }
    recomputes = settings_of({"group_size": 1}, gradient_checkpointing=False)
    assert "hift.activations.checkpointing" not in chosen_for(recomputes, None).keys


def test_a_model_that_cannot_be_simulated_is_trained_as_it_is_written(monkeypatch):
    def fails(question):
        raise HiFTError("no such operator")

    monkeypatch.setattr(fitting.forecast, "find_fit", fails)
    chosen = chosen_for(settings_of({"group_size": 1}, global_batch_size=8))
    assert chosen.keys == {} and "no such operator" in chosen.lines[0]


def test_a_run_that_goes_on_keeps_what_was_chosen():
    run = settings_of({"fit": 24}, global_batch_size=8, max_steps=64)
    before = {"fit": 24, "ranks": 1, "rows": 8, "chosen": {
        "hift.group_size": 3, "hift.activations.chunked_loss": True, "train.micro_batch_size": 4}}  # fmt: skip
    kept = chosen_for(run, before=before)
    assert kept.keys == before["chosen"] and kept.lines == (
        "as when this run began: hift.group_size=3, hift.activations.chunked_loss=True, train.micro_batch_size=4",
    )
    given = settings_of({"fit": 24, "activations": {"chunked_loss": False}}, global_batch_size=8, micro_batch_size=2)
    assert chosen_for(given, before=before).keys == {"hift.group_size": 3}
    other = chosen_for(settings_of({"fit": 48}, global_batch_size=8), 48, before, 64, "smollm2_135m")
    assert other.keys.pop("hift.state.residency") == "device"
    assert other.keys == {"hift.group_size": 3, "train.micro_batch_size": 8}  # groups as they were, the rest anew


def test_the_simulation_knows_no_head_of_the_tasks():
    """Its model is the config's: a pattern of ``score``, which it has not, would end the forecast."""
    content = {"task": "classification", "model": {"path": "llama2_7b"}, "data": {"train": "y"}}
    run = resolve(RunConfig.model_validate({**content, "train": {"output_dir": "z", "max_steps": 64}}), 1)
    head, _ = head_in_every_step(run, ModelSizes.read("llama2_7b", False, "AutoModelForSequenceClassification"))
    assert head == {"hift.always_active": [r"^score\.weight$"]}
    head["hift.always_active"].append("embed_tokens")
    setting = fitting.setting_of(Facts(apply(run, head), "bf16", "llama2_7b", 64, None))
    assert setting.engine_config["hift"]["always_active"] == ["embed_tokens"]


@pytest.mark.parametrize("wrong", ["24", -1, True, "yes"])
def test_a_wrong_value_is_one_line(inputs, tmp_path, wrong):  # noqa: F811
    with pytest.raises(ConfigError, match="hift.fit: expected auto, off or a number of GiB, got"):
        load_run_config(write_run(inputs, tmp_path / "run", hift={"fit": wrong}))


def test_off_is_off():
    for off in (False, "off"):
        settings = settings_of({"fit": off, "group_size": 1}, global_batch_size=8)
        assert settings.run.fit is None and chosen_for(settings).keys == {}


def test_the_micro_batch_of_a_run_changes_no_step(inputs, tmp_path, capsys):  # noqa: F811
    """8 rows at once for a card of 24 GiB, against 4 x 2 as the file says; and the run goes on as it began."""

    def losses(folder, **changes):
        finetune(load_run_config(write_run(inputs, folder, hift={"group_size": 1, "fit": 24}, **changes)))
        return [record["loss"] for record in read_metrics(folder).steps]

    common = {"deepspeed": None, "train__max_steps": 3, "train__save_steps": 3, "train__eval_steps": None}
    written = losses(tmp_path / "written", train__micro_batch_size=2, **common)
    chosen = losses(tmp_path / "chosen", train__micro_batch_size=None, **common)
    assert chosen == pytest.approx(written, rel=1e-4)
    made = json.loads((tmp_path / "chosen" / "deepspeed.json").read_text())
    assert (made["train_micro_batch_size_per_gpu"], made["gradient_accumulation_steps"]) == (8, 1)
    assert made["train_batch_size"] == 8
    record = json.loads((tmp_path / "chosen" / "fit.json").read_text())
    assert (
        record["chosen"] == {"train.micro_batch_size": 8, "hift.state.residency": "device"} and record["bound_gib"] < 1
    )
    out = capsys.readouterr().out
    assert f"fit: {card_of(24, 1).words}, at most" in out and "micro-batch 8 x 1 accumulation step," in out
    assert losses(tmp_path / "chosen", train__micro_batch_size=None, **{**common, "train__max_steps": 5})[:3] == chosen
    assert "as when this run began: train.micro_batch_size=8, hift.state.residency=device" in capsys.readouterr().out


def test_a_forecast_of_the_whole_step_decides(tmp_path):
    """On the real simulation: of a model on a card that is too small for it as it is written."""
    import model_zoo

    model_zoo.config(
        "llama2_7b", hidden_size=64, intermediate_size=176, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=32_000, max_position_embeddings=512,
    ).save_pretrained(tmp_path)  # fmt: skip
    settings = settings_of({"group_size": 1}, global_batch_size=4, gradient_accumulation_steps=1)
    facts = Facts(settings, "bf16", str(tmp_path), 512, None)
    card = card_of(1.2, 1)  # 0.57 GiB usable
    chosen = choose(facts, card)
    assert chosen.record["fits"] and chosen.record["forecast_gib"] <= chosen.record["usable_gib"]
    assert chosen.keys["hift.activations.chunked_loss"] is True
    plain = next(one for one in chosen.record["compared"] if not one["on"])
    assert plain["forecast_gib"] > chosen.record["usable_gib"]
