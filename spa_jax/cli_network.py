"""The commands of the split runtime: ``spa serve | chat | generate | latency | calibrate | publish``.

As in :mod:`spa_jax.cli`, commands import what they need when they run, and annotations are not postponed.
"""

import contextlib
from pathlib import Path
from typing import Any

from mlfs_jax.errors import ConfigError
from mlfs_jax.interrupts import run_async
from mlfs_jax.terminal import log_to_stderr, print_json, print_table, spinner
from spa_jax.cli_device import chat, generate
from spa_jax.errors import NetworkError
from spa_jax.options import Coding, Flag, Place, RunFolder, budget_ms, check_picture, make_token, numbers, read_token

HELP = """\
  serve     the cloud: base, gates and caches behind a websocket, for many devices at a time
  chat      the device: talk to a server, with a plugin that stays here
  generate  the same for one prompt; --stats says what it cost
  latency   T_device + T_cloud + T_net of SPA and what it is compared with: predicted beside measured
  calibrate set a plugin's threshold for a budget in ms a token and a link
  publish   write what of a plugin a cloud may hold: its down-projections, for a server's --public
"""
EXAMPLES = """\
  spa serve --model smollm2-135m --token-file secrets/token
  spa chat --server ws://127.0.0.1:8765 --plugin runs/spa --token-file secrets/token
  spa generate --server ws://127.0.0.1:8765 --plugin runs/spa --token-file secrets/token --prompt "The Thames is"
  spa latency --rtt 5,20,80 --bandwidth 1,10,100 --jitter 0.1
  spa calibrate runs/spa --budget "100 ms/token" --rtt 20 --bandwidth 10
"""


def serve(
    *,
    model: str,
    host: str = "127.0.0.1",
    port: int = 8765,
    token_file: Path | None = None,
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
    slots: int = 8,
    context: int | None = None,
    mesh: str | None = None,
    base_bits: int = 32,
    public: tuple[Path, ...] = (),
    frame_mb: float = 4.0,
    idle_s: float = 60.0,
    reply_s: float = 10.0,
) -> None:
    """Serve a base to devices until Ctrl-C or SIGTERM. Metrics are at /metrics, for those who have the token.

    Args:
        model: the base, as for `spa fit`.
        host: an address others can reach needs a token.
        token_file: holds the secret that devices have to know; made if it is not there.
        tls_cert: PEM file; with tls-key.
        tls_key: PEM file; with tls-cert.
        slots: sessions at a time; memory is taken for all of them at once, and printed.
        context: tokens that a session may hold; the default is 1024, or as many as the model has positions for.
        mesh: spread the base over devices, like tensor=2.
        base_bits: 8 or 4: keep the base's layers in so many, for plugins that were fitted to it so.
        public: files of `spa publish`, so that activations can come down projected.
        frame_mb: larger frames are refused.
        idle_s: seconds until an idle session loses its slot; it resumes by itself.
        reply_s: seconds that a device may take to answer.
    """
    import asyncio
    import errno
    import logging
    import signal

    from mlfs_jax.hf.load import from_pretrained
    from mlfs_jax.sharding import make_mesh
    from spa_jax.cloud import Cloud, CloudConfig
    from spa_jax.cloud_model import DecoderCloud
    from spa_jax.public import load_public

    if not 0 < frame_mb < float("inf"):
        raise ConfigError(f"frame-mb = {frame_mb}: expected megabytes, more than 0.")
    config = CloudConfig(
        host=host,
        port=port,
        frame_bytes=round(frame_mb * 2**20),
        idle_s=idle_s,
        reply_s=reply_s,
        tls_cert=tls_cert,
        tls_key=tls_key,
    )
    if token_file is not None and make_token(token_file):
        print(f"{token_file}: a new secret; every device needs this file")
    token, parts = read_token(token_file), [load_public(file) for file in public]
    with spinner() as advance:
        advance("loading the base")
        base = from_pretrained(model, base_bits=base_bits)
        places = None if mesh is None else make_mesh(mesh)
        context = context or min(1024, base.decoder.max_positions)
        served = DecoderCloud(base, slots=slots, context=context, public=parts, mesh=places)
        cloud = Cloud(served, config, token=token)
        advance("compiling")
        served.warm_up()
    sizes = {name: f"{size / 2**20:.0f} MB" for name, size in served.memory.items()}
    waiting = slots * config.waiting_bytes / 2**20
    print(
        f"memory: {', '.join(f'{name} {size}' for name, size in sizes.items())}; waiting for devices at most ", end=""
    )
    print(f"{waiting:.0f} MB ({slots} slots of {context} tokens)", flush=True)

    async def run():
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asyncio.current_task().cancel)  # as of Ctrl-C
        async with cloud:
            print(f"serving {model} at {cloud.url}" + ("" if token else ", to anybody on this machine"), flush=True)
            await cloud.serve_forever()

    try:
        with log_to_stderr(logging.INFO, "spa_jax.cloud"), contextlib.suppress(asyncio.CancelledError):
            run_async(run())
    except OSError as error:
        taken = " Another program has the port: choose one with --port." if error.errno == errno.EADDRINUSE else ""
        raise NetworkError(f"cannot listen at {host}:{port}: {error.strerror or error}.{taken}") from None


