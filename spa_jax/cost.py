"""What a training step costs, counted by the compiler from shapes: no weight exists, nothing runs.

A side network beside LoRA on the same frozen base, with the same batch and the same loss: the comparison that LST
makes (arXiv 2206.06522), and SPA inherits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.stages import Lowered

from mlfs_jax.backbone.quantised import quantise
from mlfs_jax.config import DecoderConfig
from mlfs_jax.lora import init_lora
from mlfs_jax.model import Model, abstract, forward
from mlfs_jax.supernet import TrainState
from mlfs_jax.vocab import Hidden, lm_loss
from spa_jax.seam import Frame, Setting
from spa_jax.side import SideConfig
from spa_jax.start import init_side
from spa_jax.train import SideTrainer

OPTIMIZER = optax.adam(1e-3)


@dataclass(frozen=True)
class Workload:
    """A base and a batch, as shapes.

    Attributes:
        batch: B, examples.
        length: T, tokens of each.
        counted: tokens of each whose loss counts (the completion): their logits are in memory at a time.
        base_bits: of the base's layers (:meth:`mlfs_jax.Model.quantise`).
    """

    config: DecoderConfig
    batch: int
    length: int
    counted: int
    base_bits: int = 32

    def base(self) -> tuple[nnx.GraphDef, nnx.State]:
        """The network, and its weights as shapes."""
        graphdef, base = abstract(self.config)
        return graphdef, jax.eval_shape(lambda base: quantise(base, self.base_bits), base)

    @property
    def tokens(self) -> dict[str, jax.ShapeDtypeStruct]:
        ids = jax.ShapeDtypeStruct((self.batch, self.length), jnp.int32)
        return {"input_ids": ids, "attention_mask": ids, "loss_mask": self._floats(self.batch, self.length)}

    def lora_step(self, *, unroll: bool, rank: int = 8) -> Lowered:
        """A step of fine-tuning the base with LoRA."""
        graphdef, base = self.base()
        lora = jax.eval_shape(lambda: init_lora(jax.random.key(0), Model(self.config, graphdef, base), rank=rank))

        def loss(lora, base, batch):
            hidden = forward(graphdef, base, batch, lora=lora, logits=False, unroll=unroll).hidden
            return lm_loss(Hidden(graphdef, base, hidden), batch, chunk=self.batch * self.counted)

        def step(state, base, batch):
            value, grads = jax.value_and_grad(loss)(state.params, base, batch)
            return state.apply_gradients(grads, OPTIMIZER), value

        return jax.jit(step, donate_argnums=0).lower(_state_of(lora), base, self.tokens)

    def side_step(self, config: SideConfig | None = None, *, unroll: bool, cached: bool = False) -> Lowered:
        """A step of training a side network; ``cached``: on taps of an earlier epoch, without the base's layers."""
        graphdef, base = self.base()
        side = jax.eval_shape(lambda: init_side(jax.random.key(0), self.config, config))
        ladders, embed = None, self.config.embed
        if cached:
            taps: Any = jax.ShapeDtypeStruct((len(side.tapped) + 1, self.batch, self.length, embed), jnp.float16)
            valid: Any = jax.ShapeDtypeStruct((self.batch, self.length), bool)
            positions: Any = self.tokens["input_ids"]
            frame = Frame(taps, positions, valid)
            ladders = frame, self._floats(self.batch, self.length, embed)
        chunk = self.batch * self.counted
        trainer = SideTrainer(graphdef, side, Setting.S1, OPTIMIZER, unroll=unroll, chunk=chunk)
        key = jax.eval_shape(lambda: jax.random.key(0))
        return trainer.step.lower(_state_of(side.net), base, self.tokens, ladders, key)

    @staticmethod
    def _floats(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)


def _state_of(params) -> TrainState:
    return jax.eval_shape(lambda p: TrainState(p, OPTIMIZER.init(p), jnp.zeros((), jnp.int32)), params)


def count_flops(step: Lowered) -> float:
    """FLOPs of a step that was lowered with its layers unrolled."""
    return step.cost_analysis()["flops"]


def count_bytes(step: Lowered) -> int:
    """Bytes that a step holds: its arguments and what it makes on the way."""
    analysis = step.compile().memory_analysis()
    return analysis.temp_size_in_bytes + analysis.argument_size_in_bytes
