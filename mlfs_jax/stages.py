"""The stages of MLFS as data: what is sampled, for how long, with which adapter (arXiv 2404.01353, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass

import jax
from jaxtyping import Array

from mlfs_jax.errors import ConfigError
from mlfs_jax.subnet import Subnet, SubnetSpace

SAMPLES = ("maxnet", "width", "width-depth")


@dataclass(frozen=True)
class Stage:
    """One stage: its own low-rank pairs train, those of earlier stages are frozen.

    Attributes:
        sample: "maxnet" (no subnets), "width" (full depth) or "width-depth".
        steps: optimizer steps.
        learning_rate: peak; linear warm-up over 6 % of the steps, then cosine to 0.
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
        if self.steps < 1 or self.rank < 1 or self.random_subnets < 0 or self.learning_rate <= 0:
            raise ConfigError(
                f"stage {self.name}: steps = {self.steps}, rank = {self.rank}, random_subnets = "
                f"{self.random_subnets}, learning_rate = {self.learning_rate}: expected steps and rank of at least 1, "
                "random_subnets of at least 0, a positive learning_rate."
            )

    def subnets(self, space: SubnetSpace, key: Array) -> tuple[Subnet, ...]:
        """What a step trains besides the maxnet: the minnet and n random subnets (sandwich rule)."""
        if self.sample == "maxnet":
            return ()
        space = space.at_full_depth() if self.sample == "width" else space
        return (space.minnet, *(space.sample(jax.random.fold_in(key, i)) for i in range(self.random_subnets)))


def paper_stages(steps: tuple[int, ...], learning_rate: float = 1e-3, rank: int = 8) -> tuple[Stage, ...]:
    """Stage 0: fine-tune the maxnet. Stage 1: widths at full depth. Stage 2: widths and depths.

    ``steps`` holds the length of each; fewer than three leave out the last ones.
    """
    if not 1 <= len(steps) <= len(SAMPLES):
        raise ConfigError(f"steps = {steps}: expected the number of steps of 1 to {len(SAMPLES)} stages.")
    plan = enumerate(zip(SAMPLES, steps, strict=False))
    return tuple(Stage(f"stage{i}", sample, n, learning_rate, rank) for i, (sample, n) in plan)
