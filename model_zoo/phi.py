"""Phi-1 to Phi-2: attention and feed-forward in parallel from one LayerNorm, a biased output head."""

from __future__ import annotations

from .family import Family

PHI = Family(
    name="phi",
    model_type="phi",
    heads=("causal_lm", "sequence_classification", "token_classification"),
    tiny={
        "vocab_size": 67,
        "hidden_size": 16,
        "intermediate_size": 36,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    },
    sizes={
        "phi_2": {
            "vocab_size": 51200,
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "pad_token_id": None,  # transformers 5.0 gives the config none
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.4},
        },
    },
)
