"""What the tests of fit, eval and the command line share: a very small language model on disk, and a task for it."""

import json

import jax
import pytest

from mlfs_jax.hf.export import export_hf
from tests.mlfs.tiny import tiny_decoder


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    """Nearly all of the time here is compiling what runs once."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def save_tokenizer(folder, words: int = 53):
    from tokenizers import Tokenizer, models, pre_tokenizers

    specials = ["[pad]", "[bos]", "[eos]"]
    vocabulary = {word: i for i, word in enumerate([*specials, *(f"w{i}" for i in range(3, words))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[pad]"))
    tokenizer.add_special_tokens(specials)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "[eos]"}'
    )
    return folder


@pytest.fixture(scope="session")
def tiny_lm(tmp_path_factory):
    """A Hugging Face folder: a random Llama of 3 layers, and a tokenizer of 53 words."""
    folder = tmp_path_factory.mktemp("lm")
    model = tiny_decoder("llama", max_positions=64, eos_token_ids=(2,))
    export_hf(model, folder / "model", tokenizer_from=save_tokenizer(folder / "words"))
    return folder / "model"


@pytest.fixture(scope="session")
def echo_task(tmp_path_factory):
    """Prompts of a few words; the completion repeats the last word, and then says the next one of a user's list."""
    file = tmp_path_factory.mktemp("task") / "echo.jsonl"
    rows = []
    for i in range(240):
        last = 3 + i % 20
        prompt = [f"w{3 + (i * k) % 29}" for k in range(1, 2 + i % 4)]
        user, step = ("alice", 20) if i % 3 else ("bob", 25)
        completion = f"w{last} w{last + step}"
        rows.append({"prompt": " ".join([*prompt, f"w{last}"]), "completion": completion, "user": user})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file
