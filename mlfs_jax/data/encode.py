"""Text to token ids, with the tokenizer in the model's folder."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from mlfs_jax.data.examples import Examples
from mlfs_jax.data.tasks import Task, get_task
from mlfs_jax.errors import ConfigError, DataError

CHUNK = 4096  # texts tokenized at once: the tokenizer's own objects are 100 times larger than the ids


@dataclass(frozen=True)
class Encoded:
    """N encoded examples, unpadded: example i is `ids[offsets[i]:offsets[i + 1]]`."""

    ids: Int[np.ndarray, "tokens"]
    types: Int[np.ndarray, "tokens"] | None  # None: the model has no token types
    offsets: Int[np.ndarray, "N+1"]
    labels: Int[np.ndarray, "N"] | Float[np.ndarray, "N"]  # int32 classes or float32 scores
    pad_id: int
    max_length: int

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> Int[np.ndarray, "N"]:
        """Tokens of each example, special tokens included."""
        return np.diff(self.offsets)

    def subset(self, n: int, seed: int = 0) -> "Encoded":
        """`n` examples drawn at random (the same for the same seed), in their old order; at most all."""
        if n < 1:
            raise ConfigError(f"a subset of {n} examples; expected at least 1.")
        if n >= len(self):
            return self
        rows = np.sort(np.random.default_rng([seed, len(self)]).permutation(len(self))[:n])
        where = np.concatenate([np.arange(self.offsets[i], self.offsets[i + 1]) for i in rows])
        offsets = np.concatenate([[0], np.cumsum(self.lengths[rows])])
        types = None if self.types is None else self.types[where]
        return replace(self, ids=self.ids[where], types=types, offsets=offsets, labels=self.labels[rows])


def load_tokenizer(model_dir: str | Path):
    """The `tokenizers.Tokenizer` of a model folder, with neither padding nor truncation switched on.

    Read from tokenizer.json directly: transformers would import torch where it is installed. Only a folder
    without tokenizer.json (vocab.txt, merges.txt, ...) goes through transformers' conversion.
    """
    from tokenizers import Tokenizer

    folder = Path(model_dir)
    file = folder / "tokenizer.json"
    try:
        if file.is_file():
            tokenizer = Tokenizer.from_file(str(file))
        else:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(str(folder)).backend_tokenizer
    except Exception as e:  # the Rust side raises plain Exception
        raise DataError(
            f"{folder} has no usable tokenizer: {type(e).__name__}: {e}. Expected tokenizer.json, "
            "or the vocabulary files of a tokenizer that transformers can convert."
        ) from e
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def encode(examples: Examples, model_dir: str | Path, max_length: int) -> Encoded:
    """Tokenize as the model of `model_dir` expects, cutting to `max_length` tokens (of a pair, the longer).

    Raises `ConfigError` for a max_length that the model has no positions for, `DataError` for no tokenizer.
    """
    config = json.loads((Path(model_dir) / "config.json").read_text())
    room = positions(config)
    if not 4 <= max_length <= room:
        raise ConfigError(f"max_length is {max_length}; expected 4 to {room}, the positions the model has.")
    tokenizer = load_tokenizer(model_dir)
    tokenizer.enable_truncation(max_length)
    inputs = list(examples.texts)
    if examples.pairs is not None:
        inputs = list(zip(inputs, examples.pairs, strict=True))
    with_types = config.get("type_vocab_size", 0) > 1
    lengths, ids, types = [], [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
    for start in range(0, len(inputs), CHUNK):
        encodings = tokenizer.encode_batch(inputs[start : start + CHUNK])
        lengths += [len(e.ids) for e in encodings]
        ids.append(np.array([t for e in encodings for t in e.ids], np.int32))
        if with_types:
            types.append(np.array([t for e in encodings for t in e.type_ids], np.int32))
    pad_id = config.get("pad_token_id")
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Encoded(
        ids=np.concatenate(ids),
        types=np.concatenate(types) if with_types else None,
        offsets=offsets,
        labels=examples.labels,
        pad_id=0 if pad_id is None else pad_id,
        max_length=max_length,
    )


def positions(config: dict) -> int:
    """Tokens a model can take: RoBERTa's table has pad_token_id + 1 rows that no token uses."""
    rows = config.get("max_position_embeddings", 512)
    roberta = config.get("model_type") in ("roberta", "xlm-roberta", "camembert")
    return rows - (config.get("pad_token_id", 1) + 1 if roberta else 0)


def load_task(
    task: str | Path | Task, model_dir: str | Path, *, max_length: int | None = None, limit: int | None = None
) -> dict[str, Encoded]:
    """Read a task and encode it for the model in `model_dir`: {split: Encoded}, the splits of `Task.read`.

    `limit` draws at most that many examples of every split (for a demo). `max_length` defaults to the task's.
    """
    task = task if isinstance(task, Task) else get_task(task)
    splits = {}
    for split, examples in task.read().items():
        encoded = encode(examples, model_dir, max_length or task.max_length)
        splits[split] = encoded if limit is None else encoded.subset(limit)
    return splits
