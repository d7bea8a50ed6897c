"""Worker: our training step (rank-8 adapters of a frozen decoder, AdamW): of the maxnet alone, or a sandwich.

Setup: {"family": "gpt_neox" | "llama", "shape": {...}, "batch": B, "length": T, "alpha": weight of the distillation};
task: {"seed": n, "subnets": [[heads, mlp, layers], ...]}. Answer: {"cpu": CPU-seconds, "wall": seconds, "loss": sum};
to a task with {"count": true}: {"flops": of all gradients}, of which a layer that is left out counts, too.
"""

import json
import sys
import time

import jax
import numpy as np
import optax

import mlfs_jax as mlfs
from mlfs_jax.config import DecoderConfig, Rope
from mlfs_jax.subnet import make_mask
from mlfs_jax.supernet import Supernet, widths_of

SETUP = json.loads(sys.argv[1])
SHAPE = SETUP["shape"]


def decoder() -> DecoderConfig:
    head_dim, neox = SHAPE["embed"] // SHAPE["heads"], SETUP["family"] == "gpt_neox"
    switches = {"rope": Rope(10000.0, head_dim // 4 if neox else head_dim), "tied": not neox}
    if neox:
        biases = dict.fromkeys(("norm_bias", "qkv_bias", "o_bias", "mlp_bias"), True)
        switches |= biases | {"norm": "layer", "parallel": True, "gated": False, "activation": "gelu"}
    sizes = {"kv_heads": SHAPE["heads"], "head_dim": head_dim, "max_positions": SETUP["length"]}
    return DecoderConfig(SETUP["family"], **SHAPE, **sizes, **switches)


def count(supernet: Supernet, state, base, batch: dict, subnets: tuple) -> float:
    """FLOPs of the compiled programs that a step runs."""
    maxnet_grads, add_subnet_grads, _ = supernet._compiled
    first = state.params, base, batch, 1.0, bool(subnets)
    grads, _, teacher = maxnet_grads.eval_shape(*first)
    lowered = [maxnet_grads.lower(*first)]
    for subnet in subnets:
        rest = state.params, base, batch, teacher, make_mask(supernet.config, subnet), 1.0
        lowered.append(add_subnet_grads.lower(grads, *rest, widths_of(supernet.config, subnet)))
    return sum(program.compile().cost_analysis()["flops"] for program in lowered)


def main():
    mlfs.keep_freed_memory()
    config = decoder()
    model = mlfs.init_model(config, jax.random.key(0))
    distill = mlfs.DistillConfig(alpha=SETUP.get("alpha", 0.0), beta=0.0)
    supernet = Supernet(config, distill, optax.adamw(1e-4), unroll=True)
    state = supernet.init({"lora": mlfs.init_lora(jax.random.key(1), model)})
    print(json.dumps({"ready": jax.__version__}), flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        subnets = tuple(
            mlfs.Subnet(config.embed, (heads,) * layers, (mlp,) * layers, tuple(range(layers)))
            for heads, mlp, layers in task.get("subnets", ())
        )
        rng = np.random.default_rng(task["seed"])
        tokens = rng.integers(config.vocab_size, size=(SETUP["batch"], SETUP["length"]), dtype=np.int32)
        ones = np.ones_like(tokens)
        batch = {"input_ids": tokens, "attention_mask": ones, "loss_mask": ones.astype(np.float32)}
        if task.get("count"):
            print(json.dumps({"flops": count(supernet, state, model.base, batch, subnets)}), flush=True)
            continue
        cpu, wall = time.process_time(), time.perf_counter()
        state, losses = supernet.step(state, model.base, batch, subnets, 0.0)
        jax.block_until_ready((state, losses))
        spent = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
        print(json.dumps(spent | {"loss": float(losses.sum())}), flush=True)


main()
