"""Entries of config.json that decoders share: sizes, token ids, rope, windows; read strictly, old spellings too."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mlfs_jax.backbone.layers import ACTIVATIONS
from mlfs_jax.config import SIZES, DecoderConfig, Rope, check_size
from mlfs_jax.errors import ConfigError

Fields = Mapping[str, tuple[str, object]]
"""Our config field -> (their entry, transformers' default when config.json leaves it out)."""

_ROPE_TYPES = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}
_ROPE_ENTRIES = {
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings",
    "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim",
    "truncate",
}  # fmt: skip
_ROPE_HINTS = {
    "dynamic": " Within max_position_embeddings it is the same as 'default': say that, if no longer text is needed.",
    "longrope": " Phi-3's short-context checkpoints have 'default'.",
}
_LAYER_TYPES = ("full_attention", "sliding_attention")


def renamed(hf: Mapping, **names: str) -> dict:
    """config.json with the entries ``names`` under the other name that transformers knows them by."""
    return {new: hf[old] for old, new in names.items() if old in hf} | dict(hf)


def read(hf: Mapping, fields: Fields) -> dict:
    """Our values of ``fields``. Sizes that follow from others are filled in, token ids are brought into our form."""
    values = {ours: hf.get(theirs, default) for ours, (theirs, default) in fields.items()}
    theirs = {ours: entry for ours, (entry, _) in fields.items()}
    if values.get("activation", "silu") not in ACTIVATIONS:
        raise ConfigError(
            f"{theirs['activation']} = {values['activation']!r} in config.json: expected one of "
            f"{', '.join(ACTIVATIONS)}."
        )
    for ours in SIZES:
        if values.get(ours) is not None:
            check_size(theirs[ours], values[ours])
    if values.get("kv_heads") is None:
        values["kv_heads"] = values["heads"]
    if values.get("head_dim") is None:
        values["head_dim"], rest = divmod(values["embed"], values["heads"])
        if rest:
            raise ConfigError(
                f"{theirs['embed']} = {values['embed']} is not a multiple of {theirs['heads']} = {values['heads']}, "
                "and config.json does not say the size of a head."
            )
    ends = values["eos_token_ids"]
    values["eos_token_ids"] = () if ends is None else (ends,) if isinstance(ends, int) else tuple(ends)
    values["pad_token_id"] = values["pad_token_id"] or 0  # what is padded is masked: any token will do
    return values


def write(config: DecoderConfig, fields: Fields) -> dict:
    """The entries of ``fields``; the inverse of :func:`read`."""
    hf = {theirs: getattr(config, ours) for ours, (theirs, _) in fields.items()}
    if fields.get("head_dim") == ("head_dim", None) and config.heads * config.head_dim == config.embed:
        del hf["head_dim"]  # what follows is not said, or not known to other readers
    ends, no_pad = config.eos_token_ids, fields["pad_token_id"][1] is None and config.pad_token_id == 0
    hf["eos_token_id"] = (None if not ends else ends[0]) if len(ends) < 2 else [*ends]
    hf["pad_token_id"] = None if no_pad else config.pad_token_id
    return hf


