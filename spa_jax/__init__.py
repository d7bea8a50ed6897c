"""SPA in JAX: a personal side network on the device, beside a frozen language model in the cloud."""

import importlib

from mlfs_jax import __version__  # noqa: F401  one version for both packages

# name -> where it lives; imported when it is first used (PEP 562), so that `spa --help` does not wait for jax
_HOME = {
    "baselines": ("BaselineConfig", "fit_baseline"),
    "config": ("FitConfig",),
    "decode": ("SideGenerated", "Split", "generate"),
    "evaluate": ("evaluate_baseline", "evaluate_plugin", "evaluate_run"),
    "gate": ("choose_threshold",),
    "gate_fit": ("GateConfig", "fit_gate"),
    "model": ("CloudState", "SideOutput", "cloud_finish", "cloud_step", "forward"),
    "plugin": ("Plugin", "load_plugin", "save_plugin"),
    "score": ("TokenScores", "score_tokens"),
    "seam": ("Frame", "Setting"),
    "side": ("Side", "SideCache", "SideConfig", "device_step", "init_side_cache", "lift", "project", "side_axes"),
    "start": ("init_side",),
    "train": ("fit", "fit_users", "load_run"),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted(_MODULE)


def __getattr__(name: str):
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
