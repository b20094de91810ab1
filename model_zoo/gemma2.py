"""Gemma 2: four norms a block, tied head, alternating local and global attention, soft-capped logits."""

from __future__ import annotations

from .family import Family

GEMMA2 = Family(
    name="gemma2",
    model_type="gemma2",
    heads=("causal_lm", "sequence_classification", "token_classification"),
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
    },
    sizes={
        "gemma2_2b": {
            "vocab_size": 256000,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
        },
        "gemma2_9b": {
            "vocab_size": 256000,
            "hidden_size": 3584,
            "intermediate_size": 14336,
            "num_hidden_layers": 42,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 256,
        },
    },
)
