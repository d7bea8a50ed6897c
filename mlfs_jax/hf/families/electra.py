"""ELECTRA: BERT's blocks behind narrower embedding tables. Source: ``models/electra/modeling_electra.py``."""

from mlfs_jax.hf.families.bert import BUFFERS, FIELDS, MODULES
from mlfs_jax.hf.table import EncoderFamily

FAMILY = EncoderFamily(
    name="electra",
    prefix="electra.",
    fields=FIELDS
    | {
        "embedding_size": ("embedding_size", 128),
        "embed": ("hidden_size", 256),
        "heads": ("num_attention_heads", 4),
        "mlp": ("intermediate_size", 1024),
    },
    modules=MODULES | {"embed.proj": "embeddings_project"},
    heads={
        "none": {},
        "sequence": {"head.dense": "classifier.dense", "head.out": "classifier.out_proj"},
        "token": {"head.out": "classifier"},
        "mlm": {
            "head.dense": "generator_predictions.dense",
            "head.norm": "generator_predictions.LayerNorm",
            "head": "generator_lm_head",
        },
    },
    head_activation={"sequence": "gelu", "mlm": "gelu"},
    architectures={
        "none": "ElectraModel",
        "sequence": "ElectraForSequenceClassification",
        "token": "ElectraForTokenClassification",
        "mlm": "ElectraForMaskedLM",
    },
    tied={"generator_lm_head.weight": "embed.tokens.table"},
    foreign=("discriminator_predictions", "qa_outputs"),
    buffers=BUFFERS,
)
