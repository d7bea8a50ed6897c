"""What `mlfs plan` says of Llama-2-7B on 8 devices and Llama-3.1-70B on 64, and how long it takes to say so.

    python experiments/plan_llama.py            # about ten minutes on 2 cores; writes results/plan_llama.json

Every plan is a process of its own, with an empty compile cache.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tyro
from store import save_result

FILE = Path(__file__).parent / "results" / "plan_llama.json"
SMALL = ("--model", "llama-2-7b", "--mesh", "fsdp=8", "--batch-size", "8", "--length", "2048")
LARGE = ("--model", "llama-3.1-70b", "--mesh", "fsdp=64", "--batch-size", "64", "--length", "2048")
PLANS = [
    (*SMALL, "--memory", "40GiB"),
    (*SMALL, "--remat"),
    (*SMALL, "--remat", "--stage", "2"),
    (*LARGE, "--memory", "80GiB"),
    (*LARGE, "--remat"),
    (*LARGE, "--remat", "--stage", "2"),
]


def main() -> None:
    for flags in PLANS:
        with tempfile.TemporaryDirectory() as cache:
            start = time.perf_counter()
            command = [sys.executable, "-m", "mlfs_jax.cli", "plan", *flags, "--json"]
            env = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}
            done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
            seconds = round(time.perf_counter() - start, 1)
        found = json.loads(done.stdout)
        save_result(FILE, "mlfs plan " + " ".join(flags), {"wall seconds": seconds, **found})
        peak = found["bytes per device"]["peak"]
        print(f"{seconds:6.1f} s  {peak / 2**30:8.2f} GiB  mlfs plan {' '.join(flags)}", flush=True)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
