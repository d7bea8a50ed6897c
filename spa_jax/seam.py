"""What crosses between cloud and device: a frame of ladder activations down, the side network's state up.

Cloud and device code know these types and nothing else of each other.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mlfs_jax.errors import unknown


class Setting(StrEnum):
    """How base f and side network g make one hidden state (SPA, arXiv 2403.07088, section 5.4).

    S1: h = f + g, always. S2: the gate picks f or g, alone. S3: h = g (that is LST). SPA: h = f + sigma g.
    """

    S1 = "s1"
    S2 = "s2"
    S3 = "s3"
    SPA = "spa"

    @property
    def gated(self) -> bool:
        """Whether a gate decides, token by token; else every token takes the round trip."""
        return self in (Setting.S2, Setting.SPA)

    @property
    def adds(self) -> bool:
        """Whether g is added to f; else it stands alone."""
        return self in (Setting.S1, Setting.SPA)

    @classmethod
    def parse(cls, name: str) -> Setting:
        """The setting of this name; raises UnknownNameError."""
        if name not in {*cls}:
            raise unknown("setting", str(name), [str(s) for s in cls])
        return cls(name)


@partial(jax.tree_util.register_dataclass, data_fields=["taps", "positions", "real"], meta_fields=["projected"])
@dataclass(frozen=True)
class Frame:
    """Ladder activations of T positions of each of B texts: all that the side network sees of the backbone.

    Attributes:
        taps: [n + 1, B, T, D]: the input of the first layer, then the outputs of the n tapped layers, each divided by
            its root mean square; [n + 1, B, T, d] when projected.
        positions: of each token in its text, from 0.
        real: False for padding, on either side, and for what the side network does not get to see.
        projected: Down has been applied, in the cloud.
    """

    taps: Float[Array | np.ndarray, "n B T D"]
    positions: Int[Array | np.ndarray, "B T"]
    real: Bool[Array | np.ndarray, "B T"]
    projected: bool = False

    def replace(self, **changes) -> Frame:
        return dataclasses.replace(self, **changes)
