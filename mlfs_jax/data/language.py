"""The language tasks: causal text ("lm") and prompt -> completion ("seq2seq"). Each is one line of a table."""

import json
from collections.abc import Callable
from dataclasses import dataclass

from mlfs_jax import registry
from mlfs_jax.data.examples import Examples, split_by_hash


@dataclass(frozen=True)
class LanguageSpec:
    """A language task as data.

    Attributes:
        template: seq2seq: how a prompt is written; it begins with ``{text}``, the part that may be cut.
        max_length: tokens of a block of text, or of prompt and completion together.
        max_completion: seq2seq: tokens of a completion, its end-of-text token included; longer ones are cut.
    """

    read: Callable[[], dict[str, Examples]]
    problem: str
    max_length: int
    description: str
    template: str = ""
    max_completion: int = 0


def prompted(template: str, texts: list[str], completions: list[str], **fields: list[str]) -> Examples:
    """Seq2seq examples whose prompts are `template` with {text} and the other fields filled in.

    A completion begins with the space that separates it from the prompt.
    """
    end = template.removeprefix("{text}")
    columns = [dict(zip(fields, values, strict=True)) for values in zip(*fields.values(), strict=True)]
    tails = [end.format(**row) for row in columns] if fields else [end] * len(texts)
    return Examples(texts, tails=tails, completions=[f" {c}" for c in completions])


def _articles(language: str) -> list[tuple[str, str]]:
    """(lead, short description or "") of every article: the lead is the text that all wiki tasks split by."""
    file = registry.fetch("wiki") / f"summaries_{language}.json"
    articles = json.loads(file.read_text(encoding="utf-8")).values()
    pairs = [(a["extract"].strip(), a["description"].replace("\xa0", " ").strip()) for a in articles]
    return [pair for pair in pairs if pair[0]]


def _read_wiki_lm() -> dict[str, Examples]:
    return split_by_hash(Examples([lead for lead, _ in _articles("en-us")]))


def _wiki_description(language: str, template: str, description: str) -> LanguageSpec:
    def read() -> dict[str, Examples]:
        described = [pair for pair in _articles(language) if pair[1]]
        return split_by_hash(prompted(template, *map(list, zip(*described, strict=True))))

    return LanguageSpec(read, "seq2seq", 192, description, template, 32)


LANGUAGE: dict[str, LanguageSpec] = {
    "wiki-lm": LanguageSpec(_read_wiki_lm, "lm", 256, "leads of English Wikipedia articles as running text"),
    "wiki-description": _wiki_description(
        "en-us", "{text}\n\nShort description:", "Wikipedia lead to its short description"
    ),
    "wiki-description-es": _wiki_description(
        "es-es", "{text}\n\nDescripción breve:", "Spanish Wikipedia lead to its short description"
    ),
    "wiki-description-fr": _wiki_description(
        "fr-fr", "{text}\n\nCourte description :", "French Wikipedia lead to its short description"
    ),
}
