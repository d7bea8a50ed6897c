"""MLFS in JAX: one frozen pretrained model, many subnets for many devices."""

from mlfs_jax.backbone.tree import Mask, Output
from mlfs_jax.config import EncoderConfig
from mlfs_jax.lora import init_lora, lora_sites, merge_lora, stack_stages, unmerge_lora
from mlfs_jax.model import Model, forward, init_model
from mlfs_jax.slicing import slice_subnet
from mlfs_jax.subnet import Subnet, SubnetSpace, make_mask

__all__ = [
    "EncoderConfig",
    "Mask",
    "Model",
    "Output",
    "Subnet",
    "SubnetSpace",
    "forward",
    "init_lora",
    "init_model",
    "lora_sites",
    "make_mask",
    "merge_lora",
    "slice_subnet",
    "stack_stages",
    "unmerge_lora",
]
