"""What a network is: frozen dataclasses that refuse what cannot be built, and say why."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from mlfs_jax.errors import ConfigError

ENCODER_HEADS = ("none", "sequence", "token", "mlm")
PROBLEMS = ("classification", "regression")


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
        for field in ("vocab_size", "embed", "layers", "heads", "head_dim", "mlp", "max_positions"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{field} = {value!r}: expected a whole number of at least 1.")
        if self.head not in ENCODER_HEADS:
            raise ConfigError(f"head = {self.head!r}: expected one of {', '.join(ENCODER_HEADS)}.")
        if self.problem not in PROBLEMS:
            raise ConfigError(f"problem = {self.problem!r}: expected one of {', '.join(PROBLEMS)}.")
        if self.head in ("sequence", "token") and self.labels < 1:
            raise ConfigError(f"labels = {self.labels}: a {self.head!r} head needs at least 1 output.")
        if self.pooler and self.head != "none":
            raise ConfigError(f"pooler = True with head {self.head!r}: only head 'none' has a separate pooler.")

    @property
    def table_dims(self) -> dict[str, int]:
        """Axis of the embedding tables: the residual stream's own, or ELECTRA's narrower one."""
        if self.embedding_size is None:
            return {"embed": self.embed}
        return {"embedding": self.embedding_size}

    def replace(self, **changes) -> EncoderConfig:
        return dataclasses.replace(self, **changes)
