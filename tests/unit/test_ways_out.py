"""Whoever trains, and whichever way out is taken: the caller's surroundings and random streams are as a plain run would
have left them, states are gone, and a second engine, ours or a stock one, trains every weight of the model."""

from __future__ import annotations

import copy
import gc
import itertools
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import numpy
import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import model_zoo
from hift_ds import HiFTCallback, HiFTMixin, HiFTTrainer
from hift_ds.process_group import as_single_process
from tests.helpers.engines import ds_config, make_engine
from tests.helpers.trainer import AUTO, QUIET, arguments, ragged_dataset
from tests.numerics.test_engine_life import hooks_of
from tests.parity.test_trl import rows, tokenizer

trl = pytest.importorskip("trl")
DATA = ragged_dataset(12)


def llama() -> Any:
    model = model_zoo.tiny.build("llama", seed=1)
    model.model.register_forward_hook(lambda module, args, output: drop(output))  # draws in each forward
    return model


def drop(output: Any) -> Any:
    output.last_hidden_state = nn.functional.dropout(output.last_hidden_state, 0.1, training=torch.is_grad_enabled())
    return output


class Leaves(TrainerCallback):
    """At the end of the third step."""

    def __init__(self, way: str) -> None:
        self.way = way

    def on_step_end(self, args, state, control, **kwargs):
        random.random(), numpy.random.rand()
        if state.global_step == 3 and self.way == "callback":
            raise RuntimeError("mine")


def interrupted_in_backward(model: nn.Module) -> Any:
    """Ctrl-C in the fourth."""
    seen = []

    def stop(module, args, output):
        seen.append(0)
        if len(seen) == 4:
            output.last_hidden_state.register_hook(lambda grad: (_ for _ in ()).throw(KeyboardInterrupt()))

    return model.model.register_forward_hook(stop)


def plain(folder: Path, model: Any, way: str, form: str) -> Callable[[], Any]:
    if form == "loop":
        return lambda: plain_loop(model, way)
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    unset_hf_deepspeed_config()
    return trainer_of(folder, model, way, None, trl.SFTTrainer if form == "sft" else Trainer).train


def trainer_of(folder: Path, model: Any, way: str, ds: Any, cls: type, callbacks: tuple[Any, ...] = ()) -> Any:
    of_trl = issubclass(cls, trl.SFTTrainer)
    more = {"train_dataset": rows("sft"), "processing_class": tokenizer()} if of_trl else {"train_dataset": DATA}
    options = {**QUIET, "max_steps": 6, "learning_rate": 1e-2, **({"bf16": False} if of_trl else {})}
    args = (trl.SFTConfig if of_trl else TrainingArguments)(str(folder), deepspeed=copy.deepcopy(ds), **options)
    return cls(model=model, args=args, callbacks=[Leaves(way), *callbacks], **more)


def by_trainer(folder: Path, model: Any, way: str, ds: Any) -> Any:
    made = trainer_of(folder, model, way, ds, HiFTTrainer)
    return made.train, lambda: made.engine


def by_sft(folder: Path, model: Any, way: str, ds: Any) -> Any:
    made = trainer_of(folder, model, way, ds, type("HiFTSFT", (HiFTMixin, trl.SFTTrainer), {}))
    return made.train, lambda: made.engine


def by_callback(folder: Path, model: Any, way: str, ds: Any) -> Any:
    callback = HiFTCallback()
    made = trainer_of(folder, model, way, ds, Trainer, (callback,))
    return made.train, lambda: callback.engine


def by_loop(folder: Path, model: Any, way: str, ds: Any) -> Any:
    engine = make_engine(model, ds_config(rows=2, hift=ds["hift"]))

    def train() -> None:
        try:
            for step in range(6):
                batch = {key: torch.stack([DATA[step][key], DATA[step + 1][key]]) for key in DATA[0]}
                engine.backward(engine(**batch).loss)
                engine.step()
                if step == 2 and way == "callback":
                    raise RuntimeError("mine")
        finally:
            engine.destroy()

    return train, lambda: engine


