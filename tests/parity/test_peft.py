"""Models with PEFT's adapters: what is trained, saved and gone on from is the plain Trainer's. Skipped where PEFT is
not installed; nothing of hift_ds needs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer

import model_zoo
from hift_ds import HiFTCallback
from hift_ds.ranks import free_port, launch_variables
from tests.helpers.engines import ds_config, make_engine
from tests.helpers.parity import ONE_GROUP, compare, run, same
from tests.helpers.trainer import AUTO, arguments, ragged_dataset

peft = pytest.importorskip("peft", reason="PEFT is not installed")

PARTITIONED = {**ONE_GROUP, "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
SAVED = {"save_strategy": "steps", "save_steps": 2}
ADAPTER = "adapter_model.safetensors"


def lora(**options: Any) -> Any:
    torch.manual_seed(4)
    targets = ["q_proj", "down_proj"]
    config = peft.LoraConfig(r=2, target_modules=targets, lora_alpha=8, task_type="CAUSAL_LM", **options)
    return started(peft.get_peft_model(model_zoo.tiny.build("llama"), config))


def with_a_head() -> Any:
    return lora(modules_to_save=["lm_head"])


def added() -> Any:
    """Into the model itself, as transformers does it."""
    torch.manual_seed(4)
    model = model_zoo.tiny.build("llama")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    return started(model)


def started(model: Any) -> Any:
    """With B matrices that are not zero, so that every weight has a gradient at once."""
    for name, param in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(param, std=0.1)
    return model


@pytest.mark.parametrize("make_model", [lora, with_a_head, added])
@pytest.mark.parametrize("ds", [ONE_GROUP, PARTITIONED], ids=["replicated", "in shards"])
def test_one_group_is_the_plain_trainer(tmp_path, make_model, ds):
    """Losses, weights, files: the adapters of checkpoint and end, which a fresh model reads."""
    ours, plain = compare(tmp_path, Trainer, make_model, ds=ds, gradient_accumulation_steps=2, **SAVED)
    for one in (ours, plain):
        one.trainer.save_model(f"{one.trainer.args.output_dir}/end")
    for folder in ("checkpoint-2", "end"):
        files = [Path(one.trainer.args.output_dir) / folder for one in (ours, plain)]
        a, b = (load_file(file / ADAPTER) for file in files)
        assert a.keys() == b.keys() and not (files[0] / "model.safetensors").exists()
        assert all(torch.allclose(a[name], b[name], atol=2e-6) for name in b), folder
        assert (files[0] / "adapter_config.json").read_bytes() == (files[1] / "adapter_config.json").read_bytes()
    assert any("lora_A" in name for name in b) and (make_model is not with_a_head or any("lm_head" in n for n in b))
    read = peft.PeftModel.from_pretrained(model_zoo.tiny.build("llama"), files[0])
    rows = {key: torch.stack([row[key] for row in ragged_dataset(3)]) for key in ("input_ids", "labels")}
    read.eval(), plain.trainer.model.eval()
    assert read(**rows).loss.item() == pytest.approx(plain.trainer.model(**rows).loss.item(), abs=2e-6)


@pytest.mark.parametrize("ds", [ONE_GROUP, PARTITIONED], ids=["replicated", "in shards"])
def test_the_callback_saves_what_the_mixin_does(tmp_path, ds):
    mixin = run(tmp_path, Trainer, lora, hift=True, ds=ds, **SAVED)
    args = arguments(tmp_path / "callback", ds, max_steps=4, learning_rate=1e-2, **SAVED)
    Trainer(lora(), args, train_dataset=ragged_dataset(18), callbacks=[HiFTCallback()]).train()
    for folder in ("checkpoint-2", "checkpoint-4"):
        a, b = (load_file(Path(one.output_dir) / folder / ADAPTER) for one in (args, mixin.trainer.args))
        assert a.keys() == b.keys() and len(b) == 12 and all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.parametrize("ds", [AUTO, PARTITIONED])
def test_groups_of_adapters_go_on_from_a_checkpoint_and_the_base_stays(tmp_path, ds):
    base = lora().state_dict()
    options = {"ds": ds, "max_steps": 7, **SAVED}
    whole = run(tmp_path / "whole", Trainer, lora, hift=True, **options)
    run(tmp_path, Trainer, lora, hift=True, stop_at=4, **options)
    again = run(tmp_path, Trainer, lora, hift=True, resume=4, **options)
    same(again, whole)
    counts = whole.trainer.engine.coverage()
    assert len(counts) == 12 and all("lora_" in name and count >= 2 for name, count in counts.items())
    for name, value in base.items():
        assert torch.equal(value, whole.weights[name]) is ("lora_" not in name), name


def test_a_loop_over_the_engine(tmp_path):
    rows = ragged_dataset(8)
    batches = [{key: torch.stack([rows[i][key], rows[i + 1][key]]) for key in rows[0]} for i in range(0, 8, 2)]
    model, twin = lora(), lora()
    engine = make_engine(model, ds_config(rows=2, hift={"groups": [["."]], "lr_update": "step"}))
    optimizer = torch.optim.AdamW([param for param in twin.parameters() if param.requires_grad], lr=1e-2)
    for batch in batches:
        engine.backward(engine(**batch).loss)
        engine.step()
        twin(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for (name, param), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(param, expected, atol=2e-6, rtol=0, msg=name)
    engine.destroy()


@pytest.mark.parametrize("ds", [ONE_GROUP, PARTITIONED])
def test_trl_makes_the_adapters(tmp_path, monkeypatch, ds):
    trl = pytest.importorskip("trl")
    from tests.parity.test_trl import folder_of, rows, tokenizer

    for variable, value in launch_variables(rank=0, world_size=1, port=free_port()).items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(nn.functional, "linear", nn.functional.linear)
    from transformers import AutoModelForCausalLM

    saved = folder_of("sft", tmp_path / "model")
    ours, plain = compare(
        tmp_path, trl.SFTTrainer, lambda: AutoModelForCausalLM.from_pretrained(saved, dtype="float32"), ds=ds,
        args_cls=trl.SFTConfig, data=rows("sft"), bf16=False, atol=1e-5,
        trainer={"processing_class": tokenizer(), "peft_config": peft.LoraConfig(r=2, target_modules=["q_proj"])},
        **SAVED,
    )  # fmt: skip
    a, b = (load_file(Path(one.trainer.args.output_dir) / "checkpoint-4" / ADAPTER) for one in (ours, plain))
    assert a.keys() == b.keys() and len(b) == 6 and all(torch.allclose(a[n], b[n], atol=1e-5) for n in b)
    assert set(ours.trainer.engine.coverage()) == {n for n, p in plain.trainer.model.named_parameters() if "lora_" in n}
