"""Where embeddings, blocks and head live: against execution watched by hooks, and on models that mislead."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig

import model_zoo
from hift_ds.errors import GroupingError
from hift_ds.layers.arch import ArchSpec, check_arch, find_arch
from hift_ds.layers.grouping import partition_model
from tests.helpers.execution_order import parameters_by_first_use, watch_graph

ZOO = [(family.name, head) for family in model_zoo.FAMILIES.values() for head in family.heads]

LLAMA_LIKE = {
    "vocab_size": 67,
    "hidden_size": 16,
    "intermediate_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 4,
}
BERT_LIKE = {
    "vocab_size": 67,
    "hidden_size": 16,
    "intermediate_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
BART_LIKE = {
    "vocab_size": 67,
    "d_model": 16,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 36,
    "decoder_ffn_dim": 36,
    "max_position_embeddings": 64,
}
# Families the zoo does not declare: model_type, model class, config entries, number of blocks.
OTHERS = [
    ("stablelm", "StableLmForCausalLM", LLAMA_LIKE, 3),
    ("olmo2", "Olmo2ForCausalLM", LLAMA_LIKE, 3),
    ("cohere", "CohereForCausalLM", LLAMA_LIKE, 3),
    ("granite", "GraniteForCausalLM", LLAMA_LIKE, 3),
    ("starcoder2", "Starcoder2ForCausalLM", LLAMA_LIKE, 3),
    ("smollm3", "SmolLM3ForCausalLM", LLAMA_LIKE, 3),
    (
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        {**LLAMA_LIKE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20},
        3,
    ),
    ("gpt_oss", "GptOssForCausalLM", {**LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2}, 3),
    (
        "llama4_text",
        "Llama4ForCausalLM",
        {**LLAMA_LIKE, "num_local_experts": 2, "intermediate_size_mlp": 36, "interleave_moe_layer_step": 2},
        3,
    ),
    (
        "gptj",
        "GPTJForCausalLM",
        {"vocab_size": 67, "n_embd": 16, "n_layer": 3, "n_head": 2, "rotary_dim": 4},
        3,
    ),
    (
        "codegen",
        "CodeGenForCausalLM",
        {"vocab_size": 67, "n_embd": 16, "n_layer": 3, "n_head": 4, "rotary_dim": 4},
        3,
    ),
    ("mpt", "MptForCausalLM", {"vocab_size": 67, "d_model": 16, "n_layers": 3, "n_heads": 2}, 3),
    (
        "mamba",
        "MambaForCausalLM",
        {"vocab_size": 67, "hidden_size": 16, "num_hidden_layers": 3, "state_size": 4},
        3,
    ),
    ("rwkv", "RwkvForCausalLM", {"vocab_size": 67, "hidden_size": 16, "num_hidden_layers": 3}, 3),
    ("electra", "ElectraForMaskedLM", {**BERT_LIKE, "embedding_size": 8}, 3),
    ("albert", "AlbertForMaskedLM", {**BERT_LIKE, "embedding_size": 8}, 1),  # one block, run three times
    ("modernbert", "ModernBertForMaskedLM", {**BERT_LIKE, "pad_token_id": 0}, 3),
    ("distilbert", "DistilBertForMaskedLM", {"vocab_size": 67, "dim": 16, "n_layers": 3, "n_heads": 2}, 3),
    ("big_bird", "BigBirdForMaskedLM", {**BERT_LIKE, "attention_type": "original_full"}, 3),
    ("mpnet", "MPNetForMaskedLM", BERT_LIKE, 3),
    ("xlm", "XLMWithLMHeadModel", {"vocab_size": 67, "emb_dim": 16, "n_layers": 3, "n_heads": 2}, 3),
    (
        "xlnet",
        "XLNetLMHeadModel",
        {"vocab_size": 67, "d_model": 16, "n_layer": 3, "n_head": 2, "d_inner": 36},
        3,
    ),
    ("bart", "BartForConditionalGeneration", BART_LIKE, 5),
    ("mbart", "MBartForConditionalGeneration", BART_LIKE, 5),
    ("pegasus", "PegasusForConditionalGeneration", BART_LIKE, 5),
]


def other(model_type: str, class_name: str, entries: dict, **more: object) -> transformers.PreTrainedModel:
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(model_type, **{**special, **entries, **more})
    torch.manual_seed(0)
    return getattr(transformers, class_name)(config)


def run(model: nn.Module) -> None:
    with torch.random.fork_rng():
        model(**model_zoo.tiny.batch(model))


def assert_bottom_to_top(model: transformers.PreTrainedModel) -> None:
    """No group runs before a lower one; an encoder-decoder's second embedding runs late and is exempt."""
    groups = partition_model(model).groups
    group_of = {name: group.index for group in groups for name in group.param_names}
    used = parameters_by_first_use(model, lambda: run(model))
    first_use = [group_of[name] for name in used if name in group_of]  # Pegasus freezes its positions
    if model.config.is_encoder_decoder:
        first_use = [index for index in first_use if index > 0]
    assert first_use == sorted(first_use)
    assert set(first_use) >= set(range(1, len(groups))), "the hooks have to see every group"


