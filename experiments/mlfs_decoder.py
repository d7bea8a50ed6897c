"""How to cut a language model to two thirds: start, teacher, order and shape, by validation perplexity over steps.

What MLFS (arXiv 2404.01353) reports of santacoder, asked of SmolLM2-135M on Wikipedia leads. Every arm trains one
subnet of about 2/3 of the body's parameters on the same batches; the whole model is the frozen teacher:

* start:  all weights of the body train, from the importance slice or from random ones (embeddings pretrained, frozen)
* alpha:  LoRA on the importance slice, with alpha = 0 (no teacher), 0.5, 0.9
* order:  LoRA, alpha 0.9, on the first heads and neurons instead of the most important
* shape:  LoRA, alpha 0.9, on a subnet that is narrower (the slice above), shallower, or both

    python experiments/mlfs_decoder.py                      # 3 seeds x 8 arms: hours on 2 cores
    python experiments/mlfs_decoder.py --preset h200        # longer texts and runs, for a GPU
    python experiments/mlfs_decoder.py --preset paper --task code.jsonl    # santacoder, from the hub, on your code
    python experiments/mlfs_decoder.py --report             # table and plot of what is there already

Every curve is written as it comes (experiments/results/mlfs_decoder.json). Seeds differ in the order of the data and
in new weights; the slice is measured once.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import optax
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table
from store import check_names, load_results, mean_and_spread, run_key, save_result

import mlfs_jax as mlfs
from mlfs_jax.backbone.tree import map_named
from mlfs_jax.data.batches import Batches
from mlfs_jax.data.encode import load_task
from mlfs_jax.evaluate import evaluate
from mlfs_jax.importance import block_influence, importance_order, measure_importance, reorder
from mlfs_jax.subnet import Subnet, num_params
from mlfs_jax.timing import device_name
from mlfs_jax.vocab import Hidden, lm_distill_loss, lm_loss

RESULTS = Path(__file__).parent / "results" / "mlfs_decoder.json"


@dataclass(frozen=True)
class Arm:
    """One curve: which subnet, from which weights, trained how."""

    name: str
    alpha: float = 0.9
    shape: str = "width"
    ordered: bool = True
    random: bool = False
    full: bool = False


ARMS = (
    Arm("sliced start, all weights", full=True),
    Arm("random start, all weights", full=True, random=True),
    Arm("width, alpha 0.9"),
    Arm("width, alpha 0.5", alpha=0.5),
    Arm("width, alpha 0", alpha=0.0),
    Arm("width, first-k", ordered=False),
    Arm("depth", shape="depth"),
    Arm("width and depth", shape="mixed"),
)


@dataclass(frozen=True)
class Preset:
    """Of which model, how long; ``length`` in tokens, ``every`` in steps between evaluations of ``limit`` blocks."""

    model: str
    steps: int
    batch_size: int
    length: int
    every: int
    limit: int
    rank: int = 8
    learning_rate: float = 1e-3


TASK = "wiki-lm"
PRESETS = {
    "cpu": Preset("smollm2-135m", steps=60, batch_size=4, length=64, every=15, limit=32, rank=16, learning_rate=2e-3),
    "h200": Preset("smollm2-135m", steps=1500, batch_size=32, length=256, every=100, limit=800, rank=16),
    "paper": Preset("bigcode/gpt_bigcode-santacoder", steps=10000, batch_size=32, length=1024, every=1000, limit=800),
}


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
        model: another than the preset's: a name, a hub id (codellama/CodeLlama-7b-hf), or a Hugging Face folder.
        task: "wiki-lm", or a file or folder of texts; the paper's code is not published.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    preset: Literal["cpu", "h200", "paper"] = "cpu"
    model: str | None = None
    task: str = TASK
    arms: tuple[str, ...] = tuple(arm.name for arm in ARMS)
    report: bool = False  # only print and plot what has been measured


def ordered_model(model: mlfs.Model, train, preset: Preset) -> tuple[mlfs.Model, np.ndarray]:
    """The model with its heads and neurons in importance order, and its layers ranked by block influence."""
    batches = Batches(train, preset.batch_size, seed=99)
    first = [batches[i] for i in range(max(1, 64 // preset.batch_size))]

    def loss(base, batch):
        hidden = mlfs.forward(model.graphdef, base, batch, logits=False, remat=True).hidden
        return lm_loss(Hidden(model.graphdef, base, hidden), batch, frozen=False)

    order = importance_order(measure_importance(model, first, loss), model.config)
    return reorder(model, order), np.argsort(-block_influence(model, first))


def subnet_of(shape: str, config: mlfs.DecoderConfig, ranked: np.ndarray) -> Subnet:
    """About 2/3 of the body, in one of three shapes."""
    space = mlfs.SubnetSpace.from_ratios(
        config, width=(1.0, 0.66), depth=(1.0, 2 / 3), layer_order=tuple(map(int, ranked))
    )
    if shape == "width":
        return space.uniform(embed=config.embed, heads=space.heads[-1], mlp=space.mlp[-1], depth=config.layers)
    if shape == "depth":
        return space.uniform(embed=config.embed, heads=config.heads, mlp=config.mlp, depth=space.depth[-1])
    mlp, depth = config.mlp * 3 // 4, config.layers * 4 // 5
    return space.uniform(embed=config.embed, heads=config.heads, mlp=mlp, depth=depth)


class Lessons:
    """The batches of a seed, each with the teacher's hidden states, [B, T, D]: the same for every arm.

    Up to 1 GiB of states is kept.
    """

    def __init__(self, teacher: mlfs.Model, train, preset: Preset, seed: int):
        self.teacher, self.batches = teacher, Batches(train, preset.batch_size, seed=seed)
        size = 4 * preset.steps * preset.batch_size * preset.length * teacher.config.embed
        self.keep, self.kept = size <= 2**30, {}

    def __getitem__(self, step: int) -> tuple[dict, np.ndarray]:
        batch, states = self.batches[step], self.kept.get(step)
        if states is None:
            states = mlfs.forward(self.teacher.graphdef, self.teacher.base, batch, logits=False).hidden
            if self.keep:
                self.kept[step] = np.asarray(states)
        return batch, states


def train(arm: Arm, seed: int, teacher: mlfs.Model, student: mlfs.Model, lessons: Lessons, validation, preset) -> dict:
    """Validation perplexity at every evaluation, the first before any training."""
    key = jax.random.key(seed)
    if arm.random:
        fresh = mlfs.flatten(mlfs.init_model(student.config, key).base)
        pick = lambda name, leaf: (leaf if name.startswith("embed.") else fresh[name])[...]  # noqa: E731
        student = student.replace(base=map_named(pick, student.base))
    sites, full = ((), ("layers", "norm")) if arm.full else (None, ())
    lora = mlfs.init_lora(key, student, rank=preset.rank, sites=sites, full=full)
    rate = preset.learning_rate * (0.3 if arm.full else 1.0)  # all weights move at once
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, max(1, preset.steps // 16), preset.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    distill = mlfs.DistillConfig(alpha=arm.alpha, tau=1.0, beta=0.0)

    def loss(lora, student_base, teacher_base, batch, states):
        out = mlfs.forward(student.graphdef, student_base, batch, lora=lora, logits=False)
        ours = Hidden(student.graphdef, student_base, out.hidden)
        return lm_distill_loss(ours, Hidden(teacher.graphdef, teacher_base, states), batch, distill)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(lora, opt_state, student_base, teacher_base, batch, states):
        grads = jax.grad(loss)(lora, student_base, teacher_base, batch, states)
        updates, opt_state = optimizer.update(grads, opt_state, lora)
        return optax.apply_updates(lora, updates), opt_state

    state, curve = optimizer.init(lora), {}
    for number in track(range(preset.steps + 1), f"{arm.name}, seed {seed}", transient=True):
        if number % preset.every == 0 or number == preset.steps:
            merged = student.replace(base=mlfs.merge_lora(student.base, lora))
            curve[number] = evaluate(merged, validation, "perplexity")["perplexity"]
        if number < preset.steps:
            lora, state = step(lora, state, student.base, teacher.base, *lessons[number])
    return curve


def report(options: Options, console: Console) -> None:
    """Mean and spread over seeds, as a table and a picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    wanted = {"model": options.model or PRESETS[options.preset].model, "task": options.task}
    results = [r for r in load_results(RESULTS).values() if r["preset"] == options.preset]
    results = [r for r in results if wanted.items() <= r["config"].items()]
    if not results:
        console.print(f"nothing measured yet with preset {options.preset} of {options.task}.")
        return
    table = Table(title="validation perplexity of subnets of {model} on {task}".format(**results[0]["config"]))
    for column in ("arm", "share of the body", "at the start", "at the end", "seeds"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    figure, panel = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for arm in ARMS:
        runs = [r for r in results if r["arm"] == arm.name]
        if not runs:
            continue
        steps = [int(step) for step in runs[0]["curve"]]
        curves = np.array([list(r["curve"].values()) for r in runs])
        spread = curves.std(0, ddof=1) if len(runs) > 1 else np.zeros(len(steps))
        ends = (mean_and_spread(curves[:, i].tolist(), "{:.2f}".format) for i in (0, -1))
        table.add_row(arm.name, f"{runs[0]['share']:.3f}", *ends, str(len(runs)))
        panel.errorbar(steps, curves.mean(0), spread, marker="o", markersize=3, capsize=2, label=arm.name)
    whole = results[0]["teacher"]
    console.print(table)
    console.print(f"the whole model, untrained: {whole:.2f}")
    panel.axhline(whole, ls="--", color="black", label="whole model, untrained")
    panel.set(xlabel="steps", ylabel="validation perplexity", yscale="log")
    panel.legend(fontsize=8)
    figure.savefig(RESULTS.with_suffix(".png"), dpi=120)
    console.print(f"wrote {RESULTS.with_suffix('.png')}")


def main(options: Options) -> None:
    console, preset = Console(), PRESETS[options.preset]
    check_names("arm", options.arms, (arm.name for arm in ARMS))
    if options.report:
        return report(options, console)
    own = options.task == TASK or options.preset == "paper"  # which is for one's own texts
    others = options.model if options.model != preset.model else None, None if own else options.task
    preset = dataclasses.replace(preset, model=options.model or preset.model)
    plain = mlfs.from_pretrained(preset.model)
    data = load_task(options.task, plain.source, max_length=preset.length)
    data["validation"] = data["validation"].subset(preset.limit)
    teacher = evaluate(plain, data["validation"], "perplexity")["perplexity"]
    best, ranked = ordered_model(plain, data["train"], preset)
    config, device = dataclasses.asdict(preset) | {"task": options.task}, device_name()
    for seed in options.seeds:
        lessons = Lessons(plain, data["train"], preset, seed)
        for arm in (arm for arm in ARMS if arm.name in options.arms):
            key = run_key(f"{options.preset}/{arm.name}/{seed}", *others)
            done, asked = load_results(RESULTS).get(key), config | dataclasses.asdict(arm)
            if done and done["config"] == asked:
                continue
            start, subnet = time.time(), subnet_of(arm.shape, plain.config, ranked)
            student = mlfs.slice_subnet(best if arm.ordered else plain, subnet)
            curve = train(arm, seed, plain, student, lessons, data["validation"], preset)
            share = num_params(plain.config, subnet) / num_params(plain.config)
            result = {"preset": options.preset, "arm": arm.name, "seed": seed, "config": asked}
            result |= {"subnet": str(subnet), "share": share, "teacher": teacher, "curve": curve, "device": device}
            save_result(RESULTS, key, result | {"seconds": round(time.time() - start)})
            console.print(f"{key}: " + ", ".join(f"{step}: {value:.1f}" for step, value in curve.items()))
    report(options, console)


if __name__ == "__main__":
    mlfs.keep_freed_memory()
    main(tyro.cli(Options, description=__doc__))
