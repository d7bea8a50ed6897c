"""``mlfs plan``: what a training step needs on every device of a mesh, before there is a weight or a device.

The step is the one that ``fit`` runs (:class:`mlfs_jax.supernet.Supernet`), called with shapes instead of arrays: each
program that it would run is compiled for virtual CPU devices, and what the compiler says is read off. Programs for an
accelerator are fused and scheduled otherwise, so bytes of activations are an estimate of what it will need; bytes of
weights, adapters, optimizer and batch are exact.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mlfs_jax.backbone.tree import flatten
from mlfs_jax.config import Config
from mlfs_jax.errors import ConfigError
from mlfs_jax.fit_config import FitConfig
from mlfs_jax.hlo import Cost, cost_of
from mlfs_jax.model import Model, abstract, cast_base
from mlfs_jax.sharding import RULES, base_shardings, check_rows, sharding_of
from mlfs_jax.stages import Stage
from mlfs_jax.supernet import Supernet, state_places
from mlfs_jax.train import init_params

ESTIMATE = (
    "Activations are an estimate: measured in a program compiled for virtual CPU devices, not for an accelerator."
)


@dataclass(frozen=True)
class Program:
    """One compiled program of a step, on one device; sizes in bytes.

    Attributes:
        before: what is there when it starts: the state, the base, the batch, and what earlier programs made.
        output: what it makes, less what it may write over (donated arguments).
        temp: activations and workspace at their highest.
        seconds: it took to compile.
    """

    name: str
    before: int
    output: int
    temp: int
    cost: Cost
    seconds: float

    @property
    def peak(self) -> int:
        return self.before + self.output + self.temp


@dataclass(frozen=True)
class Plan:
    """What one training step needs on one device; sizes in bytes.

    Attributes:
        asked: what was planned: model, mesh, batch_size, length, stage, ...
        parts: of what is there all the time: base, adapters (all that trains), optimizer, batch; in stages 1 and 2, or
            in another type than float32, the base without its adapters, too.
        programs: of the step, in the order in which they run.
        subnets: that the step trains besides the maxnet.
        whole: sentences about axes that the mesh does not divide, so that weights lie whole where a share was meant.
    """

    asked: dict[str, Any]
    parts: dict[str, int]
    programs: tuple[Program, ...]
    subnets: int
    whole: tuple[str, ...]

    @property
    def highest(self) -> Program:
        """The program at which the most is needed."""
        return max(self.programs, key=lambda program: program.peak)

    @property
    def peak(self) -> int:
        return self.highest.peak

    @property
    def cost(self) -> Cost:
        """Of the step: a skipped layer of a subnet counts as if it ran."""
        return sum((program.cost for program in self.programs), Cost())

    @property
    def nbytes(self) -> dict[str, int]:
        """The peak, by what needs it; it adds up."""
        program, resident = self.highest, sum(self.parts.values())
        made = {"output": program.output, "outputs of earlier programs": program.before - resident}
        return {**self.parts, "activations and workspace": program.temp, **made}

    def to_json(self) -> dict:
        cost = self.cost
        return {
            **self.asked,
            "subnets": self.subnets,
            "bytes per device": {**self.nbytes, "peak": self.peak},
            "flops per step and device": cost.flops,
            "collectives per step and device": {
                kind: {"count": found.count, "bytes": found.nbytes} for kind, found in cost.collectives.items()
            },
            "loops of unknown length, counted once": cost.unknown_loops,
            "programs": [
                {"name": p.name, "peak": p.peak, "output": p.output, "temp": p.temp, "flops": p.cost.flops}
                for p in self.programs
            ],
            "compile seconds": round(sum(p.seconds for p in self.programs), 1),
            "not split": list(self.whole),
            "estimate": ESTIMATE,
        }


def plan(config: Config, mesh: Mesh, fit: FitConfig, length: int, stage: int = 0) -> Plan:
    """Compile one training step of ``fit`` on shapes, and add up what it needs.

    Args:
        config: of the network; nothing of it is allocated.
        mesh: of devices that need not exist elsewhere: see :func:`mlfs_jax.knobs.use_virtual_devices`.
        fit: batch_size, rank, random_subnets, execution, dtype, remat, ... are read; ``model`` and ``task`` are not.
        length: tokens of every example.
        stage: which of the stages of ``fit``: 0 trains the maxnet alone, 1 and 2 subnets beside it.

    Raises:
        ConfigError: the batch does not divide among the devices, no such stage, or a text longer than the model reads.
    """
    stages = fit.stages
    if not 0 <= stage < len(stages):
        raise ConfigError(f"stage = {stage}: expected 0 to {len(stages) - 1}.")
    check_rows(mesh, fit.batch_size)
    if not 2 <= length <= config.context:
        raise ConfigError(f"length = {length}: expected 2 to {config.context}, which the model can read.")
    put = lambda tree, where: jax.tree.map(  # noqa: E731
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, where
    )
    whole = abstract(config)[1]
    whole = put(whole, base_shardings(mesh, whole))
    base = jax.eval_shape(partial(cast_base, dtype=fit.dtype), whole)
    base = put(base, base_shardings(mesh, base))
    params = _shapes_of_params(config, stages[stage], fit)
    optimizer = stages[stage].optimizer()
    places = state_places(mesh, base, params, optimizer)
    batch = {
        name: jax.ShapeDtypeStruct(shape, np.int32, sharding=sharding_of(mesh, ("batch", "")[: len(shape)], shape))
        for name, shape in _batch_shapes(config, fit.batch_size, length).items()
    }
    supernet = _OnPaper(config, fit.distill, optimizer, fit.execution, False, fit.remat, places)
    state = put(jax.eval_shape(supernet.init, params), places)
    parts = {
        "base": bytes_per_device(base),
        "adapters": bytes_per_device(state.params),
        "optimizer": bytes_per_device((state.opt_state, state.step)),
        "batch": bytes_per_device(batch),
    }
    if stage > 0 or fit.dtype != "float32":  # what the step has is merged, or cast
        parts["base as it was, for the next stage"] = bytes_per_device(whole)
    supernet.paper.live = sum(parts.values())
    subnets = stages[stage].subnets(fit.space(config), jax.random.key(fit.seed))
    supernet.step(state, base, batch, subnets, fit.gamma)
    asked = {
        "family": config.family,
        "parameters": sum(math.prod(x.shape) for x in jax.tree.leaves(base)),
        "mesh": dict(mesh.shape),
        "batch_size": fit.batch_size,
        "length": length,
        "stage": stage,
        "rank": stages[stage].rank,
        "execution": fit.execution,
        "dtype": fit.dtype,
        "remat": fit.remat,
    }
    return Plan(asked, parts, tuple(supernet.paper.programs), len(subnets), _not_split(mesh, base))


def _not_split(mesh: Mesh, base: nnx.State) -> tuple[str, ...]:
    """A sentence for each named axis of the weights that its axis of the mesh does not divide."""
    sizes = {(axis, n) for leaf in flatten(base).values() for axis, n in zip(leaf.axes, leaf.shape, strict=True)}
    rules = ((axis, n, RULES[axis]) for axis, n in sorted(sizes) if axis in RULES)
    return tuple(
        f"{axis} = {n} is no multiple of {rule} = {mesh.shape[rule]}: {rule} does not split weights along it."
        for axis, n, rule in rules
        if n % mesh.shape[rule]
    )


def _shapes_of_params(config: Config, stage: Stage, fit: FitConfig):
    model = Model(config, *abstract(config))
    return jax.eval_shape(lambda: init_params(jax.random.key(0), model, stage, fit.distill))


def _batch_shapes(config: Config, batch_size: int, length: int) -> dict[str, tuple[int, ...]]:
    """What a batch of this model's tasks holds."""
    names = ["input_ids", "attention_mask"]
    names += ["loss_mask"] if config.head == "lm" else []
    names += ["token_type_ids"] if getattr(config, "type_vocab", 0) > 1 else []
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(names, (batch_size, length))
    return shapes if config.head == "lm" else {**shapes, "labels": (batch_size,)}


