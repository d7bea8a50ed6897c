"""What the tests of ``mlfs_jax.hf`` share: small random torch models, and the two logits to compare."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)

from mlfs_jax import forward  # noqa: E402
from mlfs_jax.hf.families import FAMILIES  # noqa: E402

TOLERANCE = 1e-4
NAMES = tuple(FAMILIES)
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
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    lowered = forward.lower(model.graphdef, model.base, batch, lora=lora)
    return lowered.compile(compiler_options=quick)(model.base, batch, lora=lora)


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
