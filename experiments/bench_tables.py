"""Tables in Markdown of what the benches have measured, as :mod:`tables` has those of the studies."""

from __future__ import annotations

from tables import NOTHING, markdown, number, read, share


def gguf() -> str:
    found = read("check_gguf_llamacpp")
    cells = []
    for name, file in found["files"].items():
        change = file["perplexity_llamacpp"] / file["perplexity_before_export"] - 1
        perplexity = (
            number(file["perplexity_llamacpp"]) if name.startswith("slice") else f"{file['perplexity_llamacpp']:.3f}"
        )
        same = f"{file['same_continuations']} of {found['prompts']}"
        cells.append([name, f"{file['megabytes']:.1f}", same, perplexity, f"{100 * change:+.2f} %"])
    said = (
        f"{found['model']}, {found['tokens']:,} held-out tokens; {found['prompts']} prompts continued greedily for "
        f"{found['steps']} tokens; llama-cpp-python {found['llama_cpp_python']}. The slice is not trained."
    )
    columns = ("file", "MB", "continuations equal to ours", "perplexity in llama.cpp", "beside the model before export")
    return f"{said}\n\n{markdown(columns, cells)}"


def fuzz() -> str:
    found = read("fuzz_frames")
    return (
        f"{found['frames']:,} mutated frames to the decoders of both ends: no exception but the protocol's own; memory "
        f"grew by {found['growth_mb_after_warmup']} MB after the first tenth."
    )


def plans() -> str:
    cells = []
    for command, found in read("plan_llama").items():
        sizes, moved = found["bytes per device"], found["collectives per step and device"].values()
        gib = [sizes["peak"], sizes["base"], sizes["activations and workspace"], sum(one["bytes"] for one in moved)]
        flops, seconds = found["flops per step and device"], found["wall seconds"]
        cells.append([f"`{command}`", *(f"{x / 2**30:,.1f}" for x in gib), f"{flops / 1e12:,.0f}", f"{seconds:.0f}"])
    columns = ("", "peak [GiB]", "base [GiB]", "activations [GiB]", "collectives [GiB]", "TFLOP", "seconds to plan")
    return markdown(columns, cells)


def beside_peers() -> str:
    cells = []
    for step, found in (("sandwich", read("bench_sandwich")), ("LoRA", read("bench_lora"))):
        for vocabulary, rows in found.get("results", {}).items():
            whole = next(iter(rows.values())).get("flops")  # the peer comes first
            for side, row in rows.items():
                flops = f"{row['flops'] / whole:.2f}" if whole else ""
                shown = f"{int(vocabulary):,}", f"{row['cpu_seconds']:.2f}", f"{row['share']:.2f}", flops
                cells.append([f"{step}, {side}", *shown])
    columns = ("step", "vocabulary", "CPU-seconds", "of whittle's / PEFT's", "FLOPs, of whittle's")
    return markdown(columns, cells) if cells else NOTHING


def generation() -> str:
    found = read("bench_generate")
    if not found:
        return NOTHING
    cells = [
        [name, *(f"{row['cpu_seconds']:.2f}" for row in rows.values()), f"{rows['ours']['share']:.2f}"]
        for name, rows in found["results"].items()
    ]
    options = found["options"]
    said = f"CPU-seconds for {options['new']} tokens behind {options['prompt']}, on {found['cpu']}."
    return f"{said}\n\n{markdown(('', 'transformers', 'ours', 'share'), cells)}"


def sizes() -> str:
    found = read("bench_latency")
    if not found:
        return NOTHING
    cells = [
        [f"{name} ({row['subnet']})", f"{row['flops_share']:.2f}"]
        + [f"{row[f'time_share, batch {size}']:.2f}" for size in found["batches"]]
        for name, row in found["rows"].items()
    ]
    said = f"Shares of the maxnet's, {found['length']} tokens, on {found['device']}."
    return f"{said}\n\n{markdown(('subnet', 'FLOPs', *(f'time, batch {size}' for size in found['batches'])), cells)}"


