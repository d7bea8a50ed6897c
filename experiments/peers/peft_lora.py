"""Worker: a LoRA step of PEFT (rank 8, all linear layers of the blocks) on transformers' Llama, AdamW.

Setup: {"shape": {...}, "batch": B, "length": T}; task: {"seed": n}. Answer: {"cpu": CPU-seconds, "wall": s, "loss": x}.
"""

import json
import sys
import time

import llama
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

SETUP = json.loads(sys.argv[1])
SHAPE = SETUP["shape"]


def main():
    torch.manual_seed(0)
    config = llama.config(SHAPE, max_position_embeddings=SETUP["length"])
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=8, lora_alpha=8, lora_dropout=0.0, target_modules=linear, task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(config), lora)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    print(json.dumps({"ready": torch.__version__, "threads": torch.get_num_threads()}), flush=True)
    for line in sys.stdin:
        generator = torch.Generator().manual_seed(json.loads(line)["seed"])
        tokens = torch.randint(SHAPE["vocab_size"], (SETUP["batch"], SETUP["length"]), generator=generator)
        cpu, wall = time.process_time(), time.perf_counter()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        spent = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
        print(json.dumps(spent | {"loss": loss.item()}), flush=True)


main()
