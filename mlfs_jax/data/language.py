"""The language tasks: causal text ("lm") and prompt -> completion ("seq2seq"). Each is one line of a table."""

import json
from collections.abc import Callable
from dataclasses import dataclass

import yaml

from mlfs_jax import registry
from mlfs_jax.data.examples import Examples, prompted, split_by_hash


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


def _read_dialogues() -> dict[str, Examples]:
    folder, prompts, replies = registry.fetch("dialogues"), [], []
    for file in sorted(folder.glob("*.yml")):
        for turns in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            if isinstance(turns, list):  # one entry is question and answer in one sentence
                turns = [turn.strip() for turn in turns]
                prompts += turns[:-1]
                replies += turns[1:]
    return split_by_hash(prompted(DIALOGUE, prompts, replies))


DIALOGUE = "{text}\n\nReply:"
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
    "dialogues": LanguageSpec(
        _read_dialogues, "seq2seq", 192, "each turn of an English dialogue to the next, without repeats", DIALOGUE, 64
    ),
}
