"""Shapes that Hugging Face cannot express, made expressible without changing the function.

A BERT-like config has ``head_size = hidden / heads``: the width of attention is the width of the residual stream. A
sliced network has N heads of size H beside D channels, with N·H = D only by luck. Two moves repair that, both exact:

* *pad*: more heads, or longer ones, of zeros. Longer heads change the softmax scale 1/sqrt(H), which is put back by
  scaling the query by sqrt(H'/H).
* *repeat*: every channel of the residual stream m times. Mean and variance over the channels do not change when all
  of them are repeated, so neither does any LayerNorm. What writes to the stream is tiled; what reads from it reads
  the first copy (zero rows for the others). Needed when the heads are wider than the stream, D < N·H, where zero
  channels would change the norms.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlfs_jax.backbone.tree import STACKED, flatten
from mlfs_jax.config import Config, DecoderConfig, EncoderConfig
from mlfs_jax.model import Model


@dataclass(frozen=True)
class Shape:
    """The nearest expressible shape: ``heads`` x ``head_dim`` = ``embed`` = m times the model's."""

    copies: int
    heads: int
    head_dim: int

    @property
    def embed(self) -> int:
        return self.heads * self.head_dim


def nearest_shape(config: EncoderConfig) -> Shape:
    """The expressible shape that adds the fewest parameters: the fewest copies of the stream, then heads of their
    own size if possible, then the fewest added heads (the attention matrices are as large for every choice)."""
    if isinstance(config, DecoderConfig):
        return Shape(1, config.heads, config.head_dim)
    copies = 0
    while True:
        copies += 1
        embed = copies * config.embed
        if embed == config.embedding_size:
            continue  # ELECTRA would lose its projection: Hugging Face leaves it out when the two widths are equal
        fits = [
            Shape(copies, heads, embed // heads)
            for heads in range(config.heads, embed // config.head_dim + 1)
            if embed % heads == 0
        ]
        if fits:
            return min(fits, key=lambda shape: (shape.head_dim != config.head_dim, shape.heads))


def reshape_weights(model: Model, shape: Shape) -> tuple[Config, dict[str, np.ndarray]]:
    """The model's config and weights (on the host) in another shape; the same function."""
    config = model.config
    if isinstance(config, DecoderConfig):
        return config, {name: np.asarray(param[...]) for name, param in flatten(model.base).items()}
    reshaped = config.replace(embed=shape.embed, heads=shape.heads, head_dim=shape.head_dim)
    sizes = {"heads": shape.heads, "head_dim": shape.head_dim}
    weights = {}
    for name, param in flatten(model.base).items():
        weight = np.asarray(param[...])
        if name.startswith("layers.q.") and shape.head_dim != config.head_dim:
            scale = np.sqrt(shape.head_dim / config.head_dim)
            weight = (weight.astype(np.float32) * scale).astype(weight.dtype)
        stacked = int(param.axes[0] == STACKED)
        inputs = range(stacked, stacked + param.inputs) if name.endswith(".kernel") else range(0)
        for i, axis in enumerate(param.axes):
            if axis in sizes:
                weight = _pad(weight, i, sizes[axis])
            elif axis == "embed":
                # The masked-LM head multiplies its norm's output by the repeated token table: one copy must count.
                once = i in inputs or name.startswith("head.norm.")
                weight = _pad(weight, i, shape.embed) if once else _repeat(weight, i, shape.copies)
        weights[name] = weight
    return reshaped, weights


def _pad(weight: np.ndarray, axis: int, size: int) -> np.ndarray:
    return np.pad(weight, [(0, size - n if i == axis else 0) for i, n in enumerate(weight.shape)])


def _repeat(weight: np.ndarray, axis: int, copies: int) -> np.ndarray:
    return np.concatenate([weight] * copies, axis)