def latency(
    *,
    rtt: str = "5,20,80",
    bandwidth: str = "1,10,100",
    jitter: float = 0.0,
    loss: float = 0.0,
    tokens: int = 50,
    usage: float = 0.62,
    plugin: Path | None = None,
    cloud_ms: float | None = None,
    device_ms: float | None = None,
    coding: Coding = "int8",
    png: Path | None = None,
    json: Flag = False,
) -> None:
    """T_device + T_cloud + T_net a token: the model of the paper beside a measurement over an emulated link.

    Args:
        rtt: round trips in ms, with commas; each with each bandwidth.
        bandwidth: megabytes a second, with commas.
        jitter: standard deviation of a frame's delay, as a share of the round trip.
        loss: probability that a frame is lost once.
        tokens: new ones of each measurement.
        usage: share of tokens for which SPA asks the device.
        plugin: a run whose shapes and times are taken, and which is run over the links, too; without one the shapes
            are LLaMA-7B's.
        cloud_ms: of the cloud's part of a token, instead of measuring it (without a plugin: 30).
        device_ms: of the device's part of a gated token, instead of measuring it (without a plugin: 5).
        coding: of the frames.
        png: write bars of the whole time, too.
        json: print the rows as JSON and nothing else.
    """
    from rich.table import Table

    from spa_jax.latency import compare, constants, plot, running
    from spa_jax.network import LLAMA_7B, Link, Shape, methods

    if tokens < (least := 1 if plugin is None else 2):
        raise ConfigError(f"tokens = {tokens}: expected at least {least} to measure.")
    if not 0 <= usage <= 1:
        raise ConfigError(f"usage = {usage}: expected a share of the tokens, between 0 and 1.")
    check_times(cloud_ms, device_ms)
    check_picture(png)
    links = [Link(r, b, jitter, loss) for r in numbers(rtt, "rtt") for b in numbers(bandwidth, "bandwidth")]
    shape, memory = LLAMA_7B, "stateless"
    with spinner() as advance:
        if plugin is not None:
            from spa_jax.train import load_run

            advance("measuring the model's own times")
            fitted = load_run(plugin)
            side, backbone = fitted.plugin.side, fitted.model.decoder
            memory = side.config.memory
            attention = (backbone.heads + backbone.kv_heads) * backbone.head_dim
            shape = Shape(backbone.embed, backbone.layers, len(side.tapped) + 1, side.config.width, attention)
            if cloud_ms is None or device_ms is None:
                found = constants(fitted.model, fitted.plugin)
                cloud_ms = found[0] if cloud_ms is None else cloud_ms
                device_ms = found[1] if device_ms is None else device_ms
        times: dict[str, Any] = {
            "cloud_ms": 30.0 if cloud_ms is None else cloud_ms,
            "device_ms": 5.0 if device_ms is None else device_ms,
        }
        # as the plugin runs below; the paper's plugins have their activations projected in the cloud
        ways = methods(shape, coding=coding, usage=usage, projected=plugin is None, memory=memory)
        rows = compare(ways, links, tokens=tokens, advance=advance, **times)
        if plugin is not None:
            advance("running cloud and device")
            rows += running(fitted.model, fitted.plugin, shape, links, tokens=tokens, coding=coding, **times)
    if png is not None:
        plot(rows, png)
    if json:
        print_json({**times, "tokens": tokens, "rows": [row.to_json() for row in rows]})
        return
    table = Table(title=f"ms a token, {tokens} tokens; device {times['device_ms']:.1f}, cloud {times['cloud_ms']:.1f}")
    for column in ("rtt ms", "MB/s", "method", "network", "predicted", "measured", "error"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        link = (f"{row.link.rtt_ms:g}", f"{row.link.bandwidth_mb_s:g}", row.method)
        shown = (row.predicted.network, row.predicted.total, row.measured.total)
        table.add_row(*link, *(f"{x:.1f}" for x in shown), f"{100 * row.error:+.0f} %")
    print_table(table)
    if png is not None:
        print(f"wrote {png}")


def check_times(cloud_ms: float | None, device_ms: float | None) -> None:
    for name, ms in (("cloud-ms", cloud_ms), ("device-ms", device_ms)):
        if ms is not None and not 0 <= ms < float("inf"):
            raise ConfigError(f"{name} = {ms}: expected ms, at least 0.")


def calibrate(
    run: RunFolder,
    /,
    *,
    budget: str | None = None,
    rtt: float | None = None,
    bandwidth: float | None = None,
    usage: float | None = None,
    cloud_ms: float | None = None,
    device_ms: float | None = None,
    coding: Coding = "int8",
    project: Place = "device",
    png: Path | None = None,
    json: Flag = False,
) -> None:
    """Set a plugin's threshold, so that a token takes no longer than a budget on a link, or for a usage; written to it.

    Args:
        run: folder of a finished `spa fit`.
        budget: ms a token, like "40 ms/token".
        rtt: of the link, ms.
        bandwidth: of the link, megabytes a second.
        usage: instead of those three: the share of tokens that are to use the side network.
        cloud_ms: of the cloud's part of a token; the default is measured here.
        device_ms: of the device's part of a gated token; the default is measured here.
        coding: of the frames.
        project: where activations are projected.
        png: write held-out loss against ms a token, too.
        json: print the numbers as JSON and nothing else.
    """
    import numpy as np

    from spa_jax.network import Link, Shape, methods
    from spa_jax.plugin import load_plugin, save_plugin

    check_times(cloud_ms, device_ms)
    check_picture(png)
    plugin = load_plugin(run)
    if not plugin.setting.gated:
        raise ConfigError(f"{run} is a plugin of the setting {plugin.setting}: it has no gate to calibrate.")
    if usage is not None:
        if (budget, rtt, bandwidth, png) != (None, None, None, None):
            raise ConfigError("--usage sets the threshold by itself: leave --budget, --rtt, --bandwidth and --png out.")
        threshold = plugin.threshold_for(usage)
        save_plugin(run, plugin.replace(threshold=threshold, usage=usage))
        return print_json({"usage": usage, "threshold": threshold}) if json else print(f"threshold {threshold:.4g}")
    if budget is None or rtt is None or bandwidth is None:
        raise ConfigError("give --budget, --rtt and --bandwidth; or --usage alone.")
    link, wanted = Link(rtt, bandwidth), budget_ms(budget)
    if cloud_ms is None or device_ms is None:
        from spa_jax.latency import constants
        from spa_jax.train import load_run

        found = constants(load_run(run).model, plugin)
        cloud_ms = found[0] if cloud_ms is None else cloud_ms
        device_ms = found[1] if device_ms is None else device_ms
    side = plugin.side
    shape = Shape(side.backbone.embed, side.backbone.layers, len(side.tapped) + 1, side.config.width, 1)
    spa = methods(shape, coding=coding, projected=project == "cloud", usage=1.0)[0]
    # "lazy" memory sends the activations of every token down, sooner or later; else only those of gated ones travel
    lazy = side.config.memory == "lazy"
    down_ms = link.exchange_ms(spa.down) - link.exchange_ms(0) if lazy else 0.0
    exchange = device_ms + link.exchange_ms(spa.up if lazy else spa.down + spa.up)
    left = wanted - cloud_ms - down_ms
    if left < 0:
        slow = cloud_ms > wanted
        alone = "the cloud alone takes" if slow else "the cloud, with the activations that it sends down, takes"
        raise ConfigError(
            f"budget = {wanted:g} ms a token: {alone} {cloud_ms if slow else cloud_ms + down_ms:.3g} ms, so the side "
            "network could never be used. The plugin is as it was; give a larger budget."
        )
    usage = min(max(left / exchange, 0.0), 1.0) if exchange else float(left >= 0)
    cost = lambda usage: cloud_ms + (down_ms + usage * exchange if usage else 0.0)  # noqa: E731
    threshold = plugin.threshold_for(usage)
    save_plugin(run, plugin.replace(threshold=threshold, usage=usage))
    result = {"budget_ms": wanted, "cloud_ms": cloud_ms, "device_ms": device_ms, "exchange_ms": exchange}
    result |= {"down_ms": down_ms, "usage": usage, "threshold": threshold, "ms_per_token": cost(usage)}
    if png is not None:
        from spa_jax.latency import plot_budget

        points = [(cost(point["usage"]), point["loss"]) for point in plugin.calibration]
        losses = sorted((point["usage"], point["loss"]) for point in plugin.calibration)
        usages, held = zip(*losses, strict=True)
        loss = float(np.interp(usage, usages, held))
        plot_budget(points, (cost(usage), loss), link, png)
    if json:
        print_json(result)
        return
    for name, value in result.items():
        print(f"{name:14} {value:.4g}")


def publish(
    run: RunFolder,
    /,
    *,
    out: Path,
    gate: Flag = False,
) -> None:
    """Write the down-projections of a plugin into a file for a server's --public. Only what may be public!

    Args:
        run: folder of a finished `spa fit`.
        out: the safetensors file to write.
        gate: the gate, too, so that no device has to send it (--public-gate there).
    """
    from spa_jax.device_model import public_part
    from spa_jax.plugin import load_plugin
    from spa_jax.public import save_public

    part = public_part(load_plugin(run).side, gate=gate)
    print(f"wrote {save_public(out, part)}: {part.name}")


COMMANDS: dict[str, Any] = {
    "serve": serve,
    "chat": chat,
    "generate": generate,
    "latency": latency,
    "calibrate": calibrate,
    "publish": publish,
}
