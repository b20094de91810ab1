"""Qwen2 and Qwen2.5: LLaMA's layout with biases on queries, keys and values; small sizes tie the head."""

from __future__ import annotations

from .family import Family

QWEN2 = Family(
    name="qwen2",
    model_type="qwen2",
    heads=("causal_lm", "sequence_classification", "token_classification", "question_answering"),
    tiny={
        "vocab_size": 67,
        "hidden_size": 16,
        "intermediate_size": 36,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    },
    sizes={
        "qwen2.5_0.5b": {
            "vocab_size": 151936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
        "qwen2.5_7b": {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
        "qwen2.5_14b": {
            "vocab_size": 152064,
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "num_hidden_layers": 48,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
    },
)
