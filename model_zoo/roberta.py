"""RoBERTa: BERT's layout without segments, positions counted from the padding index, a deeper output head."""

from __future__ import annotations

from .family import Family

ROBERTA = Family(
    name="roberta",
    model_type="roberta",
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
        "max_position_embeddings": 67,
        "type_vocab_size": 1,
    },
    sizes={
        "roberta_base": {"max_position_embeddings": 514, "type_vocab_size": 1},
        "roberta_large": {
            "max_position_embeddings": 514,
            "type_vocab_size": 1,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
        },
    },
)
