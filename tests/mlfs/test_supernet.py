"""The training step: one compile, cheap, the same masked and sliced, and it learns."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mlfs_jax as mlfs
from mlfs_jax.distill import DistillConfig, init_projection
from mlfs_jax.errors import ConfigError
from mlfs_jax.model import abstract, forward
from mlfs_jax.slicing import slice_lora
from mlfs_jax.supernet import Supernet, gradient_weights, trainable_params
from tests.mlfs.tiny import tiny_batch, tiny_config, tiny_lora, tiny_model

DISTILL = DistillConfig(feature_dim=6)


def space(config):
    return mlfs.SubnetSpace.from_ratios(config, embed=(1, 0.5), width=(1, 0.5, 0.25), depth=(1, 2 / 3, 1 / 3))


def start(model, execution="sliced", learning_rate=1e-2):
    supernet = Supernet(model.config, DISTILL, optax.adam(learning_rate), execution)
    features = init_projection(jax.random.key(3), model.config.embed, DISTILL)
    return supernet, supernet.init({"lora": tiny_lora(model), "features": features})


def test_masked_and_sliced_steps_are_the_same_step():
    model = tiny_model()
    batch, subnets = tiny_batch(model.config), tuple(space(model.config).sample(jax.random.key(i)) for i in range(3))
    after = {}
    for execution in ("masked", "sliced"):
        supernet, state = start(model, execution)
        after[execution] = supernet.step(state, model.base, batch, subnets, 0.5)
    (masked, losses), (sliced, others) = after["masked"], after["sliced"]
    np.testing.assert_allclose(losses, others, rtol=1e-4)
    assert losses.shape == (4,)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), masked.params, sliced.params)


def test_one_compile_for_fifty_random_subnets():
    model = tiny_model()
    batch = tiny_batch(model.config)
    supernet, state = start(model, "masked")
    for i in range(50):
        state, _ = supernet.step(state, model.base, batch, (space(model.config).sample(jax.random.key(i)),), 0.0)
    assert supernet.masked_step._cache_size() == 1
    assert int(state.step) == 50


def test_sliced_compiles_once_for_each_width():
    model = tiny_model()
    batch, drawn = tiny_batch(model.config), space(model.config)
    supernet, state = start(model, "sliced")
    for subnet in drawn.subnets():  # 2 embed x 3 widths, each at 3 depths
        state, _ = supernet.step(state, model.base, batch, (subnet,), 0.0)
    maxnet_grads, add_subnet_grads, update = supernet._compiled
    assert (maxnet_grads._cache_size(), add_subnet_grads._cache_size(), update._cache_size()) == (1, 6, 1)


def test_lora_step_costs_at_most_2_3_forward_passes_and_no_gradient_of_the_base():
    """Counted by the compiler, layers unrolled, at the shapes of MiniLM (2 layers of it)."""
    config = tiny_config(vocab_size=99, embed=384, heads=12, head_dim=32, mlp=1536, layers=2, max_positions=64)
    batch = {
        **{n: jax.ShapeDtypeStruct((8, 64), jnp.int32) for n in ("input_ids", "attention_mask")},
        "labels": jax.ShapeDtypeStruct((8,), jnp.int32),
    }
    graphdef, base = abstract(config)
    model = mlfs.Model(config, graphdef, base)
    supernet = Supernet(config, DistillConfig(beta=0), optax.adam(1e-3), unroll=True)
    params = {"lora": jax.eval_shape(lambda: mlfs.init_lora(jax.random.key(0), model, rank=8, full=("head",)))}
    state = jax.eval_shape(supernet.init, params)

    def step(state, base, batch):
        grads, loss, _ = supernet._maxnet_grads(state.params, base, batch, 1.0, False)
        return state.apply_gradients(grads, supernet.optimizer), loss

    flops = lambda lowered: lowered.compile().cost_analysis()["flops"]  # noqa: E731
    once = jax.jit(partial(forward, graphdef, unroll=True)).lower(base, batch)
    assert flops(jax.jit(step).lower(state, base, batch)) <= 2.3 * flops(once)
    adapter = sum(x.size for x in jax.tree.leaves(params))
    moments = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
    assert moments == 2 * adapter  # Adam's two moments of the adapter, and of nothing else


def test_sandwich_rule():
    """The minnet, then random subnets, none twice and none of them the maxnet; widths only in stage 1."""
    drawn = space(tiny_config())
    maxnet_only, widths, depths = mlfs.paper_stages((1, 1, 1))
    assert maxnet_only.subnets(drawn, jax.random.key(0)) == ()
    for stage, choices in ((widths, drawn.at_full_depth()), (depths, drawn)):
        seen = [stage.subnets(drawn, jax.random.key(i)) for i in range(20)]
        assert seen == [stage.subnets(drawn, jax.random.key(i)) for i in range(20)]
        smallest = [choices.minnet] if stage is widths else [choices.minnet, drawn.at_full_depth().minnet]
        for subnets in seen:
            others = subnets[len(smallest) :]
            assert list(subnets[: len(smallest)]) == smallest
            assert len(others) == 2 and len({choices.maxnet, *subnets}) == 1 + len(subnets)
            assert all(choices.check(subnet) == subnet for subnet in others)
        keys = jax.vmap(jax.random.key)(np.arange(20))
        assert seen == [stage.subnets(drawn, seeds) for seeds in stage.seeds(keys)]  # made beforehand
    few = mlfs.SubnetSpace(tiny_config(), depth=(3, 2))
    assert depths.subnets(few, jax.random.key(0)) == (few.minnet,)
    assert widths.subnets(few, jax.random.key(0)) == ()  # at full depth there is the maxnet alone


def test_settings_of_all_stages_or_of_each():
    stages = mlfs.paper_stages((5, 4, 3), learning_rate=(1e-3, 1e-3, 3e-4), rank=6, random_subnets=(0, 0, 1))
    assert [(s.sample, s.steps, s.learning_rate, s.rank, s.random_subnets) for s in stages] == [
        ("maxnet", 5, 1e-3, 6, 0),
        ("width", 4, 1e-3, 6, 0),
        ("width-depth", 3, 3e-4, 6, 1),
    ]
    with pytest.raises(ConfigError, match=r"rank = \(4, 8\) for 3 stages: expected one number, or one for each"):
        mlfs.paper_stages((1, 1, 1), rank=(4, 8))


def test_gradient_weights():
    np.testing.assert_allclose(gradient_weights([300, 100, 50], 1e4), [0, 0, 3])  # no power of it overflows
    np.testing.assert_allclose(gradient_weights([100, 50, 10], 0.0), [1, 1, 1])
    w = gradient_weights([100, 50, 10], 0.5)
    assert sum(w) == pytest.approx(3) and w[0] < w[1] < w[2]
    assert w[2] / w[0] == pytest.approx(10**0.5)


def test_trainable_parameters_of_a_slice_are_those_of_its_adapter():
    model = tiny_model()
    pair = mlfs.init_lora(jax.random.key(0), model, rank=3, sites=["layers.up"])
    shapes = tuple((site, leaf, x.shape) for site, entry in pair.items() for leaf, x in entry.items())
    assert trainable_params(model.config, space(model.config).maxnet, shapes) == 3 * 3 * (24 + 20)
    subnet = mlfs.Subnet(12, (4, 4), (7, 5), (0, 2))
    assert trainable_params(model.config, subnet, shapes) == 3 * (12 + 7) + 3 * (12 + 5)


@pytest.mark.parametrize("divergence", ["kl", "reverse-kl", "jsd"])
def test_a_small_subnet_learns_to_follow_the_maxnet(divergence):
    model = tiny_model()
    batch, minnet = tiny_batch(model.config, batch=8), space(model.config).minnet
    supernet = Supernet(model.config, DistillConfig(feature_dim=6, divergence=divergence), optax.adam(1e-2), "masked")
    _, state = start(model)
    losses = []
    for _ in range(60):
        state, step_losses = supernet.step(state, model.base, batch, (minnet,), 0.0)
        losses.append(np.asarray(step_losses))
    assert losses[-1][0] < 0.5 * losses[0][0]
    assert losses[-1][1] < 0.5 * losses[0][1]


@pytest.mark.parametrize("execution", ["masked", "sliced"])
def test_a_step_descends_the_weighted_sum_of_the_losses(execution):
    """MLFS's loss of the maxnet and of two subnets, written out: (1 - alpha) CE + alpha tau^2 KL, weighed by size."""
    model, alpha, tau, gamma = tiny_model(), 0.3, 2.0, 0.7
    batch, lora, config = tiny_batch(model.config), tiny_lora(model), model.config
    subnets = space(config).minnet, space(config).sample(jax.random.key(1))
    supernet = Supernet(config, DistillConfig(alpha=alpha, tau=tau, beta=0), optax.sgd(1.0), execution)
    cut = [slice_lora(config, model.base, lora, subnet) for subnet in (space(config).maxnet, *subnets)]
    sizes = [sum(x.size for x in jax.tree.leaves(one)) for one in cut]
    weights = np.array([(sizes[0] / n) ** gamma for n in sizes])
    weights *= len(weights) / weights.sum()

    def total(lora):
        def cross_entropy(logits):
            return -jax.nn.log_softmax(logits)[np.arange(3), batch["labels"]].mean()

        teacher = forward(model.graphdef, model.base, batch, lora=lora).logits
        losses, p = [cross_entropy(teacher)], jax.nn.softmax(jax.lax.stop_gradient(teacher) / tau)
        for subnet in subnets:
            mask = mlfs.make_mask(config, subnet)
            logits = forward(model.graphdef, model.base, batch, lora=lora, mask=mask).logits
            kl = (p * (jnp.log(p) - jax.nn.log_softmax(logits / tau))).sum(-1).mean()
            losses.append((1 - alpha) * cross_entropy(logits) + alpha * tau**2 * kl)
        return weights @ jnp.stack(losses), jnp.stack(losses)

    (_, losses), grads = jax.value_and_grad(total, has_aux=True)(lora)
    state, found = supernet.step(supernet.init({"lora": tiny_lora(model)}), model.base, batch, subnets, gamma)
    np.testing.assert_allclose(found, losses, rtol=1e-4)
    expected = jax.tree.map(lambda x, g: x - g, lora, grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state.params["lora"], expected)


