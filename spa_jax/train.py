"""``fit``: from a frozen decoder and a task to a plugin: the side network first, then the gate.

A run folder holds run.json (the config), metrics.jsonl (the loss curve), checkpoints/, and, when it is finished,
result.json and the plugin itself (plugin.safetensors, plugin.json). The base is not copied.

Order matters [ours]: with a price on its use from the first step the gate gives a side network up before it has
learnt. So the side network learns as if it were always used (S1), or alone (S3); then the gate, on examples that the
side network has not seen; then its threshold, on the validation split.
"""

from __future__ import annotations

import dataclasses
import io
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float
from rich.console import Console

from mlfs_jax.checkpoint import Checkpoints
from mlfs_jax.data.batches import Batches
from mlfs_jax.data.encode import Encoded, fingerprint
from mlfs_jax.errors import ConfigError, some
from mlfs_jax.fingerprint import base_fingerprint, hold_base
from mlfs_jax.hosts import by_writer, decided, is_writer, several
from mlfs_jax.importance import Importance, measure_importance
from mlfs_jax.model import Model
from mlfs_jax.model import forward as forward_base
from mlfs_jax.preemption import Preemption, Stopped, preemption
from mlfs_jax.registry import cache_dir
from mlfs_jax.run import Run, write_atomic
from mlfs_jax.sharding import check_rows, feed, mesh_of, mesh_of_job, replicated, shard_base, state_shardings
from mlfs_jax.supernet import TrainState
from mlfs_jax.vocab import CHUNK, Hidden, lm_loss
from spa_jax.config import FIT, STARTS, FitConfig
from spa_jax.decode import rates
from spa_jax.errors import PluginError
from spa_jax.gate import ALWAYS, calibration_curve, choose_threshold, init_gate
from spa_jax.gate_fit import GateConfig, fit_gate
from spa_jax.ladders import LadderCache, spread
from spa_jax.loop import progress, train_loop
from spa_jax.model import cloud_step
from spa_jax.plugin import Plugin, load_plugin, save_plugin, tokenizer_fingerprint
from spa_jax.score import TokenScores, score_tokens
from spa_jax.seam import Frame, Setting
from spa_jax.side import Side, SideConfig, device_step, side_axes
from spa_jax.start import init_side


@dataclass(frozen=True)
class SideTrainer:
    """One step of training a side network; the base is an argument that nothing differentiates.

    Attributes:
        side: its shapes; the weights are the state's.
        unroll: unroll the scans over layers (``cost_analysis()`` counts the body of a scan once).
        chunk: tokens whose logits are in memory at a time.
        places: where the state lies on a mesh, as shardings; it stays there.
    """

    graphdef: nnx.GraphDef
    side: Side
    setting: Setting
    optimizer: optax.GradientTransformation
    unroll: bool = False
    chunk: int = CHUNK
    places: TrainState | None = None

    def loss(
        self, net: dict[str, Array], base: nnx.State, batch: Mapping, ladders: tuple[Frame, Array] | None, key: Array
    ) -> Float[Array, ""]:
        """Cross-entropy of f + g, or of g alone, over the tokens that count."""
        if ladders is None:
            cloud = cloud_step(self.graphdef, base, {}, None, batch, tapped=self.side.tapped, unroll=self.unroll)
            ladders = cloud.frame, cloud.hidden
        frame, f = ladders
        g, _ = device_step(self.side.replace(net=net), None, frame, seen=self._seen(frame, key), unroll=self.unroll)
        states = f + g if self.setting.adds else g
        return lm_loss(Hidden(self.graphdef, base, states), batch, chunk=self.chunk)

    def _seen(self, frame: Frame, key: Array) -> Array | None:
        """For sparse memory: a random share of each text is never seen, as it will be when a gate decides."""
        if self.side.config.memory != "sparse" or not self.setting.gated:
            return None
        share, each = jax.random.split(key)
        kept = jax.random.uniform(share, (frame.real.shape[0], 1), minval=0.2)
        return jax.random.uniform(each, frame.real.shape) < kept

    @cached_property
    def step(self):
        """``(state, base, batch, ladders, key) -> (state, loss)``; the state is donated."""

        def step(state: TrainState, base, batch, ladders, key):
            loss, grads = jax.value_and_grad(self.loss)(state.params, base, batch, ladders, key)
            return state.apply_gradients(grads, self.optimizer), loss

        return jax.jit(step, donate_argnames="state", out_shardings=(self.places, None))


