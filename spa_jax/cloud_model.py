"""The cloud's model for real: one frozen decoder, a key-value cache with a row for each slot, a gate for each session.

A step reads one token in every slot at once, whether it has something to say or not: one compiled program, whoever
comes and goes. Gates and settings are data, so sessions with different plugins share the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

import mlfs_jax.model as backbone_model
from mlfs_jax.backbone.cache import Cache, init_cache
from mlfs_jax.errors import ConfigError
from mlfs_jax.fingerprint import base_fingerprint
from mlfs_jax.model import Model, apply_head
from mlfs_jax.sharding import replicated, shard_base, sharding_of
from spa_jax.engine import Read
from spa_jax.errors import PluginError
from spa_jax.gate import gate_probability
from spa_jax.model import make_frame
from spa_jax.public import Public
from spa_jax.seam import Setting
from spa_jax.wire import Hello

CACHE_AXES = ("layers", "slots", "positions", "kv_heads", "head_dim")


class DecoderCloud:
    """See :class:`spa_jax.engine.CloudModel`."""

    def __init__(
        self,
        model: Model,
        *,
        slots: int = 8,
        context: int = 1024,
        chunk: int = 64,
        public: Sequence[Public] = (),
        mesh: Mesh | None = None,
        dtype: DTypeLike = jnp.float32,
    ):
        """
        Args:
            slots: sessions at a time; a step costs what this many rows cost.
            context: tokens that each may hold.
            chunk: tokens of a prompt that are read at once.
            public: Downs that devices may ask for.
            mesh: over which base and cache are spread; None: one device.
            dtype: of the cache.

        Raises:
            ConfigError: a context that the positions of the model do not reach, or sizes below 1.
            PluginError: a Down of another base.
        """
        config = model.decoder
        for part in public:
            rows = config.embed if part.gate is None else len(part.gate) - 1
            if not part.down.shape[1] == config.embed == rows or max(part.taps, default=0) >= config.layers:
                raise PluginError(
                    f"the public Down {part.name} is for {part.down.shape[1]} channels and layers {list(part.taps)}: "
                    f"the base has {config.embed} channels and {config.layers} layers."
                )
        if min(slots, context, chunk) < 1:
            raise ConfigError(f"slots = {slots}, context = {context}, chunk = {chunk}: expected at least 1 of each.")
        if config.positions != "alibi" and context > config.max_positions:
            raise ConfigError(f"context = {context}: this model has {config.max_positions} positions; give fewer.")
        self.fingerprint = base_fingerprint(config, model.base)
        self.vocab, self.embed, self.layers = config.vocab_size, config.embed, config.layers
        self.slots, self.context, self.chunk = slots, context, chunk
        self.public: Mapping[str, Public] = {one.name: one for one in public}
        self._graphdef, self._base = model.graphdef, model.base if mesh is None else shard_base(mesh, model.base)
        cache = init_cache(config, slots, context + chunk, dtype)  # a chunk's padding is written, then forgotten
        hidden, gates = jnp.zeros((slots, config.embed)), jnp.zeros((slots, config.embed + 1, 2))
        if mesh is not None:
            place = lambda x: jax.device_put(x, sharding_of(mesh, CACHE_AXES, x.shape))  # noqa: E731
            rest = [jax.device_put(x, replicated(mesh)) for x in (cache.valid, cache.length, hidden, gates)]
            cache, hidden, gates = Cache(place(cache.k), place(cache.v), *rest[:2]), *rest[2:]
        self._cache, self._hidden, self._gates = cache, hidden, gates
        self._adds = np.zeros(slots, bool)
        self._rows: list[np.ndarray] = [np.zeros(0, int)] * slots  # of all activations, those that a session's taps are
        self._downs: list[Public | None] = [None] * slots

    @property
    def memory(self) -> dict[str, int]:
        """Bytes that it holds, whatever the sessions do."""
        sizes = {"base": self._base, "cache": self._cache, "rest": (self._hidden, self._gates)}
        return {name: sum(x.nbytes for x in jax.tree.leaves(tree)) for name, tree in sizes.items()}

    def open(self, slot: int, terms: Hello) -> None:
        public, gate = None, terms.gate
        if terms.public is not None:
            public = self.public.get(terms.public)
            if public is None:
                known = ", ".join(self.public) or "none"
                raise PluginError(f"no public Down of the name {terms.public[:40]!r}; there is: {known}.")
            if not np.array_equal(public.taps, terms.taps):
                raise PluginError(f"the public Down is for the layers {list(public.taps)}, not the plugin's.")
            gate = public.gate if gate is None else gate
        setting = Setting.parse(terms.setting)
        if setting.gated and gate is None:
            raise PluginError(f"setting {setting} has a gate: send its weights, the public Down has none.")
        gate = np.zeros((self.embed + 1, 2), np.float32) if gate is None else gate
        self._cache, self._gates = _clear(self._cache, self._gates, np.int32(slot), gate)
        self._rows[slot] = np.r_[0, 1 + np.asarray(terms.taps)]
        self._adds[slot], self._downs[slot] = setting.adds, public

    def extend(self, slot: int, tokens: Sequence[int]) -> Read:
        count = len(tokens)
        width = min(self.chunk, 1 << (count - 1).bit_length())  # few widths: each is a compile
        padded = np.zeros(width, np.int32)
        padded[:count] = tokens
        at = np.int32(slot), np.int32(count)
        self._cache, self._hidden, out = _extend(
            self._graphdef, self._base, self._gates, self._cache, self._hidden, *at, padded
        )
        token, gate, taps, hidden = jax.device_get(out)
        return self._read(slot, token, gate[:count], taps[:, 0, :count], hidden)

    def step(self, slots: Sequence[int], tokens: Sequence[int]) -> list[Read]:
        every, active = np.zeros(self.slots, np.int32), np.zeros(self.slots, bool)
        every[list(slots)], active[list(slots)] = tokens, True
        self._cache, self._hidden, out = _step(
            self._graphdef, self._base, self._gates, self._cache, self._hidden, every, active
        )
        token, gate, taps, hidden = jax.device_get(out)
        return [self._read(s, token[s], gate[s : s + 1], taps[:, s], hidden[s]) for s in slots]

    def finish(self, slots: Sequence[int], g: np.ndarray) -> list[int]:
        every, use = np.zeros((self.slots, self.embed), np.float32), list(slots)
        every[use] = g
        chosen = np.asarray(_finish(self._graphdef, self._base, self._hidden, every, self._adds))
        return [int(token) for token in chosen[use]]

    def warm_up(self) -> None:
        """Compile all that sessions will need, so that no device waits for it."""
        no_gate = np.zeros((self.embed + 1, 2), np.float32)
        width = 1
        while True:
            self._cache, self._gates = _clear(self._cache, self._gates, np.int32(0), no_gate)
            self.extend(0, [0] * width)
            if width >= self.chunk:
                break
            width = min(2 * width, self.chunk)
        self.step([0], [0])
        self.finish([0], np.zeros((1, self.embed), np.float32))
        self._cache, self._gates = _clear(self._cache, self._gates, np.int32(0), no_gate)

    def _read(self, slot: int, token, gate, taps: Float[np.ndarray, "L T D"], hidden) -> Read:
        taps, public = taps[self._rows[slot]], self._downs[slot]
        return Read(int(token), gate, taps if public is None else public.project(taps), hidden)


@partial(jax.jit, donate_argnums=(0, 1))
def _clear(cache: Cache, gates: Float[Array, "B rows 2"], slot, gate):
    emptied = Cache(cache.k, cache.v, cache.valid.at[slot].set(False), cache.length.at[slot].set(0))
    return emptied, gates.at[slot].set(gate)


@partial(jax.jit, static_argnames="graphdef", donate_argnames=("cache", "hidden"))
def _extend(graphdef: nnx.GraphDef, base, gates, cache: Cache, hidden, slot, count, tokens: Int[Array, " T"]):
    """A chunk, padded on the right, in one slot; the padding leaves no trace."""
    axes: Any = Cache(1, 1, 0, 0)  # type: ignore[arg-type]  # a tree of slots' axes
    row = jax.tree.map(lambda x, axis: jax.lax.dynamic_slice_in_dim(x, slot, 1, axis), cache, axes)
    real = jnp.arange(len(tokens)) < count
    out, taps = _forward(graphdef, base, row, tokens[None], real[None])
    row = Cache(out.cache.k, out.cache.v, out.cache.valid, row.length + count)
    put = lambda x, new, axis: jax.lax.dynamic_update_slice_in_dim(x, new, slot, axis)  # noqa: E731
    cache = jax.tree.map(put, cache, row, axes)
    last = out.hidden[0, count - 1]
    gate = _gate(gates[slot], out.hidden[0])
    token = apply_head(graphdef, base, last).argmax(-1)
    return cache, hidden.at[slot].set(last.astype(hidden.dtype)), (token, gate, taps, last.astype(jnp.float32))


@partial(jax.jit, static_argnames="graphdef", donate_argnames=("cache", "hidden"))
def _step(graphdef, base, gates, cache: Cache, hidden, tokens: Int[Array, " B"], active: Bool[Array, " B"]):
    """One token in each active slot; the others stay as they are."""
    out, taps = _forward(graphdef, base, cache, tokens[:, None], active[:, None])
    cache = Cache(out.cache.k, out.cache.v, out.cache.valid, cache.length + active)
    last = out.hidden[:, 0]
    gate = jax.vmap(_gate)(gates, last)
    token = apply_head(graphdef, base, last).argmax(-1)
    hidden = jnp.where(active[:, None], last.astype(hidden.dtype), hidden)
    return cache, hidden, (token, gate, taps, hidden)


@partial(jax.jit, static_argnames="graphdef")
def _finish(graphdef, base, hidden: Float[Array, "B D"], g: Float[Array, "B D"], adds: Bool[Array, " B"]):
    """As :func:`spa_jax.model.cloud_finish`, with a setting for each row."""
    return apply_head(graphdef, base, jnp.where(adds[:, None], hidden + g, g)).argmax(-1)


def _forward(graphdef, base, cache: Cache, tokens: Int[Array, "B T"], real: Bool[Array, "B T"]):
    batch = {"input_ids": tokens, "attention_mask": real.astype(jnp.int32)}
    out = backbone_model.forward(graphdef, base, batch, taps=True, cache=cache, logits=False)
    return out, make_frame(out, tuple(range(out.taps.shape[0])), real).taps


def _gate(rows: Float[Array, "D+1 2"], hidden: Float[Array, "... D"]) -> Float[Array, "..."]:
    """p of a gate as it travels: the bias below the kernel."""
    return gate_probability({"kernel": rows[:-1], "bias": rows[-1]}, hidden)
