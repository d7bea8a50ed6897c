"""Gemma, Phi, StableLM, GLM, MiniCPM: transformers' logits from its files, and its files back."""

import numpy as np
import pytest

from tests.mlfs.hf_oracle import check_decoder, decoder_sizes, rope_entries, switch

LOCAL, GLOBAL = "sliding_attention", "full_attention"


def gemma(rng, on):
    more = {"attention_bias": on(0), "hidden_act": "gelu" if on(1) else "gelu_pytorch_tanh"}
    return decoder_sizes(rng, explicit_head_dim=True) | more | {"rope_parameters": rope_entries(rng)}


def gemma2(rng, on):
    sizes = decoder_sizes(rng, explicit_head_dim=True)
    types = [str(rng.choice([LOCAL, GLOBAL])) for _ in range(sizes["num_hidden_layers"])]
    return sizes | {
        "attention_bias": on(0),
        "attn_logit_softcapping": 1.5 if on(1) else None,
        "final_logit_softcapping": 2.0 if on(2) else None,
        "query_pre_attn_scalar": 7 if on(4) else sizes["head_dim"],
        "sliding_window": int(rng.integers(2, 7)),
        "hidden_activation": "gelu_pytorch_tanh" if on(5) else "silu",
        "rope_parameters": rope_entries(rng),
        **({"layer_types": types} if on(6) else {}),
    }


def gemma3_text(rng, on):
    entries = gemma2(rng, on)
    far, near = rope_entries(rng, ("default", "linear", "llama3")), rope_entries(rng, ("default",))
    return entries | {"attn_logit_softcapping": None, "rope_parameters": {GLOBAL: far, LOCAL: near}}


def part_of_a_head(rng, sizes, kinds=("default", "linear", "llama3", "yarn")):
    head_dim = sizes.get("head_dim", sizes["hidden_size"] // sizes["num_attention_heads"])
    share = float(rng.choice(np.arange(2, head_dim + 1, 2) / head_dim))
    return {"rope_parameters": rope_entries(rng, kinds, partial_rotary_factor=share)}


def phi(rng, on):
    sizes = decoder_sizes(rng)
    more = {"qk_layernorm": on(0), "hidden_act": "gelu_new" if on(1) else "relu"}
    return sizes | more | part_of_a_head(rng, sizes)


def phi3(rng, on):
    sizes = decoder_sizes(rng, explicit_head_dim=on(0))
    more = {"sliding_window": int(rng.integers(2, 7)) if on(1) else None, "pad_token_id": 1}
    return sizes | more | part_of_a_head(rng, sizes, ("default",))


def stablelm(rng, on):
    sizes = decoder_sizes(rng)
    more = {"qk_layernorm": on(0), "use_qkv_bias": on(1), "use_parallel_residual": on(2)}
    return sizes | more | part_of_a_head(rng, sizes)


def glm(rng, on):
    sizes = decoder_sizes(rng, explicit_head_dim=True)
    return sizes | {"attention_bias": on(0), "pad_token_id": 1} | part_of_a_head(rng, sizes)


def minicpm3(rng, on):
    sizes = decoder_sizes(rng, grouped=False)
    kinds = ("default", "linear", "llama3")
    return sizes | {
        "attention_bias": on(0),
        "mlp_bias": on(1),
        "q_lora_rank": int(rng.integers(3, 11)),
        "kv_lora_rank": int(rng.integers(3, 11)),
        "qk_nope_head_dim": int(rng.integers(2, 8)),
        "qk_rope_head_dim": 2 * int(rng.integers(1, 5)),
        "v_head_dim": int(rng.integers(2, 9)) if on(2) else None,
        "scale_emb": 3.5 if on(4) else 12,
        "scale_depth": 0.9 if on(5) else None,
        "dim_model_base": int(rng.integers(5, 30)) if on(6) else None,
        "rope_parameters": rope_entries(rng, kinds),
    }


CASES = {case.__name__: case for case in (gemma, gemma2, gemma3_text, phi, phi3, stablelm, glm, minicpm3)}


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("family", CASES)
def test_logits_and_files_equal_transformers(family, seed, tmp_path):
    rng = np.random.default_rng([*family.encode(), seed])
    eps = "layer_norm_eps" if family in ("phi", "stablelm") else "rms_norm_eps"
    more = {"tie_word_embeddings": switch(seed, 3), eps: float(rng.choice([1e-6, 1e-3]))}
    check_decoder(family, CASES[family](rng, lambda i: switch(seed, i)) | more, seed, tmp_path)
