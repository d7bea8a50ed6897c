"""What a base in 8 or 4 bits saves, and what it costs: bytes of a training step, and the loss before and after LoRA.

    python experiments/spa_quantised.py             # SmolLM2-135M on wiki-description, 3 seeds; 1.5 hours on one core
    python experiments/spa_quantised.py --report    # table and plot of what is there already

Loss is in nats a token of 256 texts of the validation split, after so many steps of LoRA beside the frozen base. Bytes
are counted by the compiler, of a step of 16 texts of 128 tokens: arguments (the base is among them) and what the step
makes on the way. Embeddings, which are also the head, stay float32 in all of them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import jax
import tyro
from pictures import bars
from rich.console import Console
from store import load_results, save_result
from tables import quantised

import mlfs_jax as mlfs
from mlfs_jax.evaluate import evaluate
from mlfs_jax.timing import device_name
from spa_jax.baselines import BaselineConfig, fit_baseline
from spa_jax.cost import Workload, count_bytes

RESULTS = Path(__file__).parent / "results" / "spa_quantised.json"


@dataclass(frozen=True)
class Options:
    """What to run."""

    seeds: tuple[int, ...] = (0, 1, 2)
    bits: tuple[int, ...] = (32, 8, 4)
    steps: int = 60
    runs: Path = Path("runs/quantised")
    report: bool = False  # only print and plot what has been measured


def measure(config: BaselineConfig, out: Path, console: Console) -> dict | None:
    """Losses and bytes of one run; None when it was stopped."""
    shared = config.fit_config
    base = shared.load_model()
    tuned = fit_baseline(config, out, model=base, console=console)
    if tuned is None:
        return None
    held = shared.load_data(shared.get_task(), base)["validation"].subset(256)
    models = {"base": base, "lora": tuned.model}
    losses = {name: evaluate(model, held, "perplexity")["loss"] for name, model in models.items()}
    work = Workload(base.decoder, batch=16, length=128, counted=16, base_bits=config.base_bits)
    steps = {"lora": work.lora_step(unroll=False), "side network": work.side_step(unroll=False)}
    layers = sum(x.nbytes for x in jax.tree.leaves(base.base["layers"]))
    return {"loss": losses, "bytes": {"layers": layers} | {name: count_bytes(step) for name, step in steps.items()}}


def main(options: Options) -> None:
    console = Console()
    for seed in options.seeds if not options.report else ():
        for bits in options.bits:
            config = BaselineConfig(
                "lora", "smollm2-135m", "wiki-description", seed, options.steps, batch_size=8, base_bits=bits
            )
            key, saved = f"{bits}/{seed}", dataclasses.asdict(config) | {"buckets": list(config.buckets)}
            if load_results(RESULTS).get(key, {}).get("config") == saved:
                continue
            console.print(f"[bold]{key}")
            found = measure(config, options.runs / str(options.steps) / key, console)
            if found is None:
                return
            save_result(RESULTS, key, {"bits": bits, "seed": seed, "device": device_name(), "config": saved} | found)
    if results := load_results(RESULTS):
        print(quantised())
        sizes = {str(run["bits"]): {name: n / 1e6 for name, n in run["bytes"].items()} for run in results.values()}
        bars(RESULTS, dict(sorted(sizes.items(), key=lambda item: -int(item[0]))), "MB", "by bits of the base's layers")


if __name__ == "__main__":
    mlfs.keep_freed_memory()
    main(tyro.cli(Options, description=__doc__))
