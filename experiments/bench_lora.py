"""A LoRA step against PEFT's and tunix's, on the same Llama shapes with the same rank.

    python experiments/bench_lora.py         # makes their virtual environments first; then some minutes on one core

PEFT over transformers, tunix over flax (the step of its own trainer), AdamW, all linear layers of the blocks, rank 8;
ours is the step of stage 0. Random weights and tokens: time does not depend on them. The sides take turns on one pinned
core; CPU-seconds, medians over rounds. "Memory given back" is our step without :func:`mlfs_jax.keep_freed_memory`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from peers import Worker, environment, pin, report, take_turns

RESULT = Path(__file__).parent / "results" / "bench_lora.json"
PEFT = (("torch==2.13.0",), ("torch==2.13.0", "peft==0.21.2", "transformers==5.23.0"))
TUNIX = (("google-tunix==0.1.7", "jax==0.10.1", "jaxlib==0.10.1"),)


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        vocabularies: V, one measurement each.
    """

    vocabularies: tuple[int, ...] = (1024, 32768)
    batch: int = 8
    length: int = 128
    rounds: int = 9


def measure(vocab_size: int, options: Options) -> dict[str, dict]:
    shape = {"vocab_size": vocab_size, "embed": 384, "layers": 6, "heads": 6, "mlp": 1536}
    setup = {"shape": shape, "batch": options.batch, "length": options.length, "family": "llama"}
    with (
        Worker(environment("peft", *PEFT), "peft_lora.py", setup) as peft,
        Worker(environment("tunix", *TUNIX), "tunix_lora.py", setup) as tunix,
        Worker(sys.executable, "ours.py", setup) as ours,
        Worker(sys.executable, "ours.py", setup, GLIBC_TUNABLES="glibc.malloc.hugetlb=0") as plain,
    ):
        sides = {"PEFT": peft, "tunix": tunix, "ours": ours, "ours, memory given back": plain}
        for side in sides.values():  # compilation, and the first touch of memory
            side.step(seed=0)
        return take_turns(sides, [{"seed": i} for i in range(options.rounds)])


def main(options: Options) -> None:
    pin()
    results = {str(vocab): measure(vocab, options) for vocab in options.vocabularies}
    title = f"one LoRA step, Llama L6 D384 F1536 heads 6, batch {options.batch} x {options.length}, one core"
    report(RESULT, title, options, results)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
