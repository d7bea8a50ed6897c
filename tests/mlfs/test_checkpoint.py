"""Checkpoints: bit by bit, atomic, and refused by name when anything about them is wrong."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlfs_jax.checkpoint import MANIFEST, Checkpoints
from mlfs_jax.errors import CheckpointError
from tests.virtual_devices import virtual_devices


class Moments(NamedTuple):
    mu: jax.Array
    nu: jax.Array


def state_of(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((5, 7)).astype(np.float32)
    weights[0, :4] = [np.nan, np.inf, -0.0, 1e-42]  # bits that a cast or a text form would lose
    return {
        "lora": {"layers.q": {"a": jnp.asarray(weights), "b": jnp.asarray(weights.T, jnp.bfloat16)}},
        "opt": (Moments(jnp.asarray(weights) * 2, jnp.ones(3)), {}),
        "step": jnp.int32(seed),
        "key": jax.random.key_data(jax.random.fold_in(jax.random.key(7), seed)),
        "order": rng.permutation(11),  # numpy int64 stays numpy int64
        "mask": jnp.asarray([True, False]),
        "none": jnp.zeros((0, 4)),
    }


def bits(tree) -> list:
    return [(a.dtype, a.shape, np.asarray(a).tobytes()) for a in jax.tree.leaves(tree)]


def same(a, b) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and bits(a) == bits(b)


def save(directory: Path, *steps: int, **options) -> None:
    with Checkpoints(directory, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, state_of(step), {"epoch": step / 2})


def test_roundtrip_is_bitwise_and_keeps_the_kind_of_every_leaf(tmp_path):
    save(tmp_path, 3)
    template = jax.tree.map(lambda a: (np if isinstance(a, np.ndarray) else jnp).zeros_like(a), state_of(9))
    state, meta = Checkpoints(tmp_path).restore(template)
    assert same(state, state_of(3))
    assert isinstance(state["opt"][0], Moments)
    assert isinstance(state["order"], np.ndarray) and state["order"].dtype == np.int64
    assert isinstance(state["none"], jax.Array)
    assert meta == {"epoch": 1.5}


def test_keeps_the_newest_and_reads_any_of_them(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest() is None and checkpoints.steps() == []
        for step in (1, 2, 10):
            checkpoints.save(step, state_of(step))
        checkpoints.wait()
        assert checkpoints.steps() == [2, 10] and checkpoints.latest() == 10
        assert same(checkpoints.restore(state_of(0), 2)[0], state_of(2))
        assert same(checkpoints.restore(state_of(0))[0], state_of(10))
        with pytest.raises(CheckpointError, match=r"no step 1 in .*\[2, 10\]"):
            checkpoints.restore(state_of(0), 1)


def test_the_state_may_be_donated_or_changed_while_it_is_being_written(tmp_path):
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    x, counter = jnp.zeros(1_000_000), np.zeros(1_000_000)
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        for i in range(4):
            checkpoints.save(i, {"x": x, "n": counter})
            for _ in range(5):
                x = step(x)
            counter += 1
        for i in range(4):
            state, _ = checkpoints.restore({"x": x, "n": counter}, i)
            assert np.unique(np.asarray(state["x"])).tolist() == [5.0 * i]
            assert np.unique(state["n"]).tolist() == [i]


def test_restores_onto_the_sharding_of_the_template(tmp_path):
    script = """
import sys, jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from mlfs_jax.checkpoint import Checkpoints
put = lambda shape, spec: NamedSharding(jax.make_mesh(shape, ("x", "y"), axis_types=(AxisType.Auto,) * 2), spec)
old, new = put((4, 1), P("x")), put((2, 2), P("y", "x"))
w = np.arange(32.0, dtype=np.float32).reshape(8, 4)
with Checkpoints(sys.argv[1]) as c:
    c.save(1, {"w": jax.device_put(w, old)})
    for target in (jax.device_put(w * 0, new), jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=new)):
        state, _ = c.restore({"w": target})
        assert state["w"].sharding == new and (np.asarray(state["w"]) == w).all()
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env=virtual_devices(4), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "orbax" not in done.stderr  # its log lines are kept from the user


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(step=jnp.int32([1])), r"at 'step': expected int32\[1\], found int32\[\]"),
        (lambda s: s.update(step=jnp.float32(1)), r"at 'step': expected float32\[\], found int32\[\]"),
        (lambda s: s["lora"]["layers.q"].pop("a"), "found but not expected: 'lora/layers.q/a'"),
        (lambda s: s.update(more=jnp.ones(2)), "expected but not found: 'more'"),
        (lambda s: s.update(none=jnp.zeros((0, 5))), r"at 'none': expected float32\[0, 5\], found float32\[0, 4\]"),
    ],
)
def test_a_state_of_another_form_is_refused_by_key(tmp_path, change, message):
    save(tmp_path, 1)
    template = state_of(0)
    change(template)
    with pytest.raises(CheckpointError, match=message) as error:
        Checkpoints(tmp_path).restore(template)
    assert "Use the configuration that the checkpoint was written with" in str(error.value)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": 1.5}, "a float at 'a'.*jnp.asarray"),
        ({"a": jax.random.key(0)}, "typed PRNG key at 'a'.*key_data"),
        ({"a/b": np.ones(1), "a": {"b": np.ones(1)}}, "two arrays named 'a/b'"),
        ({}, "no array"),
    ],
)
def test_what_cannot_be_saved_is_refused_by_key(tmp_path, state, message):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError, match=message):
        checkpoints.save(1, state)


