"""The model families of the zoo, one table: plain data, no torch, no transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

HEADS = (
    "causal_lm",
    "masked_lm",
    "seq2seq_lm",
    "sequence_classification",
    "token_classification",
    "question_answering",
)


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        name: the zoo's name, a Python identifier.
        model_type: transformers' name, the ``model_type`` of its ``config.json``.
        heads: which of :data:`HEADS` transformers offers for it; the first is its pretraining head.
        tiny: config entries of a model of about ten thousand parameters with every structural feature of
            the family (three blocks, odd vocabulary, grouped keys and values where the family has them).
        sizes: config entries of published checkpoints by zoo name; what is absent is the default.
    """

    name: str
    model_type: str
    heads: tuple[str, ...]
    tiny: Mapping[str, Any]
    sizes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def _table(columns: str, rows: dict[str, tuple[Any, ...]]) -> dict[str, dict[str, Any]]:
    """Config entries by size: in each row the values of ``columns`` (``None``: the default) and perhaps a dict
    with what else it has."""
    names = columns.split()
    return {
        size: {name: value for name, value in zip(names, row, strict=False) if value is not None}
        | (row[-1] if len(row) > len(names) else {})
        for size, row in rows.items()
    }


DECODER = ("causal_lm", "sequence_classification", "token_classification", "question_answering")
ENCODER = ("masked_lm", "causal_lm", "sequence_classification", "token_classification", "question_answering")

# fmt: off
# What most tiny models have in common, without and with grouped keys and values.
_TINY = dict(
    vocab_size=67, hidden_size=16, intermediate_size=36, num_hidden_layers=3, num_attention_heads=2,
    max_position_embeddings=64,
)
_GROUPED = dict(_TINY, num_attention_heads=4, num_key_value_heads=2)
_LLAMA = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "max_position_embeddings head_dim"
)
_BERT = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings"
_TIED = dict(tie_word_embeddings=True)


def _rope(theta: float, **more: Any) -> dict[str, Any]:
    return dict(rope_parameters={"rope_type": "default", "rope_theta": theta, **more})


def _deberta(buckets: int, pooler: int) -> dict[str, Any]:
    return dict(
        relative_attention=True, position_buckets=buckets, pos_att_type=["p2c", "c2p"], norm_rel_ebd="layer_norm",
        share_att_key=True, position_biased_input=False, type_vocab_size=0, pooler_hidden_size=pooler,
    )


