"""What a gate's usage buys: the loss of held-out tokens, and the Rouge-L of what is written, over usage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from mlfs_jax.data.encode import Encoded
from mlfs_jax.errors import ConfigError
from mlfs_jax.model import Model
from spa_jax.evaluate import evaluate_plugin
from spa_jax.plugin import Plugin

USAGES = (0.0, 0.25, 0.5, 0.75, 1.0)


def written_curve(
    model: Model,
    plugin: Plugin,
    encoded: Encoded,
    usages: Sequence[float] = USAGES,
    *,
    beams: int = 1,
    batch_size: int = 16,
    advance: Callable[[str], None] = lambda doing: None,
) -> list[dict[str, float]]:
    """:func:`evaluate_plugin` at each wanted usage; ``wanted`` beside the ``usage`` that it came to.

    Raises:
        ConfigError: a plugin without a gate, or a usage outside [0, 1].
    """
    if not plugin.calibration:
        raise ConfigError(f"the plugin's setting is {plugin.setting}, which has no gate: there is no curve to draw.")
    points = []
    for usage in usages:
        found = evaluate_plugin(
            model,
            plugin,
            encoded,
            threshold=plugin.threshold_for(usage),
            beams=beams,
            batch_size=batch_size,
            advance=partial(lambda usage, doing: advance(f"usage {usage:g}, {doing}"), usage),
        )
        points.append({"wanted": float(usage), **found})
    return points


def plot_curve(plugin: Plugin, points: Sequence[dict[str, float]], file: str | Path) -> Path:
    """Two panels over usage: loss on the validation split, with the best that any gate could do; Rouge-L."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    usage = [100 * point["usage"] for point in plugin.calibration]
    left.plot(usage, [point["loss"] for point in plugin.calibration], marker=".", label="the gate")
    left.plot(usage, [point["oracle"] for point in plugin.calibration], ls=":", label="the best tokens, known")
    left.set(xlabel="tokens with the side network, %", ylabel="validation loss, nats a token")
    points = sorted(points, key=lambda point: point["usage"])
    right.plot([100 * p["usage"] for p in points], [100 * p["rougeL"] for p in points], marker="o", label="the gate")
    right.set(xlabel="tokens with the side network, %", ylabel="Rouge-L")
    if plugin.usage is not None:
        left.axvline(100 * plugin.usage, color="tab:gray", lw=0.8, label="what it is set to")
    left.legend(fontsize=8)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    plt.close(figure)
    return Path(file)
