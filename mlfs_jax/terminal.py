"""What command lines have in common: mistakes as one line on stderr, exit codes, logs, tables, the compile cache."""

import contextlib
import hashlib
import json
import logging
import math
import os
import platform
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlfs_jax.allocator import keep_freed_memory
from mlfs_jax.errors import MLFSError, unknown
from mlfs_jax.interrupts import interrupted, remember_interrupts
from mlfs_jax.registry import cache_dir

SHELLS = ("bash", "zsh", "tcsh")


def run_command(
    argv: Sequence[str] | None,
    help: str,
    commands: Mapping[str, Any],
    run: Callable[[str, list[str]], int],
    *,
    prog: str,
    functions: Callable[[], Mapping[str, Callable]],
    trains: Collection[str],
) -> int:
    """Run one command; returns the exit code: what ``run(command, arguments)`` says, 2 (a mistake), 130 (interrupted).

    Args:
        argv: the arguments; None: of the process.
        help: printed for none, and for --help.
        commands: their names are offered where an unknown one is asked for.
        prog: name of the program.
        functions: what each command calls, for the shell's completion (``--print-completion SHELL``).
        trains: commands that run networks for long, or time them: in a process of their own freed memory is kept.
    """
    alone = argv is None
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(help, end="")
        return 0 if argv else 2
    try:
        if argv[0] == "--version":
            import importlib.metadata

            print(importlib.metadata.version("mlfs-jax"))
            return 0
        if argv[0] == "--print-completion":
            return _print_completion(prog, functions(), argv[1] if len(argv) > 1 else SHELLS[0])
        if argv[0] not in commands:
            raise unknown("command", argv[0], commands)
        if alone:
            remember_interrupts()
        if alone and argv[0] in trains:
            keep_freed_memory()
        code = run(argv[0], argv[1:])
        sys.stdout.flush()
        return code
    except MLFSError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `mlfs info ... | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at exit
        return 0
    except OSError as e:  # a full disk, a folder that may not be written
        print(f"error: {e.strerror or e}" + (f": {e.filename}" if e.filename else ""), file=sys.stderr)
        return 2
    except BaseException as e:
        if not isinstance(e, KeyboardInterrupt) and not (alone and interrupted()):  # an import that Ctrl-C broke off
            raise
        print("interrupted", file=sys.stderr)
        if alone:  # Python's own way out would crash where XLA's threads still compile
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            sys.stderr.flush()
            os._exit(130)
        return 130


def _print_completion(prog: str, functions: Mapping[str, Callable], shell: str) -> int:
    import tyro

    if shell not in SHELLS:
        raise unknown("shell", shell, SHELLS)
    with contextlib.suppress(SystemExit):  # tyro prints and exits
        tyro.extras.subcommand_cli_from_dict(
            dict(functions),
            prog=prog,
            args=["--tyro-print-completion", shell],
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    return 0


@contextlib.contextmanager
def log_to_stderr(level: int, name: str = "mlfs_jax") -> Iterator[None]:
    """What the package logs, as plain lines."""
    logger, handler = logging.getLogger(name), logging.StreamHandler()
    before = logger.level, logger.propagate
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def set_up_jax() -> None:
    """Keep compiled programs in the cache folder, apart for each kind of CPU (code for one may not run on another)."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        cpu = Path("/proc/cpuinfo").read_text()
    except OSError:
        cpu = ""
    facts = sorted({line for line in cpu.splitlines() if line.startswith(("model name", "flags", "Features"))})
    kind = hashlib.sha256("\n".join([platform.machine(), *facts]).encode()).hexdigest()[:12]
    folder = cache_dir() / "xla" / kind
    with contextlib.suppress(OSError):  # a read-only home: do without
        folder.mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        jax.config.update("jax_compilation_cache_max_size", 2**30)


def print_json(value: Any) -> None:
    """A value as JSON; a number that is none, or infinite, is null there."""
    print(json.dumps(_finite(value), indent=2, ensure_ascii=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(table: Any) -> None:
    """Print a table; one that is wider than the terminal runs over rather than losing digits."""
    from rich.console import Console

    console = Console()
    needed = console.measure(table, options=console.options.update(width=1000)).maximum
    Console(width=max(console.width, needed)).print(table)


@contextlib.contextmanager
def spinner(doing: str = "loading data") -> Iterator:
    """A line on stderr that says what is being done; gone at the end."""
    from rich.console import Console

    console = Console(stderr=True)
    with console.status(doing) as status:
        yield status.update
