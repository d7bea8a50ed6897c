"""`Examples`, what every task reads, and the split by a hash of the text."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Examples:
    """N texts (or pairs of texts) with their labels: int32 class indices [N], or float32 scores [N]."""

    texts: Sequence[str]
    labels: np.ndarray
    pairs: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int]) -> "Examples":
        """The examples at these row numbers, in this order."""
        pairs = None if self.pairs is None else [self.pairs[i] for i in rows]
        return Examples([self.texts[i] for i in rows], self.labels[np.asarray(rows, np.int64)], pairs)


def text_hash(text: str) -> int:
    """A number that depends on the text alone, the same on every machine and in every run."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest(), "big")


def split_by_hash(examples: Examples) -> dict[str, Examples]:
    """80/10/10 train/validation/test by sha256(text) % 100; of equal examples only the first is kept.

    The position in the file plays no part, so a sorted file splits evenly and adding rows moves no other row.
    Pairs are split by their first text: no text stands in two splits.
    """
    seen: set[tuple[str, str]] = set()
    rows: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for i, text in enumerate(examples.texts):
        key = (text, "" if examples.pairs is None else examples.pairs[i])
        if key in seen:
            continue
        seen.add(key)
        percent = text_hash(text) % 100
        rows["train" if percent < 80 else "validation" if percent < 90 else "test"].append(i)
    return {split: examples.take(which) for split, which in rows.items()}
