"""config.json of decoders: old and new spellings, defaults, and what is refused."""

import pytest

from mlfs_jax.errors import ConfigError, UnknownNameError
from mlfs_jax.hf.configs import from_hf, to_hf
from mlfs_jax.hf.families import FAMILIES, NOT_NATIVE
from mlfs_jax.hf.table import DecoderFamily
from tests.mlfs.hf_oracle import transformers

DECODERS = [name for name, family in FAMILIES.items() if isinstance(family, DecoderFamily)]
SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 31, "eos_token_id": 2}
GPT2 = {"n_embd": 24, "n_layer": 2, "n_head": 4, "vocab_size": 31, "eos_token_id": 2}


def through_transformers(hf: dict):
    """Our reading of what transformers makes of a config.json."""
    theirs = transformers.AutoConfig.for_model(**hf).to_dict()
    return from_hf(theirs | {"architectures": None}, head="lm")


@pytest.mark.parametrize("family", DECODERS)
def test_defaults_are_transformers(family):
    own = {"vocab_size": 31, "pad_token_id": 0, "eos_token_id": 2}
    assert from_hf({"model_type": family}, head="lm") == through_transformers({"model_type": family})
    config = from_hf({"model_type": family, **own}, head="lm")
    assert from_hf(to_hf(config)) == config and to_hf(config)["architectures"] == [FAMILIES[family].architectures["lm"]]
    base = config.replace(head="none")
    assert from_hf(to_hf(base)) == base


@pytest.mark.parametrize(
    "hf",
    [
        {"model_type": "llama", **SMALL, "num_key_value_heads": 2, "rope_theta": 500000.0,
         "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                          "original_max_position_embeddings": 8192}, "max_position_embeddings": 131072},
        {"model_type": "llama", **SMALL, "rope_scaling": {"type": "linear", "factor": 2.0}, "pretraining_tp": 1},
        {"model_type": "llama", **SMALL, "rope_interleaved": False, "tie_word_embeddings": True},
        {"model_type": "mistral", **SMALL, "num_key_value_heads": 2, "sliding_window": 3, "rope_theta": 1000.0},
        {"model_type": "mistral", **SMALL, "num_key_value_heads": 1, "sliding_window": None},
        {"model_type": "qwen2", **SMALL, "num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 5,
         "max_window_layers": 1},
        {"model_type": "qwen2", **SMALL, "num_key_value_heads": 2, "use_sliding_window": False, "sliding_window": 5,
         "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
        {"model_type": "gemma", **SMALL, "num_key_value_heads": 1, "hidden_act": "gelu", "hidden_activation": None},
        {"model_type": "gemma2", **SMALL, "num_key_value_heads": 2, "query_pre_attn_scalar": 144, "sliding_window": 3},
        {"model_type": "gemma3_text", **SMALL, "num_key_value_heads": 2, "sliding_window_pattern": 2,
         "sliding_window": 3, "rope_theta": 5000.0, "rope_local_base_freq": 300.0,
         "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {"model_type": "phi", **SMALL, "partial_rotary_factor": 0.4, "rope_theta": 100.0},
        {"model_type": "phi", **SMALL, "hidden_size": 32, "rope_parameters": {"rope_theta": 100.0}},
        {"model_type": "phi3", **SMALL, "pad_token_id": 0, "rope_scaling": None, "sliding_window": 7,
         "original_max_position_embeddings": 4096},
        {"model_type": "stablelm", **SMALL, "hidden_size": 32, "num_key_value_heads": 4, "partial_rotary_factor": 0.25},
        {"model_type": "olmo", **SMALL, "clip_qkv": 8.0, "rope_theta": 50.0},
        {"model_type": "gpt_neox", **SMALL, "rotary_pct": 0.34, "rotary_emb_base": 500},
        {"model_type": "gpt_neox", **SMALL, "hidden_size": 32, "use_parallel_residual": False},
        {"model_type": "opt", **SMALL, "word_embed_proj_dim": 8, "do_layer_norm_before": False, "ffn_dim": 5},
        {"model_type": "bloom", "n_embed": 24, "n_layer": 3, "num_attention_heads": 4, "seq_length": 64},
        {"model_type": "gpt2", **GPT2, "n_ctx": 1024, "n_positions": 64, "scale_attn_weights": False},
        {"model_type": "gpt2", **SMALL, "max_position_embeddings": 64, "n_inner": None},
        {"model_type": "gpt_bigcode", **GPT2, "multi_query": False, "activation_function": "gelu"},
        {"model_type": "glm", **SMALL, "num_key_value_heads": 2, "partial_rotary_factor": 0.5, "rope_theta": 50.0},
        {"model_type": "internlm3", **SMALL, "qkv_bias": True, "bias": True},
        {"model_type": "minicpm3", **SMALL, "num_key_value_heads": 4, "scale_depth": None, "dim_model_base": None},
    ],
    ids=lambda hf: hf["model_type"],
)  # fmt: skip
def test_old_spellings_read_as_transformers_reads_them(hf):
    config = from_hf(hf, head="lm")
    assert config == through_transformers(hf)
    assert from_hf(to_hf(config)) == config


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'.*llama3, yarn.*the same"),
        ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1]}}, "rope_type = 'longrope'"),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type = 'linear'"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "'linear' needs more"),
        ("llama", {"rope_parameters": {"rope_type": "default", "mrope_section": [1]}}, "mrope_section"),
        ("llama", {"rope_parameters": "default"}, "rope_parameters = 'default'.*expected an object"),
        ("llama", {"rms_norm_eps": "1e-5"}, "norm_eps = '1e-5': expected a number"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ("llama", {"hidden_act": "quick_gelu"}, "hidden_act = 'quick_gelu'"),
        ("gemma2", {"hidden_activation": "laplace"}, "hidden_activation = 'laplace'"),
        ("llama", {"num_attention_heads": 5}, "hidden_size = 24 is not a multiple of num_attention_heads = 5"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads = 0"),
        ("llama", {"hidden_size": "24"}, "hidden_size = '24'"),
        ("llama", {"num_attention_heads": 4, "num_key_value_heads": 3}, "kv_heads = 3"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config.*dequantised"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3_text", {"rope_parameters": {"rope_type": "default"}}, "expected one dict for sliding_attention"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 2}, "layer_types"),
        ("qwen2", {"layer_types": ["full_attention"]}, "expected 2 of"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 2}, "sliding_window = None"),
        ("mistral", {"layer_types": ["full_attention"] * 2}, "layer_types"),
        ("internlm3", {"bias": True}, "qkv_bias differs from bias"),
        ("minicpm3", {"q_lora_rank": None}, "q_lora_rank"),
        ("minicpm3", {"rope_parameters": {"type": "yarn", "factor": 2.0, "mscale_all_dim": 1.0}}, "mscale_all"),
        ("gpt_neox", {"rotary_pct": 0.5}, "rope dim = 3"),
        ("llama", {"architectures": ["LlamaForTokenClassification"]}, r"LlamaForTokenClassification.*LlamaForCausalLM"),
    ],
)  # fmt: skip
def test_configs_that_are_not_built_are_refused_by_name(family, change, words):
    hf = {"model_type": family, "architectures": [FAMILIES[family].architectures["lm"]], "num_key_value_heads": 4}
    hf |= {"rotary_pct": 1.0} if family == "gpt_neox" else {}
    hf |= GPT2 if family in ("gpt2", "bloom") else SMALL
    hf.pop("n_embd" if family == "bloom" else "", None)
    from_hf(hf)
    with pytest.raises(ConfigError, match=words):
        from_hf(hf | change)


