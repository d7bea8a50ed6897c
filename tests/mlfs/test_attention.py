"""Attention asks for cuDNN's kernel only when told to, and only for what it takes: compiled for CUDA, run nowhere."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from mlfs_jax.backbone.attention import attention


@pytest.fixture
def kernels_of(monkeypatch):
    """The cuDNN kernels in the program, for CUDA, of attention and its gradients at the given sizes."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def kernels(dtype=jnp.bfloat16, tokens=8, head_dim=16, bias=None, softcap=None):
        q, k = (jnp.ones((2, tokens, heads, head_dim), dtype) for heads in (4, 2))
        visible = jnp.ones((2, tokens, tokens), bool)

        def total(q, k, v):
            return attention(q, k, v, visible, bias=bias, softcap=softcap).astype(jnp.float32).sum()

        program = jax.jit(jax.value_and_grad(total, (0, 1, 2))).trace(q, k, k).lower(lowering_platforms=("cuda",))
        return re.findall(r"__cudnn\$(\w+)", program.as_text())

    return kernels


@pytest.mark.parametrize("bias", [False, True])
def test_cudnn_where_it_is_asked_for(kernels_of, bias, monkeypatch):
    bias = jnp.ones((2, 4, 8, 8)) if bias else None
    assert kernels_of(bias=bias) == []
    monkeypatch.setenv("MLFS_ATTENTION", "cudnn")
    assert kernels_of(bias=bias) == ["fmhaScaleBiasSoftmax", "fmhaScaleBiasSoftmaxBackward"]


@pytest.mark.parametrize(
    "unfit", [{"dtype": jnp.float32}, {"tokens": 7}, {"head_dim": 12}, {"head_dim": 136}, {"softcap": 3.0}]
)
def test_not_for_what_it_does_not_take(kernels_of, unfit, monkeypatch):
    monkeypatch.setenv("MLFS_ATTENTION", "cudnn")
    assert kernels_of(**unfit) == []
