"""GPT-NeoX, OPT, Bloom, GPT-2, GPT-BigCode: transformers' logits from its files, and its files back."""

import numpy as np
import pytest

from tests.mlfs.hf_oracle import check_decoder, decoder_sizes, rope_entries, switch


def gpt_neox(rng, on):
    sizes = decoder_sizes(rng, grouped=False)
    head_dim = sizes["hidden_size"] // sizes["num_attention_heads"]
    share = float(rng.choice(np.arange(2, head_dim + 1, 2) / head_dim))
    return sizes | {
        "use_parallel_residual": on(0),
        "attention_bias": on(1),
        "hidden_act": "gelu" if on(2) else "relu",
        "layer_norm_eps": float(rng.choice([1e-5, 1e-3])),
        "rope_parameters": rope_entries(rng, partial_rotary_factor=share),
    }


def opt(rng, on):
    sizes = decoder_sizes(rng, grouped=False)
    narrow = {"word_embed_proj_dim": int(rng.integers(3, 9))} if on(1) else {}
    sizes["ffn_dim"] = sizes.pop("intermediate_size")
    return sizes | narrow | {
        "do_layer_norm_before": on(0),
        "enable_bias": on(2),
        "layer_norm_elementwise_affine": on(4),
        "_remove_final_layer_norm": on(5),
        "activation_function": "relu" if on(6) else "gelu",
    }  # fmt: skip


def gpt2_sizes(rng, on):
    sizes = decoder_sizes(rng, grouped=False)
    names = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
             "intermediate_size": "n_inner", "max_position_embeddings": "n_positions"}  # fmt: skip
    entries = {names.get(entry, entry): size for entry, size in sizes.items()}
    return entries | {"layer_norm_epsilon": float(rng.choice([1e-5, 1e-3])), "scale_attn_weights": on(0)}


def bloom(rng, on):
    entries = gpt2_sizes(rng, on)
    heads = int(rng.integers(1, 8))
    return {"hidden_size": heads * int(rng.integers(2, 7)), "n_head": heads} | {
        entry: entries[entry] for entry in ("vocab_size", "n_layer", "layer_norm_epsilon", "eos_token_id")
    }


def gpt2(rng, on):
    more = {"reorder_and_upcast_attn": on(1), "activation_function": "gelu_new" if on(2) else "silu"}
    return gpt2_sizes(rng, on) | ({"n_inner": None} if on(4) else {}) | more


def gpt_bigcode(rng, on):
    entries = gpt2_sizes(rng, on) | {"multi_query": on(1)}
    del entries["num_key_value_heads"]
    return entries | ({"n_inner": None} if on(4) else {})


CASES = {case.__name__: case for case in (gpt_neox, opt, bloom, gpt2, gpt_bigcode)}


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("family", CASES)
def test_logits_and_files_equal_transformers(family, seed, tmp_path):
    rng = np.random.default_rng([*family.encode(), seed])
    entries = CASES[family](rng, lambda i: switch(seed, i)) | {"tie_word_embeddings": switch(seed, 3)}
    check_decoder(family, entries, seed, tmp_path)
