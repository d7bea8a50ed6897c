"""What side networks are compared with, over the same frozen base, data, loss and share of trained parameters.

``lora``: low-rank pairs at every linear map. ``adapter``, ``parallel-adapter``: see :mod:`spa_jax.adapters`. ``lst``: a
side network alone (setting S3 of ``spa fit``). ``one-shot``, ``zero-shot``: the base itself, with one example of
training in front of the prompt, or none. ``shared``: a small model of its own whose few layers are used several times
(EdgeFormer, arXiv 2202.07959; Subformer, arXiv 2101.00234), distilled from the base, whose token table it shares.

``base_bits`` keeps the frozen base in 8 or 4 bits (:mod:`mlfs_jax.backbone.quantised`), as QLoRA does. A finished LoRA
run opens with its pairs merged, in float again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy as safetensors
from jaxtyping import Array
from rich.console import Console
from safetensors import SafetensorError

from mlfs_jax.backbone.tree import STACKED, flatten, map_named
from mlfs_jax.data.batches import BUCKETS, Batches
from mlfs_jax.data.encode import Encoded, fingerprint
from mlfs_jax.data.tokenizer import load_tokenizer, prompt_ids
from mlfs_jax.distill import DistillConfig
from mlfs_jax.errors import ConfigError, RunError
from mlfs_jax.fingerprint import hold_base
from mlfs_jax.fit_config import from_anywhere
from mlfs_jax.lora import init_lora, merge_lora
from mlfs_jax.model import Model, abstract, forward
from mlfs_jax.preemption import preemption
from mlfs_jax.run import Run, write_atomic
from mlfs_jax.stages import Stage
from mlfs_jax.supernet import TrainState
from mlfs_jax.vocab import Hidden, lm_distill_loss, lm_loss
from spa_jax.adapters import adapted, count_adapters, init_adapters
from spa_jax.config import BASELINE, FitConfig, saved_fields
from spa_jax.loop import train_loop
from spa_jax.side import SideConfig, abstract_net

METHODS = ("lora", "adapter", "parallel-adapter", "lst", "one-shot", "zero-shot", "shared")
TRAINED = ("lora", "adapter", "parallel-adapter", "shared")
ADAPTERS = {"adapter": "houlsby", "parallel-adapter": "parallel"}
WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class BaselineConfig:
    """What a baseline run computes; as :class:`FitConfig` where the names are the same.

    Attributes:
        method: lora, adapter, parallel-adapter, lst, one-shot, zero-shot or shared.
        model: a name of the catalogue, a hub id, a local Hugging Face directory, or a GGUF file.
        task: a language task's name, or a .jsonl file with prompt, completion and perhaps user.
        seed: of new weights and of the order of the data.
        steps: optimizer steps; by default 600, and of "lst" as many as of other side networks.
        learning_rate: the peak; by default 1e-3, and 2e-3 for "lst", as for other side networks.
        batch_size: examples in a step.
        params: of LoRA and adapters: about how many parameters to train; by default as many as the default side network
            of this base has.
        unique: of "shared": layers of its own.
        repeats: of "shared": how often each of them is used.
        base_bits: 8 or 4: keep the layers of the frozen base in so many; 32: as they are.
        max_length: tokens of prompt and completion; the default is the task's.
        buckets: lengths that batches are padded to (each is one more compile of the step).
        limit: at most this many examples of each split.
        save_every: steps between checkpoints.
    """

    method: str
    model: str
    task: str
    seed: int = 0
    steps: int | None = None
    learning_rate: float | None = None
    batch_size: int = 16
    params: int | None = None
    unique: int = 2
    repeats: int = 3
    base_bits: int = 32
    max_length: int | None = None
    buckets: tuple[int, ...] = BUCKETS
    limit: int | None = None
    save_every: int = 100

    def __post_init__(self):
        if self.method not in METHODS:
            raise ConfigError(f"method = {self.method!r}: expected one of {', '.join(METHODS)}.")
        if min(self.unique, self.repeats) < 1 or (self.params is not None and self.params < 1):
            raise ConfigError(
                f"unique = {self.unique}, repeats = {self.repeats}, params = {self.params}: expected at least 1."
            )
        if self.method == "lst" and self.base_bits != 32:
            raise ConfigError(
                f"method = 'lst', base_bits = {self.base_bits}: LST is the default side network over the base as is: "
                "leave that out."
            )
        if self.method not in ("lora", *ADAPTERS) and self.params is not None:
            raise ConfigError(
                f"method = {self.method!r}, params = {self.params}: only LoRA and adapters are made to a size: leave "
                "that out."
            )
        if self.method != "shared" and (self.unique, self.repeats) != (2, 3):
            raise ConfigError(
                f"unique = {self.unique}, repeats = {self.repeats}: these are of method 'shared', not {self.method!r}."
            )
        _ = self.fit_config  # its errors, now

    @property
    def peak(self) -> float:
        """The learning rate's, as asked for or the method's own."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 2e-3 if self.method == "lst" else 1e-3

    def to_json(self) -> dict[str, Any]:
        """For run.json, as :meth:`FitConfig.to_json`."""
        return saved_fields(self) | {"learning_rate": self.peak}

    @property
    def fit_config(self) -> FitConfig:
        """The same run as a side network's, for what both share; of "lst", the run itself."""
        fields = {f.name for f in dataclasses.fields(FitConfig)} & {f.name for f in dataclasses.fields(self)}
        return FitConfig(setting="s3", **{name: getattr(self, name) for name in fields} | {"learning_rate": self.peak})

    @property
    def trains(self) -> bool:
        return self.method in TRAINED


