"""DistilBERT: no token types, no pooler. Source: ``models/distilbert/modeling_distilbert.py``.

Its ``sinusoidal_pos_embds`` says only how the position table was filled; the table is stored like any other.
"""

from mlfs_jax.hf.families.bert import BUFFERS
from mlfs_jax.hf.table import EncoderFamily

FAMILY = EncoderFamily(
    name="distilbert",
    prefix="distilbert.",
    fields={
        "vocab_size": ("vocab_size", 30522),
        "embed": ("dim", 768),
        "layers": ("n_layers", 6),
        "heads": ("n_heads", 12),
        "mlp": ("hidden_dim", 3072),
        "max_positions": ("max_position_embeddings", 512),
        "activation": ("activation", "gelu"),
        "pad_token_id": ("pad_token_id", 0),
    },
    modules={
        "embed.tokens": "embeddings.word_embeddings",
        "embed.positions": "embeddings.position_embeddings",
        "embed.norm": "embeddings.LayerNorm",
        "layers.q": "transformer.layer.{layer}.attention.q_lin",
        "layers.k": "transformer.layer.{layer}.attention.k_lin",
        "layers.v": "transformer.layer.{layer}.attention.v_lin",
        "layers.o": "transformer.layer.{layer}.attention.out_lin",
        "layers.attn_norm": "transformer.layer.{layer}.sa_layer_norm",
        "layers.up": "transformer.layer.{layer}.ffn.lin1",
        "layers.down": "transformer.layer.{layer}.ffn.lin2",
        "layers.mlp_norm": "transformer.layer.{layer}.output_layer_norm",
    },
    heads={
        "none": {},
        "sequence": {"head.dense": "pre_classifier", "head.out": "classifier"},
        "token": {"head.out": "classifier"},
        "mlm": {"head.dense": "vocab_transform", "head.norm": "vocab_layer_norm", "head": "vocab_projector"},
    },
    head_activation={"sequence": "relu", "mlm": None},
    architectures={
        "none": "DistilBertModel",
        "sequence": "DistilBertForSequenceClassification",
        "token": "DistilBertForTokenClassification",
        "mlm": "DistilBertForMaskedLM",
    },
    tied={"vocab_projector.weight": "embed.tokens.table"},
    foreign=("qa_outputs",),
    buffers=BUFFERS,
)
