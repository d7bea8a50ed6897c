"""What test_sharding.py runs in a process of its own, which has 8 virtual CPU devices; prints JSON."""

import json
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mlfs_jax as mlfs
from mlfs_jax.backbone.tree import map_named
from mlfs_jax.checkpoint import Checkpoints
from mlfs_jax.distill import DistillConfig, init_projection
from mlfs_jax.lora import lora_axes
from mlfs_jax.model import abstract
from mlfs_jax.sharding import shard_cache, sharding_of
from mlfs_jax.supernet import Supernet, state_places
from tests.mlfs.tiny import random_lora, tiny_decoder, tiny_tokens

STEPS = 3
ROPE = mlfs.Rope(10000.0, 8)
MODEL = tiny_decoder("llama", rope=ROPE, embed=32, heads=4, kv_heads=2, head_dim=8, mlp=32, vocab_size=64, layers=2)
BATCH = tiny_tokens(MODEL.config, batch=8, length=8)
SUBNETS = (mlfs.Subnet(32, (2,), (16,), (1,)),)
DISTILL = DistillConfig(feature_dim=8)


def losses(spec: str | None, execution: str) -> tuple[list, int, int]:
    """Losses of a few steps, how often the maxnet's gradient compiled, and the bytes of the base on one device."""
    optimizer, base, batch, places = optax.adam(1e-2), MODEL.base, BATCH, None
    params = {"lora": random_lora(MODEL)}
    params["features"] = init_projection(jax.random.key(3), MODEL.config.embed, DISTILL)
    if spec is not None:
        mesh = mlfs.make_mesh(spec) if execution == "sliced" else explicit(mlfs.make_mesh(spec))
        places = state_places(mesh, base, params, optimizer)
        base, batch = mlfs.shard_base(mesh, base), mlfs.shard_batch(mesh, batch)
    supernet = Supernet(MODEL.config, DISTILL, optimizer, execution, places=places)
    state, found = jax.device_put(supernet.init(params), places or jax.devices()[0]), []
    for _ in range(STEPS):
        state, step = supernet.step(state, base, batch, SUBNETS, 0.0)
        found.append(np.asarray(step).tolist())
    compiled = supernet.masked_step if execution == "masked" else supernet._compiled[0]
    return found, compiled._cache_size(), bytes_here(base)


def explicit(mesh):
    """What ``jax.make_mesh`` makes by itself."""
    kinds = (jax.sharding.AxisType.Explicit,) * len(mesh.axis_names)
    return jax.make_mesh(mesh.axis_sizes, mesh.axis_names, axis_types=kinds)


def bytes_here(base) -> int:
    """What the first device holds of a base."""
    here = jax.devices()[0]
    shards = (s for leaf in jax.tree.leaves(base) for s in leaf.addressable_shards if s.device == here)
    return sum(s.data.nbytes for s in shards)


def forward_flops(spec: str | None) -> float:
    """FLOPs of one device, at sizes where matrix products are most of them; nothing is allocated."""
    config = MODEL.config.replace(embed=256, heads=8, kv_heads=8, head_dim=32, rope=mlfs.Rope(10000.0, 32), mlp=1024)
    graphdef, base = abstract(config)
    batch = {name: jax.ShapeDtypeStruct((8, 64), jnp.int32) for name in ("input_ids", "attention_mask")}
    if spec is not None:
        mesh = mlfs.make_mesh(spec)
        place = lambda axes, x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding_of(mesh, axes, x.shape))  # noqa: E731
        base = map_named(lambda name, leaf: place(leaf.axes, leaf), base)
        batch = {name: place(("batch", ""), x) for name, x in batch.items()}
    run = jax.jit(partial(mlfs.forward, graphdef, unroll=True))
    return run.lower(base, batch).compile().cost_analysis()["flops"]


