"""One post-norm encoder for BERT, MiniLM, RoBERTa, DistilBERT and ELECTRA; the config says which.

Everything a subnet does to the network happens at three places, each a product with a 0/1 vector: the channels of the
residual stream (in every norm), the heads (before the output projection), the neurons of the mlp (before the down
projection); a dropped layer is skipped by ``lax.cond``. A mask is data: a new subnet is no new compile.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from mlfs_jax.backbone.attention import attention
from mlfs_jax.backbone.layers import ACTIVATIONS, Embed, Linear, Norm, check_context, real_tokens, weight
from mlfs_jax.backbone.tree import Mask, Output, place_rows, under
from mlfs_jax.config import EncoderConfig
from mlfs_jax.errors import ConfigError


class Block(nnx.Module):
    """One post-norm layer; its weights are stacked along ``layers`` and the encoder scans over them."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        stack, embed, mlp = {"layers": config.layers}, {"embed": config.embed}, {"mlp": config.mlp}
        heads = {"heads": config.heads, "head_dim": config.head_dim}
        self.activation = config.activation
        self.q = Linear(embed, heads, stack=stack, rngs=rngs)
        self.k = Linear(embed, heads, stack=stack, rngs=rngs)
        self.v = Linear(embed, heads, stack=stack, rngs=rngs)
        self.o = Linear(heads, embed, stack=stack, rngs=rngs)
        self.attn_norm = Norm(embed, eps=config.norm_eps, stack=stack, rngs=rngs)
        self.up = Linear(embed, mlp, stack=stack, rngs=rngs)
        self.down = Linear(mlp, embed, stack=stack, rngs=rngs)
        self.mlp_norm = Norm(embed, eps=config.norm_eps, stack=stack, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        visible: Bool[Array, "B T S"],
        lora: dict,
        mask: Mask | None,
    ) -> Float[Array, "B T D"]:
        keep = None if mask is None else mask.embed
        q, k, v = (getattr(self, name)(x, lora.get(name)) for name in ("q", "k", "v"))
        context = attention(q, k, v, visible)
        if mask is not None:
            context *= mask.heads[:, None]
        x = self.attn_norm(x + self.o(context, lora.get("o")), keep)
        hidden = ACTIVATIONS[self.activation](self.up(x, lora.get("up")))
        if mask is not None:
            hidden *= mask.mlp
        return self.mlp_norm(x + self.down(hidden, lora.get("down")), keep)


class Embeddings(nnx.Module):
    """Token, position and type tables, their norm, and ELECTRA's projection E -> D."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        table = config.table_dims
        self.offset, self.pad = config.position_offset, config.pad_token_id
        self.tokens = Embed({"vocab": config.vocab_size}, table, rngs=rngs)
        self.positions = Embed({"positions": config.max_positions}, table, rngs=rngs)
        self.types = Embed({"types": config.type_vocab}, table, rngs=rngs) if config.type_vocab else None
        self.norm = Norm(table, eps=config.norm_eps, rngs=rngs)
        self.proj = Linear(table, {"embed": config.embed}, rngs=rngs) if config.embedding_size else None

    def __call__(self, tokens: Int[Array, "B T"], types, lora: dict, keep) -> Float[Array, "B T D"]:
        if self.offset:  # RoBERTa: padding tokens sit on the pad row, real ones count from the row after it
            real = tokens != self.pad
            positions = jnp.cumsum(real, axis=1) * real + self.pad
        else:
            positions = jnp.arange(tokens.shape[1])
        x = self.tokens(tokens) + self.positions(positions)
        if self.types is not None:
            x += self.types(jnp.zeros_like(tokens) if types is None else types)
        if self.proj is None:
            return self.norm(x, keep)
        x = self.proj(self.norm(x), lora.get("proj"))
        return x if keep is None else x * keep


class SequenceHead(nnx.Module):
    """dense -> activation -> out, on the first token. BERT's pooler is this head's ``dense``."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        embed = {"embed": config.embed}
        self.activation = config.head_activation
        self.dense = Linear(embed, embed, rngs=rngs)
        self.out = Linear(embed, {"labels": config.labels}, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], lora: dict, keep, tokens: Embed) -> Float[Array, "B C"]:
        pooled = ACTIVATIONS[self.activation](self.dense(x[:, 0], lora.get("dense")))
        return self.out(pooled if keep is None else pooled * keep, lora.get("out"))


