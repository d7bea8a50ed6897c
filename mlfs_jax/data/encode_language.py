"""Text to token ids for language models: blocks of running text, and prompts with their completions."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mlfs_jax.data.encoded import Encoded
from mlfs_jax.data.examples import Examples
from mlfs_jax.data.tokenizer import CHUNK, check_ids, check_length, load_tokenizer, model_config, specials
from mlfs_jax.errors import ConfigError, DataError


def encode_lm(examples: Examples, model_dir: str | Path, max_length: int, *, whole_blocks: bool = False) -> Encoded:
    """The texts, one after another, each with its end-of-text token, cut into blocks of max_length tokens.

    Every token of a block but its first is to be predicted. The last block is shorter, or with `whole_blocks` (for
    training) left out. Raises `ConfigError` for a max_length the model has no positions for, `DataError` for too
    little text.
    """
    config = model_config(model_dir)
    check_length(config, max_length)
    tokenizer = load_tokenizer(model_dir)
    special = specials(model_dir, tokenizer)
    prefix = [t for t in special.prefix if t != special.eos]  # OPT begins texts with the token that ends them
    parts = [np.array([*prefix, *ids, special.eos], np.int32) for ids in _tokenize(tokenizer, examples.texts)]
    stream = np.concatenate([np.zeros(0, np.int32), *parts])
    check_ids(config, stream, tokenizer)
    cuts = np.arange(0, len(stream) + 1, max_length)
    if not whole_blocks and len(stream) - cuts[-1] >= 2:  # of one token nothing is to be predicted
        cuts = np.append(cuts, len(stream))
    if len(cuts) < 2:
        raise DataError(
            f"{len(examples)} texts have {len(stream)} tokens together, too few for a block of {max_length}; "
            "add text, or choose a smaller max_length."
        )
    return Encoded(
        ids=stream[: cuts[-1]],
        types=None,
        offsets=cuts.astype(np.int64),
        labels=None,
        pad_id=special.pad,
        max_length=max_length,
        starts=np.ones(len(cuts) - 1, np.int32),
    )


def encode_seq2seq(examples: Examples, model_dir: str | Path, max_length: int, max_completion: int) -> Encoded:
    """Each example is prompt + completion + end-of-text; `starts` says where the completion begins.

    A completion keeps its first max_completion tokens, end-of-text included: one that was cut does not end. The
    prompt has the other max_length - max_completion tokens, whatever its completion's length. A longer one loses the
    end of its text and keeps its tail; where examples have no tails, it loses its beginning. Prompts are cut as
    strings and then tokenized, so that their ids are those of the prompt that a user would type.

    Raises:
        ConfigError: a max_length that the model has no positions for, or with no room for the prompts.
        DataError: a prompt that is no token.
    """
    config = model_config(model_dir)
    check_length(config, max_length)
    tokenizer = load_tokenizer(model_dir)
    special = specials(model_dir, tokenizer)
    max_completion = min(max_completion, max_length // 2)
    room = max_length - max_completion - len(special.prefix)
    prompts = list(_prompts(tokenizer, examples, room))
    ids, starts, lengths = [], [], []
    for prompt, completion in zip(prompts, _completions(tokenizer, prompts, examples.completions), strict=True):
        start = len(special.prefix) + len(prompt[1])
        if start == 0:
            raise DataError(f"the prompt {prompt[0]!r} is no token for this tokenizer; expected some text.")
        row = [*special.prefix, *prompt[1], *[*completion, special.eos][:max_completion]]
        ids.append(np.array(row, np.int32))
        starts.append(start)
        lengths.append(len(row))
    flat = np.concatenate([np.zeros(0, np.int32), *ids])
    check_ids(config, flat, tokenizer)
    return Encoded(
        ids=flat,
        types=None,
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        labels=None,
        pad_id=special.pad,
        max_length=max_length,
        starts=np.array(starts, np.int32),
        references=tuple(c.strip() for c in examples.completions),
        users=None if examples.users is None else tuple(examples.users),
        max_completion=max_completion,
    )


def _tokenize(tokenizer, texts: Sequence[str]) -> Iterator[list[int]]:
    for i in range(0, len(texts), CHUNK):
        for encoding in tokenizer.encode_batch(list(texts[i : i + CHUNK]), add_special_tokens=False):
            yield encoding.ids


def _prompts(tokenizer, examples: Examples, room: int) -> Iterator[tuple[str, list[int]]]:
    """(string, token ids) of each prompt, cut to `room` tokens."""
    tails = examples.tails or [""] * len(examples)
    whole = [text + tail for text, tail in zip(examples.texts, tails, strict=True)]
    for i, ids in enumerate(_tokenize(tokenizer, whole)):
        if len(ids) <= room:
            yield whole[i], ids
        else:
            yield _cut(tokenizer, examples.texts[i], tails[i], room, keep_start=examples.tails is not None)


def _cut(tokenizer, text: str, tail: str, room: int, keep_start: bool) -> tuple[str, list[int]]:
    alone = len(tokenizer.encode(tail, add_special_tokens=False).ids)
    if alone > room:
        raise ConfigError(
            f"max_length leaves {room} tokens for a prompt, and its end {tail!r} alone has {alone}; choose more."
        )
    offsets = tokenizer.encode(text, add_special_tokens=False).offsets
    for keep in range(min(room - alone, len(offsets)), 0, -1):  # tokens merge anew at the cut: it may take two rounds
        prompt = (text[: offsets[keep - 1][1]] if keep_start else text[offsets[-keep][0] :]) + tail
        ids = tokenizer.encode(prompt, add_special_tokens=False).ids
        if len(ids) <= room:
            return prompt, ids
    return tail, tokenizer.encode(tail, add_special_tokens=False).ids


def _completions(tokenizer, prompts: list[tuple[str, list[int]]], completions: Sequence[str]) -> Iterator[list[int]]:
    """Token ids of each completion as it reads behind its prompt.

    Some tokenizers write a text's first word in another way than a later one, so prompt and completion are tokenized
    together; only where a token would span both, the completion is tokenized alone.
    """
    together = _tokenize(tokenizer, [prompt + c for (prompt, _), c in zip(prompts, completions, strict=True)])
    for (_, prompt), ids, completion in zip(prompts, together, completions, strict=True):
        if ids[: len(prompt)] == prompt:
            yield ids[len(prompt) :]
        else:
            yield tokenizer.encode(completion, add_special_tokens=False).ids
