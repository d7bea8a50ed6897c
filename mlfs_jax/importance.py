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
from jaxtyping import Float, Int

from mlfs_jax.backbone.tree import flatten, map_named
from mlfs_jax.lora import Lora, lora_axes
from mlfs_jax.model import Model


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
        back = (np.argsort(axis, axis=-1) for axis in (self.embed, self.heads, self.mlp))
        return Order(*back, layers=self.layers)

    def to_json(self) -> dict[str, list]:
        return {axis: getattr(self, axis).tolist() for axis in AXES}

    @classmethod
    def from_json(cls, saved: Mapping[str, list]) -> Order:
        return cls(*(np.asarray(saved[axis], np.int32) for axis in AXES))


def measure_importance(
    model: Model, batches: Iterable[Mapping], loss: Callable[[nnx.State, Mapping], Float]
) -> Importance:
    """Accumulate |w * dLoss/dw| over batches.

    Args:
        model: with its adapters merged, so that what is scored is what will be sliced.
        loss: ``loss(base, batch) -> scalar``; the one place where the base is differentiated.
    """

    @jax.jit
    def scores(base, batch):
        grads = jax.grad(loss)(base, batch)
        totals = dict.fromkeys(AXES, 0.0)
        grads = flatten(grads)
        for name, leaf in flatten(base).items():
            salience = jnp.abs(leaf[...] * grads[name][...])
            for position, axis in enumerate(leaf.axes):
                if axis in totals:  # scores are [axis] for embed and layers, [layers, axis] for heads and mlp
                    held = {position} if axis == "embed" else {0, position}
                    totals[axis] += salience.sum([i for i in range(salience.ndim) if i not in held])
        return totals

    total = None
    for batch in batches:
        new = jax.tree.map(np.asarray, scores(model.base, batch))
        total = new if total is None else jax.tree.map(np.add, total, new)
    return Importance(**total)


def importance_order(importance: Importance) -> Order:
    """Most important first along every axis; ties keep their place."""
    first = lambda scores: np.argsort(-scores, axis=-1, kind="stable").astype(np.int32)  # noqa: E731
    return Order(*(first(getattr(importance, axis)) for axis in AXES))


def _permute(x, axes: tuple[str, ...], order: Order):
    for position, axis in enumerate(axes):
        if axis == "embed":
            x = jnp.take(x, order.embed, axis=position)
        elif axis in ("heads", "mlp"):  # one permutation per layer; the layer axis leads
            index = getattr(order, axis)
            index = index.reshape([s if i in (0, position) else 1 for i, s in enumerate(x.shape)])
            x = jnp.take_along_axis(x, index, axis=position)
    return x


def reorder(model: Model, order: Order) -> Model:
    """The same function with channels, heads and neurons in another order: maxnet logits change by rounding only."""
    return model.replace(base=_reorder_base(model.base, order))


@jax.jit
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
