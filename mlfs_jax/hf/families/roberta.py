"""RoBERTa: BERT's blocks, positions counted over real tokens. Source: ``models/roberta/modeling_roberta.py``."""

from mlfs_jax.hf.families.bert import BUFFERS, FIELDS, MODULES
from mlfs_jax.hf.table import EncoderFamily

FAMILY = EncoderFamily(
    name="roberta",
    prefix="roberta.",
    fields=FIELDS | {"vocab_size": ("vocab_size", 50265), "pad_token_id": ("pad_token_id", 1)},
    implied=lambda values: {"position_offset": values["pad_token_id"] + 1},
    modules=MODULES,
    heads={
        "none": {"pooler.dense": "roberta.pooler.dense"},
        "sequence": {"head.dense": "classifier.dense", "head.out": "classifier.out_proj"},
        "token": {"head.out": "classifier"},
        "mlm": {"head.dense": "lm_head.dense", "head.norm": "lm_head.layer_norm", "head": "lm_head"},
    },
    head_activation={"sequence": "tanh", "mlm": "gelu"},
    architectures={
        "none": "RobertaModel",
        "sequence": "RobertaForSequenceClassification",
        "token": "RobertaForTokenClassification",
        "mlm": "RobertaForMaskedLM",
    },
    tied={"lm_head.decoder.weight": "embed.tokens.table", "lm_head.decoder.bias": "head.bias"},
    foreign=("qa_outputs",),
    buffers=BUFFERS,
)
