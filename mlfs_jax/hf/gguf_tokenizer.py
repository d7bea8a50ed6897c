"""Tokenizers between GGUF metadata and Hugging Face's tokenizer.json; chat templates too.

A GGUF says which tokens, merges and scores there are; how text is cut before merging has only a name,
``tokenizer.ggml.pre``, whose meaning is in llama.cpp's source (src/llama-vocab.cpp). Two kinds are known here: "gpt2",
byte-level BPE, and "llama", SentencePiece's BPE, which stands in tokenizer.json as BPE with byte fallback.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from mlfs_jax.config import DecoderConfig
from mlfs_jax.errors import CheckpointError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Token types of a GGUF."""

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _byte_level(use_regex: bool) -> dict:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(regex: str) -> dict:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _byte_level(False)]}


DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _byte_level(True)]}

PRE_TOKENIZERS = {
    "gpt-2": _byte_level(True),
    "smollm": DIGITS,
    "llama-bpe": _split(CONTRACTIONS + WORDS % "{1,3}"),
    "qwen2": _split(CONTRACTIONS + WORDS % ""),
}
"""tokenizer.ggml.pre -> pre_tokenizer of tokenizer.json, as the models' own files have it."""

SAME_AS = {
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "deepseek-r1-qwen": "qwen2",
    "phi-2": "gpt-2",
    "starcoder": "smollm",
}
"""Names that mean the same cut."""

WHOLE_WORDS = ("llama-bpe",)  # a word that is a token is that token, whatever the merges say
NORMALIZED = ("qwen2",)  # its own tokenizer.json composes characters (NFC) first; llama.cpp does not

PROBES = (
    "Hello world, I'VE 12345 things (don't we'll)!",
    " two  spaces\n\n\ttab \r\n 3.14 x1y22z333 ½ ٣",
    "naïve État 日本語 русский 🚀👩‍👩‍👧 e\u0301 \u00a0\u3000 ∀x",
    'def f(x):\n    return x**2  # !!!??? "quoted"```\n\n\n',
)
"""Texts on which tokenizers that differ do differ."""

SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator"}  # sic
"""Hugging Face's name of a special token -> the GGUF's."""

LISTS = {"tokens": str, "token_type": int, "merges": str, "scores": float}
"""Metadata of a tokenizer that are lists, and of what."""


def tokenizer_files(meta: dict[str, Any], path: Path) -> dict[str, dict]:
    """tokenizer.json and tokenizer_config.json of a GGUF's metadata.

    Raises:
        CheckpointError: there is no tokenizer, it lacks a part, or it is of a kind that is not read here.
    """
    kind, tokens = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.tokens")
    if kind is None or not tokens:
        raise CheckpointError(f"{path} has no tokenizer (no tokenizer.ggml.model and tokens): take a complete file.")
    if kind not in ("gpt2", "llama"):
        raise CheckpointError(
            f"{path} has a tokenizer of the kind {kind!r}; read here are 'gpt2' (byte-level BPE) and 'llama' "
            "(SentencePiece BPE). Use the model's Hugging Face checkpoint instead."
        )
    special = _checked(meta, len(tokens), path)
    types = meta.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise CheckpointError(f"{path} has {len(tokens)} tokens and {len(types)} token types: expected as many.")
    build = _byte_level_json if kind == "gpt2" else _sentencepiece_json
    vocab = {token: i for i, token in enumerate(tokens) if types[i] != UNUSED}  # rows of the table that no token has
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added(i, token, special=kind != USER_DEFINED)
            for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind in (CONTROL, USER_DEFINED, UNKNOWN)
        ],
    } | build(meta, vocab, path)
    tokenizer["post_processor"] = _post_processor(meta, tokens, special, kind)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {f"{name}_token": tokens[i] for name, i in special.items() if i is not None}
    context = meta.get(f"{meta.get('general.architecture')}.context_length")
    if context is not None:
        config["model_max_length"] = context
    if meta.get("tokenizer.chat_template") is not None:
        config["chat_template"] = meta["tokenizer.chat_template"]
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": config}


def _checked(meta: dict, count: int, path: Path) -> dict[str, int | None]:
    """The ids of special tokens, of ``count``. Raises CheckpointError for metadata of other types than they have."""
    for name, kind in LISTS.items():
        values = meta.get(f"tokenizer.ggml.{name}") or []
        if not (isinstance(values, list) and all(isinstance(value, kind) for value in values)):
            raise CheckpointError(f"{path} is damaged: tokenizer.ggml.{name} is no list of {kind.__name__}.")
    special = {}
    for ours, theirs in SPECIAL.items():
        i = special[ours] = meta.get(f"tokenizer.ggml.{theirs}_token_id")
        if i is not None and not (isinstance(i, int) and 0 <= i < count):
            raise CheckpointError(f"{path}: tokenizer.ggml.{theirs}_token_id = {i!r}, of {count} tokens.")
    return special


