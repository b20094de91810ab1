"""BERT: encoder with token, position and segment embeddings, a pooler, and a language head tied below."""

from __future__ import annotations

from .family import Family

BERT = Family(
    name="bert",
    model_type="bert",
    heads=(
        "masked_lm",
        "causal_lm",
        "sequence_classification",
        "token_classification",
        "question_answering",
    ),
    tiny={
        "vocab_size": 67,
        "hidden_size": 16,
        "intermediate_size": 36,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    },
    sizes={
        "bert_base": {},
        "bert_large": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
        },
    },
)
