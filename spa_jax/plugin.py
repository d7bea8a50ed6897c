"""A plugin on disk: a side network and its gate as two small files, and what they were made for.

    plugin.safetensors   net/<name>, gate/<name>
    plugin.json          shapes, setting, threshold, calibration; fingerprints of base and tokenizer

A plugin is a change to one base, read in one tokenizer's ids. Beside any other base it would run and write nonsense, so
it knows both by fingerprint and refuses others.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy as safetensors
from safetensors import SafetensorError

from mlfs_jax.backbone.tree import flatten
from mlfs_jax.config import DecoderConfig, Latent, Rope
from mlfs_jax.errors import ConfigError
from mlfs_jax.fingerprint import base_fingerprint
from mlfs_jax.run import write_atomic, write_json
from spa_jax.errors import PluginError
from spa_jax.seam import Setting
from spa_jax.side import Side, SideConfig, abstract_net

FORMAT = 1
WEIGHTS, DESCRIPTION = "plugin.safetensors", "plugin.json"


def tokenizer_fingerprint(folder: str | Path) -> str:
    """Of the tokenizer in a model's folder: which ids its vocabulary gives to which pieces of text."""
    from mlfs_jax.data.tokenizer import load_tokenizer

    vocabulary = sorted(load_tokenizer(folder).get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


@dataclass(frozen=True)
class Plugin:
    """A side network with all that is needed to use it.

    Attributes:
        side: its weights and shapes.
        setting: it was trained for.
        threshold: of the gate, chosen on held-out data for ``usage``.
        usage: wanted share of tokens.
        base, tokenizer: fingerprints.
        model: name of the base, for people.
        base_bits: how many the base's layers were kept in (:meth:`mlfs_jax.Model.quantise`).
        user: whose it is; None: nobody's in particular.
        calibration: threshold and loss over usage, see :func:`spa_jax.gate.calibration_curve`.
    """

    side: Side
    setting: Setting
    base: str
    tokenizer: str
    threshold: float = 0.5
    usage: float | None = None
    model: str = "model"
    base_bits: int = 32
    user: str | None = None
    calibration: list[dict[str, float]] = field(default_factory=list)

    def replace(self, **changes) -> Plugin:
        return dataclasses.replace(self, **changes)

    def threshold_for(self, usage: float | None) -> float:
        """The threshold for another usage than the plugin's own, from its calibration curve.

        Raises:
            ConfigError: a usage outside [0, 1], or a plugin whose setting has no gate.
        """
        from spa_jax.gate import ALWAYS, NEVER, check_usage

        if usage is None:
            return self.threshold
        check_usage(usage)
        if not self.calibration:
            raise ConfigError(f"usage = {usage}: this plugin's setting is {self.setting}, which has no gate to set.")
        if usage in (0, 1):
            return NEVER if usage == 0 else ALWAYS
        known = sorted((point["usage"], point["threshold"]) for point in self.calibration)
        usages, thresholds = zip(*known, strict=True)
        return float(np.interp(usage, usages, thresholds))

    def check(self, config: DecoderConfig, base: Any = None, tokenizer: str | Path | None = None) -> Plugin:
        """The plugin itself, if it was made for this base (and the tokenizer in this folder).

        Raises:
            PluginError: it was not; the message says in what they differ.
        """
        self.side.check(config)
        if base is not None and base_fingerprint(config, base) != self.base:
            bits = "" if self.base_bits == 32 else f", in {self.base_bits} bits"
            raise PluginError(
                f"this plugin was made for another base ({self.model}{bits}): same shape, other weights. Beside this "
                "one it would write nonsense; load the base it was made for, or fit a new plugin."
            )
        if tokenizer is not None and tokenizer_fingerprint(tokenizer) != self.tokenizer:
            raise PluginError(
                f"this plugin was made with another tokenizer than the one in {tokenizer}: its token ids mean other "
                "texts. Use the tokenizer of the base it was made for."
            )
        return self


def save_plugin(folder: str | Path, plugin: Plugin) -> Path:
    """Write a plugin into a folder, each file in one rename; returns the weights' file."""
    folder, side = Path(folder), plugin.side
    flat = {f"net/{name}": np.asarray(x, np.float32) for name, x in side.net.items()}
    flat |= {f"gate/{name}": np.asarray(x, np.float32) for name, x in side.gate.items()}
    content = safetensors.save(flat)
    described = {"format": FORMAT, "sha256": hashlib.sha256(content).hexdigest()}
    described |= {f.name: getattr(plugin, f.name) for f in dataclasses.fields(plugin) if f.name != "side"}
    described |= {"side": dataclasses.asdict(side.config), "backbone": dataclasses.asdict(side.backbone)}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / WEIGHTS, content)
    write_json(folder / DESCRIPTION, described)
    return folder / WEIGHTS


def load_plugin(folder: str | Path) -> Plugin:
    """Read what :func:`save_plugin` wrote.

    Raises:
        PluginError: there is none, it is damaged, or of another format.
    """
    folder = Path(folder)
    try:
        described = json.loads((folder / DESCRIPTION).read_bytes())
        content = (folder / WEIGHTS).read_bytes()
    except FileNotFoundError as e:
        raise PluginError(
            f"{folder} holds no plugin (no {Path(e.filename).name}): give the folder of a finished `spa fit`."
        ) from None
    except (OSError, ValueError) as e:
        raise PluginError(f"the plugin in {folder} cannot be read: {e}.") from e
    if not isinstance(described, dict) or described.pop("format", None) != FORMAT:
        raise PluginError(
            f"{folder / DESCRIPTION} is not of format {FORMAT}: use the version of spa_jax that wrote it."
        )
    if described.pop("sha256", None) != hashlib.sha256(content).hexdigest():
        raise PluginError(f"the plugin in {folder} is damaged: its two files do not belong together.")
    try:
        config = SideConfig(**described.pop("side"))
        backbone = decoder_config(described.pop("backbone"))
        weights = safetensors.load(content)
        setting = Setting.parse(described.pop("setting"))
        trees: dict[str, dict] = {"net": {}, "gate": {}}
        for name, value in weights.items():
            tree, _, leaf = name.partition("/")
            trees[tree][leaf] = jnp.asarray(value)
        side = Side(trees["net"], trees["gate"], config, backbone)
        plugin = Plugin(side=side, setting=setting, **described)
    except (TypeError, KeyError, SafetensorError, ConfigError) as e:
        raise PluginError(f"the plugin in {folder} is damaged: {e}.") from e
    expected = {name: leaf.shape for name, leaf in flatten(abstract_net(config, backbone)[1]).items()}
    found = {name: x.shape for name, x in side.net.items()}
    if expected != found:
        wrong = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))[0]
        raise PluginError(
            f"the plugin in {folder} does not fit its own description at {wrong}: expected shape "
            f"{expected.get(wrong)}, found {found.get(wrong)}."
        )
    return plugin


def decoder_config(saved: Mapping[str, Any]) -> DecoderConfig:
    """A DecoderConfig after a trip through JSON."""
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
    for name, kind in (("rope", Rope), ("local_rope", Rope), ("latent", Latent)):
        if fields.get(name) is not None:
            fields[name] = kind(**fields[name])
    return DecoderConfig(**fields)
