"""fit: resumable to the bit, honest about mistakes, and what it leaves in the folder."""

import dataclasses
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file

import mlfs_jax as mlfs
from mlfs_jax import train
from mlfs_jax.errors import ConfigError, DataError, RunError, UnknownNameError
from mlfs_jax.evaluate import evaluate
from mlfs_jax.lora import load_lora, save_lora
from mlfs_jax.run import Run
from mlfs_jax.supernet import Supernet
from tests.mlfs.tiny import tiny_model

QUIET = Console(quiet=True)


@pytest.fixture
def config(tiny_hf, mood_task):
    return mlfs.FitConfig(
        model=str(tiny_hf),
        task=str(mood_task),
        steps=(5, 4, 4),
        learning_rate=1e-2,
        rank=2,
        batch_size=8,
        max_length=12,
        buckets=(12,),
        width=(1.0, 0.5),
        random_subnets=1,
        importance_examples=16,
        save_every=2,
        unroll=False,
    )


def interrupt(monkeypatch, at: set[int], how) -> None:
    """Call ``how()`` during the steps numbered ``at``, counted over all calls from here on."""
    step, count = Supernet.step, iter(range(1, 1000))

    def counted(self, *args):
        if next(count) in at:
            how()
        return step(self, *args)

    monkeypatch.setattr(Supernet, "step", counted)


def contents(folder) -> tuple[list[dict], dict]:
    adapters = {f.stem: load_lora(f) for f in sorted((folder / "adapters").iterdir())}
    return Run.open(folder).history(), adapters


def assert_same_run(a, b) -> None:
    (history, adapters), (others, other_adapters) = contents(a), contents(b)
    assert history == others
    assert jax.tree.structure(adapters) == jax.tree.structure(other_adapters)
    jax.tree.map(np.testing.assert_array_equal, adapters, other_adapters)


def test_stopped_after_any_step_the_run_continues_bit_by_bit(config, tmp_path, monkeypatch):
    """Stopped by SIGTERM within each stage and on the last step of one, then killed between two checkpoints."""
    whole = mlfs.fit(config, tmp_path / "whole", console=QUIET)
    assert [line["step"] for line in contents(tmp_path / "whole")[0]] == list(range(1, 14))

    with monkeypatch.context() as patch:
        interrupt(patch, {3, 5, 7, 12}, lambda: os.kill(os.getpid(), signal.SIGTERM))
        stops = 0
        while mlfs.fit(config, tmp_path / "stopped", console=QUIET) is None:
            stops += 1
    assert stops == 4
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")

    def crash():
        raise MemoryError("pulled the plug")

    with monkeypatch.context() as patch:
        interrupt(patch, {4}, crash)
        with pytest.raises(MemoryError):
            mlfs.fit(config, tmp_path / "crashed", console=QUIET)
    mlfs.fit(config, tmp_path / "crashed", console=QUIET)
    assert_same_run(tmp_path / "whole", tmp_path / "crashed")

    # a finished run is left as it is, and opens to what fit returned
    again = mlfs.fit(config, tmp_path / "whole", console=QUIET)
    opened = mlfs.load_run(tmp_path / "whole", finished=True)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    for other in (again, opened):
        jax.tree.map(np.testing.assert_array_equal, other.merged.base, whole.merged.base)
    assert opened.config == config


def test_a_palette_learns_the_task(config, tiny_hf, tmp_path):
    words = mlfs.from_pretrained(tiny_hf).config.vocab_size
    lively = tiny_model(head="none", labels=0, layers=2, vocab_size=words)  # a fresh BERT's 0.02 would be too faint
    mlfs.export_hf(lively, tmp_path / "model", tokenizer_from=tiny_hf)
    config = dataclasses.replace(
        config,
        model=str(tmp_path / "model"),
        steps=(120, 30, 30),
        learning_rate=(1e-2, 1e-2, 5e-3),
        rank=4,
        batch_size=16,
        random_subnets=0,
        save_every=1000,
    )
    fitted = mlfs.fit(config, tmp_path / "run", console=QUIET)
    assert mlfs.load_run(tmp_path / "run").config == config
    test = config.load_data(fitted.task, fitted.model)["test"]
    for name in ("maxnet", "minnet"):
        small = mlfs.slice_subnet(fitted.merged, fitted.space.named(name))
        assert evaluate(small, test, "accuracy")["accuracy"] > 0.9, name
    # each stage's pairs are its own; the base stays the pretrained one, in another order
    assert len(fitted.stages) == 3 and fitted.lora["layers.q"]["a"].shape[-1] == 3 * config.rank
    untouched = mlfs.from_pretrained(config.model, head="sequence", labels=2, key=config.seed)
    values = [np.sort(m.base["layers"]["q"]["kernel"][...], axis=None) for m in (fitted.model, untouched)]
    np.testing.assert_array_equal(*values)


