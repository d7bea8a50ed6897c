"""What README and docs show is so: Python runs as it stands there, command lines are parsed by their own parsers."""

import configparser
import functools
import importlib
import json
import re
import runpy
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import tyro

import mlfs_jax
import spa_jax
from mlfs_jax.registry import get_entry, is_whole

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "experiments/README.md"))]
PAGES += sorted(ROOT.glob("docs/**/*.md"))
BLOCK = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
NEEDS = re.compile(r"<!-- needs: (.+?) -->")  # what of the catalogue a page's Python wants in the cache
ELSEWHERE = {"cd", "git", "llama-cli"}  # other people's commands


@dataclass(frozen=True)
class Block:
    page: str
    language: str
    text: str


BLOCKS = [
    Block(page.relative_to(ROOT).as_posix(), found[2], found[3])
    for page in PAGES
    for found in BLOCK.finditer(page.read_text(encoding="utf-8"))
]


def of(language: str) -> dict[str, list[str]]:
    """Page -> its blocks in a language."""
    pages: dict[str, list[str]] = {}
    for block in BLOCKS:
        if block.language == language:
            pages.setdefault(block.page, []).append(block.text)
    return pages


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)\s#]+)[^)\s]*\)", page.read_text(encoding="utf-8"))
    dead = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not dead


def test_every_block_says_what_it_is():
    """Text is for pictures and what programs print; all else is tried below."""
    assert {(b.page, b.language) for b in BLOCKS if b.language not in ("python", "bash", "json", "text")} == set()


@pytest.mark.parametrize("page", of("python"))
def test_python_runs(page, tmp_path, monkeypatch):
    """The blocks of a page, one after the other, in an empty folder."""
    for name in " ".join(NEEDS.findall((ROOT / page).read_text(encoding="utf-8"))).split():
        entry = get_entry(name)
        if not is_whole(entry.cached, entry):
            pytest.skip(f"{name} is not in the cache: mlfs fetch {name}")
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": page}
    monkeypatch.setitem(sys.modules, page, names)  # dataclasses look their module up
    for number, block in enumerate(of("python")[page], 1):
        exec(compile(block, f"{page}, Python block {number}", "exec"), names)


@pytest.mark.parametrize("page", of("json"))
def test_json_reads(page):
    for block in of("json")[page]:
        for line in block.splitlines():
            json.loads(line)


class _Parsed(Exception):
    pass


def commands(page: str) -> list[list[str]]:
    lines = "".join(of("bash")[page]).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := split(line))]


def split(line: str) -> list[str]:
    """A command's words, without where its output goes."""
    words = shlex.split(line, comments=True)
    return words[: words.index(">")] if ">" in words else words


@pytest.fixture
def parse(monkeypatch, capsys):
    """Have a command line read by the parser that would read it, with its flags; nothing is done."""
    real = tyro.cli

    def only_parse(function, **settings):
        if not isinstance(function, type):

            @functools.wraps(function)
            def function(*args, of=function, **kwargs):
                return 0

        return real(function, **settings)

    monkeypatch.setattr(tyro, "cli", only_parse)
    monkeypatch.syspath_prepend(ROOT / "experiments")
    for package in ("mlfs_jax", "spa_jax"):
        monkeypatch.setattr(importlib.import_module(f"{package}.cli"), "set_up_jax", lambda: None)

    def parse(words: list[str]) -> None:
        while "=" in words[0]:  # variables of the environment
            words = words[1:]
        said = shlex.join(words)
        match words:
            case ["mlfs" | "spa" as name, *args]:
                code = importlib.import_module(f"{name}_jax.cli").main(args)
                assert code == 0, f"{said}: {capsys.readouterr().err}"
            case ["python", script, *args] if script.startswith("experiments/"):
                parse_script(script, args, monkeypatch)
            case ["python" | ".venv/bin/python", "-m", "pytest", *_]:
                pass
            case ["make", *args]:
                targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
                assert {arg for arg in args if "=" not in arg} <= set(targets), said
            case ["pip", "install", *args]:
                setup = configparser.ConfigParser()
                setup.read(ROOT / "setup.cfg")
                for extra in re.findall(r"\[(.+?)\]", " ".join(args)):
                    assert set(extra.split(",")) <= set(setup["options.extras_require"]), said
            case [name, *_]:
                assert name in ELSEWHERE, said

    return parse


