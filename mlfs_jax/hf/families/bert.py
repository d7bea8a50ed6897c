"""BERT and what is shaped like it (MiniLM). Source: transformers ``models/bert/modeling_bert.py``."""

from mlfs_jax.hf.table import EncoderFamily

FIELDS = {
    "vocab_size": ("vocab_size", 30522),
    "embed": ("hidden_size", 768),
    "layers": ("num_hidden_layers", 12),
    "heads": ("num_attention_heads", 12),
    "mlp": ("intermediate_size", 3072),
    "max_positions": ("max_position_embeddings", 512),
    "type_vocab": ("type_vocab_size", 2),
    "activation": ("hidden_act", "gelu"),
    "norm_eps": ("layer_norm_eps", 1e-12),
    "pad_token_id": ("pad_token_id", 0),
}

MODULES = {
    "embed.tokens": "embeddings.word_embeddings",
    "embed.positions": "embeddings.position_embeddings",
    "embed.types": "embeddings.token_type_embeddings",
    "embed.norm": "embeddings.LayerNorm",
    "layers.q": "encoder.layer.{layer}.attention.self.query",
    "layers.k": "encoder.layer.{layer}.attention.self.key",
    "layers.v": "encoder.layer.{layer}.attention.self.value",
    "layers.o": "encoder.layer.{layer}.attention.output.dense",
    "layers.attn_norm": "encoder.layer.{layer}.attention.output.LayerNorm",
    "layers.up": "encoder.layer.{layer}.intermediate.dense",
    "layers.down": "encoder.layer.{layer}.output.dense",
    "layers.mlp_norm": "encoder.layer.{layer}.output.LayerNorm",
}

BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")

FAMILY = EncoderFamily(
    name="bert",
    prefix="bert.",
    fields=FIELDS,
    modules=MODULES,
    heads={
        "none": {"pooler.dense": "bert.pooler.dense"},
        "sequence": {"head.dense": "bert.pooler.dense", "head.out": "classifier"},
        "token": {"head.out": "classifier"},
        "mlm": {
            "head.dense": "cls.predictions.transform.dense",
            "head.norm": "cls.predictions.transform.LayerNorm",
            "head": "cls.predictions",
        },
    },
    head_activation={"sequence": "tanh", "mlm": None},
    architectures={
        "none": "BertModel",
        "sequence": "BertForSequenceClassification",
        "token": "BertForTokenClassification",
        "mlm": "BertForMaskedLM",
    },
    reads_as={"BertForPreTraining": "mlm"},
    tied={
        "cls.predictions.decoder.weight": "embed.tokens.table",
        "cls.predictions.decoder.bias": "head.bias",
    },
    foreign=("cls.seq_relationship", "qa_outputs"),
    buffers=BUFFERS,
)
