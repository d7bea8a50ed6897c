"""The command line: ``spa fit | eval | baseline | show``, and the split runtime's of :mod:`spa_jax.cli_network`.

Each command is a function whose signature tyro turns into flags. Commands import what they need when they run, so that
``spa --help`` answers at once; for the same reason this module does without postponed annotations.
"""

import logging
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from mlfs_jax.errors import ConfigError, RunError, UnknownNameError
from mlfs_jax.terminal import log_to_stderr, print_json, print_table, run_command, set_up_jax, spinner
from spa_jax import cli_network
from spa_jax.options import Flag, RunFolder, check_picture

HELP = f"""\
usage: spa COMMAND ...      (spa COMMAND --help lists its options)

A personal side network on the device, beside a frozen language model in the cloud.

  fit       train a side network and its gate for a task, or one for each user; resumable
  eval      Rouge-1/2/L of what a run writes; how often the side network was used
  baseline  LoRA, adapters, LST, one-shot, ... over the same base, data and trained share
  show      a continuation with each token coloured by who chose it
{cli_network.HELP}
examples:
  spa fit --model smollm2-135m --task wiki-description --setting spa --out runs/spa
  spa fit --model smollm2-135m --task my.jsonl --per-user --out runs/users
  spa eval runs/spa --usage 0.62
  spa baseline --method lora --model smollm2-135m --task wiki-description --out runs/lora
  spa show runs/spa --prompt "The Thames is a river in England.\\n\\nShort description:"
{cli_network.EXAMPLES}  spa --print-completion bash (or zsh, tcsh; see your shell's manual)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 (a mistake), 130 (interrupted)."""
    made = lambda: COMMANDS | {name: make() for name, make in MADE.items()}  # noqa: E731
    return run_command(argv, HELP, COMMANDS, _run, prog="spa", functions=made, trains=MADE)


def _run(command: str, args: list[str]) -> int:
    if not {"-h", "--help"} & set(args):
        set_up_jax()
    function = COMMANDS[command] or MADE[command](args)
    trains = command in MADE
    config = () if trains else (tyro.conf.FlagCreatePairsOff,)
    with log_to_stderr(logging.WARNING if trains else logging.ERROR):
        return tyro.cli(function, prog=f"spa {command}", args=args, config=config) or 0


def _fit(args: Sequence[str] = ()):
    from mlfs_jax import hosts as processes
    from spa_jax.config import FitConfig

    alone = processes.Hosts()

    def fit(
        config: Annotated[FitConfig, tyro.conf.arg(name="")] = FitConfig(model=tyro.MISSING, task=tyro.MISSING),  # noqa: B008
        *,
        out: RunFolder,
        per_user: Annotated[Flag, tyro.conf.FlagCreatePairsOff] = False,
        mesh: str | None = None,
        hosts: Annotated[processes.Hosts, tyro.conf.arg(name="")] = alone,
    ) -> int:
        """Train a plugin: the side network, then its gate, whose threshold is set for the wanted usage.

        Stop it any time with Ctrl-C; the same command goes on where it was.

        Args:
            out: folder of the run; new, empty, or holding the same run.
            per_user: one plugin for each user of the task, each in a folder of its own below.
            mesh: several devices, e.g. data=2,fsdp=4,tensor=1: copies, split weights, split layers. A run may go on
                with another one.
        """
        from mlfs_jax.sharding import make_mesh
        from spa_jax.train import fit as train
        from spa_jax.train import fit_users

        if per_user and hosts.several():
            raise ConfigError("--per-user is for one process: give each host its own, --user NAME --coordinator none.")

        def work() -> None:
            (fit_users if per_user else train)(config, out, mesh=None if mesh is None else make_mesh(mesh))

        return processes.run_job(hosts, "spa_jax.cli", ["fit", *args], work)

    return fit


def _baseline(_args: Sequence[str] = ()):
    from spa_jax.baselines import BaselineConfig

    missing = BaselineConfig(method="lora", model=tyro.MISSING, task=tyro.MISSING)

    def baseline(
        config: Annotated[BaselineConfig, tyro.conf.arg(name="")] = missing,
        *,
        out: RunFolder,
    ) -> int:
        """Train a baseline over the same frozen base; `spa eval` measures it.

        Args:
            out: folder of the run; new, empty, or holding the same run.
        """
        from spa_jax.baselines import fit_baseline
        from spa_jax.train import fit as train

        if config.method == "lst":
            train(config.fit_config, out)
        else:
            fit_baseline(config, out)
        return 0

    return baseline


