"""Generation against transformers', on a CPU: one text, many texts, a beam search; SmolLM2-135M's shapes.

    python experiments/bench_generate.py     # makes the peer's virtual environment first; then ten minutes on one core

Random weights and prompts: time does not depend on them. The sides take turns on one pinned core; CPU-seconds of a
whole call (the prompts are read, too), medians over rounds, after one that compiles.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from bench_lora import PEFT
from peers import Worker, environment, pin, report, take_turns

RESULT = Path(__file__).parent / "results" / "bench_generate.json"
SMOLLM2 = {"vocab_size": 49152, "embed": 576, "layers": 30, "heads": 9, "kv_heads": 3, "mlp": 1536}
CASES = {
    "1 text": {"rows": 1, "beams": 1},
    "16 texts": {"rows": 16, "beams": 1},
    "4 texts, 4 beams": {"rows": 4, "beams": 4},
}


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        prompt, new: tokens that each text has, and gets.
    """

    prompt: int = 64
    new: int = 32
    rounds: int = 5


def main(options: Options) -> None:
    pin()
    results, sizes = {}, {"prompt": options.prompt, "new": options.new}
    with (
        Worker(environment("peft", *PEFT), "transformers_generate.py", {"shape": SMOLLM2}) as theirs,
        Worker(sys.executable, "ours_generate.py", {"shape": SMOLLM2}) as ours,
    ):
        sides = {"transformers": theirs, "ours": ours}
        for name, case in CASES.items():
            for side in sides.values():
                side.step(seed=0, **case, **sizes)
            results[name] = take_turns(sides, [{"seed": i, **case, **sizes} for i in range(options.rounds)])
    title = f"{options.new} tokens behind {options.prompt}, SmolLM2-135M's shapes, one core"
    report(RESULT, title, options, results)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
