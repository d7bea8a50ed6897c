"""Tables in Markdown of what is in results/*.json. Nothing here is typed that was measured; see index.py."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from store import final_score, load_results, mean_and_spread

RESULTS = Path(__file__).parent / "results"
PRESETS = ("paper", "h200", "cpu")
"""The larger first: where several were run, the index speaks of that."""


@dataclass(frozen=True)
class Finding:
    """What was measured, as text, with which seeds and machine; ``same``: in the paper's direction, if it has one."""

    measured: str
    same: bool | None
    where: str


def show() -> Finding | None:
    """A text of a plugin, and whose tokens it is made of."""
    if not (found := read("spa_show")):
        return None
    shares = ", ".join(f"{name} {share(found[name])}" for name in ("usage", "diff", "pick"))
    told = f"`{found['text'].strip()}`: {shares}; ![each token by who chose it](results/spa_show.png)"
    return Finding(told, None, "one text, SPA of seed 0 on wiki-description")


def read(name: str) -> dict:
    return load_results(RESULTS / f"{name}.json")


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the first column is text, the others are numbers."""
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def where(runs: Sequence[dict]) -> str:
    """How many seeds, on what."""
    seeds, devices = {run["seed"] for run in runs}, {run["device"] for run in runs}
    count = f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
    return f"{count}, {', '.join(sorted('a CPU' if device == 'cpu' else device for device in devices))}"


def share(value: float) -> str:
    return f"{100 * value:.0f} %"


def number(value: float) -> str:
    """A perplexity, which may be 20 or a million."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


accuracy = "{:.3f}".format


def published(study: str) -> list[dict]:
    """A study's runs of its presets as they are; those of another model or task are not for the pages (run_key)."""
    return [run for key, run in read(study).items() if key.split("/")[0] in PRESETS]


def chosen(study: str) -> list[dict]:
    """The runs of the largest preset that has any."""
    for preset in PRESETS:
        if runs := [run for run in published(study) if run["preset"] == preset]:
            return runs
    return []


# ------------------------------------------------------------------------------------------------------------- MLFS
def demo() -> str:
    palette = read("demo_palette")
    batches = list(palette["rows"][0]["latency_ratio"])
    columns = ["subnet", "parameters without embeddings [M]", "whole HF checkpoint [M]", "GFLOP"]
    columns += [f"time, batch {batch}" for batch in batches] + [f"test {palette['metric']}"]
    rows = []
    for row in palette["rows"]:
        sizes = [f"{row['params_body'] / 1e6:.2f}", f"{row['params_exported'] / 1e6:.2f}", f"{row['flops'] / 1e9:.3f}"]
        rows.append([row["name"], *sizes, *(f"{row['latency_ratio'][b]:.2f}" for b in batches), accuracy(row["score"])])
    said = (
        f"{palette['examples']:,} examples of the {palette['split']} split; always answering the commonest class is "
        f"right for {accuracy(palette['baseline'])} of them. Times are shares of the maxnet's, on {palette['device']}."
    )
    return f"{said}\n\n{markdown(columns, rows)}"


def execution() -> str:
    rows = read("bench_execution")["rows"]
    names = list(dict.fromkeys(name.rsplit(" ", 1)[0] for name in rows if name != "maxnet"))
    cells = []
    for name in names:
        masked, sliced = rows[f"{name} masked"], rows[f"{name} sliced"]
        cells.append([name, *(f"{x:.2f}" for x in (masked["flops_share"], masked["of_maxnet"], sliced["of_maxnet"]))])
    return markdown(("subnet", "FLOPs", "masked", "sliced"), cells)


def encoder() -> str:
    cells = []
    results = [run for run in published("mlfs_encoder_palette") if "palette" in run]
    for preset in PRESETS:
        for task in dict.fromkeys(run["task"] for run in results):
            runs = [run for run in results if (run["preset"], run["task"]) == (preset, task)]
            for name in runs[0]["palette"] if runs else ():
                scores = [final_score(run["palette"][name]) for run in runs]
                size = runs[0]["palette"][name]["share"]
                cells.append([f"{task}, {name}", f"{size:.2f}", mean_and_spread(scores, accuracy), where(runs), preset])
            if alone := [final_score(run["baseline"]) for run in runs if "baseline" in run]:
                size = runs[0]["palette"]["quarter"]["share"]
                what = f"{task}, *cut to a quarter, trained alone*"
                cells.append([what, f"{size:.2f}", mean_and_spread(alone, accuracy), where(runs), preset])
    return markdown(("subnet", "share of the body", "test score", "measured with", "preset"), cells)


def choice_runs() -> list[dict]:
    """Those of the study's own model and task; it can be asked for others."""
    return [r for r in read("mlfs_choices").values() if (r["model"], r["task"]) == ("bert-tiny", "wiki-topic")]