def test_steps_grow_and_the_same_step_twice_is_no_second_save(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, state_of(5), {"epoch": (1, 2)})
        checkpoints.save(5, state_of(5), {"epoch": (1, 2)})  # as when SIGTERM comes right after a save
        with pytest.raises(CheckpointError, match="already holds step 5"):
            checkpoints.save(5, state_of(5), {"epoch": 2})
        with pytest.raises(CheckpointError, match="steps must grow"):
            checkpoints.save(4, state_of(4))
        with pytest.raises(CheckpointError, match="JSON"):
            checkpoints.save(6, state_of(6), {"a": object()})
        assert checkpoints.steps() == [5]
    with pytest.raises(CheckpointError, match="keep=0"):
        Checkpoints(tmp_path, keep=0)
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        Checkpoints(tmp_path / "elsewhere").restore(state_of(0))


def test_no_damage_is_loaded_silently(tmp_path):
    """200 times some file of the step is flipped, cut, emptied, grown, zeroed, deleted, exchanged for that of another
    step, joined by a foreign one, or made by a newer version: refused by name, or exactly right."""
    whole = tmp_path / "whole"
    save(whole, 1, 2)
    files = sorted(p.relative_to(whole) for p in (whole / "2").rglob("*") if p.is_file())
    assert len(files) > 8
    rng = random.Random(0)
    refused = harmless = 0
    for i in range(200):
        copy = tmp_path / f"copy{i}"
        shutil.copytree(whole, copy)
        victim = copy / files[i % len(files)]
        content = bytearray(victim.read_bytes())
        kind = rng.choice(["flip", "flip", "cut", "empty", "grow", "zero", "delete", "other", "foreign", "newer"])
        if kind in ("other", "newer"):
            twin = whole / "1" / victim.relative_to(copy / "2")
            if kind == "newer" or not twin.is_file():  # the names of orbax's data files are random
                victim = copy / "2" / MANIFEST
                content = json.dumps(json.loads(victim.read_bytes()) | {"format": 2}).encode()
            else:
                content = twin.read_bytes()
        elif kind == "foreign":
            victim, content = victim.with_name("foreign"), rng.randbytes(100)
        elif kind == "flip":
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del content[rng.randrange(len(content)) :]
        elif kind == "empty":
            content.clear()
        elif kind == "grow":
            content += b"\0"
        elif kind == "zero":
            content[:] = bytes(len(content))
        victim.unlink() if kind == "delete" else victim.write_bytes(content)
        checkpoints = Checkpoints(copy)
        try:
            state, meta = checkpoints.restore(state_of(0))
        except CheckpointError as e:
            refused += 1
            assert str(copy / "2") in str(e), str(e)
            assert any(todo in str(e) for todo in ("continue from step 1", "format 2", "was renamed")), str(e)
            # ... and doing what the message says works
            shutil.rmtree(copy / "2")
            assert checkpoints.latest() == 1
        else:
            harmless += 1
            assert same(state, state_of(2)) and meta == {"epoch": 1.0}, (kind, victim)
            # orbax's time stamps are all that does not matter, and a blank in JSON
            ignored = ("_CHECKPOINT_METADATA", "commit_success.txt", MANIFEST, "foreign")
            # or a file that is the same in every step
            assert victim.name in ignored or content == (whole / victim.relative_to(copy)).read_bytes(), (kind, victim)
        shutil.rmtree(copy)
    assert refused > 120 and harmless > 0


