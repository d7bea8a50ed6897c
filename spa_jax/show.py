"""A continuation with each token coloured by who chose it (SPA, Figure 4): terminal, HTML, PNG."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path

from mlfs_jax.data.tokenizer import TextStream, load_tokenizer, prompt_ids
from mlfs_jax.errors import ConfigError
from mlfs_jax.generate import GenerateConfig
from mlfs_jax.run import write_atomic
from spa_jax.decode import generate
from spa_jax.gate import ALWAYS
from spa_jax.train import Fitted

CLOUD, DEVICE, OVERRULED = "cloud", "device", "overruled"
WHO = {
    CLOUD: "the base alone",
    DEVICE: "with the side network",
    OVERRULED: "with the side network, which changed the token",
}
CHARACTER = 9 * 0.602 / 72
"""Inches that a character of matplotlib's monospace font takes at 9 points."""
COLOURS = {CLOUD: "#4477aa", DEVICE: "#228833", OVERRULED: "#cc3311"}
MARKS = {CLOUD: "", DEVICE: "_", OVERRULED: "*"}
"""On both sides of a token, where there are no colours."""


@dataclass(frozen=True)
class Shown:
    """A prompt, and the pieces of text behind it: (text, who chose it, the gate's probability)."""

    prompt: str
    pieces: tuple[tuple[str, str, float], ...]
    rates: dict[str, float]

    @property
    def text(self) -> str:
        return "".join(piece for piece, _, _ in self.pieces)

    def to_json(self) -> dict:
        pieces = [{"text": text, "who": who, "gate": gate} for text, who, gate in self.pieces]
        return {"prompt": self.prompt, "text": self.text, "pieces": pieces, **self.rates}


def show(fitted: Fitted, prompt: str, *, usage: float | None = None, max_new_tokens: int = 48) -> Shown:
    """Continue a prompt greedily and say who chose each token.

    Raises:
        ConfigError: an empty prompt, or a usage outside [0, 1].
    """
    model, plugin = fitted.model, fitted.plugin
    tokenizer = load_tokenizer(model.source)
    ids = prompt_ids(tokenizer, prompt)
    if not ids:
        raise ConfigError(f"prompt = {prompt!r} is no token: expected some text.")
    threshold = ALWAYS if not plugin.setting.gated else plugin.threshold
    if usage is not None:
        threshold = plugin.threshold_for(usage)
    config = GenerateConfig(max_new_tokens=max_new_tokens)
    found = generate(model, plugin.side, [ids], config, setting=plugin.setting, threshold=threshold)
    text, pieces = TextStream(tokenizer, ids), []  # half a character comes with its other half
    for token, used, differs, gate in zip(
        found.tokens[0], found.sigma[0], found.differs[0], found.gate[0], strict=False
    ):
        pieces.append((text.step(token), (OVERRULED if differs else DEVICE) if used else CLOUD, gate))
    return Shown(prompt, tuple(pieces), found.rates())


def as_rich(shown: Shown, *, marks: bool = False):
    """For the terminal: a ``rich.text.Text``; with marks instead of colours for one that has none."""
    from rich.text import Text

    text = Text(shown.prompt)
    for piece, who, _ in shown.pieces:
        bare, mark = piece.strip(), MARKS[who] if marks else ""
        text.append(piece.replace(bare, f"{mark}{bare}{mark}", 1) if bare else piece, style=f"bold {COLOURS[who]}")
    text.append("\n\n")
    for who, meaning in WHO.items():
        text.append(f"{MARKS[who]}word{MARKS[who]} " if marks else "■ ", style=COLOURS[who])
        text.append(f"{meaning}   ")
    return text


def as_html(shown: Shown) -> str:
    """A page of its own; the gate's probability is what hovering over a token says."""
    spans = "".join(
        f'<span class="{who}" title="gate {gate:.2f}">{html.escape(piece)}</span>' for piece, who, gate in shown.pieces
    )
    styles = "".join(f".{who} {{ color: {colour}; font-weight: bold }} " for who, colour in COLOURS.items())
    legend = "".join(f'<li class="{who}">{html.escape(meaning)}</li>' for who, meaning in WHO.items())
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Who chose each token</title>'
        f"<style>body {{ font: 16px/1.5 sans-serif; max-width: 48em; margin: 2em auto }} p {{ white-space: pre-wrap }} "
        f"{styles}</style><p>{html.escape(shown.prompt)}{spans}</p><ul>{legend}</ul>"
        f"<p>side network used for {shown.rates['usage']:.0%} of the tokens</p></html>\n"
    )


def save_html(shown: Shown, file: str | Path) -> Path:
    """Write :func:`as_html` to a file."""
    write_atomic(Path(file), as_html(shown).encode())
    return Path(file)


def save_png(shown: Shown, file: str | Path, columns: int = 90) -> Path:
    """The same as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    placed, row, column = [], 0, 0
    for text, who in ((shown.prompt, None), *((piece, who) for piece, who, _ in shown.pieces)):
        for word in _words(text):
            if word == "\n" or (column + len(word) > columns and column):
                row, column, word = row + 1, 0, word.strip()
            if word:
                placed.append((row, column, word, who))
                column += len(word)
    width, height = CHARACTER * columns / 0.96, 0.24 * (row + 1) + 0.6
    figure = plt.figure(figsize=(width, height))
    for row, column, word, who in placed:
        x, y = column / columns * 0.96 + 0.02, 1 - (0.24 * (row + 1)) / height
        colour, weight = (COLOURS[who], "bold") if who else ("#444444", "normal")
        figure.text(x, y, word.replace("$", r"\$"), family="monospace", size=9, color=colour, weight=weight)
    marks = [
        Line2D([], [], marker="s", linestyle="", color=COLOURS[who], label=meaning) for who, meaning in WHO.items()
    ]
    figure.legend(handles=marks, loc="lower left", ncols=len(marks), frameon=False, fontsize=8)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    plt.close(figure)
    return Path(file)


def _words(text: str) -> list[str]:
    """Pieces that may begin a new line: words with the space before them, and line breaks."""
    words: list[str] = []
    for i, line in enumerate(text.split("\n")):
        words += ["\n"] if i else []
        start = 0
        for j in range(1, len(line)):
            if line[j] == " " and line[j - 1] != " ":
                words.append(line[start:j])
                start = j
        words += [line[start:]] if line[start:] else []
    return words