def assert_no_graph_below(model: transformers.PreTrainedModel) -> None:
    """With groups below g frozen, blocks below g keep nothing for backward, and the others do."""
    arch = find_arch(model)
    groups = partition_model(model).groups
    blocks = [names[0] for names in arch.blocks]
    lowest = len(blocks) // 2 + 1
    frozen = {name for group in groups[:lowest] for name in group.param_names}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    with watch_graph(model, blocks) as has_graph:
        run(model)
    assert [has_graph[block] for block in blocks] == [unit >= lowest for unit in range(1, len(blocks) + 1)]


@pytest.mark.parametrize(("family", "head"), ZOO)
def test_groups_run_bottom_to_top(family: str, head: str) -> None:
    model = model_zoo.tiny.build(family, head)
    assert_bottom_to_top(model)
    assert_no_graph_below(model)


@pytest.mark.parametrize(("model_type", "class_name", "entries", "num_blocks"), OTHERS)
def test_families_not_declared_run_bottom_to_top(
    model_type: str, class_name: str, entries: dict, num_blocks: int
) -> None:
    model = other(model_type, class_name, entries)
    assert len(find_arch(model).blocks) == num_blocks
    assert_bottom_to_top(model)


@pytest.mark.parametrize(
    ("family", "head", "embed", "last_block", "top"),
    [
        (
            "opt_350m_style",
            "causal_lm",
            ["model.decoder.embed_tokens", "model.decoder.embed_positions", "model.decoder.project_in"],
            ["model.decoder.layers.2"],
            ["model.decoder.project_out", "lm_head"],
        ),
        (
            "opt",  # registers its final norm before its layers
            "question_answering",
            ["model.decoder.embed_tokens", "model.decoder.embed_positions"],
            ["model.decoder.layers.2"],
            ["model.decoder.final_layer_norm", "qa_outputs"],
        ),
        (
            "bloom",
            "causal_lm",
            ["transformer.word_embeddings", "transformer.word_embeddings_layernorm"],
            ["transformer.h.2"],
            ["transformer.ln_f", "lm_head"],
        ),
        (
            "gpt_neo",
            "token_classification",
            ["transformer.wte", "transformer.wpe"],
            ["transformer.h.2"],
            ["transformer.ln_f", "classifier"],
        ),
        (
            "bert",
            "sequence_classification",
            ["bert.embeddings"],
            ["bert.encoder.layer.2"],
            ["bert.pooler", "classifier"],
        ),
        (
            "deberta_v2",
            "masked_lm",
            ["deberta.embeddings", "deberta.encoder.rel_embeddings", "deberta.encoder.LayerNorm"],
            ["deberta.encoder.layer.2"],
            ["cls"],
        ),
        (
            "t5",
            "seq2seq_lm",
            ["shared", "encoder.embed_tokens", "decoder.embed_tokens"],
            ["decoder.block.1"],
            ["decoder.final_layer_norm", "lm_head"],
        ),
    ],
)
def test_strays_find_their_place(
    family: str, head: str, embed: list[str], last_block: list[str], top: list[str]
) -> None:
    arch = find_arch(model_zoo.tiny.build(family, head, device="meta"))
    assert list(arch.embed) == embed
    assert list(arch.blocks[-1]) == last_block
    assert list(arch.head) == top