def palette_cost() -> str:
    found = read("bench_palette_cost")
    if not found:
        return NOTHING
    rows, steps = found["rows"], found["options"]["steps"]
    reached = sum(row["reached"] for row in rows)
    return (
        f"One palette of {len(rows)} subnets in {steps} steps costs {share(found['shares']['flops'])} of the FLOPs and "
        f"{share(found['shares']['cpu'])} of the CPU-seconds of {len(rows)} separate distillations of at most as many "
        f"steps each, of which {reached} reach the palette's validation loss (one seed)."
    )


def side_memory() -> str:
    found = read("bench_side_memory")
    if not found:
        return NOTHING
    cells = []
    for cell in found["cells"]:
        lora = cell["ways"]["lora"]
        shares = [
            f"{row['bytes_share']:.2f} / {row['flops_share']:.3f}" for way, row in cell["ways"].items() if way != "lora"
        ]
        cells.append([f"{cell['batch']} x {cell['length']}", f"{lora['bytes'] / 2**30:.2f}", *shares])
    ways = [way for way in found["cells"][0]["ways"] if way != "lora"]
    said = f"Bytes / FLOPs of a training step as shares of LoRA's (rank {found['rank']}), SmolLM2-135M in float32."
    return f"{said}\n\n{markdown(('batch', 'LoRA [GiB]', *ways), cells)}"


def input_pipeline() -> str:
    found = read("bench_input")
    if not found:
        return NOTHING
    cells = [
        [name, f"{1e3 * row['real']:.1f}", f"{row['ratio']:.3f}", f"{1e3 * row['batch']:.2f}"]
        for name, row in found["rows"].items()
    ]
    columns = ("model", "a step with real data [ms]", "of one with a repeated batch", "making a batch alone [ms]")
    return f"On {found['cpu']}.\n\n{markdown(columns, cells)}"


def network() -> str:
    found = read("spa_network")
    if not found:
        return NOTHING
    cells = []
    for name, row in found["placements"].items():
        same = f"{row['equal_texts']} of {found['texts']}", share(row["equal_tokens"]), f"{100 * row['rougeL']:.1f}"
        cells.append([name, *same, f"{row['bytes_down']:.0f}", f"{row['bytes_up']:.0f}"])
    said = (
        f"{found['texts']} prompts, greedy; Rouge-L in one process {100 * found['rougeL, one process']:.1f}. A device "
        f"has its plugin {found['start_seconds']['wall']:.1f} s after its process starts "
        f"({found['start_seconds']['cpu']:.1f} CPU-seconds)."
        + " On {texts} texts Rouge-L is {one:.1f}, with int8 on the wire {int8:.1f}.".format(
            texts=found["more_texts"]["texts"],
            one=100 * found["more_texts"]["one process"],
            int8=100 * found["more_texts"]["int8 on the wire"],
        )
    )
    columns = ("placement", "texts equal", "tokens equal", "Rouge-L", "bytes down a token", "up")
    return f"{said}\n\n{markdown(columns, cells)}"


def cloud() -> str:
    found = read("bench_cloud")
    if not found:
        return NOTHING
    step, model = found["step"], found["model"] or "a random model of 4 layers"
    return (
        f"{found['devices']} devices with a plugin each, {found['tokens']} tokens each, on one cloud ({model}"
        f"{', on ' + found['cpu'] if 'cpu' in found else ''}): "
        f"{found['texts_checked'] - len(found['texts_unlike_their_solo_run'])} of {found['texts_checked']} texts are "
        f"their solo run's; a step takes {step['p50_ms']:.0f} ms in the median, {step['p99_over_p50']:.1f} times that "
        f"at the 99th percentile; {found['batch_fill']:.0f} sessions share a step on average; weights and caches take "
        f"{sum(found['memory_bytes'].values()) / 1e6:.0f} MB, the process {found['peak_rss_mb']:.0f} MB at its peak."
    )


PARTS = {
    "gguf": gguf,
    "fuzz": fuzz,
    "plans": plans,
    "beside-peers": beside_peers,
    "generation": generation,
    "sizes": sizes,
    "palette-cost": palette_cost,
    "side-memory": side_memory,
    "input-pipeline": input_pipeline,
    "network": network,
    "cloud": cloud,
}
"""Name of a generated part of a page -> what makes it."""
