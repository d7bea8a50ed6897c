"""The tables of SPA (arXiv 2403.07088) on data that can be had: what a side network and its gate are worth.

For each task and seed, over one frozen base (SmolLM2-135M; --preset paper: a model shaped like LLaMA-7B, on the paper's
own data, for those who have them):

* Table 1: one-shot prompting, LST (the side network alone), SPA, LoRA and adapters   Rouge-L
* Table 3: S1 (f + g always), S2 (f or g), S3 (g alone), SPA (f + sigma g)            Rouge-1/2/L, usage
* Tables 5, 6: small, medium and full data; the gate by itself (p >= 1/2), no budget  Rouge-L, usage
* ours: Table 3 on all the training data that there is, where full is a part of it
* ours: SPA on small and full data, begun with what a plugin learnt on all data of the other task  Rouge-L, usage
* Table 7: how often the two sides differ, and whom the gate then picks               diff, pick
* Gates (ours): each way to train one over the same side network, at equal usage    pick, accuracy, loss
* Figure 3: released plugins with their blocks in a row (serial) and side by side (parallel), and the ladder, by epoch

    python experiments/spa_tables.py                         # 3 seeds x 2 tasks; hours on 2 cores
    python experiments/spa_tables.py --tasks wiki-description --seeds 0
    python experiments/spa_tables.py --tasks wiki-description --jobs lora "spa, all"      # what only runs when named
    python experiments/spa_tables.py --preset h200           # all data, longer texts, for a GPU
    python experiments/spa_tables.py --report                # tables and pictures of what is there already

Every result is written as it comes (experiments/results/spa_tables.json); what is stopped goes on where it was. The
threshold of the gate comes from the validation split, the numbers from the test split. S1 is SPA's side network and S3
is S2's: each is trained once. Seeds differ in new weights and in the order of the data.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console
from spa_report import report
from store import check_names, load_results, run_key, save_result

import mlfs_jax as mlfs
import spa_jax as spa
from mlfs_jax.data.batches import Batches
from mlfs_jax.data.encode import fingerprint
from mlfs_jax.evaluate import evaluate
from mlfs_jax.model import Model
from mlfs_jax.supernet import TrainState
from mlfs_jax.timing import device_name
from mlfs_jax.vocab import Hidden, lm_loss
from spa_jax.gate import choose_threshold
from spa_jax.gate_fit import METHODS, fit_gate
from spa_jax.ladders import LadderCache
from spa_jax.score import TokenScores, score_tokens
from spa_jax.train import SideTrainer, gated_result

RESULTS = Path(__file__).parent / "results" / "spa_tables.json"
WIKI = ("wiki-description", "wiki-description-es")


@dataclass(frozen=True)
class Preset:
    """How much.

    Attributes:
        train: training examples ("full" data), small and medium being shares of them.
        test: examples of the test split that are completed.
    """

    model: str = "smollm2-135m"
    tasks: tuple[str, ...] = WIKI
    train: int | None = None
    test: int | None = None
    calibration: int = 256
    small: float = 0.1
    medium: float = 0.35
    epochs: int = 6
    batch_size: int = 16
    max_length: int | None = None
    buckets: tuple[int, ...] = (64, 96, 128, 192)
    every: int = 3
    cache: str = "disk"
    cache_gb: float = 4.0
    beams: int = 1


PRESETS = {
    "cpu": Preset(train=1000, test=256, calibration=128, max_length=96, buckets=(64, 96)),
    "h200": Preset(epochs=8, batch_size=64, cache="ram", cache_gb=40.0),
    "paper": Preset(
        model="huggyllama/llama-7b",
        tasks=("xsum", "cnn_dailymail", "coqa", "sciq"),
        train=20000,
        test=1000,
        epochs=3,
        buckets=(256, 512, 1024),
        every=1,
        cache="off",
        beams=4,
    ),
}


@dataclass(frozen=True)
class Options:
    """What to run."""

    preset: Literal["cpu", "h200", "paper"] = "cpu"
    tasks: tuple[str, ...] = ()  # of the preset
    seeds: tuple[int, ...] = (0, 1, 2)
    jobs: tuple[str, ...] = ()  # all but LoRA, adapters and those on all data
    model: str | None = None  # another than the preset's: a Hugging Face folder
    runs: Path = Path("runs/spa_tables")
    report: bool = False  # only print and plot what has been measured


@dataclass
class Bench:
    """One task and seed: the base, the data, and where runs lie."""

    preset: Preset
    task: str
    seed: int
    model: Model
    runs: Path
    console: Console
    scored: dict = field(default_factory=dict)

    def config(self, size: int | None = None, **changes) -> spa.FitConfig:
        """On ``size`` training examples, by default the preset's: as many epochs of them, in more or fewer steps."""
        p = self.preset
        size = size or p.train or len(self.data["train"])
        config = spa.FitConfig(
            p.model,
            self.task,
            seed=self.seed,
            steps=max(20, round(0.85 * size) // p.batch_size * p.epochs),
            batch_size=p.batch_size,
            side=spa.SideConfig(every=p.every),
            cache_taps=p.cache,
            cache_gb=p.cache_gb * max(1.0, size / (p.train or size)),
            taps_folder=str(self.runs / self.task.replace("/", "-") / f"taps-{size}") if p.cache == "disk" else None,
            max_length=p.max_length,
            buckets=p.buckets,
            limit=size,
            calibration_examples=p.calibration,
            save_every=200,
        )
        return dataclasses.replace(config, **changes)

    def __post_init__(self):
        plain = spa.FitConfig(self.preset.model, self.task, max_length=self.preset.max_length)
        self.data = plain.load_data(plain.get_task(), self.model)
        test = self.data["test"]
        self.test = test if self.preset.test is None else test.subset(self.preset.test)

    def folder(self, name: str) -> Path:
        return self.runs / self.task.replace("/", "-") / str(self.seed) / name

    def fit(self, name: str, size: int | None = None, **changes) -> tuple[spa.Plugin, dict]:
        """A plugin, trained or found in its folder, and what it does on the validation split."""
        out = self.folder(name)
        fitted = spa.fit(self.config(size, **changes), out, model=self.model, console=self.console)
        if fitted is None:
            raise KeyboardInterrupt
        return fitted.plugin, json.loads((out / "result.json").read_text())

    def tokens(self, name: str, size: int | None = None) -> tuple[spa.Plugin, TokenScores, TokenScores]:
        """SPA's plugin, and the tokens that its gate learns on and is set by."""
        if name not in self.scored:
            plugin, _ = self.fit(name, size)
            config = self.config(size)
            _, for_gate = config.split(self.data["train"].subset(config.limit or 10**9))
            parts = for_gate, self.data["validation"].subset(self.preset.calibration)
            self.scored[name] = plugin, *(score_tokens(self.model, plugin.side, plugin.setting, part) for part in parts)
        return self.scored[name]

    def score(self, fitted: tuple[spa.Plugin, dict], **how) -> dict:
        plugin, validation = fitted
        written = spa.evaluate_plugin(self.model, plugin, self.test, beams=self.preset.beams, batch_size=32, **how)
        return written | {"validation": validation}


def baseline(bench: Bench, method: str) -> dict:
    """Prompting; or what is trained inside the base, for one epoch: each step goes through the base both ways."""
    like = bench.config()
    shared = {name: getattr(like, name) for name in ("seed", "batch_size", "max_length", "buckets", "limit")}
    steps = max(20, (like.limit or 0) // like.batch_size)
    trained = spa.fit_baseline(
        spa.BaselineConfig(method, like.model, like.task, steps=steps, **shared),
        bench.folder(method),
        model=bench.model,
        console=bench.console,
    )
    if trained is None:
        raise KeyboardInterrupt
    found = spa.evaluate_baseline(trained, bench.test, beams=bench.preset.beams, batch_size=32)
    if trained.config.trains:
        held = bench.data["validation"].subset(bench.preset.calibration)
        found["validation"] = {"params": trained.params, "loss": evaluate(trained.model, held, "perplexity")["loss"]}
    return found


def sized(bench: Bench, share: float) -> dict:
    size = round(share * (bench.preset.train or len(bench.data["train"])))
    return bench.score(bench.fit(f"spa-{size}", size), threshold=0.5)


def on_all(bench: Bench, trained: str, **how) -> dict:
    """A setting trained on all examples there are, where the preset's tables are of some."""
    size = len(bench.data["train"])
    return bench.score(bench.fit(f"{trained}-{size}", size, setting=trained), **how)


def started(bench: Bench, share: float, **how) -> dict:
    """SPA whose side network begins as the one that is trained on all examples of another task (seed 0, for all)."""
    other = next(task for task in bench.preset.tasks if task != bench.task)
    source = Bench(bench.preset, other, 0, bench.model, bench.runs, bench.console)
    everything = len(source.data["train"])
    source.fit(f"spa-{everything}", everything)
    size = round(share * (bench.preset.train or len(bench.data["train"])))
    start = str(source.folder(f"spa-{everything}"))
    return bench.score(bench.fit(f"spa-started-{size}", size, start=start), **how)


def curve(bench: Bench, side: spa.SideConfig) -> dict:
    """Validation loss of f + g after every epoch."""
    config = bench.config(setting="s1", side=side, start="random", gate=spa.GateConfig(share=0.0))
    train, held = (
        bench.data["train"].subset(config.limit or 10**9),
        bench.data["validation"].subset(bench.preset.calibration),
    )
    batches = Batches(train, config.batch_size, seed=bench.seed, buckets=config.buckets)
    net = spa.init_side(jax.random.key(bench.seed), bench.model.config, side, setting="s1")
    taps = Path(config.taps_folder) if config.taps_folder else None
    caches = [
        LadderCache(
            bench.model,
            part,
            range(len(part)),
            net.tapped,
            limit_gb=config.cache_gb,
            folder=taps and taps.with_name(f"taps-{name}"),
            fingerprint=fingerprint({"train": part}),
        )
        for name, part in (("curve", train), ("held", held))
    ]
    for cache in caches:
        cache.fill()
    steps = batches.epoch_steps * bench.preset.epochs
    optimizer = dataclasses.replace(config, steps=steps).optimizer
    trainer = SideTrainer(bench.model.graphdef, net, spa.Setting.S1, optimizer)
    state = TrainState(net.net, optimizer.init(net.net), jnp.zeros((), jnp.int32))
    state = jax.device_put(state, jax.devices()[0])

    @jax.jit
    def loss_of(weights, frame, f, batch):
        g, _ = spa.device_step(net.replace(net=weights), None, frame)
        return lm_loss(Hidden(bench.model.graphdef, bench.model.base, f + g), batch)

    whole = Batches(held, 16, seed=0, buckets=config.buckets)

    def validate(weights) -> float:
        total = count = 0.0
        for i in range(whole.epoch_steps):
            counted = float(whole[i]["loss_mask"].sum())
            total += counted * float(loss_of(weights, *caches[1].get(whole.rows(i), whole.width(i)), whole[i]))
            count += counted
        return total / count

    losses = [validate(state.params)]
    for i in range(steps):
        ladders = caches[0].get(batches.rows(i), batches.width(i))
        state, _ = trainer.step(state, bench.model.base, batches[i], ladders, jax.random.key(0))
        if (i + 1) % batches.epoch_steps == 0:
            losses.append(validate(state.params))
    return {"losses": losses, "params": net.num_params}


def gate_of(config: spa.GateConfig, bench: Bench, plugin: spa.Plugin, train: TokenScores, held: TokenScores):
    """A gate trained so, and its threshold for the wanted usage of the validation split."""
    gate = fit_gate(train, config, plugin.setting, jax.random.key(bench.seed))
    return gate, choose_threshold(held.probability(gate), config.usage)


def disagreeing(bench: Bench) -> dict:
    """SPA on all training examples, with a gate that learns where the two sides differ, over the same side network."""
    size = len(bench.data["train"])
    plugin, train, held = bench.tokens(f"spa-{size}", size)
    gate, threshold = gate_of(GATES["disagreement"], bench, plugin, train, held)
    validation = gated_result(held, held.probability(gate), threshold)
    return bench.score((plugin.replace(side=plugin.side.replace(gate=gate), threshold=threshold), validation))


def gates(bench: Bench) -> dict:
    """Every way to train a gate, over the side network of "spa": teacher-forced tokens of the test split.

    The threshold of each is for the wanted usage of the validation split.
    """
    plugin, train, held = bench.tokens("spa")
    test = score_tokens(bench.model, plugin.side, plugin.setting, bench.test)
    found = {}
    for name, config in GATES.items():
        gate, threshold = gate_of(config, bench, plugin, train, held)
        found[name] = gated_result(test, test.probability(gate), threshold)
    ends = {"base_loss": test.base_nll.mean(), "side_loss": test.side_nll.mean()}
    ends |= {"base_accuracy": test.correct_base.mean(), "side_accuracy": test.correct_side.mean()}
    return {"gates": found, **{name: float(value) for name, value in ends.items()}}


def kind(order: str, bench: Bench) -> spa.SideConfig:
    return spa.SideConfig(ladder="plugin", every=bench.preset.every, order=order)


GATES = {method: spa.GateConfig(method, price=0.0) for method in METHODS} | {"marginal, price 0.4": spa.GateConfig()}

# name -> what it measures; those of prompting have no seed
JOBS: dict[str, Callable[[Bench], dict]] = {
    "zero-shot": lambda b: baseline(b, "zero-shot"),
    "one-shot": lambda b: baseline(b, "one-shot"),
    "lora": lambda b: baseline(b, "lora"),
    "adapter": lambda b: baseline(b, "adapter"),
    "parallel-adapter": lambda b: baseline(b, "parallel-adapter"),
    "spa": lambda b: b.score(b.fit("spa")),
    "s1": lambda b: b.score(b.fit("spa"), setting="s1", threshold=0.0),
    "spa, no budget": lambda b: b.score(b.fit("spa"), threshold=0.5),
    "s2": lambda b: b.score(b.fit("s2", setting="s2")),
    "s3": lambda b: b.score(b.fit("s2", setting="s2"), setting="s3", threshold=0.0),
    "gates": gates,
    "spa, small": lambda b: sized(b, b.preset.small),
    "spa, medium": lambda b: sized(b, b.preset.medium),
    "spa, started": lambda b: started(b, 1.0),
    "spa, small, started": lambda b: started(b, b.preset.small, threshold=0.5),
    "spa, all": lambda b: on_all(b, "spa"),
    "s1, all": lambda b: on_all(b, "spa", setting="s1", threshold=0.0),
    "spa, no budget, all": lambda b: on_all(b, "spa", threshold=0.5),
    "spa, disagreement, all": disagreeing,
    "s2, all": lambda b: on_all(b, "s2"),
    "s3, all": lambda b: on_all(b, "s2", setting="s3", threshold=0.0),
    "serial": lambda b: curve(b, kind("serial", b)),
    "parallel": lambda b: curve(b, kind("parallel", b)),
    "ladder": lambda b: curve(b, spa.SideConfig(every=b.preset.every)),
}
SEEDLESS = ("zero-shot", "one-shot")
LONG = ("lora", "adapter", "parallel-adapter", *(job for job in JOBS if job.endswith((", all", ", started"))))
"""Only when ``--jobs`` names them: hours more on two cores."""


def main(options: Options) -> None:
    console, preset = Console(), PRESETS[options.preset]
    check_names("job", options.jobs, JOBS)
    other = options.model if options.model != preset.model else None
    preset = dataclasses.replace(preset, model=options.model or preset.model)
    if options.report:
        return report(RESULTS, options.preset, preset.model, console)
    model = spa.FitConfig(preset.model, "wiki-description").load_model()
    runs = options.runs / run_key(options.preset, other)
    wanted = options.jobs or [job for job in JOBS if job not in LONG]
    for seed in options.seeds:
        for task in options.tasks or preset.tasks:
            bench = None
            for job, measure in JOBS.items():
                key = run_key(f"{options.preset}/{task}/{'any' if job in SEEDLESS else seed}/{job}", other)
                done = load_results(RESULTS).get(key)
                asked = json.loads(json.dumps(dataclasses.asdict(preset)))
                if job not in wanted or (done and done["asked"] == asked):
                    continue
                if job.endswith(", all") and preset.train is None:  # its own tables are of all of them
                    continue
                bench = bench or Bench(preset, task, seed, model, runs, console)
                console.print(f"[bold]{key}")
                start, cpu = time.time(), time.process_time()
                result = measure(bench)
                result |= {"preset": options.preset, "task": task, "seed": seed, "job": job, "asked": asked}
                result |= {"seconds": round(time.time() - start), "cpu_seconds": round(time.process_time() - cpu)}
                save_result(RESULTS, key, result | {"device": device_name()})
                shown = {k: round(v, 4) for k, v in result.items() if isinstance(v, float)}
                console.print(f"{shown} in {result['seconds']} s")
    report(RESULTS, options.preset, preset.model, console)


if __name__ == "__main__":
    mlfs.keep_freed_memory()
    main(tyro.cli(Options, description=__doc__))
