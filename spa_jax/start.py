"""Where a side network starts: random, or cut out of the backbone by importance.

LST (arXiv 2206.06522, section 3.3) starts its side blocks as a structural slice of the backbone, chosen by Fisher
information. [ours] The importance of :mod:`mlfs_jax.importance` chooses: its best channels, heads and neurons of every
tapped layer; Down selects the same channels, so that the side network reads the part of the residual stream that its
blocks come from.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from mlfs_jax.backbone.tree import flatten
from mlfs_jax.config import DecoderConfig
from mlfs_jax.errors import ConfigError
from mlfs_jax.hosts import to_host
from mlfs_jax.importance import Importance
from mlfs_jax.model import Model, as_key
from spa_jax.gate import init_gate
from spa_jax.seam import Setting
from spa_jax.side import Side, SideConfig, abstract_net, block_config


def init_side(
    key: int | Array,
    backbone: DecoderConfig,
    config: SideConfig | None = None,
    *,
    setting: str = "spa",
    model: Model | None = None,
    importance: Importance | None = None,
) -> Side:
    """A side network and its gate, ready to train.

    Where g is added to f (S1, SPA), Up starts at zero, so that nothing has changed yet. Where g stands alone (S2, S3),
    a sliced start gives each channel back to where it came from.

    Args:
        backbone: shape of the model beside it.
        setting: one of "s1", "s2", "s3", "spa".
        model: to cut a ladder out of its weights, by ``importance``; None: a random start.
        importance: of the model; with ``model``, or neither.

    Raises:
        ConfigError: the config does not fit the backbone; a slice is asked of a plugin, which has no such blocks.
    """
    key, setting, config = as_key(key), Setting.parse(setting), (config or SideConfig()).resolve(backbone)
    if (model is None) != (importance is None):
        raise ConfigError("a sliced start needs both the model and its importance; give both, or neither.")
    net = _random_net(key, config, backbone)
    if importance is not None:
        if config.ladder == "plugin":
            raise ConfigError("a plugin has no blocks like the backbone's; a sliced start is for ladders.")
        net |= slice_backbone(model, config, importance)
    if not setting.adds:
        if importance is not None:
            net["up.kernel"] = jnp.swapaxes(net["down.kernel"][-1], 0, 1)
        else:
            shape = net["up.kernel"].shape
            net["up.kernel"] = shape[0] ** -0.5 * jax.random.normal(jax.random.fold_in(key, len(net)), shape)
    return Side(net, init_gate(backbone.embed) if setting.gated else {}, config, backbone)


@partial(jax.jit, static_argnames=("config", "backbone"))
def _random_net(key: Array, config: SideConfig, backbone: DecoderConfig) -> dict[str, Array]:
    """Kernels ~ N(0, 1/in) but for Up, which is zero; scales one; biases, and the ladders' alphas, zero."""
    weights, net = flatten(abstract_net(config, backbone)[1]), {}
    random = [name for name in weights if name.endswith("kernel") and name != "up.kernel"]
    ends = np.cumsum([math.prod(weights[name].shape) for name in random])
    drawn = jnp.split(jax.random.normal(key, (ends[-1],)), ends[:-1])  # at once: many draws are slow to compile
    for name, leaf in weights.items():
        if name in random:
            stacked = leaf.axes[0] in ("layers", "taps")
            fan_in = math.prod(leaf.shape[stacked : stacked + leaf.inputs])
            net[name] = fan_in**-0.5 * drawn[random.index(name)].reshape(leaf.shape)
        else:
            value = 1.0 - backbone.norm_offset if name.endswith("scale") else 0.0
            net[name] = jnp.full(leaf.shape, value, jnp.float32)  # no weak type: a step would compile three times
    return net


def slice_backbone(model: Model, config: SideConfig, importance: Importance) -> dict[str, Array]:
    """The most important part of every tapped layer as side blocks, the Downs that select its channels, the norm."""
    backbone = model.decoder
    keep = best_units(config, backbone, importance)
    blocks = block_config(config, backbone)
    cut = {}
    for name, leaf in flatten(model.base).items():
        if name.startswith("layers.") or name.startswith("norm."):
            cut[name] = jnp.asarray(_take(to_host(leaf[...]).astype(np.float32, copy=False), leaf.axes, keep))
    select = np.zeros((backbone.embed, config.width), np.float32)
    select[keep["embed"], np.arange(config.width)] = 1
    cut["down.kernel"] = jnp.broadcast_to(jnp.asarray(select), (blocks.layers + 1, *select.shape))
    return cut


def best_units(
    config: SideConfig, backbone: DecoderConfig, importance: Importance
) -> dict[str, Int[np.ndarray, "..."]]:
    """What a slice keeps, as indices: ``layers`` [n], ``embed`` [d], ``heads``, ``kv_heads`` and ``mlp`` [n, ...].

    Heads that share a key-value head are chosen by their sum, then the best within it. ALiBi heads stay the first
    ones: their slope comes from their place.
    """
    blocks = block_config(config, backbone)
    layers = np.asarray(Side({}, {}, config, backbone).tapped)
    best = lambda scores, k: np.sort(np.argsort(-scores, axis=-1, kind="stable")[..., :k], axis=-1)  # noqa: E731
    K, group, each = backbone.kv_heads, backbone.heads // backbone.kv_heads, blocks.heads // blocks.kv_heads
    scores = importance.heads[layers].reshape(len(layers), K, group)
    if backbone.positions == "alibi":
        scores = np.broadcast_to(-np.arange(K * group, dtype=np.float64).reshape(K, group), scores.shape)
    kv_heads = best(scores.sum(-1), blocks.kv_heads)
    within = best(np.take_along_axis(scores, kv_heads[..., None], 1), each)
    return {
        "layers": layers,
        "embed": best(importance.embed, config.width),
        "heads": (kv_heads[..., None] * group + within).reshape(len(layers), -1),
        "kv_heads": kv_heads,
        "mlp": best(importance.mlp[layers], config.mlp),
    }


def _take(x: np.ndarray, axes: tuple[str, ...], keep: dict) -> np.ndarray:
    for position, axis in enumerate(axes):
        if axis in ("layers", "embed"):
            x = np.take(x, keep[axis], axis=position)
        elif axis in keep:  # one choice for each layer; the layer axis leads
            shape = [1] * x.ndim
            shape[0], shape[position] = keep[axis].shape
            x = np.take_along_axis(x, keep[axis].reshape(shape), axis=position)
    return x
