"""Order and padding: which examples make which batch, as a pure function of (seed, step)."""

from collections.abc import Iterator, Sequence

import numpy as np

from mlfs_jax.data.encoded import Encoded
from mlfs_jax.errors import ConfigError

BUCKETS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)


def buckets_up_to(max_length: int, buckets: Sequence[int] = BUCKETS) -> tuple[int, ...]:
    """The widths a batch may have: the `buckets` below `max_length`, and `max_length` itself."""
    if any(b < 1 for b in buckets):
        raise ConfigError(f"buckets = {tuple(buckets)}: expected numbers of tokens, of at least 1.")
    return (*sorted(b for b in set(buckets) if b < max_length), max_length)


def pad(
    encoded: Encoded, rows: Sequence[int] | np.ndarray, width: int, *, prompts: bool = False
) -> dict[str, np.ndarray]:
    """The examples `rows` as int32 arrays [rows, width], filled up on the right, and what their loss needs.

    That is labels [rows] (int32 or float32); for language, loss_mask float32 [rows, width]: 1 where the token is to
    be predicted (from those before it). With `prompts`, only what is given of each example, filled up on the left.
    """
    starts, ends = encoded.offsets[:-1], encoded.offsets[1:]
    if prompts:
        ends = starts + encoded.starts
    ids = np.full((len(rows), width), encoded.pad_id, np.int32)
    mask = np.zeros((len(rows), width), np.int32)
    types = None if encoded.types is None else np.zeros((len(rows), width), np.int32)
    for r, i in enumerate(rows):
        tokens, n = slice(starts[i], ends[i]), ends[i] - starts[i]
        place = slice(width - n, None) if prompts else slice(n)
        ids[r, place] = encoded.ids[tokens]
        mask[r, place] = 1
        if types is not None:
            types[r, place] = encoded.types[tokens]
    batch = {"input_ids": ids, "attention_mask": mask}
    if types is not None:
        batch["token_type_ids"] = types
    if encoded.labels is not None:
        batch["labels"] = encoded.labels[np.asarray(rows)]
    if encoded.starts is not None and not prompts:
        given = np.arange(width) < encoded.starts[np.asarray(rows)][:, None]
        batch["loss_mask"] = np.where(given, 0, mask).astype(np.float32)
    return batch


class Batches:
    """Endless training batches by random access: `batches[step]` depends on (seed, step) and nothing else.

    Resuming at any step therefore needs no state. Every epoch is a new shuffle without replacement; the last
    len(encoded) % batch_size examples of a shuffle are left out of that epoch. Within a window of `window`
    batches the examples are grouped by length, so that little is padding; then the batches are shuffled.
    Every batch is padded to one of `buckets`, so a jitted step compiles at most len(buckets) times.
    """

    def __init__(
        self,
        encoded: Encoded,
        batch_size: int,
        *,
        seed: int = 0,
        buckets: Sequence[int] = BUCKETS,
        window: int = 50,
    ):
        if not 1 <= batch_size <= len(encoded):
            raise ConfigError(f"batch_size is {batch_size}; expected 1 to {len(encoded)}, the number of examples.")
        if window < 1:
            raise ConfigError(f"window is {window}; expected at least 1 batch.")
        if seed < 0:
            raise ConfigError(f"seed is {seed}; expected 0 or more.")
        self.encoded, self.batch_size, self.seed, self.window = encoded, batch_size, seed, window
        self.buckets = buckets_up_to(encoded.max_length, buckets)
        self._lengths = encoded.lengths
        self._last: tuple[int, np.ndarray] | None = None  # (epoch, its rows): neighbours share an epoch

    @property
    def epoch_steps(self) -> int:
        """Batches in one epoch."""
        return len(self.encoded) // self.batch_size

    def rows(self, step: int) -> np.ndarray:
        """The example numbers [B] of the batch at `step`."""
        if step < 0:
            raise ConfigError(f"step is {step}; expected 0 or more.")
        epoch, index = divmod(step, self.epoch_steps)
        if self._last is None or self._last[0] != epoch:
            self._last = (epoch, self._epoch_rows(epoch))
        return self._last[1][index]

    def _epoch_rows(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.encoded))[: self.epoch_steps * self.batch_size]
        size = self.window * self.batch_size
        windows = [order[i : i + size] for i in range(0, len(order), size)]
        grouped = np.concatenate([w[np.argsort(self._lengths[w], kind="stable")] for w in windows])
        return rng.permutation(grouped.reshape(self.epoch_steps, self.batch_size), axis=0)

    def width(self, step: int) -> int:
        """The bucket that the batch at `step` is padded to."""
        return _bucket(self._lengths[self.rows(step)].max(), self.buckets)

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        """input_ids, attention_mask and (if the model has types) token_type_ids, int32 [B, T]; labels [B].

        For language, loss_mask float32 [B, T] in place of labels (see `pad`).
        """
        return self.part(step, np.arange(self.batch_size))

    def part(self, step: int, which: np.ndarray) -> dict[str, np.ndarray]:
        """Only these rows [b] of the batch at `step`, padded as the whole is: what one of several processes feeds."""
        return pad(self.encoded, self.rows(step)[which], self.width(step))


def _bucket(length: int, buckets: Sequence[int]) -> int:
    return next(b for b in buckets if b >= length)


def eval_batches(encoded: Encoded, batch_size: int, *, buckets: Sequence[int] = BUCKETS) -> list[dict[str, np.ndarray]]:
    """Every example once, shortest first, in batches of exactly `batch_size` rows.

    As `Batches`, plus `weight` float32 [B]: 1 for an example, 0 for a row that only fills up the last batch (its
    loss_mask is 0 as well).
    """
    return [batch for batch, _ in _in_order(encoded, batch_size, buckets, encoded.lengths, prompts=False)]


def prompt_batches(
    encoded: Encoded, batch_size: int, *, buckets: Sequence[int] = BUCKETS
) -> list[tuple[dict[str, np.ndarray], list[str]]]:
    """The prompts of a seq2seq split, shortest first, each batch with its reference texts.

    A batch has exactly `batch_size` rows: input_ids and attention_mask int32 [B, T], filled up on the left, and
    weight float32 [B] as `eval_batches`. The references are those of the rows of weight 1, which come first. Raises
    `ConfigError` for a split that has no prompts.
    """
    if encoded.references is None:
        raise ConfigError("these examples have no prompts to continue; generation is evaluated on a seq2seq task.")
    batches = _in_order(encoded, batch_size, buckets, encoded.starts, prompts=True)
    return [(batch, [encoded.references[i] for i in rows]) for batch, rows in batches]


def _in_order(
    encoded: Encoded, batch_size: int, buckets: Sequence[int], lengths: np.ndarray, *, prompts: bool
) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    """(batch with its weights, the example numbers of its real rows), shortest first."""
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; expected at least 1.")
    widths = buckets_up_to(encoded.max_length, buckets)
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        weight = np.zeros(batch_size, np.float32)
        weight[: len(rows)] = 1
        filled = np.concatenate([rows, np.full(batch_size - len(rows), rows[0])])  # a real text: no empty attention
        batch = pad(encoded, filled, _bucket(lengths[rows].max(), widths), prompts=prompts)
        if "loss_mask" in batch:
            batch["loss_mask"] *= weight[:, None]
        yield batch | {"weight": weight}, rows
