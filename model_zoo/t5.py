"""T5: encoder and decoder on one shared embedding; position biases live in each stack's first block."""

from __future__ import annotations

from .family import Family

T5 = Family(
    name="t5",
    model_type="t5",
    heads=("seq2seq_lm", "sequence_classification", "token_classification", "question_answering"),
    tiny={
        "vocab_size": 67,
        "d_model": 16,
        "d_kv": 6,
        "d_ff": 36,
        "num_layers": 3,
        "num_decoder_layers": 2,
        "num_heads": 2,
        "relative_attention_num_buckets": 8,
    },
    sizes={
        "t5_small": {"decoder_start_token_id": 0},
        "t5_large": {
            "decoder_start_token_id": 0,
            "d_model": 1024,
            "d_kv": 64,
            "d_ff": 4096,
            "num_layers": 24,
            "num_heads": 16,
        },
    },
)
