"""Training a gate on the scores of tokens whose base and side likelihoods are known: seconds, on any machine."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from mlfs_jax.errors import ConfigError
from spa_jax.gate import check_usage, gate_logit, init_gate, mixture_nll, similarity_gate, straight_through
from spa_jax.score import TokenScores
from spa_jax.seam import Setting

METHODS = ("disagreement", "marginal", "straight-through", "similarity")


@dataclass(frozen=True)
class GateConfig:
    """How the gate is trained and set.

    Attributes:
        method: learn "disagreement", whether the side network would choose another token; the "marginal" likelihood of
            the mixture; the same "straight-through"; or the fixed "similarity" to tokens of training. By default
            disagreement where the side network adds to the base, and marginal where it replaces it (s2), for there it
            may well be wrong.
        price: of one use of the side network, in nats; for the two that weigh likelihoods.
        usage: share of held-out tokens that the threshold lets through.
        share: of the training examples, held back from the side network for the gate to learn on: on those that the
            side network knows by heart it would be trusted too much.
        steps: of Adam, each on all tokens at once.
        learning_rate: of Adam.
        decay: the L2 penalty of the standardised weights.
        bank: tokens that a similarity gate compares with.
    """

    method: str | None = None
    price: float = 0.0
    usage: float = 0.62
    share: float = 0.15
    steps: int = 300
    learning_rate: float = 1e-2
    decay: float = 0.1
    bank: int = 256

    def __post_init__(self):
        if self.method not in (None, *METHODS):
            raise ConfigError(f"gate method = {self.method!r}: expected one of {', '.join(METHODS)}.")
        check_usage(self.usage)
        if not 0 <= self.share < 1:
            raise ConfigError(f"gate share = {self.share}: expected a share of the training examples, below 1.")
        finite = all(0 <= x < math.inf for x in (self.price, self.decay, self.learning_rate))
        if not finite or self.learning_rate == 0 or self.steps < 1 or self.bank < 1:
            raise ConfigError(
                f"gate price = {self.price}, decay = {self.decay}, learning_rate = {self.learning_rate}, steps = "
                f"{self.steps}, bank = {self.bank}: expected finite numbers of at least 0, a positive learning_rate, "
                "steps and bank of at least 1."
            )

    def method_for(self, setting: Setting) -> str:
        """The method, chosen if it is none.

        Raises:
            ConfigError: a price, for a method that does not weigh it.
        """
        method = self.method or ("disagreement" if setting.adds else "marginal")
        if self.price and method in ("disagreement", "similarity"):
            raise ConfigError(
                f"gate price = {self.price} with method {method}, which weighs no likelihoods against it: use method "
                "marginal or straight-through, or set usage."
            )
        return method


def fit_gate(scores: TokenScores, config: GateConfig, setting: str, key: Array) -> dict[str, Array]:
    """A gate for these tokens, scored in this setting.

    Hidden states are standardised first (some channels of a language model are far larger than the rest), and the
    standardisation is folded into the weights.
    """
    method = config.method_for(Setting.parse(setting))
    hidden = jnp.asarray(scores.hidden, jnp.float32)
    if method == "similarity":
        rows = jax.random.permutation(key, len(hidden))[: config.bank]
        return similarity_gate(hidden[jnp.sort(rows)])
    mean, spread = hidden.mean(0), hidden.std(0) + 1e-3
    z, base, side = (hidden - mean) / spread, jnp.asarray(scores.base_nll), jnp.asarray(scores.side_nll)

    def loss(gate):
        logit = gate_logit(gate, z)
        if method == "disagreement":
            nll = optax.sigmoid_binary_cross_entropy(logit, scores.differs)
        elif method == "marginal":
            nll = mixture_nll(-base, -side, logit) + config.price * jax.nn.sigmoid(logit)
        else:  # the loss is linear in sigma where both likelihoods are known
            sigma = straight_through(logit)
            nll = sigma * (side + config.price) + (1 - sigma) * base
        return nll.mean() + config.decay * (gate["kernel"] ** 2).sum()

    optimizer = optax.adam(config.learning_rate)

    @jax.jit
    def train(gate):
        def step(carry, _):
            gate, state = carry
            updates, state = optimizer.update(jax.grad(loss)(gate), state)
            return (optax.apply_updates(gate, updates), state), None

        return jax.lax.scan(step, (gate, optimizer.init(gate)), length=config.steps)[0][0]

    gate = train(init_gate(hidden.shape[1]))
    kernel = gate["kernel"] / spread[:, None]
    return {"kernel": kernel, "bias": gate["bias"] - mean @ kernel}
