"""One decoder for all families of language models; the config says which.

As in the encoder, everything a subnet does to the network happens at three places, each a product with a 0/1 vector:
the channels of the residual stream (where a branch is added, and in every norm), the heads (before the output
projection), the neurons of the mlp (before the down projection); a dropped layer is skipped by ``lax.cond``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from mlfs_jax.backbone.attention import alibi_slopes, attention, rope_tables, rotate
from mlfs_jax.backbone.cache import Cache, write
from mlfs_jax.backbone.layers import ACTIVATIONS, Embed, Linear, Norm, check_context, real_tokens, weight
from mlfs_jax.backbone.tree import Mask, Output, place_rows, under
from mlfs_jax.config import DecoderConfig
from mlfs_jax.errors import ConfigError


class Context:
    """What all layers of one forward pass share: who sees whom, positions, and the slots of the cache."""

    def __init__(self, config: DecoderConfig, real: Bool[Array, "B T"], cache: Cache | None):
        T = real.shape[1]
        if cache is None:
            self.slots, self.valid, self.at = None, real, None
            slot_q = jnp.broadcast_to(jnp.arange(T), real.shape)
        else:
            self.at = cache.length
            self.valid = write(cache.valid, real, cache.length)
            slot_q = cache.length[:, None] + jnp.arange(T)
        key_positions = jnp.maximum(jnp.cumsum(self.valid, 1) - 1, 0)
        self.positions: Int[Array, "B T"] = jnp.take_along_axis(key_positions, slot_q, 1)
        causal = jnp.arange(self.valid.shape[1]) <= slot_q[..., None]
        self.visible: Bool[Array, "B T S"] = causal & self.valid[:, None]
        self.distance: Int[Array, "B T S"] = self.positions[..., None] - key_positions[:, None]
        self.ropes = [rope_tables(rope, self.positions) for rope in (config.rope, config.local_rope) if rope]
        self.bias: Float[Array, "B N T S"] | None = None
        if config.positions == "alibi":
            slopes = jnp.asarray(alibi_slopes(config.alibi_heads)[: config.heads])
            self.bias = -slopes[:, None, None] * self.distance[:, None]

    def visible_within(self, window: Int[Array, ""] | None) -> Bool[Array, "B T S"]:
        """Who sees whom in a layer with this window (0: none)."""
        return self.visible if window is None else self.visible & ((window == 0) | (self.distance < window))

    def rope(self, window: Int[Array, ""] | None) -> Float[Array, "2 B T half"]:
        """The rotation of a layer; layers with a window may have their own."""
        if window is None or len(self.ropes) == 1:  # None: no layer has one
            return self.ropes[0]
        return jnp.where(window > 0, self.ropes[1], self.ropes[0])


class Attention(nnx.Module):
    """Queries, keys and values from the residual stream, ordinary (MHA, GQA, MQA) or latent (MLA).

    Its ``kv`` is a cache's keys, its values, and which layer's this one's are. The whole stacks go from layer to layer,
    so that each writes its tokens in place; they are given back.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        stack, embed = {"layers": config.layers}, {"embed": config.embed}
        linear = lambda i, o, bias=False: Linear(i, o, stack=stack, bias=bias, rngs=rngs)  # noqa: E731
        heads = {"heads": config.heads, "head_dim": config.head_dim}
        kv_heads = {"kv_heads": config.kv_heads, "head_dim": config.head_dim}
        if config.latent is None:
            self.q = linear(embed, heads, config.qkv_bias)
            self.k = linear(embed, kv_heads, config.qkv_bias)
            self.v = linear(embed, kv_heads, config.qkv_bias)
            self.o = linear(heads, embed, config.o_bias)
        else:
            latent = config.latent
            rms = lambda dims: Norm(dims, eps=latent.norm_eps, stack=stack, kind="rms", bias=False, rngs=rngs)  # noqa: E731
            q_latent, kv_latent = {"q_latent": latent.q_rank}, {"kv_latent": latent.kv_rank}
            if latent.q_rank is not None:
                self.q_down, self.q_latent_norm = linear(embed, q_latent, config.qkv_bias), rms(q_latent)
            self.q = linear(embed if latent.q_rank is None else q_latent, heads)
            self.kv_down, self.kv_latent_norm = linear(embed, kv_latent, config.qkv_bias), rms(kv_latent)
            self.k_rope = linear(embed, {"rope": latent.rope}, config.qkv_bias)
            self.kv_up = linear(kv_latent, {"heads": config.heads, "head_dim": latent.nope + latent.value})
            self.o = linear({"heads": config.heads, "head_dim": latent.value}, embed, config.o_bias)
        if config.qk_norm != "none":
            shapes = [{"head_dim": config.head_dim}] * 2 if config.qk_norm == "head" else [heads, kv_heads]
            self.q_norm, self.k_norm = (
                Norm(
                    shape,
                    eps=config.norm_eps,
                    stack=stack,
                    kind=config.norm,
                    bias=config.qk_norm_bias,
                    offset=config.norm_offset,
                    over=2 if config.qk_norm == "full" else 1,
                    rngs=rngs,
                )
                for shape in shapes
            )

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, window, kv, lora: dict, mask: Mask | None
    ) -> tuple[Float[Array, "B T D"], tuple | None]:
        config = self.config
        q, k, v = (self._ordinary if config.latent is None else self._latent)(x, context.rope, window, lora, mask)
        if kv is not None:
            *stacks, layer = kv
            kv = tuple(write(s, new, context.at, layer) for s, new in zip(stacks, (k, v), strict=True))
            k, v = (jax.lax.dynamic_index_in_dim(s, layer, keepdims=False).astype(q.dtype) for s in kv)
        out = attention(
            q,
            k,
            v,
            context.visible_within(window),
            scale=config.attn_scale,
            bias=context.bias,
            softcap=config.attn_softcap,
        )
        if mask is not None:
            out *= mask.heads[:, None]
        return self.o(out, lora.get("o")), kv

    def _ordinary(self, x, rope, window, lora, mask):
        config = self.config
        q, k, v = (getattr(self, name)(x, lora.get(name)) for name in ("q", "k", "v"))
        if config.clip_qkv is not None:
            q, k, v = (jnp.clip(y, -config.clip_qkv, config.clip_qkv) for y in (q, k, v))
        if config.qk_norm != "none":
            keep_q = keep_k = None
            if mask is not None and config.qk_norm == "full":
                keep_q = mask.heads[:, None]
                keep_k = keep_q[:: config.heads // config.kv_heads]
            q, k = self.q_norm(q, keep_q), self.k_norm(k, keep_k)
        if config.rope is not None:
            q, k = (rotate(y, rope(window), config.rope.interleaved) for y in (q, k))
        return q, k, v

    def _latent(self, x, rope, window, lora, mask):
        latent, tables, interleaved = self.config.latent, rope(window), self.config.rope.interleaved
        down = x
        if latent.q_rank is not None:
            down = self.q_latent_norm(self.q_down(x, lora.get("q_down")))
        q_pass, q_turn = jnp.split(self.q(down, lora.get("q")), [latent.nope], -1)
        q = jnp.concatenate([q_pass, rotate(q_turn, tables, interleaved)], -1)
        kv = self.kv_up(self.kv_latent_norm(self.kv_down(x, lora.get("kv_down"))), lora.get("kv_up"))
        k_pass, v = jnp.split(kv, [latent.nope], -1)
        k_turn = rotate(self.k_rope(x, lora.get("k_rope"))[:, :, None], tables, interleaved)  # one for all heads
        k = jnp.concatenate([k_pass, jnp.broadcast_to(k_turn, (*k_pass.shape[:-1], latent.rope))], -1)
        return q, k, v


class Block(Attention):
    """One layer; its weights are stacked along ``layers`` and the decoder scans over them."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        stack, embed, mlp = {"layers": config.layers}, {"embed": config.embed}, {"mlp": config.mlp}
        norm = lambda: make_norm(config, stack, rngs)  # noqa: E731
        linear = lambda i, o, bias: Linear(i, o, stack=stack, bias=bias, rngs=rngs)  # noqa: E731
        if config.norm_at != "output":
            self.attn_norm = norm()
            self.mlp_norm = None if config.shared_norm else norm()
        if config.norm_at in ("sandwich", "output"):
            self.attn_out_norm, self.mlp_out_norm = norm(), norm()
        self.gate = linear(embed, mlp, config.mlp_bias) if config.gated else None
        self.up = linear(embed, mlp, config.mlp_bias)
        self.down = linear(mlp, embed, config.mlp_bias)

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, window, kv, lora: dict, mask: Mask | None
    ) -> tuple[Float[Array, "B T D"], tuple | None]:
        config, keep = self.config, None if mask is None else mask.embed
        before, behind = config.norm_at in ("pre", "sandwich"), config.norm_at in ("sandwich", "output")

        def add(x, branch):
            branch = branch * config.residual_scale if config.residual_scale != 1 else branch
            return x + (branch if keep is None else branch * keep)

        attended, kv = super().__call__(self.attn_norm(x, keep) if before else x, context, window, kv, lora, mask)
        if behind:
            attended = self.attn_out_norm(attended, keep)
        if config.parallel:
            normed = (self.attn_norm if config.shared_norm else self.mlp_norm)(x, keep)
            return add(x, attended + self._mlp(normed, lora, mask)), kv
        x = add(x, attended)
        if config.norm_at == "post":
            x = self.attn_norm(x, keep)
        hidden = self._mlp(self.mlp_norm(x, keep) if before else x, lora, mask)
        if behind:
            hidden = self.mlp_out_norm(hidden, keep)
        x = add(x, hidden)
        return (self.mlp_norm(x, keep) if config.norm_at == "post" else x), kv

    def _mlp(self, x: Float[Array, "B T D"], lora: dict, mask: Mask | None) -> Float[Array, "B T D"]:
        act, up = ACTIVATIONS[self.config.activation], self.up(x, lora.get("up"))
        hidden = act(up) if self.gate is None else act(self.gate(x, lora.get("gate"))) * up
        if mask is not None:
            hidden *= mask.mlp
        return self.down(hidden, lora.get("down"))


def make_norm(config: DecoderConfig, stack: dict | None, rngs: nnx.Rngs) -> Norm:
    """A norm of the residual stream, of the config's kind."""
    return Norm(
        {"embed": config.embed},
        eps=config.norm_eps,
        stack=stack,
        kind=config.norm,
        bias=config.norm_bias,
        offset=config.norm_offset,
        rngs=rngs,
    )


class Embeddings(nnx.Module):
    """Token table, scaled; OPT-350m's projection E -> D; learned positions; Bloom's norm."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        embed = {"embed": config.embed}
        self.scale, self.offset = config.embed_scale, config.position_offset
        self.tokens = Embed({"vocab": config.vocab_size}, config.table_dims, rngs=rngs)
        self.proj = Linear(config.table_dims, embed, bias=False, rngs=rngs) if config.embedding_size else None
        rows = {"positions": config.max_positions + config.position_offset}
        self.positions = Embed(rows, embed, rngs=rngs) if config.positions == "learned" else None
        self.norm = make_norm(config, None, rngs) if config.embed_norm else None

    def __call__(self, tokens: Int[Array, "B T"], positions, lora: dict, keep) -> Float[Array, "B T D"]:
        x = self.tokens(tokens)
        x = x * jnp.asarray(self.scale, x.dtype) if self.scale != 1 else x
        x = x if self.proj is None else self.proj(x, lora.get("proj"))
        x = x if self.positions is None else x + self.positions(positions + self.offset)
        if self.norm is not None:
            return self.norm(x, keep)
        return x if keep is None else x * keep


class LMHead(nnx.Module):
    """Hidden state -> logits over the vocabulary; the kernel is the token table, transposed, when tied."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        vocab = ("vocab", config.vocab_size)
        self.softcap, self.scale = config.logit_softcap, config.logit_scale
        narrow = config.embedding_size
        self.proj = Linear({"embed": config.embed}, config.table_dims, bias=False, rngs=rngs) if narrow else None
        width = next(iter(config.table_dims.items()))
        self.kernel = None if config.tied else weight(nnx.initializers.normal(0.02), [width, vocab], rngs, inputs=1)
        self.bias = weight(nnx.initializers.zeros, [vocab], rngs) if config.head_bias else None

    def __call__(self, x: Float[Array, "... D"], lora: dict, tokens: Embed) -> Float[Array, "... V"]:
        x = x * self.scale if self.scale != 1 else x
        x = x if self.proj is None else self.proj(x, lora.get("proj"))
        if self.kernel is None:
            logits = jnp.einsum("...D,VD->...V", x, tokens.table[...], preferred_element_type=jnp.float32)
        else:
            logits = jnp.einsum("...D,DV->...V", x, self.kernel[...], preferred_element_type=jnp.float32)
        logits = logits if self.bias is None else logits + self.bias[...]
        return logits if self.softcap is None else self.softcap * jnp.tanh(logits / self.softcap)


class Decoder(nnx.Module):
    """Embeddings, L stacked blocks, a norm, the head."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = Embeddings(config, rngs=rngs)
        self.layers = Block(config, rngs=rngs)
        self.norm = make_norm(config, None, rngs) if config.final_norm else None
        self.head = LMHead(config, rngs=rngs) if config.head == "lm" else None

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
        cache: Cache | None = None,
        logits: bool = True,
    ) -> Output:
        config, tokens = self.config, batch["input_ids"]
        if config.positions == "learned" and cache is None:  # a cache's tokens may be padding, beyond the last text
            check_context(config, tokens)
        if cache is not None and tokens.shape[1] > cache.capacity:
            raise ConfigError(f"{tokens.shape[1]} tokens, and a cache of {cache.capacity} slots: make a larger one.")
        if "head" in lora:
            raise ConfigError("the adapter has a pair at head: the head of a language model is frozen; leave it out.")
        keep = None if mask is None else mask.embed
        context = Context(config, real_tokens(batch), cache)
        x = embedded = place_rows(self.embed(tokens, context.positions, under(lora, "embed"), keep), rows)

        block_def, stacked = nnx.split(self.layers)

        def layer(carry, scanned):
            x, stacks = carry
            weights, pairs, cut, window, index = scanned
            kv = None if stacks is None else (*stacks, index)
            run = lambda x, kv: nnx.merge(block_def, weights)(x, context, window, kv, pairs, cut)  # noqa: E731
            if cut is None:
                x, stacks = run(x, kv)
            else:
                x, stacks = jax.lax.cond(cut.layers, run, lambda x, kv: (x, kv and kv[:2]), x, kv)
            x = place_rows(x, rows)
            return (x, stacks), (x if taps else None)

        if remat:
            layer = jax.checkpoint(layer, prevent_cse=False)
        windows = np.asarray(config.windows, np.int32) if any(config.windows) else None
        scanned = (
            stacked,
            under(lora, "layers"),
            mask and mask.per_layer(config.layers),
            windows,
            np.arange(config.layers),
        )
        stacks = None if cache is None else (cache.k, cache.v)
        (x, stacks), tapped = jax.lax.scan(
            layer, (x, stacks), scanned, unroll=config.layers if unroll and not remat else 1
        )
        if cache is not None:
            cache = Cache(*stacks, context.valid, cache.length + tokens.shape[1])
        x = x if self.norm is None else self.norm(x, keep)
        return Output(
            logits=self.head(x, under(lora, "head"), self.embed.tokens) if logits and self.head is not None else None,
            hidden=x,
            taps=tapped,
            cache=cache,
            embedded=embedded if taps else None,
        )
