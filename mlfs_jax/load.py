"""A network to use, by name: a pretrained model, what a run made of it, or a subnet of either."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from jax.sharding import Mesh

from mlfs_jax.hf.load import from_pretrained
from mlfs_jax.model import Model
from mlfs_jax.sharding import sharding_of
from mlfs_jax.slicing import slice_subnet
from mlfs_jax.subnet import SubnetSpace
from mlfs_jax.train import load_run

WIDTH, DEPTH = (1.0, 0.66, 0.48, 0.22), (1.0, 0.8, 0.66, 0.5)
"""What a subnet of a model without a run may keep."""


def load_subnet(name: str | Path, subnet: str | None = None, *, mesh: Mesh | None = None) -> Model:
    """A model at the true size of a subnet, adapters merged: fastest where one subnet is used for a while.

    Args:
        name: the folder of a finished run, or what :func:`mlfs_jax.from_pretrained` takes.
        subnet: a name or sizes, see :meth:`SubnetSpace.named`; None: all of it. Of a model without a run, whose axes
            are in no order, it is the first heads, neurons and evenly spaced layers.
        mesh: devices to spread the weights over, see :func:`mlfs_jax.make_mesh`.

    Raises:
        UnknownNameError, SubnetError: there is no such model, or no such subnet of it.
        RunError: the run has not come to its end.
    """
    folder = Path(name).expanduser()
    if (folder / "run.json").is_file():
        fitted = load_run(folder, finished=True, mesh=mesh)
        return slice_subnet(fitted.model, fitted.space.named(subnet or "maxnet"), lora=fitted.lora)
    model = from_pretrained(name, sharding=None if mesh is None else partial(sharding_of, mesh))
    if subnet is None:
        return model
    return slice_subnet(model, SubnetSpace.from_ratios(model.config, width=WIDTH, depth=DEPTH).named(subnet))