class TokenHead(nnx.Module):
    """One linear map on every token."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.out = Linear({"embed": config.embed}, {"labels": config.labels}, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], lora: dict, keep, tokens: Embed) -> Float[Array, "B T C"]:
        return self.out(x, lora.get("out"))


class MaskedLMHead(nnx.Module):
    """dense -> activation -> norm -> the token table, transposed (tied at call time), plus a bias."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.activation, self.projected = config.head_activation, config.embedding_size is not None
        self.dense = Linear({"embed": config.embed}, config.table_dims, rngs=rngs)
        self.norm = Norm(config.table_dims, eps=config.norm_eps, rngs=rngs)
        self.bias = weight(nnx.initializers.zeros, [("vocab", config.vocab_size)], rngs)

    def __call__(self, x: Float[Array, "B T D"], lora: dict, keep, tokens: Embed) -> Float[Array, "B T V"]:
        x = ACTIVATIONS[self.activation](self.dense(x, lora.get("dense")))
        x = self.norm(x, None if self.projected else keep)
        return x @ tokens.table[...].T + self.bias[...]


class Pooler(nnx.Module):
    """tanh(dense) of the first token: what BERT's and RoBERTa's base models carry."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.dense = Linear({"embed": config.embed}, {"embed": config.embed}, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], lora: dict, keep, tokens: Embed) -> Float[Array, "B D"]:
        pooled = jnp.tanh(self.dense(x[:, 0], lora.get("dense")))
        return pooled if keep is None else pooled * keep


HEADS = {"sequence": SequenceHead, "token": TokenHead, "mlm": MaskedLMHead}


class Encoder(nnx.Module):
    """Embeddings, L stacked blocks, a head. ``Output.logits`` is the pooler's output when there is no head."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = Embeddings(config, rngs=rngs)
        self.layers = Block(config, rngs=rngs)
        self.head = HEADS[config.head](config, rngs=rngs) if config.head in HEADS else None
        self.pooler = Pooler(config, rngs=rngs) if config.pooler else None

    def __call__(
        self,
        batch: dict,
        lora: dict,
        mask: Mask | None,
        *,
        taps: bool = False,
        remat: bool = False,
        unroll: bool = False,
        rows: jax.sharding.Sharding | None = None,
        cache: None = None,
        logits: bool = True,
    ) -> Output:
        if cache is not None:
            raise ConfigError("an encoder has no key-value cache: it reads a whole text at once.")
        tokens = batch["input_ids"]
        keep = None if mask is None else mask.embed
        check_context(self.config, tokens)
        real = real_tokens(batch)
        visible = jnp.broadcast_to(real[:, None], (*tokens.shape, tokens.shape[1]))
        x = embedded = place_rows(self.embed(tokens, batch.get("token_type_ids"), under(lora, "embed"), keep), rows)

        block_def, stacked = nnx.split(self.layers)

        def layer(x, scanned):
            weights, pairs, cut = scanned
            run = lambda x: nnx.merge(block_def, weights)(x, visible, pairs, cut)  # noqa: E731
            if cut is None:
                x = run(x)
            else:
                x = jax.lax.cond(cut.layers, run, lambda x: x, x)
            x = place_rows(x, rows)
            return x, x if taps else None

        if remat:
            layer = jax.checkpoint(layer, prevent_cse=False)
        x, tapped = jax.lax.scan(
            layer,
            x,
            (stacked, under(lora, "layers"), mask and mask.per_layer(self.config.layers)),
            unroll=self.config.layers if unroll and not remat else 1,
        )
        top, name = (self.head, "head") if self.head is not None else (self.pooler, "pooler")
        found = top(x, under(lora, name), keep, self.embed.tokens) if logits and top is not None else None
        return Output(logits=found, hidden=x, taps=tapped, embedded=embedded if taps else None)
