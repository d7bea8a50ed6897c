"""What training costs, counted by the compiler from SmolLM2-135M's shapes; no weight exists, nothing runs.

Beside LoRA of the default rank on the same frozen model and batch, with the same loss: prompts of 182 tokens and
completions of 10, as long as wiki-description's may be.
"""

import pytest

import spa_jax as spa
from mlfs_jax.config import DecoderConfig, Rope
from spa_jax.cost import Workload, count_bytes, count_flops

CONFIG = DecoderConfig("llama", 49152, 576, 30, 9, 3, 64, 1536, 2048, rope=Rope(1e5, 64))
WORKLOAD = Workload(CONFIG, batch=16, length=192, counted=10)


@pytest.fixture(scope="module")
def lora():
    step = WORKLOAD.lora_step
    return {"flops": count_flops(step(unroll=True)), "bytes": count_bytes(step(unroll=False))}


def test_flops_of_a_step(lora):
    """No gradient of the base: at most half of LoRA's; with cached ladders the backbone is not run at all."""
    side, cached = (WORKLOAD.side_step(unroll=True, cached=cached) for cached in (False, True))
    plugin = WORKLOAD.side_step(spa.SideConfig(ladder="plugin"), unroll=True)
    assert count_flops(side) <= 0.5 * lora["flops"]
    assert count_flops(cached) <= 0.05 * lora["flops"]
    assert count_flops(plugin) <= 0.5 * lora["flops"]


def test_memory_of_a_step(lora):
    """No activation of the backbone is kept for a backward pass, but the taps themselves."""
    for cached in (False, True):
        assert count_bytes(WORKLOAD.side_step(unroll=False, cached=cached)) <= 0.35 * lora["bytes"]
