"""The side network: a small personal network beside the frozen backbone, that reads its layers' outputs.

Two kinds, both plain trees ``{name: array}`` (:func:`side_axes` names their axes as those of a base are named):

``ladder`` (LST, arXiv 2206.06522, section 3; its decoder form QST, arXiv 2401.07159): reduced blocks of the backbone's
own kind with attention, of width d, one for each tapped layer,

    h_0 = Down_0(x_0),    h_l = Block_l(mu_l h_{l-1} + (1 - mu_l) Down_l(x_l)),    mu_l = sigmoid(alpha_l / 0.1)
    g = Up(norm(h_n))

``plugin`` (the released code of SPA, arXiv 2403.07088): stateless adapter blocks of width d, in a row,

    h_0 = In(x_0),    h_l = Down_l(x_l) + A_l(relu(h_{l-1})),    A(h) = h + Wide2(relu(Wide1(h)))    g = Out(relu(h_n))

or side by side (order "parallel"): h_l = h_{l-1} + A_l(relu(Down_l(x_l))).

x_0 is the backbone's input to its first layer, x_l the output of its l-th tapped layer, divided by its root mean square
[ours: a few channels of a language model's residual stream are thousands of times larger than the rest]. Nothing here
imports the backbone's forward pass: this is the device's half.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from mlfs_jax.backbone.attention import alibi_slopes, rope_tables
from mlfs_jax.backbone.cache import write
from mlfs_jax.backbone.decoder import Block, Context, make_norm
from mlfs_jax.backbone.layers import Linear, weight
from mlfs_jax.backbone.tree import flatten, map_named
from mlfs_jax.config import DecoderConfig
from mlfs_jax.errors import ConfigError
from spa_jax.errors import PluginError
from spa_jax.seam import Frame

LADDERS = ("ladder", "plugin")
MEMORIES = ("stateless", "lazy", "sparse")
ORDERS = ("serial", "parallel")
TEMPERATURE = 0.1
"""Of the ladder's gates, mu = sigmoid(alpha / T) (LST)."""


