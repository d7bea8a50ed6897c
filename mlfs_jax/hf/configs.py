"""config.json <-> our config; each way refuses what the other side cannot express, and says why."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from mlfs_jax.backbone.layers import ACTIVATIONS
from mlfs_jax.config import SIZES, Config, DecoderConfig, EncoderConfig, check_size
from mlfs_jax.errors import ConfigError, unknown
from mlfs_jax.hf.families import FAMILIES, NOT_NATIVE
from mlfs_jax.hf.table import DecoderFamily, EncoderFamily

# Switches of their configs that change the function; what is listed is the only value that is built here.
_ONLY = {
    "position_embedding_type": ("absolute", "relative positions are not built here"),
    "is_decoder": (False, "causal attention is not built for encoders"),
    "add_cross_attention": (False, "cross attention is not built for encoders"),
    "pruned_heads": ({}, "load it in transformers and save it unpruned: stacked layers need equal head counts"),
}

_ONLY_DECODERS = {
    "is_encoder_decoder": (False, "encoders with a decoder are not built here"),
    "add_cross_attention": (False, "cross attention is not built here"),
    "use_bidirectional_attention": (False, "decoders are causal here"),
    "quantization_config": (None, "load it in transformers and save it dequantised"),
}


def family_of(hf: Mapping) -> EncoderFamily | DecoderFamily:
    """The table for a config.json.

    Raises:
        ConfigError: it has no ``model_type``, or one that transformers 5 has no class for.
        UnknownNameError: its family is not built here.
    """
    if not isinstance(hf.get("model_type"), str):
        raise ConfigError(
            f"config.json has model_type {hf.get('model_type')!r}: expected one of {', '.join(FAMILIES)}."
        )
    name, architecture = hf["model_type"], (hf.get("architectures") or [None])[0]
    for key in (architecture, name):
        if key in NOT_NATIVE and not (key == name and name in FAMILIES):
            what, nearest = NOT_NATIVE[key]
            raise ConfigError(
                f"{key!r} in config.json is {what}, which transformers 5 has no class for, so it is not built here. "
                f"The nearest family that is: {nearest}."
            )
    if name not in FAMILIES:
        raise unknown("model family (model_type in config.json)", name, FAMILIES)
    return FAMILIES[name]


def from_hf(
    hf: Mapping,
    *,
    head: str | None = None,
    labels: int | None = None,
    problem: str | None = None,
    pooler: bool = False,
) -> Config:
    """A config.json as our config.

    Args:
        head, labels, problem: None takes the checkpoint's own. ``labels`` counts for sequence and token heads only.
        pooler: keep the pooler of a base model (config.json does not say whether the weights have one).

    Raises:
        ConfigError: it needs something that is not built here; the message names the entry.
    """
    family = family_of(hf)
    rules = _ONLY
    if isinstance(family, DecoderFamily):
        rules = _ONLY_DECODERS | {e: (v, "another is not built") for e, v in family.only.items()}
    for entry, (only, why) in rules.items():
        if (hf.get(entry) or only) != only:
            raise ConfigError(f"{entry} = {hf[entry]!r} in config.json: only {only!r} works here; {why}.")
    if head is None:
        head = family.own_head(hf.get("architectures"))
        if head is None:
            raise ConfigError(
                f"architectures = {hf.get('architectures')!r} in config.json: expected one of "
                f"{', '.join(family.architectures.values())}. Pass head= ({', '.join(family.heads)}) to load the "
                "backbone with that head."
            )
    if head not in family.heads:
        hint = " This is an encoder; for texts that go on, give a language model, such as smollm2-135m."
        heads = f"a {hf['model_type']} has {', '.join(family.heads)}."
        raise ConfigError(f"head = {head!r}: {heads}{hint if head == 'lm' else ''}")
    if isinstance(family, DecoderFamily):
        if labels is not None or problem is not None:
            raise ConfigError(
                f"labels = {labels}, problem = {problem!r}: the head of a {family.name} decoder has none."
            )
        return family.from_hf(hf).replace(head=head)
    if head not in ("sequence", "token") and (labels, problem) != (None, None):
        raise ConfigError(
            f"labels = {labels}, problem = {problem!r}: head {head!r} has none; give head = 'sequence' or 'token' too."
        )
    return _encoder(family, hf, head, labels, problem, pooler and "pooler.dense" in family.heads["none"])


def _encoder(
    family: EncoderFamily, hf: Mapping, head: str, labels: int | None, problem: str | None, pooler: bool
) -> EncoderConfig:
    if head == "mlm" and not hf.get("tie_word_embeddings", True):
        raise ConfigError("tie_word_embeddings = false in config.json: the mlm head here uses the token table itself.")

    values: dict[str, Any] = {}
    for ours, (theirs, default) in family.fields.items():
        values[ours] = hf[theirs] if hf.get(theirs) is not None else default
    values |= family.implied(values)
    if values["activation"] not in ACTIVATIONS:
        theirs = family.fields["activation"][0]
        raise ConfigError(
            f"{theirs} = {values['activation']!r} in config.json: expected one of {', '.join(ACTIVATIONS)}."
        )
    for ours in family.fields:
        if ours in SIZES:
            check_size(family.fields[ours][0], values[ours])
    embed, heads = values["embed"], values["heads"]
    if embed % heads:
        raise ConfigError(
            f"{family.fields['embed'][0]} = {embed} is not a multiple of {family.fields['heads'][0]} = {heads}."
        )
    if values.get("embedding_size") == embed:
        values["embedding_size"] = None  # Hugging Face projects only where the widths differ
    if head in family.head_activation:
        values["head_activation"] = family.head_activation[head] or values["activation"]
    if head in ("sequence", "token"):
        values["labels"] = own_labels(hf) if labels is None else labels
    if head == "sequence":
        values["problem"] = problem or _own_problem(hf, values["labels"])
    return EncoderConfig(
        family=family.name, head_dim=embed // heads, head=head, pooler=pooler and head == "none", **values
    )


def own_labels(hf: Mapping) -> int:
    """Number of labels of a checkpoint's own classifier (Hugging Face's default is 2)."""
    return len(hf["id2label"]) if hf.get("id2label") else hf.get("num_labels") or 2


def label_names(hf: Mapping) -> tuple[str, ...]:
    """What config.json calls a classifier's labels, in order; () where it does not say."""
    names = hf.get("id2label") or {}
    return tuple(str(names[i]) for i in sorted(names, key=int))


