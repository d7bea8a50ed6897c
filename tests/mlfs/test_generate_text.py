"""Generation of text: prompts through the tokenizer, pieces as they come, chat templates, and ``mlfs generate``."""

import json
import shutil
import sys

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from mlfs_jax.cli import main
from mlfs_jax.data.tokenizer import load_tokenizer, prompt_ids, specials
from mlfs_jax.errors import ConfigError, DataError
from mlfs_jax.generate import GenerateConfig, generate, generate_text, stream_text
from mlfs_jax.generate.text import _decode
from mlfs_jax.hf.export import export_hf
from mlfs_jax.hf.load import from_pretrained
from mlfs_jax.slicing import slice_subnet
from mlfs_jax.subnet import SubnetSpace
from tests.mlfs.test_generate import quick_compiles  # noqa: F401
from tests.mlfs.tiny import tiny_decoder

PROMPT = "w7 w8 w9 w10"
CHAT = (
    "{% for m in messages %}{{ '[user] ' + m['content'] }}{% endfor %}{% if add_generation_prompt %} [bot]{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama, and a tokenizer of 53 words that begins every text with [bos]."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    specials = ["[pad]", "[bos]", "[eos]", "[user]", "[bot]"]
    words = {word: i for i, word in enumerate([*specials, *(f"w{i}" for i in range(5, 53))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[pad]"))
    tokenizer.add_special_tokens(specials)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing("[bos] $A", special_tokens=[("[bos]", 1)])
    start = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(start / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT, "eos_token": "[eos]"}
    (start / "tokenizer_config.json").write_text(json.dumps(config))
    model = tiny_decoder("llama", max_positions=128, bos_token_id=1, eos_token_ids=(2,))
    export_hf(model, start / "model", tokenizer_from=start)
    return start / "model"


@pytest.fixture(scope="module")
def model(folder):
    return from_pretrained(folder)


def spelt(tokens) -> str:
    return " ".join(f"w{token}" for token in tokens if token > 4)


def test_text_is_what_the_tokens_say(model):
    config = GenerateConfig(9, stop_tokens=())
    expected = generate(model, [[1, 7, 8, 9, 10]], config).tokens[0]
    assert any(token > 4 for token in expected)
    assert generate_text(model, [PROMPT], config)[0].strip() == spelt(expected)
    assert "".join(stream_text(model, PROMPT, config)).strip() == spelt(expected)


def test_a_tokenizer_without_the_letter_a(model, tmp_path):
    """Its beginning-of-text token is found by encoding an "a"."""
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE({"b": 5, "c": 6}, [])).save(str(tmp_path / "tokenizer.json"))
    config = GenerateConfig(2, stop_tokens=())
    assert len(generate_text(model.replace(source=tmp_path), ["bcb"], config)) == 1


def test_a_chat_template_makes_the_prompt_where_it_is_asked_for(model, tmp_path):
    config = GenerateConfig(9, stop_tokens=())
    expected = generate(model, [[3, 7, 8, 9, 10, 4]], config).tokens[0]
    assert "".join(stream_text(model, PROMPT, config, chat=True)).strip() == spelt(expected)
    (tmp_path / "tokenizer.json").write_bytes((model.source / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(DataError, match="no chat template"):
        generate_text(model.replace(source=tmp_path), [PROMPT], config, chat=True)
    with pytest.raises(DataError, match="no folder, hence no tokenizer"):
        generate_text(model.replace(source=None), [PROMPT])
    with pytest.raises(DataError, match="expected a list"):
        generate_text(model, PROMPT)


def test_a_character_of_several_tokens_comes_whole():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    ids = tokenizer.encode("né 🎉 ok").ids
    assert list(_decode(tokenizer, ids[:1], ids[1:])) == ["é", " ", "🎉", " ", "o", "k"]


def test_bytes_that_are_no_character_end_no_text():
    """A tokenizer that spells what it does not know in bytes, and a model that writes half a character."""
    from tokenizers import Tokenizer, decoders, models

    words = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁one", "▁two"]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>"))
    strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(strip)
    one, two, half = words.index("▁one"), words.index("▁two"), words.index("<0xE6>")
    text = "".join(_decode(tokenizer, [one], [two, words.index("<0x0A>"), half, two, one]))
    assert text == " two\n� two one"


def test_a_chat_models_other_ends_are_in_generation_config(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "chat")
    (tmp_path / "chat" / "generation_config.json").write_text('{"eos_token_id": [2, 4]}')
    ends = from_pretrained(tmp_path / "chat").config.eos_token_ids
    assert ends == (2, 4)
    (tmp_path / "chat" / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(ConfigError, match=r"eos_token_id = 'x' in .*generation_config\.json: expected a token id"):
        from_pretrained(tmp_path / "chat")
    (tmp_path / "chat" / "generation_config.json").write_text('{"eos_token_id": [2, 4]}')
    export_hf(from_pretrained(tmp_path / "chat"), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == [2, 4]


def test_the_end_that_training_writes_ends_what_is_written(folder, tmp_path):
    """Of a model whose config.json has none, it is the tokenizer's."""
    shutil.copytree(folder, tmp_path / "silent")
    config = json.loads((folder / "config.json").read_text())
    for silent in (config | {"eos_token_id": None}, {k: v for k, v in config.items() if k != "eos_token_id"}):
        (tmp_path / "silent" / "config.json").write_text(json.dumps(silent))
        (tmp_path / "silent" / "tokenizer_config.json").write_text('{"eos_token": "w9"}')
        end = load_tokenizer(folder).token_to_id("w9")
        assert specials(tmp_path / "silent").eos == end
        assert end in from_pretrained(tmp_path / "silent").config.eos_token_ids


def test_the_command(model, folder, capsys):
    command = ["generate", "--model", str(folder), "--prompt", PROMPT, "--max-new-tokens", "9"]
    for flags, config, seed in (
        ([], GenerateConfig(9), 0),
        (["--beam", "4", "--length-penalty", "0.5"], GenerateConfig(9, beams=4, length_penalty=0.5), 0),
        (["--temperature", "0.9", "--top-p", "0.8", "--seed", "3"], GenerateConfig(9, 1, 1.0, 0.9, 0, 0.8), 3),
    ):
        assert main([*command, *flags]) == 0
        assert capsys.readouterr().out == generate_text(model, [PROMPT], config, key=seed)[0] + "\n"
    sizes = "heads=2,mlp=10,depth=2"
    assert main([*command, "--subnet", sizes]) == 0
    subnet = SubnetSpace.from_ratios(model.config, width=(1.0, 0.48), depth=(1.0, 0.66)).named(sizes)
    assert capsys.readouterr().out == generate_text(slice_subnet(model, subnet), [PROMPT], GenerateConfig(9))[0] + "\n"


def test_the_command_prints_what_the_model_wrote(folder, capsys, monkeypatch):
    pieces = ["a\tb", "\r\x0c", "[bold]c"]
    monkeypatch.setattr(sys.modules["mlfs_jax.generate"], "stream_text", lambda *_, **__: iter(pieces))
    assert main(["generate", "--model", str(folder), "--prompt", PROMPT]) == 0
    assert capsys.readouterr().out == "a\tb\r\x0c[bold]c\n"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--max-new-tokens", "0"], "max_new_tokens = 0"),
        (["--top-p", "0.9"], "set a temperature"),
        (["--beam", "2", "--temperature", "1"], "set one of them"),
        (["--subnet", "haf"], "did you mean 'half'"),
        (["--prompt", "w9 " * 130], "131 tokens; the context of model is 128"),
    ],
)
def test_the_command_says_what_is_wrong(folder, capsys, flags, says):
    assert main(["generate", "--model", str(folder), "--prompt", PROMPT, *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and says in err and "Traceback" not in err


def test_an_encoder_does_not_generate(tiny_hf, capsys):
    assert main(["generate", "--model", str(tiny_hf), "--prompt", "good"]) == 2
    assert "a decoder is needed here" in capsys.readouterr().err


def test_a_prompt_ends_without_the_token_that_ends_texts():
    tokenizer = Tokenizer(models.WordLevel({"<e>": 0, "<b>": 1, "a": 2, "c": 3}, unk_token="<e>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    around = [("<b>", 1), ("<e>", 0)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<b> $A <e>", special_tokens=around)
    assert tokenizer.encode("a c").ids == [1, 2, 3, 0]
    assert prompt_ids(tokenizer, "a c") == [1, 2, 3]
    assert prompt_ids(tokenizer, "a c", first=False) == [2, 3]
