"""DeBERTa-v2 and v3: relative positions with a table and a norm of their own, shared by every block."""

from __future__ import annotations

from .family import Family

DEBERTA_V2 = Family(
    name="deberta_v2",
    model_type="deberta-v2",
    heads=("masked_lm", "sequence_classification", "token_classification", "question_answering"),
    tiny={
        "vocab_size": 67,
        "hidden_size": 16,
        "intermediate_size": 36,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "relative_attention": True,
        "max_relative_positions": 8,
        "position_buckets": 4,
        "pos_att_type": ["p2c", "c2p"],
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "position_biased_input": False,
        "type_vocab_size": 0,
        "conv_kernel_size": 3,
        "pooler_hidden_size": 16,
    },
    sizes={
        "deberta_v3_base": {
            "vocab_size": 128100,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 512,
            "relative_attention": True,
            "position_buckets": 256,
            "pos_att_type": ["p2c", "c2p"],
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "position_biased_input": False,
            "type_vocab_size": 0,
            "pooler_hidden_size": 768,
        },
    },
)
