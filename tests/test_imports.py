"""Imports go downward only, and importing the package stays light."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Low to high. A module imports from its own floor and those below, also inside functions.
# A new module gets its place here.
FLOORS = [
    {"front_door", "allocator", "errors", "interrupts", "config", "metrics", "hosts", "preemption", "checkpoint", "run"}
    | {"catalogue", "registry", "terminal", "data"},
    {"backbone", "hlo"},
    {"model"},
    {"sharding", "hf", "lora", "subnet", "fingerprint"},
    {"slicing", "importance", "distill", "generate", "vocab", "published"},
    {"timing", "supernet", "stages", "evaluate", "fit_config", "train"},
    {"palette", "export", "verify", "info", "load", "plan", "knobs"},
    {"cli"},
]
SPA_FLOORS = [
    {"errors", "seam", "fields", "wire", "public"},
    {"side", "gate", "network", "metrics", "budget", "channel"},
    {"start", "model", "engine", "device", "device_model"},
    {"session", "decode", "plugin", "ladders", "score", "loop", "adapters"},
    {"gate_fit", "cloud", "cloud_model"},
    {"config", "latency", "options"},
    {"train", "cli_device"},
    {"baselines", "cost", "show"},
    {"evaluate", "cli_network"},
    {"calibration"},
    {"cli"},
]
# What a device runs: of spa_jax only these, and of mlfs_jax what has no weights of the base.
DEVICE = {"errors", "seam", "side", "fields", "wire", "public", "channel", "device", "device_model"}
FOR_DEVICE = {"front_door", "errors", "config", "backbone"}

PACKAGES = {"mlfs_jax": FLOORS, "spa_jax": SPA_FLOORS}
FLOOR = {p: {name: h for h, names in enumerate(floors) for name in names} for p, floors in PACKAGES.items()}

# Slow to import or not installed with the package: only inside the functions that need them.
HEAVY = {"torch", "peft", "transformers", "tensorflow", "tensorflow_datasets", "matplotlib", "sklearn", "rouge_score"}


def modules() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package(name: str) -> str:
    """ "mlfs_jax.hf.load" -> "mlfs_jax"."""
    return name.partition(".")[0]


def top(name: str) -> str:
    """ "mlfs_jax.hf.load" -> "hf"; "" for the package itself."""
    return name.partition(".")[2].partition(".")[0]


def imported(node: ast.AST, path: Path) -> list[str]:
    """Absolute names that one import statement may bring in; `from p import a` counts as p.a."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        parts = dotted(path).split(".")
        if path.name != "__init__.py":
            parts.pop()
        parts = parts[: len(parts) - (node.level - 1)]
        base = ".".join([*parts, base] if base else parts)
    return [f"{base}.{alias.name}" for alias in node.names]


def imports(path: Path, *, lazy: bool) -> list[tuple[int, str]]:
    """(line, name) of the imports of a file; lazy=False leaves out those that do not run when it is imported."""
    found = []
    todo: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"), filename=str(path))]
    while todo:
        node = todo.pop()
        found += [(node.lineno, name) for name in imported(node, path)]
        later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        never = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if lazy or not (later or never):
            todo += ast.iter_child_nodes(node)
    return sorted(found)


def test_every_module_has_a_floor():
    names = {(package(dotted(path)), top(dotted(path))) for path in modules()}
    unplaced = {f"{p}.{name}" for p, name in names if name and name not in FLOOR[p]}
    assert not unplaced, f"name these in the floors of {Path(__file__).name}: {sorted(unplaced)}"


def test_imports_go_downward():
    wrong = []
    for path in modules():
        mine, here = package(dotted(path)), top(dotted(path))
        if not here:
            continue  # the front door, __init__, gathers names from every floor
        for line, name in imports(path, lazy=True):
            theirs = package(name)
            if theirs not in PACKAGES:
                continue
            where = f"{path.relative_to(ROOT)}:{line}"
            if (mine, theirs) == ("mlfs_jax", "spa_jax"):
                wrong.append(f"{where} imports {name}: spa_jax stands on mlfs_jax, never the reverse")
            elif top(name) not in FLOOR[theirs]:
                # `import mlfs_jax as mlfs`, or a name of the front door: that is every floor at once
                if top(name) != "__version__" and here not in PACKAGES[mine][-1]:
                    wrong.append(f"{where} imports {name} from the package itself; import it from its module")
            elif mine == theirs and FLOOR[mine][top(name)] > FLOOR[mine][here]:
                wrong.append(
                    f"{where} imports {name}, which is {FLOOR[mine][top(name)] - FLOOR[mine][here]} floor(s) up"
                )
    assert not wrong, "imports that go upward:\n" + "\n".join(wrong)


def test_a_device_knows_nothing_of_the_cloud():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in modules()
        if package(dotted(path)) == "spa_jax" and top(dotted(path)) in DEVICE
        for line, name in imports(path, lazy=True)
        if package(name) in PACKAGES and top(name) not in (DEVICE if package(name) == "spa_jax" else FOR_DEVICE)
    ]
    assert not wrong, "the device's code needs the cloud's:\n" + "\n".join(wrong)


def test_no_cycles():
    """Within a floor, too: no two modules need each other at import time."""
    names = {dotted(path) for path in modules()}
    needs = {}
    for path in modules():
        edges = {name if name in names else name.rpartition(".")[0] for _, name in imports(path, lazy=False)}
        needs[dotted(path)] = (edges & names) - {dotted(path)}
    while free := {name for name, edges in needs.items() if not edges & set(needs)}:
        needs = {name: edges for name, edges in needs.items() if name not in free}
    # a package's __init__ that re-exports its own submodules is no cycle unless they import it back
    assert not needs, f"cycle among {sorted(needs)}"


def test_heavy_imports_are_lazy():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in modules()
        for line, name in imports(path, lazy=False)
        if name.split(".")[0] in HEAVY
    ]
    assert not wrong, "import these inside the function that needs them:\n" + "\n".join(wrong)


@pytest.mark.parametrize("module", ["mlfs_jax", "mlfs_jax.cli", "spa_jax", "spa_jax.cli"])
def test_import_is_light(module, tmp_path):
    """No heavy package is even touched, also through another package that would take it if it were there.

    Stand-ins that report their own import come first on the path, so the answer does not depend on what
    is installed here.
    """
    if not (ROOT / package(module) / (module.partition(".")[2] or "__init__")).with_suffix(".py").exists():
        pytest.skip(f"{module} is not written yet")
    for name in HEAVY:
        (tmp_path / f"{name}.py").write_text("print('touched ' + __name__)\nraise ImportError(__name__)\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    done = subprocess.run(
        [sys.executable, "-c", f"import {module}"],
        env={**os.environ, "PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "touched" not in done.stdout, done.stdout


def test_front_door_gives_functions_not_modules_of_the_same_name():
    import mlfs_jax
    import mlfs_jax.evaluate
    import mlfs_jax.generate

    assert callable(mlfs_jax.generate) and callable(mlfs_jax.evaluate)
    assert not {name for name in mlfs_jax.__all__ if not hasattr(mlfs_jax, name)}


def test_experiments_ask_the_packages_for_what_they_have():
    """``mlfs.name`` and ``spa.name``: imported as they are used, an absent one would be met hours into a run."""
    import mlfs_jax
    import spa_jax

    asked = {
        (node.value.id, node.attr)
        for file in (ROOT / "experiments").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("mlfs", "spa")
    }
    packages = {"mlfs": mlfs_jax, "spa": spa_jax}
    assert len(asked) > 30
    assert not {f"{package}.{name}" for package, name in asked if not hasattr(packages[package], name)}