def test_a_run_that_diverges_ends_there(config, tmp_path):
    wild = dataclasses.replace(config, learning_rate=1e30, steps=(5,))
    with pytest.raises(RunError, match=r"the loss is \[.*nan.*\] at step \d: training has diverged"):
        mlfs.fit(wild, tmp_path / "wild", console=QUIET)
    assert not (tmp_path / "wild" / "result.json").exists()
    with pytest.raises(ConfigError, match="gamma = nan"):
        dataclasses.replace(config, gamma=float("nan"))


def test_one_stage_is_plain_lora_and_first_k_keeps_the_order(config, tmp_path):
    fitted = mlfs.fit(dataclasses.replace(config, steps=(3,), reorder=False), tmp_path / "run", console=QUIET)
    assert len(fitted.stages) == 1 and fitted.order is None
    assert not (tmp_path / "run" / "order.json").exists()


def test_a_bfloat16_base_learns_as_well(config, tmp_path):
    """Beside the run in float32: the same losses but for rounding, and float32 adapters."""
    runs = {}
    for dtype in ("float32", "bfloat16"):
        runs[dtype] = mlfs.fit(dataclasses.replace(config, dtype=dtype), tmp_path / dtype, console=QUIET)
        assert all(x.dtype == np.float32 for x in jax.tree.leaves((runs[dtype].lora, runs[dtype].model.base)))
    losses = [[row["losses"] for row in Run.open(tmp_path / dtype).history()] for dtype in runs]
    for exact, rounded in zip(*losses, strict=True):
        np.testing.assert_allclose(rounded, exact, rtol=0.1, atol=0.02)
    with pytest.raises(ConfigError, match=r"float16.*expected one of float32, bfloat16"):
        dataclasses.replace(config, dtype="float16")


def test_a_folder_belongs_to_one_run(config, tmp_path):
    mlfs.fit(dataclasses.replace(config, steps=(2,)), tmp_path / "run", console=QUIET)
    with pytest.raises(RunError, match=r"learning_rate.*0\.01.*0\.5"):
        mlfs.fit(dataclasses.replace(config, steps=(2,), learning_rate=0.5), tmp_path / "run", console=QUIET)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("do not touch")
    with pytest.raises(RunError, match=r"thesis\.tex"):
        mlfs.fit(config, tmp_path / "mine", console=QUIET)
    with pytest.raises(RunError, match="no run folder"):
        mlfs.load_run(tmp_path / "nowhere", finished=True)


def edit(file, change):
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def of_rank_and_width(file):
    lora = load_lora(file)
    lora["layers.up"]["a"] = lora["layers.up"]["a"][:, :-1]
    save_lora(file, lora)


@pytest.mark.parametrize(
    ("file", "harm", "says"),
    [
        ("run.json", lambda f: edit(f, lambda i: i["config"].update(newer=1)), "'newer'.*of another program, or of"),
        ("run.json", lambda f: edit(f, lambda i: i["config"].pop("distill")), "'distill'"),
        (
            "run.json",
            lambda f: edit(f, lambda i: i.update(kind="spa fit")),
            "a run of `spa fit`: expected one of `mlfs fit`",
        ),
        ("task.json", lambda f: f.write_text("{}"), "task.json is damaged"),
        ("order.json", lambda f: f.write_text("{}"), "order.json is damaged"),
        ("head.safetensors", lambda f: f.unlink(), "head.safetensors is missing or damaged"),
        ("adapters/stage0.safetensors", lambda f: f.unlink(), r"stage0\.safetensors is gone"),
        ("adapters/stage2.safetensors", lambda f: f.unlink(), r"stage2\.safetensors is gone"),
        ("adapters/stage2.safetensors", cut, "stage2.safetensors is missing or damaged"),
        (
            "adapters/stage1.safetensors",
            of_rank_and_width,
            r"stage1.*has changed: layers\.up/a has shape .*23, 4.*24, 4",
        ),
    ],
)
def test_a_folder_that_is_no_whole_run_says_why(tiny_run, file, harm, says):
    mlfs.load_run(tiny_run)
    harm(tiny_run / file)
    with pytest.raises(RunError, match=says):
        mlfs.load_run(tiny_run)


