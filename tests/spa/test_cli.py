"""The command line, as a user types it; and who chose which token."""

import json
import re

import pytest

from mlfs_jax.errors import ConfigError
from spa_jax.cli import COMMANDS, main
from spa_jax.evaluate import evaluate_run
from spa_jax.show import Shown, _words, as_html, as_rich


@pytest.fixture(scope="module")
def run(tiny_lm, echo_task, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "spa"
    flags = f"fit --model {tiny_lm} --task {echo_task} --out {out} --steps 40 --batch-size 8 --start random"
    flags += " --side.width 8 --side.every 2 --side.heads 2 --max-length 16 --buckets 16 --gate.usage 0.5"
    assert main(flags.split()) == 0
    return out


def test_fit_eval_show(run, tmp_path, capsys):
    capsys.readouterr()
    assert main(["eval", str(run), "--limit", "8", "--batch-size", "8", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {*result} == {"rouge1", "rouge2", "rougeL", "tokens", "usage", "diff", "pick"}
    assert all(0 <= value <= 1 for name, value in result.items() if name != "tokens")
    for usage in (0, 1):
        assert main(["eval", str(run), "--limit", "8", "--batch-size", "8", "--json", "--usage", str(usage)]) == 0
        assert json.loads(capsys.readouterr().out)["usage"] == usage
    assert main(["eval", str(run), "--limit", "8", "--batch-size", "8", "--beams", "2"]) == 0
    assert "rougeL" in capsys.readouterr().out

    curve = tmp_path / "curve.png"
    assert main(["eval", str(run), "--limit", "8", "--batch-size", "8", "--curve", str(curve), "--json"]) == 0
    points = json.loads(capsys.readouterr().out)
    assert [point["usage"] for point in points][::4] == [0, 1] and curve.read_bytes()[:4] == b"\x89PNG"

    page, picture = tmp_path / "a.html", tmp_path / "a.png"
    flags = ["--html", str(page), "--png", str(picture), "--max-new-tokens", "5"]
    assert main(["show", str(run), "--prompt", "w5 w9 w11", *flags]) == 0
    assert "usage" in capsys.readouterr().out
    assert "w5 w9 w11" in page.read_text() and picture.read_bytes()[:4] == b"\x89PNG"
    assert main(["show", str(run), "--prompt", "w5 w9 w11", "--json", "--max-new-tokens", "5"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert {piece["who"] for piece in shown["pieces"]} <= {"cloud", "device", "overruled"}
    assert "".join(piece["text"] for piece in shown["pieces"]) == shown["text"]
    assert shown["text"].startswith(" w")  # as it stands behind the prompt


def test_baselines_are_evaluated_by_the_same_command(tiny_lm, echo_task, tmp_path, capsys):
    flags = f"--model {tiny_lm} --task {echo_task} --max-length 16 --buckets 16"
    assert main(f"baseline --method one-shot --out {tmp_path / 'one'} {flags}".split()) == 0
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "one"), "--limit", "8", "--batch-size", "8", "--json"]) == 0
    assert {*json.loads(capsys.readouterr().out)} == {"rouge1", "rouge2", "rougeL", "tokens"}
    with pytest.raises(ConfigError, match="this run is a baseline"):
        evaluate_run(tmp_path / "one", usage=0.5)


def test_users(tiny_lm, echo_task, tmp_path, capsys):
    flags = f"fit --per-user --model {tiny_lm} --task {echo_task} --out {tmp_path / 'users'} --steps 2 --setting s1"
    flags += " --start random --side.width 8 --side.every 2 --side.heads 2 --max-length 16 --buckets 16"
    assert main(flags.split()) == 0
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "users"), "--limit", "4", "--batch-size", "4", "--json"]) == 0
    assert {*json.loads(capsys.readouterr().out)} == {"alice", "bob"}
    plugin = tmp_path / "users" / "bob" / "plugin.safetensors"
    content = plugin.read_bytes()
    plugin.write_bytes(content[:100])
    assert main(["eval", str(tmp_path / "users"), "--limit", "4", "--batch-size", "4"]) == 0
    assert re.search(r"bob is left out: .*damaged", capsys.readouterr().err)
    plugin.write_bytes(content)
    (tmp_path / "users" / "bob" / "result.json").unlink()  # as a fit that was stopped
    assert main(["eval", str(tmp_path / "users"), "--limit", "4", "--batch-size", "4", "--json"]) == 0
    out, err = capsys.readouterr()
    assert {*json.loads(out)} == {"alice"} and "bob is left out" in err and "not finished" in err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("evla runs/spa", "did you mean 'eval'"),
        ("eval {run} --usage 1.2", "usage = 1.2: expected a share of the tokens, between 0 and 1"),
        ("eval {run} --usage -0.1", "usage = -0.1"),
        ("eval {run} --split dev", "unknown split 'dev'"),
        ("eval {run} --setting s3", "was trained for another role"),
        ("eval {run} --setting s1 --usage 0.3", "usage = 0.3: setting s1 has no gate"),
        ("fit --model {run} --task wiki-description --out x --calibration-examples 0", "calibration_examples = 0"),
        ("eval nowhere", "there is no run folder"),
        ("eval {run} --curve x.png --usage 0.3", "leave --usage and --setting out"),
        ("show {run} --prompt=", "expected some text"),
        ("show {run} --prompt=w5 --png x.xyz", "picture x.xyz: expected a file that ends in .png"),
        ("eval {run} --curve x.xyz", "picture x.xyz"),
        ("fit --model {run} --task wiki-description --out x --cache-gb nan", "cache_gb = nan: expected gigabytes"),
        ("fit --model {run} --task wiki-description --out x --learning-rate nan", "^error: learning_rate = nan"),
        ("show {run} --prompt=caf\udce9", "expected text in UTF-8"),
        ("baseline --method lst --model {run} --task wiki-description --out x --base-bits 4", "leave that out"),
        ("fit --model {run} --task wiki-description --out x --setting s5", "unknown setting 's5'"),
        ("fit --model smollm2-135m --task wiki-description --out x --user=", "user is empty"),
    ],
)
def test_mistakes_are_one_line(run, line, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(line.format(run=run).split()) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and re.search(message, error)
    assert not (tmp_path / "x").exists()


def test_help(capsys):
    assert main([]) == 2
    assert capsys.readouterr().out and main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "spa eval runs/spa --usage 0.62" in shown and len(shown.splitlines()) <= 40, "one screen"
    assert main(["--print-completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert all(repr(command) in script for command in COMMANDS) and "--gate.usage" in script


def test_colours():
    shown = Shown("A <b> &", ((" x", "cloud", 0.1), ("\ny$", "overruled", 0.9)), {"usage": 0.5, "diff": 0.5, "pick": 1})
    page = as_html(shown)
    assert "A &lt;b&gt; &amp;" in page and 'class="overruled" title="gate 0.90"' in page
    assert as_rich(shown).plain.startswith("A <b> & x\ny$")
    assert as_rich(shown, marks=True).plain.startswith("A <b> & x\n*y$*\n\nword the base alone   _word_ with")
    assert _words("one two\nthree") == ["one", " two", "\n", "three"]
