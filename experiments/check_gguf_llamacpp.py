"""Does llama.cpp run the GGUF files that are written here, and say the same as we do?

    python experiments/check_gguf_llamacpp.py                                # needs llama-cpp-python beside mlfs_jax
    python experiments/check_gguf_llamacpp.py --llama-python ENV/bin/python  # or in an environment of its own

Writes SmolLM2-135M as F16, as Q8_0 with and without its values in F16, and a slice of it as F16. Compares with
llama.cpp: token ids of hard texts, greedy continuations of five prompts, and perplexity on held-out leads of
Wikipedia, each text cut at 256 tokens. "ours" is the file read back by mlfs_jax, in float32; llama.cpp rounds what it
multiplies F16 and Q8_0 weights with to the same type, so the last digits differ.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

import mlfs_jax as mlfs
from mlfs_jax.data import get_task, load_tokenizer
from mlfs_jax.hf.gguf import read_gguf
from mlfs_jax.hf.gguf_write import export_gguf

HERE = Path(__file__).parent
RESULT = HERE / "results" / "check_gguf_llamacpp.json"
PROMPTS = (
    "The Eiffel Tower is a wrought-iron lattice tower in",
    "<|im_start|>user\nWhat is the capital of Italy?<|im_end|>\n<|im_start|>assistant\n",
    "def fibonacci(n):\n",
    "Once upon a time there was a little fox who",
    "Water boils at 100 degrees because",
)
STRINGS = (
    "Hello, world! I've 12345 things; they'RE 3.14159e-10 ½ ² Ⅷ ٣ x1y22z333",
    "   leading\n\n\n\ttabs \r\n trailing   ",
    "naïve café 日本語 한국어 русский עברית हिन्दी 😀👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u00a0\u2003\u3000 \u200b\ufeff",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|><repo_name>x",
    "def f(x):\n    return x**2  # ok\n!!!???...----====____",
)


@dataclass(frozen=True)
class Options:
    """What is compared, and which Python has llama-cpp-python."""

    model: str = "smollm2-135m"
    llama_python: str = sys.executable
    texts: int = 64
    steps: int = 32
    threads: int = 1


def main(options: Options) -> dict:
    model = mlfs.from_pretrained(options.model)
    tokenizer = load_tokenizer(model.source)
    leads = get_task("wiki-lm").read()["test"].texts[: options.texts]
    texts = [tokenizer.encode(text).ids[:256] for text in leads]
    prompts = [tokenizer.encode(text).ids for text in PROMPTS]
    strings = [tokenizer.encode(text).ids for text in STRINGS]
    endless = mlfs.GenerateConfig(max_new_tokens=options.steps, stop_tokens=())
    rows, sliced = {}, two_thirds(model)
    before = {id(source): perplexity(source, texts) for source in (model, sliced)}
    with tempfile.TemporaryDirectory() as tmp:
        for name, source, dtype, values_f16 in (
            ("F16", model, "f16", True),
            ("Q8_0", model, "q8_0", True),
            ("Q8_0, values too", model, "q8_0", False),
            ("slice F16", sliced, "f16", True),
        ):
            file = Path(tmp) / "model.gguf"
            report = export_gguf(source, file, dtype, values_f16=values_f16)
            answer = ask_llamacpp(options, file, prompts, texts)
            again = read_gguf(file)
            greedy = mlfs.generate(again, prompts, endless).tokens
            theirs = float(np.exp(sum(answer["nll"]) / sum(len(t) - 1 for t in texts)))
            rows[name] = {
                "megabytes": round(report.nbytes / 1e6, 1),
                "parameters": report.parameters,
                "same_ids": sum(a == b for a, b in zip(answer["ids"], strings, strict=True)),
                "same_continuations": sum(a == b for a, b in zip(answer["greedy"], greedy, strict=True)),
                "first_difference": [first_difference(*pair) for pair in zip(answer["greedy"], greedy, strict=True)],
                "least_margins": [round(margin, 5) for margin in answer["margins"]],
                "perplexity_llamacpp": round(theirs, 4),
                "perplexity_ours": round(perplexity(again, texts), 4),
                "perplexity_before_export": round(before[id(source)], 4),
                "text": tokenizer.decode(answer["greedy"][0]),
            }
    result = {
        "model": options.model,
        "llama_cpp_python": answer["version"],
        "prompts": len(prompts),
        "steps": options.steps,
        "texts": len(texts),
        "tokens": sum(len(t) - 1 for t in texts),
        "files": rows,
    }
    show(result)
    return result


def two_thirds(model: mlfs.Model) -> mlfs.Model:
    """Two thirds of every width and of the layers: a head size that is not embed / heads."""
    config = model.config
    layers = tuple(i for i in range(config.layers) if i % 3 != 2)
    heads = config.kv_heads * 2 // 3 * config.kv_group
    subnet = mlfs.Subnet(
        embed=config.embed * 2 // 3,
        heads=(heads,) * len(layers),
        mlp=(config.mlp * 2 // 3,) * len(layers),
        layers=layers,
    )
    return mlfs.slice_subnet(model, subnet)


def ask_llamacpp(options: Options, file: Path, prompts: list, texts: list) -> dict:
    request = {"model": str(file), "threads": options.threads, "prompts": prompts, "steps": options.steps}
    request |= {"texts": texts, "strings": STRINGS}
    done = subprocess.run(
        [options.llama_python, HERE / "llamacpp_runner.py"], input=json.dumps(request), capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"llama.cpp did not run {file.name}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


@partial(jax.jit, static_argnums=0)
def text_nll(graphdef, base, ids):
    """[B]: nats of each row's tokens but the first; -1 pads."""
    real = ids >= 0
    logits = mlfs.forward(graphdef, base, {"input_ids": jnp.maximum(ids, 0), "attention_mask": real}).logits[:, :-1]
    picked = jnp.take_along_axis(logits, jnp.maximum(ids[:, 1:, None], 0), -1)[..., 0]
    return ((jax.nn.logsumexp(logits, -1) - picked) * real[:, 1:]).sum(-1)


