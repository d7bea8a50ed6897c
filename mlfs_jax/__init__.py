"""MLFS in JAX: one frozen pretrained model, many subnets for many devices."""

from mlfs_jax.backbone.tree import Mask, Output
from mlfs_jax.config import EncoderConfig
from mlfs_jax.distill import DistillConfig
from mlfs_jax.hf.export import ExportReport, export_hf
from mlfs_jax.hf.load import from_pretrained
from mlfs_jax.lora import init_lora, lora_sites, merge_lora, stack_stages, unmerge_lora
from mlfs_jax.model import Model, forward, init_model
from mlfs_jax.slicing import slice_subnet
from mlfs_jax.stages import Stage, paper_stages
from mlfs_jax.subnet import Subnet, SubnetSpace, make_mask
from mlfs_jax.train import FitConfig, Fitted, fit, load_run

__version__ = "0.1.0"

__all__ = [
    "DistillConfig",
    "EncoderConfig",
    "ExportReport",
    "FitConfig",
    "Fitted",
    "Mask",
    "Model",
    "Output",
    "Stage",
    "Subnet",
    "SubnetSpace",
    "export_hf",
    "fit",
    "forward",
    "from_pretrained",
    "init_lora",
    "init_model",
    "load_run",
    "lora_sites",
    "make_mask",
    "merge_lora",
    "paper_stages",
    "slice_subnet",
    "stack_stages",
    "unmerge_lora",
]