def parse_script(script: str, args: list[str], monkeypatch) -> None:
    """An experiment's arguments, by its own options."""
    read = tyro.cli

    def stop(*given, **settings):
        read(*given, **settings)
        raise _Parsed

    with monkeypatch.context() as patch, pytest.raises(_Parsed):
        patch.setattr(tyro, "cli", stop)
        patch.setattr(sys, "argv", [script, *args])
        runpy.run_path(str(ROOT / script), run_name="__main__")


@pytest.mark.parametrize("page", of("bash"))
def test_commands_are_parsed(page, parse):
    for words in commands(page):
        parse(words)


def test_commands_of_experiments_are_parsed(parse, monkeypatch):
    """Those within sentences, and those of the index."""
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for command in {*re.findall(r"`(python experiments/[^`]+)`", text)}:
        parse(split(command))
    import index

    for row in (*index.MLFS, *index.SPA):
        if row.command:
            parse(split(row.command))


def test_readme_shows_every_command_of_mlfs():
    from mlfs_jax.cli import COMMANDS

    assert {words[1] for words in commands("README.md") if words[0] == "mlfs"} == set(COMMANDS)


@pytest.mark.parametrize(("package", "page"), [(mlfs_jax, "docs/api/mlfs.md"), (spa_jax, "docs/api/spa.md")])
def test_reference_has_every_public_name(package, page):
    shown = set(re.findall(r"^::: (\S+)", (ROOT / page).read_text(), re.MULTILINE))
    homes = {name: getattr(package, name).__module__ for name in package.__all__}
    assert {name: home for name, home in homes.items() if home not in shown} == {}


def test_tables_are_what_the_results_say(monkeypatch):
    """`python experiments/index.py` writes them; every file of results has its place."""
    monkeypatch.syspath_prepend(ROOT / "experiments")
    import index

    for page in index.PAGES:
        text = page.read_text(encoding="utf-8")
        assert index.generated(text) == text, f"{page.name} is stale: python experiments/index.py"
    source = "".join(
        (ROOT / f"experiments/{name}.py").read_text(encoding="utf-8") for name in ("tables", "bench_tables")
    )
    shown = set(re.findall(r"(?:read|published)\(\"(\w+)\"\)", source))
    assert {file.stem for file in (ROOT / "experiments/results").glob("*.json")} <= shown


def test_the_index_speaks_of_what_was_measured(monkeypatch, tmp_path):
    """Both outcomes, and none: on results made for this."""
    monkeypatch.syspath_prepend(ROOT / "experiments")
    import index
    import tables

    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert index.alpha() is None and "nothing yet" in index.SECTIONS["spa-index"]()

    def measure(**finals):
        runs = {
            f"cpu/{arm}/{seed}": {"preset": "cpu", "arm": arm.replace("_", " "), "seed": seed, "device": "cpu"}
            | {"curve": {"0": 100.0, "9": value + seed}}
            for arm, value in finals.items()
            for seed in (0, 1)
        }
        (tmp_path / "mlfs_decoder.json").write_text(json.dumps(runs))

    measure(**{"width,_alpha_0.9": 10, "width,_alpha_0.5": 20, "width,_alpha_0": 30})
    assert index.alpha() == index.Finding(
        "perplexity with 0.9: 10.5 ± 0.7, with 0.5: 20.5 ± 0.7, with 0: 30.5 ± 0.7", True, "2 seeds, a CPU"
    )
    measure(**{"width,_alpha_0.9": 10, "width,_alpha_0.5": 40, "width,_alpha_0": 30})
    assert not index.alpha().same
    row = next(row for row in index.MLFS if row.find is index.alpha)
    assert row.cells()[4:] == ["**no**", row.other]


def test_the_site_builds(tmp_path, monkeypatch):
    """Without a warning: no dead link, no page outside the navigation, no argument that a docstring invents."""
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    monkeypatch.chdir(ROOT)
    config = load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path / "site"))
    build(config)
    front = (tmp_path / "site/methods/mlfs/index.html").read_text(encoding="utf-8")
    assert "<math" in front and "arithmatex" not in front
