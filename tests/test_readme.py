"""The Python of the README runs as it stands there."""

import os
import re
from pathlib import Path

import pytest

from mlfs_jax.registry import get_entry, is_whole

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def test_python_blocks_run(tmp_path, monkeypatch):
    entry = get_entry("minilm-l6")
    if not is_whole(entry.cached, entry):
        pytest.skip("minilm-l6 is not in the cache: mlfs fetch minilm-l6")
    assert BLOCKS
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    assert names["out"].hidden.shape == (1, 3, 384)
    assert names["told"].logits.shape == (1, 8, 99)
    assert names["small"].num_params <= names["model"].num_params
    assert os.path.exists("exported/small/model.safetensors")


def test_commands_exist():
    """The README shows every command of mlfs, and no other; of spa, none that does not exist."""
    from mlfs_jax.cli import COMMANDS
    from spa_jax.cli import COMMANDS as SPA_COMMANDS

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = {name: set(re.findall(rf"^{name} (\S+)", text, re.MULTILINE)) for name in ("mlfs", "spa")}
    assert shown["mlfs"] == set(COMMANDS) and shown["spa"] <= set(SPA_COMMANDS)
