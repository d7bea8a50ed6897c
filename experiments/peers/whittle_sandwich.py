"""Worker: whittle's sandwich step (SandwichStrategy, all weights, AdamW) over a GPT-NeoX-shaped network.

Setup: {"shape": {...}, "batch": B, "length": T}; every task: {"seed": n, "subnets": [[heads, mlp, layers], ...]}, the
last of which is the smallest. Answer: {"cpu": CPU-seconds, "wall": seconds, "loss": sum of the losses}; to a task with
{"count": true}: {"flops": of forward and backward passes}.
"""

import json
import sys
import time

import torch
from litgpt import Config
from torch.utils.flop_counter import FlopCounterMode
from whittle.models.gpt import GPT
from whittle.training_strategies import SandwichStrategy

SETUP = json.loads(sys.argv[1])
SHAPE = SETUP["shape"]


class Given:
    """A sampler that draws what it was told to."""

    def give(self, subnets):
        *self.random, self.smallest = [
            {
                "sub_network_n_embd": SHAPE["embed"],
                "sub_network_num_heads": heads,
                "sub_network_intermediate_size": mlp,
                "sub_network_n_layers": layers,
            }
            for heads, mlp, layers in subnets
        ]

    def sample(self):
        return self.random.pop(0)

    def get_smallest_sub_network(self):
        return self.smallest


def main():
    torch.manual_seed(0)
    config = Config(
        name="benchmark",
        block_size=SETUP["length"],
        padded_vocab_size=SHAPE["vocab_size"],
        vocab_size=SHAPE["vocab_size"],
        n_embd=SHAPE["embed"],
        n_layer=SHAPE["layers"],
        n_head=SHAPE["heads"],
        intermediate_size=SHAPE["mlp"],
        mlp_class_name="GptNeoxMLP",
        norm_class_name="LayerNorm",
        parallel_residual=True,
        rotary_percentage=0.25,
        bias=True,
        lm_head_bias=False,
    )
    model, sampler = GPT(config), Given()
    model.max_seq_length = SETUP["length"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def loss(logits, targets):
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    strategy = SandwichStrategy(sampler=sampler, loss_function=loss, device="cpu", random_samples=SETUP["random"])
    print(json.dumps({"ready": torch.__version__, "threads": torch.get_num_threads()}), flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        sampler.give(task["subnets"])
        generator = torch.Generator().manual_seed(task["seed"])
        tokens = torch.randint(SHAPE["vocab_size"], (SETUP["batch"], SETUP["length"] + 1), generator=generator)
        if task.get("count"):
            with FlopCounterMode(display=False) as counter:
                strategy(model, tokens[:, :-1], tokens[:, 1:])
            optimizer.zero_grad()
            print(json.dumps({"flops": counter.get_total_flops()}), flush=True)
            continue
        cpu, wall = time.process_time(), time.perf_counter()
        total = strategy(model, tokens[:, :-1], tokens[:, 1:])
        optimizer.step()
        optimizer.zero_grad()
        spent = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
        print(json.dumps(spent | {"loss": total}), flush=True)


main()
