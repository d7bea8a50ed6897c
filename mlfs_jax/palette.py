"""The palette of a run, measured: what each subnet costs, and how good it is.

Everything is measured on the *sliced* model: FLOPs as the compiler counts them, wall time on this machine, the task's
metric on the test split (validation, where the test labels are not public). A Hugging Face checkpoint of it may have to
be padded (see :mod:`mlfs_jax.hf.reshape`); ``params_exported`` is what is then in the file.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from mlfs_jax.config import Config
from mlfs_jax.data.encode import Encoded
from mlfs_jax.errors import ConfigError, RunError, unknown
from mlfs_jax.evaluate import evaluate, evaluate_completions
from mlfs_jax.hf.reshape import nearest_fit
from mlfs_jax.run import write_json
from mlfs_jax.slicing import slice_subnet
from mlfs_jax.subnet import Subnet, num_params
from mlfs_jax.timing import compile_decode, compile_forward, count_flops, device_name, time_in_turn
from mlfs_jax.train import Fitted

FILE = "palette.json"
"""Where ``mlfs palette`` keeps the numbers in a run folder; a model card takes them from there."""


@dataclass(frozen=True)
class PaletteRow:
    """One subnet.

    Attributes:
        params: all its parameters, the embedding tables and the head too.
        params_body: its parameters without the embedding tables.
        params_exported: all parameters of its Hugging Face checkpoint, padding included; None: there can be none.
        flops: of one sequence of the palette's length (2 per multiply-add), counted by the compiler.
        latency_ms: batch size -> milliseconds of one forward pass; the median over rounds.
        latency_ratio: batch size -> its time as a share of the maxnet's in the same round; the median over rounds.
        score: the task's metric.
        loss: mean cross-entropy (of a language model: in nats for each token that counts) or squared error.
        tokens_per_s: batch size -> tokens that it decodes in a second, all texts together; empty for an encoder.
        perplexity: of a language model.
    """

    name: str
    subnet: Subnet
    params: int
    params_body: int
    params_exported: int | None
    flops: int
    latency_ms: Mapping[int, float]
    latency_ratio: Mapping[int, float]
    score: float
    loss: float
    tokens_per_s: Mapping[int, float] = field(default_factory=dict)
    perplexity: float | None = None


@dataclass(frozen=True)
class Palette:
    """Rows and what they were measured on; the maxnet comes first.

    Attributes:
        split, examples: what the score is of.
        baseline: score of always answering the commonest class (0 for correlations and F1).
        length: tokens of the sequences that FLOPs and latency are of; no padding.
        device: what the latency is of.
    """

    model: str
    task: str
    metric: str
    split: str
    examples: int
    baseline: float
    length: int
    device: str
    rows: tuple[PaletteRow, ...]

    def row(self, subnet: Subnet) -> PaletteRow | None:
        """The measured row of a subnet, if there is one."""
        return next((row for row in self.rows if row.subnet == subnet), None)

    def to_json(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, saved: Mapping) -> Palette:
        def row(saved: Mapping) -> PaletteRow:
            by_batch = ("latency_ms", "latency_ratio", "tokens_per_s")
            times = {k: {int(b): t for b, t in saved.get(k, {}).items()} for k in by_batch}
            return PaletteRow(**(dict(saved) | times | {"subnet": Subnet.from_json(saved["subnet"])}))

        return cls(**(dict(saved) | {"rows": tuple(row(r) for r in saved["rows"])}))

    def save(self, run: str | Path) -> Path:
        """Write ``palette.json`` into a run folder, in one rename."""
        file = Path(run) / FILE
        write_json(file, self.to_json())
        return file

    @classmethod
    def load(cls, run: str | Path) -> Palette | None:
        """What was saved in a run folder, or None.

        Raises:
            RunError: the file is damaged.
        """
        file = Path(run) / FILE
        if not file.exists():
            return None
        try:
            return cls.from_json(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise RunError(f"{file} is damaged ({e!r}): delete it and run `mlfs palette {run}` again.") from e

    def table(self) -> Table:
        """For a terminal of 90 columns."""
        caption = (
            f"{short(self.model)} on {short(self.task)}. score: {self.metric} on {self.examples:,} {self.split} "
            "examples"
            + (f" (always the commonest class: {self.baseline:.3f})" if self.baseline else "")
            + ". body: parameters without the embedding tables; as HF: of its checkpoint, padding included. GFLOP and "
            f"milliseconds of one forward pass of the sliced model at {self.length} tokens, on {self.device}; in "
            "brackets: share of the maxnet's time in the same round. Medians over rounds."
            + (" tok/s: decoded in a second, all texts together." if self.rows[0].tokens_per_s else "")
        )
        table = Table(caption=caption, caption_justify="left", box=None, padding=(0, 1, 0, 0), header_style="bold")
        table.add_column("subnet", no_wrap=True)
        table.add_column("layers×heads\n·mlp·embed", no_wrap=True)
        times = (f"batch {size}\n[ms]" for size in self.rows[0].latency_ms)
        decoding = tuple(f"batch {size}\n[tok/s]" for size in self.rows[0].tokens_per_s)
        quality: tuple[str, ...] = ("score", "loss") if self.rows[0].perplexity is None else (self.metric, "loss")
        if self.metric != "perplexity" and self.rows[0].perplexity is not None:
            quality += ("perpl.",)
        for column in ("params\n[M]", "body\n[M]", "as HF\n[M]", "GFLOP", *times, *decoding, *quality):
            table.add_column(column.replace("[", "\\["), justify="right", no_wrap=True)
        for row in self.rows:
            times = (f"{row.latency_ms[b]:.3g} ({row.latency_ratio[b]:.2f})" for b in row.latency_ms)
            counts = (row.params, row.params_body, row.params_exported)
            millions = ("none" if n is None else f"{n / 1e6:.2f}" for n in counts)
            sizes = (*millions, f"{row.flops / 1e9:.3f}")
            scores = [
                f"{row.score:.3f}",
                f"{row.loss:.3f}",
                *([f"{row.perplexity:.2f}"] if "perpl." in quality else []),
            ]
            speeds = (f"{speed:.3g}" for speed in row.tokens_per_s.values())
            table.add_row(row.name, shape(row.subnet), *sizes, *times, *speeds, *scores)
        return table

    def plot(self, file: str | Path) -> Path:
        """A PNG: the metric against parameters and against latency at the smallest batch size."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.transforms import Bbox

        batch = min(self.rows[0].latency_ms)
        panels = (
            ("parameters without embeddings [M]", [row.params_body / 1e6 for row in self.rows]),
            (f"latency at batch {batch} [ms]", [row.latency_ms[batch] for row in self.rows]),
        )
        scores = [row.score for row in self.rows]
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, 2, sharey=True)
        for ax, (label, costs) in zip(axes, panels, strict=True):
            ax.plot(costs, scores, "o", color="tab:blue", clip_on=False)
            ax.set_xlim(0, 1.12 * max(costs))  # from zero: half the cost is half the way
            ax.set_xlabel(label)
            ax.grid(alpha=0.3)
            if self.baseline > 0:
                ax.axhline(self.baseline, ls="--", color="tab:gray")
        if self.baseline > 0:
            place = {"xytext": (4, 3), "textcoords": "offset points"}
            axes[0].annotate("commonest class", (0, self.baseline), fontsize=8, **place)
        if self.metric == "perplexity":  # lower is better, without a bound
            axes[0].set_yscale("log")
            axes[0].margins(y=0.2)
        else:
            axes[0].set_ylim(min(0.0, *scores), 1.1)  # the metric's whole range: small differences look small
            axes[0].set_yticks([tick for tick in np.arange(-1, 1.01, 0.2).round(1) if tick >= min(0.0, *scores)])
        axes[0].set_ylabel(f"{self.metric} ({self.split}, {self.examples:,} examples)")
        figure.suptitle(f"{short(self.model)} on {short(self.task)}, {self.length} tokens, {self.device}", fontsize=10)
        figure.draw_without_rendering()  # the layout is made: what a label covers can be asked
        for ax, (_, costs) in zip(axes, panels, strict=True):
            points = ax.transData.transform(list(zip(costs, scores, strict=True)))
            taken = [Bbox.from_bounds(x - 8, y - 8, 16, 16) for x, y in points]
            for i in np.argsort(costs):
                options: list[tuple[int, int, Bbox, Any]] = []
                for (dx, dy), across, up in SIDES:
                    label = ax.annotate(
                        f"{self.rows[i].name}\n{scores[i]:.3f}",
                        (costs[i], scores[i]),
                        xytext=(dx, dy),
                        textcoords="offset points",
                        ha=across,
                        va=up,
                        fontsize=8,
                    )
                    box = label.get_window_extent()
                    options.append((sum(box.overlaps(other) for other in taken), len(options), box, label))
                *_, box, best = min(options, key=lambda option: option[:2])
                for *_, label in options:
                    if label is not best:
                        label.remove()
                taken.append(box)
        figure.savefig(file, dpi=150)
        return Path(file)


