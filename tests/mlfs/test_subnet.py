"""Subnets and spaces: what is in, what is out, what it costs."""

import json

import jax
import numpy as np
import pytest

import mlfs_jax as mlfs
from mlfs_jax.errors import SubnetError, UnknownNameError
from mlfs_jax.subnet import Subnet, num_flops, num_params
from tests.mlfs.tiny import tiny_config, tiny_model


def space(**kw):
    choices = {"embed": (1, 0.5), "width": (1, 0.5, 0.25), "depth": (1, 2 / 3, 1 / 3)}
    return mlfs.SubnetSpace.from_ratios(tiny_config(), **{**choices, **kw})


def test_maxnet_mask_keeps_everything():
    mask = mlfs.make_mask(tiny_config(), space().maxnet)
    assert all(bool(leaf.all()) for leaf in jax.tree.leaves(mask))


def test_mask_keeps_prefixes_of_kept_layers():
    subnet = Subnet(embed=12, heads=(1, 3), mlp=(20, 5), layers=(0, 2))
    mask = mlfs.make_mask(tiny_config(), subnet)
    assert mask.embed.sum() == 12 and mask.embed[:12].all()
    np.testing.assert_array_equal(mask.heads.sum(1), [1, 4, 3])
    np.testing.assert_array_equal(mask.mlp.sum(1), [20, 20, 5])
    np.testing.assert_array_equal(mask.layers, [True, False, True])


@pytest.mark.parametrize("vary", ["together", "independent", "per-layer"])
def test_samples_are_reproducible_and_in_the_space(vary):
    drawn = [space(vary=vary).sample(jax.random.key(i)) for i in range(40)]
    assert drawn == [space(vary=vary).sample(jax.random.key(i)) for i in range(40)]
    assert all(space(vary=vary).check(s) == s for s in drawn)
    assert len(set(drawn)) > 10
    assert vary != "per-layer" or any(len(set(s.mlp)) > 1 for s in drawn)


def test_params_and_flops_of_uniform_subnets():
    config, sub = tiny_config(), space().uniform(embed=12, heads=2, mlp=10, depth=2)
    H = config.head_dim
    layer = 3 * (12 * 2 * H + 2 * H) + (2 * H * 12 + 12) + 2 * 2 * 12 + (12 * 10 + 10) + (10 * 12 + 12)
    head = 12 * 12 + 12 + 12 * 3 + 3
    assert num_params(config, sub) == 2 * layer + head
    tables = (53 + 24 + 2 + 2) * 12
    assert num_params(config, sub, embeddings=True) == 2 * layer + head + tables
    assert num_params(config, embeddings=True) == tiny_model().num_params
    T = 5
    assert num_flops(config, sub, length=T) == 2 * 2 * T * (4 * 12 * 2 * H + 2 * T * 2 * H + 2 * 12 * 10)


def test_fractions_are_the_largest_that_fit():
    whole = num_params(tiny_config())
    sizes = [num_params(tiny_config(), subnet) / whole for subnet in space().subnets()]
    for name, share in {"half": 1 / 2, "quarter": 1 / 4}.items():
        chosen = num_params(tiny_config(), space().named(name)) / whole
        assert 0.75 * share <= chosen <= share
        assert chosen >= max(size for size in sizes if size <= share) - 0.02


def test_a_name_is_never_given_to_a_subnet_of_another_size():
    narrow = space(embed=(1,), width=(1, 0.25), depth=(1,))
    assert list(narrow.names()) == ["maxnet", "minnet"]
    with pytest.raises(SubnetError, match=r"no subnet has 0\.375 to 0\.500"):
        narrow.named("half")


def test_widths_that_vary_together_pair_large_with_large():
    mixed = mlfs.SubnetSpace(tiny_config(), heads=(4, 2, 1), mlp=(5, 10, 20))
    assert (mixed.heads, mixed.mlp) == ((4, 2, 1), (20, 10, 5))
    assert mixed.check(mixed.maxnet) == mixed.maxnet


