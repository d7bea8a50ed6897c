"""Adapters inside the frozen backbone: what side networks are compared with. One exchange per layer, if split.

An adapted network is the decoder with small modules in every block, so that everything that takes a Model (forward,
generation, evaluation) takes it as it is; training differentiates with respect to the modules alone.

``houlsby`` (arXiv 1902.00751): behind attention and behind the mlp, before each is added:  y + Up(act(Down(y))).
``parallel`` (MAM, arXiv 2110.04366): beside the mlp, from its input:  mlp(x) + 4 Up(relu(Down(x))).
"""

from __future__ import annotations

from functools import lru_cache

import jax
from flax import nnx
from jaxtyping import Array

from mlfs_jax.backbone.decoder import Attention, Block, Decoder
from mlfs_jax.backbone.layers import Linear, gelu
from mlfs_jax.backbone.tree import flatten, map_named
from mlfs_jax.config import DecoderConfig
from mlfs_jax.model import Model

SCALE = 4.0
"""Of a parallel adapter (MAM, section 4.4)."""


class Adapter(nnx.Module):
    """Up(act(Down(x))); Up starts at zero, so that nothing has changed yet."""

    def __init__(self, config: DecoderConfig, width: int, act, *, rngs: nnx.Rngs):
        embed, inner, stack = {"embed": config.embed}, {"adapter": width}, {"layers": config.layers}
        self.act = act
        self.down = Linear(embed, inner, stack=stack, rngs=rngs)
        self.up = Linear(inner, embed, stack=stack, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.up(self.act(self.down(x)))


class AdaptedAttention(Attention):
    """Attention with a Houlsby adapter on what it gives; below Block in the order of resolution."""

    def __call__(self, x, context, window, kv, lora, mask):
        out, kv = super().__call__(x, context, window, kv, lora, mask)
        return (out if self.attn_adapter is None else out + self.attn_adapter(out)), kv


class AdaptedBlock(Block, AdaptedAttention):
    """A block with the adapters of one kind."""

    def __init__(self, config: DecoderConfig, kind: str, width: int, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        houlsby = kind == "houlsby"
        self.attn_adapter = Adapter(config, width, gelu, rngs=rngs) if houlsby else None
        self.mlp_adapter = Adapter(config, width, gelu if houlsby else jax.nn.relu, rngs=rngs)
        self.parallel = not houlsby

    def _mlp(self, x, lora, mask):
        y = super()._mlp(x, lora, mask)
        return y + (SCALE * self.mlp_adapter(x) if self.parallel else self.mlp_adapter(y))


class AdaptedDecoder(Decoder):
    """The decoder, its blocks replaced."""

    def __init__(self, config: DecoderConfig, kind: str, width: int, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.layers = AdaptedBlock(config, kind, width, rngs=rngs)


@lru_cache(maxsize=32)
def abstract_adapted(config: DecoderConfig, kind: str, width: int) -> tuple[nnx.GraphDef, nnx.State]:
    """Structure and abstract weights of an adapted network."""
    return nnx.split(nnx.eval_shape(lambda: AdaptedDecoder(config, kind, width, rngs=nnx.Rngs(0))))


def _names(config: DecoderConfig, kind: str, width: int) -> dict[str, nnx.Param]:
    weights = flatten(abstract_adapted(config, kind, width)[1])
    return {name: leaf for name, leaf in weights.items() if "_adapter." in name}


def init_adapters(key: Array, config: DecoderConfig, kind: str, width: int) -> dict[str, Array]:
    """Weights of the adapters by dotted name: Down ~ N(0, 1/in), Up and biases zero."""
    params = {}
    for i, (name, leaf) in enumerate(_names(config, kind, width).items()):
        scale = leaf.shape[1] ** -0.5 if name.endswith("down.kernel") else 0.0
        params[name] = scale * jax.random.normal(jax.random.fold_in(key, i), leaf.shape)
    return params


def count_adapters(config: DecoderConfig, kind: str, width: int) -> int:
    """Parameters of the adapters."""
    return sum(leaf.size for leaf in _names(config, kind, width).values())


def adapted(model: Model, kind: str, params: dict[str, Array]) -> Model:
    """The model with these adapters in it."""
    width = params["layers.mlp_adapter.up.kernel"].shape[1]
    graphdef, state = abstract_adapted(model.config, kind, width)
    weights = {name: leaf.get_value() for name, leaf in flatten(model.base).items()} | params
    return model.replace(graphdef=graphdef, base=map_named(lambda name, _: weights[name], state))
