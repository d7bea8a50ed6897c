"""Text to token ids, with the tokenizer in the model's folder."""

from pathlib import Path

import numpy as np

from mlfs_jax.data.encode_language import encode_lm, encode_seq2seq
from mlfs_jax.data.encoded import Encoded, fingerprint
from mlfs_jax.data.examples import Examples
from mlfs_jax.data.tasks import Task, get_task
from mlfs_jax.data.tokenizer import CHUNK, check_ids, check_length, load_tokenizer, model_config

__all__ = ["Encoded", "encode", "fingerprint", "load_task", "load_tokenizer"]


def encode(examples: Examples, model_dir: str | Path, max_length: int) -> Encoded:
    """Tokenize as the model of `model_dir` expects, cutting to `max_length` tokens (of a pair, the longer).

    Raises `ConfigError` for a max_length that the model has no positions for, `DataError` for no tokenizer.
    """
    config = model_config(model_dir)
    check_length(config, max_length)
    tokenizer = load_tokenizer(model_dir)
    tokenizer.enable_truncation(max_length)
    texts, pairs = examples.texts, examples.pairs
    inputs: list = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
    with_types = config.get("type_vocab_size", 2 * (config.get("model_type") in ("bert", "electra"))) > 1
    lengths, ids, types = [], [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
    for start in range(0, len(inputs), CHUNK):
        encodings = tokenizer.encode_batch(inputs[start : start + CHUNK])
        lengths += [len(e.ids) for e in encodings]
        ids.append(np.array([t for e in encodings for t in e.ids], np.int32))
        if with_types:
            types.append(np.array([t for e in encodings for t in e.type_ids], np.int32))
    check_ids(config, flat := np.concatenate(ids), tokenizer)
    pad_id = config.get("pad_token_id")
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Encoded(
        ids=flat,
        types=np.concatenate(types) if with_types else None,
        offsets=offsets,
        labels=examples.labels,
        pad_id=0 if pad_id is None else pad_id,
        max_length=max_length,
    )


def load_task(
    task: str | Path | Task, model_dir: str | Path, *, max_length: int | None = None, limit: int | None = None
) -> dict[str, Encoded]:
    """Read a task and encode it for the model in `model_dir`: {split: Encoded}, the splits of `Task.read`.

    `limit` draws at most that many examples of every split (for a demo); of running text an example is a block of
    max_length tokens. `max_length` defaults to the task's.
    """
    task = task if isinstance(task, Task) else get_task(task)
    length, splits = task.max_length if max_length is None else max_length, {}
    for split, examples in task.read().items():
        if task.problem == "lm":
            blocks = encode_lm(examples, model_dir, length, whole_blocks=split == "train")
            splits[split] = blocks if limit is None else blocks.subset(limit)
        else:
            splits[split] = encode_for(task, examples if limit is None else examples.subset(limit), model_dir, length)
    return splits


def encode_for(task: Task, examples: Examples, model_dir: str | Path, max_length: int) -> Encoded:
    """Examples of a task, encoded as its problem asks for."""
    if task.problem == "lm":
        return encode_lm(examples, model_dir, max_length)
    if task.problem == "seq2seq":
        return encode_seq2seq(examples, model_dir, max_length, task.max_completion)
    return encode(examples, model_dir, max_length)
