"""``fit``: from a pretrained model and a task to a run folder that holds a palette.

A run folder holds run.json (the config), task.json (what the task is), base.json (by which its base is known again),
metrics.jsonl (the loss curve), checkpoints/ (of the stage under way), head.safetensors (what a new head started from),
order.json (the importance order of the axes), and adapters/stageN.safetensors for every finished stage. The base is not
copied: a run is a few megabytes beside its pretrained model.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mlfs_jax.backbone.tree import flatten, map_named, misfit
from mlfs_jax.checkpoint import Checkpoints
from mlfs_jax.data.batches import Batches
from mlfs_jax.data.encode import Encoded, fingerprint
from mlfs_jax.data.tasks import Examples, Task
from mlfs_jax.distill import DistillConfig, init_projection, task_loss
from mlfs_jax.errors import MLFSError, RunError
from mlfs_jax.evaluate import evaluate
from mlfs_jax.fingerprint import hold_base
from mlfs_jax.fit_config import FitConfig, from_anywhere
from mlfs_jax.hosts import decided, is_writer, same_everywhere
from mlfs_jax.importance import Order, block_influence, importance_order, measure_importance, reorder, reorder_lora
from mlfs_jax.lora import Lora, init_lora, load_lora, merge_lora, save_lora, stack_stages
from mlfs_jax.model import Model, cast_base, forward
from mlfs_jax.preemption import Preemption, preemption
from mlfs_jax.run import Run, check_finite
from mlfs_jax.sharding import check_rows, feed, mesh_of_job, put, shard_base, shard_lora
from mlfs_jax.slicing import slice_subnet
from mlfs_jax.stages import Stage
from mlfs_jax.subnet import SubnetSpace
from mlfs_jax.supernet import Params, Supernet, TrainState, state_places
from mlfs_jax.timing import UNROLLED
from mlfs_jax.vocab import Hidden, lm_loss

KIND = "mlfs fit"
LOG_EVERY = 10
HEAD = "head.safetensors"


@dataclass(frozen=True)
class Fitted:
    """What a run folder holds, put together: the frozen model in importance order, and its adapters.

    Attributes:
        model: the pretrained model, reordered when the run did so.
        stages: one adapter for each finished stage.
        order: the permutation that was applied, or None.
        data: fingerprint of the examples that it was trained on; None: not known.
    """

    config: FitConfig
    task: Task
    model: Model
    stages: tuple[Lora, ...]
    order: Order | None
    data: str | None = None

    @property
    def lora(self) -> Lora:
        """The sum of all finished stages."""
        return stack_stages(self.stages)

    @property
    def space(self) -> SubnetSpace:
        return self.config.space(self.model.config, self.order)

    @property
    def merged(self) -> Model:
        return self.model.replace(base=merge_lora(self.model.base, self.lora))

    def load_data(self) -> dict[str, Encoded]:
        """The task's examples, encoded.

        Raises:
            RunError: they are not those that the run was trained on.
        """
        data = self.config.load_data(self.task, self.model)
        if self.data is not None and fingerprint(data) != self.data:
            raise _changed(self.config, "other examples")
        return data


def load_run(path: str | Path, *, finished: bool = False, mesh: Mesh | None = None) -> Fitted:
    """Open a run folder.

    Args:
        finished: refuse a run that has not come to its end.
        mesh: devices to spread the weights over, see :func:`mlfs_jax.make_mesh`.

    Raises:
        RunError: there is none, it is of another kind or damaged, the weights of its base have changed, or (with
            ``finished``) it has not come to its end.
    """
    run = Run.open(path, finished=finished, kinds=(KIND,))
    config = run.config_as(FitConfig, distill=DistillConfig)
    task = _load_task(run, config)
    model = config.load_model(task, mesh)
    hold_base(run, model)
    return _assemble(run, config, task, model)


def _save_task(run: Run, task: Task) -> None:
    """Keep what the task is: the run is used without its data, which may change or go."""
    if not decided((run.path / "task.json").exists()):
        run.write_json("task", {name: value for name, value in vars(task).items() if name != "read"})


def _load_task(run: Run, config: FitConfig) -> Task:
    """The task of a run as it was trained; its data are read when they are asked for."""
    if not (run.path / "task.json").exists():  # a run of old
        return config.get_task()

    def read() -> dict[str, Examples]:
        now = config.get_task()
        if now.labels != task.labels:
            raise _changed(config, f"labels {', '.join(now.labels)} instead of {', '.join(task.labels)}")
        return now.read()

    saved = run.read_json("task")
    try:
        task = Task(**(saved | {"labels": tuple(saved["labels"]), "read": read}))
    except (TypeError, KeyError, MLFSError) as e:
        raise RunError(f"{run.path / 'task.json'} is damaged ({e!r}): delete it, if the data are still there.") from e
    return task


def _changed(config: FitConfig, how: str) -> RunError:
    return RunError(
        f"the data of {config.task} are not those that the run was trained on ({how}): restore them, or fit again into "
        "another folder."
    )


def _read_lora(file: Path, base: nnx.State) -> Lora:
    lora = load_lora(file)
    if (wrong := misfit(base, lora)) is not None:
        raise RunError(f"{file} does not fit the model of the run, which has changed: {wrong}. Restore the model.")
    return shard_lora(base, lora)


def _assemble(run: Run, config: FitConfig, task: Task, model: Model) -> Fitted:
    head = _read_lora(run.path / HEAD, model.base) if not task.is_language else {}
    start = {f"{site}.{leaf}": value for site, entry in head.items() for leaf, value in entry.items()}
    model = model.replace(base=map_named(lambda name, leaf: start.get(name, leaf[...]), model.base))
    files = [_adapter_file(run, stage) for stage in config.stages]
    there = [file.exists() for file in files]
    count = len(files) if run.finished else sum(there)
    if not all(there[:count]):
        raise RunError(f"{files[there.index(False)]} is gone: restore it, or fit again into another folder.")
    stages = tuple(_read_lora(file, model.base) for file in files[:count])
    order = None
    if stages and config.reorder:
        try:
            order = Order.from_json(run.read_json("order"))
        except (KeyError, TypeError, ValueError) as e:
            raise RunError(f"{run.path / 'order.json'} is damaged ({e!r}): restore it, or fit again.") from e
        model = reorder(model, order)
    known = (run.path / "task.json").exists()  # a run of old is not held to its data
    return Fitted(config, task, model, stages, order, run.config.get("data") if known else None)


def _save_head(run: Run, model: Model) -> None:
    """Keep the weights that a new head started from: the adapters of the run are changes to them."""
    head: Lora = {}
    for name, leaf in flatten(model.base).items():
        if name.startswith("head."):
            site, kind = name.rsplit(".", 1)
            head.setdefault(site, {})[kind] = leaf[...]
    save_lora(run.path / HEAD, head)


def _adapter_file(run: Run, stage: Stage) -> Path:
    return run.path / "adapters" / f"{stage.name}.safetensors"


def fit(
    config: FitConfig, out: str | Path, *, mesh: Mesh | None = None, console: Console | None = None
) -> Fitted | None:
    """Train the three stages into the folder ``out``; continue there if it holds the same run, unfinished.

    Args:
        mesh: devices to spread over, see :func:`mlfs_jax.make_mesh`; a run may go on with another one. Several
            processes (:mod:`mlfs_jax.hosts`) all call this; without a mesh each device has all weights.

    Returns None when SIGTERM ended it early; Ctrl-C raises KeyboardInterrupt. All is saved, and the same call goes on.

    Raises:
        RunError: ``out`` holds another run, or one that began on other weights.
        MLFSError: a name, file or setting is wrong; the message says which.
    """
    console = console or Console(quiet=not is_writer(), soft_wrap=True)
    mesh = mesh_of_job(mesh)
    config = dataclasses.replace(config, model=from_anywhere(config.model), task=from_anywhere(config.task))
    task = config.get_task()
    model = config.load_model(task, mesh)
    data = config.load_data(task, model)
    config.space(model.config)  # what is wrong is said before the folder is made
    Batches(data["train"], config.batch_size, seed=config.seed, buckets=config.buckets)
    if mesh is not None:
        check_rows(mesh, config.batch_size)
    saved = {**dataclasses.asdict(config), "data": fingerprint(data)}
    with preemption() as stop, Run.create_or_resume(out, saved, kind=KIND) as run:
        _save_task(run, task)
        hold_base(run, model, begin=True)
        if not task.is_language and not decided((run.path / HEAD).exists()):
            _save_head(run, model)
        finished = decided(run.finished)
        if finished:
            console.print(f"{run.path} is finished; `mlfs palette` measures it.")
        fitted = _assemble(run, config, task, model)
        del model  # as it was before it was reordered: it need not be in memory any longer
        same_everywhere(f"the number of finished stages in {run.path}", len(fitted.stages))
        for number in range(len(fitted.stages), len(config.stages)):
            stage = config.stages[number]
            lora = _train_stage(fitted, number, data["train"], run, stop, mesh, console)
            if lora is None:
                stop.announce(console)
                return None
            if number == 0 and config.reorder:
                order = _measure_order(fitted, lora, data["train"])
                run.write_json("order", order.to_json())
                lora = reorder_lora(fitted.model, lora, order)
                fitted = dataclasses.replace(fitted, model=reorder(fitted.model, order), order=order)
            file = _adapter_file(run, stage)
            file.parent.mkdir(exist_ok=True)
            save_lora(file, lora)  # from here on the stage is finished
            fitted = dataclasses.replace(fitted, stages=(*fitted.stages, shard_lora(fitted.model.base, lora)))
            _report(fitted, stage, data["validation"], console)
        if not finished:
            run.finish(stages=[stage.name for stage in config.stages])
    return fitted


def init_params(key: jax.Array, model: Model, stage: Stage, distill: DistillConfig) -> Params:
    """What a stage trains, at its start: low-rank pairs, a classification head whole, a projection of features."""
    full = () if model.config.head == "lm" else ("head",)  # a language model's head is pretrained, and frozen
    params: Params = {"lora": init_lora(jax.random.fold_in(key, 0), model, rank=stage.rank, full=full)}
    if stage.sample != "maxnet" and distill.beta:
        params["features"] = init_projection(jax.random.fold_in(key, 1), model.config.embed, distill)
    return params


def _train_stage(
    fitted: Fitted, number: int, train: Encoded, run: Run, stop: Preemption, mesh: Mesh | None, console: Console
) -> Lora | None:
    """Train one stage; None when it was asked to stop."""
    config, stage, space = fitted.config, fitted.config.stages[number], fitted.space
    first = sum(s.steps for s in config.stages[:number])  # steps count on through the stages
    model = fitted.merged if fitted.stages else fitted.model  # earlier pairs are frozen: part of the base
    root = jax.random.fold_in(jax.random.key(config.seed), number)
    unroll = config.unroll
    if unroll is None:
        unroll = jax.default_backend() == "cpu" and model.config.layers <= UNROLLED

    params = init_params(root, model, stage, config.distill)
    batches = Batches(train, config.batch_size, seed=config.seed + 1000 * number, buckets=config.buckets)
    # placed before the first step, as a restored state is: else the step compiles twice
    optimizer, base = stage.optimizer(), cast_base(model.base, config.dtype)
    places: Any = None
    batch_at: Any = batches.__getitem__
    if mesh is not None:
        places = state_places(mesh, base, params, optimizer)
        base, batch_at = shard_base(mesh, base), partial(feed, mesh, batches)
    supernet = Supernet(model.config, config.distill, optimizer, config.execution, unroll, config.remat, places)
    del model  # its weights, where the step has them in another type or place
    state: TrainState = put(supernet.init(params), places or jax.devices()[0])

    with Checkpoints(run.checkpoints) as checkpoints, _progress(console) as progress:
        latest = checkpoints.latest()
        same_everywhere(f"the newest checkpoint in {run.checkpoints}", latest)
        if latest is not None and latest > first:
            state, _ = checkpoints.restore(state)
        run.rewind(first + int(state.step))
        bar = progress.add_task(stage.name, total=stage.steps, completed=int(state.step), losses="")
        pending: list[tuple[int, jax.Array]] = []
        seeds = stage.seeds(jax.vmap(partial(jax.random.fold_in, root))(2 + jnp.arange(stage.steps)))

        def flush() -> None:
            for step, losses in pending:
                check_finite(step, losses)
                run.log(step=step, stage=stage.name, losses=np.asarray(losses).tolist())
            pending.clear()

        for step in range(int(state.step), stage.steps):
            subnets = stage.subnets(space, seeds[step])
            state, losses = supernet.step(state, base, batch_at(step), subnets, config.gamma)
            pending.append((first + step + 1, losses))
            if (step + 1) % LOG_EVERY == 0:
                shown = f"loss maxnet {losses[0]:.3f}" + (f", minnet {losses[1]:.3f}" if subnets else "")
                progress.update(bar, losses=shown)
            progress.update(bar, completed=step + 1)
            stopping = stop.at(first + step + 1)  # once: a signal may come between two looks
            save = stopping or (step + 1) % config.save_every == 0
            if save or step + 1 == stage.steps or (step + 1) % LOG_EVERY == 0:
                flush()  # not at every step: reading a loss waits for the device
            if save:
                checkpoints.save(first + step + 1, state, {"stage": stage.name})
            if stopping:
                return None
    return jax.tree.map(jnp.asarray, state.params["lora"])


def _measure_order(fitted: Fitted, lora: Lora, train: Encoded) -> Order:
    """The importance order of the maxnet after stage 0, on a few hundred training examples."""
    config = fitted.config
    model = fitted.model.replace(base=merge_lora(fitted.model.base, lora))

    def loss(base: nnx.State, batch) -> jax.Array:
        out = forward(model.graphdef, base, batch, remat=config.remat, logits=not fitted.task.is_language)
        if fitted.task.is_language:
            return lm_loss(Hidden(model.graphdef, base, out.hidden), batch, frozen=False)
        return task_loss(out.logits, batch["labels"], model.config.problem)

    size = min(config.batch_size, len(train))
    batches = Batches(train, size, seed=config.seed, buckets=config.buckets)
    count = max(1, min(config.importance_examples // size, batches.epoch_steps))
    importance = measure_importance(model, (batches[i] for i in range(count)), loss)
    if config.keep_layers == "influence":
        importance = dataclasses.replace(
            importance, layers=block_influence(model, map(batches.__getitem__, range(count)))
        )
    return importance_order(importance, model.config)


def _report(fitted: Fitted, stage: Stage, validation: Encoded, console: Console) -> None:
    """One line after each stage: how its largest and its smallest subnet do on the validation split."""
    metric, space = "perplexity" if fitted.task.is_language else fitted.task.metric, fitted.space
    space = space.at_full_depth() if stage.sample == "width" else space
    subnets = {"maxnet": space.maxnet} if stage.sample == "maxnet" else {"maxnet": space.maxnet, "minnet": space.minnet}
    merged, scores = fitted.merged, []
    for name, subnet in subnets.items():
        score = evaluate(slice_subnet(merged, subnet), validation, metric)
        scores.append(f"{name} {metric} {score[metric]:.4f}, loss {score['loss']:.4f}")
    console.print(f"{stage.name} done. validation: " + "; ".join(scores))


def _progress(console: Console) -> Progress:
    name, losses = TextColumn("{task.description}"), TextColumn("{task.fields[losses]}")
    return Progress(name, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), losses, console=console)