_ALL = (
    # LLaMA: pre-norm decoder, RMSNorm, SwiGLU, rotary positions; also SmolLM2, Vicuna and many more.
    Family("llama", "llama", DECODER, _GROUPED, _table(_LLAMA, {
        "smollm2_135m":   ( 49152,  576,  1536, 30,  9,  3,   8192, None, _TIED),
        "tinyllama_1_1b": ( 32000, 2048,  5632, 22, 32,  4,   2048),
        "llama2_7b":      ( 32000, 4096, 11008, 32, 32, 32,   4096),
        "llama2_13b":     ( 32000, 5120, 13824, 40, 40, 40,   4096),
        "llama2_70b":     ( 32000, 8192, 28672, 80, 64,  8,   4096),
        "llama3_8b":      (128256, 4096, 14336, 32, 32,  8,   8192, None, _rope(500000.0)),
        "llama3_70b":     (128256, 8192, 28672, 80, 64,  8,   8192, None, _rope(500000.0)),
        "llama3_2_1b":    (128256, 2048,  8192, 16, 32,  8, 131072, None, _TIED | _rope(
            500000.0, rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        )),
    })),
    # Mistral: LLaMA's layout with grouped keys and values and a sliding attention window.
    Family("mistral", "mistral", DECODER, dict(_GROUPED, head_dim=4, sliding_window=8), _table(_LLAMA, {
        "mistral_7b": (32000, 4096, 14336, 32, 32, 8, 32768, None, dict(sliding_window=4096)),
    })),
    # Mixtral: Mistral's layout with a router and experts in place of each feed-forward layer.
    Family(
        "mixtral", "mixtral", DECODER,
        dict(_GROUPED, intermediate_size=20, num_local_experts=4, num_experts_per_tok=2),
        _table(_LLAMA, {"mixtral_8x7b": (32000, 4096, 14336, 32, 32, 8, 32768)}),
    ),
    # Qwen2 and Qwen2.5: LLaMA's layout with biases on queries, keys and values; small sizes tie the head.
    Family("qwen2", "qwen2", DECODER, _GROUPED, _table(_LLAMA, {
        "qwen2.5_0.5b": (151936,  896,  4864, 24, 14, 2, None, None, _TIED | _rope(1000000.0)),
        "qwen2.5_7b":   (152064, 3584, 18944, 28, 28, 4, None, None, _rope(1000000.0)),
        "qwen2.5_14b":  (152064, 5120, 13824, 48, 40, 8, None, None, _rope(1000000.0)),
    })),
    # Qwen3: Qwen2's layout with norms on queries and keys in place of biases.
    Family("qwen3", "qwen3", DECODER, dict(_GROUPED, head_dim=6), _table(_LLAMA, {
        "qwen3_0.6b": (151936, 1024,  3072, 28, 16, 8, 40960, 128, _TIED | _rope(1000000.0)),
        "qwen3_8b":   (151936, 4096, 12288, 36, 32, 8, 40960, 128, _rope(1000000.0)),
    })),
    # Gemma 2: four norms a block, tied head, alternating local and global attention, soft-capped logits.
    Family(
        "gemma2", "gemma2", ("causal_lm", "sequence_classification", "token_classification"),
        dict(_GROUPED, head_dim=6, query_pre_attn_scalar=6, sliding_window=8),
        _table(_LLAMA, {
            "gemma2_2b": (256000, 2304,  9216, 26,  8, 4, None, 256),
            "gemma2_9b": (256000, 3584, 14336, 42, 16, 8, None, 256),
        }),
    ),
    # Gemma 3, text only: Gemma 2's layout with norms on queries and keys, five local blocks to one global.
    Family(
        "gemma3", "gemma3_text", ("causal_lm", "sequence_classification"),
        dict(
            _GROUPED, head_dim=6, query_pre_attn_scalar=6, sliding_window=8,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        ),
        _table(_LLAMA, {"gemma3_1b": (262144, 1152, 6912, 26, 4, 1, 32768, 256, dict(sliding_window=512))}),
    ),
    # Phi-1 to Phi-2: attention and feed-forward in parallel from one LayerNorm, a biased output head.
    Family("phi", "phi", ("causal_lm", "sequence_classification", "token_classification"), _TINY, {
        "phi_2": dict(
            vocab_size=51200, hidden_size=2560, intermediate_size=10240, num_hidden_layers=32,
            num_attention_heads=32, pad_token_id=None, **_rope(10000.0, partial_rotary_factor=0.4),
        ),
    }),
    # Phi-3: LLaMA's layout with queries, keys and values fused, and gate and up projections fused.
    Family(
        "phi3", "phi3", ("causal_lm", "sequence_classification", "token_classification"),
        dict(_GROUPED, original_max_position_embeddings=64),
        _table(_LLAMA, {"phi3_mini": (32064, 3072, 8192, 32, 32, 32)}),
    ),
    # OPT: learned positions, ReLU, head tied to the embedding.
    Family(
        "opt", "opt", ("causal_lm", "sequence_classification", "question_answering"),
        dict(
            vocab_size=67, hidden_size=16, word_embed_proj_dim=16, ffn_dim=36, num_hidden_layers=3,
            num_attention_heads=2, max_position_embeddings=64,
        ),
        _table("hidden_size word_embed_proj_dim ffn_dim num_hidden_layers num_attention_heads", {
            "opt_125m": ( 768,  768,  3072, 12, 12),
            "opt_1.3b": (2048, 2048,  8192, 24, 32),
            "opt_13b":  (5120, 5120, 20480, 40, 40),
        }),
    ),
    # The 350M OPT is a shape of its own: embeddings narrower than the blocks with a projection on either side, and
    # norms after each sub-layer, so that it has no final norm.
    Family(
        "opt_350m_style", "opt", ("causal_lm", "sequence_classification", "question_answering"),
        dict(
            vocab_size=67, hidden_size=16, word_embed_proj_dim=8, ffn_dim=36, num_hidden_layers=3,
            num_attention_heads=2, max_position_embeddings=64, do_layer_norm_before=False,
        ),
        _table("hidden_size word_embed_proj_dim ffn_dim num_hidden_layers num_attention_heads", {
            "opt_350m": (1024, 512, 4096, 24, 16, dict(do_layer_norm_before=False)),
        }),
    ),
    # GPT-2: learned positions, weights stored transposed (Conv1D), head tied to the embedding.
    Family(
        "gpt2", "gpt2", DECODER,
        dict(vocab_size=67, n_embd=16, n_layer=3, n_head=2, n_inner=36, n_positions=64),
        _table("n_embd n_layer n_head", {
            "gpt2":        ( 768, 12, 12),
            "gpt2_medium": (1024, 24, 16),
            "gpt2_large":  (1280, 36, 20),
            "gpt2_xl":     (1600, 48, 25),
        }),
    ),
    # GPT-Neo: GPT-2's layout with plain linear layers and attention alternating global and local.
    Family(
        "gpt_neo", "gpt_neo", DECODER,
        dict(
            vocab_size=67, hidden_size=16, intermediate_size=36, num_layers=3, num_heads=2,
            attention_types=[[["global", "local", "global"], 1]], window_size=8, max_position_embeddings=64,
        ),
        _table("hidden_size num_layers num_heads", {
            "gpt_neo_125m": ( 768, 12, 12, dict(attention_types=[[["global", "local"], 6]])),
            "gpt_neo_1.3b": (2048, 24, 16, dict(attention_types=[[["global", "local"], 12]])),
            "gpt_neo_2_7b": (2560, 32, 20, dict(attention_types=[[["global", "local"], 16]])),
        }),
    ),
    # GPT-NeoX and Pythia: rotary positions, attention and feed-forward in parallel, an untied head.
    Family("gpt_neox", "gpt_neox", DECODER, _TINY, _table(_BERT, {
        "pythia_410m":  (50304, 1024,  4096, 24, 16),
        "pythia_6.9b":  (50432, 4096, 16384, 32, 32),
        "gpt_neox_20b": (50432, 6144, 24576, 44, 64),
    })),
    # BLOOM: ALiBi positions, a norm right after the word embedding, head tied to the embedding.
    Family(
        "bloom", "bloom", DECODER, dict(vocab_size=67, hidden_size=16, n_layer=3, n_head=2),
        _table("vocab_size hidden_size n_layer n_head", {
            "bloom_560m": (250880, 1024, 24, 16),
            "bloom_7b1":  (250880, 4096, 30, 32),
        }),
    ),
    # Falcon: attention and feed-forward in parallel, one shared key and value head in the 7B model.
    Family(
        "falcon", "falcon", DECODER,
        dict(
            vocab_size=67, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, ffn_hidden_size=36,
            max_position_embeddings=64,
        ),
        {
            "falcon_7b": dict(
                vocab_size=65024, hidden_size=4544, num_hidden_layers=32, num_attention_heads=71,
                bias=False, multi_query=True, parallel_attn=True,
            ),
        },
    ),
    # BERT: encoder with token, position and segment embeddings, a pooler, and a language head tied below.
    Family("bert", "bert", ENCODER, _TINY, _table(_BERT, {
        "bert_base":  (),
        "bert_large": (None, 1024, 4096, 24, 16),
    })),
    # RoBERTa: BERT's layout without segments, positions counted from the padding index, a deeper output head.
    Family(
        "roberta", "roberta", ENCODER, dict(_TINY, max_position_embeddings=67, type_vocab_size=1),
        _table(_BERT, {
            "roberta_base":  (None, None, None, None, None, 514, dict(type_vocab_size=1)),
            "roberta_large": (None, 1024, 4096,   24,   16, 514, dict(type_vocab_size=1)),
        }),
    ),
    # DeBERTa-v2 and v3: relative positions with a table and a norm of their own, shared by every block.
    Family(
        "deberta_v2", "deberta-v2",
        ("masked_lm", "sequence_classification", "token_classification", "question_answering"),
        dict(_TINY, max_relative_positions=8, conv_kernel_size=3, **_deberta(buckets=4, pooler=16)),
        _table(_BERT, {"deberta_v3_base": (128100, 768, 3072, 12, 12, 512, _deberta(buckets=256, pooler=768))}),
    ),
    # T5: encoder and decoder on one shared embedding; position biases live in each stack's first block.
    Family(
        "t5", "t5", ("seq2seq_lm", "sequence_classification", "token_classification", "question_answering"),
        dict(
            vocab_size=67, d_model=16, d_kv=6, d_ff=36, num_layers=3, num_decoder_layers=2, num_heads=2,
            relative_attention_num_buckets=8,
        ),
        {
            "t5_small": dict(decoder_start_token_id=0),
            "t5_large": dict(
                decoder_start_token_id=0, d_model=1024, d_kv=64, d_ff=4096, num_layers=24, num_heads=16,
            ),
        },
    ),
)
# fmt: on

FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}
SIZES: dict[str, Family] = {size: family for family in _ALL for size in family.sizes}
