"""What the tests of ``mlfs_jax.hf`` share: small random torch models, and the two logits to compare."""

from functools import partial
from importlib.metadata import version

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)

from mlfs_jax import forward  # noqa: E402
from mlfs_jax.hf.export import export_hf  # noqa: E402
from mlfs_jax.hf.families import FAMILIES  # noqa: E402
from mlfs_jax.hf.load import load_checkpoint  # noqa: E402
from mlfs_jax.hf.table import EncoderFamily  # noqa: E402

TOLERANCE = 1e-4
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Compiler options for a program that runs once."""
if version("jaxlib").startswith("0.10."):  # an option that later ones do not know
    QUICK["xla_cpu_use_fusion_emitters"] = False
NAMES = tuple(name for name, family in FAMILIES.items() if isinstance(family, EncoderFamily))
HEADS = ("sequence", "token", "mlm", "none")


def random_config(family: str, rng: np.random.Generator, **fixed):
    """A small random config of transformers' own class; sizes are odd on purpose."""
    heads = int(rng.integers(1, 5))
    sizes = {
        "vocab_size": int(rng.integers(20, 60)),
        "hidden_size": heads * int(rng.integers(3, 13)),
        "num_hidden_layers": int(rng.integers(1, 4)),
        "num_attention_heads": heads,
        "intermediate_size": int(rng.integers(5, 50)),
        "max_position_embeddings": int(rng.integers(16, 30)),
        "type_vocab_size": int(rng.integers(1, 4)),
        "hidden_act": str(rng.choice(["gelu", "relu", "gelu_new", "silu"])),
        "layer_norm_eps": float(rng.choice([1e-12, 1e-5])),
        "pad_token_id": int(rng.integers(0, 3)),
        "num_labels": int(rng.integers(1, 6)),
        "initializer_range": 0.2,  # large enough that every weight matters
    }
    if family == "electra":
        sizes["embedding_size"] = int(rng.choice([sizes["hidden_size"], rng.integers(4, 20)]))
    if family == "distilbert":
        names = {
            "hidden_size": "dim",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "intermediate_size": "hidden_dim",
            "hidden_act": "activation",
        }
        sizes = {names.get(k, k): v for k, v in sizes.items() if k not in ("type_vocab_size", "layer_norm_eps")}
    return transformers.AutoConfig.for_model(family, **(sizes | fixed))


