"""GPT-Neo: GPT-2's layout with plain linear layers and attention alternating global and local."""

from __future__ import annotations

from .family import Family

GPT_NEO = Family(
    name="gpt_neo",
    model_type="gpt_neo",
    heads=("causal_lm", "sequence_classification", "token_classification", "question_answering"),
    tiny={
        "vocab_size": 67,
        "hidden_size": 16,
        "intermediate_size": 36,
        "num_layers": 3,
        "num_heads": 2,
        "attention_types": [[["global", "local", "global"], 1]],
        "window_size": 8,
        "max_position_embeddings": 64,
    },
    sizes={
        "gpt_neo_125m": {
            "hidden_size": 768,
            "num_layers": 12,
            "num_heads": 12,
            "attention_types": [[["global", "local"], 6]],
        },
        "gpt_neo_1.3b": {
            "hidden_size": 2048,
            "num_layers": 24,
            "num_heads": 16,
            "attention_types": [[["global", "local"], 12]],
        },
        "gpt_neo_2_7b": {
            "hidden_size": 2560,
            "num_layers": 32,
            "num_heads": 20,
            "attention_types": [[["global", "local"], 16]],
        },
    },
)
