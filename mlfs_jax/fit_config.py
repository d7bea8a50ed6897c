"""What a run is made of: model, task, stages, subnets, how they learn; and how to load what it names."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from mlfs_jax.config import Config
from mlfs_jax.data.batches import BUCKETS
from mlfs_jax.data.encode import Encoded, load_task
from mlfs_jax.data.tasks import Task, get_task, task_names
from mlfs_jax.distill import DistillConfig
from mlfs_jax.errors import ConfigError
from mlfs_jax.hf.load import from_pretrained
from mlfs_jax.importance import Order
from mlfs_jax.model import Model
from mlfs_jax.registry import ENTRIES
from mlfs_jax.sharding import sharding_of
from mlfs_jax.stages import Stage, paper_stages
from mlfs_jax.subnet import SubnetSpace
from mlfs_jax.supernet import EXECUTIONS

DTYPES = ("float32", "bfloat16")
KEEP_LAYERS = ("even", "importance", "influence")


@dataclass(frozen=True)
class FitConfig:
    """Everything that decides what a run computes; a run folder only ever continues with the same one.

    Attributes:
        model: a name of the catalogue, a hub id, or a local Hugging Face directory.
        task: a task's name, or a .jsonl / .csv file, or a folder of them.
        problem: of a file's labels, "classification" or "regression"; the default is what they look like.
        metric: what to report, e.g. "accuracy", "f1", "pearson"; the default is the task's.
        seed: of new weights, of the order of the data, and of the sampled subnets.
        steps: optimizer steps of stages 0 (maxnet), 1 (widths), 2 (widths and depths); one number is plain LoRA.
        learning_rate: the peak, of all stages or of each: linear warm-up, then cosine to 0.
        batch_size: examples in a step.
        rank: R of the low-rank pairs, of all stages or of each.
        random_subnets: n of the sandwich rule, of all stages or of each: every step trains the maxnet, the minnet, and
            n random subnets.
        gamma: exponent of the gradient scaling (n_max / n_j)^gamma.
        distill: how subnets learn from the maxnet.
        embed: choices of the subnet space for channels, as shares of the supernet.
        width: the same, for heads and mlp; the default is (1, 0.48, 0.22), of a language model (1, 0.66): MLFS
            reports about two thirds as the least.
        depth: the same, for layers; the default is (1, 0.5), of a language model (1, 0.8).
        keep_layers: "even" spacing, or by "importance", or by "influence" (how far a layer turns the residual stream,
            for language models), in a subnet of less depth.
        vary: "together", "independent" or "per-layer": how heads and mlp shrink.
        reorder: order heads, neurons and channels by importance after stage 0; else a subnet is the first k.
        importance_examples: training examples that the importance scores are measured on.
        execution: "sliced" runs each subnet at its true widths, "masked" at the supernet's with one compile for all.
        unroll: unroll the scan over layers: slower to compile, faster on a CPU where layers are small. The default does
            on a CPU up to 12 layers.
        dtype: of the frozen base in training, in which the step then computes: "float32" or "bfloat16". Adapters,
            optimizer and evaluation stay float32.
        remat: recompute each layer in the backward pass instead of keeping its activations: less memory, more time.
        max_length: tokens; longer texts are cut. The default is the task's.
        buckets: lengths that batches are padded to (each is one more compile of a step).
        limit: at most this many examples of each split.
        save_every: steps between checkpoints.
    """

    model: str
    task: str
    problem: str | None = None
    metric: str | None = None
    seed: int = 0
    steps: tuple[int, ...] = (300, 300, 300)
    learning_rate: float | tuple[float, ...] = 1e-3
    batch_size: int = 32
    rank: int | tuple[int, ...] = 8
    random_subnets: int | tuple[int, ...] = 2
    gamma: float = 0.0
    distill: DistillConfig = field(default_factory=DistillConfig)
    embed: tuple[float, ...] = (1.0,)
    width: tuple[float, ...] | None = None
    depth: tuple[float, ...] | None = None
    keep_layers: str = "even"
    vary: str = "together"
    reorder: bool = True
    importance_examples: int = 512
    execution: str = "sliced"
    unroll: bool | None = None
    dtype: str = "float32"
    remat: bool = False
    max_length: int | None = None
    buckets: tuple[int, ...] = BUCKETS
    limit: int | None = None
    save_every: int = 100

    def __post_init__(self):
        if self.save_every < 1 or self.importance_examples < 1:
            raise ConfigError(
                f"save_every = {self.save_every}, importance_examples = {self.importance_examples}: expected >= 1."
            )
        for name, choices in (("execution", EXECUTIONS), ("dtype", DTYPES)):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} = {getattr(self, name)!r}: expected one of {', '.join(choices)}.")
        if self.keep_layers not in KEEP_LAYERS or (self.keep_layers != "even" and not self.reorder):
            raise ConfigError(
                f"keep_layers = {self.keep_layers!r} with reorder = {self.reorder}: expected 'even', or together with "
                "reorder, which measures them, 'importance' or 'influence'."
            )
        if self.batch_size < 1 or not 0 <= self.seed < 2**63:
            raise ConfigError(f"batch_size = {self.batch_size}, seed = {self.seed}: expected >= 1, and 0 to 2^63 - 1.")
        if not 0 <= self.gamma < math.inf:
            raise ConfigError(f"gamma = {self.gamma}: expected a finite number of at least 0.")
        _ = self.stages  # their errors, now

    @property
    def stages(self) -> tuple[Stage, ...]:
        return paper_stages(self.steps, self.learning_rate, self.rank, self.random_subnets)

    def space(self, config: Config, order: Order | None = None) -> SubnetSpace:
        """The subnets of the run; ``order`` ranks the layers, if they are kept by importance."""
        ranked = None if order is None or self.keep_layers == "even" else order.layers
        width, depth = ((1.0, 0.66), (1.0, 0.8)) if config.head == "lm" else ((1.0, 0.48, 0.22), (1.0, 0.5))
        ratios = {"embed": self.embed, "width": self.width or width, "depth": self.depth or depth}
        return SubnetSpace.from_ratios(config, **ratios, vary=self.vary, layer_order=ranked)

    def get_task(self) -> Task:
        return get_task(self.task, problem=self.problem, metric=self.metric)

    def load_model(self, task: Task, mesh: Mesh | None = None) -> Model:
        """The pretrained model with a head for the task; new weights come from the seed."""
        place = None if mesh is None else partial(sharding_of, mesh)
        if task.is_language:
            return from_pretrained(self.model, head="lm", sharding=place)
        head: dict[str, Any] = {"head": "sequence", "labels": task.num_labels, "problem": task.problem}
        return from_pretrained(self.model, **head, key=self.seed, sharding=place)

    def load_data(self, task: Task, model: Model) -> dict[str, Encoded]:
        """The task, encoded by the tokenizer in the model's folder."""
        return load_task(task, model.source, max_length=self.max_length, limit=self.limit)


def from_anywhere(name: str) -> str:
    """A local path in full, so that the run folder opens from anywhere; another name as it is."""
    known, path = {*task_names(), *(entry.name for entry in ENTRIES)}, Path(name).expanduser()
    return str(path.absolute()) if name not in known and path.exists() else name
