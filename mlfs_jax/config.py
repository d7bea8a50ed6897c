"""What a network is: frozen dataclasses that refuse what cannot be built, and say why."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from mlfs_jax.errors import ConfigError

ENCODER_HEADS = ("none", "sequence", "token", "mlm")
PROBLEMS = ("classification", "regression")
ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish", "tanh")
SIZES = ("vocab_size", "embed", "layers", "heads", "kv_heads", "head_dim", "mlp", "max_positions")
"""Fields of a config that count something; ``kv_heads`` of decoders only."""


def check_size(name: str, value: object) -> None:
    """Raise ConfigError for what is no whole number of at least 1."""
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} = {value!r}: expected a whole number of at least 1.")


def _check_eps(value: object) -> None:
    if not isinstance(value, int | float) or not value >= 0:
        raise ConfigError(f"norm_eps = {value!r}: expected a number of at least 0.")


def _check_choice(config: object, field: str, choices: tuple[str, ...]) -> None:
    if (value := getattr(config, field)) not in choices:
        raise ConfigError(f"{field} = {value!r}: expected one of {', '.join(choices)}.")


@dataclass(frozen=True)
class EncoderConfig:
    """Shape of a post-norm transformer encoder (BERT, RoBERTa, DistilBERT, ELECTRA).

    Sizes are in units of channels, heads, layers, table rows. ``embed`` need not equal ``heads * head_dim``:
    a sliced subnet has fewer heads, or fewer channels, than the model it came from.

    Attributes:
        max_positions: rows of the position table (RoBERTa's includes its offset).
        position_offset: RoBERTa counts positions over real tokens, from ``pad_token_id + 1``; 0 elsewhere.
        type_vocab: rows of the token type table; 0 for a model without one.
        embedding_size: width E of the token tables of a model that projects them, E -> D (ELECTRA); None: E is D, no
            projection.
        head: "none" (hidden states), "sequence", "token" or "mlm".
        labels: C, outputs of a "sequence" or "token" head.
        problem: "classification" or "regression", for a "sequence" head.
        pooler: with head "none" only, keep BERT's and RoBERTa's pooler.
        head_activation: nonlinearity inside the head (tanh for BERT and RoBERTa, relu for DistilBERT, gelu else).
    """

    family: str
    vocab_size: int
    embed: int
    layers: int
    heads: int
    head_dim: int
    mlp: int
    max_positions: int
    position_offset: int = 0
    type_vocab: int = 0
    embedding_size: int | None = None
    activation: str = "gelu"
    norm_eps: float = 1e-12
    pad_token_id: int = 0
    head: str = "none"
    labels: int = 0
    problem: str = "classification"
    pooler: bool = False
    head_activation: str = "tanh"

    def __post_init__(self):
        for field in SIZES:
            if field != "kv_heads":
                check_size(field, getattr(self, field))
        _check_eps(self.norm_eps)
        _check_choice(self, "head", ENCODER_HEADS)
        _check_choice(self, "problem", PROBLEMS)
        _check_choice(self, "activation", ACTIVATIONS)
        _check_choice(self, "head_activation", ACTIVATIONS)
        if self.head in ("sequence", "token") and self.labels < 1:
            raise ConfigError(f"labels = {self.labels}: a {self.head!r} head needs at least 1 output.")
        if self.pooler and self.head != "none":
            raise ConfigError(f"pooler = True with head {self.head!r}: only head 'none' has a separate pooler.")

    @property
    def context(self) -> int:
        """Tokens of the longest text that the model reads."""
        return self.max_positions - self.position_offset

    @property
    def table_dims(self) -> dict[str, int]:
        """Axis of the embedding tables: the residual stream's own, or ELECTRA's narrower one."""
        if self.embedding_size is None:
            return {"embed": self.embed}
        return {"embedding": self.embedding_size}

    def replace(self, **changes) -> EncoderConfig:
        return dataclasses.replace(self, **changes)


POSITIONS = ("rope", "learned", "alibi")
NORMS = ("rms", "layer", "none")
NORM_PLACES = ("pre", "post", "sandwich", "output")
QK_NORMS = ("none", "head", "per-head", "full")
ROPE_SCALINGS = ("none", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (RoFormer, arXiv 2104.09864) and how it is stretched over longer contexts.

    Attributes:
        theta: base of the frequencies theta^(-2i/dim).
        dim: channels of a head that are rotated, the first ones; the others pass.
        interleaved: channels (2i, 2i+1) turn together (GLM); else (i, i + dim/2).
        scaling: "none", "linear" (positions / factor), "llama3" (Llama 3.1: long wavelengths only) or "yarn"
            (arXiv 2309.00071).
        factor: how many times longer.
        original_positions: context before the stretch; llama3 and yarn need it.
        low_freq, high_freq: of llama3.
        beta_fast, beta_slow: of yarn, rotations at which a frequency is kept and fully stretched.
        attention_factor: what yarn multiplies cos and sin by; None: 0.1 ln(factor) + 1.
        truncate: yarn rounds the ends of its ramp to whole channels.
    """

    theta: float
    dim: int
    interleaved: bool = False
    scaling: str = "none"
    factor: float = 1.0
    original_positions: int = 0
    low_freq: float = 1.0
    high_freq: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self):
        if self.scaling not in ROPE_SCALINGS:
            raise ConfigError(f"rope scaling = {self.scaling!r}: expected one of {', '.join(ROPE_SCALINGS)}.")
        if self.dim < 2 or self.dim % 2:
            raise ConfigError(f"rope dim = {self.dim}: expected an even number of channels, at least 2.")
        if self.scaling in ("llama3", "yarn") and self.original_positions < 1:
            raise ConfigError(f"rope scaling {self.scaling!r} needs original_positions; it is not given.")


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): queries, keys and values from low-rank latents.

    ``head_dim`` of the config is ``nope + rope``, the size of a query and key head.

    Attributes:
        q_rank: size of the query latent; None: queries come straight from the residual stream.
        kv_rank: size of the latent that keys and values share.
        nope, rope: channels of a key head without and with rotary positions (the latter shared by all heads).
        value: channels of a value head.
        norm_eps: of the norms of the latents (the other norms have the config's).
    """

    q_rank: int | None
    kv_rank: int
    nope: int
    rope: int
    value: int
    norm_eps: float = 1e-6


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder-only language model; one decoder, all families.

    Sizes are in channels, heads, layers, rows. ``embed`` need not equal ``heads * head_dim``.

    Attributes:
        kv_heads: K; every ``heads // kv_heads`` query heads share a key-value head (1: multi-query).
        max_positions: the context; with learned positions, the rows of the table less the offset.
        positions: "rope", "learned" or "alibi".
        rope: of positions "rope"; ``local_rope``: another one for the layers that have a window (Gemma 3).
        position_offset: rows of the position table before position 0 (OPT: 2).
        alibi_heads: heads that the slopes are computed for; a subnet keeps its supernet's (0: not ALiBi).
        windows: for each layer, how many positions back (itself included) it sees; 0: all. (): all layers see all.
        norm: "rms", "layer" or "none" (LayerNorm without parameters, OLMo); ``norm_bias``: of a "layer" norm;
            ``norm_offset`` is added to its scale (Gemma: 1).
        norm_at: "pre": x + f(n(x)); "post": n(x + f(x)) (OPT-350m); "sandwich": x + n(f(n(x))) (Gemma 2, 3);
            "output": x + n(f(x)) (OLMo 2).
        final_norm: a norm before the head.
        parallel: attention and mlp read the same x and are added together (GPT-NeoX); ``shared_norm``: through one
            norm (Phi).
        qk_norm: "none"; "head": one norm over head_dim, shared by the heads (Qwen 3); "per-head": one for each head
            (StableLM 2); "full": over all heads together (OLMo 2). Of the kind ``norm``.
        qk_norm_bias: with a bias (Phi).
        clip_qkv: queries, keys and values are clipped to [-c, c] (OLMo).
        attn_scale: of query-key products; None: head_dim^-1/2.
        attn_softcap, logit_softcap: c tanh(x / c) on attention scores and on logits (Gemma 2); None: none.
        gated: act(gate) * up, else act(up).
        embed_scale, residual_scale, logit_scale: factors on token embeddings, on every branch before it is added,
            and on the hidden state before the head.
        embed_norm: a norm behind the token table (Bloom).
        embedding_size: width E of the token table of a model that projects it, E -> D (OPT-350m); None: E is D.
        tied: the head is the token table, transposed; ``head_bias``: it has a bias (Phi).
        head: "lm", or "none" (hidden states).
        latent: multi-head latent attention; None: ordinary. ``qkv_bias`` is then of the down projections.
        eos_token_ids: tokens that end a text.
    """

    family: str
    vocab_size: int
    embed: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    max_positions: int
    positions: str = "rope"
    rope: Rope | None = None
    local_rope: Rope | None = None
    position_offset: int = 0
    alibi_heads: int = 0
    windows: tuple[int, ...] = ()
    norm: str = "rms"
    norm_eps: float = 1e-5
    norm_bias: bool = False
    norm_offset: float = 0.0
    norm_at: str = "pre"
    final_norm: bool = True
    parallel: bool = False
    shared_norm: bool = False
    qk_norm: str = "none"
    qk_norm_bias: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    clip_qkv: float | None = None
    attn_scale: float | None = None
    attn_softcap: float | None = None
    logit_softcap: float | None = None
    gated: bool = True
    activation: str = "silu"
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    embed_norm: bool = False
    embedding_size: int | None = None
    tied: bool = True
    head_bias: bool = False
    head: str = "lm"
    latent: Latent | None = None
    pad_token_id: int = 0
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    problem = "lm"  # what kind of loss the head has; as EncoderConfig.problem

    def __post_init__(self):
        for field in SIZES:
            check_size(field, getattr(self, field))
        for field, choices in (
            ("positions", POSITIONS),
            ("norm", NORMS),
            ("norm_at", NORM_PLACES),
            ("qk_norm", QK_NORMS),
            ("head", ("lm", "none")),
            ("activation", ACTIVATIONS),
        ):
            _check_choice(self, field, choices)
        _check_eps(self.norm_eps)
        if self.heads % self.kv_heads:
            raise ConfigError(
                f"heads = {self.heads}, kv_heads = {self.kv_heads}: expected a whole number of query heads for each "
                "key-value head."
            )
        if (self.positions == "rope") != (self.rope is not None):
            raise ConfigError(f"positions = {self.positions!r} with rope = {self.rope}: expected both or neither.")
        if (self.positions == "alibi") != (self.alibi_heads >= self.heads):
            raise ConfigError(
                f"positions = {self.positions!r} with alibi_heads = {self.alibi_heads}: expected at least "
                f"heads = {self.heads} slopes for alibi, else 0."
            )
        if self.windows and len(self.windows) != self.layers:
            raise ConfigError(
                f"windows has {len(self.windows)} entries: expected one for each of the {self.layers} layers."
            )
        if any(window < 0 for window in self.windows):
            raise ConfigError(f"windows = {self.windows}: expected positions to see, or 0 for all.")
        if self.shared_norm and not self.parallel:
            raise ConfigError("shared_norm = True with parallel = False: only parallel blocks share a norm.")
        if self.parallel and self.norm_at != "pre":
            raise ConfigError(f"parallel blocks with norm_at = {self.norm_at!r}: only 'pre' is built.")
        if self.latent is not None and self.head_dim != self.latent.nope + self.latent.rope:
            raise ConfigError(f"head_dim = {self.head_dim}: expected nope + rope of latent attention, {self.latent}.")
        if self.rope is None and (self.latent is not None or self.local_rope is not None):
            raise ConfigError(f"rope = None with {self.latent or self.local_rope}: both need positions 'rope'.")
        room = self.head_dim if self.latent is None else self.latent.rope
        if self.rope is not None and self.rope.dim > room:
            raise ConfigError(
                f"rope dim = {self.rope.dim}: expected at most the {room} channels of a head that may turn."
            )
        if self.rope is not None and self.local_rope is not None and self.rope.dim != self.local_rope.dim:
            raise ConfigError(f"rope dim = {self.rope.dim}, of local_rope {self.local_rope.dim}: expected the same.")

    @property
    def context(self) -> int:
        """Tokens of the longest text that the model reads."""
        return self.max_positions

    @property
    def kv_group(self) -> int:
        """Query heads that a subnet keeps or drops together: those of one key-value head; 1 for multi-query."""
        return self.heads // self.kv_heads if self.kv_heads > 1 else 1

    @property
    def table_dims(self) -> dict[str, int]:
        """Axis of the token table: the residual stream's own, or its narrower one."""
        if self.embedding_size is None:
            return {"embed": self.embed}
        return {"embedding": self.embedding_size}

    def replace(self, **changes) -> DecoderConfig:
        return dataclasses.replace(self, **changes)


Config = EncoderConfig | DecoderConfig
