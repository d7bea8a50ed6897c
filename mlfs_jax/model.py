"""A pretrained network as data: config, graphdef, base; and ``forward``, the one pure function of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float

from mlfs_jax.backbone.cache import Cache
from mlfs_jax.backbone.decoder import Decoder
from mlfs_jax.backbone.encoder import Encoder
from mlfs_jax.backbone.quantised import Quantised, quantise
from mlfs_jax.backbone.tree import Mask, Output, flatten, map_named, misfit
from mlfs_jax.config import Config, DecoderConfig
from mlfs_jax.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class Model:
    """A network with its frozen weights.

    Attributes:
        config: what it is.
        graphdef: its structure; static and hashable, so it goes into ``jax.jit`` as a static argument.
        base: its weights, an ``nnx.State`` of ``nnx.Param`` with named axes.
        name: for people.
        source: folder of the Hugging Face checkpoint it came from (tokenizer files live there), if any.
        label_names: what that checkpoint calls the labels of its own classifier, if it came with one.
    """

    config: Config
    graphdef: nnx.GraphDef
    base: nnx.State
    name: str = "model"
    source: Path | None = None
    label_names: tuple[str, ...] | None = None

    def replace(self, **changes) -> Model:
        return dataclasses.replace(self, **changes)

    def astype(self, dtype: DTypeLike) -> Model:
        """The same network with weights of another type, in which it then computes (see :func:`forward`)."""
        return self.replace(base=cast_base(self.base, dtype))

    def quantise(self, bits: int) -> Model:
        """The same network, the kernels of its layers in 8 or 4 bits (:mod:`mlfs_jax.backbone.quantised`), or as they
        are: 32. Raises ConfigError for another number, and for a base on a mesh."""
        return self.replace(base=quantise(self.base, bits))

    @property
    def decoder(self) -> DecoderConfig:
        """The config of a language model; raises ConfigError for an encoder."""
        if not isinstance(self.config, DecoderConfig):
            raise ConfigError(f"{self.name} is an encoder ({self.config.family}): a decoder is needed here.")
        return self.config

    @property
    def num_params(self) -> int:
        return sum(leaf.size for leaf in flatten(self.base).values())


def _network(config: Config, rngs: nnx.Rngs) -> Encoder | Decoder:
    return Decoder(config, rngs=rngs) if isinstance(config, DecoderConfig) else Encoder(config, rngs=rngs)


def as_key(key: int | Array) -> Array:
    """A key of random numbers from itself, or from its seed."""
    if not isinstance(key, int | np.integer):
        return key
    if not -(2**63) <= key < 2**63:
        raise ConfigError(f"seed = {key}: expected a whole number of at most 64 bits.")
    return jax.random.key(int(key))


@lru_cache(maxsize=256)
def abstract(config: Config) -> tuple[nnx.GraphDef, nnx.State]:
    """Structure and abstract weights (shapes, dtypes, axes) of a network; nothing is allocated."""
    return nnx.split(nnx.eval_shape(lambda: _network(config, nnx.Rngs(0))))


def init_weights(config: Config, key: Array, names: tuple[str, ...] | None = None) -> dict[str, Array]:
    """Freshly initialised weights, by dotted name; only those in ``names`` when given.

    The whole network is traced and the compiler drops what is not asked for, so a new head on a large model costs
    the head alone.
    """

    @jax.jit
    def init(key):
        flat = flatten(nnx.state(_network(config, nnx.Rngs(params=key))))
        return {name: leaf[...] for name, leaf in flat.items() if names is None or name in names}

    return init(key)


def build(config: Config, weights: Mapping[str, Array | Quantised], **fields) -> Model:
    """A model from weights by dotted name.

    Raises:
        CheckpointError: a name is missing or unknown, or a shape is not the config's; the message names it.
    """
    graphdef, base = abstract(config)
    wanted = flatten(base)
    for problem, names in (
        ("missing", wanted.keys() - weights.keys()),
        ("unknown", weights.keys() - wanted.keys()),
    ):
        if names:
            raise CheckpointError(f"{problem} weights for this {config.family} config: {', '.join(sorted(names))}.")
    for name, spec in wanted.items():
        if weights[name].shape != spec.shape:
            raise CheckpointError(f"{name} has shape {weights[name].shape}; this config expects {spec.shape}.")
    return Model(config, graphdef, map_named(lambda name, _: weights[name], base), **fields)


def init_model(config: Config, key: int | Array, **fields) -> Model:
    """A model with random weights (tests, baselines that start from scratch)."""
    return build(config, init_weights(config, as_key(key)), **fields)


def check_dtype(dtype: DTypeLike) -> None:
    """Raise ConfigError for a type in which a network does not compute."""
    try:
        known = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        known = False
    if not known:
        raise ConfigError(
            f"dtype = {dtype!r}: expected float32, bfloat16 or float16; fewer bits are base_bits = 8 or 4."
        )


def cast_base(base: nnx.State, dtype: DTypeLike) -> nnx.State:
    """The weights in another type; what has it already is not copied. Raises ConfigError for no float."""
    check_dtype(dtype)
    return map_named(lambda _, leaf: leaf.get_value().astype(dtype), base)


INPUTS = ("input_ids", "attention_mask", "token_type_ids")
"""The entries of a batch that a network reads."""


def as_inputs(batch: Mapping[str, ArrayLike], base: nnx.State | None = None) -> dict[str, Array]:
    """What a network reads of a batch, as arrays: of a tokenizer's output, too, whose type ``jax.jit`` does not take.

    Args:
        base: its vocabulary is what ids are to be of, where they are not on a device yet.

    Raises:
        ConfigError: there are no ``input_ids``, they are not of two axes or not of the vocabulary, or another entry has
            not their shape.
    """
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        got = f"one with {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else type(batch).__name__
        raise ConfigError(f"batch = {got}: expected a dict with input_ids, int [B, T].")
    try:
        inputs = {name: jnp.asarray(batch[name]) for name in INPUTS if name in batch}
    except (TypeError, ValueError) as error:
        raise ConfigError(f"this batch does not make arrays ({error}): pad its texts to one length.") from None
    shape = inputs["input_ids"].shape
    if len(shape) != 2:
        raise ConfigError(f"input_ids has shape {shape}: expected two axes, [B, T].")
    if not jnp.issubdtype(inputs["input_ids"].dtype, jnp.integer):
        raise ConfigError(f"input_ids are {inputs['input_ids'].dtype}: expected whole numbers.")
    if base is not None and not isinstance(batch["input_ids"], jax.Array):
        ids, size = np.asarray(batch["input_ids"]), flatten(base)["embed.tokens.table"].shape[0]
        if wrong := ids[(ids < 0) | (ids >= size)][:1].tolist():
            raise ConfigError(
                f"token id {wrong[0]}: expected ids from 0 to {size - 1}; is it from another model's tokenizer?"
            )
    for name, value in inputs.items():
        if value.shape != shape:
            raise ConfigError(f"{name} has shape {value.shape}: expected {shape}, that of input_ids.")
    return inputs


def forward(
    graphdef: nnx.GraphDef,
    base: nnx.State,
    batch: Mapping[str, ArrayLike],
    *,
    lora: Mapping[str, dict] | None = None,
    mask: Mask | None = None,
    taps: bool = False,
    remat: bool = False,
    unroll: bool = False,
    rows: jax.sharding.Sharding | None = None,
    cache: Cache | None = None,
    logits: bool = True,
) -> Output:
    """Run the network: a pure function of (base, lora, mask, batch), compiled; jit, vmap, grad as you like.

    Derivatives are reverse-mode: an adapter's rule for its gradient has no ``jax.jvp``.

    It computes in the type of its base, to which adapters and masks are cast: give it a bfloat16 base
    (``model.astype``) and float32 adapters, and their gradients are float32. Norms, softmax and a decoder's logits are
    float32 always.

    Args:
        batch: ``input_ids`` and ``attention_mask``, int [B, T], or just what a Hugging Face tokenizer gives with
            ``padding=True``; ``token_type_ids`` if the model has types. Without a mask all tokens are real; a decoder
            takes padding on either side. Other entries (labels) are ignored.
        lora: low-rank pairs and full deltas by site, see :mod:`mlfs_jax.lora`.
        mask: the subnet to run, see :func:`mlfs_jax.make_mask`; None runs the maxnet.
        taps: also return every layer's output.
        remat: recompute each layer in the backward pass instead of keeping its activations; the scan over layers is
            then not unrolled: XLA would merge what is computed twice.
        unroll: unroll the scan over layers (``cost_analysis()`` counts the body of a scan once).
        rows: on a mesh, where activations [B, T, D] lie (:func:`mlfs_jax.sharding.rows_on`).
        cache: of a decoder, see :func:`mlfs_jax.init_cache`: the batch holds the T next tokens only.
        logits: False leaves out the head, whose logits may be the largest array of all.

    Raises:
        ConfigError: the batch has no ``input_ids`` of two axes, or has ids that are not of the vocabulary (in lists and
            numpy arrays; on a device they are not looked at); the adapter or the mask is of another model; T is beyond
            its table of positions, or beyond the cache's slots. How full a cache is, is known to its caller alone: what
            has no slot is dropped.
    """
    return _forward(
        graphdef,
        base,
        as_inputs(batch, base),
        lora=lora,
        mask=mask,
        taps=taps,
        remat=remat,
        unroll=unroll,
        rows=rows,
        cache=cache,
        logits=logits,
    )


@partial(jax.jit, static_argnames=("graphdef", "taps", "remat", "unroll", "rows", "logits"))
def _forward(graphdef, base, batch, *, lora, mask, taps, remat, unroll, rows, cache, logits) -> Output:
    if (wrong := misfit(base, lora or {}, mask)) is not None:
        raise ConfigError(f"{'mask' if wrong.startswith('mask') else 'adapter'} of another model: {wrong}.")
    pairs: dict[str, Mapping] = {}
    deltas: dict[str, Array] = {}
    for site, entry in (lora or {}).items():
        if "a" in entry:
            pairs[site] = entry
        deltas |= {f"{site}.{leaf}": value for leaf, value in entry.items() if leaf not in ("a", "b")}
    if deltas:

        def add(name: str, leaf: nnx.Param):
            return (leaf[...] + deltas[name]).astype(leaf.dtype) if name in deltas else leaf.get_value()

        base = map_named(add, base)
    pairs, mask = _cast((pairs, mask), flatten(base)["embed.tokens.table"].dtype)
    return nnx.merge(graphdef, base)(
        batch, pairs, mask, taps=taps, remat=remat, unroll=unroll, rows=rows, cache=cache, logits=logits
    )


def _cast(tree, dtype: DTypeLike):
    """Floating-point leaves in another type."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def apply_head(graphdef: nnx.GraphDef, base: nnx.State, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
    """fp32 logits of a language model from ``Output.hidden``: what ``forward(..., logits=False)`` leaves out."""
    network = nnx.merge(graphdef, base)
    return network.head(hidden, {}, network.embed.tokens)
