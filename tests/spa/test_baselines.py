"""Baselines: adapters change nothing at first, count what they should, learn, and come back from their folders."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import mlfs_jax as mlfs
from mlfs_jax import distill
from mlfs_jax.backbone.quantised import Quantised
from mlfs_jax.backbone.tree import flatten
from mlfs_jax.data.batches import eval_batches
from mlfs_jax.data.tokenizer import load_tokenizer
from mlfs_jax.errors import ConfigError, RunError
from mlfs_jax.lora import init_lora
from mlfs_jax.model import forward
from mlfs_jax.vocab import Hidden, lm_loss
from spa_jax.adapters import adapted, count_adapters, init_adapters
from spa_jax.baselines import (
    BaselineConfig,
    _loss,
    budget,
    fit_baseline,
    init_params,
    load_baseline,
    one_shot_prefix,
    shared_model,
)
from spa_jax.config import FitConfig
from spa_jax.evaluate import evaluate_baseline
from tests.mlfs.tiny import tiny_decoder, tiny_tokens

QUIET = Console(quiet=True)


@pytest.fixture
def config(tiny_lm, echo_task):
    return BaselineConfig(
        "lora", str(tiny_lm), str(echo_task), steps=40, learning_rate=1e-2, max_length=16, buckets=(16,), save_every=20
    )


@pytest.mark.parametrize("kind", ["houlsby", "parallel"])
def test_adapters(kind):
    model, batch = tiny_decoder(), tiny_tokens(tiny_decoder().config)
    params = init_adapters(jax.random.key(0), model.config, kind, 5)
    assert sum(x.size for x in params.values()) == count_adapters(model.config, kind, 5)
    fresh, base = adapted(model, kind, params), forward(model.graphdef, model.base, batch).logits
    np.testing.assert_array_equal(forward(fresh.graphdef, fresh.base, batch).logits, base)
    # one block by hand: what the adapter adds is Up(act(Down(...))) of the right place
    rng = np.random.default_rng(0)
    noisy = {name: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32) for name, x in params.items()}
    tuned = adapted(model, kind, noisy)
    assert np.abs(forward(tuned.graphdef, tuned.base, batch).logits - base).max() > 0.01

    def loss(params):
        tuned = adapted(model, kind, params)
        hidden = forward(tuned.graphdef, tuned.base, batch, logits=False).hidden
        return lm_loss(Hidden(tuned.graphdef, tuned.base, hidden), batch)

    assert not [name for name, g in jax.grad(loss)(noisy).items() if not np.abs(g).max() > 0]


def test_a_parallel_adapter_counts_four_times():
    """MAM, section 4.4. With biases alone an adapter adds a constant, wherever it reads."""
    model, logits = tiny_decoder(), {}
    for kind, size in (("houlsby", 0.4), ("parallel", 0.1)):
        params = init_adapters(jax.random.key(0), model.config, kind, 5)
        bias = np.random.default_rng(0).normal(0, size, params["layers.mlp_adapter.up.bias"].shape)
        tuned = adapted(model, kind, params | {"layers.mlp_adapter.up.bias": jnp.asarray(bias, jnp.float32)})
        logits[kind] = forward(tuned.graphdef, tuned.base, tiny_tokens(model.config)).logits
    np.testing.assert_allclose(logits["parallel"], logits["houlsby"], atol=1e-5)


def test_all_train_about_as_much(config):
    model = tiny_decoder(embed=64, mlp=128)
    wanted = budget(config, model)
    for method in ("lora", "adapter", "parallel-adapter"):
        params = init_params(dataclasses.replace(config, method=method), model)
        assert sum(x.size for x in jax.tree.leaves(params)) == pytest.approx(wanted, rel=0.35)
    rank_one = sum(x.size for x in jax.tree.leaves(init_lora(jax.random.key(0), model, rank=1)))
    lora = init_params(dataclasses.replace(config, params=3 * rank_one), model)
    assert lora["layers.q"]["a"].shape[-1] == 3


def test_lst_learns_as_a_side_network_does(config):
    """Its rate is its own also where a command line has made a config of another method first."""
    lst = dataclasses.replace(BaselineConfig("lora", config.model, config.task), method="lst")
    assert lst.fit_config.learning_rate == FitConfig(config.model, config.task, "s3").learning_rate == 2e-3
    assert BaselineConfig("lora", config.model, config.task).peak == 1e-3
    with pytest.raises(ConfigError, match="unique = 5, repeats = 3: these are of method 'shared'"):
        dataclasses.replace(lst, unique=5)
    for method in ("lst", "shared", "one-shot", "zero-shot"):
        with pytest.raises(ConfigError, match=f"method = '{method}', params = 9: only LoRA and adapters"):
            BaselineConfig(method, config.model, config.task, params=9)


def test_shared_layers_are_one_set_of_weights(config):
    model = tiny_decoder()
    config = dataclasses.replace(config, method="shared", unique=2, repeats=2)
    params = init_params(config, model)
    small = shared_model(config, model, params)
    assert small.config.layers == 4
    up = small.base["layers"]["up"]["kernel"][...]
    np.testing.assert_array_equal(up[0], up[1])
    np.testing.assert_array_equal(up[2], model.base["layers"]["up"]["kernel"][...][2])
    assert np.isfinite(forward(small.graphdef, small.base, tiny_tokens(model.config)).logits).all()


def test_shared_layers_learn_from_the_base(config):
    """Half cross-entropy, half KL(base || small), over the tokens that count."""
    model = tiny_decoder()
    config, batch = dataclasses.replace(config, method="shared", repeats=2), tiny_tokens(model.config)
    params = init_params(config, model)
    small = shared_model(config, model, params)
    ours, teacher = (forward(m.graphdef, m.base, batch).logits[:, :-1] for m in (small, model))
    counts, labels = batch["loss_mask"][:, 1:], batch["input_ids"][:, 1:, None]
    picked = jnp.take_along_axis(jax.nn.log_softmax(ours), labels, -1)[..., 0]
    kl = distill.kl(teacher, ours, mlfs.DistillConfig().tau)
    expected = (counts * (0.5 * kl - 0.5 * picked)).sum() / counts.sum()
    np.testing.assert_allclose(_loss(config, model, params, model.base, batch), expected, rtol=1e-4)


def test_a_quantised_base_is_trained_beside(config, tmp_path, tiny_lm):
    """QLoRA: the pairs learn beside a 4-bit base; a parallel adapter stands in it, and it stays in 4 bits."""
    config = dataclasses.replace(config, base_bits=4, steps=2)
    for method, kept in (("lora", False), ("parallel-adapter", True)):
        found = fit_baseline(dataclasses.replace(config, method=method), tmp_path / method, console=QUIET)
        again = load_baseline(tmp_path / method)
        for model in (found.model, again.model):
            kernel = flatten(model.base)["layers.q.kernel"].get_value()
            assert isinstance(kernel, Quantised) == kept
        np.testing.assert_array_equal(flatten(again.model.base)["layers.q.kernel"][...], kernel[...])


def test_baselines_learn_and_come_back(config, tmp_path, tiny_lm):
    def loss(model, data):
        batch = eval_batches(data, 32, buckets=(16,))[0]
        batch.pop("weight")
        hidden = forward(model.graphdef, model.base, batch, logits=False).hidden
        return float(lm_loss(Hidden(model.graphdef, model.base, hidden), batch))

    zero = fit_baseline(dataclasses.replace(config, method="zero-shot"), tmp_path / "zero", console=QUIET)
    test = config.fit_config.load_data(config.fit_config.get_task(), zero.model)["test"]
    before = loss(zero.model, test)
    for method in ("lora", "parallel-adapter", "shared"):
        found = fit_baseline(dataclasses.replace(config, method=method), tmp_path / method, console=QUIET)
        assert found.params > 0 and loss(found.model, test) < before - 0.2, method
    opened = load_baseline(tmp_path / "parallel-adapter")
    same = fit_baseline(opened.config, tmp_path / "parallel-adapter", console=QUIET)  # finished: left as it is
    for a, b in zip(jax.tree.leaves(opened.model.base), jax.tree.leaves(same.model.base), strict=True):
        np.testing.assert_array_equal(a, b)
    scores = evaluate_baseline(zero, test.subset(8), batch_size=8)
    assert {*scores} == {"rouge1", "rouge2", "rougeL", "tokens"} and scores["tokens"] > 0


def test_one_shot_puts_an_example_before_the_prompt(config, tmp_path):
    one = fit_baseline(dataclasses.replace(config, method="one-shot"), tmp_path / "one", console=QUIET)
    train = config.fit_config.load_data(config.fit_config.get_task(), one.model)["train"]
    tokenizer = load_tokenizer(one.model.source)
    examples = [tokenizer.decode(train.ids[a:b].tolist()) for a, b in itertools.pairwise(train.offsets)]
    shown = tokenizer.decode(list(one.prefix), skip_special_tokens=False)
    assert shown.strip() in {text.strip() for text in examples}  # a whole example, and no end of text behind it
    assert not {*one.prefix} & {*one.model.decoder.eos_token_ids, 2}
    assert one.one_line  # no completion of the task has a line break
    assert load_baseline(tmp_path / "one").prefix == one.prefix
    with pytest.raises(RunError, match="method"):
        fit_baseline(dataclasses.replace(config, method="zero-shot"), tmp_path / "one", console=QUIET)
    data = config.fit_config.load_data(config.fit_config.get_task(), one.model)
    needed = max(part.starts.max() + part.max_completion for part in data.values())
    assert len(one_shot_prefix(data, tokenizer, needed + len(one.prefix) - 1)) < len(one.prefix)
    with pytest.raises(ConfigError, match=rf"{needed} positions, of which .* take {needed}: no example fits"):
        one_shot_prefix(data, tokenizer, needed)


def test_runs_of_old_and_damaged_ones(config, tmp_path):
    """A run from before base_bits goes on; a cut file and a strange field are said."""
    config = dataclasses.replace(config, steps=2)
    run = tmp_path / "run"
    fit_baseline(config, run, console=QUIET)
    info = json.loads((run / "run.json").read_text())
    assert "base_bits" not in info["config"]
    (run / "run.json").write_text(json.dumps(info | {"config": info["config"] | {"rungs": 3}}))
    with pytest.raises(RunError, match=r"no run of spa baseline that this version reads .*rungs"):
        load_baseline(run)
    (run / "run.json").write_text(json.dumps(info))
    (run / "weights.safetensors").write_bytes((run / "weights.safetensors").read_bytes()[:100])
    with pytest.raises(RunError, match=r"weights\.safetensors is damaged"):
        load_baseline(run)


def test_mistakes(config, tmp_path):
    for message, changes in {
        "method = 'ia3'": {"method": "ia3"},
        "base_bits = 5": {"base_bits": 5},
        "params = 0": {"params": 0},
        "steps = 0": {"steps": 0},
    }.items():
        with pytest.raises(ConfigError, match=message):
            dataclasses.replace(config, **changes)
    with pytest.raises(ConfigError, match="setting 's3'"):
        fit_baseline(dataclasses.replace(config, method="lst"), tmp_path / "lst", console=QUIET)
    assert dataclasses.replace(config, method="lst").fit_config.setting == "s3"
