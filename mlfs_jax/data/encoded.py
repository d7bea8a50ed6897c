"""`Encoded`, the tokens of N examples."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int

from mlfs_jax.data.examples import draw, rows_of_user


@dataclass(frozen=True)
class Encoded:
    """N encoded examples, unpadded: example i is `ids[offsets[i]:offsets[i + 1]]`.

    Attributes:
        types: token types; None: the model has none, or the examples are language.
        labels: int32 classes or float32 scores; None: the tokens themselves are what is to be predicted (language).
        starts: language: the first token of each example that is to be predicted, at least 1: what stands before is
            given. Of a seq2seq example that is the length of its prompt.
        references: seq2seq: the completions as text, uncut.
        users: seq2seq with users: whose example it is.
        max_completion: seq2seq: the most tokens that a completion has, its end-of-text token included.
    """

    ids: Int[np.ndarray, "tokens"]
    types: Int[np.ndarray, "tokens"] | None
    offsets: Int[np.ndarray, "N+1"]
    labels: Int[np.ndarray, "N"] | Float[np.ndarray, "N"] | None
    pad_id: int
    max_length: int
    starts: Int[np.ndarray, "N"] | None = None
    references: tuple[str, ...] | None = None
    users: tuple[str, ...] | None = None
    max_completion: int = 0

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Int[np.ndarray, "N"]:
        """Tokens of each example, special tokens included."""
        return np.diff(self.offsets)

    def take(self, rows: Sequence[int] | np.ndarray) -> "Encoded":
        """The examples at these row numbers, in this order."""
        rows = np.asarray(rows, np.int64)
        ranges = [np.arange(self.offsets[i], self.offsets[i + 1]) for i in rows]
        where = np.concatenate([np.empty(0, np.int64), *ranges])
        of = lambda column: None if column is None else tuple(column[i] for i in rows)  # noqa: E731
        return replace(
            self,
            ids=self.ids[where],
            types=None if self.types is None else self.types[where],
            offsets=np.concatenate([[0], np.cumsum(self.lengths[rows])]),
            labels=None if self.labels is None else self.labels[rows],
            starts=None if self.starts is None else self.starts[rows],
            references=of(self.references),
            users=of(self.users),
        )

    def subset(self, n: int, seed: int = 0) -> "Encoded":
        """`n` examples drawn at random (the same for the same seed), in their old order; at most all."""
        return self if n >= len(self) else self.take(draw(len(self), n, seed))

    def of_user(self, user: str) -> "Encoded":
        """The examples of one user; raises `UnknownNameError` with the nearest names."""
        return self.take(rows_of_user(self.users, user))


def fingerprint(data: Mapping[str, Encoded]) -> str:
    """sha256 over the encoded examples of all splits: equal only for the same tokens, labels and prompt lengths."""
    digest = hashlib.sha256()
    for split in sorted(data):
        for array in (data[split].ids, data[split].offsets, data[split].labels, data[split].starts):
            if array is not None:
                digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