def loaded(folder: str) -> dict:
    """Bytes of loaded weights on the first device, at the end and at most; whether their export is the checkpoint."""
    mlfs.export_hf(MODEL, f"{folder}/a")
    model, loading = most_bytes(
        lambda: mlfs.from_pretrained(f"{folder}/a", sharding=partial(sharding_of, mlfs.make_mesh("fsdp=8")))
    )
    _, exporting = most_bytes(lambda: mlfs.export_hf(model, f"{folder}/b"))
    files = [Path(folder, x, "model.safetensors").read_bytes() for x in "ab"]
    largest = max(x.nbytes for x in jax.tree.leaves(MODEL.base))
    most = {"loading": loading, "exporting": exporting, "largest": largest}
    return {"nbytes": bytes_here(model.base), "same": files[0] == files[1], **most}


def most_bytes(work):
    """What it returns, and the most bytes that it had on the first device beside what was there before.

    Counted whenever a function of the package is called or returns.
    """
    here, most = jax.devices()[0], 0
    count = lambda: sum(  # noqa: E731
        shard.data.nbytes for x in jax.live_arrays() for shard in x.addressable_shards if shard.device == here
    )
    before = count()

    def look(frame, event, _):
        nonlocal most
        if event in ("call", "return") and "/mlfs_jax/" in frame.f_code.co_filename:
            sys.setprofile(None)
            most = max(most, count() - before)
            sys.setprofile(look)

    sys.setprofile(look)
    try:
        result = work()
        return result, most
    finally:
        sys.setprofile(None)


def generated() -> dict:
    """Whether the tokens are those of one device, and the share of the cache on the first device, new and used."""
    prompts, config, tokens, shares = [[5, 9, 7], [4], [8, 3], [6, 6, 6, 6]], mlfs.GenerateConfig(8), [], []
    mesh = mlfs.make_mesh("fsdp=4,tensor=2")
    for base in (MODEL.base, mlfs.shard_base(mesh, MODEL.base)):
        session = mlfs.Session()
        tokens.append(mlfs.generate(MODEL.replace(base=base), prompts, config, session=session).tokens)
    for cache in (shard_cache(base, mlfs.init_cache(MODEL.config, 4, 16)), session.cache):
        shares.append(bytes_here((cache.k, cache.v)) / (cache.k.nbytes + cache.v.nbytes))
    return {"same": tokens[0] == tokens[1], "shares": shares}


def moved(folder: str) -> dict:
    """Adapters saved on one mesh and restored onto another: whether they are the same, and lie as asked."""
    lora = random_lora(MODEL)

    def place(spec: str, tree):
        mesh = mlfs.make_mesh(spec)
        where = {
            site: {leaf: sharding_of(mesh, axes, lora[site][leaf].shape) for leaf, axes in entry.items()}
            for site, entry in lora_axes(MODEL.base, lora).items()
        }
        return jax.device_put(tree, where)

    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, place("fsdp=8", lora))
    with Checkpoints(folder) as checkpoints:
        template = place("fsdp=2,tensor=4", jax.tree.map(np.zeros_like, lora))
        back, _ = checkpoints.restore(template)
    pairs = list(zip(*map(jax.tree.leaves, (back, lora, template)), strict=True))
    return {
        "same": all(np.array_equal(a, b) for a, b, _ in pairs),
        "placed": all(a.sharding.is_equivalent_to(c.sharding, a.ndim) for a, _, c in pairs),
    }


if __name__ == "__main__":
    runs = {"one": (None, "sliced"), "fsdp": ("data=2,fsdp=4", "sliced"), "tensor": ("fsdp=4,tensor=2", "masked")}
    names = ("losses", "compiles", "nbytes")
    report = {name: dict(zip(names, losses(*run), strict=True)) for name, run in runs.items()}
    report["flops"] = {str(spec): forward_flops(spec) for spec in (None, "data=8", "fsdp=8")}
    report["generated"] = generated()
    report["loaded"] = loaded(sys.argv[1])
    report["moved"] = moved(f"{sys.argv[1]}/checkpoints")
    report["whole"] = sum(x.nbytes for x in jax.tree.leaves(MODEL.base))
    print(json.dumps(report))
