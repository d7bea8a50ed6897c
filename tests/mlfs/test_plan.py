"""A plan says what the step that is run has: bytes exactly, FLOPs and collectives of loops as often as they run."""

import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from mlfs_jax.backbone.tree import flatten
from mlfs_jax.cli import main
from mlfs_jax.errors import CheckpointError, ConfigError, UnknownNameError
from mlfs_jax.fit_config import FitConfig
from mlfs_jax.hf.configs import to_hf
from mlfs_jax.hlo import Collective, Cost, cost_of
from mlfs_jax.knobs import Setting, parse_bytes
from mlfs_jax.model import abstract, forward
from mlfs_jax.plan import plan
from mlfs_jax.published import SHAPES, config_of
from tests.mlfs.tiny import tiny_decoder, tiny_tokens
from tests.virtual_devices import virtual_devices

ROOT = Path(__file__).resolve().parents[2]


def python(*args: str, timeout: int = 280) -> dict:
    """What a process of its own prints, as JSON."""
    done = subprocess.run(
        [sys.executable, *args], cwd=ROOT, env=virtual_devices(8), capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout[done.stdout.index("{") :])


@pytest.fixture(scope="module")
def report():
    return python("-m", "tests.mlfs.eight_devices_plan")


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    (folder / "config.json").write_text(json.dumps(to_hf(tiny_decoder("llama").config)))
    return folder


@pytest.mark.parametrize(("run", "losses", "programs"), [("lora", 1, 2), ("sliced", 2, 3), ("masked", 3, 1)])
def test_a_plan_is_what_the_run_has(report, run, losses, programs):
    found = report[run]
    kept = found["parts"].pop("base as it was, for the next stage", 0)
    assert found["parts"] == found["real"]
    assert kept == (0 if run == "lora" else found["real"]["base"])  # a step's is merged with earlier stages
    assert found["after"] == found["real"]["adapters"] + found["real"]["optimizer"]
    assert found["losses"] == losses == 1 + found["plan"]["subnets"]
    assert len(found["plan"]["programs"]) == programs
    if run != "masked":  # there the first program is the whole step
        assert found["plan"]["programs"][0]["temp"] == found["first"]["temp"]
        assert found["plan"]["programs"][0]["flops"] == found["first"]["flops"] > 0
    told = found["plan"]["bytes per device"]
    assert sum(size for part, size in told.items() if part != "peak") == told["peak"]
    assert told["peak"] == max(program["peak"] for program in found["plan"]["programs"])


def test_each_device_has_the_activations_of_its_examples_only(report):
    one, fsdp = (report[mesh]["bytes per device"]["activations and workspace"] for mesh in ("one", "fsdp"))
    assert fsdp < one / 6
    flops = "flops per step and device"
    assert report["fsdp"][flops] == pytest.approx(report["one"][flops] / 8, rel=0.05)
    assert not report["one"]["collectives per step and device"]
    gathered = report["fsdp"]["collectives per step and device"]["all-gather"]
    assert gathered["count"] >= 2 * 2 * 7  # seven matrices in two layers, forward and backward


def test_what_the_mesh_does_not_divide_is_said(report):
    assert report["fsdp"]["not split"] == []
    assert any(said.startswith("heads = 4 is no multiple of tensor = 8") for said in report["tensor"]["not split"])


def test_knobs_are_measured_where_it_does_not_fit(tiny_llama):
    flags = ("--mesh", "data=2", "--batch-size", "4", "--length", "16", "--memory", "0.1MB", "--json")
    found = python("-m", "mlfs_jax.cli", "plan", "--model", str(tiny_llama), *flags)
    assert not found["fits"] and found["memory"] == 100_000
    assert set(found["instead"]) == {
        "--dtype bfloat16",
        "--remat",
        "--batch-size 2",
        "--length 8",
        "--rank 4",
        "--mesh data=2,fsdp=1,tensor=2",
        "--mesh data=1,fsdp=2,tensor=1",
        "--mesh data=2,fsdp=2,tensor=1",
    }
    del found["instead"]["--dtype bfloat16"]  # its activations are those of a CPU, which has no such products
    assert all(peak < found["bytes per device"]["peak"] for peak in found["instead"].values())


def test_on_one_device_at_the_command_line(tiny_llama, capsys):
    args = ["plan", "--model", str(tiny_llama / "config.json"), "--batch-size", "2", "--length", "8"]
    assert main([*args, "--memory", "1GiB"]) == 0
    shown = capsys.readouterr().out
    assert "matrix products" in shown and "estimate" in shown and "fits in 1GiB" in shown and "instead" not in shown
    assert main([*args, "--json"]) == 0
    told, config = json.loads(capsys.readouterr().out), config_of(str(tiny_llama))
    assert told["bytes per device"]["base"] == 4 * told["parameters"]
    assert told["parameters"] == sum(math.prod(leaf.shape) for leaf in flatten(abstract(config)[1]).values())


def test_the_length_is_what_the_model_can_read(tiny_hf, capsys):
    assert main(["plan", "--model", str(tiny_hf), "--batch-size", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["length"] == config_of(str(tiny_hf)).context < 1024


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--model", "llama-2-7"), "did you mean 'llama-2-7b'"),
        (("--model", "llama-2-7b", "--mesh", "fdsp=2"), "did you mean 'fsdp'"),
        (("--model", "llama-2-7b", "--memory", "80"), "number with a unit such as 80GiB"),
        (("--model", "llama-2-7b", "--length", "5000"), "length = 5000: expected 2 to 4096"),
        (("--model", "llama-2-7b", "--mesh", "fsdp=64"), "in a process of its own"),
    ],
)
def test_mistakes_are_said(args, says, capsys):
    assert main(["plan", *args]) == 2
    assert says in capsys.readouterr().err