@dataclass(frozen=True)
class Fitted:
    """What a run folder holds, put together."""

    config: FitConfig
    model: Model
    plugin: Plugin


def load_run(path: str | Path, *, model: Model | None = None) -> Fitted:
    """Open a finished run; the plugin is checked against its base and tokenizer.

    Args:
        model: the base, if it is loaded already.

    Raises:
        RunError: there is no finished run. PluginError: the plugin does not fit the base.
    """
    run = Run.open(path, finished=True, kinds=(FIT,))
    config = run.config_as(FitConfig, side=SideConfig, gate=GateConfig)
    model = config.load_model(loaded=model)
    plugin = load_plugin(run.path).check(model.decoder, model.base, model.source)
    return Fitted(config, model, plugin)


def fit(
    config: FitConfig,
    out: str | Path,
    *,
    model: Model | None = None,
    mesh: Mesh | None = None,
    console: Console | None = None,
    stop: Preemption | None = None,
) -> Fitted | None:
    """Train a plugin into the folder ``out``; continue there if it holds the same run, unfinished.

    Args:
        model: the base, if it is loaded already.
        mesh: devices to spread over, see :func:`mlfs_jax.make_mesh`; a run may go on with another one. Several
            processes (:mod:`mlfs_jax.hosts`) all call this; without a mesh each device has all weights.
        stop: of a caller who listens for SIGTERM and Ctrl-C already.

    Returns None when SIGTERM ended it early; Ctrl-C raises KeyboardInterrupt. All is saved, and the same call goes on.

    Raises:
        RunError: ``out`` holds another run, or one that began on other weights.
        MLFSError: a name, file or setting is wrong; the message says which.
    """
    console, mesh = console or Console(quiet=not is_writer(), soft_wrap=True), mesh_of_job(mesh)
    config = config.anywhere()
    if config.cache_taps == "disk" and several():
        raise ConfigError("cache_taps = 'disk': several processes would write one folder; give 'ram', or 'off'.")
    task = config.get_task()
    model = config.load_model(mesh, loaded=model)
    if mesh is not None and mesh_of(model.base) is None:
        model = model.replace(base=shard_base(mesh, model.base))
    mesh = mesh_of(model.base)
    first = _first(config, model)  # what is wrong is said before the folder is made
    data = config.load_data(task, model)
    for_side, for_gate = config.split(data["train"])
    config = config.for_examples(len(for_side))
    _batch_size(config, for_side, mesh)
    saved = {**config.to_json(), "data": fingerprint(data)}
    listening = preemption() if stop is None else nullcontext(stop)
    with listening as stop, Run.create_or_resume(out, saved, kind=FIT) as run:
        if run.finished:
            console.print(f"{run.path} is finished; `spa eval` measures it.")
            return load_run(run.path, model=model)
        hold_base(run, model, begin=True)
        side = _train_side(config, model, first, for_side, run, stop, mesh, console)
        if side is None:
            stop.announce(console)
            return None
        held = data["validation"].subset(config.calibration_examples)
        try:
            with console.status("scoring the tokens of held-out examples"):
                plugin, result = _finish(config, model, side, for_gate, held, stop)
        except Stopped:
            stop.announce(console)
            return None

        def write() -> None:
            file = save_plugin(run.path, plugin)
            shutil.rmtree(run.path / "taps", ignore_errors=True)
            run.finish(params=side.num_params, bytes=file.stat().st_size, **result)

        by_writer(write)
        console.print(", ".join(f"{name} {value:.3f}" for name, value in result.items()))
    return Fitted(config, model, plugin)


