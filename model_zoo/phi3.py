"""Phi-3: LLaMA's layout with queries, keys and values fused, and gate and up projections fused."""

from __future__ import annotations

from .family import Family

PHI3 = Family(
    name="phi3",
    model_type="phi3",
    heads=("causal_lm", "sequence_classification", "token_classification"),
    tiny={
        "vocab_size": 67,
        "hidden_size": 16,
        "intermediate_size": 36,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "original_max_position_embeddings": 64,
    },
    sizes={
        "phi3_mini": {
            "vocab_size": 32064,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
        },
    },
)