def choices() -> str:
    runs, cells = choice_runs(), []
    if not runs:
        return NOTHING
    names = list(runs[0]["scores"])
    for arm in dict.fromkeys(run["arm"] for run in runs):
        scores = [run["scores"] for run in runs if run["arm"] == arm]
        passes = {run["passes"] for run in runs if run["arm"] == arm}
        shown = [mean_and_spread([score[name]["accuracy"] for score in scores], accuracy) for name in names]
        cells.append(
            [
                arm,
                " / ".join(f"{n:,}" for n in sorted(passes)),
                *shown,
                mean_and_spread([score["minnet"]["loss"] for score in scores], accuracy),
            ]
        )
    cells.sort(key=lambda row: (row[0] != "three stages", row[0]))
    columns = ("way", "passes", *names, "loss of the minnet")
    return f"Test accuracy, {where(runs)}.\n\n{markdown(columns, cells)}"


def decoder() -> str:
    cells, whole = [], set()
    for preset in PRESETS:
        results = [run for run in published("mlfs_decoder") if run["preset"] == preset]
        whole |= {number(run["teacher"]) for run in results}
        for arm in dict.fromkeys(run["arm"] for run in results):
            runs = [run for run in results if run["arm"] == arm]
            curves = [list(run["curve"].values()) for run in runs]
            ends = [mean_and_spread([curve[i] for curve in curves], number) for i in (0, -1)]
            steps = list(runs[0]["curve"])[-1]
            cells.append([arm, f"{runs[0]['share']:.2f}", *ends, steps, where(runs), preset])
    columns = ("how", "share of the body", "at the start", "at the end", "steps", "measured with", "preset")
    return f"Validation perplexity; the whole model has {' and '.join(whole)}.\n\n{markdown(columns, cells)}"


# -------------------------------------------------------------------------------------------------------------- SPA
SPA_JOBS = {
    "zero-shot": "zero-shot prompt",
    "one-shot": "one-shot prompt",
    "s3": "S3 (LST): the side network alone",
    "s2": "S2: one or the other",
    "spa": "SPA, threshold for the wanted usage",
    "spa, no budget": "SPA, threshold 1/2",
    "spa, medium": "SPA, threshold 1/2, medium data",
    "spa, small": "SPA, threshold 1/2, small data",
    "s1": "S1: the side network at every token",
}


def spa() -> str:
    cells, results = [], published("spa_tables")
    for preset in PRESETS:
        for task in dict.fromkeys(run["task"] for run in results):
            for job, said in SPA_JOBS.items():
                runs = [run for run in results if (run["preset"], run["task"], run["job"]) == (preset, task, job)]
                if runs:
                    scores = [mean_and_spread([100 * run[f"rouge{n}"] for run in runs]) for n in (1, 2, "L")]
                    used = [100 * run["usage"] for run in runs if "usage" in run]
                    usage = mean_and_spread(used, "{:.0f}".format) + " %" if used else ""
                    cells.append([f"{task}, {said}", *scores, usage, where(runs), preset])
    columns = ("", "Rouge-1", "Rouge-2", "Rouge-L", "tokens that asked the side network", "measured with", "preset")
    return markdown(columns, cells)


def spa_gates() -> str:
    cells, results = [], [run for run in published("spa_tables") if run["job"] == "gates"]
    for preset in PRESETS:
        for task in dict.fromkeys(run["task"] for run in results):
            runs = [run for run in results if (run["preset"], run["task"]) == (preset, task)]
            for method in runs[0]["gates"] if runs else ():
                of = [run["gates"][method] for run in runs]
                spread = [mean_and_spread([100 * gate[name] for gate in of]) for name in ("usage", "pick")]
                spread += [mean_and_spread([100 * gate["gated_accuracy"] for gate in of])]
                spread += [mean_and_spread([gate["gated_loss"] for gate in of], "{:.3f}".format)]
                cells.append([f"{task}, {method}", *spread, where(runs), preset])
    columns = ("gate", "usage, %", "pick, %", "token accuracy, %", "loss, nats", "measured with", "preset")
    return markdown(columns, cells) if cells else NOTHING


def latency() -> str:
    return _latency(read("spa_latency"), "is set to")


def latency_plugin() -> str:
    return _latency(read("spa_latency_plugin"), "was measured as")


def _latency(found: dict, has: str) -> str:
    if not found:
        return NOTHING
    links = list(dict.fromkeys((row["link"]["rtt_ms"], row["link"]["bandwidth_mb_s"]) for row in found["rows"]))
    methods = list(dict.fromkeys(row["method"] for row in found["rows"]))
    cells = []
    for link in links:
        rows = {r["method"]: r for r in found["rows"] if (r["link"]["rtt_ms"], r["link"]["bandwidth_mb_s"]) == link}
        told = [f"{rows[m]['predicted']['total']:.0f} / {rows[m]['measured']['total']:.0f}" for m in methods]
        cells.append([f"{link[0]:g} ms, {link[1]:g} MB/s", *told])
    errors = [abs(row["error"]) for row in found["rows"]]
    said = (
        f"ms a token, predicted / measured over an emulated link, {found['tokens']} tokens each; the cloud's part "
        f"{has} {found['cloud_ms']:.3g} ms, the device's {found['device_ms']:.2g} ms. The prediction is off by "
        f"{share(max(errors))} at most, by more than 15 % in {sum(e > 0.15 for e in errors)} of {len(errors)} cells."
    )
    return f"{said}\n\n{markdown(('link', *methods), cells)}"


# ------------------------------------------------------------------------------------------------------------ others
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


NOTHING = "Nothing measured yet."


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