def test_foreign_newer_and_renamed_steps_are_refused_by_name(tmp_path):
    save(tmp_path, 1)
    manifest = tmp_path / "1" / MANIFEST
    shutil.copytree(tmp_path / "1", tmp_path / "7")
    with pytest.raises(CheckpointError, match="holds step 1: the folder was renamed"):
        Checkpoints(tmp_path).restore(state_of(0))
    shutil.rmtree(tmp_path / "7")
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 2}))
    with pytest.raises(CheckpointError, match=r"format 2.*reads up to 1.*newer version"):
        Checkpoints(tmp_path).restore(state_of(0))
    manifest.unlink()
    with pytest.raises(CheckpointError, match=f"no {MANIFEST}.*another program"):
        Checkpoints(tmp_path).restore(state_of(0))


def test_leftovers_of_a_killed_save_are_ignored_and_swept_at_the_next_save(tmp_path):
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp")
    shutil.copytree(tmp_path / "1", tmp_path / "0.deleted")
    (tmp_path / "notes").mkdir()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 1
        assert (tmp_path / "2.orbax-checkpoint-tmp").exists()  # reading changes nothing
        checkpoints.save(2, state_of(2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2", "notes"]


def test_disk_full_during_a_save_leaves_the_old_step_whole(tmp_path):
    full = tmp_path / "small"
    full.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(full)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        big = {"w": jnp.asarray(np.random.default_rng(0).standard_normal(250_000), jnp.float32)}  # 1 MB
        with Checkpoints(full / "c", keep=9) as checkpoints:
            for step in (1, 2, 3):
                checkpoints.save(step, big)
                if step == 2:  # keep=9 and three whole steps do not fit
                    checkpoints.wait()
                    (full / "ballast").write_bytes(bytes(500_000))
            with pytest.raises(CheckpointError, match=r"disk is full: checkpoint step 3 .*step, 2, is untouched"):
                checkpoints.wait()
            assert sorted(p.name for p in (full / "c").iterdir()) == ["1", "2"]  # and gave the space back
            assert same(checkpoints.restore(big)[0], big)
            (full / "ballast").unlink()
            checkpoints.save(4, big)  # the same object goes on once there is room
            assert same(checkpoints.restore(big, 4)[0], big)
    finally:
        subprocess.run(["umount", "-l", str(full)], check=True)


def test_disk_full_while_writing_the_manifest(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def no_space(*_):
        raise OSError(28, "No space left on device")

    with Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr("mlfs_jax.checkpoint._write_manifest", no_space)
        checkpoints.save(2, state_of(2))
        with pytest.raises(CheckpointError, match=r"disk is full.*step 2 .*step, 1, is untouched"):
            checkpoints.save(3, state_of(3))  # the next call is told of what failed in the background
        monkeypatch.undo()
        assert checkpoints.latest() == 1
        checkpoints.save(3, state_of(3))
    assert Checkpoints(tmp_path).steps() == [1, 3]


def test_an_error_in_the_body_is_not_hidden_by_the_failed_save(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("mlfs_jax.checkpoint._write_manifest", broken)
    with pytest.raises(KeyError) as error, Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state_of(1))
        raise KeyError("the body's")
    assert "step 1 could not be written" in error.value.__notes__[0]
    with pytest.raises(CheckpointError, match="no step was saved before it"), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state_of(1))


def test_kill_9_at_random_moments_leaves_a_whole_step(tmp_path):
    script = """
import sys, jax.numpy as jnp
from mlfs_jax.checkpoint import Checkpoints
like = {"w": jnp.zeros(200_000), "n": jnp.int32(0)}
with Checkpoints(sys.argv[1], keep=1) as c:
    first = c.latest() or 0
    for step in range(first + 1, first + 10_000):
        c.save(step, {"w": jnp.full(200_000, step, jnp.float32), "n": jnp.int32(step)}, {"at": step})
        print(step, flush=True)
"""
    like = {"w": jnp.zeros(200_000), "n": jnp.int32(0)}
    rng, last = random.Random(1), 0
    for _ in range(2):
        child = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        shown = int(child.stdout.readline())
        while shown < last + 4:
            shown = int(child.stdout.readline())
        time.sleep(rng.random() * 0.1)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        checkpoints = Checkpoints(tmp_path, keep=1)
        step = checkpoints.latest()
        state, meta = checkpoints.restore(like)
        assert step >= shown - 1 and meta == {"at": step} and int(state["n"]) == step
        assert np.unique(np.asarray(state["w"])).tolist() == [step]
        last = step
