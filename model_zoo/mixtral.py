"""Mixtral: Mistral's layout with a router and experts in place of each feed-forward layer."""

from __future__ import annotations

from .family import Family

MIXTRAL = Family(
    name="mixtral",
    model_type="mixtral",
    heads=("causal_lm", "sequence_classification", "token_classification", "question_answering"),
    tiny={
        "vocab_size": 67,
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
    },
    sizes={
        "mixtral_8x7b": {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 32768,
        },
    },
)
