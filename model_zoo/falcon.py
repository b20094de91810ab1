"""Falcon: attention and feed-forward in parallel, one shared key and value head in the 7B model."""

from __future__ import annotations

from .family import Family

FALCON = Family(
    name="falcon",
    model_type="falcon",
    heads=("causal_lm", "sequence_classification", "token_classification", "question_answering"),
    tiny={
        "vocab_size": 67,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "ffn_hidden_size": 36,
        "max_position_embeddings": 64,
    },
    sizes={
        "falcon_7b": {
            "vocab_size": 65024,
            "hidden_size": 4544,
            "num_hidden_layers": 32,
            "num_attention_heads": 71,
            "bias": False,
            "multi_query": True,
            "parallel_attn": True,
        },
    },
)
