"""What a palette of 12 costs beside 12 separate distillations that reach the same validation loss.

    python experiments/bench_palette_cost.py          # bert-tiny on wiki-topic; about 20 minutes on one core

One supernet is trained (sandwich rule: maxnet, minnet, two random subnets). Then each of its 12 subnets is cut out of
the same start and distilled on its own by the same loss, for 1/8, 1/4, 1/2 and all of the palette's steps, each with a
whole learning-rate schedule; the shortest run that reaches the palette's validation loss counts, the others do not. One
that never does counts at its longest, and is named. The teachers differ: the palette's is its own maxnet as it trains,
that of the separate runs the frozen maxnet of stage 0.

Cost is in CPU-seconds of the steps, compilation left out, and in FLOPs: of the matrix products of the layers, twice the
forward pass for a gradient of the adapters, once for a teacher. Stage 0, which both sides need, counts for neither.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import optax
import tyro
from peers import pin
from pictures import bars
from rich.console import Console
from rich.progress import track
from rich.table import Table

import mlfs_jax as mlfs
from mlfs_jax.data.batches import Batches
from mlfs_jax.distill import logit_loss, task_loss
from mlfs_jax.evaluate import evaluate
from mlfs_jax.subnet import maxnet, num_flops
from mlfs_jax.supernet import Supernet
from mlfs_jax.timing import device_name

RESULT = Path(__file__).parent / "results" / "bench_palette_cost.json"
SHARES = (0.125, 0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Options:
    """What is trained, and for how long.

    Attributes:
        start: steps of stage 0, which makes the teacher.
        steps: of the palette, and of a separate run at its longest.
    """

    start: int = 600
    steps: int = 600
    batch_size: int = 32
    length: int = 48
    rank: int = 16
    learning_rate: float = 2e-3
    seed: int = 0
    runs: Path = Path("runs/palette_cost")


@dataclass
class Cost:
    """What the steps of one side have cost so far."""

    flops: float = 0.0
    cpu: float = 0.0


def forward_flops(model: mlfs.Model, subnet: mlfs.Subnet, options: Options) -> int:
    return options.batch_size * num_flops(model.config, subnet, length=options.length)


def palette(start: mlfs.Model, space: mlfs.SubnetSpace, train: Batches, distill, options: Options):
    """The trained supernet, merged, and what its steps cost."""
    stage = mlfs.Stage("palette", "width-depth", options.steps, options.learning_rate, options.rank)
    supernet = Supernet(start.config, distill, stage.optimizer(), unroll=True)
    key, cost = jax.random.key(options.seed), Cost()
    state = supernet.init({"lora": mlfs.init_lora(key, start, rank=options.rank, full=("head",))})
    for subnet in space.subnets():  # compile all widths
        if subnet != space.maxnet:
            supernet.step(jax.tree.map(lambda x: x + 0, state), start.base, train[0], (subnet,), 0.0)
    for step in track(range(options.steps), "the palette"):
        subnets, batch = stage.subnets(space, jax.random.fold_in(key, step)), train[step]
        before = time.process_time()
        state, _ = jax.block_until_ready(supernet.step(state, start.base, batch, subnets, 0.0))
        cost.cpu += time.process_time() - before
        cost.flops += 2 * sum(forward_flops(start, subnet, options) for subnet in (space.maxnet, *subnets))
    return start.replace(base=mlfs.merge_lora(start.base, state.params["lora"])), cost


def separately(
    teacher: mlfs.Model, subnet: mlfs.Subnet, train: Batches, validation, distill, goal: float, options: Options
) -> dict:
    """One subnet distilled on its own until its validation loss is the palette's."""
    student, problem = mlfs.slice_subnet(teacher, subnet), teacher.config.problem

    def loss(lora, base, batch, taught):
        logits = mlfs.forward(student.graphdef, base, batch, lora=lora, unroll=True).logits
        ours = (1 - distill.alpha) * task_loss(logits, batch["labels"], problem)
        return ours + distill.alpha * logit_loss(taught, logits, distill, problem)

    for share in SHARES:
        steps = round(share * options.steps)
        stage = mlfs.Stage("separate", "maxnet", steps, options.learning_rate, options.rank)
        optimizer, cost = stage.optimizer(), Cost()

        @jax.jit
        def update(lora, state, base, teacher_base, batch, optimizer=optimizer):
            taught = mlfs.forward(teacher.graphdef, teacher_base, batch, unroll=True).logits
            changes, state = optimizer.update(jax.grad(loss)(lora, base, batch, taught), state, lora)
            return optax.apply_updates(lora, changes), state

        lora = mlfs.init_lora(jax.random.key(options.seed), student, rank=options.rank, full=("head",))
        state = optimizer.init(lora)
        jax.block_until_ready(update(lora, state, student.base, teacher.base, train[0]))  # compile
        for step in range(steps):
            batch, before = train[step], time.process_time()
            lora, state = jax.block_until_ready(update(lora, state, student.base, teacher.base, batch))
            cost.cpu += time.process_time() - before
        whole, own = (forward_flops(teacher, net, options) for net in (maxnet(teacher.config), subnet))
        cost.flops = steps * (whole + 2 * own)
        tuned = student.replace(base=mlfs.merge_lora(student.base, lora))
        reached = evaluate(tuned, validation, "accuracy")["loss"]
        if reached <= goal:
            break
    return {"steps": steps, "loss": reached, "reached": reached <= goal, **dataclasses.asdict(cost)}