def test_what_runs_between_stacks_goes_with_the_block_below() -> None:
    arch = find_arch(model_zoo.tiny.build("t5", device="meta"))
    assert arch.blocks[2] == ("encoder.block.2", "encoder.final_layer_norm")
    mbart = find_arch(other("mbart", "MBartForConditionalGeneration", BART_LIKE))
    assert mbart.blocks[2] == ("model.encoder.layers.2", "model.encoder.layer_norm")
    assert {"model.decoder.embed_positions", "model.decoder.layernorm_embedding"} <= set(mbart.embed)


def test_what_runs_inside_the_loop_goes_with_the_first_block() -> None:
    arch = find_arch(model_zoo.tiny.build("deberta_v2", device="meta"))
    assert arch.blocks[0] == ("deberta.encoder.layer.0", "deberta.encoder.conv")


def test_parallel_lists_make_one_block_a_row() -> None:
    arch = find_arch(other(*next(row[:3] for row in OTHERS if row[0] == "xlm")))
    prefix = "transformer"
    assert arch.blocks[1] == tuple(
        f"{prefix}.{part}.1" for part in ("attentions", "layer_norm1", "ffns", "layer_norm2")
    )


def test_vision_tower_lies_below_the_text_model() -> None:
    text = {**LLAMA_LIKE, "sliding_window": 8}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 36,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = transformers.Gemma3ForConditionalGeneration(config)
    arch = find_arch(model)
    towers = [block[0].split(".")[1] for block in arch.blocks]
    assert towers == ["vision_tower"] * 2 + ["language_model"] * 3
    assert "model.multi_modal_projector" in arch.blocks[1]
    assert "model.language_model.embed_tokens" in arch.embed


def test_experts_are_part_of_their_block() -> None:
    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(4, 8)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(4, 6)
            self.experts = nn.ModuleList(Expert() for _ in range(6))

    model = nn.ModuleDict({"embed": nn.Embedding(11, 4), "layers": nn.ModuleList(Block() for _ in range(2))})
    assert find_arch(model).blocks == (("layers.0",), ("layers.1",))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.up(h)