def _added(i: int, token: str, *, special: bool) -> dict:
    edges = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": token, **edges, "special": special}


def _byte_level_json(meta: dict, vocab: dict[str, int], path: Path) -> dict:
    name = meta.get("tokenizer.ggml.pre", "default")
    pre = SAME_AS.get(str(name), str(name))
    if pre not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"{path}: its tokenizer cuts text as {name!r}; known here are {', '.join([*PRE_TOKENIZERS, *SAME_AS])}. "
            "Use the model's Hugging Face checkpoint instead."
        )
    merges = meta.get("tokenizer.ggml.merges")
    if merges is None:
        raise CheckpointError(f"{path} has no tokenizer.ggml.merges, which a 'gpt2' tokenizer needs.")
    return {
        "normalizer": {"type": "NFC"} if pre in NORMALIZED else None,
        "pre_tokenizer": PRE_TOKENIZERS[pre],
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _bpe(vocab, [merge.split(" ", 1) for merge in merges], ignore_merges=pre in WHOLE_WORDS),
    }


def _sentencepiece_json(meta: dict, vocab: dict[str, int], path: Path) -> dict:
    """SentencePiece joins the pair whose joint piece scores highest: the order of the scores is that of the merges."""
    tokens, scores = meta["tokenizer.ggml.tokens"], meta.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise CheckpointError(f"{path} has no tokenizer.ggml.scores for each token, which a 'llama' tokenizer needs.")
    types = meta.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    ids = {token: i for i, token in enumerate(tokens) if types[i] == NORMAL}
    pairs = [
        (-scores[i], ids[left], ids[right], left, right)
        for token, i in ids.items()
        for left, right in ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        if left in ids and right in ids
    ]
    space = [{"type": "Prepend", "prepend": "▁"}] if meta.get("tokenizer.ggml.add_space_prefix", True) else []
    unknown = meta.get("tokenizer.ggml.unknown_token_id", 0)
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if space else []
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*space, replace]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": _bpe(
            vocab, [[left, right] for *_, left, right in sorted(pairs)], unk=tokens[unknown], byte_fallback=True
        ),
    }


def _bpe(
    vocab: dict[str, int], merges: list[list[str]], *, unk: str | None = None, byte_fallback=False, ignore_merges=False
) -> dict:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unk,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": byte_fallback,
        "byte_fallback": byte_fallback,
        "ignore_merges": ignore_merges,
        "vocab": vocab,
        "merges": merges,
    }


def _post_processor(meta: dict, tokens: list[str], special: dict[str, int | None], kind: str) -> dict | None:
    pre = meta.get("tokenizer.ggml.pre")
    add_bos = meta.get("tokenizer.ggml.add_bos_token", kind == "llama" or SAME_AS.get(pre, pre) == "llama-bpe")
    add_eos = meta.get("tokenizer.ggml.add_eos_token", False)
    single: list[dict] = [{"Sequence": {"id": "A", "type_id": 0}}]
    pair: list[dict] = [{"Sequence": {"id": "B", "type_id": 1}}]
    used = {}
    for name, wanted, put in (
        ("bos", add_bos, lambda part, x: [x, *part]),
        ("eos", add_eos, lambda part, x: [*part, x]),
    ):
        if wanted and special[name] is not None:
            token = tokens[special[name]]
            used[token] = {"id": token, "ids": [special[name]], "tokens": [token]}
            single = put(single, {"SpecialToken": {"id": token, "type_id": 0}})
            pair = put(pair, {"SpecialToken": {"id": token, "type_id": 1}})
    if not used:
        return None
    return {"type": "TemplateProcessing", "single": single, "pair": single + pair, "special_tokens": used}


