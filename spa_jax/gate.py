"""The gate: for each token, is the base model enough (sigma = 0), or is the side network needed (sigma = 1)?

SPA (arXiv 2403.07088): sigma = argmax(M_c f(x)), M_c [D, 2], on the last hidden state of the frozen model. argmax has
no gradient and the released code does not train it. [ours] It learns by the marginal likelihood of the mixture, as
Co-LLM (arXiv 2403.03870) learns whom to ask, with a price on every round trip, without which it would not mind useless
ones:

    P(x) = (1 - p) P_f(x) + p P_{f+g}(x),    loss = -log P(x) + price p,    p = softmax(M_c f)_1

At run time sigma = [p >= threshold], the threshold chosen on held-out data for a wanted usage. Alternatives: a
straight-through estimator of sigma; where the side network would choose another token, which needs no labels,

    loss = BCE(p, [argmax P_{f+g} != argmax P_f])

and, as a fixed baseline, the similarity to what was seen in training (after CuQA's).
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from mlfs_jax.errors import ConfigError

ALWAYS, NEVER = 0.0, 2.0
"""Thresholds that every probability reaches, and that none does."""


def init_gate(embed: int) -> dict[str, Array]:
    """M_c and a bias, at zero: p = 1/2 everywhere."""
    return {"kernel": jnp.zeros((embed, 2)), "bias": jnp.zeros((2,))}


def gate_logit(gate: Mapping[str, Array], hidden: Float[Array, "... D"]) -> Float[Array, "..."]:
    """log p / (1 - p) of a learnt gate."""
    both = hidden.astype(jnp.float32) @ gate["kernel"] + gate["bias"]
    return both[..., 1] - both[..., 0]


def gate_probability(gate: Mapping[str, Array], hidden: Float[Array, "... D"]) -> Float[Array, "..."]:
    """p in [0, 1]: how much the next token wants the side network. 1 where there is no gate.

    Args:
        gate: a learnt one, or the bank of a similarity gate, see :func:`similarity_gate`; {}: the setting has none.
    """
    if "bank" in gate:
        unit = lambda x: x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-6)  # noqa: E731
        near = unit(hidden.astype(jnp.float32) - gate["mean"]) @ unit(gate["bank"] - gate["mean"]).T
        return (1 + near.max(-1)) / 2
    if "kernel" in gate:
        return jax.nn.sigmoid(gate_logit(gate, hidden))
    return jnp.ones(hidden.shape[:-1])


def similarity_gate(examples: Float[Array, "K D"]) -> dict[str, Array]:
    """A fixed gate: the cosine of a token's centred hidden state to the nearest of those of K tokens of training.

    [ours] CuQA's sigma' compares whole texts by an encoder of their own; the backbone's hidden states need none.
    """
    return {"bank": examples, "mean": examples.mean(0)}


def mixture_nll(
    base: Float[Array, "..."], side: Float[Array, "..."], logit: Float[Array, "..."]
) -> Float[Array, "..."]:
    """-log((1 - p) P_f + p P_g) from the two log-likelihoods of a token and the gate's logit."""
    return -jnp.logaddexp(jax.nn.log_sigmoid(-logit) + base, jax.nn.log_sigmoid(logit) + side)


def straight_through(logit: Float[Array, "..."]) -> Float[Array, "..."]:
    """sigma as 0 or 1 on the way forward, with the gradient of p on the way back (Bengio et al., arXiv 1308.3432)."""
    p = jax.nn.sigmoid(logit)
    return p + jax.lax.stop_gradient((p >= 0.5) - p)


def check_usage(usage: float) -> float:
    """A share of tokens; raises ConfigError for one outside [0, 1]."""
    if not 0 <= usage <= 1:
        raise ConfigError(f"usage = {usage}: expected a share of the tokens, between 0 and 1.")
    return float(usage)


def choose_threshold(probabilities: Float[np.ndarray, " M"], usage: float) -> float:
    """The threshold that the wanted share of held-out tokens reaches (the nearest share that ties allow).

    Raises:
        ConfigError: a usage outside [0, 1], or no probabilities.
    """
    usage, p = check_usage(usage), np.sort(np.asarray(probabilities, np.float64))[::-1]
    if not len(p):
        raise ConfigError("no held-out tokens to choose a threshold on; give a task with a validation split.")
    wanted = round(usage * len(p))
    if 0 < wanted < len(p) and p[wanted - 1] == p[wanted]:  # ties stay together: all of them, or none
        ends = int((p > p[wanted]).sum()), int((p >= p[wanted]).sum())
        wanted = min(ends, key=lambda end: abs(end - wanted))
    if wanted == 0:
        return NEVER
    if wanted == len(p):
        return ALWAYS
    # between two probabilities, so that rounding elsewhere does not flip the last one; they may be neighbours
    between = np.float32((p[wanted - 1] + p[wanted]) / 2)
    return float(between if between > p[wanted] else p[wanted - 1])


def choose(probability: Float[Array, "..."], threshold: float | Array) -> Bool[Array, "..."]:
    """sigma = [p >= threshold]."""
    return probability >= threshold


def calibration_curve(
    probabilities: Float[np.ndarray, " M"],
    base_nll: Float[np.ndarray, " M"],
    side_nll: Float[np.ndarray, " M"],
) -> list[dict[str, float]]:
    """Usage against loss on held-out tokens: ``{"usage", "threshold", "loss", "oracle"}`` at even and small usages.

    ``loss`` is the mean negative log-likelihood when the gate decides, ``oracle`` when the best tokens for the side
    network are known.
    """
    gain = np.sort(np.asarray(base_nll) - np.asarray(side_nll))[::-1]
    curve = []
    for wanted in np.union1d(np.linspace(0, 1, 21), (0.01, 0.02)):
        threshold = choose_threshold(probabilities, float(wanted))
        if threshold == NEVER:  # the lowest one that none of these reaches: other usages are interpolated from it
            threshold = float(np.nextafter(np.float32(np.max(probabilities)), np.float32(NEVER)))
        elif threshold == ALWAYS:  # the highest one that all of these reach
            threshold = float(np.min(probabilities))
        used = np.asarray(probabilities) >= threshold
        best = np.mean(base_nll) - gain[: int(used.sum())].sum() / len(gain)
        loss = float(np.where(used, side_nll, base_nll).mean())
        curve.append({"usage": float(used.mean()), "threshold": threshold, "loss": loss, "oracle": float(best)})
    return curve
