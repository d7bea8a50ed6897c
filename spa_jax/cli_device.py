"""The device's commands: ``spa chat`` and ``spa generate``. Annotations are not postponed, see :mod:`spa_jax.cli`."""

import asyncio
import contextlib
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from mlfs_jax.errors import ConfigError
from mlfs_jax.interrupts import run_async
from mlfs_jax.terminal import print_json
from spa_jax.errors import PluginError
from spa_jax.options import Coding, Flag, Place, budget_ms, read_token


@dataclass(frozen=True)
class DeviceOptions:
    """Where the server is, what the device has, and how the two share the work.

    Attributes:
        server: ws://host:port or wss://host:port.
        plugin: folder of a finished `spa fit`.
        token_file: holds the secret that the server asks for.
        max_new_tokens: of one answer.
        stats: say what each answer cost.
        tokenizer: folder of the base's tokenizer; the default is where `spa fit` found it.
        cafile: PEM of the authority that signed the server's certificate, if it is your own.
        head: where tokens are chosen when the side network is used; on the device the side network's states do not
            go up, but the tokens that come of them do.
        base: where the head's weights are read from, for --head device; the default is what `spa fit` had.
        project: where activations are projected; the cloud must have what `spa publish` wrote.
        public_gate: leave the gate to the cloud, too, which must have it of `spa publish --gate`; none is sent.
        coding: of activations and states on the wire.
        int8: keep the plugin's kernels in int8.
        usage: share of tokens to use the side network for; the default is what the plugin was calibrated to.
        budget: ms a token that a session should keep on average, whatever the link does.
        fallback: a small model to go on with when the server is gone; RUN#SUBNET for one of a palette.
        timeout: seconds for one answer.
    """

    server: str
    plugin: Path
    token_file: Path | None = None
    max_new_tokens: int = 50
    stats: Flag = False
    tokenizer: Path | None = None
    cafile: Path | None = None
    head: Place = "cloud"
    base: str | None = None
    project: Place = "device"
    public_gate: Flag = False
    coding: Coding = "fp32"
    int8: Flag = False
    usage: float | None = None
    budget: str | None = None
    fallback: str | None = None
    timeout: float = 300.0


Options = Annotated[DeviceOptions, tyro.conf.arg(name="")]


class Kit:
    """What a device needs: plugin, tokenizer, perhaps the head, perhaps a model to fall back on."""

    def __init__(self, options: DeviceOptions):
        from mlfs_jax.data.tokenizer import load_tokenizer
        from mlfs_jax.hf.load import model_folder
        from spa_jax.device_model import SideDevice
        from spa_jax.plugin import load_plugin, tokenizer_fingerprint

        if options.public_gate and options.project != "cloud":
            raise ConfigError("public-gate: the cloud finds a gate by the Down beside it; give --project cloud, too.")
        self.options = options
        self.plugin = load_plugin(options.plugin)
        if options.budget is not None and not self.plugin.setting.gated:
            raise ConfigError(
                f"budget: this plugin's setting is {self.plugin.setting}, which has no gate to hold back."
            )
        folder = options.tokenizer or _of_run(options.plugin, model_folder)
        if not folder.is_dir():
            raise ConfigError(f"tokenizer {folder}: there is no such folder.")
        if tokenizer_fingerprint(folder) != self.plugin.tokenizer:
            raise PluginError(f"this plugin was made with another tokenizer than the one in {folder}.")
        self.tokenizer = load_tokenizer(folder)
        self.stop = list(self.plugin.side.backbone.eos_token_ids)
        self.model = SideDevice(
            self.plugin.side,
            base=self.plugin.base,
            setting=self.plugin.setting,
            threshold=self.plugin.threshold_for(options.usage),
            head=_head(self.plugin, options),
            project=options.project,
            send_gate=not options.public_gate,
            coding=options.coding,
            budget=None if options.budget is None else budget_ms(options.budget),
            int8=options.int8,
        )
        for positions in (1,) if options.budget is None else (1, 2, 4, 8):  # a compile would pass for a slow link
            self.model.warm_up(positions)
        self.fallback = None if options.fallback is None else _fallback(options.fallback, self.plugin.tokenizer)

    def device(self):
        from spa_jax.channel import DeviceConfig
        from spa_jax.device import Device

        options, token = self.options, read_token(self.options.token_file)
        config = DeviceConfig(cafile=options.cafile, answer_s=options.timeout)
        return Device(options.server, self.model, token=token, config=config, fallback=self.fallback)

    def encode(self, text: str, *, first: bool = True) -> list[int]:
        from mlfs_jax.data.tokenizer import prompt_ids

        ids = prompt_ids(self.tokenizer, text, first=first)
        if not ids:
            raise ConfigError(f"prompt = {text!r} is no token: expected some text.")
        return ids

    def printer(self, prompt: list[int]):
        """Prints tokens as text, as they come."""
        from mlfs_jax.data.tokenizer import TextStream

        text = TextStream(self.tokenizer, prompt)

        def show(token: int, used: bool) -> None:
            print(text.step(token), end="", flush=True)

        return show


