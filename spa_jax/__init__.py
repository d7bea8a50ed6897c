"""SPA in JAX: a personal side network on the device, beside a frozen language model in the cloud."""

from mlfs_jax import __version__  # noqa: F401  one version for both packages
from mlfs_jax.front_door import open_front_door

__all__ = open_front_door(
    __name__,
    {
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
    },
)
