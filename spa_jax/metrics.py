"""Counters, gauges and histograms as Prometheus text."""

from __future__ import annotations

import bisect
from collections import defaultdict

LATENCIES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Upper bounds of the latency histograms' buckets, seconds."""


class Metrics:
    """What a server counts. Names are given without the prefix ``spa_``; labels as keywords."""

    def __init__(self):
        self._help: dict[str, tuple[str, str]] = {}
        self._values: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self._histograms: dict[str, list[int]] = {}

    def describe(self, name: str, kind: str, text: str) -> None:
        """Declare a "counter", a "gauge" or a "histogram"."""
        self._help[name] = kind, text
        if kind == "histogram":
            self._histograms[name] = [0] * (len(LATENCIES) + 1)

    def add(self, name: str, value: float = 1, **labels: str) -> None:
        """Add to a counter or gauge."""
        self._values[name][_labels(labels)] += value

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        self._values[name][_labels(labels)] = value

    def observe(self, name: str, seconds: float) -> None:
        """Count one duration in a histogram."""
        self._histograms[name][bisect.bisect_left(LATENCIES, seconds)] += 1
        self._values[name]["sum"] += seconds

    def get(self, name: str, **labels: str) -> float:
        """The value of a counter or gauge; how many durations a histogram has counted."""
        if name in self._histograms:
            return sum(self._histograms[name])
        return self._values[name][_labels(labels)]

    def text(self) -> str:
        """The exposition format of Prometheus, version 0.0.4."""
        lines = []
        for name, (kind, text) in self._help.items():
            full = f"spa_{name}"
            lines += [f"# HELP {full} {text}", f"# TYPE {full} {kind}"]
            if kind == "histogram":
                reached = 0
                for bound, count in zip((*LATENCIES, "+Inf"), self._histograms[name], strict=True):
                    reached += count
                    lines.append(f'{full}_bucket{{le="{bound}"}} {reached}')
                lines += [f"{full}_sum {self._values[name]['sum']:g}", f"{full}_count {reached}"]
            else:
                values = self._values[name] or {"": 0}
                lines += [f"{full}{labels} {value:.10g}" for labels, value in sorted(values.items())]
        return "\n".join(lines) + "\n"


def _labels(labels: dict[str, str]) -> str:
    return "{" + ",".join(f'{k}="{v}"' for k, v in sorted(labels.items())) + "}" if labels else ""
