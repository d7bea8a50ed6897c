"""Settings that every test shares. They must be in the environment before jax is first imported."""

import hashlib
import importlib
import os
import platform
import signal
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# On the CPU, where float32 is float32, unless the caller says otherwise: JAX_PLATFORMS=cuda pytest -m gpu
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# No test may reach a hub by accident; one that means to talk to it sets this itself.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

# Most programs of the tests are small and run once: compile them quickly rather than well (three times as fast). XLA
# ends the process at a flag that it does not know, so the last one only where it was tried.
if "XLA_FLAGS" not in os.environ and os.environ["JAX_PLATFORMS"] == "cpu":
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    if version("jaxlib").startswith("0.10."):
        quick += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = quick


def _cpu() -> str:
    """A short name for this kind of CPU: code compiled for one may not run on another."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        info = ""
    facts = {line for line in info.splitlines() if line.startswith(("model name", "flags", "Features"))}
    return hashlib.sha256("\n".join([platform.machine(), *sorted(facts)]).encode()).hexdigest()[:12]


# Compilation is most of the tests' time, so programs are kept between runs, apart for each kind of CPU.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    root = os.environ.get("XDG_CACHE_HOME")
    caches = Path(root) if root else Path.home() / ".cache"
    folder = caches / "mlfs-jax" / "test-xla" / _cpu()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a read-only home
        folder = Path(tempfile.mkdtemp(prefix="mlfs-jax-xla-"))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(512 * 2**20))

# A shell starts its background jobs deaf to Ctrl-C, and some tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# An example's time is mostly compilation: a deadline says nothing. CI draws the same examples every time.
settings.register_profile(
    "dev", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.register_profile("ci", settings.get_profile("dev"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture(scope="module", autouse=True)
def free_programs():
    """Let go of a file's compiled programs after it.

    A program takes several memory maps, and Linux gives a process 65,530 (vm.max_map_count): kept for the whole run,
    they use them up, and XLA's next compilation ends the process with a segmentation fault.
    """
    yield
    import jax  # only now: the environment above must be set before

    jax.clear_caches()


@pytest.fixture(scope="session")
def glue_dir(tmp_path_factory):
    """A folder of tensorflow-datasets with three small tasks of GLUE."""
    from tests.prepared import prepare_glue

    folder = tmp_path_factory.mktemp("glue")
    prepare_glue(folder)
    return folder


@pytest.fixture(scope="session")
def prompted_dir(tmp_path_factory):
    """A folder of tensorflow-datasets with small sets of the names and fields of SPA's."""
    from tests.prepared import prepare_prompted

    folder = tmp_path_factory.mktemp("prompted")
    prepare_prompted(folder)
    return folder


@pytest.fixture
def experiment(monkeypatch, tmp_path):
    """Import an experiment as its command does, with its results in a temporary folder."""
    folder = Path(__file__).resolve().parents[1] / "experiments"
    monkeypatch.syspath_prepend(str(folder))

    def load(name: str):
        module = importlib.import_module(name)
        monkeypatch.setattr(module, "RESULTS", tmp_path / f"{name}.json")
        return module

    yield load
    for name in [n for n, m in sys.modules.items() if str(getattr(m, "__file__", "")).startswith(str(folder))]:
        del sys.modules[name]