SIDES = (
    ((0, 7), "center", "bottom"),
    ((0, -7), "center", "top"),
    ((9, 0), "left", "center"),
    ((-9, 0), "right", "center"),
)
"""Where a label of :meth:`Palette.plot` may stand beside its point: offset in points, and how it is aligned."""


def short(name: str) -> str:
    """A model's or task's name for readers elsewhere: of a local path, its last part."""
    path = Path(name).expanduser()
    return path.name if path.is_absolute() or path.exists() else name


def shape(subnet: Subnet) -> str:
    """``"6×12·1536·384"``: layers, heads, mlp, embed; a range where layers differ."""
    span = lambda sizes: str(sizes[0]) if len(set(sizes)) == 1 else f"{min(sizes)}-{max(sizes)}"  # noqa: E731
    return f"{subnet.depth}×{span(subnet.heads)}·{span(subnet.mlp)}·{subnet.embed}"


def all_subnets(fitted: Fitted) -> dict[str, Subnet]:
    """Every uniform subnet of a run's space, by its name where it has one, else by its shape."""
    names = {subnet: name for name, subnet in reversed(fitted.space.names().items())}
    return {names.get(subnet, shape(subnet)): subnet for subnet in fitted.space.subnets()}


def measure(
    fitted: Fitted,
    subnets: Mapping[str, Subnet] | Sequence[str] | None = None,
    *,
    split: str | None = None,
    data: Mapping[str, Encoded] | None = None,
    batch_sizes: Sequence[int] = (1, 32),
    length: int | None = None,
    seconds: float = 5.0,
    completions: int = 64,
    advance: Callable[[str], None] = lambda doing: None,
) -> Palette:
    """Measure subnets of a fitted run. The maxnet is always among them, first: ratios are to it.

    Args:
        subnets: by name, or names that ``fitted.space.named`` understands; None: ``fitted.space.names()``.
        split: of the task; None: test if there is one, else validation.
        data: the encoded task, if it is at hand already.
        length: tokens of a sequence, for FLOPs and latency; None: the length that the run cuts texts to.
        seconds: time to spend on the latency at each batch size, within 5 to 50 rounds.
        completions: of a task with prompts, how many of them each subnet completes (greedily) for its score.
        advance: called as each part of the work begins, with what it is.

    Raises:
        UnknownNameError: no such split or subnet. SubnetError: a subnet that the space does not contain.
        ConfigError: no batch size, or one below 1; a length that the model cannot read.
        RunError: the data have changed since the run.
    """
    if not batch_sizes or min(batch_sizes) < 1:
        raise ConfigError(f"batch_sizes = {tuple(batch_sizes)}: expected at least one, each of at least 1.")
    context = fitted.model.config.context
    if length is not None and not 2 <= length <= context:
        raise ConfigError(f"length = {length}: expected 2 to {context}, which the model can read.")
    space = fitted.space
    if subnets is None:
        subnets = space.names()
    elif not isinstance(subnets, Mapping):
        subnets = {name: space.named(name) for name in subnets}
    chosen = {"maxnet": space.maxnet}
    chosen |= {name: space.check(subnet) for name, subnet in subnets.items() if subnet != space.maxnet}

    data = data or fitted.load_data()
    split = split or ("test" if "test" in data else "validation")
    if split not in data:
        raise unknown("split", split, data)
    examples, metric = data[split], fitted.task.metric
    length = examples.max_length if length is None else length

    merged = fitted.merged
    models = {name: slice_subnet(merged, subnet) for name, subnet in chosen.items()}
    del merged  # as large as the base
    calls: dict[str, dict[int, Callable[[], object]]] = {}
    for name, model in models.items():
        advance(f"compiling {name}")
        calls[name] = {size: compile_forward(model, size, length) for size in batch_sizes}
    times, decoding = {}, {}
    for size in batch_sizes:
        advance(f"timing at batch {size}")
        times[size] = time_in_turn({name: calls[name][size] for name in calls}, seconds=seconds)
        if fitted.task.is_language:
            steps = {name: compile_decode(model, size, length) for name, model in models.items()}
            decoding[size] = time_in_turn(steps, seconds=seconds)

    rows, scored = [], examples
    for name, model in models.items():
        advance(f"evaluating {name}")
        scores = evaluate(model, examples, metric)
        if metric not in scores:
            scored = examples.subset(completions)
            scores |= evaluate_completions(model, scored)
        config, subnet = fitted.model.config, chosen[name]
        ratios = {b: [t / m for t, m in zip(times[b][name], times[b]["maxnet"], strict=True)] for b in batch_sizes}
        rows.append(
            PaletteRow(
                name=name,
                subnet=subnet,
                params=num_params(config, subnet, embeddings=True),
                params_body=num_params(config, subnet),
                params_exported=_exported(model.config),
                flops=count_flops(model.config, length),
                latency_ms={b: 1e3 * statistics.median(times[b][name]) for b in batch_sizes},
                latency_ratio={b: statistics.median(ratios[b]) for b in batch_sizes},
                score=scores[metric],
                loss=scores["loss"],
                tokens_per_s={b: b / statistics.median(decoding[b][name]) for b in decoding},
                perplexity=scores.get("perplexity"),
            )
        )
    return Palette(
        model=fitted.config.model,
        task=fitted.task.name,
        metric=metric,
        split=split,
        examples=len(scored),
        baseline=_commonest(examples) if metric == "accuracy" else 0.0,
        length=length,
        device=device_name(),
        rows=tuple(rows),
    )


def _exported(config: Config) -> int | None:
    try:
        return num_params(nearest_fit(config).config, embeddings=True)
    except ConfigError:
        return None


def _commonest(examples: Encoded) -> float:
    return float(np.unique(examples.labels, return_counts=True)[1].max() / len(examples))
