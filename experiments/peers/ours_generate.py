"""Worker: our ``generate``; setup, task and answer as of transformers_generate.py."""

import json
import sys
import time

import jax
import numpy as np

import mlfs_jax as mlfs
from mlfs_jax.config import DecoderConfig, Rope

SETUP = json.loads(sys.argv[1])
SHAPE = SETUP["shape"]


def main():
    mlfs.keep_freed_memory()
    head_dim = SHAPE["embed"] // SHAPE["heads"]
    config = DecoderConfig("llama", **SHAPE, head_dim=head_dim, max_positions=2048, rope=Rope(10000.0, head_dim))
    model = mlfs.init_model(config, jax.random.key(0))
    print(json.dumps({"ready": jax.__version__}), flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        rng = np.random.default_rng(task["seed"])
        prompts = rng.integers(3, SHAPE["vocab_size"], (task["rows"], task["prompt"])).tolist()
        how = mlfs.GenerateConfig(max_new_tokens=task["new"], beams=task["beams"], stop_tokens=())
        cpu, wall = time.process_time(), time.perf_counter()
        mlfs.generate(model, prompts, how)
        print(json.dumps({"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}), flush=True)


main()
