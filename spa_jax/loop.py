"""The training loop that side networks and their baselines share: resumable bit by bit, interruptible at any step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mlfs_jax.checkpoint import Checkpoints
from mlfs_jax.hosts import same_everywhere, to_host
from mlfs_jax.preemption import Preemption
from mlfs_jax.run import Run, check_finite
from mlfs_jax.sharding import put
from mlfs_jax.supernet import TrainState

LOG_EVERY = 10


def progress(console: Console) -> Progress:
    """A bar with a label and one field, ``shown``."""
    name, shown = TextColumn("{task.description}"), TextColumn("{task.fields[shown]}")
    return Progress(name, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), shown, console=console)


def train_loop(
    run: Run,
    stop: Preemption,
    console: Console,
    *,
    label: str,
    params: Any,
    optimizer: Any,
    step: Callable[[TrainState, int], tuple[TrainState, jax.Array]],
    steps: int,
    save_every: int,
    places: TrainState | None = None,
) -> Any | None:
    """The trained ``params``, whole in every process, or None when a signal ended it early (everything is saved).

    Args:
        label: of the progress bar.
        params: what to start from, unless the run has a checkpoint.
        optimizer: an optax transformation; its state is made here.
        step: ``step(state, i) -> (state, loss)``; may donate the state; a pure function of both.
        places: where the state lies on a mesh, as shardings.
    """
    fresh = TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))
    # placed before the first step, as a restored state is: else the step compiles twice
    state: TrainState = put(fresh, places or jax.devices()[0])
    with Checkpoints(run.checkpoints) as checkpoints, progress(console) as bars:
        latest = checkpoints.latest()
        same_everywhere(f"the newest checkpoint in {run.checkpoints}", latest)
        if latest is not None:
            state, _ = checkpoints.restore(state)
        first = int(state.step)
        run.rewind(first)
        bar = bars.add_task(label, total=steps, completed=first, shown="")
        pending: list[tuple[int, jax.Array]] = []
        for i in range(first, steps):
            state, loss = step(state, i)
            pending.append((i + 1, loss))
            stopping = stop.at(i + 1)  # once: a signal may come between two looks
            save = stopping or (i + 1) % save_every == 0 or i + 1 == steps
            bars.update(bar, completed=i + 1)
            if save or (i + 1) % LOG_EVERY == 0:
                for number, value in pending:  # not at every step: reading a loss waits for the device
                    check_finite(number, value)
                    run.log(step=number, loss=float(np.asarray(value)))
                bars.update(bar, shown=f"loss {float(np.asarray(loss)):.3f}")
                pending.clear()
            if save:
                checkpoints.save(i + 1, state, {"label": label})
            if stopping and i + 1 < steps:
                return None
    return jax.tree.map(lambda x: jnp.asarray(to_host(x)), state.params)
