"""The notebook runs from top to bottom, as small as it gets."""

import re
from pathlib import Path

import pytest

from mlfs_jax.registry import get_entry, is_whole

NOTEBOOK = Path(__file__).resolve().parents[1] / "experiments" / "colab_tpu.ipynb"


@pytest.mark.timeout(900)  # a kernel of its own: compiles what the other tests keep
def test_colab(tmp_path, monkeypatch):
    for name in ("bert-tiny", "smollm2-135m", "wiki"):
        if not is_whole(get_entry(name).cached, get_entry(name)):
            pytest.skip(f"{name} is not in the cache: mlfs fetch {name}")
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "committed without what it printed"
    monkeypatch.setenv("COLAB_PRESET", "small")
    monkeypatch.setenv("COLAB_FOLDER", str(tmp_path))
    nbclient.NotebookClient(notebook, timeout=800, kernel_name="python3").execute(cwd=str(tmp_path))
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    printed = "".join(output.get("text", "") for output in outputs)
    assert len(pictures) == 2
    assert float(re.search(r"largest difference from ours: (\S+)", printed)[1]) < 1e-3
    assert (tmp_path / "exported/model.safetensors").exists() and (tmp_path / "plugin/plugin.safetensors").exists()