@pytest.mark.parametrize(
    ("hf", "words"),
    [
        ({"model_type": "qwen"}, "Qwen 1.*no class.*qwen2"),
        ({"model_type": "internlm2"}, "InternLM 2.*internlm3"),
        ({"model_type": "openelm"}, "OpenELM.*llama"),
        ({"model_type": "chatglm"}, "glm"),
        ({"model_type": "glm", "architectures": ["GLMModel"]}, "GLM-2B"),
        ({"model_type": "mobilellm"}, "MobileLLM.*llama"),
    ],
)
def test_what_transformers_has_no_class_for_names_the_nearest(hf, words):
    with pytest.raises(ConfigError, match=words):
        from_hf(hf)


def test_unknown_families_offer_the_nearest_and_heads_are_checked():
    with pytest.raises(UnknownNameError, match="gemma3_text"):
        from_hf({"model_type": "gemma3"})
    assert {what.split()[0].rstrip(",") for _, what in NOT_NATIVE.values()} <= {*DECODERS}
    with pytest.raises(ConfigError, match="a llama has none, lm"):
        from_hf({"model_type": "llama", **SMALL}, head="sequence")
    with pytest.raises(ConfigError, match="labels = 2"):
        from_hf({"model_type": "llama", **SMALL}, head="lm", labels=2)
    config = from_hf({"model_type": "llama", **SMALL}, head="lm")
    with pytest.raises(ConfigError, match="no labels"):
        to_hf(config, label_names=["a"])


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("llama", {"qk_norm": "head"}, "qk_norm"),
        ("llama", {"qkv_bias": True}, "qkv_bias = True"),
        ("llama", {"windows": (3, 3)}, "windows"),
        ("llama", {"attn_scale": 0.5}, "attn_scale = 0.5"),
        ("gemma", {"embed_scale": 2.0}, "embed_scale"),
        ("gemma2", {"attn_scale": 0.3}, "attn_scale"),
        ("gpt2", {"attn_scale": 0.5}, "attn_scale"),
        ("phi3", {"windows": (3, 0)}, "same window"),
        ("bloom", {"heads": 2, "kv_heads": 2}, "alibi_heads = 4"),
        ("bloom", {"mlp": 90}, "mlp = 90"),
        ("opt", {"norm_eps": 1e-3}, "norm_eps"),
        ("opt", {"head": "none", "embedding_size": 8}, "head = 'none'"),
        ("minicpm3", {"logit_scale": 0.51}, "logit_scale"),
    ],
)
def test_what_hugging_face_cannot_express_is_refused(family, changes, words):
    config = from_hf(
        {"model_type": family} | (GPT2 if family == "gpt2" else SMALL | {"num_key_value_heads": 4}), head="lm"
    )
    assert from_hf(to_hf(config)) == config
    with pytest.raises(ConfigError, match=words):
        to_hf(config.replace(**changes))
