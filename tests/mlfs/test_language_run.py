"""A language model through every command: fit, palette, export to Hugging Face and GGUF, verify, info."""

import json

import numpy as np
import pytest

import mlfs_jax as mlfs
from mlfs_jax.cli import main
from mlfs_jax.evaluate import evaluate, evaluate_completions
from mlfs_jax.hf.export import export_hf
from mlfs_jax.palette import Palette
from mlfs_jax.train import load_run
from tests.mlfs.tiny import tiny_decoder

WORDS = [
    "the",
    "a",
    "small",
    "big",
    "red",
    "blue",
    "old",
    "new",
    "cat",
    "dog",
    "bird",
    "house",
    "tree",
    "sees",
    "likes",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama with a byte-level tokenizer, a task with prompts, and a finished run of it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder, rng = tmp_path_factory.mktemp("language"), np.random.default_rng(0)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<end>"]
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    size = tokenizer.get_vocab_size()
    model = tiny_decoder("llama", vocab_size=size, max_positions=48, tied=True, eos_token_ids=(1,), pad_token_id=0)
    export_hf(model, folder / "model", tokenizer_from=folder)
    rows = []
    for _ in range(150):
        words = rng.choice(WORDS, 4).tolist()
        rows.append({"prompt": " ".join(words) + ". Last:", "completion": words[-1]})
    (folder / "last.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = ["fit", "--model", str(folder / "model"), "--task", str(folder / "last.jsonl"), "--out", str(folder / "run")]
    args += ["--steps", "6", "6", "6", "--batch-size", "8", "--rank", "2", "--max-length", "32", "--buckets", "32"]
    args += ["--width", "1.0", "0.5", "--depth", "1.0", "0.67", "--keep-layers", "influence", "--random-subnets", "1"]
    assert main(args) == 0
    return folder


def test_the_palette_has_rouge_perplexity_and_tokens_per_second(folder, capsys):
    assert main(["palette", str(folder / "run"), "--batch-sizes", "1", "--json"]) == 0
    palette = Palette.load(folder / "run")
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(palette.to_json()))
    fitted = load_run(folder / "run")
    test = fitted.config.load_data(fitted.task, fitted.model)["test"]
    small = mlfs.slice_subnet(fitted.merged, palette.rows[-1].subnet)
    scores = evaluate(small, test, "rougeL")
    assert palette.metric == "rougeL" and palette.rows[-1].perplexity == pytest.approx(scores["perplexity"], rel=1e-4)
    assert palette.rows[-1].score == pytest.approx(evaluate_completions(small, test.subset(64))["rougeL"])
    assert palette.examples == len(test.subset(64))
    assert palette.rows[-1].loss == pytest.approx(np.log(scores["perplexity"]), rel=1e-4)
    assert all(row.tokens_per_s[1] > 0 for row in palette.rows)
    assert (folder / "run" / "palette.png").read_bytes().startswith(b"\x89PNG")


def test_an_export_is_what_the_run_learnt(folder, capsys):
    assert main(["export", str(folder / "run"), "--subnet", "minnet", "--to", str(folder / "hf")]) == 0
    assert main(["verify", str(folder / "hf"), "--against", str(folder / "run")]) == 0
    assert "transformers == masked" in capsys.readouterr().out
    assert main(["info", str(folder / "hf")]) == 0


def test_a_gguf_holds_the_same_subnet(folder, capsys):
    file = folder / "small.gguf"
    assert main(["export", str(folder / "run"), "--subnet", "minnet", "--to", str(file), "--gguf-type", "f32"]) == 0
    assert "MB" in capsys.readouterr().out
    fitted = load_run(folder / "run")
    small = mlfs.slice_subnet(fitted.merged, fitted.space.minnet)
    back = mlfs.from_pretrained(str(file))
    ids = np.arange(20)[None] % small.config.vocab_size
    run = lambda model: mlfs.forward(model.graphdef, model.base, {"input_ids": ids}).logits  # noqa: E731
    np.testing.assert_allclose(run(back), run(small), atol=1e-5)


def test_a_run_does_not_write_over_the_gguf_that_it_is_made_from(folder, tmp_path, capsys):
    base, run = tmp_path / "base.GGUF", tmp_path / "run"
    assert main(["export", str(folder / "run"), "--subnet", "maxnet", "--to", str(base)]) == 0
    args = ["fit", "--model", str(base), "--task", str(folder / "last.jsonl"), "--out", str(run), "--steps", "1", "1"]
    assert main([*args, "1", "--batch-size", "8", "--rank", "2", "--max-length", "32", "--buckets", "32"]) == 0
    before = base.read_bytes()
    assert main(["export", str(run), "--subnet", "maxnet", "--to", str(base)]) == 2
    assert "is the model that this one is made from" in capsys.readouterr().err and base.read_bytes() == before
    assert main(["export", str(run), "--peft", "--to", str(tmp_path / "adapter")]) == 0
    assert "gguf_file" in capsys.readouterr().out


def test_a_subnet_of_a_run_generates(folder, capsys):
    """The command, at the subnet's true size == the masked supernet with its adapters."""
    command = ["generate", "--model", str(folder / "run"), "--subnet", "minnet", "--prompt", "the cat. Last:"]
    assert main([*command, "--max-new-tokens", "6"]) == 0
    fitted, config = load_run(folder / "run"), mlfs.GenerateConfig(6)
    settings = {"lora": fitted.lora, "subnet": fitted.space.minnet}
    expected = mlfs.generate_text(fitted.model, ["the cat. Last:"], config, **settings)
    assert capsys.readouterr().out == expected[0] + "\n"
