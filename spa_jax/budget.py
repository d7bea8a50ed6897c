"""A budget for round trips: whether the gate may have what it wants, on the link as it is now.

The gate's threshold says which tokens want the side network; a budget in ms per token says how many can have it. A
token bucket holds the budget on average; which tokens get it is decided by how much they want it, against those before.
"""

from __future__ import annotations

from collections import deque

import numpy as np

REMEMBERED, LEAST = 256, 8
"""Probabilities of the gate that are remembered, and how few say nothing yet."""
PROBE = 64
"""Tokens without a round trip after which one is tried, to see whether the link is better now."""


class Pace:
    """The budget of one session.

    Attributes:
        exchange_ms: what a round trip costs now: a moving average of those measured; None before the first.
        credit_ms: saved by tokens that stayed in the cloud; negative: overdrawn.
    """

    def __init__(self, budget_ms: float, *, burst: int = 4, smoothing: float = 0.3):
        """
        Args:
            budget_ms: wanted ms per token, of cloud, network and device together.
            burst: how many round trips may be saved up or overdrawn.
            smoothing: weight of the newest measurement.
        """
        self.budget_ms, self.burst, self.smoothing = budget_ms, burst, smoothing
        self.exchange_ms: float | None = None
        self.credit_ms = 0.0
        self._probabilities: deque[float] = deque(maxlen=REMEMBERED)
        self._since = 0
        self._cloud_ms: float | None = None

    @property
    def usage(self) -> float:
        """Share of the tokens that the budget pays a round trip for, as far as is known."""
        if self.exchange_ms is None:
            return 1.0
        return float(np.clip((self.budget_ms - (self._cloud_ms or 0)) / max(self.exchange_ms, 1e-6), 0, 1))

    def allows(self, probability: float, threshold: float, cloud_ms: float) -> bool:
        """Whether the next token gets a round trip.

        Args:
            probability: of the gate.
            threshold: of the gate; below it nothing is asked, whatever the budget.
            cloud_ms: what the token has cost so far.
        """
        before = cloud_ms if self._cloud_ms is None else self._cloud_ms
        self._cloud_ms = before + self.smoothing * (cloud_ms - before)
        most = self.burst * (self.exchange_ms or self.budget_ms)
        self.credit_ms = float(np.clip(self.credit_ms + self.budget_ms - cloud_ms, -most, most))
        self._probabilities.append(probability)
        self._since += 1
        if probability < threshold:
            return False
        if self.exchange_ms is None or self._since > PROBE:
            return True
        if self.credit_ms < self.exchange_ms:
            return False
        if len(self._probabilities) < LEAST or self.credit_ms >= most:
            return True
        return probability >= float(np.quantile(self._probabilities, 1 - self.usage))

    def exchanged(self, ms: float) -> None:
        """A round trip was made, and took this long; one that took much longer than others (a compile) says little."""
        before = ms if self.exchange_ms is None else self.exchange_ms
        ms = min(ms, self.burst * before)
        self.exchange_ms = before + self.smoothing * (ms - before)
        self.credit_ms -= ms
        self._since = 0
