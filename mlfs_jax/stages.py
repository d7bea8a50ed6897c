"""The stages of MLFS as data: what is sampled, for how long, with which adapter (arXiv 2404.01353, section 3.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

from mlfs_jax.errors import ConfigError
from mlfs_jax.subnet import Subnet, SubnetSpace, uniform_subnets

SAMPLES = ("maxnet", "width", "width-depth")
TRIES = 20
"""Draws for each random subnet of a step before it is given up as too like the others."""


@dataclass(frozen=True)
class Stage:
    """One stage: its own low-rank pairs train, those of earlier stages are frozen.

    Attributes:
        sample: "maxnet" (no subnets), "width" (full depth) or "width-depth".
        steps: optimizer steps.
        learning_rate: the peak, see :meth:`optimizer`.
        rank: R of this stage's pairs.
        random_subnets: n of the sandwich rule: maxnet, minnet and n random ones in every step.
    """

    name: str
    sample: str
    steps: int
    learning_rate: float = 1e-3
    rank: int = 8
    random_subnets: int = 2

    def __post_init__(self):
        if self.sample not in SAMPLES:
            raise ConfigError(f"stage {self.name}: sample = {self.sample!r}: expected one of {', '.join(SAMPLES)}.")
        rate = 0 < self.learning_rate < math.inf
        if self.steps < 1 or self.rank < 1 or not 0 <= self.random_subnets <= 1000 or not rate:
            raise ConfigError(
                f"stage {self.name}: steps = {self.steps}, rank = {self.rank}, random_subnets = "
                f"{self.random_subnets}, learning_rate = {self.learning_rate}: expected steps and rank of at least 1, "
                "random_subnets from 0 to 1000, a positive, finite learning_rate."
            )

    def seeds(self, keys: Array) -> Int[np.ndarray, "S tries 2"]:
        """What :meth:`subnets` draws from, for the keys of S steps; made at once.

        One by one, and while a step is under way, each would wait for the device to end it.
        """
        tries = jnp.arange(TRIES * self.random_subnets)
        each = jax.vmap(lambda key: jax.vmap(partial(jax.random.fold_in, key))(tries))(keys)
        return np.asarray(jax.random.key_data(each))

    def subnets(self, space: SubnetSpace, key: Array | Int[np.ndarray, "tries 2"]) -> tuple[Subnet, ...]:
        """What a step trains besides the maxnet: the minnet and n random subnets (sandwich rule), all different.

        In a space too small for that, fewer. Stage 2 goes on with the minnet of stage 1, too [ours]: drawn only as
        often as the others, it would lose what that stage has taught it.

        Args:
            key: of the step, or what :meth:`seeds` has made of it.
        """
        if self.sample == "maxnet":
            return ()
        full = space.at_full_depth()
        space = full if self.sample == "width" else space
        chosen = [] if space.minnet == space.maxnet else [space.minnet]  # only depths: stage 1 has the maxnet alone
        if full.minnet not in (space.minnet, space.maxnet):
            chosen.append(full.minnet)
        wanted = len(chosen) + self.random_subnets
        if space.vary != "per-layer":
            wanted = min(wanted, len({*uniform_subnets(space), *chosen} - {space.maxnet}))
        for seed in key if isinstance(key, np.ndarray) else self.seeds(key[None])[0]:
            if len(chosen) == wanted:
                break
            subnet = space.sample(seed)
            if subnet not in (*chosen, space.maxnet):
                chosen.append(subnet)
        return tuple(chosen)

    def optimizer(self) -> optax.GradientTransformation:
        """Adam on gradients clipped to norm 1; linear warm-up over 6 % of the steps, then cosine to 0."""
        warmup = max(1, self.steps * 6 // 100)
        peak = self.learning_rate
        schedule = optax.warmup_cosine_decay_schedule(peak / (warmup + 1), peak, warmup, max(warmup + 1, self.steps))
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))


def paper_stages(
    steps: tuple[int, ...],
    learning_rate: float | tuple[float, ...] = 1e-3,
    rank: int | tuple[int, ...] = 8,
    random_subnets: int | tuple[int, ...] = 2,
) -> tuple[Stage, ...]:
    """Stage 0: fine-tune the maxnet. Stage 1: widths at full depth. Stage 2: widths and depths.

    ``steps`` holds the length of each; fewer than three leave out the last ones. The other settings are one number
    for all stages, or one for each.

    Raises:
        ConfigError: no stages, more than three, or another number of a setting than of stages.
    """
    if not 1 <= len(steps) <= len(SAMPLES):
        raise ConfigError(f"steps = {steps}: expected the number of steps of 1 to {len(SAMPLES)} stages.")
    settings: dict[str, Any] = {"learning_rate": learning_rate, "rank": rank, "random_subnets": random_subnets}
    for name, setting in settings.items():
        settings[name] = setting if isinstance(setting, tuple) else (setting,) * len(steps)
        if len(settings[name]) != len(steps):
            raise ConfigError(f"{name} = {setting} for {len(steps)} stages: expected one number, or one for each.")
    plan = zip(SAMPLES, steps, *settings.values(), strict=False)
    return tuple(Stage(f"stage{i}", *setting) for i, setting in enumerate(plan))
