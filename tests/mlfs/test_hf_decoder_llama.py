"""Llama and the families closest to it: transformers' logits from its files, and its files back."""

import numpy as np
import pytest

from tests.mlfs.hf_oracle import check_decoder, decoder_sizes, rope_entries, switch


def llama(rng, on):
    biases = {"attention_bias": on(1), "mlp_bias": on(2)}
    return decoder_sizes(rng, explicit_head_dim=on(0)) | biases | {"rope_parameters": rope_entries(rng)}


def mistral(rng, on):
    window = {"sliding_window": int(rng.integers(2, 7)) if on(1) else None}
    return decoder_sizes(rng, explicit_head_dim=on(0)) | window | {"rope_parameters": rope_entries(rng)}


def windows(rng, on, layers):
    """Qwen's switches: which layers have a window by number, or by name."""
    types = [str(rng.choice(["full_attention", "sliding_attention"])) for _ in range(layers)]
    named = {"layer_types": types} if on(2) and on(1) else {"max_window_layers": 1}
    return named | {"use_sliding_window": on(1), "sliding_window": int(rng.integers(2, 7))}


def qwen2(rng, on):
    sizes = decoder_sizes(rng, explicit_head_dim=on(0))
    return sizes | windows(rng, on, sizes["num_hidden_layers"]) | {"rope_parameters": rope_entries(rng)}


def qwen3(rng, on):
    sizes = decoder_sizes(rng, explicit_head_dim=True)
    more = {"attention_bias": on(0), "rope_parameters": rope_entries(rng)}
    return sizes | windows(rng, on, sizes["num_hidden_layers"]) | more


def internlm3(rng, on):
    biases = {"attention_bias": on(0), "mlp_bias": on(0)}
    return decoder_sizes(rng, explicit_head_dim=True) | biases | {"rope_parameters": rope_entries(rng)}


def olmo(rng, on):
    more = {"attention_bias": on(0), "clip_qkv": 0.7 if on(1) else None, "rope_parameters": rope_entries(rng)}
    return decoder_sizes(rng, explicit_head_dim=on(2)) | more


def olmo2(rng, on):
    more = {"attention_bias": on(0), "rope_parameters": rope_entries(rng)}
    return decoder_sizes(rng, explicit_head_dim=on(2)) | more


CASES = {case.__name__: case for case in (llama, mistral, qwen2, qwen3, internlm3, olmo, olmo2)}


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("family", CASES)
def test_logits_and_files_equal_transformers(family, seed, tmp_path):
    rng = np.random.default_rng([*family.encode(), seed])
    more = {"tie_word_embeddings": switch(seed, 3), "rms_norm_eps": float(rng.choice([1e-6, 1e-3]))}
    if family == "olmo":
        del more["rms_norm_eps"]
    check_decoder(family, CASES[family](rng, lambda i: switch(seed, i)) | more, seed, tmp_path)
