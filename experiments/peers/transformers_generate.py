"""Worker: transformers' ``generate`` on its Llama.

Setup: {"shape": {...}}; task: {"seed": n, "rows": B, "beams": K, "prompt": T, "new": tokens}. Answer: {"cpu":
CPU-seconds, "wall": s}.
"""

import json
import sys
import time

import llama
import torch
from transformers import LlamaForCausalLM

SETUP = json.loads(sys.argv[1])
SHAPE = SETUP["shape"]


def main():
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama.config(SHAPE, pad_token_id=0)).eval()
    print(json.dumps({"ready": torch.__version__, "threads": torch.get_num_threads()}), flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        generator = torch.Generator().manual_seed(task["seed"])
        tokens = torch.randint(3, SHAPE["vocab_size"], (task["rows"], task["prompt"]), generator=generator)
        length = {"min_new_tokens": task["new"], "max_new_tokens": task["new"]}
        cpu, wall = time.process_time(), time.perf_counter()
        mask = torch.ones_like(tokens)
        model.generate(tokens, attention_mask=mask, num_beams=task["beams"], do_sample=False, **length)
        print(json.dumps({"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}), flush=True)


main()
