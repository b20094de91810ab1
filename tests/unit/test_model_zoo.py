"""The zoo's sizes against published parameter counts; its tiny models against what tests expect of them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import transformers

import model_zoo
from hift_ds.errors import ConfigError
from hift_ds.hf.model_structure import build_on_meta
from hift_ds.layers.grouping import partition_model

# All parameters and those of the largest group in millions, and the number of units: the models over which
# the HiFT paper (arXiv 2401.15207) averages, RoBERTa with a classification head.
PAPER = [
    ("roberta_base", "sequence_classification", 124.65, 39.00, 14),
    ("roberta_large", "sequence_classification", 355.36, 52.00, 26),
    ("gpt2_large", "causal_lm", 774.03, 65.64, 38),
    ("gpt_neo_2_7b", "causal_lm", 2651.31, 133.90, 34),
    ("llama2_7b", "causal_lm", 6738.42, 202.38, 34),
    ("opt_13b", "causal_lm", 12853.47, 314.64, 42),
]
# Parameter counts of the published checkpoints.
PUBLISHED = {
    "smollm2_135m": 134_515_008,
    "tinyllama_1_1b": 1_100_048_384,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3_2_1b": 1_235_814_400,
    "mistral_7b": 7_241_732_096,
    "mixtral_8x7b": 46_702_792_704,
    "qwen2.5_0.5b": 494_032_768,
    "qwen2.5_7b": 7_615_616_512,
    "qwen2.5_14b": 14_770_033_664,
    "qwen3_0.6b": 596_049_920,
    "qwen3_8b": 8_190_735_360,
    "gemma2_2b": 2_614_341_888,
    "gemma2_9b": 9_241_705_984,
    "gemma3_1b": 999_885_952,
    "phi_2": 2_779_683_840,
    "phi3_mini": 3_821_079_552,
    "opt_125m": 125_239_296,
    "opt_350m": 331_196_416,
    "gpt2": 124_439_808,
    "gpt2_xl": 1_557_611_200,
    "gpt_neox_20b": 20_554_567_680,
    "bloom_7b1": 7_069_016_064,
    "falcon_7b": 6_921_720_704,
    "t5_small": 60_506_624,
    "t5_large": 737_668_096,
}


@pytest.mark.parametrize(("size", "head", "total", "largest", "num_units"), PAPER)
def test_the_papers_models(size: str, head: str, total: float, largest: float, num_units: int) -> None:
    groups = partition_model(build_on_meta(model_zoo.config(size, head))).groups
    assert round(sum(group.numel for group in groups) / 1e6, 2) == total
    assert round(max(group.numel for group in groups) / 1e6, 2) == largest
    assert len(groups) == num_units


def test_the_papers_average_of_trainable_parameters() -> None:
    """89.18 % fewer parameters are trained at a time, on average over six models."""
    saved = []
    for size, head, *_ in PAPER:
        sizes = [group.numel for group in partition_model(build_on_meta(model_zoo.config(size, head))).groups]
        saved.append(1 - max(sizes) / sum(sizes))
    assert round(100 * sum(saved) / len(saved), 2) == 89.18


@pytest.mark.parametrize(("size", "total"), PUBLISHED.items())
def test_published_parameter_counts(size: str, total: int) -> None:
    model = build_on_meta(model_zoo.config(size))
    assert sum(parameter.numel() for parameter in model.parameters()) == total


@pytest.mark.parametrize("size", model_zoo.SIZES)
def test_every_size_has_a_group_a_block(size: str) -> None:
    model = build_on_meta(model_zoo.config(size))
    config = model.config
    num_blocks = config.num_hidden_layers + (config.num_decoder_layers if config.is_encoder_decoder else 0)
    assert len(partition_model(model).groups) == num_blocks + 2


@pytest.mark.parametrize("family", model_zoo.FAMILIES)
def test_tiny_models_are_tiny_and_repeatable(family: str) -> None:
    model = model_zoo.tiny.build(family)
    state = torch.random.get_rng_state()
    again = model_zoo.tiny.build(family)
    assert torch.equal(state, torch.random.get_rng_state())
    assert 2_000 < sum(parameter.numel() for parameter in model.parameters()) < 20_000
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    batch = model_zoo.tiny.batch(model, rows=3, tokens=9)
    losses = [made(**batch).loss for made in (model, again)]
    assert model.training and torch.equal(*losses)


def test_tiny_models_learn_from_their_batch() -> None:
    """Labels fit the head: a few steps lower the loss of each kind of head."""
    heads = {head: name for name, family in model_zoo.FAMILIES.items() for head in family.heads}
    assert set(heads) == set(model_zoo.HEADS)
    for head, family in heads.items():
        model = model_zoo.tiny.build(family, head)
        batch = model_zoo.tiny.batch(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(5):
            loss = model(**batch).loss
            losses.append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert losses[-1] < 0.97 * losses[0], (family, head, losses)


def test_tiny_models_take_overrides_dtype_and_device() -> None:
    model = model_zoo.tiny.build("llama", dtype=torch.bfloat16, num_hidden_layers=1, tie_word_embeddings=True)
    assert len(model.model.layers) == 1 and model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model_zoo.tiny.build("gpt2", device="meta").transformer.wte.weight.is_meta
    assert model_zoo.tiny.config("gpt2").attn_pdrop == 0.0
    assert model_zoo.tiny.config("gpt2", attn_pdrop=0.5).attn_pdrop == 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: model_zoo.config("llama2_8b"),
            "model zoo: unknown key 'llama2_8b'; did you mean 'llama3_8b'",
        ),
        (lambda: model_zoo.tiny.build("lama"), "unknown key 'lama'; did you mean 'llama'"),
        (lambda: model_zoo.tiny.build("llama", "causal"), "heads of llama: unknown key 'causal'"),
        (lambda: model_zoo.config("gpt2", "masked_lm"), "heads of gpt2: unknown key 'masked_lm'"),
    ],
)
def test_unknown_names_are_answered_with_the_nearest(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_reading_the_sizes_costs_no_torch() -> None:
    script = "import sys, model_zoo; assert model_zoo.SIZES; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_configs_name_their_model_class() -> None:
    assert model_zoo.config("llama2_7b").architectures == ["LlamaForCausalLM"]
    assert isinstance(build_on_meta(model_zoo.config("t5_small")), transformers.T5ForConditionalGeneration)