@dataclass(frozen=True)
class SideConfig:
    """Shape of a side network; what is None is chosen for the backbone by :meth:`resolve`.

    Attributes:
        ladder: "ladder" (blocks with attention) or "plugin" (stateless adapter blocks).
        width: d; by default D / 8, in whole eights (LST), and 32 for a plugin (as released).
        every: taps every so many layers, the last among them; the layers between have no side layer (LST drops
            layers, too).
        heads: attention heads of a side block; by default an eighth of the backbone's, at least 1.
        mlp: neurons of a side block; by default F / 8, and D for a plugin (as released).
        memory: what the side network remembers of tokens that the gate kept in the cloud. "stateless": it has no
            memory at all (a plugin). "lazy": their activations follow with the next token that needs the side
            network, which then computes exactly what it would have, had it seen all at once. "sparse": they are
            never sent; it attends to the positions it saw. Its gate and calibration are fitted as if it had seen all.
        order: of a plugin's blocks, "serial" or "parallel".
    """

    ladder: str = "ladder"
    width: int | None = None
    every: int = 3
    heads: int | None = None
    mlp: int | None = None
    memory: str | None = None
    order: str = "serial"

    def __post_init__(self):
        for field, choices in (("ladder", LADDERS), ("memory", (None, *MEMORIES)), ("order", ORDERS)):
            if getattr(self, field) not in choices:
                named = ", ".join(str(c) for c in choices if c)
                raise ConfigError(f"{field} = {getattr(self, field)!r}: expected one of {named}.")
        for field in ("width", "every", "heads", "mlp"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ConfigError(f"{field} = {value!r}: expected a whole number of at least 1.")
        if self.memory is not None and (self.memory == "stateless") != (self.ladder == "plugin"):
            raise ConfigError(
                f"memory = {self.memory!r} with ladder = {self.ladder!r}: a plugin is stateless, a ladder has "
                "attention and is 'lazy' or 'sparse'."
            )
        if self.ladder == "plugin" and self.heads is not None:
            raise ConfigError(f"heads = {self.heads}: a plugin has no attention; leave heads out.")

    def resolve(self, backbone: DecoderConfig) -> SideConfig:
        """This config with every choice made for a backbone.

        Raises:
            ConfigError: what is asked for does not fit beside the backbone.
        """
        D, plugin = backbone.embed, self.ladder == "plugin"
        width = self.width or (min(32, D // 2) if plugin else max(8 * round(D / 64), min(8, D // 2)))
        if width >= D:
            raise ConfigError(f"width = {width}: expected less than {D}, the width of the backbone.")
        if self.every > backbone.layers:
            raise ConfigError(f"every = {self.every}: expected at most {backbone.layers}, the backbone's layers.")
        heads = None
        if not plugin:
            about, group = max(1, backbone.heads // 8), backbone.heads // backbone.kv_heads
            heads = self.heads or next(n for n in range(about, 0, -1) if _heads_fit(backbone, n))
            if not _heads_fit(backbone, heads):
                raise ConfigError(
                    f"heads = {heads}: expected at most {backbone.heads}, in whole groups of {group}, or less than a "
                    "group: the query heads that share one of the backbone's key-value heads."
                )
        mlp = self.mlp or (D if plugin else max(1, backbone.mlp // 8))
        memory = self.memory or ("stateless" if plugin else "lazy")
        return dataclasses.replace(self, width=width, heads=heads, mlp=mlp, memory=memory)


def _kv_heads(backbone: DecoderConfig, heads: int) -> int:
    return max(1, heads * backbone.kv_heads // backbone.heads)


def _heads_fit(backbone: DecoderConfig, heads: int) -> bool:
    kv, group = _kv_heads(backbone, heads), backbone.heads // backbone.kv_heads
    return heads <= backbone.heads and heads % kv == 0 and heads // kv <= group


def tapped_layers(config: SideConfig, backbone: DecoderConfig) -> tuple[int, ...]:
    """Indices of the n backbone layers whose outputs are read, ascending; the last layer is always one."""
    return tuple(range(backbone.layers - 1, -1, -config.every))[::-1]


@lru_cache(maxsize=64)
def block_config(config: SideConfig, backbone: DecoderConfig) -> DecoderConfig:
    """The side blocks as a decoder of their own: the backbone's, made smaller."""
    layers = tapped_layers(config, backbone)
    return backbone.replace(
        embed=config.width,
        heads=config.heads,
        kv_heads=_kv_heads(backbone, config.heads),
        mlp=config.mlp,
        layers=len(layers),
        windows=tuple(backbone.windows[i] for i in layers) if backbone.windows else (),
        norm="rms" if backbone.norm == "none" else backbone.norm,
        final_norm=True,
        embedding_size=None,
    )


class SideContext(Context):
    """Who sees whom among the positions that reached the side network, which may have holes."""

    def __init__(self, config: DecoderConfig, frame: Frame, cache: SideCache | None, seen: Bool[Array, "B T"] | None):
        positions, real = jnp.asarray(frame.positions), jnp.asarray(frame.real)
        self.positions = key_positions = positions
        self.at, self.valid = None, real
        if cache is not None:
            self.at = cache.length
            self.valid = write(cache.valid, real, cache.length)
            key_positions = write(cache.positions, positions, cache.length)
        self.key_positions = key_positions
        self.distance = self.positions[..., None] - key_positions[:, None]
        self.visible = self.valid[:, None] & (self.distance >= 0)
        if seen is not None:
            known = seen if cache is None else write(cache.valid, seen, cache.length)
            self.visible &= known[:, None] | (self.distance == 0)
        self.ropes = [rope_tables(rope, self.positions) for rope in (config.rope, config.local_rope) if rope]
        self.bias = None
        if config.positions == "alibi":
            slopes = jnp.asarray(alibi_slopes(config.alibi_heads)[: config.heads])
            self.bias = -slopes[:, None, None] * self.distance[:, None]


class Ladder(nnx.Module):
    """The blocks, their ladders and gates. In its axes' names, ``embed`` is d and ``backbone`` is D."""

    def __init__(self, config: SideConfig, backbone: DecoderConfig, *, rngs: nnx.Rngs):
        self.blocks = blocks = block_config(config, backbone)
        wide, narrow = {"backbone": backbone.embed}, {"embed": config.width}
        self.down = Linear(wide, narrow, stack={"taps": blocks.layers + 1}, bias=False, rngs=rngs)
        self.alpha = weight(nnx.initializers.zeros, [("layers", blocks.layers)], rngs)
        self.layers = Block(blocks, rngs=rngs)
        self.norm = make_norm(blocks, None, rngs)
        self.up = Linear(narrow, wide, bias=False, rngs=rngs)

    def run(
        self, frame: Frame, cache: SideCache | None, seen: Bool[Array, "B T"] | None, unroll: bool
    ) -> tuple[Float[Array, "B T d"], SideCache | None]:
        context, blocks = SideContext(self.blocks, frame, cache, seen), self.blocks
        block_def, stacked = nnx.split(self.layers)
        windows = np.asarray(blocks.windows, np.int32) if any(blocks.windows) else None
        mu = jax.nn.sigmoid(self.alpha[...] / TEMPERATURE)

        def layer(carry, scanned):
            h, stacks = carry
            weights, mu, tap, window, index = scanned
            h = mu * h + (1 - mu) * tap
            kv = None if stacks is None else (*stacks, index)
            return nnx.merge(block_def, weights)(h, context, window, kv, {}, None), None

        scanned = (stacked, mu, frame.taps[1:], windows, np.arange(blocks.layers))
        start = frame.taps[0], None if cache is None else (cache.k, cache.v)
        (h, stacks), _ = jax.lax.scan(layer, start, scanned, unroll=blocks.layers if unroll else 1)
        if cache is not None:
            T = frame.real.shape[1]
            used = jnp.where(frame.real, jnp.arange(1, T + 1), 0).max(1)  # padding behind the last token takes no slot
            cache = SideCache(*stacks, context.valid, context.key_positions, cache.length + used)
        return self.norm(h), cache


class AdapterBlock(nnx.Module):
    """A_l: an adapter with its own residual, wide in the middle as in the released code."""

    def __init__(self, config: SideConfig, layers: int, *, rngs: nnx.Rngs):
        narrow, inner, stack = {"embed": config.width}, {"mlp": config.mlp}, {"layers": layers}
        self.wide1 = Linear(narrow, inner, stack=stack, rngs=rngs)
        self.wide2 = Linear(inner, narrow, stack=stack, rngs=rngs)

    def __call__(self, h: Float[Array, "B T d"]) -> Float[Array, "B T d"]:
        return h + self.wide2(jax.nn.relu(self.wide1(h)))


class Plugin(nnx.Module):
    """The released SPA's adapter blocks; biases as there."""

    def __init__(self, config: SideConfig, backbone: DecoderConfig, *, rngs: nnx.Rngs):
        self.order, layers = config.order, len(tapped_layers(config, backbone))
        wide, narrow = {"backbone": backbone.embed}, {"embed": config.width}
        self.down = Linear(wide, narrow, stack={"taps": layers + 1}, rngs=rngs)
        self.layers = AdapterBlock(config, layers, rngs=rngs)
        self.up = Linear(narrow, wide, rngs=rngs)

    def run(self, frame: Frame, cache: SideCache | None, seen, unroll: bool) -> tuple[Float[Array, "B T d"], None]:
        block_def, stacked = nnx.split(self.layers)

        def layer(h, scanned):
            weights, tap = scanned
            block = nnx.merge(block_def, weights)
            if self.order == "parallel":
                return h + block(jax.nn.relu(tap)), None
            return tap + block(jax.nn.relu(h)), None

        h, _ = jax.lax.scan(layer, frame.taps[0], (stacked, frame.taps[1:]), unroll=unroll or 1)
        return jax.nn.relu(h), None


@partial(jax.tree_util.register_dataclass, data_fields=["k", "v", "valid", "positions", "length"], meta_fields=[])
@dataclass(frozen=True)
class SideCache:
    """Keys and values of what a side network has seen, in S slots a row; as the backbone's, with positions.

    Attributes:
        k, v: [n, B, S, K, H].
        valid: [B, S]: the slot holds a real token.
        positions: [B, S]: that token's place in its text; there may be holes.
        length: [B]: the next free slot.
    """

    k: Float[Array, "n B S K H"]
    v: Float[Array, "n B S K H"]
    valid: Bool[Array, "B S"]
    positions: Int[Array, "B S"]
    length: Int[Array, " B"]

    @property
    def capacity(self) -> int:
        return self.valid.shape[1]


@partial(jax.tree_util.register_dataclass, data_fields=["net", "gate"], meta_fields=["config", "backbone"])
@dataclass(frozen=True)
class Side:
    """Everything that is personal: the side network and its gate.

    Attributes:
        net: weights of the side network by dotted name; on the device.
        gate: weights of the gate, see :mod:`spa_jax.gate`; in the cloud. Empty for a setting without one.
        config: resolved.
        backbone: the shape of the model it stands beside.
    """

    net: dict[str, Array]
    gate: dict[str, Array]
    config: SideConfig
    backbone: DecoderConfig

    def replace(self, **changes) -> Side:
        return dataclasses.replace(self, **changes)

    def check(self, config: DecoderConfig) -> None:
        """Raise PluginError when it was made for a backbone of other sizes."""
        made = self.backbone
        if (made.layers, made.embed) != (config.layers, config.embed):
            raise PluginError(
                f"this side network reads a backbone of {made.layers} layers of width {made.embed}; the base has "
                f"{config.layers} of width {config.embed}. Use it with the base it was made for."
            )

    @property
    def tapped(self) -> tuple[int, ...]:
        return tapped_layers(self.config, self.backbone)

    @property
    def num_params(self) -> int:
        return sum(x.size for x in jax.tree.leaves((self.net, self.gate)))


@lru_cache(maxsize=64)
def abstract_net(config: SideConfig, backbone: DecoderConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """Structure and abstract weights of a side network; ``config`` is resolved."""
    kind = Ladder if config.ladder == "ladder" else Plugin
    return nnx.split(nnx.eval_shape(lambda: kind(config, backbone, rngs=nnx.Rngs(0))))


def side_axes(config: SideConfig, backbone: DecoderConfig) -> dict[str, tuple[str, ...]]:
    """Names of the axes of every weight of a side network: ``embed`` is its own width d, ``backbone`` is D."""
    return {name: leaf.axes for name, leaf in flatten(abstract_net(config, backbone)[1]).items()}


def _network(side: Side) -> Ladder | Plugin:
    graphdef, state = abstract_net(side.config, side.backbone)
    return nnx.merge(graphdef, map_named(lambda name, _: side.net[name], state))


def init_side_cache(side: Side, batch: int, capacity: int, dtype=jnp.float32) -> SideCache | None:
    """An empty cache of ``capacity`` slots for each of ``batch`` texts; None for a stateless side network.

    A frame takes as many slots as it has positions up to its last real one; while it is written, T must be free.
    """
    if side.config.memory == "stateless":
        return None
    blocks = block_config(side.config, side.backbone)
    heads, value = blocks.kv_heads, blocks.head_dim
    if blocks.latent is not None:
        heads, value = blocks.heads, blocks.latent.value
    shape = (blocks.layers, batch, capacity, heads)
    return SideCache(
        k=jnp.zeros((*shape, blocks.head_dim), dtype),
        v=jnp.zeros((*shape, value), dtype),
        valid=jnp.zeros((batch, capacity), bool),
        positions=jnp.zeros((batch, capacity), jnp.int32),
        length=jnp.zeros((batch,), jnp.int32),
    )


def project(side: Side, frame: Frame) -> Frame:
    """The frame with Down applied: D -> d channels. On the device, or in the cloud (a frame is then D / d smaller)."""
    if frame.projected:
        return frame
    taps = jnp.einsum("nBTD,nDd->nBTd", frame.taps.astype(jnp.float32), side.net["down.kernel"])
    if (bias := side.net.get("down.bias")) is not None:
        taps = taps + bias[:, None, None]
    return frame.replace(taps=taps, projected=True)


def run_side(
    side: Side,
    frame: Frame,
    cache: SideCache | None = None,
    *,
    seen: Bool[Array, "B T"] | None = None,
    unroll: bool = False,
) -> tuple[Float[Array, "B T d"], SideCache | None]:
    """The side network's state at every position of a frame, before Up, and its cache with the frame in it."""
    return _network(side).run(project(side, frame), cache, seen, unroll)


def lift(side: Side, state: Float[Array, "B T d"]) -> Float[Array, "B T D"]:
    """Up: what the side network adds to the backbone's last hidden state."""
    y = state @ side.net["up.kernel"]
    return y + side.net["up.bias"] if "up.bias" in side.net else y


@partial(jax.jit, static_argnames="unroll")
def device_step(
    side: Side,
    cache: SideCache | None,
    frame: Frame,
    *,
    seen: Bool[Array, "B T"] | None = None,
    unroll: bool = False,
) -> tuple[Float[Array, "B T D"], SideCache | None]:
    """The device's half of a step: a frame comes down, g goes back up. Pure; knows nothing of the backbone's weights.

    Args:
        side: only ``net`` is looked at.
        cache: what it saw before; None to start from this frame (training), or for a stateless side network.
        seen: which positions of the frame later ones may attend to (each sees itself): g at every position in one
            pass, for "sparse" memory, to train or to ask what would have been.
    """
    state, cache = run_side(side, frame, cache, seen=seen, unroll=unroll)
    return lift(side, state), cache
