"""fit: learns, resumes to the bit, with cached ladders as without, one plugin for each user; mistakes are named."""

import contextlib
import dataclasses
import errno
import io
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import mlfs_jax as mlfs
import spa_jax as spa
from mlfs_jax.backbone.quantised import Quantised
from mlfs_jax.errors import ConfigError, DataError, RunError, UnknownNameError
from mlfs_jax.hf.load import from_pretrained
from mlfs_jax.run import Run
from spa_jax import train
from spa_jax.baselines import load_baseline
from spa_jax.config import FitConfig
from spa_jax.errors import PluginError, TapCacheError
from spa_jax.evaluate import load_split
from spa_jax.gate_fit import GateConfig, fit_gate
from spa_jax.plugin import load_plugin, save_plugin
from spa_jax.score import score_tokens
from spa_jax.seam import Frame
from spa_jax.train import SideTrainer, fit, fit_users, load_run
from tests.spa.conftest import save_tokenizer
from tests.spa.tiny_side import LADDER, PLUGIN
from tests.virtual_devices import virtual_devices

QUIET = Console(quiet=True)


@pytest.fixture
def config(tiny_lm, echo_task, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return FitConfig(
        model=str(tiny_lm),
        task=str(echo_task),
        steps=6,
        learning_rate=1e-2,
        batch_size=8,
        side=LADDER,
        start="random",
        importance_examples=16,
        gate=GateConfig(steps=50),
        max_length=16,
        buckets=(16,),
        save_every=2,
    )


def contents(folder):
    return Run.open(folder).history(), load_plugin(folder)


def assert_same_run(a, b):
    (history, plugin), (others, other) = contents(a), contents(b)
    assert history == others
    jax.tree.map(np.testing.assert_array_equal, plugin.side, other.side)
    assert plugin.threshold == other.threshold


def test_stopped_after_any_step_the_run_continues_bit_by_bit(config, tmp_path, monkeypatch):
    """With taps from a cache in memory, which a new process has to make again."""
    config = dataclasses.replace(config, cache_taps="ram", start="sliced")
    fit(config, tmp_path / "whole", console=QUIET)
    step, count = SideTrainer.step.func, iter(range(1, 100))

    def counted(self):
        real = step(self)

        def run(*args):
            if next(count) in (1, 3):
                os.kill(os.getpid(), signal.SIGTERM)
            return real(*args)

        return run

    with monkeypatch.context() as patch:
        patch.setattr(SideTrainer, "step", property(counted))
        stops = 0
        while fit(config, tmp_path / "stopped", console=QUIET) is None:
            stops += 1
    assert stops == 2
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.timeout(600)
def test_on_a_mesh_the_losses_are_those_of_one_device(config, tmp_path):
    fit(config, tmp_path / "one", console=QUIET)
    flags = f"--model {config.model} --task {config.task} --steps 6 --learning-rate 1e-2 --batch-size 8 --start random"
    flags += " --max-length 16 --buckets 16 --gate.steps 50 --mesh fsdp=2"
    flags += " --side.width 8 --side.every 2 --side.heads 2 --side.mlp 6 --save-every 2"
    command = [sys.executable, "-m", "spa_jax.cli", "fit", *flags.split(), "--out", str(tmp_path / "two")]
    for _ in range(3):  # XLA ends a process whose devices have not met in a collective for a minute: on a busy machine
        done = subprocess.run(command, env=virtual_devices(2), capture_output=True, text=True)
        if "rendezvous" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    one, two = ([row["loss"] for row in contents(tmp_path / name)[0]] for name in ("one", "two"))
    np.testing.assert_allclose(one, two, rtol=1e-5)
    again = fit(config, tmp_path / "whole", console=QUIET)  # a finished run is left as it is
    assert again.config == config.anywhere()


def test_a_plugin_learns_the_task_and_its_gate_is_set_for_the_usage(config, tmp_path):
    config = dataclasses.replace(config, steps=150, save_every=1000, gate=GateConfig(usage=0.6))
    fitted = fit(config, tmp_path / "run", console=QUIET)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["side_loss"] < 0.8 * result["base_loss"]
    assert result["usage"] == pytest.approx(0.6, abs=0.1)
    assert result["side_loss"] < result["gated_loss"] < result["base_loss"]
    plugin = fitted.plugin
    train = config.load_data(config.get_task(), fitted.model)["train"]
    for_side, for_gate = config.split(train)  # the gate learns from examples that the side network has not seen
    assert len(for_side) + len(for_gate) == len(train) and len(for_gate) == round(config.gate.share * len(train))
    scores = score_tokens(fitted.model, plugin.side, "spa", for_gate)
    gate = fit_gate(scores, config.gate, spa.Setting.SPA, jax.random.key(config.seed))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), gate, plugin.side.gate)
    assert plugin.threshold_for(0.0) == 2.0 and plugin.threshold_for(1.0) == 0.0
    assert plugin.threshold_for(0.9) < plugin.threshold < plugin.threshold_for(0.2)
    assert plugin.threshold_for(None) == plugin.threshold
    with pytest.raises(ConfigError, match=r"usage = 1\.5: expected a share"):
        plugin.threshold_for(1.5)
    opened = load_run(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, opened.plugin.side, plugin.side)
    assert opened.config == config.anywhere()