def budget(config: BaselineConfig, model: Model) -> int:
    """How many parameters to train."""
    if config.params is not None:
        return config.params
    side = SideConfig().resolve(model.decoder)
    return sum(leaf.size for leaf in flatten(abstract_net(side, model.decoder)[1]).values())


def _nearest(count: Callable[[int], int], wanted: int) -> int:
    """The width from 1 on whose parameters are nearest to the wanted number; they grow linearly."""
    one, two = count(1), count(2)
    return max(1, round((wanted - one) / (two - one)) + 1)


def init_params(config: BaselineConfig, model: Model) -> dict:
    """What the method trains, as it starts."""
    key, wanted = jax.random.key(config.seed), budget(config, model)
    if config.method == "lora":
        size = lambda rank: sum(  # noqa: E731
            x.size for x in jax.tree.leaves(jax.eval_shape(lambda: init_lora(key, model, rank=rank)))
        )
        return init_lora(key, model, rank=_nearest(size, wanted))
    if config.method in ADAPTERS:
        kind = ADAPTERS[config.method]
        return init_adapters(key, model.decoder, kind, _nearest(partial(count_adapters, model.decoder, kind), wanted))
    layers = np.linspace(0, model.decoder.layers - 1, config.unique).round().astype(int)
    stacked = {name: leaf[...] for name, leaf in flatten(model.base).items() if name.startswith(f"{STACKED}.")}
    return {name: x[layers] for name, x in stacked.items()}


def apply(config: BaselineConfig, model: Model, params: Mapping) -> Model:
    """The model with what was trained in it: an ordinary Model."""
    if config.method == "lora":
        return model.replace(base=merge_lora(model.base, params))
    if config.method in ADAPTERS:
        return adapted(model, ADAPTERS[config.method], dict(params))
    return shared_model(config, model, params)


def shared_model(config: BaselineConfig, model: Model, params: Mapping) -> Model:
    """The small model unrolled: each of its layers ``repeats`` times in a row."""
    small = model.decoder.replace(layers=config.unique * config.repeats, windows=())
    graphdef, state = abstract(small)
    weights = {name: leaf[...] for name, leaf in flatten(model.base).items()}
    weights |= {name: jnp.repeat(x, config.repeats, 0) for name, x in params.items()}
    return model.replace(config=small, graphdef=graphdef, base=map_named(lambda name, _: weights[name], state))


def _loss(config: BaselineConfig, model: Model, params: Mapping, base, batch: Mapping) -> Array:
    model = model.replace(base=base)
    if config.method == "lora":
        hidden = forward(model.graphdef, base, batch, lora=params, logits=False).hidden
        return lm_loss(Hidden(model.graphdef, base, hidden), batch)
    tuned = apply(config, model, params)
    student = Hidden(tuned.graphdef, tuned.base, forward(tuned.graphdef, tuned.base, batch, logits=False).hidden)
    if config.method != "shared":
        return lm_loss(student, batch)
    teacher = Hidden(model.graphdef, base, forward(model.graphdef, base, batch, logits=False).hidden)
    return lm_distill_loss(student, teacher, batch, DistillConfig(alpha=0.5, beta=0.0))


@dataclass(frozen=True)
class Baseline:
    """A finished baseline: a model that writes, and what it puts in front of every prompt.

    Attributes:
        prefix: token ids before a prompt's; an end of text there would make the model forget the example.
        one_line: what it writes ends at the first line break: of prompting, which has not learnt to end a text, where
            no completion of the training data has one.
    """

    config: BaselineConfig
    model: Model
    prefix: tuple[int, ...] = ()
    params: int = 0
    one_line: bool = False


