"""What an export must pass, and that tampering, mixing up and an idle adapter are found."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlfs_jax.errors import RunError, SubnetError, UnknownNameError
from mlfs_jax.export import ORIGIN, Origin, export_adapter, export_subnet, fingerprint
from mlfs_jax.hf.load import load_checkpoint
from mlfs_jax.model import forward
from mlfs_jax.palette import measure
from mlfs_jax.registry import sha256_of
from mlfs_jax.train import load_run
from mlfs_jax.verify import all_ok, random_batch, verify
from tests.mlfs.tiny import tiny_config


@pytest.fixture
def fitted(tiny_run):
    return load_run(tiny_run, finished=True)


def failed(checks) -> set[str]:
    return {check.name for check in checks if check.ok is False}


@pytest.mark.parametrize("name", ["maxnet", "minnet", "heads=4,mlp=20,depth=1"])
def test_export_is_what_the_run_learnt(fitted, tmp_path, name):
    export_subnet(fitted, name, tmp_path / "out", run="mood")
    checks = verify(tmp_path / "out", fitted)
    assert all_ok(checks), checks
    compared = {(check.name, check.inputs) for check in checks if check.difference is not None}
    for inputs in ("random", "real"):
        assert {("sliced == masked", inputs), ("exported == masked", inputs), ("adapter is active", inputs)} <= compared
    origin = Origin.read(tmp_path / "out")
    assert origin.subnet == fitted.space.named(name) and origin.run == "mood"


def test_card_has_numbers_task_and_licence(fitted, tmp_path):
    palette = measure(fitted, ["maxnet"], batch_sizes=(1,), seconds=0)
    report = export_subnet(fitted, "maxnet", tmp_path / "out", palette=palette)
    card = (report.directory / "README.md").read_text()
    assert f"| accuracy | {palette.rows[0].score:.4f} |" in card
    assert "AutoModelForSequenceClassification.from_pretrained" in card and "0 down, 1 up" in card and "licence" in card
    assert json.loads((report.directory / "config.json").read_text())["id2label"] == {"0": "down", "1": "up"}
    for file in ("README.md", ORIGIN):
        assert str(fitted.model.source.parent) not in (report.directory / file).read_text(), "a path of this machine"
    export_subnet(fitted, "heads=2,mlp=10,depth=1", tmp_path / "out", palette=palette)
    assert "Not measured" in (report.directory / "README.md").read_text()


def tamper(directory, key: str, row: int, *, hide: bool) -> None:
    """Change one number of an export; ``hide`` it from the hashes, too."""
    weights = load_file(directory / "model.safetensors")
    weights[key] = weights[key].copy()
    weights[key][row, 0] = 10 - weights[key][row, 0]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    if hide:
        origin = Origin.read(directory)
        origin.files["model.safetensors"] = sha256_of(directory / "model.safetensors")
        origin.write(directory)


def test_tampered_weight(fitted, tmp_path):
    out = tmp_path / "out"
    export_subnet(fitted, "maxnet", out)
    tamper(out, "bert.encoder.layer.0.output.dense.weight", 0, hide=True)
    assert {"exported == masked"} <= failed(verify(out, fitted)) <= {"exported == masked", "transformers == masked"}
    export_subnet(fitted, "maxnet", out)
    tamper(out, "bert.embeddings.position_embeddings.weight", -1, hide=False)  # no input reaches that far
    assert failed(verify(out, fitted)) == {"files as they were written"}


def test_other_labels_and_other_tokenizer(fitted, tmp_path):
    out = tmp_path / "out"
    export_subnet(fitted, "maxnet", out)
    for file in ("config.json", "tokenizer.json"):
        text = (out / file).read_text()
        (out / file).write_text(text.replace('"down"', '"low"').replace('"film"', '"movie"'))
    expected = {"files as they were written", "label names are the task's", "tokenizer is the base's"}
    assert failed(verify(out, fitted)) == expected


def test_another_run(fitted, tmp_path):
    out = tmp_path / "out"
    export_subnet(fitted, "heads=2,mlp=10,depth=1", out)
    more = jax.tree.map(lambda x: x * 1.5, fitted.stages[-1])
    other = dataclasses.replace(fitted, stages=(*fitted.stages[:-1], more))
    assert fingerprint(other)["adapters"] != fingerprint(fitted)["adapters"]
    assert {"run as it was exported", "exported == masked"} <= failed(verify(out, other))
    narrow = dataclasses.replace(fitted, config=dataclasses.replace(fitted.config, width=(1.0,)))
    with pytest.raises(SubnetError, match="none of this run"):
        verify(out, narrow)


def test_idle_adapter(fitted, tmp_path):
    """A run whose low-rank pairs do nothing is found, though all three lives agree."""
    heads_only = [{s: e if "a" not in e else {**e, "b": 0 * e["b"]} for s, e in lora.items()} for lora in fitted.stages]
    idle = dataclasses.replace(fitted, stages=tuple(heads_only))
    export_subnet(idle, "maxnet", tmp_path / "out")
    assert failed(verify(tmp_path / "out", idle)) == {"adapter is active"}


def test_wrong_folders(fitted, tmp_path):
    with pytest.raises(RunError, match=r"has no mlfs\.json"):
        verify(tmp_path, fitted)
    with pytest.raises(UnknownNameError, match="did you mean 'maxnet'"):
        export_subnet(fitted, "maxnett", tmp_path / "out")
    with pytest.raises(SubnetError, match="choose from"):
        export_subnet(fitted, "depth=2,mlp=15", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="choose another folder"):
        export_subnet(fitted, "maxnet", tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    export_subnet(fitted, "maxnet", tmp_path / "out")
    (tmp_path / "out" / ORIGIN).write_text("{}")
    with pytest.raises(RunError, match="damaged"):
        verify(tmp_path / "out", fitted)


def test_adapter_for_peft(fitted, tmp_path):
    """The adapter is in the pretrained model's own order: peft gives the maxnet's logits on the untouched base."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    assert fitted.order is not None and not np.array_equal(fitted.order.embed, np.sort(fitted.order.embed))
    export_adapter(fitted, tmp_path / "adapter")
    base = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    batch = random_batch(fitted.model.config, 8, 12, seed=0)
    with torch.no_grad():
        theirs = model(**{k: torch.tensor(v, dtype=torch.long) for k, v in batch.items()}).logits.numpy()
    ours = forward(fitted.model.graphdef, fitted.model.base, batch, lora=fitted.lora).logits
    assert np.abs(np.asarray(ours) - theirs).max() < 1e-4


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_random_batch(family):
    config = tiny_config(family)
    batch = random_batch(config, 6, 9, seed=1)
    real = batch["attention_mask"] == 1
    assert real[:, 0].all() and not real.all() and all(x.dtype == np.int32 for x in batch.values())
    assert (batch["input_ids"][~real] == config.pad_token_id).all()
    assert (batch["input_ids"][real] != config.pad_token_id).all() and batch["input_ids"].max() < config.vocab_size


def test_export_loads_alone(fitted, tmp_path):
    """Nothing of the run is needed to use an export."""
    export_subnet(fitted, "maxnet", tmp_path / "out")
    model, report = load_checkpoint(tmp_path / "out")
    assert model.config.head == "sequence" and not report.initialised and not report.dropped
