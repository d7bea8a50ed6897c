"""The real models behind the network: in every placement the text of one process, and no weight of a plugin sent."""

import asyncio
import dataclasses
import subprocess
import sys
from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest

from mlfs_jax.backbone.tree import flatten
from mlfs_jax.errors import ConfigError, RunError
from mlfs_jax.fingerprint import base_fingerprint
from mlfs_jax.generate import GenerateConfig
from spa_jax import device_model
from spa_jax.cloud import Cloud, CloudConfig
from spa_jax.cloud_model import DecoderCloud
from spa_jax.decode import generate
from spa_jax.device import Device
from spa_jax.device_model import SideDevice, head_names, public_part
from spa_jax.errors import NetworkError, PluginError
from spa_jax.gate import similarity_gate
from spa_jax.latency import constants, running
from spa_jax.network import Link, Proxy, Shape
from spa_jax.plugin import Plugin
from spa_jax.public import load_public, save_public
from spa_jax.seam import Setting
from tests.mlfs.tiny import tiny_decoder
from tests.spa.runtime import check_no_weights
from tests.spa.tiny_side import LADDER, PLUGIN, tiny_side
from tests.virtual_devices import virtual_devices

MODEL = tiny_decoder("llama", max_positions=128)
BASE = base_fingerprint(MODEL.config, MODEL.base)
HEAD = {name: flatten(MODEL.base)[name][...] for name in head_names(MODEL.config)}
SPARSE = dataclasses.replace(LADDER, memory="sparse")
STOP = (7,)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(3, 53, RNG.integers(1, 12)).tolist() for _ in range(20)]


@cache
def side_of(kind: str, seed: int = 0):
    return tiny_side(MODEL, {"ladder": LADDER, "sparse": SPARSE, "plugin": PLUGIN}[kind], seed)


@cache
def cloud_model():
    public = [public_part(side_of("ladder")), public_part(side_of("plugin"), gate=True)]
    return DecoderCloud(MODEL, slots=6, context=32, chunk=8, public=public)


@cache
def in_one_process(kind: str, setting: str, threshold: float, limit: int = 10):
    config = GenerateConfig(max_new_tokens=limit, stop_tokens=STOP)
    return generate(MODEL, side_of(kind), PROMPTS, config, setting=setting, threshold=threshold)


def over_the_network(devices, prompts=PROMPTS, limit=10, served=cloud_model, **proxy):
    """(answers, what went through), all at once on six slots."""

    async def write(url, model, prompt):
        async with Device(url, model) as device:
            return await device.generate(prompt, limit, STOP)

    async def main():
        async with Cloud(served(), CloudConfig(port=0)) as cloud, Proxy(cloud.url, capture=True, **proxy) as link:
            answers = await asyncio.gather(*(write(link.url, *each) for each in zip(devices, prompts, strict=True)))
            return answers, link.captured

    return asyncio.run(asyncio.wait_for(main(), 200))


PLACEMENTS = {
    "head in the cloud": ("ladder", {}),
    "head on the device": ("ladder", {"head": HEAD}),
    "projected in the cloud": ("ladder", {"project": "cloud"}),
    "projected in the cloud, head on the device": ("ladder", {"project": "cloud", "head": HEAD}),
    "sparse": ("sparse", {}),
    "plugin": ("plugin", {}),
    "plugin, projected, gate and head in their places": (
        "plugin",
        {"project": "cloud", "send_gate": False, "head": HEAD},
    ),
    "s1": ("ladder", {"setting": "s1"}),
    "s2, head on the device": ("ladder", {"setting": "s2", "head": HEAD}),
}


@pytest.mark.parametrize("case", PLACEMENTS)
def test_texts_are_those_of_one_process(case):
    kind, placement = PLACEMENTS[case]
    setting = placement.get("setting", "spa")
    whole = in_one_process(kind, setting, 0.5)
    answers, captured = over_the_network([SideDevice(side_of(kind), base=BASE, **placement)] * len(PROMPTS))
    assert [answer.tokens for answer in answers] == whole.tokens
    assert [answer.used for answer in answers] == whole.sigma
    if setting == "spa":
        assert 0.1 < whole.rates()["usage"] < 0.9
    check_no_weights(captured, [np.asarray(x) for x in side_of(kind).net.values()])