def test_cached_ladders_train_as_the_backbone_itself(config, tmp_path):
    config = dataclasses.replace(config, setting="s1")
    whole, ram, disk = (
        fit(dataclasses.replace(config, cache_taps=taps), tmp_path / taps, console=QUIET).plugin.side.net
        for taps in ("off", "ram", "disk")
    )
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3)  # noqa: E731  taps are fp16
    jax.tree.map(close, ram, whole)
    jax.tree.map(np.testing.assert_array_equal, ram, disk)
    assert not (tmp_path / "disk" / "taps").exists()


def test_cached_ladders_are_bounded_and_know_what_they_are_of(config, tmp_path):
    config = dataclasses.replace(config, cache_taps="disk", taps_folder=str(tmp_path / "taps"), setting="s1")
    with pytest.raises(TapCacheError, match=r"more than the bound of 1e-06 GB.*--cache-gb"):
        fit(dataclasses.replace(config, cache_gb=1e-6), tmp_path / "small", console=QUIET)
    fit(config, tmp_path / "one", console=QUIET)
    made = (tmp_path / "taps" / "taps.f16").stat().st_mtime_ns
    fit(dataclasses.replace(config, learning_rate=1e-3), tmp_path / "two", console=QUIET)
    assert (tmp_path / "taps" / "taps.f16").stat().st_mtime_ns == made  # read, not written
    with pytest.raises(TapCacheError, match="another base, other data or other layers"):
        fit(dataclasses.replace(config, side=dataclasses.replace(LADDER, every=1)), tmp_path / "three", console=QUIET)
    for file, kept in (("taps.f16", 100), ("filled.npy", 0)):
        with (tmp_path / "taps" / file).open("r+b") as f:
            content = f.read()
            f.truncate(kept)
        with pytest.raises(TapCacheError, match=r"taps cannot be used: .*Delete the folder"):
            fit(config, tmp_path / f"no {file}", console=QUIET)
        (tmp_path / "taps" / file).write_bytes(content)


def test_cached_ladders_have_their_room_before_they_fill(config, tmp_path, monkeypatch):
    """A map of a file with holes would end in SIGBUS where the disk is full."""

    def full(fd, offset, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    config = dataclasses.replace(config, cache_taps="disk", taps_folder=str(tmp_path / "taps"), setting="s1")
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(TapCacheError, match=r"No space left on device\. They take .* GB: make room, or name a folder"):
        fit(config, tmp_path / "run", console=QUIET)
    monkeypatch.undo()
    assert fit(config, tmp_path / "run", console=QUIET)


def test_a_damaged_importance_is_measured_anew(config, tmp_path):
    config = dataclasses.replace(config, start="sliced", setting="s1", steps=1)
    first = fit(config, tmp_path / "one", console=QUIET)
    (file,) = (tmp_path / "cache").rglob("importance/*.npz")
    file.write_bytes(file.read_bytes()[:100])
    again = fit(config, tmp_path / "two", console=QUIET)
    jax.tree.map(np.testing.assert_array_equal, first.plugin.side, again.plugin.side)


def test_few_examples_are_seen_six_times(config, tmp_path):
    unsaid = dataclasses.replace(config, steps=None, limit=80, setting="s1", batch_size=16)
    fitted = fit(unsaid, tmp_path / "run", console=QUIET)
    assert fitted.config.steps == 6 * 80 // 16 == len(Run.open(tmp_path / "run").history())
    assert fit(unsaid, tmp_path / "run", console=QUIET).config == fitted.config
    assert unsaid.for_examples(10).steps == 20 and unsaid.for_examples(10**6).steps == 600
    assert config.for_examples(10**6).steps == config.steps


def test_a_side_network_begins_where_another_ended(config, tmp_path, monkeypatch):
    first = fit(dataclasses.replace(config, setting="s1"), tmp_path / "one", console=QUIET).plugin.side
    monkeypatch.chdir(tmp_path)
    still = dataclasses.replace(config, user="alice", seed=7, start="one", steps=1, learning_rate=1e-12)
    fitted = fit(still, "two", console=QUIET)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-9), fitted.plugin.side.net, first.net)
    assert fitted.config.start == str(tmp_path / "one") and load_run("two").config == fitted.config
    for message, changes in (
        (r"start: .* holds no plugin .* Expected 'sliced' \(of ladders\), 'random', or", {"start": "slicd"}),
        (r"of another shape; give --side\.width 8\.$", {"side": dataclasses.replace(LADDER, width=12)}),
        ("made for s1, where it adds to the base; with s2 it would not", {"setting": "s2"}),
    ):
        with pytest.raises(ConfigError, match=message):
            fit(dataclasses.replace(still, **changes), "three", console=QUIET)
        assert not Path("three").exists()


