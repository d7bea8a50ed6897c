"""Decoding: greedy, sampling and beam search; whole, or token by token."""

from mlfs_jax.generate.beams import beam_search
from mlfs_jax.generate.loop import Rows, advance, decode
from mlfs_jax.generate.network import Network, reorder
from mlfs_jax.generate.sampling import GREEDY, GenerateConfig, Sampling, pick, warp
from mlfs_jax.generate.session import Generated, Session, bucket, generate, stream
from mlfs_jax.generate.text import generate_text, stream_text

__all__ = [
    "GREEDY",
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
    "generate_text",
    "pick",
    "reorder",
    "stream",
    "stream_text",
    "warp",
]
