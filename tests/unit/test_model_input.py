"""Model folders: everything that can be wrong with one is said before a weight is read."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

import model_zoo
from hift_ds.errors import CheckpointError, ConfigError, DataError, HiFTError
from hift_ds.hf import model_folder
from hift_ds.hf.model_folder import check_model_folder, max_sequence_length, resolve_model
from hift_ds.train.preflight import check_run
from hift_ds.train.run_config import load_run_config
from tests.helpers.tiny_tokenizers import byte_level

CONFIG = {"model_type": "llama", "max_position_embeddings": 64, "vocab_size": 300}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model_zoo.tiny.build("llama", vocab_size=300).to(torch.bfloat16).save_pretrained(folder, max_shard_size="20KB")
    byte_level().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path, whole) -> Path:
    shutil.copytree(whole, tmp_path / "model")
    return tmp_path / "model"


def test_a_whole_folder(folder):
    found = check_model_folder(folder)
    model = model_zoo.tiny.build("llama", vocab_size=300)
    assert found.dtype == "bf16" and found.numel == sum(p.numel() for p in model.parameters())
    assert found.weight_bytes == 2 * found.numel and len(list(found.path.glob("*.safetensors"))) > 1
    assert (found.max_length, found.vocab_size) == (64, 300)


def spoil(folder: Path, how: str) -> None:
    shards = sorted(folder.glob("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    if how == "truncated":
        shards[1].write_bytes(shards[1].read_bytes()[:-10])
    elif how == "missing shard":
        shards[0].unlink()
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "bad config":
        (folder / "config.json").write_text("{")
    elif how == "encoder-decoder":
        (folder / "config.json").write_text(json.dumps({"model_type": "t5"}))
    elif how == "no type":
        (folder / "config.json").write_text("{}")
    elif how == "remote code":
        (folder / "config.json").write_text(
            json.dumps({"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "m.M"}})
        )
    elif how == "adapter beside a model":
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "another"}))
    elif how == "quantized":
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    else:
        for file in folder.glob("*.safetensors*"):
            file.unlink()
        if how == "pickled":
            torch.save({}, folder / "pytorch_model.bin")
        elif how == "gguf":
            (folder / "model.gguf").touch()
            (folder / "config.json").unlink()
        elif how == "adapter":
            (folder / "adapter_config.json").touch()
            (folder / "config.json").unlink()
        elif how == "integers":
            save_file({"a": torch.zeros(5, dtype=torch.int8)}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("truncated", CheckpointError, "model-00002-of-.*truncated"),
        ("missing shard", CheckpointError, "model-00001-of-.* is missing"),
        ("pickled", CheckpointError, "pickled.*pytorch_model.bin.*save_pretrained"),
        ("no weights", CheckpointError, "no model.safetensors"),
        ("integers", CheckpointError, "most weights are stored as int8, expected float32, bfloat16, float16"),
        ("quantized", CheckpointError, "gptq weights, which cannot be trained"),
        ("no config", ConfigError, "model.path: no config.json"),
        ("bad config", ConfigError, "config.json: not valid JSON"),
        ("encoder-decoder", ConfigError, "model_type 't5' .* is no causal language model"),
        ("no type", ConfigError, "model_type None"),
        ("remote code", ConfigError, "brings its own Python code; set model.trust_remote_code: true"),
        ("gguf", ConfigError, "'model.gguf' is a GGUF file; .*gguf_file='model.gguf'"),
        ("adapter", ConfigError, "is a LoRA adapter; merge it"),
        ("adapter beside a model", ConfigError, "holds an adapter beside the model .adapter_config.json."),
    ],
)
def test_folders_that_cannot_be_trained(folder, how, error, message):
    spoil(folder, how)
    with pytest.raises(error, match=message) as caught:
        check_model_folder(folder)
    assert "\n" not in str(caught.value)


def test_a_gguf_file_itself(tmp_path):
    (tmp_path / "m.gguf").touch()
    with pytest.raises(ConfigError, match="GGUF"):
        check_model_folder(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"max_position_embeddings": 2048}, 2048),
        ({"n_positions": 1024}, 1024),
        ({"text_config": {"max_position_embeddings": 99}}, 99),
        ({"model_type": "bloom"}, None),
        # stretched already (Llama 3.2), and only when used (Qwen2.5's recipe for long texts)
        (
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {"original_max_position_embeddings": 8192, "factor": 32.0},
            },
            131072,
        ),
        (
            {
                "max_position_embeddings": 32768,
                "rope_scaling": {"original_max_position_embeddings": 32768, "factor": 4.0},
            },
            131072,
        ),
    ],
)
def test_the_longest_sequence_of_a_config(config, expected):
    assert max_sequence_length(config) == expected


def test_only_a_name_that_reads_like_one_reaches_the_hub(tmp_path, monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.append(name)
        assert "*.bin" not in allow_patterns and "*.py" not in allow_patterns
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for path in ("model", "runs/model", "./owner/name", "a/b/c", "/owner/name", "~/nowhere-at-all"):
        with pytest.raises(ConfigError, match="no such folder"):
            resolve_model(path)
    assert asked == []
    for path in ("owner/name", "hub:owner/name", "hub:gpt2"):
        with pytest.raises(ConfigError, match="the Hugging Face Hub does not give it: offline"):
            resolve_model(path)
    assert asked == ["owner/name", "owner/name", "gpt2"]


@pytest.fixture
def run_file(tmp_path, folder) -> Path:
    (tmp_path / "a.jsonl").write_text('{"text": "hello"}\n')
    content = {
        "model": {"path": str(folder)},
        "data": {"train": str(tmp_path / "a.jsonl")},
        "train": {"output_dir": str(tmp_path / "out")},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "run.yaml"


def test_a_checked_run(run_file, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a local run reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    checked = check_run(load_run_config(run_file, ["train.global_batch_size=6"]), world_size=3)
    assert (checked.dtype, checked.export_dtype, checked.max_length) == ("bf16", "bf16", 64)
    assert checked.batch.gradient_accumulation_steps == 2 and not checked.has_eval
    assert checked.arguments["bf16"] and checked.arguments["deepspeed"]["bf16"] == {"enabled": True}
    assert not (run_file.parent / "out").exists()  # checking makes nothing


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("model.path=nowhere", ConfigError, "model.path: no such folder: 'nowhere'"),
        ("model.tokenizer=nowhere", ConfigError, "model.tokenizer: no such folder: 'nowhere'"),
        ("data.train=nowhere.jsonl", DataError, "data.train: no such file or folder: 'nowhere.jsonl'"),
        ("data.eval=nowhere.jsonl", DataError, "data.eval: no such file"),
        ("data.max_length=65", ConfigError, "65 is longer than the 64 positions"),
        ("train.global_batch_size=3", ConfigError, "3 is not a multiple of micro_batch_size 1 x 2 ranks"),
        ("train.optimizer=AdamX", ConfigError, "^train.optimizer .*unknown optimizer 'AdamX'"),
        ("train.optimizer=adamw_torch", ConfigError, "unknown optimizer 'adamw_torch'; did you mean 'AdamW'"),
        (
            "train.optimizer_args={bta: 1}",
            ConfigError,
            "^\"train.optimizer_args\".*unknown key 'bta'; did you mean 'betas'",
        ),
        ("train.resume=nowhere", ConfigError, "train.resume: expected auto, never or a checkpoint's folder"),
        ("hift.order=sideways", ConfigError, "hift.order"),
        (
            "train.output_dir={here}/a.jsonl/out",
            ConfigError,
            "train.output_dir: .*a.jsonl' is a file, expected a folder",
        ),
    ],
)
def test_what_is_wrong_is_said_before_a_weight_is_read(run_file, override, error, message, monkeypatch):
    monkeypatch.setattr("safetensors.torch.load_file", None)
    with pytest.raises(error, match=message) as caught:
        check_run(load_run_config(run_file, [override.replace("{here}", str(run_file.parent))]), world_size=2)
    assert isinstance(caught.value, HiFTError) and "\n" not in str(caught.value)


def test_the_model_is_not_exported_over_itself(run_file, folder):
    with pytest.raises(ConfigError, match="export.dir: .* is model.path, which would be written over"):
        check_run(load_run_config(run_file, [f"export.dir={folder}/../{folder.name}"]), world_size=1)


def test_a_folder_without_permission(run_file, monkeypatch):
    # Root, who may run the tests, is never refused.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match="train.output_dir: no permission to write"):
        check_run(load_run_config(run_file), world_size=1)


CAUSAL = "expected a causal language model"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, f"is a BertForMaskedLM; {CAUSAL}"),
        ({"model_type": "roberta"}, rf"is an encoder \(roberta without is_decoder: true\).*; {CAUSAL}"),
        ({"model_type": "xmod", "architectures": ["XmodForCausalLM"]}, "is an encoder"),
        ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}, CAUSAL),
        ({"model_type": "gpt2", "architectures": ["GPT2ForTokenClassification"]}, CAUSAL),
        ({"model_type": "qwen2", "architectures": ["Qwen2Model"]}, "is a Qwen2Model"),
        ({"model_type": "qwen2", "architectures": ["Qwen2ForRewardModel"]}, "is a Qwen2ForRewardModel"),
        ({"model_type": "bart", "architectures": ["BartForConditionalGeneration"], "is_encoder_decoder": True}, CAUSAL),
        ({"model_type": "bart", "architectures": ["BartForCausalLM"], "is_decoder": True}, "is of type bart"),
        ({"model_type": "xlnet", "architectures": ["XLNetLMHeadModel"]}, "is of type xlnet"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "is no causal language model"),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, None),
        ({"model_type": "llama", "architectures": ["LLaMAForCausalLM"]}, None),  # as LLaMA was first converted
        ({"model_type": "llama"}, None),
        ({"model_type": "bert", "architectures": ["BertLMHeadModel"], "is_decoder": True}, None),
        ({"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": {}}, None),
        ({"model_type": "llama4", "architectures": ["Llama4ForConditionalGeneration"], "text_config": {}}, None),
    ],
)  # fmt: skip
def test_only_models_that_predict_the_next_token_pass(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected = ConfigError if message else CheckpointError  # there are no weights
    with pytest.raises(expected, match=message or "no model.safetensors") as caught:
        check_model_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_lists_of_models_that_do_not_are_those_of_transformers():
    """By what transformers' source does, so that a new kind cannot be forgotten."""
    import inspect

    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    unshifted, on_request, behind_padding = set(), set(), set()
    for model_type, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        cls = getattr(transformers, name)
        module = inspect.getsource(inspect.getmodule(cls))
        if "loss_function" not in inspect.getsource(cls.forward):
            unshifted.add(model_type)
        if "as a standalone" in module or "make sure that `is_decoder=True`" in module:
            on_request.add(model_type)
        if "def create_position_ids_from_input_ids" in module:
            behind_padding.add(model_type)
    assert unshifted == model_folder._LABELS_NOT_SHIFTED
    assert on_request == model_folder._DECODERS_ON_REQUEST
    assert behind_padding - {"trocr"} == model_folder._POSITIONS_BEHIND_PADDING


