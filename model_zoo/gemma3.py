"""Gemma 3, text only: Gemma 2's layout with norms on queries and keys, five local blocks to one global."""

from __future__ import annotations

from .family import Family

GEMMA3 = Family(
    name="gemma3",
    model_type="gemma3_text",
    heads=("causal_lm", "sequence_classification"),
    tiny={
        "vocab_size": 67,
        "hidden_size": 16,
        "intermediate_size": 36,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "query_pre_attn_scalar": 6,
        "max_position_embeddings": 64,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    sizes={
        "gemma3_1b": {
            "vocab_size": 262144,
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "num_hidden_layers": 26,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "max_position_embeddings": 32768,
            "sliding_window": 512,
        },
    },
)