@pytest.mark.parametrize("placement", [{}, {"head": HEAD}, {"project": "cloud"}])
def test_int8_activations_are_near(placement):
    """At least 95 % of the tokens, read from the same history."""
    whole = in_one_process("ladder", "spa", 0.5)
    device = SideDevice(side_of("ladder"), base=BASE, coding="int8", **placement)
    answers, _ = over_the_network([device] * len(PROMPTS))
    same = wanted = 0
    for answer, text in zip(answers, whole.tokens, strict=True):
        agree = next((i for i, (a, b) in enumerate(zip(answer.tokens, text, strict=False)) if a != b), len(text))
        same, wanted = same + agree, wanted + agree + (agree < len(text))
    assert same / wanted >= 0.95


def test_a_cut_link_and_other_users_change_nothing():
    """Different plugins side by side, each link cut several times."""
    sides = [side_of("ladder", seed) for seed in (0, 5)]
    devices = [SideDevice(sides[i % 2], base=BASE) for i in range(8)]
    config = GenerateConfig(max_new_tokens=10, stop_tokens=STOP)
    solo = [generate(MODEL, side, PROMPTS[:8], config).tokens for side in sides]
    answers, _ = over_the_network(devices, PROMPTS[:8], cut={30, 47, 80, 101})
    assert [answer.tokens for answer in answers] == [solo[i % 2][i] for i in range(8)]
    assert sum(answer.stats.connections for answer in answers) == 12


def test_over_a_base_in_4_bits():
    """The texts of one process with that base; a plugin that was made for the base in float is refused."""
    model, side = MODEL.quantise(4), side_of("ladder")
    small = DecoderCloud(model, slots=6, context=32, chunk=8)
    assert small.memory["base"] < 0.5 * cloud_model().memory["base"]
    config = GenerateConfig(max_new_tokens=10, stop_tokens=STOP)
    device = SideDevice(side, base=base_fingerprint(model.config, model.base))
    answers, _ = over_the_network([device] * 6, PROMPTS[:6], served=lambda: small)
    assert [answer.tokens for answer in answers] == generate(model, side, PROMPTS[:6], config).tokens
    with pytest.raises(NetworkError, match="--base-bits"):
        over_the_network([SideDevice(side, base=BASE)], PROMPTS[:1], served=lambda: small)


def test_a_plugin_in_int8():
    """A quarter of the memory, and g nearly the same."""
    side, rng = side_of("ladder"), np.random.default_rng(1)
    wide, small = SideDevice(side, base=BASE), SideDevice(side, base=BASE, int8=True)
    assert small.memory["plugin"] < 0.5 * wide.memory["plugin"] and small.flops == wide.flops
    projected = SideDevice(side, base=BASE, project="cloud")  # which the cloud does
    assert wide.flops - projected.flops == 2 * side.net["down.kernel"].size
    taps = rng.normal(size=(len(side.tapped) + 1, 3, MODEL.config.embed)).astype(np.float32)
    g, h = (device.side(device.start(), taps, np.arange(3))[0] for device in (wide, small))
    assert np.linalg.norm(g - h) < 0.05 * np.linalg.norm(g)


def test_a_side_cache_grows(monkeypatch):
    """Beyond the slots it begins with, in pieces, as in one."""
    monkeypatch.setattr(device_model, "LEAST", 64)
    side, rng = side_of("ladder"), np.random.default_rng(1)
    device = SideDevice(side, base=BASE)
    taps = rng.normal(size=(len(side.tapped) + 1, 70, MODEL.config.embed)).astype(np.float32)
    whole, _ = device.side(device.start(), taps, np.arange(70))
    state = device.start()
    for first, last in ((0, 60), (60, 69), (69, 70)):
        g, state = device.side(state, taps[:, first:last], np.arange(first, last))
    np.testing.assert_allclose(g, whole, atol=1e-4)


