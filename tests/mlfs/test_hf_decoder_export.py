"""Masked == sliced == exported: a subnet of a language model computes one function in its three lives."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlfs_jax.backbone.tree import flatten, map_named
from mlfs_jax.errors import ConfigError
from mlfs_jax.hf.configs import from_hf
from mlfs_jax.hf.export import export_hf
from mlfs_jax.model import abstract, build, forward
from mlfs_jax.slicing import slice_base, slice_config
from mlfs_jax.subnet import Subnet, kv_group, make_mask, maxnet
from tests.mlfs.hf_oracle import QUICK, TOLERANCE, decoder_batch, run, torch_logits, transformers

SIZES = {
    "vocab_size": 43, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 3,
    "intermediate_size": 17, "max_position_embeddings": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ALONE = SIZES | {"num_key_value_heads": 6}
GPT2 = {"n_embd": 24, "n_layer": 3, "n_head": 6, "n_inner": 17, "vocab_size": 43, "n_positions": 20}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 4}
HALF = {"partial_rotary_factor": 0.5, "rope_type": "default", "rope_theta": 100.0}

FAMILIES = {  # the first five are what the project promises; the others have a rule of their own
    "llama": SIZES | {"head_dim": 6, "tie_word_embeddings": True},
    "qwen2": SIZES | {"head_dim": 6, "use_sliding_window": True} | WINDOWS,
    "gemma": SIZES | {"head_dim": 6},
    "gpt_neox": ALONE | {"rope_parameters": HALF},
    "opt": ALONE | {"ffn_dim": 17},
    "gemma3_text": SIZES | {"head_dim": 6, "query_pre_attn_scalar": 7} | WINDOWS,
    "stablelm": SIZES | {"rope_parameters": HALF, "qk_layernorm": True},
    "phi": SIZES | {"rope_parameters": HALF},
    "phi3": SIZES | {"sliding_window": 3},
    "olmo2": SIZES,
    "bloom": {"hidden_size": 24, "n_layer": 3, "n_head": 6, "vocab_size": 43},
    "gpt2": GPT2 | {"scale_attn_weights": False},
    "gpt_bigcode": GPT2,
    "minicpm3": ALONE | {"q_lora_rank": 7, "kv_lora_rank": 5, "qk_nope_head_dim": 3, "qk_rope_head_dim": 4},
}
PROMISED = list(FAMILIES)[:5]


def random_model(config, seed=0):
    """A model whose every weight is random, norms and biases too."""
    rng = np.random.default_rng(seed)
    mean = {True: 1 - getattr(config, "norm_offset", 0.0), False: 0.0}
    draw = lambda name, spec: rng.normal(mean[name.endswith("scale")], 0.2, spec.shape)  # noqa: E731
    flat = flatten(abstract(config)[1])
    return build(config, {name: jnp.asarray(draw(name, spec), jnp.float32) for name, spec in flat.items()})


def opened(folder):
    """The export, as the user opens it."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def random_subnet(config, rng) -> Subnet:
    """Any widths; the heads of a layer in whole groups (where all are normed together, the same in all layers)."""
    layers = tuple(sorted(rng.choice(config.layers, rng.integers(1, config.layers + 1), replace=False).tolist()))
    group = kv_group(config)
    heads = [int(group * rng.integers(1, config.heads // group + 1)) for _ in layers]
    if config.qk_norm == "full":
        heads = heads[:1] * len(layers)
    mlp = tuple(int(rng.integers(1, config.mlp + 1)) for _ in layers)
    return Subnet(int(rng.integers(5, config.embed + 1)), tuple(heads), mlp, layers)


def sliced(model, subnet):
    """``slice_subnet`` without a compile: the weights lie on the host."""
    config = slice_config(model.config, subnet)
    base = map_named(lambda name, leaf: np.asarray(leaf[...]), model.base)
    return model.replace(config=config, graphdef=abstract(config)[0], base=slice_base(model.config, base, subnet))


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_sliced_and_exported_agree(family, tmp_path):
    config = from_hf({"model_type": family, **FAMILIES[family]}, head="lm")
    model, rng = random_model(config), np.random.default_rng([*family.encode()])
    batch = decoder_batch(rng, config.vocab_size)
    real = batch["attention_mask"] == 1
    lowered = jax.jit(partial(forward, model.graphdef)).lower(model.base, batch, mask=make_mask(config, maxnet(config)))
    masked_forward = lowered.compile(compiler_options=QUICK)
    for i in range(20 if family in PROMISED else 4):
        subnet = random_subnet(config, rng)
        masked = np.asarray(masked_forward(model.base, batch, mask=make_mask(config, subnet)).logits)[real]
        small = sliced(model, subnet)
        if i < 2:
            np.testing.assert_allclose(np.asarray(run(small, batch).logits)[real], masked, atol=TOLERANCE)
        report = export_hf(small, tmp_path / str(i), sliced_from=config)
        theirs = opened(tmp_path / str(i))
        np.testing.assert_allclose(torch_logits(theirs, batch)[real], masked, atol=TOLERANCE, err_msg=str(subnet))
        assert theirs.num_parameters() == report.params_after


def exported(family, folder, **changes):
    """(report, our logits, transformers' logits) of a random model, and its config."""
    config = from_hf({"model_type": family, **FAMILIES[family]}, head="lm").replace(**changes)
    model, batch = random_model(config), decoder_batch(np.random.default_rng(0), config.vocab_size)
    report = export_hf(model, folder)
    theirs = opened(folder)
    real = batch["attention_mask"] == 1
    np.testing.assert_allclose(torch_logits(theirs, batch)[real], np.asarray(run(model, batch).logits)[real], atol=1e-4)
    return report, theirs.config


@pytest.mark.parametrize(
    ("family", "changes", "padded", "words"),
    [
        ("llama", {"embed": 20}, {"heads": (6, 10), "kv_heads": (3, 5)}, "multiple of heads"),
        ("llama", {"embed": 23, "tied": False}, {"heads": (6, 23), "kv_heads": (3, 23)}, "written 2 times"),
        ("llama", {"embed": 4}, {"embed": (4, 8), "heads": (6, 8), "kv_heads": (3, 4)}, "repeated 2 times"),
        ("qwen2", {"embed": 23}, {}, None),
        ("gemma", {"embed": 18}, {}, "computes a factor from the width"),
        ("gpt_neox", {"heads": 5, "kv_heads": 5}, {"heads": (5, 6), "kv_heads": (5, 6)}, "1 heads of zeros"),
        ("gpt_neox", {"embed": 30}, {"head_dim": (4, 5)}, r"queries are scaled by sqrt\(5/4\)"),
        ("gpt2", {"embed": 30}, {"head_dim": (4, 5)}, "head size = hidden / heads"),
        ("bloom", {"heads": 4, "kv_heads": 4}, {"heads": (4, 6), "kv_heads": (4, 6)}, r"slopes follow .* \(6\)"),
        ("bloom", {"embed": 18, "mlp": 73}, {"embed": (18, 36), "head_dim": (4, 6), "mlp": (73, 144)}, "4 x hidden"),
        ("gpt_bigcode", {"heads": 5}, {"heads": (5, 6)}, "1 heads of zeros"),
        ("stablelm", {"embed": 16}, {"embed": (16, 32), "heads": (6, 8), "kv_heads": (3, 4)}, "repeated 2 times"),
    ],
)
def test_rules_are_met_by_padding_and_named(family, changes, padded, words, tmp_path):
    report, _ = exported(family, tmp_path / "out", **changes)
    assert report.padded == padded
    assert (report.why == ()) if words is None else re.search(words, " ".join(report.why))


def test_what_no_padding_repairs_is_refused(tmp_path):
    config = from_hf({"model_type": "opt", **FAMILIES["opt"], "do_layer_norm_before": False}, head="lm")
    with pytest.raises(ConfigError, match=r"hidden / heads; here 6 .* no norm with weights before it"):
        export_hf(random_model(config.replace(embed=20)), tmp_path / "out")
    config = from_hf({"model_type": "mistral", **SIZES, "sliding_window": 4}, head="lm")
    with pytest.raises(ConfigError, match="same window in all layers"):
        export_hf(random_model(config.replace(windows=(4, 0, 4))), tmp_path / "out")
    config = from_hf({"model_type": "qwen2", **FAMILIES["qwen2"]}, head="lm")
    with pytest.raises(ConfigError, match="one sliding_window"):
        export_hf(random_model(config.replace(windows=(4, 0, 3))), tmp_path / "out")
    config = from_hf({"model_type": "phi", **SIZES, "qk_layernorm": True}, head="lm")
    with pytest.raises(ConfigError, match="head_dim = embed // heads"):
        export_hf(random_model(config.replace(embed=20)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_card_and_tokenizer_of_a_language_model(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    config = from_hf({"model_type": "llama", **FAMILIES["llama"]}, head="lm")
    report = export_hf(random_model(config), tmp_path / "out", tokenizer_from=tmp_path)
    assert {"tokenizer.model", "chat_template.jinja"} <= {*report.files}
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'AutoModelForCausalLM.from_pretrained("out")' in card and "A llama decoder" in card
    assert "pipeline_tag: text-generation" in card and "function is the model's own" in card
