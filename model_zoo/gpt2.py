"""GPT-2: learned positions, weights stored transposed (Conv1D), head tied to the embedding."""

from __future__ import annotations

from .family import Family

GPT2 = Family(
    name="gpt2",
    model_type="gpt2",
    heads=("causal_lm", "sequence_classification", "token_classification", "question_answering"),
    tiny={"vocab_size": 67, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_inner": 36, "n_positions": 64},
    sizes={
        "gpt2": {"n_embd": 768, "n_layer": 12, "n_head": 12},
        "gpt2_medium": {"n_embd": 1024, "n_layer": 24, "n_head": 16},
        "gpt2_large": {"n_embd": 1280, "n_layer": 36, "n_head": 20},
        "gpt2_xl": {"n_embd": 1600, "n_layer": 48, "n_head": 25},
    },
)
