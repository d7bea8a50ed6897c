"""Llama and the families next to it: transformers' logits, and its files back."""

import numpy as np
import pytest
from hf_oracle import check_decoder, decoder_sizes, rope_entries, switch


def llama(rng, on):
    sizes = decoder_sizes(rng, explicit_head_dim=on(0))
    biases = {"attention_bias": on(1), "mlp_bias": on(2)}
    return sizes | biases | {"tie_word_embeddings": on(3), "rope_parameters": rope_entries(rng)}


CASES = {"llama": llama}


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("family", CASES)
def test_logits_and_files_equal_transformers(family, seed, tmp_path):
    rng = np.random.default_rng([*family.encode(), seed])
    check_decoder(family, CASES[family](rng, lambda i: switch(seed, i)), seed, tmp_path)