def surroundings(model: nn.Module) -> dict[str, Any]:
    gc.collect()
    return {
        "flags": {name: param.requires_grad for name, param in model.named_parameters()},
        "hooks": hooks_of(model),
        "environment": {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")},
        "names": (deepspeed.initialize, deepspeed.DeepSpeedEngine, nn.functional.linear, nn.Linear.forward),
        "default dtype": (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()),
        "operators": vars(deepspeed.ops).get("__compatible_ops__"),
    }


def streams() -> list[float]:
    """The next number of each."""
    return [random.random(), float(numpy.random.rand()), torch.rand(()).item()]


def seed_all() -> None:
    random.seed(5), numpy.random.seed(6), torch.manual_seed(7)


FORMS: dict[str, Callable[..., Any]] = {
    "trainer": by_trainer, "sft": by_sft, "callback": by_callback, "loop": by_loop,
}  # fmt: skip


QUICK = {(form, way, "after_backward") for form in FORMS for way in ("callback", "Ctrl-C")}
QUICK |= {("trainer", "return", "in_backward"), ("trainer", "Ctrl-C", "in_backward"), ("loop", "Ctrl-C", "in_backward")}
CASES = itertools.product(FORMS, ("return", "callback", "Ctrl-C"), ("after_backward", "in_backward"))


@pytest.mark.parametrize(
    ("form", "way", "update"),
    [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES],
)
def test_the_caller_finds_everything_as_a_plain_run_leaves_it(tmp_path, form, way, update):
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    ds = {**AUTO, "hift": {"update": update, "state": {"residency": "host", "io": "auto"}}}
    if update == "in_backward":
        ds.pop("gradient_clipping")
    before = surroundings(model)
    if form == "loop":
        seed_all()
    train, engine_of = FORMS[form](tmp_path / "ours", model, way, ds)
    if form == "loop":  # to make an engine draws nothing
        drawn = streams()
        seed_all()
        assert drawn == streams()
    handle = interrupted_in_backward(model) if way == "Ctrl-C" else None
    seed_all()
    ended = leave_by(train)
    drawn = streams()
    if handle is not None:
        handle.remove()
    engine = engine_of()
    assert isinstance(ended, {"return": type(None), "callback": RuntimeError}.get(way, KeyboardInterrupt)), repr(ended)
    del ended
    if form == "callback" and way != "return":  # it cannot know before the model is used again
        with torch.no_grad():
            model(input_ids=DATA[0]["input_ids"][None])
    after = surroundings(model)
    for what, value in before.items():
        assert after[what] == value, what
    assert all(param.grad is None for param in model.parameters())
    optimizer = engine.optimizer
    assert engine.has_ended and not optimizer.store._host and not optimizer.states.always_store._memory

    twin = llama()
    twin.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    train = plain(tmp_path / "plain", twin, way, form)
    interrupted_in_backward(twin) if way == "Ctrl-C" else None
    seed_all()
    leave_by(train)
    assert drawn == streams(), "random streams"

    for second in (second_of_ours, second_stock):
        start = {name: value.detach().clone() for name, value in model.named_parameters()}
        second(tmp_path / "second", model)
        moved = {name for name, value in model.named_parameters() if not torch.equal(start[name], value)}
        assert moved == {name for name, flag in after["flags"].items() if flag}, second.__name__


def leave_by(train: Callable[[], Any]) -> BaseException | None:
    try:
        train()
    except BaseException as error:
        return error
    return None


def plain_loop(model: Any, way: str) -> None:
    for step in range(6):
        batch = {key: torch.stack([DATA[step][key], DATA[step + 1][key]]) for key in DATA[0]}
        model(**batch).loss.backward()
        if step == 2 and way == "callback":
            raise RuntimeError("mine")


def second_of_ours(folder: Path, model: Any) -> None:
    HiFTTrainer(model, arguments(folder, max_steps=5, learning_rate=1e-2), train_dataset=DATA).train()


def second_stock(folder: Path, model: Any) -> None:
    config = {key: value for key, value in ds_config(rows=2).items() if key != "hift"}
    config["optimizer"]["params"]["torch_adam"] = True
    with as_single_process():  # DeepSpeed wants a launcher's variables
        engine = deepspeed.initialize(model=model, config=config)[0]
    batch = {key: torch.stack([row[key] for row in DATA[:2]]) for key in DATA[0]}
    engine.backward(engine(**batch).loss)
    engine.step()
    engine.destroy()
    model.zero_grad()


def test_two_trainers_with_callbacks_that_were_made_before_either_trains(tmp_path):
    stock = deepspeed.initialize
    models, callbacks = [llama(), llama()], [HiFTCallback(), HiFTCallback()]
    made = [
        Trainer(model, arguments(tmp_path / str(i), max_steps=5), train_dataset=DATA, callbacks=[callback])
        for i, (model, callback) in enumerate(zip(models, callbacks, strict=True))
    ]
    for trainer, model, callback in zip(made, models, callbacks, strict=True):
        trainer.train()
        assert callback.engine.module is model and set(callback.engine.coverage().values()) == {1}
    assert deepspeed.initialize is stock


def test_a_trainer_with_a_callback_that_is_thrown_away_untrained(tmp_path):
    stock = deepspeed.initialize
    trainer = Trainer(llama(), arguments(tmp_path), train_dataset=DATA, callbacks=[HiFTCallback()])
    assert deepspeed.initialize is not stock
    del trainer
    gc.collect()
    assert deepspeed.initialize is stock


def test_a_model_that_the_trainer_makes_again(tmp_path):
    callback = HiFTCallback()
    trainer = Trainer(args=arguments(tmp_path), model_init=llama, train_dataset=DATA, callbacks=[callback])
    trainer.train()
    assert callback.engine.module is trainer.model and set(callback.engine.coverage().values()) == {1}
