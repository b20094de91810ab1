"""OPT: learned positions, ReLU, head tied to the embedding.

The 350M model is a shape of its own: embeddings narrower than the blocks with a projection on either side,
and norms after each sub-layer, so that it has no final norm.
"""

from __future__ import annotations

from .family import Family

HEADS = ("causal_lm", "sequence_classification", "question_answering")

OPT = Family(
    name="opt",
    model_type="opt",
    heads=HEADS,
    tiny={
        "vocab_size": 67,
        "hidden_size": 16,
        "word_embed_proj_dim": 16,
        "ffn_dim": 36,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    },
    sizes={
        "opt_125m": {
            "hidden_size": 768,
            "word_embed_proj_dim": 768,
            "ffn_dim": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
        },
        "opt_1.3b": {
            "hidden_size": 2048,
            "word_embed_proj_dim": 2048,
            "ffn_dim": 8192,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
        },
        "opt_13b": {
            "hidden_size": 5120,
            "word_embed_proj_dim": 5120,
            "ffn_dim": 20480,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
        },
    },
)

OPT_350M = Family(
    name="opt_350m_style",
    model_type="opt",
    heads=HEADS,
    tiny={**OPT.tiny, "word_embed_proj_dim": 8, "do_layer_norm_before": False},
    sizes={
        "opt_350m": {
            "hidden_size": 1024,
            "word_embed_proj_dim": 512,
            "ffn_dim": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "do_layer_norm_before": False,
        },
    },
)