def test_sparse_memory_learns_with_holes(config, tiny_lm):
    """Of each text a share of its own, between a fifth and all, is seen."""
    model = from_pretrained(tiny_lm)
    frame = Frame(None, None, np.ones((400, 200), bool))
    for memory, setting, holes in (("sparse", "spa", True), ("sparse", "s1", False), ("lazy", "spa", False)):
        side = spa.init_side(jax.random.key(0), model.config, dataclasses.replace(LADDER, memory=memory))
        seen = SideTrainer(model.graphdef, side, spa.Setting(setting), config.optimizer)._seen(frame, jax.random.key(1))
        assert (seen is not None) == holes
        if holes:
            shares = np.asarray(seen).mean(1)
            assert 0.1 < shares.min() < 0.3 and shares.max() > 0.9 and shares.mean() == pytest.approx(0.6, abs=0.04)


def test_every_kind_and_setting_fits(config, tmp_path):
    for name, changes in {
        "sparse": {"side": dataclasses.replace(LADDER, memory="sparse"), "gate": GateConfig("similarity", bank=16)},
        "s2": {"side": PLUGIN, "setting": "s2", "gate": GateConfig("straight-through", price=0.1, steps=20)},
        "s3": {"setting": "s3"},
    }.items():
        fitted = fit(dataclasses.replace(config, steps=2, **changes), tmp_path / name, console=QUIET)
        opened = load_plugin(tmp_path / name)
        assert opened.setting == fitted.config.setting
        assert bool(opened.side.gate) == opened.setting.gated == bool(opened.calibration)
    with pytest.raises(ConfigError, match="s3, which has no gate"):
        load_plugin(tmp_path / "s3").threshold_for(0.5)


def test_a_run_says_what_it_is_of(config, tmp_path):
    fit(dataclasses.replace(config, steps=2, setting="s1"), tmp_path / "run", console=QUIET)
    with pytest.raises(RunError, match="is a run of `spa fit`: expected one of `mlfs fit`"):
        mlfs.load_run(tmp_path / "run")
    with pytest.raises(RunError, match="is a run of `spa fit`: expected one of `spa baseline`"):
        load_baseline(tmp_path / "run")
    file = tmp_path / "run" / "run.json"  # one of mlfs fit, from before a run said what it is of
    old = json.loads(file.read_text())
    file.write_text(json.dumps(old | {"config": old["config"] | {"gate": {"method": None}}}))
    with pytest.raises(RunError, match=r"no run of spa fit that this version reads \(gate method = None: expected"):
        load_run(tmp_path / "run")
    del old["kind"], old["config"]["side"]
    file.write_text(json.dumps(old))
    with pytest.raises(RunError, match=r"no run of spa fit that this version reads \('side'\)"):
        load_run(tmp_path / "run")


def test_one_plugin_for_each_user(config, tmp_path):
    config = dataclasses.replace(config, steps=60, setting="s1", save_every=100)
    fitted = fit_users(config, tmp_path / "users", console=QUIET)
    assert {*fitted} == {"alice", "bob"} == {load_plugin(tmp_path / "users" / u).user for u in ("alice", "bob")}
    # each knows its own user's answers better than the other's
    model, data = fitted["bob"].model, config.load_data(config.get_task(), fitted["bob"].model)["test"]
    from spa_jax.score import score_tokens

    own, other = (
        score_tokens(model, fitted[user].plugin.side, "s1", data.of_user("bob")).side_nll.mean()
        for user in ("bob", "alice")
    )
    assert own < other
    assert (tmp_path / "users" / "alice" / "plugin.safetensors").stat().st_size < 5e6
    with pytest.raises(ConfigError, match="user is empty"):
        dataclasses.replace(config, user=" ")
    with pytest.raises(UnknownNameError, match="did you mean 'alice'"):
        fit(dataclasses.replace(config, user="alise"), tmp_path / "alise", console=QUIET)


