"""Every file in ds_configs/ trains a model through the Trainer and does what its name says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import model_zoo
from hift_ds.config import check_against_deepspeed, parse_block
from hift_ds.engine.zero3.shards import is_partitioned, whole_of
from hift_ds.integrations.transformers import HiFTTrainer
from tests.helpers.trainer import arguments, ragged_dataset

FOLDER = Path(__file__).resolve().parents[2] / "ds_configs"
FILES = sorted(FOLDER.glob("*.json"))
NUM_GROUPS = 5  # of the tiny llama, one unit a group


def test_there_are_presets_and_their_names_say_what_they_are():
    assert FILES
    for file in FILES:
        assert re.fullmatch(r"(fp32|mixed|bf16|fp16)_(host|device|disk|auto|zero3)(_[a-z0-9]+)*", file.stem), file.name
        assert f"`{file.stem}`" in (FOLDER / "README.md").read_text(), f"{file.name} is not in the table"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_trains_a_tiny_model(tmp_path, monkeypatch, file):
    monkeypatch.chdir(tmp_path)  # paths in presets are relative
    ds = json.loads(file.read_text())
    hift = parse_block(ds["hift"])
    check_against_deepspeed(hift, ds)
    precision, residency = file.stem.split("_")[:2]
    model = model_zoo.tiny.build("llama")
    before = {name: value.clone() for name, value in model.named_parameters()}
    num_steps = NUM_GROUPS + 1
    args = arguments(
        tmp_path, str(file), max_steps=num_steps, gradient_accumulation_steps=2, learning_rate=1e-2,
        weight_decay=0.1, bf16=precision == "bf16", fp16=precision == "fp16", gradient_checkpointing=True,
        eval_strategy="steps", eval_steps=4,
    )  # fmt: skip
    trainer = HiFTTrainer(
        model=model, args=args, train_dataset=ragged_dataset(24), eval_dataset=ragged_dataset(3, seed=1)
    )
    trainer.train()

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == num_steps and all(0 < loss < 6 for loss in losses)
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "mixed": torch.float32, "fp32": torch.float32}
    assert model.dtype == dtypes[precision]
    assert residency in (trainer.engine.hift.state.residency, "zero3")
    assert (residency == "zero3") == all(is_partitioned(param) for param in model.parameters())
    coverage = trainer.engine.coverage()
    for name, param in model.named_parameters():
        value = whole_of(param) if is_partitioned(param) else param
        moved = not torch.equal(before[name].to(value.dtype), value)
        assert moved == (coverage[name] > 0), name
    if hift.steps_per_group == 1:
        assert min(coverage.values()) >= 1
    if hift.always_active:
        assert coverage["model.embed_tokens.weight"] == coverage["lm_head.weight"] == num_steps
    clipped = trainer.engine.optimizer.max_grad_norm
    assert clipped == args.max_grad_norm == 1.0  # "auto" was filled in


def test_the_smallest_is_what_estimate_counts_by_default():
    import argparse

    from hift_ds.cli.estimate_input import add_input_arguments, setting_from

    parser = argparse.ArgumentParser()
    add_input_arguments(parser)
    counted = setting_from(parser.parse_args(["--model", "llama2_7b"])).engine_config["hift"]
    written = json.loads((FOLDER / "bf16_host_small.json").read_text())["hift"]
    assert parse_block(counted) == parse_block(written)
