"""One training step of the supernet: the maxnet and its subnets, their gradients summed, one update.

Pure functions of (params, base, batch, masks). ``params`` is what a stage trains, ``{"lora": adapter, "features": U}``;
the base is an argument that nothing differentiates, so no gradient of it is ever computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from mlfs_jax.backbone.tree import Mask, Output
from mlfs_jax.config import Config
from mlfs_jax.distill import DistillConfig, feature_loss, logit_loss, task_loss
from mlfs_jax.errors import ConfigError
from mlfs_jax.lora import lora_axes
from mlfs_jax.model import abstract, forward
from mlfs_jax.sharding import replicated, rows_on, state_shardings
from mlfs_jax.slicing import slice_base, slice_config, slice_lora, slice_mask
from mlfs_jax.subnet import Subnet, kept_size, make_mask, maxnet
from mlfs_jax.vocab import Hidden, Targets, lm_distill_loss, lm_loss, lm_loss_and_targets

Params = dict[str, Any]
EXECUTIONS = ("sliced", "masked")


@partial(jax.tree_util.register_dataclass, data_fields=["params", "opt_state", "step"], meta_fields=[])
@dataclass(frozen=True)
class TrainState:
    """What a step changes: the trained tree, its optimizer state, and the number of steps taken."""

    params: Params
    opt_state: optax.OptState
    step: Int[Array, ""]

    def apply_gradients(self, grads: Params, optimizer: optax.GradientTransformation) -> TrainState:
        """The state a step later."""
        updates, opt_state = optimizer.update(grads, self.opt_state, self.params)
        return TrainState(optax.apply_updates(self.params, updates), opt_state, self.step + 1)


@partial(jax.tree_util.register_dataclass, data_fields=["output", "taps"], meta_fields=[])
@dataclass(frozen=True)
class Teacher:
    """What the subnets of a step learn from the maxnet.

    Attributes:
        output: logits [B, C]; of a language model the kept targets, or the hidden states [B, T, D] to make them from.
        taps: [L, B, T, D], every layer's output, where there is a feature loss.
    """

    output: Any
    taps: Float[Array, "L B T D"] | None


def state_places(mesh: Mesh, base: nnx.State, params: Params, optimizer: optax.GradientTransformation) -> Any:
    """Where a training state goes on a mesh, as shardings: :attr:`Supernet.places`. Shapes will do for the trees."""
    axes = {"lora": lora_axes(base, params["lora"]), "features": ("embed", "features")}
    trained, moments = state_shardings(mesh, optimizer, params, {name: axes[name] for name in params})
    return TrainState(trained, moments, replicated(mesh))  # type: ignore[arg-type]  # a tree of places, not of arrays


def gradient_weights(trainable: list[int], gamma: float) -> list[float]:
    """w_j proportional to (n_max / n_j)^gamma, summing to the number of subnets (MLFS, section 3.2).

    ``trainable`` holds n_j, the adapter parameters active in each subnet, the maxnet's first. gamma = 0 is a plain sum.
    """
    logs = [gamma * math.log(trainable[0] / n) for n in trainable]
    raw = [math.exp(x - max(logs)) for x in logs]  # no power of it is too large
    return [w * len(raw) / sum(raw) for w in raw]


@dataclass(frozen=True)
class Supernet:
    """The step of one model: what to compute is fixed here, the trees are arguments.

    Attributes:
        execution: "masked": one compiled step for every subnet there is; each costs as much as the maxnet's width.
            "sliced": a subnet is cut to its widths before it runs (depth still skips by ``lax.cond``), which costs one
            compile for each distinct width, and saves the time.
        unroll: unroll the scan over layers: longer to compile, faster on a CPU (a scan copies what it keeps for the
            backward pass).
        remat: recompute each layer in the backward pass instead of keeping its activations.
        places: where the state lies on a mesh, as shardings (:mod:`mlfs_jax.sharding`); it stays there.
        keep_targets: what the maxnet's [B, T, V] distributions teach is kept for all subnets of a step up to this many
            bytes; beyond, and on several devices, the loss of each subnet makes them again, a chunk at a time.
    """

    config: Config
    distill: DistillConfig
    optimizer: optax.GradientTransformation
    execution: str = "sliced"
    unroll: bool = False
    remat: bool = False
    places: Any = None
    keep_targets: int = 2**29

    def __post_init__(self):
        if self.config.head not in ("sequence", "lm"):
            raise ConfigError(f"a {self.config.head!r} head: training needs a 'sequence' or an 'lm' head.")

    @cached_property
    def graphdef(self) -> nnx.GraphDef:
        return abstract(self.config)[0]

    def init(self, params: Params) -> TrainState:
        return TrainState(params, self.optimizer.init(params), jnp.zeros((), jnp.int32))

    # -- losses ---------------------------------------------------------------------------------------------------

    def _run(self, graphdef, base, batch, lora, taps, mask=None) -> Output:
        return forward(
            graphdef,
            base,
            batch,
            lora=lora,
            mask=mask,
            taps=taps,
            remat=self.remat,
            unroll=self.unroll,
            rows=None if self.places is None else rows_on(self.places.step.mesh),
            logits=self.config.head != "lm",  # [B, T, V]: the loss goes through it in chunks
        )

    def maxnet_loss(
        self, params: Params, base: nnx.State, batch: Mapping, teaches: bool
    ) -> tuple[Float[Array, ""], Teacher]:
        """Task loss of the maxnet, and of its outputs what subnets learn from, if it ``teaches`` any."""
        out = self._run(self.graphdef, base, batch, params["lora"], teaches and self.distill.beta > 0)
        if self.config.head != "lm":
            return task_loss(out.logits, batch["labels"], self.config.problem), Teacher(out.logits, out.taps)
        hidden = Hidden(self.graphdef, base, out.hidden)
        if teaches and self._keeps_targets(batch["input_ids"].size):
            loss, targets = lm_loss_and_targets(hidden, batch, self.distill)
            return loss, Teacher(targets, out.taps)
        return lm_loss(hidden, batch), Teacher(out.hidden, out.taps)

    def _keeps_targets(self, tokens: int) -> bool:
        alone = self.places is None or self.places.step.mesh.size == 1
        return self.distill.alpha > 0 and alone and 4 * tokens * self.config.vocab_size <= self.keep_targets

    def subnet_loss(
        self, params: Params, base: nnx.State, batch: Mapping, teacher: Teacher, mask: Mask, widths: Subnet | None
    ) -> Float[Array, ""]:
        """Loss of one subnet under its teacher; run at ``widths`` when given (mask and trees are cut to them)."""
        graphdef, lora, distill, whole = self.graphdef, params["lora"], self.distill, base
        if widths is not None:
            graphdef = abstract(slice_config(self.config, widths))[0]
            lora, mask = slice_lora(self.config, base, lora, widths), slice_mask(mask, widths)
            base = slice_base(self.config, base, widths)
        out = self._run(graphdef, base, batch, lora, distill.beta > 0, mask)
        if self.config.head == "lm":
            target = teacher.output
            target = target if isinstance(target, Targets) else Hidden(self.graphdef, whole, target)
            loss = lm_distill_loss(Hidden(graphdef, base, out.hidden), target, batch, distill)
        else:
            loss = (1 - distill.alpha) * task_loss(out.logits, batch["labels"], self.config.problem)
            if distill.alpha:
                loss += distill.alpha * logit_loss(teacher.output, out.logits, distill, self.config.problem)
        if distill.beta:
            tokens = batch["attention_mask"]
            loss += distill.beta * feature_loss(
                teacher.taps, out.taps, params["features"], mask, tokens, distill.features
            )
        return loss

    # -- gradients ------------------------------------------------------------------------------------------------

    def _maxnet_grads(self, params, base, batch, weight, teaches):
        (loss, teacher), grads = jax.value_and_grad(self.maxnet_loss, has_aux=True)(params, base, batch, teaches)
        return jax.tree.map(lambda g: weight * g, grads), loss, jax.lax.stop_gradient(teacher)

    def _add_subnet_grads(self, total, params, base, batch, teacher, mask, weight, widths):
        loss, grads = jax.value_and_grad(self.subnet_loss)(params, base, batch, teacher, mask, widths)
        return jax.tree.map(lambda t, g: t + weight * g, total, grads), loss

    # -- the compiled step ----------------------------------------------------------------------------------------

    @cached_property
    def masked_step(self):
        """``(state, base, batch, masks [J, ...], weights [1 + J]) -> (state, losses [1 + J])``, compiled once."""

        def step(state, base, batch, masks, weights):
            grads, loss, teacher = self._maxnet_grads(state.params, base, batch, weights[0], True)

            def subnet(total, scanned):
                mask, weight = scanned
                return self._add_subnet_grads(total, state.params, base, batch, teacher, mask, weight, None)

            grads, losses = jax.lax.scan(subnet, grads, (masks, weights[1:]))
            return state.apply_gradients(grads, self.optimizer), jnp.concatenate([loss[None], losses])

        return jax.jit(step, donate_argnames="state", out_shardings=(self.places, None))

    @cached_property
    def _compiled(self):
        return (
            jax.jit(self._maxnet_grads, static_argnames="teaches"),
            jax.jit(self._add_subnet_grads, static_argnames="widths", donate_argnames="total"),
            jax.jit(
                partial(TrainState.apply_gradients, optimizer=self.optimizer),
                donate_argnums=0,
                out_shardings=self.places,
            ),
        )

    def step(
        self, state: TrainState, base: nnx.State, batch: Mapping, subnets: tuple[Subnet, ...], gamma: float
    ) -> tuple[TrainState, Float[Array, " J"]]:
        """Train the maxnet and ``subnets`` on a batch. ``state`` is donated. Returns the losses, the maxnet's first."""
        shapes = _shapes(state.params["lora"])
        sizes = [trainable_params(self.config, s, shapes) for s in (maxnet(self.config), *subnets)]
        weights = jnp.asarray(gradient_weights(sizes, gamma), jnp.float32)
        masks = [_mask(self.config, subnet) for subnet in subnets]
        if self.execution == "masked" and masks:
            return self.masked_step(state, base, batch, jax.tree.map(lambda *m: jnp.stack(m), *masks), weights)
        maxnet_grads, add_subnet_grads, update = self._compiled
        grads, loss, teacher = maxnet_grads(state.params, base, batch, weights[0], bool(subnets))
        losses = [loss]
        for subnet, mask, weight in zip(subnets, masks, weights[1:], strict=True):
            widths = widths_of(self.config, subnet)
            grads, loss = add_subnet_grads(grads, state.params, base, batch, teacher, mask, weight, widths)
            losses.append(loss)
        return update(state, grads), jnp.stack(losses)


def widths_of(config: Config, subnet: Subnet) -> Subnet:
    """The full-depth, uniform subnet that is just wide enough to hold ``subnet``: what a sliced step compiles for."""
    L = config.layers
    return Subnet(subnet.embed, (max(subnet.heads),) * L, (max(subnet.mlp),) * L, tuple(range(L)))


@lru_cache(maxsize=64)  # they lie on the device, and each of "per-layer" is another
def _mask(config: Config, subnet: Subnet) -> Mask:
    return make_mask(config, subnet)


def _shapes(lora: Mapping) -> tuple:
    """The shapes of an adapter, hashable."""
    return tuple((site, leaf, x.shape) for site, entry in lora.items() for leaf, x in entry.items())


@lru_cache(maxsize=4096)
def trainable_params(config: Config, subnet: Subnet, lora_shapes: tuple) -> int:
    """Adapter parameters active in a subnet."""
    lora: dict = {}
    for site, leaf, shape in lora_shapes:
        lora.setdefault(site, {})[leaf] = shape
    axes = lora_axes(abstract(config)[1], lora)
    return sum(kept_size(config, axes[site][leaf], shape, subnet) for site, leaf, shape in lora_shapes)
