"""SPA in two places beside SPA in one process, with a trained plugin of SmolLM2-135M: same text? what does int8 cost?

    spa fit --model smollm2-135m --task wiki-description --out runs/spa     # a plugin first: about an hour on 2 cores
    python experiments/spa_network.py --plugin runs/spa                     # ten minutes

Greedy completions of the first prompts of the test split. In every placement in float32 the text should be the one of
one process; with int8 or half-precision activations on the wire, and int8 kernels on the device, most of its tokens:
each side reads its own history, so what follows a different token counts as different, too. Then what a budget buys:
Rouge-L and ms a token over an emulated link at several usages (a picture), and what starting a device takes.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mlfs_jax.backbone.tree import flatten
from mlfs_jax.data.batches import prompt_batches
from mlfs_jax.data.encode import load_tokenizer
from mlfs_jax.generate import GenerateConfig
from mlfs_jax.generate.session import as_rows
from mlfs_jax.metrics import rouge
from mlfs_jax.timing import device_name
from spa_jax.channel import DeviceConfig
from spa_jax.cloud import Cloud, CloudConfig
from spa_jax.cloud_model import DecoderCloud
from spa_jax.decode import generate
from spa_jax.device import Device
from spa_jax.device_model import SideDevice, head_names, public_part
from spa_jax.evaluate import load_split
from spa_jax.latency import measure_runtime
from spa_jax.network import Link
from spa_jax.train import Fitted, load_run

PATIENT = DeviceConfig(connect_s=60, reply_s=120, answer_s=1800)
RESULT = Path(__file__).parent / "results" / "spa_network.json"
START = """
import time; begin = time.perf_counter(), time.process_time()
from spa_jax.device_model import SideDevice
from spa_jax.plugin import load_plugin
plugin = load_plugin({path!r})
SideDevice(plugin.side, base=plugin.base, setting=plugin.setting)
print(time.perf_counter() - begin[0], time.process_time() - begin[1])
"""


@dataclass(frozen=True)
class Options:
    """What is written, and over which link.

    Attributes:
        plugin: a finished run of ``spa fit``.
        many: prompts that the Rouge-L of int8 on the wire is measured on.
        rtt, bandwidth: of the emulated link, ms and MB/s.
    """

    plugin: Path = Path("runs/spa")
    prompts: int = 20
    many: int = 100
    usages: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    rtt: float = 20.0
    bandwidth: float = 10.0


def over_the_network(cloud_model: DecoderCloud, model: SideDevice, prompts: list[list[int]], limit: int, stop):
    """The answers of one cloud to devices that ask all at once."""

    async def write(url, prompt):
        async with Device(url, model, config=PATIENT) as device:
            return await device.generate(prompt, limit, stop)

    async def main():
        async with Cloud(cloud_model, CloudConfig(port=0, reply_s=120)) as cloud:
            return await asyncio.gather(*(write(cloud.url, prompt) for prompt in prompts))

    return asyncio.run(main())


def texts(fitted: Fitted, options: Options) -> tuple[dict, list[dict]]:
    """Every way to place and to code, beside one process; and what each usage gives."""
    plugin, model = fitted.plugin, fitted.model
    encoded = load_split(fitted, "test", options.prompts)
    (batch, references) = next(iter(prompt_batches(encoded, options.prompts)))
    prompts, limit = as_rows(batch), encoded.max_completion
    stop = model.config.eos_token_ids
    config = GenerateConfig(max_new_tokens=limit, stop_tokens=stop)
    tokenizer = load_tokenizer(model.source)
    score = lambda rows: rouge([tokenizer.decode(row).strip() for row in rows], references)["rougeL"]  # noqa: E731
    one = generate(model, plugin.side, prompts, config, setting=plugin.setting, threshold=plugin.threshold)

    head = {name: flatten(model.base)[name][...] for name in head_names(model.config)}
    context = max(map(len, prompts)) + limit
    cloud = DecoderCloud(model, slots=len(prompts), context=context, public=[public_part(plugin.side)])
    cloud.warm_up()
    ways = {
        "float32, head in the cloud": {},
        "float32, head on the device": {"head": head},
        "float32, projected in the cloud": {"project": "cloud"},
        "float32, projected in the cloud, head on the device": {"project": "cloud", "head": head},
        "fp16 on the wire": {"coding": "fp16"},
        "int8 on the wire": {"coding": "int8"},
        "int8 on the wire, projected in the cloud": {"coding": "int8", "project": "cloud"},
        "int8 kernels on the device": {"int8": True},
        "int8 on the wire and on the device": {"coding": "int8", "int8": True},
    }
    rows, fixed = {}, {"base": plugin.base, "setting": plugin.setting, "threshold": plugin.threshold}
    for name, placement in track(ways.items(), "placements"):
        answers = over_the_network(cloud, SideDevice(plugin.side, **fixed, **placement), prompts, limit, stop)
        written = [answer.tokens for answer in answers]
        length = sum(max(map(len, pair)) for pair in zip(written, one.tokens, strict=True))
        same = sum(a == b for pair in zip(written, one.tokens, strict=True) for a, b in zip(*pair, strict=False))
        rows[name] = {
            "equal_texts": sum(a == b for a, b in zip(written, one.tokens, strict=True)),
            "equal_tokens": same / length,
            "rougeL": score(written),
            "bytes_down": sum(answer.stats.bytes_down for answer in answers) / length,
            "bytes_up": sum(answer.stats.bytes_up for answer in answers) / length,
        }
    found = {"texts": len(prompts), "rougeL, one process": score(one.tokens), "placements": rows}
    return found, [budget_point(fitted, usage, prompts, config, score, options) for usage in options.usages]


def rouge_of_int8(fitted: Fitted, options: Options) -> dict[str, float]:
    """Rouge-L of one process and of int8 on the wire, on more prompts: one text more or less should not decide."""
    plugin, model = fitted.plugin, fitted.model
    encoded, stop = load_split(fitted, "test", options.many), model.config.eos_token_ids
    config = GenerateConfig(max_new_tokens=encoded.max_completion, stop_tokens=stop)
    batches = [(as_rows(batch)[: len(wanted)], wanted) for batch, wanted in prompt_batches(encoded, options.prompts)]
    context = max(len(prompt) for prompts, _ in batches for prompt in prompts) + encoded.max_completion
    cloud = DecoderCloud(model, slots=options.prompts, context=context)
    cloud.warm_up()
    device = SideDevice(
        plugin.side, base=plugin.base, setting=plugin.setting, threshold=plugin.threshold, coding="int8"
    )
    tokenizer, references = load_tokenizer(model.source), [text for _, wanted in batches for text in wanted]
    written: dict[str, list[list[int]]] = {"one process": [], "int8 on the wire": []}
    for prompts, _ in track(batches, "int8 on more prompts"):
        one = generate(model, plugin.side, prompts, config, setting=plugin.setting, threshold=plugin.threshold)
        answers = over_the_network(cloud, device, prompts, encoded.max_completion, stop)
        written["one process"] += one.tokens
        written["int8 on the wire"] += [answer.tokens for answer in answers]
    texts = {way: [tokenizer.decode(row).strip() for row in rows] for way, rows in written.items()}
    return {way: rouge(said, references)["rougeL"] for way, said in texts.items()} | {"texts": len(references)}


def budget_point(fitted: Fitted, usage: float, prompts, config: GenerateConfig, score, options: Options) -> dict:
    """Quality at a usage, and ms a token over the link, of one session alone."""
    plugin, link = fitted.plugin, Link(options.rtt, options.bandwidth)
    threshold = plugin.threshold_for(usage)
    side = plugin.side
    found = generate(fitted.model, side, prompts, config, setting=plugin.setting, threshold=threshold)
    cloud = DecoderCloud(fitted.model, slots=1, context=len(prompts[0]) + 50)
    cloud.warm_up()
    device = SideDevice(side, base=plugin.base, setting=plugin.setting, threshold=threshold, coding="int8")
    ms, _ = asyncio.run(measure_runtime(cloud, device, link, prompts[0], 50))
    return {"asked": usage, "usage": found.rates()["usage"], "rougeL": score(found.tokens), "ms_per_token": ms}


def start_of_a_device(path: Path, repeats: int = 5) -> dict[str, float]:
    """Seconds from nothing to a device that holds its plugin: medians of fresh processes."""
    code, runs = START.format(path=str(path)), []
    for _ in range(repeats):
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        runs.append([float(x) for x in done.stdout.split()])
    wall, cpu = zip(*runs, strict=True)
    return {"wall": statistics.median(wall), "cpu": statistics.median(cpu)}


def plot(points: list[dict], options: Options) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(5, 3.5), layout="constrained")
    panel.plot([p["ms_per_token"] for p in points], [100 * p["rougeL"] for p in points], marker="o")
    for i, p in enumerate(points):  # above, and below for every other one: neighbours are close
        place = (4, -11) if i % 2 else (-4, 5)
        at = {"xytext": place, "textcoords": "offset points", "ha": "left" if i % 2 else "right", "fontsize": 8}
        panel.annotate(f"usage {p['usage']:.2f}", (p["ms_per_token"], 100 * p["rougeL"]), **at)
    panel.margins(0.3, 0.2)
    panel.set(xlabel=f"ms a token, rtt {options.rtt:g} ms, {options.bandwidth:g} MB/s", ylabel="Rouge-L")
    figure.savefig(RESULT.with_suffix(".png"), dpi=120)


def main(options: Options) -> None:
    begin, console = time.time(), Console()
    starting, fitted = start_of_a_device(options.plugin), load_run(options.plugin)
    found, points = texts(fitted, options)
    table = Table(title=f"{found['texts']} texts; Rouge-L in one process {100 * found['rougeL, one process']:.1f}")
    for column in ("placement", "equal texts", "equal tokens", "Rouge-L", "bytes down", "up, a token"):
        table.add_column(column, justify="left" if column == "placement" else "right")
    for name, row in found["placements"].items():
        shares = f"{row['equal_texts']}", f"{row['equal_tokens']:.3f}", f"{100 * row['rougeL']:.1f}"
        table.add_row(name, *shares, f"{row['bytes_down']:.0f}", f"{row['bytes_up']:.0f}")
    console.print(table)
    console.print("ms a token: Rouge-L", {round(p["ms_per_token"], 1): round(100 * p["rougeL"], 1) for p in points})
    console.print(f"a device starts in {starting['wall']:.2f} s ({starting['cpu']:.2f} CPU-s)")
    RESULT.parent.mkdir(exist_ok=True)
    record = {"cpu": device_name(), "start_seconds": starting, **found, "budget": points}
    record["more_texts"] = rouge_of_int8(fitted, options)
    console.print("Rouge-L on more texts", record["more_texts"])
    record |= {"link": {"rtt_ms": options.rtt, "bandwidth_mb_s": options.bandwidth}, "seconds": time.time() - begin}
    RESULT.write_text(json.dumps(record, indent=1))
    plot(points, options)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
