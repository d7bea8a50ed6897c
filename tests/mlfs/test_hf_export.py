"""Export: what transformers opens computes what ours computes, also in shapes that it cannot express."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from mlfs_jax.backbone.tree import flatten
from mlfs_jax.config import EncoderConfig
from mlfs_jax.errors import CheckpointError, ConfigError, RunError
from mlfs_jax.hf.card import AUTO
from mlfs_jax.hf.configs import from_hf
from mlfs_jax.hf.export import REPORT, export_hf
from mlfs_jax.hf.families import FAMILIES
from mlfs_jax.hf.load import from_pretrained, load_checkpoint
from mlfs_jax.hf.reshape import Shape, nearest_shape
from mlfs_jax.hf.table import EncoderFamily
from mlfs_jax.model import abstract, build
from mlfs_jax.slicing import slice_subnet
from mlfs_jax.subnet import Subnet
from tests.mlfs.hf_oracle import (
    HEADS,
    NAMES,
    TOLERANCE,
    assert_equal_outputs,
    batch_for,
    run,
    torch_outputs,
    transformers,
)

SHAPES = {  # (embed, heads, head_dim) -> what it takes
    "plain": (12, 3, 4),
    "more heads": (12, 2, 4),
    "longer heads": (10, 2, 3),
    "two copies": (9, 3, 4),
    "three copies": (5, 4, 3),
}


def config_of(family: str, head: str, embed: int, heads: int, head_dim: int, **changes) -> EncoderConfig:
    theirs = {"bert": {}, "roberta": {}, "distilbert": {}, "electra": {"embedding_size": 7}}[family]
    labels = {"labels": 3} if head in ("sequence", "token") else {}
    config = from_hf({"model_type": family, **theirs}, head=head, **labels)
    config = config.replace(vocab_size=41, layers=2, mlp=11, max_positions=20, embed=embed, heads=heads)
    return config.replace(head_dim=head_dim, **changes)


def random_model(config: EncoderConfig, seed: int = 0):
    """A model whose every weight is random, norms and biases too."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, spec in flatten(abstract(config)[1]).items():
        mean = 1 if name.endswith("scale") else 0
        weights[name] = jnp.asarray(rng.normal(mean, 0.2, spec.shape), jnp.float32)
    return build(config, weights, name="random")


def opened(model, folder):
    """The export, as the user opens it."""
    return getattr(transformers, AUTO[model.config.head]).from_pretrained(folder).eval()


CASES = [  # every family with every shape, every head with every shape
    (family, HEADS[(i + j) % 4], shape) for i, family in enumerate(NAMES) for j, shape in enumerate(SHAPES)
] + [("bert", "mlm", "two copies"), ("electra", "sequence", "two copies"), ("electra", "none", "three copies")]


@pytest.mark.parametrize(("family", "head", "shape"), sorted(set(CASES)))
def test_exports_compute_the_same_function(family, head, shape, tmp_path):
    config = config_of(family, head, *SHAPES[shape])
    model = random_model(config)
    report = export_hf(model, tmp_path / "out")
    theirs = opened(model, tmp_path / "out")
    batch = batch_for(config, np.random.default_rng(0))
    ours = run(model, batch)
    logits, hidden = torch_outputs(theirs, batch)
    real = batch["attention_mask"] == 1
    np.testing.assert_allclose(hidden[..., : config.embed][real], np.asarray(ours.hidden)[real], atol=TOLERANCE)
    if head != "none":  # a base model without pooler gets a random one from transformers
        where = real if logits.ndim == 3 else ...
        np.testing.assert_allclose(logits[where], np.asarray(ours.logits)[where], atol=TOLERANCE)
        assert theirs.num_parameters() == report.params_after
    copies = {"two copies": 2, "three copies": 3}.get(shape, 1)
    assert report.copies == copies
    assert (report.params_before == report.params_after) == (shape == "plain") == (report.why == ())
    assert json.loads((tmp_path / "out" / REPORT).read_text())["params_after"] == report.params_after


@pytest.mark.parametrize("family", ["bert", "electra"])
def test_an_export_with_repeated_channels_loads_back(family, tmp_path):
    model = random_model(config_of(family, "mlm", *SHAPES["two copies"]))
    export_hf(model, tmp_path / "out")
    again, report = load_checkpoint(tmp_path / "out")
    assert report.initialised == report.dropped == () and again.config.embed == 18
    batch = batch_for(model.config, np.random.default_rng(0))
    np.testing.assert_allclose(run(again, batch).logits, run(model, batch).logits, atol=1e-5)


def test_a_pooler_survives_repetition(tmp_path):
    model = random_model(config_of("bert", "none", *SHAPES["two copies"], pooler=True))
    export_hf(model, tmp_path / "out")
    batch = batch_for(model.config, np.random.default_rng(0))
    pooled, _ = torch_outputs(opened(model, tmp_path / "out"), batch)
    ours = np.asarray(run(model, batch).logits)
    np.testing.assert_allclose(pooled, np.concatenate([ours, ours], -1), atol=TOLERANCE)


