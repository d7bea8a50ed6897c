"""Decoding: greedy, sampling and beam search; whole, or token by token."""

from mlfs_jax.generate.beams import beam_search
from mlfs_jax.generate.loop import Rows, advance, decode
from mlfs_jax.generate.network import Network, reorder
from mlfs_jax.generate.sampling import GenerateConfig, Sampling, pick, warp
from mlfs_jax.generate.session import Generated, Session, bucket, generate, stream

__all__ = [
    "GenerateConfig",
    "Generated",
    "Network",
    "Rows",
    "Sampling",
    "Session",
    "advance",
    "beam_search",
    "bucket",
    "decode",
    "generate",
    "pick",
    "reorder",
    "stream",
    "warp",
]
