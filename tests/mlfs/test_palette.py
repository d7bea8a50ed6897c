"""The palette: what is measured is right, and comes back from its files."""

import json
from functools import partial

import jax
import numpy as np
import pytest

from mlfs_jax.errors import ConfigError, RunError, SubnetError, UnknownNameError
from mlfs_jax.evaluate import evaluate
from mlfs_jax.model import forward
from mlfs_jax.palette import FILE, Palette, all_subnets, measure, shape
from mlfs_jax.slicing import slice_subnet
from mlfs_jax.subnet import Subnet, num_flops, num_params
from mlfs_jax.timing import MOST_ROUNDS, count_flops, time_in_turn
from mlfs_jax.train import load_run
from tests.mlfs.tiny import tiny_model


@pytest.fixture
def fitted(tiny_run):
    return load_run(tiny_run, finished=True)


def test_rows_say_what_the_sliced_models_are(fitted):
    palette = measure(fitted, batch_sizes=(1, 2), seconds=0)
    assert [row.name for row in palette.rows] == list(fitted.space.names())
    assert palette.split == "test" and palette.metric == "accuracy" and palette.length == 12
    data = fitted.config.load_data(fitted.task, fitted.model)["test"]
    assert palette.examples == len(data)
    assert palette.baseline == np.bincount(data.labels).max() / len(data)
    for row in palette.rows:
        small = slice_subnet(fitted.model, row.subnet, lora=fitted.lora)
        assert row.params == small.num_params
        assert row.params_body == num_params(fitted.model.config, row.subnet)
        scores = evaluate(small, data, "accuracy")
        assert row.score == scores["accuracy"] and row.loss == pytest.approx(scores["loss"], rel=1e-4)
        assert row.latency_ms.keys() == {1, 2} and min(row.latency_ms.values()) > 0
    top, *rest = palette.rows
    assert top.latency_ratio == {1: 1.0, 2: 1.0}
    assert all(row.flops < top.flops and row.params < top.params for row in rest)


def test_flops_are_those_of_the_matrix_products():
    """The compiler's count also has norms, softmax and the head: a few percent at sizes where products dominate."""
    model = tiny_model("bert", embed=96, heads=4, head_dim=24, mlp=384, max_positions=64)
    for subnet in (None, Subnet(96, (2, 2), (192, 192), (0, 2))):
        small = model if subnet is None else slice_subnet(model, subnet)
        counted = count_flops(small.config, 64)
        assert counted == pytest.approx(num_flops(model.config, subnet, length=64), rel=0.06)
        batch = {name: np.ones((1, 64), np.int32) for name in ("input_ids", "attention_mask", "token_type_ids")}
        whole = jax.jit(partial(forward, small.graphdef, unroll=True)).lower(small.base, batch).compile()
        assert counted == pytest.approx(whole.cost_analysis()["flops"], rel=0.01)


def test_maxnet_is_always_measured_and_others_by_name_or_sizes(fitted):
    sizes = "heads=2,mlp=10,depth=1"
    palette = measure(fitted, [sizes], split="validation", batch_sizes=(1,), length=5, seconds=0)
    assert [row.name for row in palette.rows] == ["maxnet", sizes]
    assert palette.split == "validation" and palette.length == 5
    assert palette.row(fitted.space.named(sizes)) is palette.rows[1]
    assert palette.row(Subnet(24, (1,), (1,), (0,))) is None


def test_all_subnets_have_different_names(fitted):
    every = all_subnets(fitted)
    assert set(every.values()) == set(fitted.space.subnets())
    assert {"maxnet", "minnet"} & every.keys() and shape(fitted.space.maxnet) == "2×4·20·24"


def test_wrong_requests(fitted):
    with pytest.raises(UnknownNameError, match="did you mean 'validation'"):
        measure(fitted, split="validatoin")
    with pytest.raises(UnknownNameError, match="did you mean 'maxnet'"):
        measure(fitted, ["maxnte"])
    with pytest.raises(SubnetError, match="mlp"):
        measure(fitted, {"odd": Subnet(24, (4, 4), (19, 19), (0, 1))})
    with pytest.raises(ConfigError, match="batch_sizes"):
        measure(fitted, batch_sizes=(0,))
    for length in (0, -5, 1000):
        with pytest.raises(ConfigError, match=rf"length = {length}: expected 2 to 24"):
            measure(fitted, length=length)


def test_files(fitted, tmp_path):
    palette = measure(fitted, ["minnet"], batch_sizes=(1, 2), seconds=0)
    assert Palette.load(tmp_path) is None
    assert json.loads(palette.save(tmp_path).read_text())["metric"] == "accuracy"
    assert Palette.load(tmp_path) == palette
    assert palette.plot(tmp_path / "palette.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / FILE).write_text('{"rows": [{}]}')
    with pytest.raises(RunError, match="damaged"):
        Palette.load(tmp_path)


def test_rounds_are_interleaved():
    """Every round runs every call, so that a drift hits all of them alike; twice, to find its own caches."""
    order = []
    times = time_in_turn({name: lambda name=name: order.append(name) for name in "abc"}, seconds=60)
    assert all(len(rounds) == MOST_ROUNDS for rounds in times.values())
    assert order[::2] == order[1::2]
    rounds = [order[i : i + 6 : 2] for i in range(0, len(order), 6)]
    assert all(sorted(r) == list("abc") for r in rounds)
    assert len({tuple(r) for r in rounds}) > 1, "the order within a round should vary"
