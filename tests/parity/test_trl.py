"""The mixin over TRL's trainers with one group of all weights against the plain ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import model_zoo
from hift_ds.ranks import free_port, launch_variables
from tests.helpers.parity import ONE_GROUP, compare

trl = pytest.importorskip("trl")


def tokenizer() -> Any:
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 67)}}
    backend = Tokenizer(WordLevel(vocab, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def words(seed: int, length: int) -> str:
    return " ".join(f"w{3 + (seed * 7 + 5 * i) % 64}" for i in range(length))


def rows(kind: str) -> Any:
    from datasets import Dataset

    prompts = [words(i, 2 + i % 3) for i in range(12)]
    good, bad = [words(i + 20, 2 + i % 4) for i in range(12)], [words(i + 50, 1 + i % 5) for i in range(12)]
    columns = {
        "sft": {"prompt": prompts, "completion": good},
        "dpo": {"prompt": prompts, "chosen": good, "rejected": bad},
        "kto": {"prompt": prompts, "completion": good, "label": [i % 3 != 0 for i in range(12)]},
        "reward": {"chosen": good, "rejected": bad},
        **dict.fromkeys(("grpo", "rloo", "online_dpo"), {"prompt": prompts}),
    }
    return Dataset.from_dict(columns[kind])


def folder_of(kind: str, folder: Path) -> str:
    """Reference models are loaded by name."""
    built = model_zoo.tiny.build("llama", "sequence_classification" if kind == "reward" else "causal_lm", **(
        {"num_labels": 1} if kind == "reward" else {}))  # fmt: skip
    built.config.pad_token_id = 0
    if kind in ("grpo", "rloo", "online_dpo"):
        built.generation_config.pad_token_id = 0
    built.save_pretrained(folder)
    return str(folder)


def length_reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [float(len(set(ids)) % 5) for ids in completion_ids]


TRAINERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "sft": ("SFT", {"gradient_accumulation_steps": 2, "packing": False}, {}),
    "dpo": ("DPO", {"beta": 0.3, "max_grad_norm": 0.5}, {}),
    "kto": ("KTO", {"per_device_train_batch_size": 3}, {}),
    "reward": ("Reward", {"gradient_accumulation_steps": 2}, {}),
    "grpo": (
        "GRPO",
        {"num_generations": 2, "max_completion_length": 4, "beta": 0.1, "max_steps": 3, "optim": "sgd"},
        {"reward_funcs": length_reward},
    ),
    "rloo": (
        "RLOO",
        {"num_generations": 2, "max_completion_length": 4, "beta": 0.1, "max_steps": 3, "optim": "sgd"},
        {"reward_funcs": length_reward},
    ),
}


PARTITIONED = {**ONE_GROUP, "zero_optimization": {"stage": 3}}


@pytest.mark.parametrize(
    ("kind", "ds"),
    [*((kind, None) for kind in TRAINERS), ("sft", PARTITIONED), ("grpo", PARTITIONED),
     pytest.param("dpo", PARTITIONED, marks=pytest.mark.slow),
     pytest.param("kto", PARTITIONED, marks=pytest.mark.slow)],
)  # fmt: skip
def test_trainer(tmp_path, monkeypatch, kind, ds):
    """With partitioned weights too: TRL's chunked loss asks saved weights whether they are whole, and its generation
    takes DeepSpeed's hooks off and puts them on again."""
    name, options, given = TRAINERS[kind]
    for variable, value in launch_variables(rank=0, world_size=1, port=free_port()).items() if ds else ():
        monkeypatch.setenv(variable, value)  # deepspeed.zero.Init and DeepSpeed's own engine insist on them
    monkeypatch.setattr(nn.functional, "linear", nn.functional.linear)  # which the former rebinds for good
    saved = folder_of(kind, tmp_path / "model")
    auto = AutoModelForSequenceClassification if kind == "reward" else AutoModelForCausalLM
    compare(
        tmp_path,
        getattr(trl, f"{name}Trainer"),
        lambda: auto.from_pretrained(saved, dtype="float32"),
        ds=ds,
        args_cls=getattr(trl, f"{name}Config"),
        data=rows(kind),
        trainer={"processing_class": tokenizer(), **given},
        bf16=False,
        atol=1e-5 if ds else 2e-6,  # gathered weights are multiplied in another order: 2.6e-6 on a processor with AVX2
        **options,
    )
