"""What test_plan.py runs in a process of its own: a plan, and the same step run; prints JSON.

The 8 virtual CPU devices come with tests.mlfs.eight_devices.
"""

import json

import jax

import mlfs_jax as mlfs
from mlfs_jax.distill import DistillConfig
from mlfs_jax.fit_config import FitConfig
from mlfs_jax.hlo import cost_of
from mlfs_jax.plan import plan
from mlfs_jax.supernet import Supernet, state_places
from mlfs_jax.train import init_params
from tests.mlfs.eight_devices import bytes_here
from tests.mlfs.tiny import tiny_batch, tiny_decoder, tiny_model, tiny_tokens

SIZES = {"embed": 32, "heads": 4, "head_dim": 8, "mlp": 32, "vocab_size": 64, "layers": 2}
MODELS = {
    "llama": tiny_decoder("llama", rope=mlfs.Rope(10000.0, 8), kv_heads=2, **SIZES),
    "bert": tiny_model("bert", **SIZES),
}


def both(name: str, spec: str, stage: int, execution: str, length: int = 8) -> dict:
    """What the plan says, and what the step that is run has, of the first device."""
    model, mesh = MODELS[name], mlfs.make_mesh(spec)
    fit = FitConfig("", "", batch_size=8, distill=DistillConfig(feature_dim=8), random_subnets=1, execution=execution)
    planned, stage_ = plan(model.config, mesh, fit, length, stage), fit.stages[stage]
    make = tiny_tokens if name == "llama" else tiny_batch
    batch = mlfs.shard_batch(mesh, make(model.config, batch=8, length=length))
    params, optimizer = init_params(jax.random.key(0), model, stage_, fit.distill), stage_.optimizer()
    places, base = state_places(mesh, model.base, params, optimizer), mlfs.shard_base(mesh, model.base)
    supernet = Supernet(model.config, fit.distill, optimizer, execution, places=places)
    state = jax.device_put(supernet.init(params), places)
    trees = {"base": base, "adapters": state.params, "optimizer": (state.opt_state, state.step), "batch": batch}
    real = {part: bytes_here(tree) for part, tree in trees.items()}
    ran = supernet._compiled[0].lower(state.params, base, batch, 1.0, False).compile()
    first = {"temp": ran.memory_analysis().temp_size_in_bytes, "flops": cost_of(ran.as_text()).flops}
    state, losses = supernet.step(state, base, batch, stage_.subnets(fit.space(model.config), jax.random.key(0)), 0.0)
    said = planned.to_json()
    return {
        "plan": said,
        "parts": planned.parts,
        "real": real,
        "first": first,
        "losses": len(losses),
        "after": bytes_here((state.params, state.opt_state, state.step)),
    }


if __name__ == "__main__":
    report = {
        "lora": both("llama", "data=2,fsdp=4", 0, "sliced"),
        "sliced": both("llama", "fsdp=4,tensor=2", 2, "sliced"),
        "masked": both("bert", "data=2,fsdp=2,tensor=2", 1, "masked"),
    }
    config = MODELS["llama"].config.replace(max_positions=512)
    fit = FitConfig("", "", batch_size=16)
    plans = {
        "one": plan(config, mlfs.make_mesh("data=1", jax.devices()[:1]), fit, 256),
        "fsdp": plan(config, mlfs.make_mesh("fsdp=8"), fit, 256),
        "tensor": plan(config, mlfs.make_mesh("tensor=8"), fit, 256),
    }
    report |= {name: planned.to_json() for name, planned in plans.items()}
    print(json.dumps(report))
