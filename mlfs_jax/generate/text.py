"""The same for text: with the tokenizer in the model's folder, and its chat template where that is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from jaxtyping import Array

from mlfs_jax.backbone.tree import Mask
from mlfs_jax.data.tokenizer import TextStream, load_tokenizer, prompt_ids
from mlfs_jax.errors import DataError
from mlfs_jax.generate.sampling import GREEDY, GenerateConfig
from mlfs_jax.generate.session import generate, stream
from mlfs_jax.model import Model
from mlfs_jax.subnet import Subnet


def generate_text(
    model: Model,
    texts: Sequence[str],
    config: GenerateConfig = GREEDY,
    *,
    lora: Mapping[str, dict] | None = None,
    subnet: Subnet | Mask | None = None,
    key: int | Array = 0,
    chat: bool = False,
) -> list[str]:
    """What follows each text, without special tokens; see :func:`generate`.

    Args:
        chat: each text is what a user says; the model's chat template makes a prompt of it, and what follows is the
            answer.

    Raises:
        DataError: the model has no tokenizer, or no chat template. Else as :func:`generate`.
    """
    if isinstance(texts, str):
        raise DataError("texts is one string: expected a list of them.")
    tokenizer, prompts = _encode(model, texts, chat)
    found = generate(model, prompts, config, lora=lora, subnet=subnet, key=key)
    return ["".join(_decode(tokenizer, *pair)) for pair in zip(prompts, found.tokens, strict=True)]


def stream_text(
    model: Model,
    text: str,
    config: GenerateConfig = GREEDY,
    *,
    lora: Mapping[str, dict] | None = None,
    subnet: Subnet | Mask | None = None,
    key: int | Array = 0,
    chat: bool = False,
) -> Iterator[str]:
    """The same for one text, in pieces, as they come; a character of several tokens comes with its last one."""
    tokenizer, (prompt,) = _encode(model, [text], chat)
    return _decode(tokenizer, prompt, stream(model, prompt, config, lora=lora, subnet=subnet, key=key))


def _encode(model: Model, texts: Sequence[str], chat: bool):
    """The tokenizer, and the prompts as the model saw texts in training: with a token for their beginning, if any."""
    if model.source is None:
        raise DataError(
            f"{model.name} has no folder, hence no tokenizer: load it with from_pretrained, or give token ids to "
            "generate."
        )
    tokenizer = load_tokenizer(model.source)
    if chat:
        texts = _as_chats(model, texts)  # a template says for itself what a prompt begins with
    return tokenizer, [prompt_ids(tokenizer, text, first=not chat) for text in texts]


def _as_chats(model: Model, texts: Sequence[str]) -> list[str]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model.source))
    if not tokenizer.chat_template:
        raise DataError(f"{model.source} has no chat template: it is no chat model; give it the whole prompt instead.")
    chats = ([{"role": "user", "content": text}] for text in texts)
    return [str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)) for chat in chats]


def _decode(tokenizer, prompt: Sequence[int], tokens: Iterable[int]) -> Iterator[str]:
    """Text of the tokens behind a prompt (whose last token may decide how the next one is spelt)."""
    text = TextStream(tokenizer, prompt)
    yield from filter(None, map(text.step, tokens))
