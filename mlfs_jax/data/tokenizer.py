"""What a model's folder says about its text: the tokenizer, the special tokens, the room for positions."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlfs_jax.errors import ConfigError, DataError

CHUNK = 4096  # texts tokenized at once: the tokenizer's own objects are 100 times larger than the ids


def load_tokenizer(model_dir: str | Path):
    """The `tokenizers.Tokenizer` of a model folder, with neither padding nor truncation switched on.

    Read from tokenizer.json directly: transformers would import torch where it is installed. Only a folder
    without tokenizer.json (vocab.txt, merges.txt, ...) goes through transformers' conversion.
    """
    from tokenizers import Tokenizer

    folder = Path(model_dir)
    file = folder / "tokenizer.json"
    try:
        if file.is_file():
            tokenizer = Tokenizer.from_file(str(file))
        else:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(str(folder)).backend_tokenizer
    except Exception as e:  # the Rust side raises plain Exception
        raise DataError(
            f"{folder} has no usable tokenizer: {type(e).__name__}: {e}. Expected tokenizer.json, "
            "or the vocabulary files of a tokenizer that transformers can convert."
        ) from e
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def utf8(text: str) -> str:
    """What a person typed; raises `ConfigError` where its bytes were no UTF-8, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"prompt = {text!r}: expected text in UTF-8.") from None
    return text


def model_config(model_dir: str | Path) -> dict:
    """config.json of a model folder."""
    file = Path(model_dir) / "config.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise DataError(f"{file} cannot be read: {e}. Expected the folder of a Hugging Face model.") from e


def check_length(config: dict, max_length: int) -> None:
    """Raise `ConfigError` for a max_length that the model of this config.json has no positions for."""
    room = positions(config)
    if not 4 <= max_length <= room:
        raise ConfigError(f"max_length is {max_length}; expected 4 to {room}, the positions the model has.")


def check_ids(config: dict, ids: np.ndarray, tokenizer) -> None:
    """Raise `DataError` for token ids that the model of this config.json has no row for."""
    rows = config.get("vocab_size")
    if rows is not None and ids.size and (high := int(ids.max())) >= rows:
        raise DataError(
            f"token {tokenizer.id_to_token(high)!r} has the id {high}, and the model {rows} rows: this tokenizer is of "
            "another model, or has tokens that were added after it; resize the model's embeddings to them."
        )


def positions(config: dict) -> int:
    """Tokens a model can take: RoBERTa's table has pad_token_id + 1 rows that no token uses."""
    names = ("max_position_embeddings", "n_positions", "seq_length")  # of most, of GPT-2, of Bloom
    unbounded = 2048 if config.get("model_type") == "bloom" else 512  # ALiBi has no end; Bloom was trained to 2048
    rows = next((config[name] for name in names if config.get(name)), unbounded)
    roberta = config.get("model_type") in ("roberta", "xlm-roberta", "camembert")
    pad = config.get("pad_token_id")
    return rows - ((1 if pad is None else pad) + 1 if roberta else 0)


class Specials(NamedTuple):
    """The special tokens of a language model."""

    prefix: tuple[int, ...]  # see prefix_of
    eos: int  # ends a text
    pad: int  # fills up batches; the eos where the model has none


def specials(model_dir: str | Path, tokenizer=None) -> Specials:
    """Of the model in a folder, whose `load_tokenizer` may be given if it is there already.

    Read from config.json, or tokenizer_config.json where that is silent, and from what the tokenizer adds.

    Raises `ConfigError` for a model without an end-of-text token: it is no language model.
    """
    config, tokenizer = model_config(model_dir), tokenizer or load_tokenizer(model_dir)
    eos = config.get("eos_token_id")
    if isinstance(eos, list):  # several tokens may end a turn; the first ends a text
        eos = eos[0] if eos else None
    if eos is None:
        eos = named_end(model_dir, tokenizer)
    if eos is None:
        raise ConfigError(
            f"{model_dir} names no end-of-text token (eos_token_id in config.json or eos_token in "
            "tokenizer_config.json); language tasks need a causal language model."
        )
    pad = config.get("pad_token_id")
    return Specials(prefix_of(tokenizer), eos, eos if pad is None or pad < 0 else pad)


def prefix_of(tokenizer) -> tuple[int, ...]:
    """What a tokenizer puts before a text (beginning-of-text); often nothing."""
    added = tokenizer.encode("a")
    first = next(i for i, special in enumerate([*added.special_tokens_mask, 0]) if not special)
    return tuple(added.ids[:first])


def prompt_ids(tokenizer, text: str, *, first: bool = True) -> list[int]:
    """A text as a model saw the beginnings of texts in training: without what a tokenizer puts behind one.

    Args:
        first: False leaves out what it puts before one, too.
    """
    return [*(prefix_of(tokenizer) if first else ()), *tokenizer.encode(utf8(text), add_special_tokens=False).ids]


def named_end(model_dir: str | Path, tokenizer=None) -> int | None:
    """The id of the end-of-text token that tokenizer_config.json names: what ends texts where config.json is silent."""
    try:
        token = json.loads((Path(model_dir) / "tokenizer_config.json").read_text(encoding="utf-8")).get("eos_token")
    except (OSError, ValueError):
        return None
    token = token.get("content") if isinstance(token, dict) else token
    return None if token is None else (tokenizer or load_tokenizer(model_dir)).token_to_id(token)


class TextStream:
    """Text of tokens, a piece for each, as they come; a character of several tokens comes with its last one.

    Args:
        prompt: tokens before the first, which may decide how that is spelt.
    """

    def __init__(self, tokenizer, prompt: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._whole: int | None = None  # the last token that was text by itself
        self._waits = False
        self._restart()
        for token in prompt:
            self.step(token)

    def _restart(self) -> None:
        """As behind the last whole token, by which the next one is no first word, which may be spelt in another way."""
        from tokenizers.decoders import DecodeStream

        self._decoder = DecodeStream(skip_special_tokens=True)
        if self._whole is not None:
            self._try(self._whole)

    def _try(self, token: int) -> str | None:
        """None: what was read before is no text, and not the beginning of one."""
        try:
            return self._decoder.step(self._tokenizer, token) or ""
        except Exception:  # the Rust side raises plain Exception
            return None

    def step(self, token: int) -> str:
        """The text that this token completes, often none. Bytes that are no UTF-8 become the replacement character."""
        text = self._try(token)
        if text is None:
            self._restart()
            text = "\ufffd" + (self._try(token) or "")
        elif text and not self._waits:
            self._whole = token
        self._waits = not text
        return text
