"""The picture beside a benchmark's JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def bars(result: Path, values: Mapping[str, Mapping[str, float]], ylabel: str, title: str = "") -> None:
    """Bars of ``{series: {group: value}}``, side by side in each group, into the PNG of a result's name."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = list(dict.fromkeys(group for series in values.values() for group in series))
    width = 0.8 / len(values)
    figure, panel = plt.subplots(figsize=(max(6, 0.9 * len(groups)), 3.5), layout="constrained")
    for i, (name, series) in enumerate(values.items()):
        panel.bar([groups.index(group) + i * width for group in series], list(series.values()), 0.9 * width, label=name)
    slanted = {"rotation": 30, "ha": "right", "fontsize": 8} if len(groups) > 4 else {}
    panel.set_xticks([place + 0.4 - width / 2 for place in range(len(groups))], groups, **slanted)
    panel.set(ylabel=ylabel, title=title)
    if len(values) > 1:
        figure.legend(
            loc="outside upper center", ncols=min(4, len(values)), fontsize=8
        )  # beside the bars, not over them
    result.parent.mkdir(exist_ok=True)
    figure.savefig(result.with_suffix(".png"), dpi=120)
    plt.close(figure)


def share_bars(result: Path, rows: Mapping[str, Mapping], columns: Mapping[str, str]) -> None:
    """:func:`bars` of subnets: ``columns`` says what each of these entries of a row is, as a share of the maxnet's."""
    shares = {said: {name: row[column] for name, row in rows.items()} for said, column in columns.items()}
    bars(result, shares, "share of the maxnet's")