def main(options: Options) -> None:
    pin()
    distill = mlfs.DistillConfig(beta=0.0)
    config = mlfs.FitConfig(
        model="bert-tiny",
        task="wiki-topic",
        seed=options.seed,
        steps=(options.start,),
        rank=options.rank,
        learning_rate=options.learning_rate,
        max_length=options.length,
        buckets=(options.length,),
        distill=distill,
        embed=(1.0, 0.75, 0.5),
        width=(1.0, 0.5),
        depth=(1.0, 0.5),
    )
    fitted = mlfs.fit(config, options.runs / f"stage0-{options.seed}")
    start, space = fitted.merged, fitted.space
    data = config.load_data(fitted.task, start)
    train = Batches(data["train"], options.batch_size, seed=options.seed, buckets=config.buckets)
    merged, whole = palette(start, space, train, distill, options)
    rows = []
    for subnet in track(list(space.subnets()), "12 separate runs"):
        goal = evaluate(mlfs.slice_subnet(merged, subnet), data["validation"], "accuracy")["loss"]
        alone = separately(start, subnet, train, data["validation"], distill, goal, options)
        rows.append({"subnet": str(subnet), "palette_loss": goal} | alone)
    alone = {unit: sum(row[unit] for row in rows) for unit in ("flops", "cpu")}
    shares = {"flops": whole.flops / alone["flops"], "cpu": whole.cpu / alone["cpu"]}

    table = Table(title=f"validation loss of {len(rows)} subnets, and the steps that each needs on its own")
    for column in ("subnet", "palette", "alone", "steps"):
        table.add_column(column, justify="left" if column == "subnet" else "right")
    for row in rows:
        steps = f"{row['steps']}" if row["reached"] else f"not in {row['steps']}"
        table.add_row(row["subnet"], f"{row['palette_loss']:.4f}", f"{row['loss']:.4f}", steps)
    console = Console()
    console.print(table)
    console.print(f"the palette costs {shares['flops']:.2f} of their FLOPs, {shares['cpu']:.2f} of their CPU-seconds")
    record = {"options": dataclasses.asdict(options) | {"runs": str(options.runs)}, "cpu": device_name()}
    record |= {"palette": dataclasses.asdict(whole), "separate": alone, "shares": shares, "rows": rows}
    spent = {"/".join(re.findall(r"\d+", row["subnet"])): row["flops"] / whole.flops for row in rows}
    bars(RESULT, {"alone": spent}, "FLOPs, share of the palette's", "embed/heads/mlp/layers, each distilled alone")
    RESULT.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    mlfs.keep_freed_memory()  # as `mlfs fit` does
    main(tyro.cli(Options, description=__doc__))