def _first(config: FitConfig, model: Model) -> Side | None:
    """The side network of another run that this one begins with, if that is its start."""
    wanted, setting = config.side.resolve(model.decoder), Setting.parse(config.setting)
    if config.start in (None, *STARTS):
        return None
    try:
        other = load_plugin(config.start)
    except PluginError as e:
        raise ConfigError(f"start: {e} Expected 'sliced' (of ladders), 'random', or such a folder.") from None
    side = other.check(model.decoder, model.base, model.source).side
    found, asked = dataclasses.asdict(side.config), dataclasses.asdict(wanted)
    if different := [f"--side.{name} {found[name]}" for name in found if found[name] != asked[name]]:
        raise ConfigError(f"start: the side network in {config.start} is of another shape; give {' '.join(different)}.")
    if other.setting.adds != setting.adds:
        raise ConfigError(
            f"start: the side network in {config.start} was made for {other.setting}, where it "
            f"{'adds to the base' if other.setting.adds else 'stands alone'}; with {setting} it would not."
        )
    return side.replace(gate=init_gate(model.decoder.embed) if setting.gated else {})


def _train_side(
    config: FitConfig,
    model: Model,
    first: Side | None,
    train: Encoded,
    run: Run,
    stop: Preemption,
    mesh: Mesh | None,
    console: Console,
) -> Side | None:
    root, setting = jax.random.key(config.seed), Setting.parse(config.setting)
    started = decided(Checkpoints(run.checkpoints).latest() is not None)  # a start that is replaced is not measured
    importance = importance_of(config, model, train) if config.sliced and not started else None
    side = first or init_side(
        root, model.decoder, config.side, setting=setting, model=model if importance else None, importance=importance
    )
    batches = Batches(train, _batch_size(config, train, mesh), seed=config.seed, buckets=config.buckets)
    cache = None
    if config.cache_taps != "off":
        cache = _fill_cache(config, model, side, train, batches, run, stop, console)
        if cache is None:
            return None
    places: Any = None
    batch_at: Callable[[int], Mapping] = batches.__getitem__
    if mesh is not None:
        trained, moments = state_shardings(mesh, config.optimizer, side.net, side_axes(side.config, side.backbone))
        places = TrainState(trained, moments, replicated(mesh))  # type: ignore[arg-type]  # a tree of places
        batch_at = partial(feed, mesh, batches)
    trainer = SideTrainer(model.graphdef, side, setting, config.optimizer, places=places)

    def step(state: TrainState, i: int):
        ladders: Any = None if cache is None else cache.get(batches.rows(i), batches.width(i))
        if ladders is not None and mesh is not None:
            ladders = spread(mesh, *ladders)
        return trainer.step(state, model.base, batch_at(i), ladders, jax.random.fold_in(root, i))

    net = train_loop(
        run,
        stop,
        console,
        label=f"side network ({config.setting})",
        params=side.net,
        optimizer=config.optimizer,
        step=step,
        steps=config.steps,
        save_every=config.save_every,
        places=places,
    )
    return None if net is None else side.replace(net=net)


def _batch_size(config: FitConfig, train: Encoded, mesh: Mesh | None) -> int:
    """Examples of a step: fewer than asked for where there are fewer; as many for each device."""
    places = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    if len(train) < places:
        raise ConfigError(
            f"{len(train)} training examples for the side network (the gate has others): expected at least {places}, "
            "one for each device; give more."
        )
    if config.batch_size > len(train):
        return len(train) // places * places
    if mesh is not None:
        check_rows(mesh, config.batch_size)
    return config.batch_size


def _fill_cache(config, model, side, train, batches, run, stop, console) -> LadderCache | None:
    rows = np.arange(len(train))
    if config.steps < batches.epoch_steps:  # what the last batch of an epoch leaves out, the next epoch may take
        rows = np.concatenate([batches.rows(i) for i in range(config.steps)])
    base = base_fingerprint(model.decoder, model.base)
    cache = LadderCache(
        model,
        train,
        rows,
        side.tapped,
        limit_gb=config.cache_gb,
        folder=Path(config.taps_folder or run.path / "taps") if config.cache_taps == "disk" else None,
        fingerprint=base + fingerprint({"train": train}),
    )
    with progress(console) as bars:
        bar = bars.add_task("taps", total=len(cache.rows), shown=f"{cache.bytes / 1e9:.2f} GB")
        whole = cache.fill(stop=lambda: bool(stop), advance=lambda n: bars.advance(bar, n))
    return cache if whole else None


