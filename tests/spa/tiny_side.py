"""Small side networks that do something: no weight is left at zero."""

import jax
import numpy as np

from mlfs_jax.model import Model
from spa_jax.side import Side, SideConfig
from spa_jax.start import init_side

LADDER = SideConfig(width=8, every=2, heads=2, mlp=6)
PLUGIN = SideConfig(ladder="plugin", width=4, every=2, mlp=10)
KINDS = {
    "ladder": LADDER,
    "plugin": PLUGIN,
    "plugin-parallel": SideConfig(ladder="plugin", width=4, every=1, mlp=10, order="parallel"),
}


def tiny_side(model: Model, config: SideConfig = LADDER, seed: int = 0, setting: str = "spa") -> Side:
    key = jax.random.key(0)
    shapes = jax.eval_shape(lambda: init_side(key, model.config, config, setting=setting))
    rng = np.random.default_rng(seed)
    filled = lambda path, x: rng.normal("scale" in jax.tree_util.keystr(path), 0.3, x.shape).astype(np.float32)  # noqa: E731
    return jax.tree_util.tree_map_with_path(filled, shapes)
