"""GPT-BigCode (SantaCoder, StarCoder 1): GPT-2 with one key-value head, or as many as query heads.
Source: transformers ``models/gpt_bigcode/modeling_gpt_bigcode.py``."""

from mlfs_jax.config import DecoderConfig
from mlfs_jax.hf.entries import write
from mlfs_jax.hf.families import gpt2
from mlfs_jax.hf.table import DecoderFamily

FIELDS = gpt2.FIELDS | {"activation": ("activation_function", "gelu_pytorch_tanh")}


def from_hf(hf):
    values = gpt2.read_gpt2(hf, FIELDS)
    if hf.get("multi_query", True):
        values["kv_heads"] = 1
    return DecoderConfig(family="gpt_bigcode", **values)


def to_hf(config):
    entries = {"scale_attn_weights": config.attn_scale is None, "multi_query": config.kv_heads == 1}
    return write(config, FIELDS) | entries


FAMILY = DecoderFamily(
    name="gpt_bigcode",
    prefix="transformer.",
    modules=gpt2.MODULES,
    architectures={"lm": "GPTBigCodeForCausalLM", "none": "GPTBigCodeModel"},
    by_head=(gpt2.QKV,),  # with one key-value head: all queries, then its key, then its value
    buffers=gpt2.FAMILY.buffers,
    from_hf=from_hf,
    to_hf=to_hf,
    head_rule="equal",
)