def evaluate(
    run: RunFolder,
    /,
    *,
    usage: float | None = None,
    setting: str | None = None,
    split: str = "test",
    beams: int = 1,
    limit: int | None = None,
    batch_size: int = 16,
    curve: Path | None = None,
    json: Flag = False,
) -> None:
    """Let a finished run complete every prompt of a split, and hold what it writes against the references.

    Args:
        run: folder of the run, or of the runs of several users.
        usage: share of tokens to use the side network for; the default is what the run was calibrated to.
        setting: s1 of a run for spa, s3 of a run for s2: the same side network without its gate.
        split: of the task.
        beams: of a beam search; 1: greedy.
        limit: at most this many examples.
        batch_size: prompts at a time.
        curve: picture of loss and Rouge-L over usage, which takes an evaluation at each of five usages.
        json: print the numbers as JSON and nothing else.
    """
    from rich.table import Table

    from spa_jax.errors import PluginError
    from spa_jax.evaluate import evaluate_run
    from spa_jax.gate import check_usage

    if usage is not None:
        check_usage(usage)
    check_picture(curve)
    if curve is not None:
        if usage is not None or setting is not None:
            raise ConfigError("--curve draws several usages of the run's own setting: leave --usage and --setting out.")
        return _draw_curve(run, curve, split, beams, limit, batch_size, json)
    users = [] if (run / "run.json").exists() else sorted(folder.parent for folder in run.glob("*/run.json"))
    folders = users or [run]
    results: dict[str, dict[str, float]] = {}
    with spinner() as advance:
        for folder in folders:
            try:
                results[folder.name] = evaluate_run(
                    folder,
                    usage=usage,
                    setting=setting,
                    split=split,
                    beams=beams,
                    limit=limit,
                    batch_size=batch_size,
                    advance=partial(lambda name, doing: advance(f"{name}: {doing}"), folder.name),
                )
            except (UnknownNameError, RunError, PluginError) as e:  # no example in a small split; no whole plugin
                if folder is folders[-1] and not results:
                    raise
                print(f"{folder.name} is left out: {e}", file=sys.stderr)
    if json:
        print_json(results if folders is users else results[run.name])
        return
    table = Table(title=f"{split} split" + (f", {beams} beams" if beams > 1 else ""))
    columns = list(next(iter(results.values())))
    for column in ("run", *columns):
        table.add_column(column, justify="left" if column == "run" else "right")
    for name, result in results.items():
        shown = (f"{result[c]}" if c == "tokens" else f"{100 * result[c]:.1f}" for c in columns)
        table.add_row(name, *shown)
    print_table(table)
    if "usage" in columns:
        print(
            "Percent. usage: tokens that asked the side network; diff: tokens on which it would choose another one than"
        )
        print("the base; pick: of those, where the gate chose the side network.")


def _draw_curve(run: Path, file: Path, split: str, beams: int, limit: int | None, batch_size: int, json: bool) -> None:
    from spa_jax.calibration import plot_curve, written_curve
    from spa_jax.evaluate import load_split
    from spa_jax.train import load_run

    fitted = load_run(run)
    encoded = load_split(fitted, split, limit)
    with spinner() as advance:
        points = written_curve(
            fitted.model, fitted.plugin, encoded, beams=beams, batch_size=batch_size, advance=advance
        )
    if json:
        print_json(points)
    else:
        for point in points:
            print(f"usage {100 * point['usage']:5.1f} %   Rouge-L {100 * point['rougeL']:.1f}")
    plot_curve(fitted.plugin, points, file)
    if not json:
        print(f"wrote {file}")


def show(
    run: RunFolder,
    /,
    *,
    prompt: str,
    usage: float | None = None,
    max_new_tokens: int = 48,
    html: Path | None = None,
    png: Path | None = None,
    json: Flag = False,
) -> None:
    """Continue a prompt, each token coloured by who chose it.

    Args:
        run: folder of a finished ``spa fit``.
        prompt: the text; a backslash and an n are a line break.
        usage: share of tokens to use the side network for; the default is what the run was calibrated to.
        max_new_tokens: at most.
        html: write a page, too.
        png: write a picture, too.
        json: print the tokens as JSON and nothing else.
    """
    from rich.console import Console

    from spa_jax import show as shows
    from spa_jax.train import load_run

    check_picture(png)
    shown = shows.show(load_run(run), prompt.replace("\\n", "\n"), usage=usage, max_new_tokens=max_new_tokens)
    written = []
    if html is not None:
        written.append(shows.save_html(shown, html))
    if png is not None:
        written.append(shows.save_png(shown, png))
    if json:
        print_json(shown.to_json())
        return
    terminal = Console()
    print_table(shows.as_rich(shown, marks=terminal.no_color or terminal.color_system is None))
    print(", ".join(f"{name} {100 * value:.0f} %" for name, value in shown.rates.items()))
    for file in written:
        print(f"wrote {file}")


COMMANDS: dict[str, Any] = {"fit": None, "eval": evaluate, "baseline": None, "show": show, **cli_network.COMMANDS}
MADE = {"fit": _fit, "baseline": _baseline}  # whose flags are the fields of a config, which takes jax to import


if __name__ == "__main__":
    sys.exit(main())