def test_a_public_part_of_another_base():
    part = public_part(side_of("plugin"), gate=True)
    for change in (
        {"down": part.down[:, 1:]},
        {"gate": part.gate[1:]},
        {"taps": part.taps + 99},
    ):
        with pytest.raises(PluginError, match=r"the public Down .* the base has"):
            DecoderCloud(MODEL, slots=1, context=16, public=[dataclasses.replace(part, **change)])


def test_public_parts(tmp_path):
    part = public_part(side_of("plugin"), gate=True)
    back = load_public(save_public(tmp_path / "public" / "down.safetensors", part))
    assert back.name == part.name != public_part(side_of("ladder")).name
    for name in ("taps", "down", "bias", "gate"):
        np.testing.assert_array_equal(getattr(back, name), getattr(part, name))
    save_public(tmp_path / "public" / "down.safetensors", part)  # an earlier one is replaced
    with pytest.raises(PluginError, match="holds no public Down"):
        load_public(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(PluginError, match="holds no public Down"):
        load_public(tmp_path / "bad.safetensors")
    with pytest.raises(RunError, match="is there and holds no public Down: choose another name"):
        save_public(tmp_path / "bad.safetensors", part)
    assert (tmp_path / "bad.safetensors").read_bytes() == b"no"


def refused(device, **kwargs):
    with pytest.raises(NetworkError) as error:
        over_the_network([device], [PROMPTS[0]], **kwargs)
    return str(error.value)


def test_plugins_that_do_not_fit():
    side = side_of("sparse")
    assert "made for the base other, this server has" in refused(SideDevice(side, base="other"))
    other = side.replace(net=side.net | {"down.kernel": jnp.ones_like(side.net["down.kernel"])})
    assert "no public Down of the name" in refused(SideDevice(other, base=BASE, project="cloud"))
    without = SideDevice(side_of("ladder"), base=BASE, project="cloud", send_gate=False)
    assert "the public Down has none" in refused(without)
    with pytest.raises(PluginError, match="gate holds states of the texts it was trained on"):
        SideDevice(side.replace(gate=similarity_gate(jnp.ones((2, 24)))), base=BASE)
    with pytest.raises(ConfigError, match="project = 'here': expected 'device' or 'cloud'"):
        SideDevice(side, base=BASE, project="here")
    with pytest.raises(ConfigError, match="slots = 0, context = 5, chunk = 1: expected at least 1"):
        DecoderCloud(MODEL, slots=0, context=5, chunk=1)
    assert cloud_model().memory["cache"] == 2 * 3 * 6 * 40 * 2 * 6 * 4 + 6 * 40 + 6 * 4


def test_the_runtime_beside_its_prediction():
    """Cloud and device as they are, over an emulated link: not faster than the link allows."""
    side = side_of("plugin")
    plugin = Plugin(side, Setting.SPA, BASE, "", threshold=0.5)
    shape = Shape(24, 3, len(side.tapped) + 1, side.config.width, 36)
    link, times = (
        Link(rtt_ms=20, bandwidth_mb_s=10),
        dict(zip(("cloud_ms", "device_ms"), constants(MODEL, plugin), strict=True)),
    )
    spa, lst = running(MODEL, plugin, shape, [link], tokens=10, coding="fp32", **times)
    assert (spa.method, lst.method) == ("spa, running", "lst, running")
    assert lst.predicted.network == pytest.approx(20, abs=0.5) and lst.measured.total > 20
    assert spa.measured.total < lst.measured.total and lst.error < 0.15


def test_a_cloud_on_a_mesh():
    """Base and cache over two devices, in a process that has them: the same tokens, gates and activations."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.spa.two_devices"],
        env=virtual_devices(2),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.stdout.endswith("the same\n"), done.stderr
