"""The device's model for real: a side network and its cache, and the head of the base where that lives here, too."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from mlfs_jax.backbone.decoder import LMHead
from mlfs_jax.backbone.tree import flatten, map_named
from mlfs_jax.config import DecoderConfig
from mlfs_jax.errors import ConfigError
from spa_jax.errors import PluginError, WireError
from spa_jax.public import Public
from spa_jax.seam import Frame, Setting
from spa_jax.side import Side, SideCache, device_step, init_side_cache
from spa_jax.wire import FRAME_BYTES, Hello

LEAST = 256
"""Slots that a side cache begins with; it doubles as a text grows."""


class SideDevice:
    """See :class:`spa_jax.device.DeviceModel`. A text's state is its cache and how many slots of it are taken."""

    def __init__(
        self,
        side: Side,
        *,
        base: str,
        setting: str = "spa",
        threshold: float = 0.5,
        head: Mapping[str, Array] | None = None,
        project: str = "device",
        send_gate: bool = True,
        coding: str = "fp32",
        budget: float | None = None,
        frame_bytes: int = FRAME_BYTES,
        int8: bool = False,
    ):
        """
        Args:
            base: fingerprint of the base that it was made for.
            head: weights of the base's head, to choose tokens here; None: the cloud does.
            project: where Down is applied, "device" or "cloud"; the cloud must hold it (:mod:`spa_jax.public`).
            send_gate: False: the cloud holds the gate, beside the Down.
            coding: of float arrays on the wire.
            budget: see :class:`spa_jax.wire.Hello`.
            int8: keep the kernels as int8, with a scale for each of their channels.

        Raises:
            ConfigError: ``project`` is neither, or a budget that is none.
            PluginError: a gate that cannot be sent.
        """
        if project not in ("device", "cloud"):
            raise ConfigError(f"project = {project!r}: expected 'device' or 'cloud'.")
        if budget is not None and not (isinstance(budget, int | float) and 0 < budget < math.inf):
            raise ConfigError(f"budget = {budget!r}: expected ms per token, a number above 0, or None.")
        net = in_int8(side.net) if int8 else {name: jnp.asarray(x) for name, x in side.net.items()}
        self._side = side.replace(net=net, gate={})
        setting = Setting.parse(setting)
        self._head = None if head is None else {name: jnp.asarray(x) for name, x in head.items()}
        self._adds = setting.adds
        self._terms = Hello(
            model=base,
            setting=str(setting),
            threshold=float(threshold),
            memory=side.config.memory,
            taps=np.asarray(side.tapped),
            head="cloud" if head is None else "device",
            public=public_part(side).name if project == "cloud" else None,
            gate=gate_rows(side) if setting.gated and send_gate else None,
            coding=coding,
            budget=budget,
            frame_bytes=frame_bytes,
        )

    def terms(self) -> Hello:
        return self._terms

    def start(self) -> tuple[SideCache | None, int]:
        return init_side_cache(self._side, 1, LEAST), 0

    def side(self, state, taps: Float[np.ndarray, "n T D"], positions) -> tuple[Float[np.ndarray, " D"], tuple]:
        (cache, used), count = state, len(positions)
        projected = self._terms.public is not None
        expected = self._side.config.width if projected else self._side.backbone.embed
        if taps.shape[-1] != expected:
            raise WireError(f"taps.taps: expected activations of {expected} numbers, got {taps.shape[-1]}.")
        width = 1 << (count - 1).bit_length()  # few widths: each is a compile
        if cache is not None and used + width > cache.capacity:
            cache = _grown(cache, 1 << (used + width - 1).bit_length())
        padding = (0, width - count)
        frame = Frame(
            np.pad(taps, ((0, 0), padding, (0, 0)))[:, None],
            np.pad(np.asarray(positions, np.int32), padding)[None],
            (np.arange(width) < count)[None],
            projected,
        )
        g, cache = _step(self._side, cache, frame, np.int32(count))
        return np.asarray(g), (cache, used + count)

    def choose(self, hidden: Float[np.ndarray, " D"], g: Float[np.ndarray, " D"]) -> int:
        return int(_choose(self._head, hidden, g, config=self._side.backbone, adds=self._adds))

    def warm_up(self, positions: int = 1) -> None:
        """Compile what frames of so many positions need, before somebody waits for it."""
        width = self._side.config.width if self._terms.public is not None else self._side.backbone.embed
        taps = np.zeros((len(self._terms.taps) + 1, positions, width), np.float32)
        g, _ = self.side(self.start(), taps, np.arange(positions))
        if self._head is not None:
            self.choose(np.zeros_like(g), g)

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of weights, and of a side cache at its start."""
        sizes = {"plugin": self._side.net, "head": self._head, "cache": self.start()[0]}
        return {name: sum(x.nbytes for x in jax.tree.leaves(tree)) for name, tree in sizes.items()}

    @property
    def flops(self) -> int:
        """Of one token in the side network: two for each weight that it meets; and in the head, where it is here."""
        elsewhere = () if self._terms.public is None else ("down.",)  # the cloud applies it
        met = {name: x for name, x in self._side.net.items() if not name.startswith(elsewhere)}
        weights = sum(x.size for name, x in met.items() if name.endswith(("kernel", ".q")))
        return 2 * weights + 2 * sum(x.size for x in jax.tree.leaves(self._head) if x.ndim > 1)


def gate_rows(side: Side) -> Float[np.ndarray, "rows 2"]:
    """A learnt gate as it is sent to the cloud: kernel [D, 2], and the bias as one more row.

    Raises:
        PluginError: a similarity gate, which holds what its owner's texts were about.
    """
    if not side.gate:
        raise PluginError("this plugin's setting has no gate: every token takes the side network.")
    if "kernel" not in side.gate:
        raise PluginError(
            "this plugin's gate holds states of the texts it was trained on, which do not leave the device: fit one "
            "with a learnt gate, or use a setting without one."
        )
    return np.concatenate([np.asarray(side.gate["kernel"]), np.asarray(side.gate["bias"])[None]]).astype(np.float32)


def public_part(side: Side, *, gate: bool = False) -> Public:
    """What a cloud needs to project for this plugin, and to decide for it with ``gate``."""
    down, bias = (side.net.get(f"down.{name}") for name in ("kernel", "bias"))
    return Public(
        np.asarray(side.tapped, np.int32),
        np.asarray(down, np.float32),
        None if bias is None else np.asarray(bias, np.float32),
        gate_rows(side) if gate else None,
    )


@jax.jit
def _step(side: Side, cache: SideCache | None, frame: Frame, count):
    """g [D] at the last real position."""
    net = {name: x for name, x in side.net.items() if not name.endswith((".q", ".scale8"))}
    for name, q in side.net.items():
        if name.endswith(".q"):
            net[name[:-2]] = q.astype(jnp.float32) * side.net[f"{name[:-2]}.scale8"]
    g, cache = device_step(side.replace(net=net), cache, frame)
    return g[0, count - 1], cache


def in_int8(net: Mapping[str, Array]) -> dict[str, Array]:
    """Kernels as int8 with a scale for each channel of their last axis, a quarter of the memory."""
    small = {}
    for name, x in net.items():
        if not name.endswith("kernel"):
            small[name] = jnp.asarray(x)
            continue
        kernel = np.asarray(x, np.float32)
        stacked = tuple(range(1, kernel.ndim - 1)) if kernel.ndim > 2 else (0,)  # each layer has its own scales
        scale = np.maximum(np.abs(kernel).max(stacked, keepdims=True), 1e-12) / 127
        small |= {f"{name}.q": jnp.asarray(np.rint(kernel / scale), jnp.int8), f"{name}.scale8": jnp.asarray(scale)}
    return small


def _grown(cache: SideCache, capacity: int) -> SideCache:
    """The cache with room for more."""
    pad = lambda x, axis: jnp.pad(x, [(0, (capacity - x.shape[axis]) * (i == axis)) for i in range(x.ndim)])  # noqa: E731
    return SideCache(pad(cache.k, 2), pad(cache.v, 2), pad(cache.valid, 1), pad(cache.positions, 1), cache.length)


def head_names(config: DecoderConfig) -> list[str]:
    """The weights of a base that its head needs."""
    names = [f"head.{name}" for name in flatten(_abstract_head(config)[1])]
    return [*names, "embed.tokens.table"] if config.tied else names


@lru_cache(maxsize=8)
def _abstract_head(config: DecoderConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: LMHead(config, rngs=nnx.Rngs(0))))


@partial(jax.jit, static_argnames=("config", "adds"))
def _choose(
    head: Mapping[str, Array], f: Float[Array, " D"], g: Float[Array, " D"], *, config: DecoderConfig, adds: bool
):
    graphdef, state = _abstract_head(config)
    network = nnx.merge(graphdef, map_named(lambda name, _: head[f"head.{name}"], state))
    tokens = SimpleNamespace(table=head.get("embed.tokens.table"))
    return network(f + g if adds else g, {}, tokens).argmax(-1)