class Misregistered(nn.Module):
    """Registers everything in the reverse of the order it runs in."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 11)
        self.norm = nn.LayerNorm(4)
        self.blocks = nn.Sequential(*(Block() for _ in range(3)))
        self.scale = nn.Parameter(torch.ones(4))
        self.project = nn.Linear(4, 4)
        self.tokens = nn.Embedding(11, 4)

    def embed(self, ids: Tensor) -> Tensor:
        return self.project(self.tokens(ids)) * self.scale

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        return self.head(self.norm(self.blocks(hidden)))


MISREGISTERED = ArchSpec(
    embed=("tokens", "project", "scale"),
    blocks=(("blocks.0",), ("blocks.1",), ("blocks.2",)),
    head=("norm", "head"),
)


def test_forward_beats_registration() -> None:
    assert find_arch(Misregistered()) == MISREGISTERED


def test_forward_of_a_base_class_is_read_through_super() -> None:
    class Wrapped(Misregistered):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) * 2

    assert find_arch(Wrapped()) == MISREGISTERED


def test_without_source_embeddings_come_first_and_the_rest_as_registered() -> None:
    scope = {"nn": nn, "Block": Block}
    exec(
        "class Sourceless(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.layers = nn.ModuleList(Block() for _ in range(2))\n"
        "        self.head = nn.Linear(4, 11)\n"
        "        self.embed = nn.Embedding(11, 4)\n"
        "    def forward(self, ids): ...\n",
        scope,
    )
    assert find_arch(scope["Sourceless"]()) == ArchSpec(("embed",), (("layers.0",), ("layers.1",)), ("head",))


def test_parts_in_a_dict_are_ordered_by_the_module_around_it() -> None:
    class NanoGPT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            parts = {
                "ln_f": nn.LayerNorm(4),
                "h": nn.ModuleList([Block(), Block()]),
                "wte": nn.Embedding(11, 4),
            }
            self.transformer = nn.ModuleDict(parts)
            self.lm_head = nn.Linear(4, 11)

        def forward(self, ids: Tensor) -> Tensor:
            h = self.transformer.wte(ids)
            for block in self.transformer["h"]:
                h = block(h)
            return self.lm_head(self.transformer.ln_f(h))

    assert find_arch(NanoGPT()) == ArchSpec(
        ("transformer.wte",), (("transformer.h.0",), ("transformer.h.1",)), ("transformer.ln_f", "lm_head")
    )


def test_blocks_in_a_sequence_with_embedding_and_head() -> None:
    model = nn.Sequential(nn.Embedding(11, 4), nn.LayerNorm(4), Block(), Block(), nn.Linear(4, 11))
    assert find_arch(model) == ArchSpec(("0", "1"), (("2",), ("3",)), ("4",))


def test_blocks_in_a_dict_by_number() -> None:
    layers = nn.ModuleDict({str(i): Block() for i in range(3)})
    model = nn.ModuleDict({"tok": nn.Embedding(11, 4), "layers": layers, "output": nn.Linear(4, 11)})
    assert [block for (block,) in find_arch(model).blocks] == ["layers.0", "layers.1", "layers.2"]


def test_one_block_is_still_a_stack() -> None:
    model = model_zoo.tiny.build("llama", num_hidden_layers=1, device="meta")
    assert find_arch(model).blocks == (("model.layers.0",),)


def test_torch_encoder_and_decoder() -> None:
    arch = find_arch(nn.Transformer(8, 2, num_encoder_layers=2, num_decoder_layers=3, batch_first=True))
    assert len(arch.blocks) == 5
    assert arch.blocks[1] == ("encoder.layers.1", "encoder.norm")
    assert arch.head == ("decoder.norm",)


def test_a_small_list_in_the_head_is_no_stack() -> None:
    class TwoHeads(Misregistered):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(4, 1, 4000) for _ in range(2)))
            self.extra = nn.ModuleList([Block(), Block()])

    assert [block for (block,) in find_arch(TwoHeads()).blocks] == ["blocks.0", "blocks.1"]


def test_without_any_stack_each_child_is_a_unit() -> None:
    mlp = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    assert find_arch(mlp) == ArchSpec((), (("0",), ("2",)), ("4",))
    wrapped = nn.ModuleDict({"net": nn.ModuleDict({"emb": nn.Embedding(5, 3), "out": nn.Linear(3, 5)})})
    assert find_arch(wrapped) == ArchSpec(("net.emb",), (), ("net.out",))
    assert find_arch(nn.Linear(2, 2)) == ArchSpec((), (("weight", "bias"),))


def test_a_list_of_bare_layers_counts_where_it_is_the_bulk() -> None:
    class Deep(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.first = nn.Linear(3, width)
            self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
            self.last = nn.Linear(width, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            for layer in self.hidden:
                x = layer(x).relu()
            return self.last(x)

    assert find_arch(Deep(8)) == ArchSpec(("first",), (("hidden.0",), ("hidden.1",), ("hidden.2",)), ("last",))


def test_shards_of_zero_3_count_as_whole_tensors() -> None:
    """ZeRO-3 leaves an empty parameter and notes the full shape on it."""
    model = model_zoo.tiny.build("llama")
    whole = partition_model(model)
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    assert partition_model(model) == whole


def test_nothing_in_the_model_is_touched() -> None:
    model = model_zoo.tiny.build("gpt2")
    model.transformer.h[1].requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    find_arch(model)
    partition_model(model)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        (ArchSpec(("token",), (("blocks.0",),)), "no module or parameter 'token'; did you mean 'tokens'"),
        (ArchSpec(("tokens",), (("blocks.0",), ("tokens",))), "'tokens' is given twice"),
    ],
)
def test_a_wrong_declaration_is_refused_by_name(arch: ArchSpec, message: str) -> None:
    with pytest.raises(GroupingError, match=message):
        check_arch(Misregistered(), arch)