def _of_run(plugin: Path, get: Callable[[str], Path]) -> Path:
    """The folder that ``get`` finds for the base that a run was made with."""
    from mlfs_jax.errors import DataError, RunError, UnknownNameError, first_line
    from mlfs_jax.run import Run

    try:
        return get(Run.open(plugin).config["model"])
    except (RunError, KeyError, UnknownNameError, DataError) as e:
        raise ConfigError(
            f"{plugin} does not say what its base is, or it is not here ({first_line(e)}): give --tokenizer FOLDER "
            "(and --base, for --head device)."
        ) from None


def _head(plugin, options: DeviceOptions) -> dict | None:
    """The weights of the base's head, if tokens are chosen here."""
    if options.head == "cloud":
        return None
    from mlfs_jax.backbone.tree import flatten
    from mlfs_jax.hf.load import from_pretrained
    from mlfs_jax.registry import resolve_model
    from spa_jax.device_model import head_names

    base: Path | str | None = options.base
    if base is None:
        try:
            base = _of_run(options.plugin, resolve_model)
        except ConfigError:  # a plugin without its run: perhaps the tokenizer lies in the base's folder
            if (base := options.tokenizer) is None:
                raise
    model = from_pretrained(base, base_bits=plugin.base_bits)
    plugin.check(model.decoder, model.base)
    weights = flatten(model.base)
    return {name: weights[name][...] for name in head_names(model.decoder)}


def _fallback(name: str, tokenizer: str):
    """Continues with a small model of the device's own, of the same tokenizer, as far as its context goes."""
    from mlfs_jax.generate import GenerateConfig, generate
    from mlfs_jax.load import load_subnet
    from spa_jax.plugin import tokenizer_fingerprint

    model = load_subnet(*name.split("#", 1))
    if model.source is None or tokenizer_fingerprint(model.source) != tokenizer:
        raise PluginError(
            f"fallback = {name!r} reads other token ids than this plugin's base: expected a model with the tokenizer "
            "that the plugin was made with."
        )

    def go_on(history: list[int], limit: int, stop) -> list[int]:
        limit = min(limit, model.config.max_positions - len(history))
        if limit < 1:
            return []
        config = GenerateConfig(max_new_tokens=limit, stop_tokens=tuple(stop))
        found = generate(model, [history], config)
        ended = [stop[0]] if stop and found.finished[0] else []
        return [*found.tokens[0], *ended]

    return go_on


