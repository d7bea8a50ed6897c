"""Which heads, neurons, channels and layers matter, and reordering so that "the first k" are "the best k".

The score of a unit is the sum over its weights of |w * dLoss/dw|, the first-order change of the loss if the weight were
zeroed (Molchanov et al. 2017; DynaBERT, arXiv 2004.04037, section 2.1), accumulated over batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from mlfs_jax.backbone.quantised import dequantised
from mlfs_jax.backbone.tree import flatten, map_named
from mlfs_jax.config import Config
from mlfs_jax.errors import DataError
from mlfs_jax.hosts import to_host
from mlfs_jax.lora import Lora, lora_axes
from mlfs_jax.model import Model, forward
from mlfs_jax.sharding import base_shardings, beside, mesh_of
from mlfs_jax.subnet import kv_group


@dataclass(frozen=True)
class Importance:
    """Scores, larger is more important: ``embed`` [D], ``heads`` [L, N], ``mlp`` [L, F], ``layers`` [L]."""

    embed: Float[np.ndarray, " D"]
    heads: Float[np.ndarray, "L N"]
    mlp: Float[np.ndarray, "L F"]
    layers: Float[np.ndarray, " L"]


AXES = ("embed", "heads", "mlp", "layers")


@partial(jax.tree_util.register_dataclass, data_fields=AXES, meta_fields=[])
@dataclass(frozen=True)
class Order:
    """Every elastic axis, most important first; ``order.mlp[l, i]`` is the old index of the new i-th neuron of layer l.

    Reordering moves channels, heads and neurons. Layers stay where they are: ``layers`` only ranks them, for
    ``SubnetSpace.layer_order``.
    """

    embed: Int[np.ndarray, " D"]
    heads: Int[np.ndarray, "L N"]
    mlp: Int[np.ndarray, "L F"]
    layers: Int[np.ndarray, " L"]

    def inverse(self) -> Order:
        """The order that undoes the move of this one."""
        embed, heads, mlp = (np.argsort(axis, axis=-1) for axis in (self.embed, self.heads, self.mlp))
        return Order(embed, heads, mlp, self.layers)

    def to_json(self) -> dict[str, list]:
        return {axis: getattr(self, axis).tolist() for axis in AXES}

    @classmethod
    def from_json(cls, saved: Mapping[str, list]) -> Order:
        """What :meth:`to_json` gave; raises KeyError, TypeError or ValueError for something else."""
        return cls(*(np.asarray(saved[axis], np.int32) for axis in AXES))


def measure_importance(
    model: Model, batches: Iterable[Mapping], loss: Callable[[nnx.State, Mapping], Array]
) -> Importance:
    """Accumulate |w * dLoss/dw| over batches.

    Args:
        model: with its adapters merged, so that what is scored is what will be sliced; a quantised base is scored as
            the weights that it stands for.
        loss: ``loss(base, batch) -> scalar``; the one place where the base is differentiated.
    """

    @jax.jit
    def scores(base, batch):
        grads = flatten(jax.grad(loss)(base, batch))
        totals = dict.fromkeys((*AXES, "kv_heads"), 0.0)
        for name, leaf in flatten(base).items():
            salience = jnp.abs(leaf[...].astype(jnp.float32) * grads[name][...])  # summed over many: not in bfloat16
            for position, axis in enumerate(leaf.axes):
                if axis in totals:  # scores are [axis] for embed and layers, [layers, axis] for the others
                    held = {position} if axis == "embed" else {0, position}
                    totals[axis] += salience.sum([i for i in range(salience.ndim) if i not in held])
        shared = jnp.asarray(totals.pop("kv_heads"))  # a key-value head counts for the query heads that share it
        if shared.ndim:
            group = totals["heads"].shape[1] // shared.shape[1]
            totals["heads"] += jnp.repeat(shared / group, group, 1)
        return totals

    total, base = None, dequantised(model.base)
    for batch in batches:
        new = jax.tree.map(lambda x: to_host(x).astype(np.float32), scores(base, beside(base, batch)))
        total = new if total is None else jax.tree.map(np.add, total, new)
    if total is None:
        raise DataError("no batches: expected at least one to measure the importance on.")
    return Importance(**total)


def importance_order(importance: Importance, config: Config) -> Order:
    """Most important first along every axis; ties keep their place.

    Query heads that share a key-value head move as one group, by their sum. ALiBi heads stay where they are: their
    slope comes from their place.
    """
    first = lambda scores: np.argsort(-scores, axis=-1, kind="stable").astype(np.int32)  # noqa: E731
    order: dict[str, np.ndarray] = {axis: first(getattr(importance, axis)) for axis in AXES}
    L, N = importance.heads.shape
    if getattr(config, "alibi_heads", 0):
        order["heads"] = np.broadcast_to(np.arange(N, dtype=np.int32), (L, N))
    elif (group := kv_group(config)) > 1:
        groups = first(importance.heads.reshape(L, N // group, group).sum(-1))
        order["heads"] = (groups[..., None] * group + np.arange(group, dtype=np.int32)).reshape(L, N)
    return Order(**order)


def block_influence(model: Model, batches: Iterable[Mapping]) -> Float[np.ndarray, " L"]:
    """1 - cos(input, output) of every layer, averaged over tokens (ShortGPT, arXiv 2403.03853, eq. 1).

    A layer that hardly turns the residual stream can go.
    """

    @jax.jit
    def influence(base, batch):
        out = forward(model.graphdef, base, batch, taps=True, logits=False)
        stream = jnp.concatenate([out.embedded[None], out.taps]).astype(jnp.float32)
        before, after = stream[:-1], stream[1:]
        norms = jnp.linalg.norm(before, axis=-1) * jnp.linalg.norm(after, axis=-1)
        real = batch["attention_mask"].astype(jnp.float32)
        turned = 1 - (before * after).sum(-1) / jnp.maximum(norms, 1e-9)
        return (turned * real).sum((1, 2)), real.sum()

    found = [jax.tree.map(to_host, influence(model.base, beside(model.base, batch))) for batch in batches]
    turned, tokens = (sum(column) for column in zip(*found, strict=True))
    return turned / tokens


def _permute(x, axes: tuple[str, ...], order: Order):
    for position, axis in enumerate(axes):
        if axis == "embed":
            x = jnp.take(x, order.embed, axis=position)
        elif axis in ("heads", "kv_heads", "mlp"):  # one permutation per layer; the layer axis leads
            index = order.mlp if axis == "mlp" else order.heads
            if axis == "kv_heads":  # the heads of a group lie together: its first one says which group it is
                group = index.shape[1] // x.shape[position]
                index = index[:, ::group] // group
            index = index.reshape([s if i in (0, position) else 1 for i, s in enumerate(x.shape)])
            x = jnp.take_along_axis(x, index, axis=position)
    return x


def reorder(model: Model, order: Order) -> Model:
    """The same function with channels, heads and neurons in another order: maxnet logits change by rounding only."""
    mesh = mesh_of(model.base)  # the compiler left to itself would put whole weights on every device
    places = None if mesh is None else base_shardings(mesh, model.base)
    return model.replace(base=jax.jit(_reorder_base, out_shardings=places)(model.base, order))


def _reorder_base(base: nnx.State, order: Order) -> nnx.State:
    return map_named(lambda name, leaf: _permute(leaf[...], leaf.axes, order), base)


def reorder_lora(model: Model, lora: Lora, order: Order) -> Lora:
    """An adapter, made for the model in its old order, for the reordered model."""
    axes = lora_axes(model.base, lora)
    permute = jax.jit(
        lambda lora, order: {
            site: {leaf: _permute(value, axes[site][leaf], order) for leaf, value in entry.items()}
            for site, entry in lora.items()
        }
    )
    return permute(lora, order)
