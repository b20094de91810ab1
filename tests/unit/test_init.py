"""``hift-ds init``: a commented run file that fits a card, and that every command takes as it is."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import model_zoo
from hift_ds.cli.estimate_input import add_input_arguments, setting_from
from hift_ds.cli.main import main
from hift_ds.forecast.fit import NAMES, gib
from hift_ds.forecast.simulator import one_simulator
from hift_ds.hf.safetensors_folder import tensor_dtypes
from hift_ds.train.finetune import finetune
from hift_ds.train.run_config import TrainConfig, load_run_config
from hift_ds.train.settings import resolve
from tests.helpers.tiny_tokenizers import byte_level
from tests.unit.test_launch import inputs, own_cache  # noqa: F401  (fixtures)


def test_what_it_writes_is_previewed_and_trained_as_it_is(inputs, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    assert (
        main(["init", str(inputs / "model"), "--card", "24", "--data", str(inputs / "data.jsonl"), "-o", "my.yaml"])
        == 0
    )
    said = capsys.readouterr().out
    assert "fit: a card of 24 GiB" in said and "written: my.yaml" in said and "hift-ds train my.yaml" in said
    run = load_run_config("my.yaml")
    assert run.fit == 24 and run.data.max_length == 256 and run.model.dtype == "bf16"  # the model's limit
    assert (run.train.micro_batch_size, resolve(run, 1).batch.gradient_accumulation_steps) == (16, 1)
    assert main(["preview", "my.yaml"]) == 0
    assert "learned" in capsys.readouterr().out
    finetune(load_run_config("my.yaml", ["train.max_steps=2", "data.max_length=128"]))
    assert tensor_dtypes(Path("runs/model/model")) and json.loads(Path("runs/model/fit.json").read_text())["fit"] == 24
    capsys.readouterr()
    assert main(["init", str(inputs / "model"), "--card", "24", "-o", "my.yaml"]) == 2
    assert "'my.yaml' exists" in capsys.readouterr().err


@pytest.fixture
def one_process():
    """Not one a command, which takes seconds each time."""
    with one_simulator():
        yield


def test_estimate_and_train_say_what_it_has_forecast(one_process, inputs, tmp_path, capsys, monkeypatch):  # noqa: F811
    """One setting for all three, with no switch that only one of them turns on; and a key that is given wins."""
    monkeypatch.chdir(tmp_path)
    config = model_zoo.config("llama2_7b", hidden_size=64, intermediate_size=176, num_hidden_layers=2,
                              num_attention_heads=2, num_key_value_heads=2, vocab_size=32_000,
                              max_position_embeddings=512)  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained("model")
    byte_level().save_pretrained("model")
    assert main(["init", "model", "--card", "1.2", "--data", str(inputs / "data.jsonl"), "-o", "my.yaml"]) == 0
    first, why = capsys.readouterr().out.splitlines()[:2]
    said = r"fit: a card of 1.2 GiB, 0.\d usable: micro-batch (\d+) x \d+ accumulation steps?, (.+); peak forecast (.+)"
    found = re.fullmatch(said, first)
    assert found and why.startswith("fit: probably faster, but too large")

    assert main(["estimate", "my.yaml", "hift.group_size=1", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["batch"] == int(found[1]) and gib(figures["peak_gib"] * 2**30) == found[3]
    assert 0.1 < figures["peak_gib"] < 0.6
    for name, words in NAMES.items():
        assert name not in figures["switches"] or figures["switches"][name] == (words in found[2]), name
    parser = argparse.ArgumentParser()
    add_input_arguments(parser)
    setting = setting_from(parser.parse_args(["my.yaml", "hift.group_size=1", "train.micro_batch_size=1"]))
    assert setting.batch == 1, "what is given wins"

    finetune(load_run_config("my.yaml", ["hift.group_size=1", "train.max_steps=1", "export.dir=out"]))
    block = json.loads(Path("runs/model/deepspeed.json").read_text())
    assert block["train_micro_batch_size_per_gpu"] == figures["batch"]
    for name, value in figures["switches"].items():
        section = "state" if name == "slice_numel" else "activations"
        assert bool(block["hift"].get(section, {}).get(name)) == value, name


def test_a_preset_needs_no_network_and_each_line_has_its_comment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["init", "smollm2_135m", "--card", "48"]) == 0
    file = Path("smollm2_135m_instruct.yaml")
    run = load_run_config(file)
    assert run.model.path == "HuggingFaceTB/SmolLM2-135M-Instruct" and run.data.train == "bundled:hift_questions"
    assert (
        run.train.micro_batch_size == 8 and run.train.learning_rate == TrainConfig.model_fields["learning_rate"].default
    )
    text = file.read_text()
    for key in ("group_size", "packing", "template", "report_to", "eval_steps", "optimizer"):
        assert f"# {key}: " in text, key
    bare = [line for line in text.splitlines() if ":" in line and "#" not in line and not line.endswith(":")]
    assert all(
        line.strip().startswith(("path", "train", "output_dir", "lr_scheduler", "warmup_ratio")) for line in bare
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["smollm2_135m"], "there is no accelerator here; --card says"),
        (["gpt2", "--card", "8"], "'gpt2' is a size without weights; give a folder, a hub name, or one of"),
        (["nowhere", "--card", "8"], "nowhere: no such folder"),
        (["smollm2_135m", "--card", "8", "-o", "no/such/folder.yaml"], "cannot write 'no/such/folder.yaml'"),
    ],
)
def test_mistakes_are_one_line(argv, message, capsys, tmp_path, monkeypatch):
    from hift_ds.train import fit

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fit.forecast, "find_fit", lambda question: pytest.fail("counted"))
    monkeypatch.setattr(fit, "SURE", 1e9)
    assert main(["init", *argv]) == 2
    err = capsys.readouterr().err.strip()
    assert message in err and "\n" not in err