def report(answer, model) -> dict[str, Any]:
    """What a text cost, for people and --json."""
    stats, count = answer.stats, max(len(answer.used), 1)
    return {
        "tokens": len(answer.tokens),
        "end": answer.end,
        "tokens_per_second": round(len(answer.used) / stats.total, 2) if stats.total else None,
        "usage": round(sum(answer.used) / count, 3),
        "round_trips": stats.round_trips,
        "bytes_up": stats.bytes_up,
        "bytes_down": stats.bytes_down,
        "connections": stats.connections,
        "ms_total": round(1e3 * stats.total, 1),
        "ms_device": round(1e3 * stats.device, 1),
        "ms_cloud_and_network": round(1e3 * stats.waiting, 1),
        "ms_round_trip": round(1e3 * stats.rtt, 2),
        "local": answer.local,
        "device_memory_mb": {name: round(size / 2**20, 2) for name, size in model.memory.items()},
        "device_mflops_per_token": round(model.flops / 1e6, 3),
    }


def _say(answer, model, stats: bool) -> None:
    print()
    if answer.note:
        print(f"note: {answer.note}", file=sys.stderr)
    if stats:
        for name, value in report(answer, model).items():
            print(f"{name:24} {value}")


def generate(options: Options, *, prompt: str, json: Flag = False) -> int:
    """Continue a prompt with a plugin here and its base at a server; exit code 3: incomplete.

    Args:
        prompt: the text; a backslash and an n are a line break.
        json: print text and costs as JSON and nothing else.
    """
    kit = Kit(options)
    ids = kit.encode(prompt.replace("\\n", "\n"))

    async def run():
        async with kit.device() as device:
            return await device.generate(ids, options.max_new_tokens, kit.stop, None if json else kit.printer(ids))

    answer = run_async(run())
    if json:
        text = kit.tokenizer.decode([*ids, *answer.tokens])[len(kit.tokenizer.decode(ids)) :]
        print_json({"text": text, "note": answer.note, **report(answer, kit.model)})
    else:
        _say(answer, kit.model, options.stats)
    return 0 if answer.end in ("stop", "limit", "full") else 3


async def _typed(prompt: str) -> str:
    """A line of the user's, read in a thread that nothing waits for: Ctrl-C ends a chat at once."""
    if not sys.stdin.isatty():  # a pipe ends by itself; and Python must not end while a thread reads one
        return await asyncio.to_thread(input, prompt)
    loop = asyncio.get_running_loop()
    line: asyncio.Future[str] = loop.create_future()

    def settle(give, value) -> None:
        if not line.done():
            give(value)

    def read() -> None:
        result: tuple[Callable[[Any], None], Any]
        try:
            result = line.set_result, input(prompt)
        except Exception as error:
            result = line.set_exception, error
        with contextlib.suppress(RuntimeError):  # the chat has ended
            loop.call_soon_threadsafe(settle, *result)

    threading.Thread(target=read, daemon=True).start()
    return await line


def chat(options: Options) -> None:
    """Talk to a server, line by line; each line goes on after all before. An empty line or Ctrl-D ends it.

    A line that a session has no room for begins a new one, which knows nothing of what was said before.
    """
    from spa_jax.errors import NetworkError

    kit = Kit(options)

    async def talk(line: str) -> str:
        """One session, from a line on; the line that it has no room for."""
        async with kit.device() as device:
            while line.strip():
                ids = kit.encode(line, first=not device.history)
                try:
                    answer = await device.generate(ids, options.max_new_tokens, kit.stop, kit.printer(ids))
                except NetworkError as error:
                    if error.code == "too-long" and device.history:
                        print(f"note: {error} A new session begins with this line.", file=sys.stderr)
                        return line
                    if not sys.stdin.isatty() or not (device.history or error.code == "too-long"):
                        raise
                    print(f"note: {error} This line was not said; what was said before it is kept.", file=sys.stderr)
                else:
                    _say(answer, kit.model, options.stats)
                    if answer.end == "full":
                        print("note: the session is full.", file=sys.stderr)
                line = await _typed("> ")
        return ""

    async def run():
        with contextlib.suppress(EOFError):
            line = await _typed("> ")
            while line.strip():
                line = await talk(line)

    run_async(run())
