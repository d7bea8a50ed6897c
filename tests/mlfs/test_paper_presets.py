"""``--preset paper`` of the experiments: the whole path, with data and models of the same formats and next to no size.

So that a person with the hub and a TPU only changes names, nothing here goes around the presets but their sizes.
"""

import dataclasses
import json
import math

import pytest

from mlfs_jax.hf.export import export_hf
from tests.mlfs.tiny import tiny_decoder


@pytest.mark.parametrize("task", ["glue/stsb", "glue/mnli"])
def test_an_encoder_on_glue(experiment, monkeypatch, tmp_path, tiny_hf, glue_dir, task):
    monkeypatch.setenv("TFDS_DATA_DIR", str(glue_dir))
    script = experiment("mlfs_encoder_palette")
    assert len(script.PRESETS["paper"]) == 9 and script.MODELS["paper"].startswith("google-bert/bert-base")
    smaller = {"steps": (2, 2, 2), "batch_size": 4, "importance_examples": 4, "max_length": 24}
    monkeypatch.setitem(script.PRESETS, "paper", {task: script.PRESETS["paper"][task] | smaller})
    script.main(script.Options((), (0,), "paper", str(tiny_hf), tmp_path / "runs"))
    (key, result), *_ = json.loads(script.RESULTS.read_text()).items()
    assert key.startswith("other/") and key.endswith(f"/paper/{task}/0")  # the preset's model is another
    splits = {"validation", "validation_mismatched"} if task == "glue/mnli" else {"validation"}
    assert set(result["baseline"]) == set(result["palette"]["maxnet"]) - {"subnet", "share"} == splits
    assert all(math.isfinite(row["validation"]["loss"]) for row in result["palette"].values())
    assert ("pearson" in result["baseline"]["validation"]) == (task == "glue/stsb")
    assert script.RESULTS.with_suffix(".png").exists()


def test_a_language_model_on_code(experiment, monkeypatch, tmp_path, tiny_hf):
    """A model of santacoder's family, and a person's own texts."""
    script = experiment("mlfs_decoder")
    preset = script.PRESETS["paper"]
    assert "santacoder" in preset.model
    smaller = dataclasses.replace(preset, steps=2, batch_size=2, length=16, every=1, limit=2)
    monkeypatch.setitem(script.PRESETS, "paper", smaller)
    model = tiny_decoder("mqa-learned", family="gpt_bigcode", vocab_size=24, head_bias=False, eos_token_ids=(2,))
    export_hf(model, tmp_path / "model", tokenizer_from=tiny_hf)
    code = tmp_path / "code.jsonl"
    code.write_text("".join(json.dumps({"text": f"the film {i} was good " * 12}) + "\n" for i in range(60)))
    arms = ("sliced start, all weights", "width and depth")
    script.main(script.Options((0,), "paper", str(tmp_path / "model"), str(code), arms))
    results = json.loads(script.RESULTS.read_text())
    assert {key.partition("/paper/")[2] for key in results} == {f"{arm}/0" for arm in arms}
    assert all(key.startswith("other/") for key in results)  # the preset's model is another
    for result in results.values():
        assert list(result["curve"]) == ["0", "1", "2"] and all(math.isfinite(x) for x in result["curve"].values())
        assert result["config"]["task"] == str(code)
