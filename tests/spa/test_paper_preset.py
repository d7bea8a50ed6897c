"""``--preset paper`` of the tables: data and a model of the formats of the paper's, of next to no size."""

import dataclasses
import json
import math

import pytest


@pytest.mark.parametrize("task", ["xsum", "coqa"])
def test_tables(experiment, monkeypatch, tmp_path, tiny_lm, prompted_dir, task):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prompted_dir))
    script = experiment("spa_tables")
    preset = script.PRESETS["paper"]
    assert preset.tasks == ("xsum", "cnn_dailymail", "coqa", "sciq") and "llama-7b" in preset.model
    smaller = {"train": 40, "test": 4, "calibration": 2, "epochs": 1, "batch_size": 8, "beams": 2}
    smaller |= {"max_length": 48, "buckets": (48,)}
    preset = dataclasses.replace(preset, tasks=("xsum", "coqa"))
    monkeypatch.setitem(script.PRESETS, "paper", dataclasses.replace(preset, **smaller))
    jobs = ("one-shot", "lora", "spa", "s3", "gates", "spa, small, started", "s1, all")
    script.main(script.Options("paper", (task,), (0,), jobs, str(tiny_lm), tmp_path / "runs"))
    results = json.loads(script.RESULTS.read_text())
    assert {result["job"] for result in results.values()} == set(jobs)
    gates = next(result for result in results.values() if result["job"] == "gates")["gates"]
    assert all(
        key.startswith("other/") and f"/paper/{task}/" in key for key in results
    )  # the preset's model is another
    results = {key: result for key, result in results.items() if result["job"] != "gates"}
    assert {"disagreement", "marginal", "similarity"} < gates.keys()
    assert all(math.isfinite(value) for gate in gates.values() for value in gate.values())
    assert all(math.isfinite(result["rougeL"]) for result in results.values())
    assert (tmp_path / "spa_tables_paper.png").exists()