def test_alpha_zero_and_beta_zero_is_plain_fine_tuning_of_the_slice():
    model = tiny_model()
    batch, minnet = tiny_batch(model.config), space(model.config).minnet
    supernet = Supernet(model.config, DistillConfig(alpha=0, beta=0), optax.sgd(0.0))
    small = mlfs.slice_subnet(model, minnet, lora=tiny_lora(model))
    _, losses = supernet.step(supernet.init({"lora": tiny_lora(model)}), model.base, batch, (minnet,), 0.0)
    logp = jax.nn.log_softmax(forward(small.graphdef, small.base, batch).logits)
    np.testing.assert_allclose(losses[1], -logp[np.arange(3), batch["labels"]].mean(), rtol=1e-4)


def test_regression_step():
    model = tiny_model(labels=1, problem="regression")
    batch = tiny_batch(model.config) | {"labels": jnp.asarray([0.5, -1.0, 2.0])}
    supernet, state = start(model)
    _, losses = supernet.step(state, model.base, batch, (space(model.config).minnet,), 0.0)
    assert np.isfinite(losses).all() and (losses > 0).all()


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match="'mlm' head"):
        Supernet(tiny_config(head="mlm"), DISTILL, optax.sgd(1.0))
    for rate in (float("nan"), float("inf"), 0.0):
        with pytest.raises(ConfigError, match="positive, finite learning_rate"):
            mlfs.paper_stages((1,), rate)
