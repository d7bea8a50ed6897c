"""Worker: a LoRA step of tunix (qwix adapters of rank 8 on all linear layers of the blocks, its PeftTrainer), AdamW.

Setup: {"shape": {...}, "batch": B, "length": T}; task: {"seed": n}. Answer: {"cpu": CPU-seconds, "wall": s, "loss": x}.
"""

import json
import sys
import time

import jax
import numpy as np
import optax
import qwix
from flax import nnx
from tunix.models.llama3.model import Llama3, ModelConfig
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig
from tunix.sft.utils import build_positions_from_mask, make_causal_attn_mask

SETUP = json.loads(sys.argv[1])
SHAPE = SETUP["shape"]
LINEAR = r".*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def main():
    config = ModelConfig(
        num_layers=SHAPE["layers"],
        vocab_size=SHAPE["vocab_size"],
        embed_dim=SHAPE["embed"],
        hidden_dim=SHAPE["mlp"],
        num_heads=SHAPE["heads"],
        num_kv_heads=SHAPE["heads"],
        head_dim=SHAPE["embed"] // SHAPE["heads"],
        rope_theta=10_000,
        norm_eps=1e-6,
        weight_tying=True,
    )
    model = Llama3(config, rngs=nnx.Rngs(0))
    provider = qwix.LoraProvider(module_path=LINEAR, rank=8, alpha=8)
    model = qwix.apply_lora_to_model(model, provider, rngs=nnx.Rngs(1), **model.get_model_input())
    trainer = PeftTrainer(model, optax.adamw(1e-4), TrainingConfig(eval_every_n_steps=10**9))
    step, _ = trainer.jit_train_and_eval_step()
    adapters = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.LoRAParam)))
    print(json.dumps({"ready": jax.__version__, "adapters": adapters}), flush=True)
    for line in sys.stdin:
        rng = np.random.default_rng(json.loads(line)["seed"])
        tokens = rng.integers(config.vocab_size, size=(SETUP["batch"], SETUP["length"]), dtype=np.int32)
        mask = np.ones(tokens.shape, bool)
        batch = {"input_tokens": tokens, "input_mask": mask, "positions": build_positions_from_mask(mask)}
        batch["attention_mask"] = make_causal_attn_mask(mask)
        cpu, wall = time.process_time(), time.perf_counter()
        out = step(batch)
        jax.block_until_ready((out, nnx.state(model, nnx.LoRAParam)))
        spent = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
        print(json.dumps(spent | {"loss": float(out[0])}), flush=True)


main()
