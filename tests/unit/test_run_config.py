"""The run file: what it accepts, and the one line that it answers everything else with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from hift_ds.errors import ConfigError
from hift_ds.train.run_config import RunConfig, load_run_config
from hift_ds.train.settings import (
    deepspeed_config,
    resolve,
    resolve_dtype,
    resolve_max_length,
    training_arguments,
)

MINIMAL = {"model": {"path": "m"}, "data": {"train": "a.jsonl"}, "train": {"output_dir": "out"}}


@pytest.fixture
def load(tmp_path):
    def load(*overrides: str, text: str | None = None) -> RunConfig:
        file = tmp_path / "run.yaml"
        file.write_text(text if text is not None else yaml.safe_dump(MINIMAL))
        return load_run_config(file, overrides)

    return load


def arguments(run: RunConfig, world_size: int = 1, dtype: Any = "fp32", has_eval: bool = False) -> dict[str, Any]:
    return training_arguments(resolve(run, world_size), dtype, has_eval=has_eval)


def test_defaults_and_overrides(load):
    run = load("train.learning_rate=1e-4", "data.train=[a.jsonl, b.jsonl]", "hift.group_size=2", "model.dtype=bf16")
    assert run.train.learning_rate == 1e-4 and run.data.train == ["a.jsonl", "b.jsonl"]
    assert resolve(run, 1).hift.group_size == 2 and resolve(run, 1).hift.order == "bottom2up"
    assert run.export_dir == Path("out/model")
    assert run.is_given("train.learning_rate") and not run.is_given("train.epochs")
    assert run.overrides[0] == "train.learning_rate=1e-4" and run.file.name == "run.yaml"


def test_numbers_like_1e_5_are_numbers_everywhere(load):
    run = load(
        text=yaml.safe_dump(MINIMAL) + "deepspeed: {optimizer: {type: SGD, params: {lr: 1e-3, momentum: 9E-1}}}\n"
    )
    assert run.deepspeed["optimizer"]["params"] == {"lr": 1e-3, "momentum": 0.9}
    assert load("train.optimizer_args={eps: 1e-6}").train.optimizer_args == {"eps": 1e-6}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.learning_rte=1", "train: unknown key 'learning_rte'; did you mean 'learning_rate'"),
        ("modle.path=x", "unknown key 'modle'; did you mean 'model'"),
        ("learning_rate=1", "unknown key 'learning_rate'; did you mean 'train.learning_rate'"),
        ("train.max_length=1", "unknown key 'train.max_length'; did you mean 'data.max_length'"),
        ("train.per_device_train_batch_size=1", "did you mean 'train.micro_batch_size'"),
        ("model.model_name_or_path=x", "did you mean 'model.path'"),
        ("data.cutoff_len=1", "did you mean 'data.max_length'"),
        ("train.xyzzy=1", "train: unknown key 'xyzzy'; known keys: "),
        ("train.learning_rate=fast", "train.learning_rate: expected a number, got 'fast'"),
        ("train.max_steps=true", "train.max_steps: expected a whole number, got True"),
        ("train.max_steps=1.5", "train.max_steps: expected a whole number, got 1.5"),
        ("train.epochs=0", "train.epochs: expected a number > 0, got 0"),
        ("train.micro_batch_size=0", "train.micro_batch_size: expected a number >= 1, got 0"),
        ("model.dtype=bfloat", "model.dtype: expected one of auto, fp32, bf16, fp16, got 'bfloat'"),
        ("model.path=", "model.path: expected text, got None"),
        ("train=5", "train: expected keys with values, got 5"),
        ("data.columns.prompt=1", "data.columns: expected text, got 1"),
        ("data.format=alpacca", "data.format: expected one of messages, sharegpt"),
        ("data.train=[]", "data.train: expected at least one file"),
        ("data.train.paht=x", "data.train is 'a.jsonl', which has no keys"),
        ("data.val_size=1.5", "expected a share below 1 or a whole number, got 1.5"),
        ("train.lr_scheduler=cosin", "train.lr_scheduler: expected one of linear, cosine, .*got 'cosin'"),
        ("export.max_shard_size=5XB", "export.max_shard_size: '5XB' is not a size"),
        ("train.load_best_model_at_end=true", "load_best_model_at_end: true needs eval_steps"),
        ("hift=3", "hift: expected keys of the hift block or false, got 3"),
        ("deepspeed=3", "deepspeed: expected the path of a DeepSpeed JSON or its contents, got 3"),
        ("train", "expected section.key=value"),
        ("train..x=1", "expected section.key=value"),
        ("train.epochs=[1", "the value is not valid YAML"),
    ],
)
def test_wrong_settings_are_one_line(load, override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load(override)
    text = str(caught.value)
    assert "\n" not in text
    section = override.partition("=")[0]
    assert repr(override) in text or section.startswith("data.") or "load_best" in text or "modle" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {path: m}\ndata: {train: a}\n", "run.yaml: train: this key is required"),
        (
            "model: {path: m}\ndata: {train: a}\ntrain: {}\n",
            "run.yaml: train.output_dir: this key is required",
        ),
        ("model: [\n", "run.yaml, line 2: not valid YAML"),
        ("just text", "run.yaml: expected sections model, data, train, got 'just text'"),
        ("", "run.yaml: expected sections model, data, train, got an empty file"),
        (
            "model: {path: m}\nmodel: {path: n}\n",
            "run.yaml, line 2: not valid YAML: key 'model' is given twice",
        ),
    ],
)
def test_wrong_files_are_one_line(load, text, message):
    with pytest.raises(ConfigError, match=message):
        load(text=text)


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="no such run file: .*nowhere.yaml"):
        load_run_config(tmp_path / "nowhere.yaml")


def test_a_folder_or_a_file_in_another_encoding_is_no_run_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2_135m").mkdir()  # of the same name as a run file of the package
    assert load_run_config("smollm2_135m").train.output_dir == "runs/smollm2_135m"
    (tmp_path / "runs").mkdir()
    with pytest.raises(ConfigError, match="^'runs' is a folder, expected a run file$"):
        load_run_config("runs")
    (tmp_path / "runs" / "run.yaml").write_text("")
    with pytest.raises(ConfigError, match="expected a run file; that of the run is 'runs/run.yaml'"):
        load_run_config("runs")
    (tmp_path / "notepad.yaml").write_text("model: {path: m}", encoding="utf-16")
    with pytest.raises(ConfigError, match="not text in UTF-8; save it as that"):
        load_run_config("notepad.yaml")


@pytest.mark.parametrize(
    ("overrides", "world_size", "expected"),
    [
        ([], 3, (1, 1, 3)),
        (["train.micro_batch_size=2", "train.gradient_accumulation_steps=4"], 2, (2, 4, 16)),
        (["train.global_batch_size=12", "train.micro_batch_size=2"], 3, (2, 2, 12)),
        (["train.global_batch_size=12", "train.gradient_accumulation_steps=4"], 3, (1, 4, 12)),
        (["train.global_batch_size=12"], 2, (1, 6, 12)),
        (["deepspeed={train_batch_size: 12, train_micro_batch_size_per_gpu: 3}"], 2, (3, 2, 12)),
        (["deepspeed={train_micro_batch_size_per_gpu: auto}", "train.micro_batch_size=5"], 1, (5, 1, 5)),
    ],
)
def test_batch_sizes_multiply_out(load, overrides, world_size, expected):
    batch = resolve(load(*overrides), world_size).batch
    assert (batch.micro_batch_size, batch.gradient_accumulation_steps, batch.global_batch_size) == expected
    ds = deepspeed_config(resolve(load(*overrides), world_size), "fp32")
    keys = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
    assert tuple(ds[key] for key in keys) == expected


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["train.global_batch_size=7"],
            "7 is not a multiple of micro_batch_size 1 x 2 ranks; the nearest are 6 and 8",
        ),
        (
            ["train.global_batch_size=1"],
            "1 is not a multiple of micro_batch_size 1 x 2 ranks; the nearest is 2",
        ),
        (
            ["train.global_batch_size=8", "train.gradient_accumulation_steps=3"],
            "8 is not a multiple of gradient_accumulation_steps 3 x 2 ranks; the nearest are 6 and 12",
        ),
        (
            ["train.global_batch_size=8", "train.micro_batch_size=2", "train.gradient_accumulation_steps=4"],
            "8 is not micro_batch_size 2 x gradient_accumulation_steps 4 x 2 ranks = 16",
        ),
        (
            ["train.micro_batch_size=2", "deepspeed={train_micro_batch_size_per_gpu: 4}"],
            'train.micro_batch_size: 2, but "train_micro_batch_size_per_gpu" is 4 in the DeepSpeed config',
        ),
    ],
)
def test_batch_sizes_that_do_not(load, overrides, message):
    with pytest.raises(ConfigError, match=message):
        resolve(load(*overrides), 2)


@pytest.mark.parametrize(
    ("overrides", "stored", "expected"),
    [
        ([], "fp16", "fp16"),
        (["model.dtype=bf16"], "fp32", "bf16"),
        (["deepspeed={bf16: {enabled: true}}"], "fp32", "bf16"),
        (["deepspeed={bf16: {enabled: auto}}"], "fp32", "fp32"),
        (["deepspeed={torch_autocast: {enabled: true}}"], "bf16", "fp32"),
    ],
)
def test_the_dtype_of_training(load, overrides, stored, expected):
    run = load(*overrides)
    assert resolve_dtype(resolve(run, 1), stored) == expected
    ds = deepspeed_config(resolve(run, 1), expected)
    for name in ("bf16", "fp16"):
        assert ds.get(name, {}).get("enabled", False) is (expected == name)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.dtype=fp32", "deepspeed={bf16: {enabled: true}}"],
        ["model.dtype=bf16", "deepspeed={torch_autocast: {enabled: true}}"],
        ["model.dtype=fp16", "deepspeed={fp16: {enabled: false}}"],
    ],
)
def test_dtypes_that_contradict(load, overrides):
    with pytest.raises(ConfigError, match="model.dtype: .*in the DeepSpeed config.*change one"):
        resolve_dtype(resolve(load(*overrides), 1), "fp32")


def test_the_longest_sample(load):
    assert resolve_max_length(load(), None) == 2048
    assert resolve_max_length(load(), 512) == 512
    assert resolve_max_length(load("data.max_length=4096"), 8192) == 4096
    with pytest.raises(
        ConfigError, match="data.max_length: 4096 is longer than the 2048 positions that the model in 'm'"
    ):
        resolve_max_length(load("data.max_length=4096"), 2048)


def test_the_run_file_goes_over_the_json_and_the_json_over_defaults(load, tmp_path, monkeypatch):
    ds = {
        "gradient_clipping": 0.5,
        "optimizer": {
            "type": "SGD",
            "params": {"lr": 0.1, "momentum": 0.9, "weight_decay": "auto", "nesterov": "auto"},
        },
        "hift": {"order": "random", "state": {"residency": "device", "pin_memory": False}},
        "wall_clock_breakdown": True,
    }
    (tmp_path / "ds.json").write_text(json.dumps(ds))
    monkeypatch.chdir("/")  # so that it is found beside the run file only
    run = load("deepspeed=ds.json", "hift.reshuffle=true", "hift.state.pin_memory=true", "train.weight_decay=0.3")
    merged = deepspeed_config(resolve(run, 1), "fp32")
    assert merged["optimizer"] == {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.3}}
    assert merged["gradient_clipping"] == 0.5 and merged["wall_clock_breakdown"] is True
    assert merged["hift"]["order"] == "random" and merged["hift"]["reshuffle"] is True
    assert merged["hift"]["state"]["residency"] == "device" and merged["hift"]["state"]["pin_memory"] is True
    kwargs = arguments(run)
    assert (kwargs["learning_rate"], kwargs["weight_decay"], kwargs["max_grad_norm"]) == (0.1, 0.3, 0.5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["deepspeed=nowhere.json"], "deepspeed: no such file: 'nowhere.json'"),
        (
            ["train.optimizer=SGD", "deepspeed={optimizer: {type: AdamW}}"],
            'train.optimizer: the DeepSpeed config has an "optimizer"',
        ),
        (
            ["train.learning_rate=0.5", "deepspeed={optimizer: {type: SGD, params: {lr: 0.1}}}"],
            '"optimizer.params.lr" is 0.1',
        ),
        (
            ["train.lr_scheduler=linear", "deepspeed={scheduler: {type: WarmupLR}}"],
            "train.lr_scheduler: .*remove one",
        ),
        (
            ["train.max_grad_norm=1.0", "deepspeed={gradient_clipping: 2.0}"],
            'train.max_grad_norm: 1.0, but "gradient_clipping" is 2.0',
        ),
        (["hift.group_sze=2"], "\"hift\": unknown key 'group_sze'; did you mean 'group_size'"),
        (["hift.reshuffle=true"], "reshuffle: true needs order: random"),
        (
            ["deepspeed={zero_optimization: {stage: 1, offload_optimizer: {device: cpu}}}"],
            "offload_optimizer",
        ),
    ],
)
def test_settings_that_contradict_each_other(load, overrides, message):
    with pytest.raises(ConfigError, match=message):
        deepspeed_config(resolve(load(*overrides), 1), "fp32")


def test_a_json_that_is_none(load, tmp_path):
    (tmp_path / "ds.json").write_text("{]")
    with pytest.raises(ConfigError, match="ds.json: not valid JSON"):
        deepspeed_config(resolve(load(f"deepspeed={tmp_path / 'ds.json'}"), 1), "fp32")


def test_a_deepspeed_json_may_have_what_deepspeed_reads(load, tmp_path):
    """Comments, a comma too many, and the byte-order mark that some editors put in front."""
    from hift_ds.engine.deepspeed_seam import config_dict

    file = tmp_path / "ds[1].json"
    text = '{ // published so\n "gradient_clipping": 0.5, # here too\n "hift": {"group_size": 2,},\n}'
    for encoding in ("utf-8", "utf-8-sig"):
        file.write_text(text, encoding=encoding)
        for config in (
            deepspeed_config(resolve(load(f"deepspeed='{file}'"), 1), "fp32"),
            config_dict(file, None, None),
            config_dict(str(file), None, None),
        ):
            assert (config["gradient_clipping"], config["hift"]["group_size"]) == (0.5, 2)
    file.write_text('{"gradient_clipping": 0.5, "gradient_clipping": 1.0}')
    with pytest.raises(ConfigError, match="key 'gradient_clipping' is given twice"):
        config_dict(file, None, None)


def test_merge_keys_of_yaml(tmp_path):
    """<<: *anchor, as YAML 1.1 has it: own keys win, a key given twice is still an error."""
    from hift_ds.train.run_file import read_yaml

    file = tmp_path / "run.yaml"
    file.write_text(
        "data:\n  train: [&one {path: a.jsonl, format: text}, {<<: *one, path: b.jsonl}]\n"
        "train: &base {learning_rate: 1e-5, max_steps: 3}\nother:\n  <<: [*base, {seed: 1}]\n  max_steps: 4\n"
    )
    content = read_yaml(file)
    assert content["data"]["train"][1] == {"path": "b.jsonl", "format": "text"}
    assert content["other"] == {"learning_rate": 1e-5, "max_steps": 4, "seed": 1}
    assert content["train"] == {"learning_rate": 1e-5, "max_steps": 3}
    file.write_text("a: &a {x: 1}\nb: {<<: *a, y: 1, y: 2}\n")
    with pytest.raises(ConfigError, match="key 'y' is given twice"):
        read_yaml(file)
    file.write_text("\ufeffa: {x: 1}\n", encoding="utf-8")
    assert read_yaml(file) == {"a": {"x": 1}}


def test_full_fine_tuning_has_no_hift_block(load):
    assert resolve(load("hift=false"), 1).hift is None
    assert "hift" not in deepspeed_config(resolve(load("hift=false", "deepspeed={hift: {}}"), 1), "fp32")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_training_arguments_are_accepted_and_agree_with_the_deepspeed_config(load, dtype, tmp_path, monkeypatch):
    from transformers import TrainingArguments
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "0",
    }.items():
        monkeypatch.setenv(name, value)
    run = load(
        f"train.output_dir={tmp_path / 'out'}",
        "train.optimizer_args={betas: [0.8, 0.95], eps: 1e-6}",
        "train.warmup_ratio=0.25",
        "train.eval_steps=5",
        "train.save_steps=10",
        "train.load_best_model_at_end=true",
        "train.gradient_checkpointing=true",
        "train.weight_decay=0.1",
        "train.global_batch_size=6",
        "train.lr_scheduler=cosine_with_min_lr",
        "train.lr_scheduler_args={min_lr: 1e-6}",
        "train.max_steps=40",
    )
    kwargs = arguments(run, dtype=dtype, has_eval=True)
    assert kwargs["deepspeed"]["zero_optimization"] == {"stage": 0}
    made = []
    monkeypatch.setattr(
        HfTrainerDeepSpeedConfig,
        "__init__",
        lambda self, config: made.append((self, config)) or setattr(self, "config", config),
    )
    monkeypatch.setattr(HfTrainerDeepSpeedConfig, "trainer_config_process", lambda self, args: None)
    monkeypatch.setattr("accelerate.utils.DeepSpeedPlugin", lambda **_: None)
    args = TrainingArguments(**kwargs)
    [(_, config)] = made
    monkeypatch.undo()
    checker = HfTrainerDeepSpeedConfig.__new__(HfTrainerDeepSpeedConfig)
    checker.config, checker.mismatches, checker._dtype = config, [], None
    checker.trainer_config_process(args)
    assert checker.mismatches == []
    assert args.get_warmup_steps(40) == 10 and args.eval_strategy == args.save_strategy == "steps"
    assert args.activation_checkpointing and args.activation_checkpointing_kwargs == {"use_reentrant": False}
    assert (args.adam_beta1, args.adam_epsilon, args.gradient_accumulation_steps) == (0.8, 1e-6, 6)
    assert args.report_to == [] and args.bf16 is (dtype == "bf16")


def test_evaluation_needs_data(load):
    with pytest.raises(ConfigError, match="train.eval_steps: 5 needs data.eval or data.val_size"):
        arguments(load("train.eval_steps=5"))
    assert arguments(load())["eval_strategy"] == "no"
    assert arguments(load(), has_eval=True)["eval_strategy"] == "epoch"


@pytest.mark.parametrize(
    ("given", "expected"), [("none", "none"), ("tensorboard", ["tensorboard"]), ("[a, b]", ["a", "b"])]
)
def test_loggers(load, given, expected):
    assert arguments(load(f"train.report_to={given}"))["report_to"] == expected


def test_every_key_is_documented():
    page = (Path(__file__).parents[2] / "docs" / "run_file.md").read_text()
    sections = {name: info.annotation for name, info in RunConfig.model_fields.items()}
    for section, model in sections.items():
        assert f"`{section}`" in page or f"## `{section}`" in page, section
        for key in getattr(model, "model_fields", {}):
            assert f"| `{key}` |" in page, f"{section}.{key}"


@pytest.mark.parametrize(
    ("text", "tool"),
    [
        ("model_name_or_path: a/b\nstage: sft\ncutoff_len: 9\nlearning_rate: 1e-5\n", "LLaMA-Factory or TRL"),
        ("base_model: a/b\nsequence_len: 9\n", "Axolotl"),
    ],
)
def test_a_file_of_another_program_is_recognized(tmp_path, text, tool):
    file = tmp_path / "theirs.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=f"a file of {tool}, which .* trains as it is .*data.max_length"):
        load_run_config(file)