def perplexity(model: mlfs.Model, texts: list[list[int]], batch: int = 4) -> float:
    width, total = max(map(len, texts)), 0.0
    for start in range(0, len(texts), batch):
        rows = np.full((batch, width), -1)
        for row, ids in zip(rows, texts[start : start + batch], strict=False):
            row[: len(ids)] = ids
        total += float(text_nll(model.graphdef, model.base, rows).sum())
    return float(np.exp(total / sum(len(t) - 1 for t in texts)))


def first_difference(a: list[int], b: list[int]) -> int | None:
    return next((i for i, pair in enumerate(zip(a, b, strict=True)) if pair[0] != pair[1]), None)


def show(result: dict) -> None:
    table = Table(title=f"{result['model']} in llama.cpp (llama-cpp-python {result['llama_cpp_python']})")
    for column in ("file", "MB", "ids", "greedy", "ppl llama.cpp", "ours", "unexported", "apart"):
        table.add_column(column, justify="left" if column == "file" else "right")
    for name, row in result["files"].items():
        apart = row["perplexity_llamacpp"] / row["perplexity_before_export"] - 1
        table.add_row(
            name,
            f"{row['megabytes']:.1f}",
            f"{row['same_ids']} of {len(STRINGS)}",
            f"{row['same_continuations']} of {result['prompts']}",
            f"{row['perplexity_llamacpp']:.4f}",
            f"{row['perplexity_ours']:.4f}",
            f"{row['perplexity_before_export']:.4f}",
            f"{apart:+.3%}",
        )
    console = Console(width=110)
    console.print(table)
    console.print(f"Perplexity on {result['tokens']} tokens; apart: llama.cpp against the model before export.")


if __name__ == "__main__":
    answer = main(tyro.cli(Options, description=__doc__))
    RESULT.write_text(json.dumps(answer, indent=2) + "\n")
