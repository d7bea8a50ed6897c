"""Whether a base is still the one that a run or a plugin was made over."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math

import jax.numpy as jnp
import numpy as np
from flax import nnx

from mlfs_jax.backbone.tree import flatten
from mlfs_jax.config import Config
from mlfs_jax.errors import RunError
from mlfs_jax.hosts import decided, to_host
from mlfs_jax.model import Model
from mlfs_jax.run import Run

SAMPLED = 4096
"""Numbers of each weight that go into a base's fingerprint."""


def base_fingerprint(config: Config, base: nnx.State, *, head: bool = True) -> str:
    """What one base is told from another by: its shape, and a few thousand numbers of each weight, in bf16.

    Not all of them, because a large base would take minutes; in bf16, so that it is the same base in float32 and in
    bf16. A quantised one is another base, and so is one that was quantised from other floats.

    Args:
        head: False leaves out the head, which may have been made anew.
    """
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(config), sort_keys=True).encode())
    for name, leaf in sorted(flatten(base).items()):
        if not head and name.startswith("head."):
            continue
        values = leaf[...]
        stride = max(1, values.size // SAMPLED)
        while math.gcd(stride, values.size) > 1:  # or it would meet the same few channels again and again
            stride += 1
        index = np.unravel_index(np.arange(0, values.size, stride), values.shape)
        sample = to_host(values[index].astype(jnp.bfloat16))  # a gather: on no device is there all of a sharded weight
        digest.update(f"{name}{values.shape}".encode() + sample.tobytes())
    return digest.hexdigest()


def hold_base(run: Run, model: Model, *, begin: bool = False) -> None:
    """Hold a run to the weights that it began on; every process of a job is to call this.

    Args:
        begin: the run is open for writing, and learns what its base is, if it does not know yet.

    Raises:
        RunError: these are others.
    """
    found = {"fingerprint": base_fingerprint(model.config, model.base, head=model.config.head == "lm")}
    if decided((run.path / "base.json").exists()):
        if run.read_json("base") != found:
            raise RunError(
                f"the weights of {model.source or model.name} are not those that the run in {run.path} began on: "
                "restore them, or fit again into another folder."
            )
    elif begin:
        run.write_json("base", found)