def test_what_cannot_be_planned_says_why(tmp_path):
    fit, config = FitConfig("", "", batch_size=6), tiny_decoder("llama").config
    mesh = jax.sharding.AbstractMesh((2, 4, 1), ("data", "fsdp", "tensor"))
    with pytest.raises(ConfigError, match="batch_size = 6 on a mesh of 8"):
        plan(config, mesh, fit, 8)
    with pytest.raises(ConfigError, match="stage = 3: expected 0 to 2"):
        plan(config, mesh, fit, 8, stage=3)
    (tmp_path / "config.json").write_text('{"model_type": "lama"}')
    with pytest.raises(UnknownNameError, match="did you mean 'llama'"):
        config_of(str(tmp_path))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="cut short"):
        config_of(str(tmp_path / "model.gguf"))


def test_a_config_of_another_name_is_the_one_that_is_read(tmp_path):
    for name, layers in (("config.json", 3), ("other.json", 5)):
        (tmp_path / name).write_text(json.dumps(SHAPES["bert-base"] | {"num_hidden_layers": layers}))
    assert config_of(str(tmp_path / "other.json")).layers == 5
    assert config_of(str(tmp_path)).layers == 3


@pytest.mark.parametrize(("text", "size"), [("80GiB", 80 * 2**30), ("16 gb", 16 * 10**9), ("1.5MiB", 3 * 2**19)])
def test_bytes_are_read(text, size):
    assert parse_bytes(text) == size


def test_a_knob_turns_one_thing():
    setting = Setting(
        {"data": 2, "fsdp": 4, "tensor": 1}, FitConfig("", "", batch_size=8, rank=3, dtype="bfloat16", remat=True), 9
    )
    assert list(setting.turned()) == ["--mesh data=2,fsdp=4,tensor=2", "--mesh data=1,fsdp=8,tensor=1"]
    assert max(other.devices for other in setting.turned().values()) == 2 * setting.devices


PUBLISHED = {  # of the model cards; bert's: the backbone, whose classifier of 2 labels comes on top
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "bert-base": 109_482_240 + 2 * 768 + 2,
    "bert-large": 335_141_888 + 2 * 1024 + 2,
}


@pytest.mark.parametrize("name", SHAPES)
def test_published_shapes_have_the_published_size(name):
    weights = flatten(abstract(config_of(name))[1]).values()
    assert sum(math.prod(leaf.shape) for leaf in weights) == PUBLISHED[name]


def test_a_loop_counts_as_often_as_it_runs():
    model = tiny_decoder("llama", embed=48, mlp=96)
    batch = tiny_tokens(model.config, batch=2, length=16)
    run = lambda unroll: jax.jit(partial(forward, model.graphdef, unroll=unroll)).lower(model.base, batch).compile()  # noqa: E731
    scan, unrolled = run(False), run(True)
    flops = cost_of(scan.as_text()).flops
    assert flops == cost_of(unrolled.as_text()).flops
    assert 0.85 < flops / unrolled.cost_analysis()["flops"] < 1  # which counts what is no matrix product, too
    assert scan.cost_analysis()["flops"] < 0.6 * flops


def test_loops_branches_and_collectives_in_a_text():
    text = """HloModule m
%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  %x = f32[8,4]{1,0} get-tuple-element(%p), index=1
  %g = f32[32,4]{1,0} all-gather(%x), replica_groups={{0,1,2,3}}, dimensions={0}
  %s = f32[8,4]{1,0} reduce-scatter(%g), dimensions={0}, to_apply=%add
}
%cheap (c: f32[8,4]) -> f32[8,4] {
  ROOT %c = f32[8,4]{1,0} parameter(0)
}
%dear (d: f32[8,4]) -> f32[8,8] {
  %d = f32[8,4]{1,0} parameter(0)
  ROOT %dot.1 = f32[8,8]{1,0} dot(%d, %d), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
}
ENTRY %main (q: f32[8,4]) -> f32[8,8] {
  %q = f32[8,4]{1,0} parameter(0)
  %w = (s32[], f32[8,4]{1,0}) while(%q), condition=%add, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %v = (s32[], f32[8,4]{1,0}) while(%q), condition=%add, body=%body
  %r = bf16[8,4]{1,0} all-reduce(%q), to_apply=%add
  ROOT %i = f32[8,8]{1,0} conditional(%q, %q, %q), branch_computations={%cheap, %dear}
}
"""
    gathered = {"all-gather": Collective(6, 6 * 512), "reduce-scatter": Collective(6, 6 * 512)}
    reduced = {"all-reduce": Collective(1, 128)}
    assert cost_of(text) == Cost(2 * 8 * 8 * 4, {"all-gather": gathered["all-gather"], **reduced, **gathered}, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mesh", "batch"), [("llama-2-7b", "fsdp=8", 8), ("llama-3.1-70b", "fsdp=64", 64)])
def test_large_models_in_minutes(name, mesh, batch):
    flags = ("--model", name, "--mesh", mesh, "--batch-size", str(batch), "--length", "1024", "--json")
    found = python("-m", "mlfs_jax.cli", "plan", *flags)  # in under five minutes
    share = found["parameters"] * jnp.dtype(jnp.float32).itemsize / batch
    assert found["bytes per device"]["base"] == pytest.approx(share, rel=0.01)