def _own_problem(hf: Mapping, labels: int) -> str:
    """As transformers takes it: one label is a score, where config.json does not say otherwise."""
    problem = hf.get("problem_type") or ("regression" if labels == 1 else "single_label_classification")
    known = {"single_label_classification": "classification", "regression": "regression"}
    if problem not in known:
        raise ConfigError(
            f"problem_type = {problem!r} in config.json: expected one of {', '.join(known)}; pass problem= to choose."
        )
    return known[problem]


def to_hf(config: Config, *, label_names: Sequence[str] | None = None) -> dict:
    """Our config as the dict of a config.json.

    What a family cannot express is found by reading the result back.

    Raises:
        ConfigError: the family has no way to say some field; the message names it, its value, and what would be read.
    """
    if config.family not in FAMILIES:
        raise unknown("model family", config.family, FAMILIES)
    family = FAMILIES[config.family]
    hf = {"model_type": family.name, "architectures": [family.architectures[config.head]], "dtype": "float32"}
    if isinstance(config, DecoderConfig):
        if label_names is not None:
            raise ConfigError(f"label_names = {[*label_names]}: the head of a decoder has no labels.")
        hf |= family.to_hf(config)
        read = from_hf(hf)
    else:
        hf |= _encoder_entries(family, config, label_names)
        read = from_hf(hf, pooler=config.pooler)
    odd = [f.name for f in dataclasses.fields(config) if not _same(getattr(read, f.name), getattr(config, f.name))]
    if odd:
        said = (f"{name} = {getattr(config, name)!r} (read back: {getattr(read, name)!r})" for name in odd)
        raise ConfigError(f"{family.name} at Hugging Face cannot express {', '.join(said)}.")
    return hf


def _same(a: object, b: object) -> bool:
    """Equal, numbers to rounding: some entries of config.json are quotients of ours."""
    if isinstance(a, float) and isinstance(b, float | int):
        return math.isclose(a, b, rel_tol=1e-12)
    if dataclasses.is_dataclass(a) and type(a) is type(b):
        return all(_same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    return a == b


def _encoder_entries(family: EncoderFamily, config: EncoderConfig, label_names: Sequence[str] | None) -> dict:
    hf = {}
    width = {"embedding_size": config.embedding_size or config.embed}  # theirs is never empty
    for ours, (theirs, _) in family.fields.items():
        hf[theirs] = width.get(ours, getattr(config, ours))
    if config.labels:
        names = [f"LABEL_{i}" for i in range(config.labels)] if label_names is None else [*label_names]
        if len(names) != config.labels or len(set(names)) != len(names):
            raise ConfigError(f"{len(names)} label names {names}: expected {config.labels} different ones.")
        hf |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    if config.head == "sequence":
        regression = config.problem == "regression"
        hf["problem_type"] = "regression" if regression else "single_label_classification"
    if config.head == "mlm":
        hf["tie_word_embeddings"] = True
    if config.embed % config.heads:
        raise ConfigError(
            f"{family.name} at Hugging Face needs embed ({config.embed}) to be a multiple of heads ({config.heads})."
        )
    return hf
