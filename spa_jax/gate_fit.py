"""Training a gate on the scores of tokens whose base and side likelihoods are known: seconds, on any machine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from mlfs_jax.errors import ConfigError
from spa_jax.gate import check_usage, gate_logit, init_gate, mixture_nll, similarity_gate, straight_through
from spa_jax.score import TokenScores
from spa_jax.seam import Setting

METHODS = ("marginal", "straight-through", "disagreement", "similarity")
PRICE = 0.4
"""Nats that a use of the side network costs by default."""


@dataclass(frozen=True)
class GateConfig:
    """How the gate is trained and set.

    Attributes:
        method: learn the "marginal" likelihood of the mixture; the same "straight-through"; "disagreement", whether the
            side network would choose another token; or the fixed "similarity" to tokens of training.
        price: of one use of the side network, in nats; for the two that weigh likelihoods. By default 0.4 where the
            side network adds to the base, which without a price it seldom makes much worse, so that the gate would
            hardly tell its uses apart; and none where it replaces the base (s2), for there it may well be wrong.
        usage: share of held-out tokens that the threshold lets through.
        share: of the training examples, held back from the side network for the gate to learn on: on those that the
            side network knows by heart it would be trusted too much.
        steps: of Adam, each on all tokens at once.
        learning_rate: of Adam.
        decay: the L2 penalty of the standardised weights.
        bank: tokens that a similarity gate compares with.
    """

    method: str = "marginal"
    price: float | None = None
    usage: float = 0.62
    share: float = 0.15
    steps: int = 300
    learning_rate: float = 1e-2
    decay: float = 0.1
    bank: int = 256

    def __post_init__(self):
        if self.method not in METHODS:
            raise ConfigError(f"gate method = {self.method!r}: expected one of {', '.join(METHODS)}.")
        check_usage(self.usage)
        if not 0 <= self.share < 1:
            raise ConfigError(f"gate share = {self.share}: expected a share of the training examples, below 1.")
        finite = all(0 <= x < math.inf for x in (self.price or 0, self.decay, self.learning_rate))
        if not finite or self.learning_rate == 0 or self.steps < 1 or self.bank < 1:
            raise ConfigError(
                f"gate price = {self.price}, decay = {self.decay}, learning_rate = {self.learning_rate}, steps = "
                f"{self.steps}, bank = {self.bank}: expected finite numbers of at least 0, a positive learning_rate, "
                "steps and bank of at least 1."
            )

        if self.price and self.method in ("disagreement", "similarity"):
            raise ConfigError(
                f"gate price = {self.price} with method {self.method}, which weighs no likelihoods against it: use "
                "method marginal or straight-through, or set usage."
            )

    def price_in(self, setting: Setting) -> float:
        """The price in this setting."""
        return (PRICE if setting.adds else 0.0) if self.price is None else self.price


def fit_gate(scores: TokenScores, config: GateConfig, setting: str, key: Array) -> dict[str, Array]:
    """A gate for these tokens, scored in this setting.

    Hidden states are standardised first (some channels of a language model are far larger than the rest), and the
    standardisation is folded into the weights.
    """
    hidden = jnp.asarray(scores.hidden, jnp.float32)
    if config.method == "similarity":
        rows = jax.random.permutation(key, len(hidden))[: config.bank]
        return similarity_gate(hidden[jnp.sort(rows)])
    mean, spread = hidden.mean(0), hidden.std(0) + 1e-3
    tokens = (hidden - mean) / spread, scores.base_nll, scores.side_nll, scores.differs
    gate = _train(init_gate(hidden.shape[1]), tokens, config, config.price_in(Setting.parse(setting)))
    kernel = gate["kernel"] / spread[:, None]
    return {"kernel": kernel, "bias": gate["bias"] - mean @ kernel}


@partial(jax.jit, static_argnames="config")
def _train(gate: dict[str, Array], tokens: tuple[Array, ...], config: GateConfig, price: float) -> dict[str, Array]:
    z, base, side, differs = tokens

    def loss(gate):
        logit = gate_logit(gate, z)
        if config.method == "disagreement":
            nll = optax.sigmoid_binary_cross_entropy(logit, differs)
        elif config.method == "marginal":
            nll = mixture_nll(-base, -side, logit) + price * jax.nn.sigmoid(logit)
        else:  # the loss is linear in sigma where both likelihoods are known
            sigma = straight_through(logit)
            nll = sigma * (side + price) + (1 - sigma) * base
        return nll.mean() + config.decay * (gate["kernel"] ** 2).sum()

    optimizer = optax.adam(config.learning_rate)

    def step(carry, _):
        gate, state = carry
        updates, state = optimizer.update(jax.grad(loss)(gate), state)
        return (optax.apply_updates(gate, updates), state), None

    return jax.lax.scan(step, (gate, optimizer.init(gate)), length=config.steps)[0][0]
