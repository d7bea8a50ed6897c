"""Which knob makes a training step fit: the plan again with one thing changed, each compiled, not guessed."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from mlfs_jax.config import Config
from mlfs_jax.errors import ConfigError
from mlfs_jax.fit_config import FitConfig
from mlfs_jax.plan import Plan, plan
from mlfs_jax.sharding import make_mesh

UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
GIB = 2**30


def parse_bytes(text: str) -> int:
    """``"80GiB"`` as a number of bytes; GB is 10^9.

    Raises:
        ConfigError: it is no number with a unit.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([a-zA-Z]+)", text.strip())
    if found is None or found[2].lower() not in UNITS:
        raise ConfigError(f"memory {text!r}: expected a number with a unit such as 80GiB or 16GB.")
    return round(float(found[1]) * UNITS[found[2].lower()])


MOST_DEVICES = 4096


def use_virtual_devices(least: int) -> None:
    """Let jax have virtual CPU devices and no accelerator, before anything else in the process uses it.

    There will be twice as many as asked for: a knob may double them.

    Raises:
        ConfigError: too many of them, or jax has started already, with fewer than ``least``.
    """
    if least > MOST_DEVICES:
        raise ConfigError(f"a mesh of {least:,} devices: at most {MOST_DEVICES:,} can be planned for.")
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 2 * least)
    except RuntimeError:  # it has started
        if len(jax.devices("cpu")) < least:
            raise ConfigError(
                f"{least} virtual devices are needed, and jax has already started with {len(jax.devices('cpu'))}: "
                "plan in a process of its own, as `mlfs plan` does."
            ) from None


@dataclass(frozen=True)
class Setting:
    """What is planned: the arguments of :func:`mlfs_jax.plan.plan` that a knob turns. ``mesh``: axis -> size."""

    mesh: dict[str, int]
    fit: FitConfig
    length: int

    @property
    def devices(self) -> int:
        return math.prod(self.mesh.values())

    @property
    def mesh_spec(self) -> str:
        return ",".join(f"{axis}={size}" for axis, size in self.mesh.items())

    def plan(self, config: Config, stage: int) -> Plan:
        """See :func:`mlfs_jax.plan.plan`; takes the first of this process's devices."""
        return plan(config, make_mesh(self.mesh_spec, jax.devices()[: self.devices]), self.fit, self.length, stage)

    def turned(self) -> dict[str, Setting]:
        """What to type -> the setting with that one knob turned, all of which need at most twice the devices."""
        fit, mesh = self.fit, self.mesh
        turned: dict[str, dict[str, Any]] = {}
        rows = fit.batch_size // (mesh["data"] * mesh["fsdp"])
        if fit.dtype == "float32":
            turned["--dtype bfloat16"] = {"fit": dataclasses.replace(fit, dtype="bfloat16")}
        if not fit.remat:
            turned["--remat"] = {"fit": dataclasses.replace(fit, remat=True)}
        if rows % 2 == 0:
            half = fit.batch_size // 2
            turned[f"--batch-size {half}"] = {"fit": dataclasses.replace(fit, batch_size=half)}
        if self.length % 2 == 0:
            turned[f"--length {self.length // 2}"] = {"length": self.length // 2}
        if isinstance(fit.rank, int) and fit.rank % 2 == 0:
            turned[f"--rank {fit.rank // 2}"] = {"fit": dataclasses.replace(fit, rank=fit.rank // 2)}
        meshes = [mesh | {"tensor": 2 * mesh["tensor"]}]
        if mesh["data"] % 2 == 0:
            meshes.append(mesh | {"data": mesh["data"] // 2, "fsdp": 2 * mesh["fsdp"]})
        if rows % 2 == 0:
            meshes.append(mesh | {"fsdp": 2 * mesh["fsdp"]})
        for changed in meshes:
            setting = dataclasses.replace(self, mesh=changed)
            turned[f"--mesh {setting.mesh_spec}"] = {"mesh": changed}
        return {typed: dataclasses.replace(self, **changes) for typed, changes in turned.items()}


def table(planned: Plan, title: str) -> Any:
    """The bytes of a device, for a terminal."""
    from rich.table import Table

    shown = Table("on every device", title=title)
    shown.add_column("GiB", justify="right")
    shown.add_column("share", justify="right")
    for name, size in planned.nbytes.items():
        shown.add_row(name, f"{size / GIB:.3f}", f"{size / planned.peak:.1%}")
    shown.add_section()
    shown.add_row(f"at the peak ({planned.highest.name})", f"{planned.peak / GIB:.3f}", "")
    return shown


def work_table(planned: Plan) -> Any:
    """FLOPs and collectives of a step on a device, for a terminal."""
    from rich.table import Table

    shown = Table("in every step, on every device")
    shown.add_column("count", justify="right")
    shown.add_column("", justify="right")
    cost = planned.cost
    shown.add_row("matrix products", "", f"{cost.flops / 1e12:,.3f} TFLOP")
    for kind, found in cost.collectives.items():
        shown.add_row(kind, f"{found.count:,}", f"{found.nbytes / GIB:,.3f} GiB")
    return shown


def knobs_table(found: Mapping[str, Plan], memory: int) -> Any:
    """What each knob alone makes of the peak, least first."""
    from rich.table import Table

    shown = Table("instead")
    shown.add_column("GiB at the peak", justify="right")
    shown.add_column("fits")
    for typed, planned in sorted(found.items(), key=lambda item: item[1].peak):
        shown.add_row(typed, f"{planned.peak / GIB:.3f}", "yes" if planned.peak <= memory else "no")
    return shown


def plan_and_turn(
    config: Config, setting: Setting, stage: int, memory: int | None, advance: Callable[[str], None]
) -> tuple[Plan, dict[str, Plan]]:
    """The plan, and where it needs more than ``memory`` bytes, the plans with one knob turned.

    Args:
        advance: told what is being compiled.
    """
    advance("compiling the step")
    planned, found = setting.plan(config, stage), {}
    if memory is not None and planned.peak > memory:
        for typed, other in setting.turned().items():
            if other.devices <= jax.device_count():
                advance(f"compiling with {typed}")
                found[typed] = other.plan(config, stage)
    return planned, found
