"""SmolLM2-135M from its GGUF file: what loading costs; transformers computes the same. Skipped where not fetched."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlfs_jax.backbone.tree import flatten
from mlfs_jax.data import get_task, load_tokenizer
from mlfs_jax.hf.gguf import gguf_in
from mlfs_jax.hf.load import from_pretrained
from mlfs_jax.hf.table import to_theirs
from mlfs_jax.model import forward
from mlfs_jax.registry import get_entry, is_whole
from tests.mlfs.gguf_files import TEXTS

ENTRY = get_entry("smollm2-135m")
pytestmark = [
    pytest.mark.skipif(not is_whole(ENTRY.cached, ENTRY), reason="`mlfs fetch smollm2-135m` gets the file"),
    pytest.mark.skipif(not is_whole(get_entry("wiki").cached, get_entry("wiki")), reason="`mlfs fetch wiki`"),
]
MODULES = {
    "embed.tokens": "model.embed_tokens",
    "norm": "model.norm",
    "layers.attn_norm": "model.layers.{}.input_layernorm",
    "layers.mlp_norm": "model.layers.{}.post_attention_layernorm",
    **{f"layers.{name}": f"model.layers.{{}}.self_attn.{name}_proj" for name in "qkvo"},
    **{f"layers.{name}": f"model.layers.{{}}.mlp.{name}_proj" for name in ("gate", "up", "down")},
}


@pytest.fixture(scope="module")
def model():
    return from_pretrained("smollm2-135m")


@pytest.fixture(scope="module")
def leads():
    return get_task("wiki-lm").read()["test"].texts


def test_cost_of_loading():
    """1.2 GB at the peak, in float32, with all imports; time is the process's own, whatever else runs."""
    code = (
        "import pathlib, time, jax, mlfs_jax; model = mlfs_jax.from_pretrained('smollm2-135m');"
        "jax.block_until_ready(model.base);"  # VmHWM and not ru_maxrss, which also remembers the parent's peak
        "status = dict(line.split(':', 1) for line in pathlib.Path('/proc/self/status').read_text().splitlines());"
        "print(time.process_time(), status['VmHWM'].split()[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, kilobytes = map(float, done.stdout.split())
    assert kilobytes < 1.2e6
    assert seconds < 12, "4 to 5 on the machine it was written on"


def test_what_it_is(model):
    config = model.config
    assert model.num_params == 134_515_008
    assert (config.family, config.layers, config.embed, config.mlp, config.vocab_size) == (
        "llama",
        30,
        576,
        1536,
        49152,
    )
    assert (config.heads, config.kv_heads, config.head_dim, config.tied) == (9, 3, 64, True)
    assert (config.rope.theta, config.norm_eps, config.max_positions) == (1e5, 1e-5, 8192)
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (1, (2,), 2)
    said = json.loads((model.source / "tokenizer_config.json").read_text())
    assert "You are a helpful AI assistant named SmolLM" in said["chat_template"]


def test_tokenizer(model, leads):
    """Texts come back whole, numbers are cut into digits, and transformers reads the same from the prepared folder."""
    from transformers import AutoTokenizer

    ours, again = load_tokenizer(model.source), AutoTokenizer.from_pretrained(model.source)
    texts = hard_texts(leads)
    encodings = ours.encode_batch(texts)
    assert [ours.decode(encoding.ids, skip_special_tokens=False) for encoding in encodings] == texts
    assert again(texts).input_ids == [encoding.ids for encoding in encodings]
    assert ours.encode("1234½").tokens[:4] == list("1234")
    chat = again.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
    assert chat.endswith("<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.slow
def test_tokenizer_is_transformers(model, leads):
    """Its own conversion does not cut numbers into digits, as SmolLM does: on texts without numbers."""
    from transformers import AutoTokenizer

    ours, file = load_tokenizer(model.source), gguf_in(ENTRY.cached)
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    texts = [text for text in hard_texts(leads) if not any(c.isnumeric() for c in text)]
    assert len(texts) > 50
    assert theirs(texts, add_special_tokens=False).input_ids == [e.ids for e in ours.encode_batch(texts)]


def hard_texts(leads):
    more = ["<|im_start|>user\nhi<|im_end|>\n", "\x00\x01\x7f", " \u2003\u2028\ufeff", "😀👩‍👩‍👧‍👦🏳️‍🌈"]
    return [*TEXTS, *more, *leads[:200]]


def test_transformers_computes_the_same(model, leads, monkeypatch):
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "_init_weights", lambda self, module: None)  # all are replaced
    theirs = LlamaForCausalLM(AutoConfig.from_pretrained(model.source)).eval()
    state = {}
    for name, leaf in flatten(model.base).items():
        module = MODULES[name.rpartition(".")[0]]
        for i, weight in enumerate(to_theirs(name, leaf.axes, np.asarray(leaf[...]))):
            state[f"{module.format(i)}.weight"] = torch.from_numpy(weight.copy())
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # tied

    tokenizer = load_tokenizer(model.source)
    rows = [tokenizer.encode(text).ids[:64] for text in leads[:8]]
    width = max(map(len, rows))
    ids = np.array([row + [0] * (width - len(row)) for row in rows])
    real = np.array([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    ours = forward(model.graphdef, model.base, {"input_ids": ids, "attention_mask": real}).logits
    with torch.no_grad():
        logits = theirs(torch.from_numpy(ids), attention_mask=torch.from_numpy(real)).logits.numpy()
    apart = np.abs(np.asarray(ours) - logits)[real == 1].max()
    assert apart < 1e-5 * np.abs(logits[real == 1]).max()

    def perplexity(logits):
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], -1)[..., 0]
        return float(jnp.exp(-(logp * real[:, 1:]).sum() / real[:, 1:].sum()))

    assert perplexity(ours) == pytest.approx(perplexity(jnp.asarray(logits)), rel=1e-5)
    assert f"{perplexity(ours):.4g}" == f"{perplexity(jnp.asarray(logits)):.4g}"