def importance_of(config: FitConfig, model: Model, train: Encoded) -> Importance:
    """Importance of the backbone's units for this task; measured once for each base and data, then kept."""
    part = train.subset(config.importance_examples)
    name = base_fingerprint(model.decoder, model.base)[:16] + fingerprint({"train": part})[:16]
    file = cache_dir() / "importance" / f"{name}.npz"
    if file.exists() and not several():  # of several processes, one may not have it
        with suppress(OSError, ValueError, TypeError, EOFError, BadZipFile), np.load(file) as saved:
            return Importance(**saved)

    def loss(base: nnx.State, batch: Mapping) -> Array:
        hidden = forward_base(model.graphdef, base, batch, logits=False).hidden
        return lm_loss(Hidden(model.graphdef, base, hidden), batch, frozen=False)

    batches = Batches(part, min(8, len(part)), buckets=config.buckets, window=1000)
    importance = measure_importance(model, map(batches.__getitem__, range(batches.epoch_steps)), loss)
    if is_writer():
        file.parent.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()
        np.savez(content, **dataclasses.asdict(importance))
        write_atomic(file, content.getvalue())
    return importance


def _finish(
    config: FitConfig, model: Model, side: Side, for_gate: Encoded | None, validation: Encoded, stop: Preemption
) -> tuple[Plugin, dict[str, float]]:
    """Train and set the gate; the plugin, and what it does on the validation split."""
    setting = Setting.parse(config.setting)
    held = score_tokens(model, side, setting, validation, before_each=stop.check)
    result = {"base_loss": float(held.base_nll.mean()), "side_loss": float(held.side_nll.mean())}
    plugin = Plugin(
        side=side,
        setting=setting,
        base=base_fingerprint(model.decoder, model.base),
        tokenizer=tokenizer_fingerprint(model.source),
        threshold=ALWAYS,
        model=model.name,
        base_bits=config.base_bits,
        user=config.user,
    )
    if setting.gated:
        scores = score_tokens(model, side, setting, for_gate or validation, before_each=stop.check)
        side = side.replace(gate=fit_gate(scores, config.gate, setting, jax.random.key(config.seed)))
        p = held.probability(side.gate)
        threshold = choose_threshold(p, config.gate.usage)
        curve = calibration_curve(p, held.base_nll, held.side_nll)
        plugin = plugin.replace(side=side, threshold=threshold, usage=config.gate.usage, calibration=curve)
        result |= gated_result(held, p, threshold)
    return plugin, result


def gated_result(held: TokenScores, p: np.ndarray, threshold: float) -> dict[str, float]:
    """Teacher-forced: loss and accuracy when the gate decides, its usage, and the diff and pick rates."""
    sigma = p >= threshold
    return {
        "gated_loss": float(np.where(sigma, held.side_nll, held.base_nll).mean()),
        "gated_accuracy": float(np.where(sigma, held.correct_side, held.correct_base).mean()),
        **rates(sigma, held.differs),
    }


def fit_users(
    config: FitConfig, out: str | Path, *, mesh: Mesh | None = None, console: Console | None = None
) -> dict[str, Fitted] | None:
    """One plugin for each user of the task, over one base, each in a folder of its own under ``out``.

    Returns None when a SIGTERM ended it early; the same call goes on.

    Raises:
        ConfigError: the task has no users.
    """
    console, model = console or Console(soft_wrap=True), config.load_model(mesh)
    data = config.load_data(config.get_task(), model)
    users = sorted({*(data["train"].users or ())} & {*(data["validation"].users or ())})
    if not users:
        raise ConfigError(f"{config.task} has no users with training and validation examples: leave --per-user out.")
    fitted = {}
    if alone := {user for split in data.values() for user in split.users or ()} - {*users}:
        console.print(f"left out, without training or without validation examples: {some(sorted(alone))}")
    with preemption() as stop:
        for user in users:
            console.print(f"[bold]{user}")
            folder, taps = folder_of(user), config.taps_folder
            own = dataclasses.replace(config, user=user, taps_folder=taps and str(Path(taps) / folder))
            found = fit(own, Path(out) / folder, model=model, console=console, stop=stop)
            if found is None:
                return None
            fitted[user] = found
            if stop and len(fitted) < len(users):
                stop.announce(console)
                return None
    return fitted


def folder_of(user: str) -> str:
    """A folder's name for a user: letters and digits as they are, the rest, and capitals, as their code points."""
    return "".join(c if c.isascii() and (c.islower() or c.isdigit()) else f"_{ord(c):x}_" for c in user)