def test_names_run_from_maxnet_to_minnet():
    names = space().names()
    assert next(iter(names)) == "maxnet" and names["maxnet"] == space().maxnet
    assert space().minnet in names.values() and space().named("minnet") == space().minnet
    assert space().named("embed=12,heads=2,mlp=10,depth=2") == space().uniform(embed=12, heads=2, mlp=10, depth=2)


def test_few_heads_still_pair_with_every_mlp_width():
    two_heads = mlfs.SubnetSpace.from_ratios(tiny_config(heads=2, embed=12), width=(1, 0.5, 0.25))
    assert (two_heads.heads, two_heads.mlp) == ((2, 1, 1), (20, 10, 5))
    assert [(s.heads[0], s.mlp[0]) for s in two_heads.at_full_depth().subnets()] == [(2, 20), (1, 10), (1, 5)]


def test_layer_choices():
    assert space().kept_layers(2) == (0, 1) and space().kept_layers(1) == (0,)
    by_rank = mlfs.SubnetSpace(tiny_config(), depth=(3, 2, 1), layer_order=(2, 0, 1))
    assert by_rank.kept_layers(2) == (0, 2) and by_rank.kept_layers(1) == (2,)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("embed=13,heads=2,mlp=10", r"embed = \(13,\) is not in this space: choose from \(24, 12\)"),
        ("heads=2,mlp=20", "vary together"),
        ("depth=7", r"depth = 7 is not in this space: choose from \(3, 2, 1\)"),
        ("mlp=much", "whole number after mlp="),
        ("depth=²", "whole number after depth="),
    ],
)
def test_sizes_outside_the_space(name, message):
    with pytest.raises(SubnetError, match=message):
        space().named(name)


def test_lists_and_seeds_of_other_types_are_understood():
    assert Subnet(24, [4, 4], [20, 20], [0, 1]) == Subnet(24, (4, 4), (20, 20), (0, 1))
    assert space().sample(np.int64(3)) == space().sample(3) == space().sample(jax.random.key(3))
    ranked = mlfs.SubnetSpace(tiny_config(), depth=(3, 1), layer_order=np.array([2, 0, 1], np.int32))
    assert ranked.minnet.layers == (2,) and hash(ranked.minnet) and json.dumps(ranked.minnet.layers) == "[2]"


def test_other_mistakes():
    with pytest.raises(UnknownNameError, match="did you mean 'quarter'"):
        space().named("quater")
    with pytest.raises(UnknownNameError, match="hidden"):
        space().named("hidden=3")
    with pytest.raises(SubnetError, match=r"heads = \(9, 9, 9\) does not fit this model: expected 1 to 4"):
        mlfs.make_mask(tiny_config(), Subnet(24, (9, 9, 9), (20, 20, 20), (0, 1, 2)))
    with pytest.raises(SubnetError, match="supernet's own"):
        mlfs.SubnetSpace(tiny_config(), heads=(2, 1), mlp=(20, 10))
    with pytest.raises(SubnetError, match="not of one length"):
        mlfs.SubnetSpace(tiny_config(), heads=(4, 2, 1), mlp=(20, 10))
    for heads in (4, (4.0, 4.0)):
        with pytest.raises(SubnetError, match=r"heads = .*4.*: expected whole numbers, one for each kept layer"):
            Subnet(24, heads, (36, 36), (0, 1))
    with pytest.raises(SubnetError, match="at least one layer"):
        Subnet(24, (4,), (20, 20), (0, 1))
    with pytest.raises(SubnetError, match="ascending"):
        Subnet(24, (4, 4), (20, 20), (1, 0))
    with pytest.raises(SubnetError, match=r"no subnet has 0\.001 to 0\.001 of the maxnet's parameters; this space has"):
        space().fraction(0.001)
    with pytest.raises(SubnetError, match=r"ratio 1\.5"):
        mlfs.SubnetSpace.from_ratios(tiny_config(), depth=(1.5,))
