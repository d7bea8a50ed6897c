"""Losses: the task's, and what a teacher adds to it.

    loss_j = (1 - alpha) CE(y, logits_j) + alpha D(teacher || student) + beta mean_l |U h_max[g(l)] - U h_j[l]|^2

MLFS (arXiv 2404.01353), section 3.3: alpha = 0.9, beta = 0.1, D = tau^2 KL of the softened distributions. Other
divergences: reverse KL (MiniLLM, arXiv 2306.08543), generalised Jensen-Shannon (GKD, arXiv 2306.13649).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mlfs_jax.backbone.tree import Mask
from mlfs_jax.errors import ConfigError, unknown


@dataclass(frozen=True)
class DistillConfig:
    """How a subnet learns from the maxnet.

    Attributes:
        alpha: weight of the divergence against the task loss; 0 is plain fine-tuning of the subnet.
        tau: temperature of both distributions.
        divergence: "kl", "reverse-kl" or "jsd".
        beta: weight of the feature loss; 0 turns it off.
        features: "all" layers, or the "last" one only.
        feature_dim: columns of the projection U.
    """

    alpha: float = 0.9
    tau: float = 2.0
    divergence: str = "kl"
    beta: float = 0.1
    features: str = "all"
    feature_dim: int = 64

    def __post_init__(self):
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha = {self.alpha}: expected a share between 0 and 1.")
        if not 0 < self.tau < math.inf:
            raise ConfigError(f"tau = {self.tau}: expected a finite temperature above 0.")
        if not 0 <= self.beta < math.inf or self.feature_dim < 1:
            raise ConfigError(f"beta = {self.beta}, feature_dim = {self.feature_dim}: expected finite >= 0, and >= 1.")
        if self.divergence not in DIVERGENCES:
            raise unknown("divergence", self.divergence, DIVERGENCES)
        if self.features not in ("all", "last"):
            raise ConfigError(f"features = {self.features!r}: expected 'all' or 'last'.")


def _log_probs(logits: Float[Array, "... C"], tau: float) -> Float[Array, "... C"]:
    return jax.nn.log_softmax(logits.astype(jnp.float32) / tau)


def _kl(p: Float[Array, "... C"], q: Float[Array, "... C"]) -> Float[Array, "..."]:
    """KL(p || q) of log-probabilities."""
    return jnp.sum(jnp.exp(p) * (p - q), -1)


class Divergence(NamedTuple):
    """tau^2 D(teacher || student) in two halves, so that students who share a teacher share the first.

    Attributes:
        targets: ``(teacher's logits [..., C], tau)`` -> what a student is compared with, a tree of [...] or [..., C].
        loss: ``(targets, student's logits [..., C], tau)`` -> [...].
    """

    targets: Callable
    loss: Callable


def _soften(teacher: Float[Array, "... C"], tau: float) -> tuple[Float[Array, "... C"], Float[Array, "..."]]:
    """p = softmax(teacher / tau), and sum p log p."""
    log_p = _log_probs(teacher, tau)
    p = jnp.exp(log_p)
    return p, jnp.sum(p * log_p, -1)


def _kl_from(
    targets: tuple[Float[Array, "... C"], Float[Array, "..."]], student: Float[Array, "... C"], tau: float
) -> Float[Array, "..."]:
    """sum p log p - sum p log q with log q = student / tau - logsumexp: three passes over C forwards, one backwards."""
    p, p_log_p = targets
    student = student.astype(jnp.float32) / tau
    student -= jax.lax.stop_gradient(student.max(-1, keepdims=True))  # so that the two sums cancel well
    return tau**2 * (p_log_p - jnp.sum(p * student, -1) + jnp.log(jnp.sum(jnp.exp(student), -1)))


def _reverse_kl_from(log_p: Float[Array, "... C"], student: Float[Array, "... C"], tau: float) -> Float[Array, "..."]:
    return tau**2 * _kl(_log_probs(student, tau), log_p)


def _jsd_from(
    log_p: Float[Array, "... C"], student: Float[Array, "... C"], tau: float, beta: float = 0.5
) -> Float[Array, "..."]:
    s = _log_probs(student, tau)
    mixture = jnp.logaddexp(log_p + jnp.log(beta), s + jnp.log1p(-beta))
    return tau**2 * (beta * _kl(log_p, mixture) + (1 - beta) * _kl(s, mixture))


DIVERGENCES = {
    "kl": Divergence(_soften, _kl_from),
    "reverse-kl": Divergence(_log_probs, _reverse_kl_from),
    "jsd": Divergence(_log_probs, _jsd_from),
}


def kl(teacher: Float[Array, "... C"], student: Float[Array, "... C"], tau: float = 1.0) -> Float[Array, "..."]:
    """tau^2 KL(teacher || student) of logits softened by tau (Hinton et al. 2015): covers the teacher's modes."""
    return _kl_from(_soften(teacher, tau), student, tau)


def reverse_kl(teacher: Float[Array, "... C"], student: Float[Array, "... C"], tau: float = 1.0) -> Float[Array, "..."]:
    """tau^2 KL(student || teacher): seeks the teacher's largest mode (MiniLLM)."""
    return _reverse_kl_from(_log_probs(teacher, tau), student, tau)


def jsd(
    teacher: Float[Array, "... C"], student: Float[Array, "... C"], tau: float = 1.0, beta: float = 0.5
) -> Float[Array, "..."]:
    """Generalised Jensen-Shannon divergence (GKD, eq. 1): beta KL(t || m) + (1 - beta) KL(s || m), m the mixture."""
    return _jsd_from(_log_probs(teacher, tau), student, tau, beta)


def task_loss(logits: Float[Array, "B C"], labels: Array, problem: str) -> Float[Array, ""]:
    """Mean cross-entropy of int labels [B], or mean squared error of float labels [B]."""
    if problem == "regression":
        return jnp.mean((logits[..., 0].astype(jnp.float32) - labels) ** 2)
    picked = jnp.take_along_axis(_log_probs(logits, 1.0), labels[..., None], -1)
    return -jnp.mean(picked)


def logit_loss(teacher: Array, student: Array, config: DistillConfig, problem: str) -> Float[Array, ""]:
    """What the teacher's logits ask of the student's: a divergence, or the squared error for regression."""
    if problem == "regression":
        return jnp.mean((teacher.astype(jnp.float32) - student.astype(jnp.float32)) ** 2)
    divergence = DIVERGENCES[config.divergence]
    return jnp.mean(divergence.loss(divergence.targets(teacher, config.tau), student, config.tau))


def init_projection(key: Array, embed: int, config: DistillConfig) -> Float[Array, "D P"]:
    """U with orthonormal columns (rows, if P > D)."""
    return jax.nn.initializers.orthogonal()(key, (embed, config.feature_dim))


def teacher_layers(mask: Mask) -> Array:
    """g: for each layer of the supernet, which of its layers teaches it, [L].

    The r-th of l kept layers learns from the end of the r-th of l equal shares of the maxnet: last learns from last.
    """
    layers = mask.layers.shape[0]
    rank, kept = jnp.cumsum(mask.layers), mask.layers.sum()
    return jnp.clip(rank * layers // kept - 1, 0, layers - 1)


def feature_loss(
    teacher: Float[Array, "L B T D"],
    student: Float[Array, "L B T d"],
    projection: Float[Array, "D P"],
    mask: Mask,
    tokens: Float[Array, "B T"],
    features: str,
) -> Float[Array, ""]:
    """Squared distance of projected hidden states over kept layers and real tokens, relative to the teacher's power.

    The student uses the slice of U that belongs to its channels (prefix d of D). Dividing by the teacher's power,
    inside the gradient, makes the loss blind to the scale of U, which could otherwise shrink to nothing.
    """
    if features == "last":
        last = mask.layers.shape[0] - 1
        weight = (jnp.arange(last + 1) == last).astype(jnp.float32)  # a skipped last layer repeats its input
        source = jnp.arange(last + 1)
    else:
        weight, source = mask.layers.astype(jnp.float32), teacher_layers(mask)
    target = jnp.tensordot(teacher, projection, axes=1)[source]
    found = jnp.tensordot(student, projection[: student.shape[-1]], axes=1)
    weight = weight[:, None, None] * tokens.astype(jnp.float32)
    mean = lambda x: (x.mean(-1) * weight).sum() / weight.sum()  # noqa: E731
    return mean((target - found) ** 2) / (mean(target**2) + 1e-6)
