"""What training costs, counted by the compiler from SmolLM2-135M's shapes; no weight exists, nothing runs.

Beside LoRA of the default rank on the same frozen model and batch, with the same loss: prompts of 182 tokens and
completions of 10, as long as wiki-description's may be.
"""

import jax
import jax.numpy as jnp
import optax
import pytest

import spa_jax as spa
from mlfs_jax.config import DecoderConfig, Rope
from mlfs_jax.lora import init_lora
from mlfs_jax.model import Model, abstract, forward
from mlfs_jax.supernet import TrainState
from mlfs_jax.vocab import Hidden, lm_loss
from spa_jax.train import SideTrainer

CONFIG = DecoderConfig("llama", 49152, 576, 30, 9, 3, 64, 1536, 2048, rope=Rope(1e5, 64))
GRAPHDEF, BASE = abstract(CONFIG)
B, T, COUNTED = 16, 192, 10
OPTIMIZER = optax.adam(1e-3)


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


BATCH = {
    "input_ids": array(B, T, dtype=jnp.int32),
    "attention_mask": array(B, T, dtype=jnp.int32),
    "loss_mask": array(B, T),
}


def state_of(params):
    return jax.eval_shape(lambda p: TrainState(p, OPTIMIZER.init(p), jnp.zeros((), jnp.int32)), params)


def lora_step(unroll: bool):
    """A step of fine-tuning with LoRA, lowered."""
    lora = jax.eval_shape(lambda: init_lora(jax.random.key(0), Model(CONFIG, GRAPHDEF, BASE)))

    def loss(lora, base, batch):
        hidden = forward(GRAPHDEF, base, batch, lora=lora, logits=False, unroll=unroll).hidden
        return lm_loss(Hidden(GRAPHDEF, base, hidden), batch, chunk=B * COUNTED)

    def step(state, base, batch):
        loss_, grads = jax.value_and_grad(loss)(state.params, base, batch)
        updates, opt_state = OPTIMIZER.update(grads, state.opt_state)
        return TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1), loss_

    return jax.jit(step, donate_argnums=0).lower(state_of(lora), BASE, BATCH)


def side_step(unroll: bool, cached: bool = False, config: spa.SideConfig | None = None):
    side = jax.eval_shape(lambda: spa.init_side(jax.random.key(0), CONFIG, config))
    ladders = None
    if cached:
        taps = array(len(side.tapped) + 1, B, T, CONFIG.embed, dtype=jnp.float16)
        frame = spa.Frame(taps, array(B, T, dtype=jnp.int32), array(B, T, dtype=bool))
        ladders = frame, array(B, T, CONFIG.embed)
    trainer = SideTrainer(GRAPHDEF, side, spa.Setting.S1, OPTIMIZER, unroll=unroll, chunk=B * COUNTED)
    return trainer.step.lower(state_of(side.net), BASE, BATCH, ladders, jax.eval_shape(lambda: jax.random.key(0)))


@pytest.fixture(scope="module")
def lora():
    return {"flops": lora_step(unroll=True).cost_analysis()["flops"], "bytes": memory(lora_step(unroll=False))}


def memory(lowered) -> int:
    analysis = lowered.compile().memory_analysis()
    return analysis.temp_size_in_bytes + analysis.argument_size_in_bytes


def test_flops_of_a_step(lora):
    """No gradient of the base: at most half of LoRA's; with cached ladders the backbone is not run at all."""
    assert side_step(unroll=True).cost_analysis()["flops"] <= 0.5 * lora["flops"]
    assert side_step(unroll=True, cached=True).cost_analysis()["flops"] <= 0.05 * lora["flops"]
    plugin = spa.SideConfig(ladder="plugin")
    assert side_step(unroll=True, config=plugin).cost_analysis()["flops"] <= 0.5 * lora["flops"]


def test_memory_of_a_step(lora):
    """No activation of the backbone is kept for a backward pass, but the taps themselves."""
    assert memory(side_step(unroll=False)) <= 0.35 * lora["bytes"]
    assert memory(side_step(unroll=False, cached=True)) <= 0.35 * lora["bytes"]