@pytest.mark.parametrize("model_type", ["roberta", "xlm-roberta", "camembert", "data2vec-text", "bert"])
def test_the_longest_sequence_is_the_longest_that_runs(model_type):
    """RoBERTa and its kin count positions from pad_token_id + 1."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = CONFIG_MAPPING[model_type](
        **sizes, vocab_size=50, is_decoder=True, max_position_embeddings=20, pad_token_id=3
    )
    model = AutoModelForCausalLM.from_config(config)
    limit = max_sequence_length(json.loads(config.to_json_string()))
    assert limit == (20 if model_type == "bert" else 16)
    ids = torch.full((1, limit + 1), 9)
    model(ids[:, :limit])
    with pytest.raises((IndexError, RuntimeError)):
        model(ids)


def test_the_cache_is_off_in_every_part_of_every_config_and_comes_back():
    """Of the causal types some keep use_cache in the text part only, two in several parts, three nowhere."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from hift_ds.hf.model_structure import configs_with_cache, turn_cache_off

    without = 0
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            config = CONFIG_MAPPING[model_type]()
        except Exception:  # one has no defaults
            continue
        if hasattr(config, "use_cache") and not getattr(config, "sub_configs", None):
            continue
        before, without = config.to_dict(), without + (not hasattr(config, "use_cache"))
        restore = turn_cache_off(config)
        assert not any(part.use_cache for part in configs_with_cache(config)), model_type
        config.use_cache = False  # as transformers' Trainer does
        restore()
        assert config.to_dict() == before, model_type
    assert without >= 10