def tokenizer_metadata(folder: Path | None, config: DecoderConfig) -> dict[str, object]:
    """A folder's tokenizer.json and tokenizer_config.json as GGUF metadata, chat template included.

    The tokenizer is built back from what was made, and must cut some hard texts as the original does.

    Raises:
        CheckpointError: there is none, it has more tokens than the model rows, or a GGUF cannot express it.
    """
    file = folder / "tokenizer.json" if folder is not None else None
    if file is None or not file.is_file():
        where = f"{folder} has no tokenizer.json" if folder is not None else "the model comes with no tokenizer"
        raise CheckpointError(f"{where}: a GGUF needs one. Give tokenizer_from, a folder with tokenizer.json.")
    said_file = folder / "tokenizer_config.json"
    try:
        spec = json.loads(file.read_text(encoding="utf-8"))
        said = json.loads(said_file.read_text(encoding="utf-8")) if said_file.is_file() else {}
        model = spec["model"]
    except (ValueError, KeyError, TypeError) as e:
        raise CheckpointError(f"the tokenizer in {folder} is damaged ({e!r}): restore its files.") from e
    if model.get("type") != "BPE":
        raise CheckpointError(f"{file} is of the kind {model.get('type')!r}: a GGUF is written here of BPE only.")
    merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    ids = model["vocab"] | {token["content"]: token["id"] for token in spec["added_tokens"]}
    rows = config.vocab_size
    if max(ids.values()) >= rows:
        raise CheckpointError(f"{file} has a token of id {max(ids.values())}; the model has {rows} rows for them.")
    tokens, types = [f"[PAD{i}]" for i in range(rows)], [UNUSED] * rows
    for token, i in ids.items():
        tokens[i], types[i] = token, NORMAL
    for token in spec["added_tokens"]:
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    named = {name: _token_text(said.get(f"{name}_token")) for name in SPECIAL}
    special = {name: ids[token] for name, token in named.items() if token in ids}
    special |= {"bos": config.bos_token_id} if config.bos_token_id is not None else {}
    special |= dict(zip(("eos", "eot", "eom"), config.eos_token_ids, strict=False))
    meta: dict[str, object] = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    meta |= {f"tokenizer.ggml.{SPECIAL.get(name, name)}_token_id": i for name, i in special.items()}
    if model.get("byte_fallback"):
        meta |= _sentencepiece_metadata(spec, merges, tokens, types, ids)
    else:
        meta |= {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": _pre_name(spec["pre_tokenizer"], file),
            "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        }
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    ends = tokenizer.encode("a").ids
    meta["tokenizer.ggml.add_bos_token"] = "bos" in special and ends[0] == special["bos"]
    meta["tokenizer.ggml.add_eos_token"] = "eos" in special and ends[-1] == special["eos"]
    template = said.get("chat_template")
    if template is None and (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if isinstance(template, str):
        meta["tokenizer.chat_template"] = template
    again = Tokenizer.from_str(json.dumps(tokenizer_files(meta, file)["tokenizer.json"]))
    for text in PROBES:
        if again.encode(text).ids != tokenizer.encode(text).ids:
            raise CheckpointError(f"{file}: a GGUF cannot express this tokenizer; it would cut {text!r} another way.")
    return meta


def _pre_name(pre: dict | None, file: Path) -> str:
    """The GGUF's name for how a tokenizer.json cuts text before merging."""
    for name, known in PRE_TOKENIZERS.items():
        if _cuts(known) == _cuts(pre):
            return name
    raise CheckpointError(
        f"{file} cuts text in a way that has no name here: {json.dumps(pre)}; named are {', '.join(PRE_TOKENIZERS)}."
    )


def _cuts(pre: dict | None) -> list[dict]:
    """The steps of a pre-tokenizer without what changes no token."""
    steps = pre["pretokenizers"] if pre and pre["type"] == "Sequence" else [pre or {}]
    return [{"use_regex": True} | {k: v for k, v in step.items() if k != "trim_offsets"} for step in steps]


def _sentencepiece_metadata(spec: dict, merges, tokens: list[str], types: list[int], ids: dict[str, int]) -> dict:
    """A piece's score is less the later its merge stands; SentencePiece numbers its own the same way."""
    scores = [0.0] * len(tokens)
    for rank, (left, right) in enumerate(merges):
        if scores[i := ids[left + right]] == 0.0:
            scores[i] = -float(rank + 1)
    for i, token in enumerate(tokens):
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[i] = BYTE
    meta: dict[str, Any] = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}
    meta["tokenizer.ggml.scores"] = scores
    if spec["model"].get("unk_token") in ids:
        unknown = ids[spec["model"]["unk_token"]]
        types[unknown] = UNKNOWN
        meta["tokenizer.ggml.unknown_token_id"] = unknown
    steps = json.dumps([spec.get("normalizer"), spec.get("pre_tokenizer")])
    prefixed = '"Prepend"' in steps or '"prepend_scheme": "first"' in steps or '"prepend_scheme": "always"' in steps
    meta["tokenizer.ggml.add_space_prefix"] = prefixed
    return meta


def _token_text(token: str | dict | None) -> str | None:
    return token.get("content") if isinstance(token, dict) else token