def test_the_fit_is_the_smallest():
    base = config_of("bert", "sequence", 384, 12, 32)
    assert nearest_shape(base) == Shape(1, 12, 32)
    assert nearest_shape(base.replace(heads=5)) == Shape(1, 12, 32)  # heads of their own size before longer ones
    assert nearest_shape(base.replace(embed=192, heads=3)) == Shape(1, 6, 32)
    assert nearest_shape(base.replace(embed=192)) == Shape(2, 12, 32)
    assert nearest_shape(base.replace(embed=200, heads=5)) == Shape(1, 5, 40)
    rng = np.random.default_rng(0)
    for _ in range(200):
        embed, heads, head_dim = (int(n) for n in rng.integers(1, 40, 3))
        shape = nearest_shape(base.replace(embed=embed, heads=heads, head_dim=head_dim))
        assert shape.embed == shape.copies * embed and shape.heads >= heads and shape.head_dim >= head_dim
        for fewer in range(1, shape.copies):
            sizes = range(heads, fewer * embed + 1)
            assert not any(fewer * embed % n == 0 and fewer * embed // n >= head_dim for n in sizes)


def test_electra_keeps_its_projection():
    """With equal widths Hugging Face has no projection: that number of copies is passed over."""
    config = config_of("electra", "sequence", 6, 3, 4, embedding_size=12)
    assert nearest_shape(config.replace(embedding_size=11)).copies == 2
    assert nearest_shape(config).copies == 3


def test_shards_tokenizer_card_and_labels(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    (source / "vocab.txt").write_text("a\nb\n")
    (source / "modules.json").write_text("[]")
    model = random_model(config_of("bert", "sequence", 12, 2, 4)).replace(source=source, name="minilm")
    report = export_hf(
        model,
        tmp_path / "out" / "quarter",
        label_names=["x", "y", "z"],
        sliced_from=model.config.replace(heads=3, mlp=22),
        max_shard_bytes=4000,
        card="## Results\n\n| accuracy | 0.9 |",
    )
    assert set(report.files) == {p.name for p in report.directory.iterdir()}
    assert {oct(p.stat().st_mode & 0o777) for p in report.directory.iterdir()} == {"0o644"}  # a server reads them, too
    assert {"tokenizer.json", "vocab.txt", "model.safetensors.index.json"} <= set(report.files)
    assert report.sliced == {"heads": (3, 2), "mlp": (22, 11)} and report.padded == {"heads": (2, 3)}
    shards = sorted(report.directory.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert all(sum(tensor.nbytes for tensor in load_file(p).values()) <= 4000 for p in shards)
    theirs = opened(model, report.directory)
    assert theirs.config.id2label == {0: "x", 1: "y", 2: "z"}
    again, _ = load_checkpoint(report.directory)
    assert_equal_outputs(again, theirs, batch_for(model.config, np.random.default_rng(0)))
    smaller = slice_subnet(again, Subnet(12, (1, 1), (4, 4), (0, 1)))
    export_hf(smaller, tmp_path / "again")  # a classifier keeps the names of its labels
    assert opened(again, tmp_path / "again").config.id2label == theirs.config.id2label
    for other in ({"labels": 5}, {"head": "token"}):  # and a new one has none
        assert from_pretrained(report.directory, **other).label_names is None
    card = (report.directory / "README.md").read_text()
    for words in ('AutoModelForSequenceClassification.from_pretrained("quarter")', "`minilm`", "| accuracy | 0.9 |",
                  "1 heads of zeros are added", f"{report.params_before:,}"):  # fmt: skip
        assert words in card
    assert not [p for p in report.directory.parent.iterdir() if p.name.startswith(".")]


def test_only_an_earlier_export_is_replaced(tmp_path, monkeypatch):
    model = random_model(config_of("bert", "none", 12, 3, 4))
    mine = tmp_path / "mine"
    mine.mkdir()
    export_hf(model, mine)
    report = export_hf(model, mine)
    assert set(report.files) == {p.name for p in mine.iterdir()}
    (tmp_path / "link").symlink_to(mine)
    export_hf(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and not list(tmp_path.glob(".*"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for _ in range(2):  # empty, and an earlier export
        assert (export_hf(model, ".").directory / "config.json").is_file() and Path("config.json").is_file()
    assert 'from_pretrained("here")' in Path("README.md").read_text() and not list(tmp_path.glob(".*"))
    (mine / "notes.md").write_text("mine")
    with pytest.raises(RunError, match=r"a new one would delete it: notes\.md"):
        export_hf(model, mine)
    assert (mine / "notes.md").read_text() == "mine"
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter").write_text("1")
    with pytest.raises(RunError, match="thesis"):
        export_hf(model, thesis)
    assert [p.name for p in thesis.iterdir()] == ["chapter"]


def test_a_failed_export_leaves_the_earlier_one(tmp_path, monkeypatch):
    model = random_model(config_of("bert", "none", 12, 3, 4))
    export_hf(model, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mlfs_jax.hf.export.save_file", full)
    with pytest.raises(RunError, match=r"could not be written: OSError: .*No space left"):
        export_hf(model, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_mistakes(tmp_path):
    model = random_model(config_of("bert", "sequence", 12, 3, 4))
    with pytest.raises(ConfigError, match="3 different"):
        export_hf(model, tmp_path / "out", label_names=["a"])
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot make the folder .*file/a/out: Not a directory"):
        export_hf(model, tmp_path / "file" / "a" / "out")
    with pytest.raises(CheckpointError, match="tokenizer_from"):
        export_hf(model, tmp_path / "out", tokenizer_from=tmp_path)
    assert not (tmp_path / "out").exists()
    assert {name for name, family in FAMILIES.items() if isinstance(family, EncoderFamily)} == set(NAMES)
