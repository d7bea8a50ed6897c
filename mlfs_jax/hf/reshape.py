"""Shapes that Hugging Face cannot express, made expressible without changing the function.

Many configs have ``head_size = hidden / heads``: the width of attention is the width of the residual stream. A
sliced network has N heads of size H beside D channels, with N·H = D only by luck. Two moves repair that, both exact:

* *pad*: more heads, longer ones, or more mlp neurons, of zeros. Longer heads change the softmax scale 1/sqrt(H), which
  is put back by scaling the query by sqrt(H'/H). Where query heads share key-value heads, these may be written out
  several times, so that fewer queries share each.
* *repeat*: every channel of the residual stream m times. Mean and variance over the channels do not change when all
  of them are repeated, so neither does any LayerNorm or RMSNorm. What writes to the stream is tiled; what reads from
  it reads the first copy (zero rows for the others). Needed when the heads are wider than the stream, D < N·H, where
  zero channels would change the norms.

A third move is for configs that compute a factor from the width (Gemma's sqrt(D) on its embeddings): the token table
and the final norm absorb what changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlfs_jax.backbone.tree import STACKED, flatten
from mlfs_jax.config import Config, DecoderConfig, EncoderConfig
from mlfs_jax.errors import ConfigError
from mlfs_jax.hf.families import FAMILIES
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


@dataclass(frozen=True)
class Fit:
    """A config as Hugging Face can express it.

    Attributes:
        config: the expressible one, of the same kind.
        copies: of every channel of the residual stream.
        kv_copies: of every key-value head.
        factors: what the token table and the final norm are multiplied by.
    """

    config: Any
    copies: int = 1
    kv_copies: int = 1
    factors: tuple[float, float] = (1.0, 1.0)


def nearest_shape(config: EncoderConfig) -> Shape:
    """The expressible shape that adds the fewest parameters: the fewest copies of the stream, then heads of their
    own size if possible, then the fewest added heads (the attention matrices are as large for every choice)."""
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


def nearest_fit(config: Config) -> Fit:
    """The expressible config that adds the fewest parameters.

    Raises:
        ConfigError: the family has a rule that no repair meets; the message names it.
    """
    if isinstance(config, EncoderConfig):
        shape = nearest_shape(config)
        return Fit(config.replace(embed=shape.embed, heads=shape.heads, head_dim=shape.head_dim), shape.copies)
    if not any(config.windows):  # of the layers that are left
        config = config.replace(windows=(), local_rope=None)
    by_cost = sorted(
        _fits(config), key=lambda fit: (_cost(fit.config), fit.config.head_dim != config.head_dim, fit.config.heads)
    )
    best = next((fit for fit in by_cost if _shares(fit.config)), by_cost[0])
    if best.copies > 1 and _tied(config) and not (config.final_norm and config.norm != "none"):
        raise ConfigError(
            f"{why(config, best)[0]} Repeating channels would repair that, but the head is the token table and has no "
            "norm with weights before it, so it would count each channel as often. Keep other numbers of heads."
        )
    return _absorb(config, best)


def _fits(config: DecoderConfig) -> Iterator[Fit]:
    """Expressible configs, each better than the ones with more copies of the stream can be."""
    family = FAMILIES[config.family]
    D, N, K, H = config.embed, config.heads, config.kv_heads, config.head_dim
    group, copies, best = N // K, 0, math.inf
    while True:
        copies += 1
        embed = copies * D
        mlp = config.mlp if family.mlp_ratio is None else family.mlp_ratio * embed
        if _cost(config.replace(embed=embed)) > best:
            return
        if embed == config.embedding_size or mlp < config.mlp:
            continue
        for heads in range(N, N + 1 if family.head_rule == "free" else max(N, embed) + 1):
            if (config.alibi_heads and heads != config.alibi_heads) or (config.qk_norm == "full" and heads != N):
                continue
            size = embed // heads if family.head_rule == "equal" else H
            if (family.head_rule != "free" and embed % heads) or size < H or (size > H and config.qk_norm != "none"):
                continue
            shares = {(heads, 1)} if K == 1 else set()  # (queries for each key-value head, how often it is written)
            shares |= {(g, group // g) for g in range(1, group + 1) if group % g == 0 and heads % g == 0}
            for shared, kv_copies in sorted(shares):
                fit = config.replace(embed=embed, heads=heads, kv_heads=heads // shared, head_dim=size, mlp=mlp)
                best = min(best, _cost(fit))
                yield Fit(fit, copies, kv_copies)


def _shares(config: DecoderConfig) -> bool:
    """Whether the family can say how many query heads share a key-value head."""
    family = FAMILIES[config.family]
    try:
        return family.from_hf(family.to_hf(config)).kv_heads == config.kv_heads
    except ConfigError:
        return False


def _cost(config: DecoderConfig) -> int:
    """Parameters, but for those that do not depend on the choice."""
    layer = 2 * (config.heads + config.kv_heads) * config.head_dim + (2 + config.gated) * config.mlp
    return config.embed * (config.layers * layer + config.vocab_size * (2 - config.tied))


def _tied(config: DecoderConfig) -> bool:
    """Whether the head multiplies the residual stream by the token table."""
    return config.head == "lm" and config.tied and not config.embedding_size


def _absorb(config: DecoderConfig, fit: Fit) -> Fit:
    """With the factors on embeddings and hidden states that config.json will be read as."""
    family = FAMILIES[config.family]
    read = family.from_hf(family.to_hf(fit.config))
    table, hidden = fit.config.embed_scale / read.embed_scale, fit.config.logit_scale / read.logit_scale
    factors = (table, hidden / table if _tied(config) else hidden)
    near = lambda factor: 1.0 if math.isclose(factor, 1, rel_tol=1e-12) else factor  # noqa: E731
    factors = near(factors[0]), near(factors[1])
    if factors == (1, 1):
        return fit
    if factors[1] != 1 and not (config.final_norm and config.norm != "none"):
        raise ConfigError(f"{config.family} at Hugging Face computes a factor from the width, and no norm absorbs it.")
    scaled = fit.config.replace(embed_scale=read.embed_scale, logit_scale=read.logit_scale)
    return Fit(scaled, fit.copies, fit.kv_copies, factors)


def why(config: Config, fit: Fit) -> tuple[str, ...]:
    """One sentence on each repair; empty when the shape is expressible as it is."""
    new, rule = fit.config, getattr(FAMILIES[config.family], "head_rule", "equal")
    d, n, h, said = config.embed, config.heads, config.head_dim, []
    if (new.embed, new.heads, new.head_dim) != (d, n, h):
        named = {"equal": "has head size = hidden / heads", "divides": "has a hidden size that is a multiple of heads"}
        if isinstance(config, DecoderConfig) and config.alibi_heads > n:
            named["equal"] += f", and its heads' slopes follow from their number ({config.alibi_heads})"
        said.append(f"{config.family} at Hugging Face {named[rule]}; here {n} heads of size {h} go with {d} channels.")
    if fit.copies > 1:
        said.append(
            f"Each of the {d} channels is repeated {fit.copies} times (norms do not change; readers take the "
            "first copy)."
        )
    if new.heads != n:
        said.append(f"{new.heads - n} heads of zeros are added to the {n}.")
    if fit.kv_copies > 1:
        said.append(f"Each key-value head is written {fit.kv_copies} times, for fewer query heads each.")
    if new.head_dim != h:
        said.append(
            f"Heads are padded with zeros from {h} to {new.head_dim}; queries are scaled by sqrt({new.head_dim}/{h})."
        )
    if new.mlp != config.mlp:
        said.append(
            f"Its mlp is {new.mlp // new.embed} x hidden: {config.mlp} neurons are padded with zeros to {new.mlp}."
        )
    if fit.factors != (1, 1):
        said.append(
            f"Hugging Face computes a factor from the width: the token table is multiplied by {fit.factors[0]:.6g}, "
            f"the final norm by {fit.factors[1]:.6g}."
        )
    return tuple(said)


def fit_weights(model: Model, fit: Fit) -> dict[str, np.ndarray]:
    """The model's weights (on the host) in another shape; the same function."""
    config: Any = model.config  # what only decoders have is asked for where they are
    new = fit.config
    more = {axis: getattr(new, axis) - getattr(config, axis) for axis in ("heads", "head_dim", "mlp")}
    weights = {}
    for name, param in flatten(model.base).items():
        weight = np.asarray(param[...])
        if name.startswith("layers.q.") and more["head_dim"] and getattr(config, "attn_scale", None) is None:
            weight = _scale(weight, np.sqrt(new.head_dim / config.head_dim))
        stacked = int(param.axes[0] == STACKED)
        inputs = range(stacked, stacked + param.inputs) if name.endswith(".kernel") else range(0)
        for i, axis in enumerate(param.axes):
            if axis == "kv_heads":
                weight = np.repeat(weight, fit.kv_copies, i) if fit.kv_copies > 1 else weight
                weight = _pad(weight, i, new.kv_heads - weight.shape[i])
            elif axis in more:
                weight = _pad(weight, i, more[axis])
            elif axis == "embed":
                # The masked-LM head multiplies its norm's output by the repeated token table: one copy must count.
                # So does a language model's tied head.
                once = i in inputs or name.startswith("head.norm.") or (name.startswith("norm.") and _tied(config))
                unused = -config.norm_offset if name == "norm.scale" else 0
                more_channels = new.embed - config.embed
                weight = _pad(weight, i, more_channels, unused) if once else _repeat(weight, i, fit.copies)
        weights[name] = weight
    table, norm = fit.factors
    if table != 1:
        weights["embed.tokens.table"] = _scale(weights["embed.tokens.table"], table)
    if norm != 1:
        weights["norm.scale"] = _scale(weights["norm.scale"], norm, config.norm_offset)
        if config.norm_bias:
            weights["norm.bias"] = _scale(weights["norm.bias"], norm)
    return weights


def _scale(weight: np.ndarray, factor: float, offset: float = 0.0) -> np.ndarray:
    return ((weight.astype(np.float32) + offset) * factor - offset).astype(weight.dtype)


def _pad(weight: np.ndarray, axis: int, more: int, value: float = 0) -> np.ndarray:
    if not more:
        return weight
    return np.pad(weight, [(0, more if i == axis else 0) for i in range(weight.ndim)], constant_values=value)


def _repeat(weight: np.ndarray, axis: int, copies: int) -> np.ndarray:
    return weight if copies == 1 else np.concatenate([weight] * copies, axis)