def fit_baseline(
    config: BaselineConfig, out: str | Path, *, model: Model | None = None, console: Console | None = None
) -> Baseline | None:
    """Train a baseline into the folder ``out``; continue there if it holds the same run, unfinished.

    "lst" is ``fit`` with setting s3, and is not run here. Returns None when a SIGTERM ended it early.

    Raises:
        RunError: ``out`` holds another run. MLFSError: a name, file or setting is wrong.
    """
    if config.method == "lst":
        raise ConfigError("lst is a side network alone: fit it with setting 's3' (`spa fit --setting s3`).")
    console = console or Console(soft_wrap=True)
    config = dataclasses.replace(
        config, model=from_anywhere(config.model), task=from_anywhere(config.task), steps=config.steps or 600
    )
    shared = config.fit_config
    task, model = shared.get_task(), shared.load_model(loaded=model)
    data = shared.load_data(task, model)
    saved = {**config.to_json(), "data": fingerprint(data)}
    with preemption() as stop, Run.create_or_resume(out, saved, kind=BASELINE) as run:
        hold_base(run, model, begin=True)
        if run.finished or not config.trains:
            found = _assemble(config, model, data, run)
            if not run.finished:
                run.finish(params=0)
            return found
        train = data["train"]
        batches = Batches(train, min(config.batch_size, len(train)), seed=config.seed, buckets=config.buckets)
        optimizer = Stage(config.method, "maxnet", config.steps, config.peak).optimizer()

        @partial(jax.jit, donate_argnames="state")
        def update(state: TrainState, base, batch):
            loss = lambda params: _loss(config, model, params, base, batch)  # noqa: E731
            value, grads = jax.value_and_grad(loss)(state.params)
            return state.apply_gradients(grads, optimizer), value

        params = train_loop(
            run,
            stop,
            console,
            label=config.method,
            params=init_params(config, model),
            optimizer=optimizer,
            step=lambda state, i: update(state, model.base, batches[i]),
            steps=config.steps,
            save_every=config.save_every,
        )
        if params is None:
            stop.announce(console)
            return None
        flat = {jax.tree_util.keystr(p, simple=True, separator="/"): np.asarray(x) for p, x in _leaves(params)}
        write_atomic(run.path / WEIGHTS, safetensors.save(flat))
        run.finish(params=sum(x.size for x in flat.values()))
        return _assemble(config, model, data, run)


def _leaves(tree) -> list:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def _assemble(config: BaselineConfig, model: Model, data: Mapping[str, Encoded], run: Run) -> Baseline:
    if not config.trains:
        tokenizer, decoder = load_tokenizer(model.source), model.decoder
        positions = math.inf if decoder.positions == "alibi" else decoder.max_positions
        prefix = one_shot_prefix(data, tokenizer, positions) if config.method == "one-shot" else ()
        return Baseline(config, model, prefix, one_line=_one_line(data["train"], tokenizer))
    template = jax.eval_shape(lambda: init_params(config, model))
    names = [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in _leaves(template)]
    try:
        saved = safetensors.load_file(run.path / WEIGHTS)
        params = jax.tree.unflatten(jax.tree.structure(template), [jnp.asarray(saved[name]) for name in names])
    except (OSError, KeyError, SafetensorError) as e:
        raise RunError(f"{run.path / WEIGHTS} is damaged ({e}): delete the folder and train it again.") from e
    return Baseline(config, apply(config, model, params), params=sum(x.size for x in saved.values()))


def load_baseline(path: str | Path, *, model: Model | None = None) -> Baseline:
    """Open a finished baseline run; ``model`` is the base, if it is loaded already. RunError where it has changed."""
    run = Run.open(path, finished=True, kinds=(BASELINE,))
    config = run.config_as(BaselineConfig)
    shared = config.fit_config
    model = shared.load_model(loaded=model)
    hold_base(run, model)
    return _assemble(config, model, shared.load_data(shared.get_task(), model), run)


def one_shot_prefix(data: Mapping[str, Encoded], tokenizer, positions: float) -> tuple[int, ...]:
    """A training example and a blank line: what stands before every prompt.

    It is the one of median length, or the longest below it that leaves the model positions for all of the task.

    Raises:
        ConfigError: none does.
    """
    train, needed = data["train"], max(int(part.starts.max()) + part.max_completion for part in data.values())
    for row in np.argsort(train.lengths, kind="stable")[len(train) // 2 :: -1]:
        text = tokenizer.decode(train.ids[train.offsets[row] : train.offsets[row + 1]].tolist())
        prefix = tuple(prompt_ids(tokenizer, text.strip() + "\n\n"))
        if len(prefix) + needed <= positions:
            return prefix
    raise ConfigError(
        f"one-shot: the model has {positions} positions, of which the longest prompt and completion take {needed}: no "
        "example fits before them; give fewer by --max-length, or 'zero-shot'."
    )


def _one_line(train: Encoded, tokenizer) -> bool:
    rows = zip(train.offsets[:-1] + train.starts, train.offsets[1:], strict=True)
    texts = tokenizer.decode_batch([train.ids[start:end].tolist() for start, end in rows])
    return not any("\n" in text.strip() for text in texts)