def bytes_per_device(tree) -> int:
    """Bytes of the shards of a tree on one device; leaves are arrays, or shapes with shardings."""
    leaves = (x for x in jax.tree.leaves(tree) if x.shape is not None)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


# -- the step, on paper -----------------------------------------------------------------------------------------------


@dataclass
class _Paper:
    """What has been noted down so far, and the bytes that are alive."""

    programs: list[Program] = field(default_factory=list)
    live: int = 0
    compiled: dict = field(default_factory=dict)

    def note(self, jitted: Callable) -> Callable:
        """A function that compiles ``jitted`` for what it is called with, and answers with shapes."""

        def call(*args):
            key = (jitted, jax.tree.structure(args), *map(_kind, jax.tree.leaves(args)))
            if key not in self.compiled:
                start = time.perf_counter()
                compiled = jitted.lower(*args).compile()
                self.compiled[key] = compiled, cost_of(compiled.as_text()), time.perf_counter() - start
            compiled, cost, seconds = self.compiled[key]
            self.compiled[key] = compiled, cost, 0.0
            memory = compiled.memory_analysis()
            made = memory.output_size_in_bytes - memory.alias_size_in_bytes
            name = jitted.__name__.strip("_").replace("_", " ")
            self.programs.append(Program(name, self.live, made, memory.temp_size_in_bytes, cost, seconds))
            self.live += made
            return jax.tree.map(_answer, compiled.out_info)

        return call


def _kind(leaf) -> object:
    """What a program is compiled for: a shape and a place, or a static argument itself."""
    return (leaf.shape, leaf.dtype, leaf.sharding) if hasattr(leaf, "sharding") else leaf


def _answer(info):
    """A result: its shape and place; the numbers that the step itself handles (losses) are there."""
    if info.shape == ():
        return jnp.zeros((), info.dtype)
    return jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=info.sharding)


@dataclass(frozen=True)
class _OnPaper(Supernet):
    """The supernet whose step compiles and notes down what it would run."""

    paper: _Paper = field(default_factory=_Paper)

    @cached_property
    def masked_step(self):
        return self.paper.note(super().masked_step)

    @cached_property
    def _compiled(self):
        return tuple(map(self.paper.note, super()._compiled))