def read_rope(hf: Mapping, values: Mapping, *, partial: float | None = None, head_dim: int | None = None,
              interleaved: bool = False, parameters: Mapping | None = None, theta: float = 1e4,
              kinds: Collection[str] = tuple(_ROPE_TYPES)) -> Rope:  # fmt: skip
    """The rotary embedding of a config.json, in transformers 5's spelling (``rope_parameters``) or an older one.

    Args:
        values: our config values so far (``head_dim``, ``max_positions``).
        partial: share of a head that is rotated when config.json does not say it; None: always the whole head.
        head_dim: channels that may be rotated, if not those of a head.
        parameters: the dict itself, where there are several (Gemma 3).
        theta: when config.json does not say it.
        kinds: the values of ``rope_type`` that this family has.
    """
    if parameters is None:
        parameters = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
        theta = theta if hf.get("rope_theta") is None else hf["rope_theta"]
    if not isinstance(parameters, Mapping):
        raise ConfigError(f"rope_parameters = {parameters!r} in config.json: expected an object.")
    get = lambda name, default=None: default if parameters.get(name) is None else parameters[name]  # noqa: E731
    kind = get("rope_type", get("type", "default"))
    if kind not in kinds:
        raise ConfigError(
            f"rope_type = {kind!r} in config.json: expected one of {', '.join(kinds)}.{_ROPE_HINTS.get(kind, '')}"
        )
    if strange := parameters.keys() - _ROPE_ENTRIES:
        raise ConfigError(f"rope_parameters in config.json has {', '.join(sorted(strange))}, which is not known here.")
    share = get("partial_rotary_factor", hf.get("partial_rotary_factor", partial))
    if partial is None and share not in (None, 1):
        raise ConfigError(f"partial_rotary_factor = {share} in config.json: this family rotates whole heads.")
    rope: dict[str, Any] = {
        "theta": float(get("rope_theta", theta)),
        "dim": int((head_dim or values["head_dim"]) * (1 if share is None else share)),
        "interleaved": interleaved,
        "scaling": _ROPE_TYPES[kind],
    }
    if kind != "default":
        rope["factor"] = get("factor")
    if kind in ("llama3", "yarn"):
        original = get("original_max_position_embeddings", values["max_positions"])
        rope["original_positions"] = hf.get("original_max_position_embeddings") or original
    if kind == "llama3":
        rope |= {"low_freq": get("low_freq_factor"), "high_freq": get("high_freq_factor")}
    if kind == "yarn":
        factor = rope["factor"] = get("factor", values["max_positions"] / rope["original_positions"])
        rope |= {"beta_fast": get("beta_fast", 32.0), "beta_slow": get("beta_slow", 1.0)}
        rope |= {"truncate": get("truncate", True), "attention_factor": get("attention_factor")}
        if rope["attention_factor"] is None and get("mscale") and get("mscale_all_dim"):
            grown = [0.1 * get(name) * math.log(max(factor, 1)) + 1 for name in ("mscale", "mscale_all_dim")]
            rope["attention_factor"] = grown[0] / grown[1]
    if None in (rope.get("factor", 1), rope.get("low_freq", 1), rope.get("high_freq", 1)):
        raise ConfigError(f"rope_parameters = {dict(parameters)} in config.json: {kind!r} needs more than that.")
    return Rope(**rope)


def write_rope(rope: Rope, *, head_dim: int | None = None) -> dict:
    """The dict ``rope_parameters``; with ``head_dim``, it says which share of a head is rotated."""
    kind = next(theirs for theirs, ours in _ROPE_TYPES.items() if ours == rope.scaling)
    parameters: dict = {"rope_type": kind, "rope_theta": rope.theta}
    if head_dim is not None:
        share = rope.dim / head_dim
        parameters["partial_rotary_factor"] = share if int(head_dim * share) == rope.dim else math.nextafter(share, 2)
    if kind != "default":
        parameters["factor"] = rope.factor
    if kind in ("llama3", "yarn"):
        parameters["original_max_position_embeddings"] = rope.original_positions
    if kind == "llama3":
        parameters |= {"low_freq_factor": rope.low_freq, "high_freq_factor": rope.high_freq}
    if kind == "yarn":
        parameters |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
        if rope.attention_factor is not None:
            parameters["attention_factor"] = rope.attention_factor
    return parameters


def read_windows(types: Sequence[str], window: int | None, layers: int) -> tuple[int, ...]:
    """Our windows from ``layer_types`` and ``sliding_window``."""
    if len(types) != layers or not {*types} <= {*_LAYER_TYPES}:
        raise ConfigError(f"layer_types = {[*types]} in config.json: expected {layers} of {' or '.join(_LAYER_TYPES)}.")
    if _LAYER_TYPES[1] not in types:
        return ()
    if not window or window < 1:
        raise ConfigError(f"sliding_window = {window} in config.json: layers of {_LAYER_TYPES[1]} need one.")
    return tuple(window if kind == _LAYER_TYPES[1] else 0 for kind in types)


def write_windows(config: DecoderConfig) -> tuple[list[str], int | None]:
    """(``layer_types``, ``sliding_window``); the inverse of :func:`read_windows`."""
    windows = config.windows or (0,) * config.layers
    sizes = sorted({*windows} - {0})
    if len(sizes) > 1:
        raise ConfigError(f"windows of {sizes}: {config.family} at Hugging Face has one sliding_window for all layers.")
    return [_LAYER_TYPES[w > 0] for w in windows], sizes[0] if sizes else None


def write_one_window(config: DecoderConfig) -> int | None:
    """``sliding_window`` of a family whose layers all have it, or none."""
    types, window = write_windows(config)
    if len({*types}) > 1:
        raise ConfigError(
            f"windows = {config.windows}: {config.family} at Hugging Face has the same window in all layers, or none."
        )
    return window
