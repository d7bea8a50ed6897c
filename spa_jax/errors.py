"""The mistakes a user of plugins can make; those of data, models and runs are in :mod:`mlfs_jax.errors`."""

from mlfs_jax.errors import MLFSError


class PluginError(MLFSError, ValueError):
    """A plugin that does not fit: made for another base or tokenizer, damaged, or of another format."""


class TapCacheError(MLFSError):
    """A cache of ladder activations that cannot be used: it would grow over its bound, or is of something else."""
