"""Mistral: LLaMA's layout with grouped keys and values and a sliding attention window."""

from __future__ import annotations

from .family import Family

MISTRAL = Family(
    name="mistral",
    model_type="mistral",
    heads=("causal_lm", "sequence_classification", "token_classification", "question_answering"),
    tiny={
        "vocab_size": 67,
        "hidden_size": 16,
        "intermediate_size": 36,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "max_position_embeddings": 64,
        "sliding_window": 8,
    },
    sizes={
        "mistral_7b": {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
        },
    },
)
