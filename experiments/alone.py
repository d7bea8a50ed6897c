"""The baseline of a palette: one small model, trained alone for its one size."""

from __future__ import annotations

import dataclasses

import jax

import mlfs_jax as mlfs
from mlfs_jax.data.batches import Batches
from mlfs_jax.evaluate import evaluate
from mlfs_jax.supernet import Supernet


def train_alone(
    fitted: mlfs.Fitted, data: dict, subnet: mlfs.Subnet, steps: int, *, best: bool = False
) -> dict[str, dict[str, float]]:
    """LoRA on the first heads and neurons of the pretrained model, by the task's loss alone; scores by split.

    It has as many adapter parameters as all stages of the run together, and their highest learning rate. ``best``: cut
    by the importance that the run has measured after its stage 0, as the palette's subnets are.
    """
    config, stages = fitted.config, fitted.config.stages
    model = config.load_model(fitted.task)
    model = mlfs.slice_subnet(mlfs.reorder(model, fitted.order) if best else model, subnet)
    rank, rate = sum(stage.rank for stage in stages), max(stage.learning_rate for stage in stages)
    stage = mlfs.Stage("baseline", "maxnet", steps, rate, rank)
    distill, on_cpu = dataclasses.replace(config.distill, beta=0.0), jax.default_backend() == "cpu"
    supernet = Supernet(model.config, distill, stage.optimizer(), unroll=on_cpu)
    lora = mlfs.init_lora(jax.random.key(config.seed), model, rank=rank, full=("head",))
    state = jax.device_put(supernet.init({"lora": lora}), jax.devices()[0])
    batches = Batches(data["train"], config.batch_size, seed=config.seed, buckets=config.buckets)
    for step in range(steps):
        state, _ = supernet.step(state, model.base, batches[step], (), 0.0)
    tuned = model.replace(base=mlfs.merge_lora(model.base, state.params["lora"]))
    return {split: evaluate(tuned, data[split], fitted.task.metric) for split in data if split != "train"}
