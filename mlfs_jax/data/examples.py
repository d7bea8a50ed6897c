"""`Examples`, what every task reads, and the split by a hash of the text."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlfs_jax.errors import ConfigError, unknown


@dataclass(frozen=True)
class Examples:
    """N texts and what belongs to each; the fields that a problem does not have are None.

    Attributes:
        texts: the text; of a seq2seq prompt, the part that may be cut where the prompt is too long.
        labels: int32 class indices [N] or float32 scores [N].
        pairs: second texts, of tasks about pairs.
        tails: seq2seq: the end of each prompt, after the text; never cut. None: prompts have no such end.
        completions: seq2seq: what follows the prompt, with the space that it begins with.
        users: seq2seq: whose example it is.
    """

    texts: Sequence[str]
    labels: np.ndarray | None = None
    pairs: Sequence[str] | None = None
    tails: Sequence[str] | None = None
    completions: Sequence[str] | None = None
    users: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int] | np.ndarray) -> "Examples":
        """The examples at these row numbers, in this order."""

        def of(column):
            return None if column is None else [column[i] for i in rows]

        labels = None if self.labels is None else self.labels[np.asarray(rows, np.int64)]
        return Examples(of(self.texts), labels, of(self.pairs), of(self.tails), of(self.completions), of(self.users))

    def subset(self, n: int, seed: int = 0) -> "Examples":
        """`n` examples drawn at random (the same for the same seed), in their old order; at most all."""
        return self if n >= len(self) else self.take(draw(len(self), n, seed))

    def of_user(self, user: str) -> "Examples":
        """The examples of one user; raises `UnknownNameError` with the nearest names."""
        return self.take(rows_of_user(self.users, user))


def prompted(
    template: str, texts: Sequence[str], completions: Sequence[str], fields: Sequence[dict[str, str]] | None = None
) -> Examples:
    """Seq2seq examples whose prompts are `template` with {text}, which it begins with, and `fields` filled in.

    A completion gets the space that separates it from its prompt.
    """
    end = template.removeprefix("{text}")
    tails = [end] * len(texts) if fields is None else [end.format(**row) for row in fields]
    tails = [tail if text else tail.lstrip() for text, tail in zip(texts, tails, strict=True)]
    return Examples(list(texts), tails=tails, completions=[f" {c}" for c in completions])


def draw(total: int, n: int, seed: int) -> np.ndarray:
    """`n` of `total` row numbers at random, ascending."""
    if n < 1:
        raise ConfigError(f"a subset of {n} examples; expected at least 1.")
    return np.sort(np.random.default_rng([seed, total]).permutation(total)[:n])


def rows_of_user(users: Sequence[str] | None, user: str) -> list[int]:
    """Where `users` says `user`; raises `UnknownNameError` where it never does."""
    rows = [i for i, other in enumerate(users or ()) if other == user]
    if not rows:
        raise unknown("user", user, set(users or ()))
    return rows


def text_hash(text: str) -> int:
    """A number that depends on the text alone, the same on every machine and in every run."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest(), "big")


def split_by_hash(examples: Examples) -> dict[str, Examples]:
    """80/10/10 train/validation/test by sha256(text) % 100; of equal examples only the first is kept.

    The position in the file plays no part, so a sorted file splits evenly and adding rows moves no other row.
    Pairs and prompts are split by their (first) text: no text stands in two splits.
    """
    seen: set[tuple] = set()
    rows: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    more = [c for c in (examples.pairs, examples.tails, examples.completions, examples.users) if c is not None]
    for i, text in enumerate(examples.texts):
        key = (text, *(column[i] for column in more))
        if key in seen:
            continue
        seen.add(key)
        percent = text_hash(text) % 100
        rows["train" if percent < 80 else "validation" if percent < 90 else "test"].append(i)
    return {split: examples.take(which) for split, which in rows.items()}