def test_a_run_needs_no_data_and_knows_when_they_have_changed(tiny_run, mood_task, tmp_path):
    data, whole = tmp_path / "mood.jsonl", mood_task.read_text()
    edit(tiny_run / "run.json", lambda info: info["config"].update(task=str(data)))
    data.write_text(whole)
    assert mlfs.load_run(tiny_run).load_data().keys() == {"train", "validation", "test"}

    data.write_text(whole.replace('"up"', '"above"'))  # sorted, the two labels change places
    fitted = mlfs.load_run(tiny_run, finished=True)
    assert fitted.task.labels == ("down", "up")
    with pytest.raises(RunError, match="labels above, down instead of down, up"):
        mlfs.measure(fitted, ["maxnet"], seconds=0)
    data.write_text(whole + '{"text": "the film was a lovely one", "label": "up"}\n')
    with pytest.raises(RunError, match=r"mood\.jsonl are not those that the run was trained on \(other examples\)"):
        mlfs.load_run(tiny_run).load_data()

    data.unlink()
    mlfs.export_subnet(mlfs.load_run(tiny_run), "minnet", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["id2label"] == {"0": "down", "1": "up"}
    assert str(tmp_path) not in (tmp_path / "out" / "mlfs.json").read_text()
    with pytest.raises(DataError, match=r"mood\.jsonl"):
        mlfs.load_run(tiny_run).load_data()
    (tiny_run / "task.json").unlink()  # a run of old: the data say what the task is
    with pytest.raises(DataError, match=r"mood\.jsonl"):
        mlfs.load_run(tiny_run)


def test_importance_is_measured_as_the_steps_compute(tiny_run, monkeypatch):
    fitted, asked = mlfs.load_run(tiny_run), []
    plain = train._measure_order(fitted, fitted.stages[0], fitted.load_data()["train"])
    forward = train.forward
    monkeypatch.setattr(train, "forward", lambda *args, **how: (asked.append(how["remat"]), forward(*args, **how))[1])
    again = dataclasses.replace(fitted, config=dataclasses.replace(fitted.config, remat=True))
    order = train._measure_order(again, fitted.stages[0], fitted.load_data()["train"])
    assert asked and all(asked)
    assert order.to_json() == plain.to_json()


def test_an_export_does_not_take_the_place_of_the_base(tiny_run, tmp_path):
    fitted = mlfs.load_run(tiny_run)
    with pytest.raises(RunError, match="is the model that this one is made from"):
        mlfs.export_subnet(fitted, "minnet", fitted.model.source)


def test_mistakes_are_named_before_anything_is_written(config, tmp_path):
    def fit(**changes):
        return mlfs.fit(dataclasses.replace(config, **changes), tmp_path / "run", console=QUIET)

    with pytest.raises(UnknownNameError, match="did you mean 'minilm-l6'"):
        fit(model="minilm-16")
    with pytest.raises(UnknownNameError, match="did you mean 'wiki-topic'"):
        fit(task="wiki-topics")
    with pytest.raises(ConfigError, match=r"steps = \(\)"):
        fit(steps=())
    with pytest.raises(ConfigError, match="save_every = 0"):
        fit(save_every=0)
    with pytest.raises(ConfigError, match="execution = 'quick'"):
        fit(execution="quick")
    with pytest.raises(ConfigError, match="max_length is 0; expected 4 to"):
        fit(max_length=0)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(DataError, match="empty"):
        fit(task=str(empty))
    assert not (tmp_path / "run").exists()


def test_a_run_is_held_to_the_weights_that_it_began_on(config, tmp_path):
    """Others of the same shapes fit its adapters, too."""
    shutil.copytree(config.model, tmp_path / "model")
    config = dataclasses.replace(config, model=str(tmp_path / "model"), reorder=False, width=(1.0,))
    mlfs.fit(config, tmp_path / "run", console=QUIET)
    weights = tmp_path / "model" / "model.safetensors"
    save_file({name: value + 0.1 for name, value in load_file(weights).items()}, weights)
    for use in (lambda: mlfs.load_run(tmp_path / "run"), lambda: mlfs.fit(config, tmp_path / "run", console=QUIET)):
        with pytest.raises(RunError, match=r"the weights of .*model are not those that the run in .*run began on"):
            use()
    (tmp_path / "run" / "base.json").unlink()  # a run of old does not know
    mlfs.load_run(tmp_path / "run")