def test_users_with_few_examples(config, tmp_path):
    """Zoe has none to test on, carol none to choose a threshold on; each of the others has taps of its own."""
    folder = tmp_path / "task"
    folder.mkdir()
    of = {"train": ("alice", "zoe", "carol"), "validation": ("alice", "zoe"), "test": ("alice",)}
    for split, users in of.items():
        rows = [{"prompt": f"w{3 + i}", "completion": "w5", "user": user} for user in users for i in range(12)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = dataclasses.replace(
        config, task=str(folder), steps=1, cache_taps="disk", taps_folder=str(tmp_path / "taps"), start="sliced"
    )
    said = io.StringIO()
    fitted = fit_users(config, tmp_path / "users", console=Console(file=said))
    assert {*fitted} == {"alice", "zoe"} and "without validation examples: carol" in said.getvalue()
    assert {file.name for file in (tmp_path / "taps").iterdir()} == {"alice", "zoe"}
    with pytest.raises(UnknownNameError, match="unknown split 'test'"):
        load_split(fitted["zoe"])
    with pytest.raises(ConfigError, match="user 'carol' has no validation examples"):
        fit(dataclasses.replace(config, user="carol"), tmp_path / "carol", console=QUIET)


def test_a_base_in_bf16_leaves_an_importance_that_others_read(config, tiny_lm, tmp_path):
    config = dataclasses.replace(config, steps=1, start="sliced")
    coarse = from_pretrained(tiny_lm, head="lm", dtype=jnp.bfloat16)
    fit(config, tmp_path / "coarse", model=coarse, console=QUIET)
    (file,) = (tmp_path / "cache").rglob("importance/*.npz")
    with np.load(file) as saved:
        assert {saved[name].dtype for name in saved} == {np.dtype("float32")}
    fit(config, tmp_path / "fine", console=QUIET)


@pytest.mark.parametrize("start", ["sliced", "random"])
def test_beside_a_quantised_base(config, start, tmp_path):
    """As QST trains. The plugin is of these weights: it knows their bits, and refuses the base in float."""
    fitted = fit(dataclasses.replace(config, base_bits=4, start=start), tmp_path / "4", console=QUIET)
    assert isinstance(mlfs.flatten(fitted.model.base)["layers.q.kernel"].get_value(), Quantised)
    assert load_run(tmp_path / "4").plugin.base_bits == 4
    plain = from_pretrained(config.model)
    with pytest.raises(PluginError, match=r"another base .*in 4 bits"):
        fitted.plugin.check(plain.decoder, plain.base)
    fitted.plugin.check(plain.decoder, plain.quantise(4).base)
    with pytest.raises(ConfigError, match="base_bits = 4: a base on a mesh"):
        fit(dataclasses.replace(config, base_bits=4), tmp_path / "mesh", mesh=mlfs.make_mesh("data=1"), console=QUIET)
    with pytest.raises(ConfigError, match="base_bits = 3: expected 4, 8 or 32"):
        dataclasses.replace(config, base_bits=3)
    with pytest.raises(ConfigError, match="base_bits = 32: this base is in 4 bits already"):
        fit(config, tmp_path / "32", model=fitted.model, console=QUIET)


def test_a_run_of_before_there_were_base_bits_goes_on(config, tmp_path):
    fit(config, tmp_path / "run", console=QUIET)
    assert "base_bits" not in Run.open(tmp_path / "run").config
    assert load_run(tmp_path / "run").config == fit(config, tmp_path / "run", console=QUIET).config == config.anywhere()


def test_a_plugin_refuses_what_it_was_not_made_for(config, tiny_lm, tmp_path):
    fitted = fit(dataclasses.replace(config, steps=1, setting="s1"), tmp_path / "run", console=QUIET)
    model, plugin = fitted.model, fitted.plugin
    same = plugin.check(model.config, model.base, model.source)
    assert same is plugin
    from tests.mlfs.tiny import tiny_decoder

    other = tiny_decoder("llama", seed=1, max_positions=64, eos_token_ids=(2,))
    with pytest.raises(PluginError, match="another base"):
        plugin.check(other.config, other.base)
    wide = tiny_decoder("llama", embed=32)
    with pytest.raises(PluginError, match=r"3 layers of width 24.*3 of width 32"):
        plugin.check(wide.config, wide.base)
    with pytest.raises(PluginError, match="another tokenizer"):
        plugin.check(model.config, model.base, save_tokenizer(tmp_path / "words", 40))
    # in bf16 it is the same base
    plugin.check(model.config, from_pretrained(tiny_lm, dtype=jnp.bfloat16).base)
    with pytest.raises(PluginError, match="holds no plugin"):
        load_plugin(tmp_path / "nowhere")
    weights = tmp_path / "run" / "plugin.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    with pytest.raises(PluginError, match="damaged"):
        load_plugin(tmp_path / "run")
    narrow = plugin.side.replace(net=plugin.side.net | {"up.kernel": plugin.side.net["up.kernel"][:, :8]})
    save_plugin(tmp_path / "narrow", plugin.replace(side=narrow))
    with pytest.raises(PluginError, match=r"up.kernel: expected shape \(8, 24\), found \(8, 8\)"):
        load_plugin(tmp_path / "narrow")


def test_mistakes_are_named_before_anything_is_written(config, tmp_path):
    for error, message, changes in (
        (UnknownNameError, "setting 's4'", {"setting": "s4"}),
        (ConfigError, "steps = 0", {"steps": 0}),
        (ConfigError, "cache_taps = 'tape'", {"cache_taps": "tape"}),
        (ConfigError, "taps_folder = 'taps' needs cache_taps = 'disk'", {"taps_folder": "taps"}),
        (ConfigError, "start = 'sliced' of a plugin", {"start": "sliced", "side": PLUGIN}),
        (ConfigError, "width = 24: expected less", {"side": dataclasses.replace(LADDER, width=24)}),
        (ConfigError, "wiki-topic is a classification task", {"task": "wiki-topic"}),
        (UnknownNameError, "did you mean 'wiki-description'", {"task": "wiki-descriptions"}),
    ):
        with pytest.raises(error, match=message):
            fit(dataclasses.replace(config, **changes), tmp_path / "run", console=QUIET)
    for message, gate in {
        "usage = -0.1: expected a share": {"usage": -0.1},
        "method = 'guess'": {"method": "guess"},
        "gate share = 1": {"share": 1},
        "price = -1": {"price": -1},
        "price = nan": {"price": float("nan")},
    }.items():
        with pytest.raises(ConfigError, match=message):
            GateConfig(**gate)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "w3 w4", "completion": "w5"}\n{"prompt": "w3 w4"}\n')
    with pytest.raises(DataError, match="line 2: no field 'completion'"):
        fit(dataclasses.replace(config, task=str(broken)), tmp_path / "run", console=QUIET)
    assert not (tmp_path / "run").exists()
    with pytest.raises(RunError):
        load_run(tmp_path / "run")
    assert spa.Setting.parse("s1") is spa.Setting.S1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_users_are_asked_to_stop_while_the_first_ones_tokens_are_scored(config, tmp_path, monkeypatch, number):
    whole, asked = train.score_tokens, []

    def score(*args, before_each, **kwargs):
        if not asked:
            asked.append(os.kill(os.getpid(), number))
        return whole(*args, before_each=before_each, **kwargs)

    monkeypatch.setattr(train, "score_tokens", score)
    config, out = dataclasses.replace(config, steps=4, setting="s1"), tmp_path / "users"
    with pytest.raises(KeyboardInterrupt) if number == signal.SIGINT else contextlib.nullcontext():
        assert fit_users(config, out, console=QUIET) is None
    assert not Run.open(out / "alice").finished and not (out / "bob").exists()
    assert {*fit_users(config, out, console=QUIET)} == {"alice", "bob"}


def test_users_are_asked_to_stop_as_the_first_one_ends(config, tmp_path, monkeypatch):
    whole = train.save_plugin
    monkeypatch.setattr(train, "save_plugin", lambda *args: (os.kill(os.getpid(), signal.SIGTERM), whole(*args))[1])
    config, out = dataclasses.replace(config, steps=4, setting="s1"), tmp_path / "users"
    assert fit_users(config, out, console=QUIET) is None
    assert Run.open(out / "alice", finished=True) and not (out / "bob").exists()