def random_torch_model(family: str, head: str, config, seed: int = 0):
    """A torch model of that head whose every parameter is random, norms and biases too."""
    torch.manual_seed(seed)
    model = getattr(transformers, FAMILIES[family].architectures[head])(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def random_batch(rng: np.random.Generator, vocab: int, pad: int, types: int) -> dict[str, np.ndarray]:
    """Two texts of 9 tokens, the second padded."""
    ids = rng.integers(3, vocab, (2, 9))
    mask = np.ones_like(ids)
    mask[1, 6:] = 0
    ids[1, 6:] = pad
    batch = {"input_ids": ids, "attention_mask": mask}
    if types:
        batch["token_type_ids"] = rng.integers(0, types, ids.shape)
    return batch


def batch_for(config, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A batch that fits one of our configs."""
    return random_batch(rng, config.vocab_size, config.pad_token_id, config.type_vocab)


def torch_outputs(model, batch) -> tuple[np.ndarray | None, np.ndarray]:
    """(logits or pooler output, last hidden state) of a torch model."""
    with torch.no_grad():
        out = model(**{k: torch.tensor(v) for k, v in batch.items()}, output_hidden_states=True)
    logits = out.get("logits", out.get("pooler_output"))
    return None if logits is None else logits.numpy(), out.hidden_states[-1].numpy()


def run(model, batch, lora=None):
    """``forward``, compiled with little optimisation: every random shape is a program that runs once."""
    lowered = jax.jit(partial(forward, model.graphdef)).lower(model.base, batch, lora=lora)
    return lowered.compile(compiler_options=QUICK)(model.base, batch, lora=lora)


def assert_equal_outputs(ours, torch_model, batch) -> None:
    """Our logits and hidden states are transformers', at every token that is not padding."""
    out = run(ours, batch)
    logits, hidden = torch_outputs(torch_model, batch)
    real = batch["attention_mask"] == 1
    assert np.abs(np.asarray(out.hidden) - hidden)[real].max() < TOLERANCE
    assert (logits is None) == (out.logits is None)
    if logits is not None:
        error = np.abs(np.asarray(out.logits) - logits)
        assert error[real].max() < TOLERANCE if error.ndim == 3 else error.max() < TOLERANCE


# ---- decoders


def switch(seed: int, i: int) -> bool:
    """The ``i``-th switch (of 7) of the ``seed``-th config: seeds 0 to 9 have each both ways, no two alike."""
    a, b, c, d = ((seed >> bit) & 1 for bit in range(4))
    return bool([a, b, c, a ^ b, a ^ c, b ^ c, a ^ b ^ c ^ d][i])


def decoder_sizes(rng: np.random.Generator, *, explicit_head_dim: bool = False, grouped: bool = True) -> dict:
    """Small odd sizes in the entries that most families share; with ``head_dim`` when it need not be hidden / heads."""
    kv_heads = int(rng.integers(1, 4))
    heads = kv_heads * int(rng.integers(1, 4)) if grouped else kv_heads
    head_dim = 2 * int(rng.integers(2, 6 if heads < 5 else 4))
    sizes = {
        "vocab_size": int(rng.integers(30, 80)),
        "hidden_size": heads * (int(rng.integers(3, 7)) if explicit_head_dim else head_dim),
        "num_hidden_layers": int(rng.integers(2, 4)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": int(rng.integers(5, 40)),
        "max_position_embeddings": int(rng.integers(16, 40)),
        "bos_token_id": 1,
        "eos_token_id": [2, [2, 3], None][rng.integers(3)],
        "pad_token_id": [None, 0, 2][rng.integers(3)],
    }
    return sizes | ({"head_dim": head_dim} if explicit_head_dim else {})


def rope_entries(rng: np.random.Generator, kinds=("default", "linear", "llama3", "yarn"), **more) -> dict:
    """A random ``rope_parameters``; the old context is short, so that a stretch shows within a few tokens."""
    kind = str(rng.choice(kinds))
    rope = {"rope_type": kind, "rope_theta": float(rng.choice([100.0, 10000.0])), **more}
    if kind != "default":
        rope["factor"] = float(rng.choice([2.0, 3.5]))
    if kind in ("llama3", "yarn"):
        rope["original_max_position_embeddings"] = int(rng.integers(6, 12))
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": float(rng.choice([2.0, 4.0]))}
    if kind == "yarn":
        rope |= [{}, {"attention_factor": 1.25, "truncate": False}, {"beta_fast": 4.0, "beta_slow": 0.5},
                 {"mscale": 0.7, "mscale_all_dim": 1.1}][rng.integers(4)]  # fmt: skip
    return rope


def torch_decoder(model_type: str, entries: dict, seed: int = 0, *, head: str = "lm"):
    """A torch language model whose every parameter is random, norms and biases too."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(model_type, initializer_range=0.2, init_std=0.2, **entries)
    auto = transformers.AutoModelForCausalLM if head == "lm" else transformers.AutoModel
    model = auto.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def decoder_batch(rng: np.random.Generator, vocab: int) -> dict[str, np.ndarray]:
    """Three texts in 11 columns: whole, padded behind, padded in front."""
    mask = np.ones((3, 11), np.int64)
    mask[1, 8:] = mask[2, :4] = 0
    return {"input_ids": rng.integers(0, vocab, mask.shape), "attention_mask": mask}


def torch_logits(model, batch) -> np.ndarray:
    """Logits (of a base model: hidden states), with positions counted over real tokens as ``generate`` does."""
    given = {k: torch.tensor(v) for k, v in batch.items()}
    if model.config.model_type != "bloom":  # it counts them itself
        given["position_ids"] = torch.tensor(np.maximum(batch["attention_mask"].cumsum(1) - 1, 0))
    with torch.no_grad():
        return model(**given)[0].numpy()


def assert_equal_decoders(ours, theirs, batch) -> None:
    """Our logits (of a base model: hidden states) are transformers', at every token that is not padding."""
    out = run(ours, batch)
    error = np.abs(np.asarray(out.hidden if out.logits is None else out.logits) - torch_logits(theirs, batch))
    assert error[batch["attention_mask"] == 1].max() < TOLERANCE


def check_decoder(model_type: str, entries: dict, seed: int, folder) -> None:
    """transformers' logits from its own files; and our export of what was loaded is those files again."""
    theirs = torch_decoder(model_type, entries, seed)
    theirs.save_pretrained(folder / "a")
    ours, report = load_checkpoint(folder / "a")
    assert (report.initialised, report.dropped) == ((), ())
    assert ours.num_params == sum(p.numel() for p in theirs.parameters())
    batch = decoder_batch(np.random.default_rng(seed), ours.config.vocab_size)
    assert_equal_decoders(ours, theirs, batch)
    report = export_hf(ours, folder / "b")
    assert report.padded == {} and report.why == () and report.params_before == report.params_after
    before, after = (load_file(folder / d / "model.safetensors") for d in "ab")
    assert before.keys() == after.keys()
    for key, value in before.items():
        np.testing.assert_array_equal(value, after[key], err_msg=key)
    assert load_checkpoint(folder / "b")[0].config == ours.config
    again = transformers.AutoModelForCausalLM.from_pretrained(folder / "b", attn_implementation="eager").eval()
    np.testing.assert_array_equal(torch_logits(again, batch), torch_logits(theirs, batch))
