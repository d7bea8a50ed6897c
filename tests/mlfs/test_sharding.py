"""On 8 virtual devices: the losses of one device, an eighth of the bytes, one compile."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import mlfs_jax as mlfs
from mlfs_jax.errors import ConfigError, UnknownNameError
from mlfs_jax.sharding import spec_of
from tests.virtual_devices import virtual_devices

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    done = subprocess.run(
        [sys.executable, "-m", "tests.mlfs.eight_devices", str(tmp_path_factory.mktemp("sharded"))],
        cwd=ROOT,
        env=virtual_devices(8),
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("mesh", ["fsdp", "tensor"])  # of Auto and of Explicit axes
def test_losses_are_those_of_one_device(report, mesh):
    np.testing.assert_allclose(report[mesh]["losses"], report["one"]["losses"], rtol=1e-5)
    assert report[mesh]["compiles"] == 1


def test_a_device_holds_its_share(report):
    whole = report["whole"]
    assert report["fsdp"]["nbytes"] == pytest.approx(whole / 4, rel=0.05)  # data=2 holds everything twice
    assert report["tensor"]["nbytes"] == pytest.approx(whole / 8, rel=0.05)
    assert report["loaded"]["nbytes"] == pytest.approx(whole / 8, rel=0.05) and report["loaded"]["same"]


def test_neither_loading_nor_exporting_gathers_the_model_on_one_device(report):
    whole, loaded = report["whole"], report["loaded"]
    assert loaded["largest"] < whole / 4  # or what follows would say little
    assert whole / 8 <= loaded["loading"] <= whole / 8 * 1.05 + loaded["largest"]
    assert loaded["exporting"] <= whole / 8 * 1.05


def test_generation_on_a_mesh(report):
    assert report["generated"]["same"]
    assert report["generated"]["shares"] == [1 / 8, 1 / 8]  # of texts and of key-value heads


def test_a_checkpoint_is_restored_onto_another_mesh(report):
    assert report["moved"] == {"same": True, "placed": True}


def test_a_device_does_its_share(report):
    flops = report["flops"]
    assert flops["data=8"] == pytest.approx(flops["None"] / 8, rel=0.05)
    assert flops["fsdp=8"] == pytest.approx(flops["None"] / 8, rel=0.05)


def test_what_does_not_divide_stays_whole():
    mesh = jax.sharding.AbstractMesh((2, 4, 2), ("data", "fsdp", "tensor"))
    P = jax.sharding.PartitionSpec
    assert spec_of(mesh, ("layers", "embed", "heads", "head_dim"), (3, 8, 6, 5)) == P(
        None, ("fsdp",), ("tensor",), None
    )
    assert spec_of(mesh, ("layers", "embed", "kv_heads", "head_dim"), (3, 8, 3, 5)) == P(None, ("fsdp",), None, None)
    assert spec_of(mesh, ("embed", "embed"), (8, 8)) == P(("fsdp",), None)  # one mesh axis splits an array once
    assert spec_of(mesh, ("batch", ""), (16, 7)) == P(("data", "fsdp"), None)


@pytest.mark.parametrize(
    ("spec", "error", "says"),
    [
        ("data=2", ConfigError, "2 places for 1 devices"),
        ("fdsp=2", UnknownNameError, "did you mean 'fsdp'"),
        ("data=x", ConfigError, "data = 'x'"),
        ("data=0", ConfigError, "data = '0'"),
        ("data=²", ConfigError, "data = '²'"),
    ],
)
def test_a_mesh_that_cannot_be_says_why(spec, error, says):
    with pytest.raises(error, match=says):
        mlfs.make_mesh(spec, jax.devices()[:1])


def test_rows_must_divide_among_the_devices():
    mesh = jax.sharding.AbstractMesh((2, 4, 1), ("data", "fsdp", "tensor"))
    with pytest.raises(ConfigError, match="batch_size = 6 on a mesh of 8"):
        mlfs.shard_batch(mesh, {"input_ids": np.zeros((6, 3))})
