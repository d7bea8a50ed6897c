"""Continue texts: ``generate``, ``stream``, and the memory between two calls, a ``Session``."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mlfs_jax.backbone.cache import Cache, init_cache
from mlfs_jax.backbone.tree import Mask
from mlfs_jax.errors import ConfigError, DataError, SessionError
from mlfs_jax.generate.loop import Rows
from mlfs_jax.generate.network import Network, decode_beams, decode_rows, decode_token, prefill
from mlfs_jax.generate.sampling import GREEDY, GenerateConfig
from mlfs_jax.model import Model, as_key
from mlfs_jax.sharding import shard_cache
from mlfs_jax.subnet import Subnet

Prompts = Sequence[Sequence[int]] | Mapping[str, Any]

SMALLEST = 16
"""Tokens in the smallest length bucket; the others are twice as long, each."""


@dataclass(frozen=True)
class Generated:
    """The continuations of B prompts.

    Attributes:
        tokens: the new tokens of each, without the stop token.
        scores: [B], the sum of the log-probabilities of the new tokens, the stop token's included (the model's own:
            whatever the temperature); after a beam search over length^length_penalty.
        finished: [B], whether a stop token ended it (else max_new_tokens did).
    """

    tokens: list[list[int]]
    scores: Float[np.ndarray, " B"]
    finished: Bool[np.ndarray, " B"]


def bucket(length: int) -> int:
    """What a length is padded to, so that a program is compiled once for many: 0, or a power of 2."""
    return max(SMALLEST, 1 << (length - 1).bit_length()) if length else 0


class Session:
    """The texts so far, as the keys and values that one network made of them: what a chat keeps between its turns.

    Give a fresh one to the first call of :func:`generate` or :func:`stream` and the same one to the next, whose prompts
    are then read *behind* all that came before, the generated tokens and the stop token included.

    Subnets share their weights, not their caches: the keys and values of one mean nothing to another, or to the same
    subnet with another adapter, and the text would silently come out wrong. So a session belongs to the network that
    filled it (model, subnet, adapter), and refuses any other.
    """

    def __init__(self):
        self.network: Network | None = None
        self.cache: Cache | None = None
        self.used = 0  # slots of the cache that are taken, padding included; the same for all rows
        self.lengths: list[int] = []  # real tokens of each row in the cache
        self.unread: list[list[int]] = []  # tokens of each row that come next and are not in the cache yet

    def feed(self, network: Network, prompts: list[list[int]], room: int) -> Int[np.ndarray, " B"]:
        """Read all but each row's last token; keep ``room`` slots free. Returns the last tokens.

        Raises:
            SessionError: another network, or another number of rows, than before.
            ConfigError: nothing to read, tokens that are none, or a text that is longer than the context.
        """
        if self.network is not None:
            differs = self.network.difference(network)
            if differs is not None:
                raise SessionError(
                    f"this session was filled by another {differs}: the cache of one network means nothing to "
                    "another. Start a new Session() and give it the whole text."
                )
            if len(prompts) != len(self.lengths):
                raise SessionError(f"{len(prompts)} prompts for a session of {len(self.lengths)} texts.")
        rows = [[*old, *new] for old, new in zip(self.unread or [[]] * len(prompts), prompts, strict=True)]
        lengths = self.lengths or [0] * len(rows)
        check_prompts(network, rows, lengths, room)
        width = bucket(max(len(row) for row in rows) - 1)
        self._make_room(network, len(rows), self.used + width, room)
        if width:
            tokens, real = left_pad([row[:-1] for row in rows], width, network.model.config.pad_token_id)
            self.cache = prefill(*network.weights, self.cache, tokens, real)
        self.network = network
        self.used += width
        self.lengths = [n + len(row) - 1 for n, row in zip(lengths, rows, strict=True)]
        self.unread = [row[-1:] for row in rows]
        return np.asarray(self.unread, np.int32)[:, 0]

    def _make_room(self, network: Network, batch: int, used: int, room: int) -> None:
        if self.cache is None:
            fresh = init_cache(network.model.decoder, batch, used + bucket(room), network.dtype)
            self.cache = shard_cache(network.model.base, fresh)
        elif self.cache.capacity < used + room:
            more = bucket(used + room) - self.cache.capacity
            grow = lambda x, axis: jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)])  # noqa: E731
            c = self.cache
            grown = Cache(k=grow(c.k, 2), v=grow(c.v, 2), valid=grow(c.valid, 1), length=c.length)
            self.cache = shard_cache(network.model.base, grown)


def check_prompts(network: Network, rows: list[list[int]], lengths: list[int], room: int) -> None:
    """Every row has tokens, of the vocabulary, and positions for ``room`` more."""
    config = network.model.config
    if not rows:
        raise ConfigError("no prompts: expected at least one.")
    for i, (row, before) in enumerate(zip(rows, lengths, strict=True)):
        which = f"prompt {i} of {len(rows)}" if len(rows) > 1 else "the prompt"
        if not row:
            raise ConfigError(f"{which} is empty: expected at least one token, such as the beginning-of-text token.")
        strange = [token for token in row if not 0 <= token < config.vocab_size]
        if strange:
            raise ConfigError(
                f"{which} has tokens {strange[:4]}: expected ids from 0 to {config.vocab_size - 1}; is it from "
                "another model's tokenizer?"
            )
        length, context = before + len(row), config.max_positions
        if length >= context:
            raise ConfigError(
                f"{which} has {length} tokens; the context of {network.model.name} is {context}, which leaves no room "
                f"for a new one: cut it to {context - 1} at most."
            )
        if length + room > context:
            raise ConfigError(
                f"{which} has {length} tokens, and max_new_tokens = {room} more are beyond the context of "
                f"{network.model.name}, {context}: shorten it, or set max_new_tokens to {context - length} at most."
            )


def left_pad(rows: list[list[int]], width: int, pad: int) -> tuple[Int[np.ndarray, "B C"], Bool[np.ndarray, "B C"]]:
    tokens, real = np.full((len(rows), width), pad, np.int32), np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :], real[i, width - len(row) :] = row, True
    return tokens, real


def as_rows(prompts: Prompts) -> list[list[int]]:
    """Prompts as lists of ids; padding, wherever it is, is left out."""
    if isinstance(prompts, Mapping):
        ids, mask = np.asarray(prompts["input_ids"]), prompts.get("attention_mask")
        real = np.ones(ids.shape, bool) if mask is None else np.asarray(mask, bool)
        if ids.ndim != 2 or real.shape != ids.shape:
            raise DataError(f"input_ids {ids.shape}, attention_mask {real.shape}: expected the same two axes, [B, T].")
        prompts = [row[keep] for row, keep in zip(ids, real, strict=True)]
    try:
        return [[operator.index(token) for token in prompt] for prompt in prompts]
    except (TypeError, ValueError) as error:
        raise DataError(
            f"prompts of type {type(prompts).__name__}: expected a list of token ids for each of them ({error}); "
            "for text, see generate_text."
        ) from error


def cut_at_end(out: Int[np.ndarray, "B M"], stop: Bool[np.ndarray, " V"]) -> tuple[list[list[int]], list[bool]]:
    """Rows without what is behind their end; whether a stop token is their last one."""
    rows = [row[row >= 0].tolist() for row in out]
    return rows, [bool(stop[row[-1]]) for row in rows]


def generate(
    model: Model,
    prompts: Prompts,
    config: GenerateConfig = GREEDY,
    *,
    lora: Mapping[str, dict] | None = None,
    subnet: Subnet | Mask | None = None,
    key: int | Array = 0,
    session: Session | None = None,
) -> Generated:
    """Continue every prompt until a stop token or for ``config.max_new_tokens``.

    Prompts are padded on the left, to a length bucket, and so is the room for new tokens: one compile serves all
    prompts of a bucket, all subnets, and all settings but the number of beams and whether it is random.

    Args:
        model: a decoder with its LM head.
        prompts: token ids of each; or a tokenizer's ``input_ids`` and ``attention_mask`` [B, T], padded on any side.
        config: greedy, random or beam search.
        lora: an adapter, as in :func:`mlfs_jax.forward`.
        subnet: which part of the model runs; None: all of it.
        key: seed or key of random sampling; the same one gives the same tokens.
        session: to continue the texts of an earlier call, see :class:`Session`.

    Raises:
        ConfigError: an encoder, no head, an empty prompt, one that is longer than the context, a strange token.
        SessionError: a session of another model, subnet, adapter or batch.
        SubnetError: a subnet that does not fit the model.
    """
    network, rows = Network(model, lora, subnet), as_rows(prompts)
    session = Session() if session is None else session
    stop = network.stop(config.stop_tokens)
    if config.beams * len(stop) >= 2**31:
        raise ConfigError(f"beams = {config.beams}: that many times the vocabulary of {len(stop)} cannot be ranked.")
    first = session.feed(network, rows, config.max_new_tokens)
    common = {"room": bucket(config.max_new_tokens), "limit": np.int32(config.max_new_tokens), "stop": stop}
    if config.beams > 1:
        penalty = np.float32(config.length_penalty)
        out, scores = decode_beams(
            *network.weights, session.cache, first, beams=config.beams, length_penalty=penalty, **common
        )
        tokens, finished = cut_at_end(np.asarray(out), stop)
        session.unread = [[*old, *new] for old, new in zip(session.unread, tokens, strict=True)]
    else:
        end, out = decode_rows(
            *network.weights, session.cache, first, sampling=config.sampling, key=as_key(key), **common
        )
        scores, (tokens, finished) = end.score, cut_at_end(np.asarray(out), stop)
        session.cache, session.used = end.state, session.used + int(end.count)
        session.lengths = [n + len(new) for n, new in zip(session.lengths, tokens, strict=True)]
        session.unread = [new[-1:] for new in tokens]
    tokens = [new[:-1] if ended else new for new, ended in zip(tokens, finished, strict=True)]
    return Generated(tokens, np.asarray(scores), np.asarray(finished))


def stream(
    model: Model,
    prompt: Sequence[int],
    config: GenerateConfig = GREEDY,
    *,
    lora: Mapping[str, dict] | None = None,
    subnet: Subnet | Mask | None = None,
    key: int | Array = 0,
    session: Session | None = None,
) -> Iterator[int]:
    """Continue one prompt, token by token: those of :func:`generate` with the same arguments, as they come.

    A session may be continued from wherever the reader stopped reading.

    Raises:
        ConfigError: a beam search, whose first tokens are known at its end; else as :func:`generate`.
    """
    if config.beams > 1:
        raise ConfigError(f"beams = {config.beams}: a beam search knows its first token at its end; use generate.")
    network, session = Network(model, lora, subnet), Session() if session is None else session
    stop = network.stop(config.stop_tokens)
    first = session.feed(network, as_rows([prompt]), config.max_new_tokens)
    return _stream(network, session, first, config, stop, as_key(key))


def _stream(network: Network, session: Session, first, config: GenerateConfig, stop, key) -> Iterator[int]:
    rows, sampling = Rows.begin(session.cache, jnp.asarray(first)), config.sampling
    on_device = jnp.asarray(stop)
    for _ in range(config.max_new_tokens):
        if session.cache is not rows.state:
            raise SessionError("this text's session went on elsewhere: read a stream to where you want it, first.")
        rows, token = decode_token(*network.weights, rows, stop=on_device, sampling=sampling, key=key)
        token = int(token[0])
        session.cache, session.unread = rows.state, [[token]]
        session.used, session.lengths = session.used + 1, [session.lengths[0] + 1]
        if stop[token]:
            return
        yield token
