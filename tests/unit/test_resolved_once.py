"""However a run comes to the engine: its DeepSpeed JSON is read once, its "hift" block parsed once, DeepSpeed's config
built once."""

from __future__ import annotations

import argparse
import builtins
import copy
import io
import json
import os
import pickle
from collections import Counter

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from transformers import Trainer

import hift_ds
import model_zoo
from hift_ds.config import HiFTConfig, parse_block, parsed
from hift_ds.errors import ConfigError
from hift_ds.integrations.arguments import _parse_for_all
from hift_ds.integrations.callback import HiFTCallback
from hift_ds.integrations.loops import kept_from_accelerate
from tests.helpers.engines import ds_config, make_engine, train_step
from tests.helpers.toy import Toy, make_batches
from tests.helpers.trainer import AUTO, arguments, ragged_dataset

BLOCK = {"group_size": 2, "state": {"io": "auto"}}


@pytest.fixture
def counted(tmp_path, monkeypatch):
    """A DeepSpeed JSON, and how often what happened to it."""
    file, calls = tmp_path / "ds.json", Counter()

    def noting(function, name, concerns=lambda *args: True):
        def call(*args, **kwargs):
            calls.update([name] if concerns(*args) else [])
            return function(*args, **kwargs)

        return call

    noting_open = noting(open, "read", lambda path, *_: str(path) == str(file))
    for module in (builtins, io):
        monkeypatch.setattr(module, "open", noting_open)
    monkeypatch.setattr(HiFTConfig, "__init__", noting(HiFTConfig.__init__, "parsed"))
    monkeypatch.setattr(DeepSpeedConfig, "__init__", noting(DeepSpeedConfig.__init__, "built"))
    return file, calls


@pytest.mark.parametrize("given", ["dict", "path", "arguments"])
def test_by_initialize(counted, given):
    file, calls = counted
    config = ds_config(hift=BLOCK)
    file.write_text(json.dumps(config))
    calls.clear()
    args = argparse.Namespace(deepspeed_config=str(file), local_rank=0)
    way = {"dict": {"config": config}, "path": {"config": str(file)}, "arguments": {"args": args}}[given]
    before = copy.deepcopy(config)
    engine, *_ = hift_ds.initialize(model=Toy(), **way)
    train_step(engine, make_batches(1))
    assert engine.hift.group_size == 2 and engine.config["hift"] == BLOCK
    assert calls == Counter(parsed=1, built=1, **({} if given == "dict" else {"read": 1}))
    assert config == before and args.deepspeed_config == str(file)
    engine.destroy()


@pytest.mark.parametrize("way", ["trainer", "callback"])
def test_by_a_trainer(counted, tmp_path, way):
    file, calls = counted
    file.write_text(json.dumps({**AUTO, "hift": BLOCK}))
    calls.clear()
    args = arguments(tmp_path / "out", str(file), max_steps=2, save_strategy="steps", save_steps=2)
    make = hift_ds.HiFTTrainer if way == "trainer" else Trainer
    callback = HiFTCallback()
    trainer = make(model_zoo.tiny.build("llama"), args, train_dataset=ragged_dataset(8),
                   callbacks=[callback] if way == "callback" else None)  # fmt: skip
    trainer.train()
    engine = trainer.engine if way == "trainer" else callback.engine
    assert engine.hift.group_size == 2
    assert calls == Counter(read=1, parsed=1, built=1)
    if way == "trainer":  # what was changed meanwhile counts
        args.deepspeed_plugin.deepspeed_config["hift"]["group_size"] = 1
        trainer.train()
        assert trainer.engine.hift.group_size == 1 and calls["parsed"] == 2


def test_by_accelerate(counted):
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.state import AcceleratorState
    from torch.optim import AdamW
    from torch.utils.data import DataLoader

    file, calls = counted
    config = {**AUTO, "train_micro_batch_size_per_gpu": 2, "gradient_clipping": 1.0, "hift": BLOCK}
    file.write_text(json.dumps(config))
    calls.clear()
    AcceleratorState._reset_state(True)
    try:
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=str(file)))
        model = model_zoo.tiny.build("llama")
        with hift_ds.accelerate():
            engine, *_ = accelerator.prepare(
                model, AdamW(model.parameters(), lr=1e-2), DataLoader(ragged_dataset(4), batch_size=2)
            )
        assert engine.hift.group_size == 2 and calls == Counter(read=1, parsed=1, built=1)
        engine.destroy()
    finally:
        AcceleratorState._reset_state(True)
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)


def test_a_parsed_block_is_the_json_that_was_written():
    block = parsed(BLOCK)
    assert block == BLOCK and json.loads(json.dumps(block)) == BLOCK
    assert block.hift is parse_block(block) and block.hift == HiFTConfig(**BLOCK)
    assert copy.deepcopy({"hift": block})["hift"].hift is block.hift
    assert type(pickle.loads(pickle.dumps(block))) is dict
    block["state"]["io"] = "direct"
    assert block.hift is None and parse_block(block).state.io == "direct"
    assert parsed(HiFTConfig(order="random"))["order"] == "random"


def test_what_is_hidden_from_accelerate_is_still_parsed():
    config = {"hift": parsed(BLOCK)}
    with kept_from_accelerate(config):
        _parse_for_all(config)  # as another trainer with this config does
        assert not isinstance(config["hift"], dict) and config["hift"].data.hift is not None
    assert config["hift"] == BLOCK


def test_a_config_in_two_places_is_refused(counted):
    file, _ = counted
    file.write_text(json.dumps(ds_config()))
    with pytest.raises(ConfigError, match="leave one of the two out"):
        make_engine(Toy(), ds_config(), args=argparse.Namespace(deepspeed_config=str(file), local_rank=0))
