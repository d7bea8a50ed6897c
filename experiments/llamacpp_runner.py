"""Runs a GGUF file in llama.cpp: a request as JSON on stdin, an answer as JSON on stdout.

Needs llama-cpp-python and numpy alone, so it may run in an environment of its own:

    python llamacpp_runner.py < request.json
    {"model": "m.gguf", "threads": 1, "prompts": [[ids], ...], "steps": 32, "texts": [[ids], ...], "strings": ["."]}

The answer: "greedy", the ids that follow each prompt; "margins", the least gap of the two largest logits on the way;
"nll", summed over each text's tokens but the first, nats; "ids" of each string, special tokens parsed, none added.
"""

import json
import sys

import llama_cpp
import numpy as np


def main():
    request = json.load(sys.stdin)
    texts, prompts, steps = request.get("texts", []), request.get("prompts", []), request.get("steps", 0)
    longest = max([len(t) for t in texts] + [len(p) + steps for p in prompts] + [8])
    llm = llama_cpp.Llama(
        request["model"],
        n_ctx=longest,
        n_threads=request.get("threads", 1),
        n_threads_batch=request.get("threads", 1),
        logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32,  # as ours; its default cache is F16
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )
    answer = {"version": llama_cpp.__version__, "greedy": [], "margins": [], "nll": [], "ids": []}
    for ids in prompts:
        llm.reset()
        llm.eval(ids)
        found, margin = [], float("inf")
        for _ in range(steps):
            logits = llm.scores[llm.n_tokens - 1]
            second, first = np.partition(logits, -2)[-2:]
            margin = min(margin, float(first - second))
            found.append(int(logits.argmax()))
            llm.eval(found[-1:])
        answer["greedy"].append(found)
        answer["margins"].append(margin)
    for ids in texts:
        llm.reset()
        llm.eval(ids)
        logits = llm.scores[: len(ids) - 1].astype(np.float64)
        high = logits.max(-1)
        logsum = high + np.log(np.exp(logits - high[:, None]).sum(-1))
        answer["nll"].append(float((logsum - logits[np.arange(len(ids) - 1), ids[1:]]).sum()))
    answer["ids"] = [llm.tokenize(s.encode(), add_bos=False, special=True) for s in request.get("strings", [])]
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
