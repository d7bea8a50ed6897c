"""MLFS in JAX: one frozen pretrained model, many subnets for many devices."""

from mlfs_jax.backbone.tree import Mask, Output
from mlfs_jax.config import EncoderConfig
from mlfs_jax.model import Model, forward, init_model

__all__ = ["EncoderConfig", "Mask", "Model", "Output", "forward", "init_model"]
