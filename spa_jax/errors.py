"""The mistakes a user of plugins can make; those of data, models and runs are in :mod:`mlfs_jax.errors`."""

from mlfs_jax.errors import MLFSError


class PluginError(MLFSError, ValueError):
    """A plugin that does not fit: made for another base or tokenizer, damaged, or of another format."""


class TapCacheError(MLFSError):
    """A cache of ladder activations that cannot be used: it would grow over its bound, or is of something else."""


class WireError(MLFSError, ValueError):
    """A frame that cannot be sent or read; ``code`` is what an error frame about it says."""

    def __init__(self, message: str, code: str = "bad-frame"):
        super().__init__(message)
        self.code = code


class NetworkError(MLFSError):
    """Cloud and device cannot work together: no server, a refused token, another model; ``code`` as on the wire."""

    def __init__(self, message: str, code: str = "lost"):
        super().__init__(message)
        self.code = code
