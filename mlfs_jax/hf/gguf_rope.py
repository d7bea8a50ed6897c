"""Rotary positions between a GGUF and :class:`mlfs_jax.config.Rope`: metadata, and a tensor for Llama 3.1's scaling."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from jaxtyping import Float

from mlfs_jax.config import Rope
from mlfs_jax.errors import CheckpointError, ConfigError
from mlfs_jax.hf.gguf_file import GGUFFile

ROPE_FREQS = "rope_freqs.weight"
"""float [dim/2]: what each rotary frequency is divided by (Llama 3.1)."""


def read_rope(file: GGUFFile, theta: float, dim: int, context: int) -> Rope:
    """The rotary positions of a file, heads of ``dim`` channels.

    Raises:
        ConfigError: a scaling that is not built here.
        CheckpointError: an entry that is no number.
    """
    arch = file.metadata["general.architecture"]

    def scaling(key, default=None):
        value = file.metadata.get(f"{arch}.rope.{key}", default)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise CheckpointError(f"{file.path} has {arch}.rope.{key} = {value!r}: expected a number.")
        return value

    kind = file.metadata.get(f"{arch}.rope.scaling.type", "linear")  # llama.cpp's default, with factor 1
    factor = scaling("scaling.factor", scaling("scale_linear")) or 1.0
    rope = Rope(theta=shortest(theta), dim=dim)
    if kind not in ("none", "linear", "yarn"):
        raise ConfigError(
            f"{file.path}: rope scaling {kind!r} of a GGUF is not built here; linear, yarn and llama3 are."
        )
    if ROPE_FREQS in file.tensors:
        if kind == "yarn" or factor != 1.0:
            raise ConfigError(f"{file.path} has {ROPE_FREQS} and rope scaling {kind!r}: one of them is built here.")
        return llama3_rope(file.read(ROPE_FREQS).astype(np.float64), rope)
    if kind == "yarn":
        if scaling("scaling.yarn_ext_factor", 1.0) != 1.0 or scaling("scaling.yarn_log_multiplier"):
            raise ConfigError(f"{file.path}: yarn with yarn_ext_factor or yarn_log_multiplier is not built here.")
        # llama.cpp multiplies its own by attn_factor; its converter leaves Hugging Face's, whole, in yarn_attn_factor
        attention_factor = scaling("scaling.yarn_attn_factor")
        if attention_factor is None and scaling("scaling.attn_factor", 1.0) != 1.0:
            attention_factor = scaling("scaling.attn_factor") * (0.1 * math.log(factor) + 1.0)
        return dataclasses.replace(
            rope,
            scaling="yarn",
            factor=shortest(factor),
            original_positions=scaling("scaling.original_context_length", context),
            beta_fast=shortest(scaling("scaling.yarn_beta_fast", 32.0)),
            beta_slow=shortest(scaling("scaling.yarn_beta_slow", 1.0)),
            attention_factor=attention_factor,
        )
    if kind == "linear" and factor != 1.0:
        return dataclasses.replace(rope, scaling="linear", factor=shortest(factor))
    return rope


def llama3_factors(rope: Rope) -> Float[np.ndarray, "F"]:
    """What Llama 3.1's scaling divides each of the dim/2 frequencies by (transformers, modeling_rope_utils.py)."""
    turns = rope.original_positions * rope.theta ** (-np.arange(0, rope.dim, 2) / rope.dim) / (2 * np.pi)
    smooth = np.clip((turns - rope.low_freq) / (rope.high_freq - rope.low_freq), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / rope.factor + smooth)


def llama3_rope(factors: Float[np.ndarray, "F"], rope: Rope) -> Rope:
    """The Llama 3.1 scaling whose factors these are: a GGUF holds them instead of its four constants.

    Between its ends 1/factor is linear in the turns that a frequency makes over the original context. Its slope and
    intercept give the constants but for their common unit: low_freq is taken as 1, as Meta does.

    Raises:
        ConfigError: they are of another kind.
    """
    if rope.dim != 2 * len(factors):
        raise ConfigError(
            f"{ROPE_FREQS} has {len(factors)} entries: expected one for each of {rope.dim // 2} frequencies."
        )
    if np.all(factors == 1.0):
        return rope
    scaled = dataclasses.replace(rope, scaling="llama3", factor=shortest(factors.max()), original_positions=8192)
    between = (factors > 1.0) & (factors < factors.max())
    if between.sum() > 1:
        smooth = (1.0 / factors[between] - 1.0 / factors.max()) / (1.0 - 1.0 / factors.max())
        unit = rope.theta ** (-np.arange(0, rope.dim, 2) / rope.dim)[between] / (2 * np.pi)
        slope, intercept = np.polyfit(unit, smooth, 1)
        if intercept < 0 < slope:
            scaled = dataclasses.replace(
                scaled, original_positions=max(1, round(-slope / intercept)), high_freq=round(1.0 - 1.0 / intercept, 4)
            )
    if not np.allclose(llama3_factors(scaled), factors, rtol=1e-4):
        raise ConfigError(f"{ROPE_FREQS} is no Llama 3 rope scaling; another kind is not built here.")
    return scaled


def rope_metadata(rope: Rope) -> dict[str, object]:
    """The entries that say a scaling, without the architecture in front; Llama 3's is a tensor instead."""
    if rope.scaling not in ("linear", "yarn"):
        return {}
    said = {"rope.scaling.type": rope.scaling, "rope.scaling.factor": float(rope.factor)}
    if rope.scaling == "yarn":
        said |= {
            "rope.scaling.original_context_length": rope.original_positions,
            "rope.scaling.yarn_beta_fast": float(rope.beta_fast),
            "rope.scaling.yarn_beta_slow": float(rope.beta_slow),
        }
        if rope.attention_factor is not None:  # llama.cpp's own factor comes on top
            said["rope.scaling.attn_factor"] = rope.attention_factor / (0.1 * float(np.log(rope.factor)) + 1.0)
    return said


def shortest(value: float) -> float:
    """The shortest decimal number that is this float32: 1e-05 rather than 9.999999747378752e-06."""
    return float(str(np.float32(value)))
