"""config.json <-> EncoderConfig; each way refuses what the other side cannot express, and says why."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from mlfs_jax.backbone.layers import ACTIVATIONS
from mlfs_jax.config import EncoderConfig
from mlfs_jax.errors import ConfigError, unknown
from mlfs_jax.hf.families import FAMILIES
from mlfs_jax.hf.table import Family

# Switches of their configs that change the function; what is listed is the only value that is built here.
_ONLY = {
    "position_embedding_type": ("absolute", "relative positions are not built here"),
    "is_decoder": (False, "causal attention is not built for encoders"),
    "add_cross_attention": (False, "cross attention is not built for encoders"),
    "pruned_heads": ({}, "load it in transformers and save it unpruned: stacked layers need equal head counts"),
}


def family_of(hf: Mapping) -> Family:
    """The table for a config.json.

    Raises:
        ConfigError: it has no ``model_type``.
        UnknownNameError: its family is not built here.
    """
    if not isinstance(hf.get("model_type"), str):
        raise ConfigError(
            f"config.json has model_type {hf.get('model_type')!r}: expected one of {', '.join(FAMILIES)}."
        )
    if hf["model_type"] not in FAMILIES:
        raise unknown("model family (model_type in config.json)", hf["model_type"], FAMILIES)
    return FAMILIES[hf["model_type"]]


def from_hf(
    hf: Mapping,
    *,
    head: str | None = None,
    labels: int | None = None,
    problem: str | None = None,
    pooler: bool = False,
) -> EncoderConfig:
    """A config.json as an EncoderConfig.

    Args:
        head, labels, problem: None takes the checkpoint's own. ``labels`` counts for sequence and token heads only.
        pooler: keep the pooler of a base model (config.json does not say whether the weights have one).

    Raises:
        ConfigError: it needs something that is not built here; the message names the entry.
    """
    family = family_of(hf)
    for entry, (only, why) in _ONLY.items():
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
        raise ConfigError(f"head = {head!r}: expected one of {', '.join(family.heads)}.")
    if head == "mlm" and not hf.get("tie_word_embeddings", True):
        raise ConfigError("tie_word_embeddings = false in config.json: the mlm head here uses the token table itself.")

    values = {}
    for ours, (theirs, default) in family.fields.items():
        values[ours] = hf[theirs] if hf.get(theirs) is not None else default
    values |= family.implied(values)
    if values["activation"] not in ACTIVATIONS:
        theirs = family.fields["activation"][0]
        raise ConfigError(
            f"{theirs} = {values['activation']!r} in config.json: expected one of {', '.join(ACTIVATIONS)}."
        )
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
        values["problem"] = problem or _own_problem(hf)
    return EncoderConfig(
        family=family.name, head_dim=embed // heads, head=head, pooler=pooler and head == "none", **values
    )


def own_labels(hf: Mapping) -> int:
    """Number of labels of a checkpoint's own classifier (Hugging Face's default is 2)."""
    return len(hf["id2label"]) if hf.get("id2label") else hf.get("num_labels") or 2


def _own_problem(hf: Mapping) -> str:
    problem = hf.get("problem_type") or "single_label_classification"
    known = {"single_label_classification": "classification", "regression": "regression"}
    if problem not in known:
        raise ConfigError(
            f"problem_type = {problem!r} in config.json: expected one of {', '.join(known)}; pass problem= to choose."
        )
    return known[problem]


def to_hf(config: EncoderConfig, *, label_names: Sequence[str] | None = None) -> dict:
    """An EncoderConfig as the dict of a config.json.

    What a family cannot express is found by reading the result back.

    Raises:
        ConfigError: the family has no way to say some field; the message names it, its value, and what would be read.
    """
    if config.family not in FAMILIES:
        raise unknown("model family", config.family, FAMILIES)
    family = FAMILIES[config.family]
    hf = {"model_type": family.name, "architectures": [family.architectures[config.head]], "dtype": "float32"}
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
    read = from_hf(hf, pooler=config.pooler)
    odd = [f for f in dataclasses.fields(config) if getattr(read, f.name) != getattr(config, f.name)]
    if odd:
        said = (f"{f.name} = {getattr(config, f.name)!r} (read back: {getattr(read, f.name)!r})" for f in odd)
        raise ConfigError(f"{family.name} at Hugging Face cannot express {', '.join(said)}.")
    return hf
