"""A new family is its table and one entry in the registry: StarCoder 2, which is not built in, is added here."""

import numpy as np
import pytest

from mlfs_jax.config import DecoderConfig
from mlfs_jax.hf.entries import read, read_rope, write, write_one_window, write_rope
from mlfs_jax.hf.families import FAMILIES, llama
from mlfs_jax.hf.table import DecoderFamily
from tests.mlfs.hf_oracle import check_decoder, decoder_sizes, rope_entries, switch

FIELDS = llama.FIELDS | {
    "norm_eps": ("norm_epsilon", 1e-5),
    "activation": ("hidden_act", "gelu_pytorch_tanh"),
    "tied": ("tie_word_embeddings", True),
    **dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), ("use_bias", True)),
}
MODULES = {site: module for site, module in llama.MODULES.items() if site != "layers.gate"} | {
    "layers.up": "layers.{layer}.mlp.c_fc",
    "layers.down": "layers.{layer}.mlp.c_proj",
}


def from_hf(hf):
    values = read(hf, FIELDS)
    window = hf.get("sliding_window")
    return DecoderConfig(
        family="starcoder2",
        **values,
        rope=read_rope(hf, values),
        windows=(window,) * values["layers"] if window else (),
        norm="layer",
        norm_bias=True,
        gated=False,
    )


def to_hf(config):
    entries = {"sliding_window": write_one_window(config), "rope_parameters": write_rope(config.rope)}
    return write(config, FIELDS) | entries


STARCODER2 = DecoderFamily(
    name="starcoder2",
    prefix="model.",
    modules=MODULES,
    architectures={"lm": "Starcoder2ForCausalLM", "none": "Starcoder2Model"},
    from_hf=from_hf,
    to_hf=to_hf,
)


@pytest.mark.parametrize("seed", range(4))
def test_a_table_and_an_entry_are_a_family(seed, monkeypatch, tmp_path):
    monkeypatch.setitem(FAMILIES, "starcoder2", STARCODER2)
    rng = np.random.default_rng(seed)
    window = {"sliding_window": 4 if switch(seed, 1) else None}
    more = {"use_bias": switch(seed, 0), "tie_word_embeddings": switch(seed, 3), "rope_parameters": rope_entries(rng)}
    check_decoder("starcoder2", decoder_sizes(rng, explicit_head_dim=switch(seed, 4)) | window | more, seed, tmp_path)
