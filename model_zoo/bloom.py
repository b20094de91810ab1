"""BLOOM: ALiBi positions, a norm right after the word embedding, head tied to the embedding."""

from __future__ import annotations

from .family import Family

BLOOM = Family(
    name="bloom",
    model_type="bloom",
    heads=("causal_lm", "sequence_classification", "token_classification", "question_answering"),
    tiny={"vocab_size": 67, "hidden_size": 16, "n_layer": 3, "n_head": 2},
    sizes={
        "bloom_560m": {"vocab_size": 250880, "hidden_size": 1024, "n_layer": 24, "n_head": 16},
        "bloom_7b1": {"vocab_size": 250880, "hidden_size": 4096, "n_layer": 30, "n_head": 32},
    },
)
