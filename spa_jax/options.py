"""What the commands of the split runtime have in common: kinds of flags, and how they are read."""

import os
import re
import secrets
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mlfs_jax.errors import ConfigError

RunFolder = Annotated[Path, tyro.conf.arg(metavar="RUN")]
Flag = Annotated[bool, tyro.conf.arg(help_behavior_hint="")]
Coding = Literal["fp32", "fp16", "int8"]
Place = Literal["cloud", "device"]


def read_token(file: Path | None) -> str | None:
    """The secret in a file, without the white space around it; raises ConfigError."""
    if file is None:
        return None
    try:
        token = file.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        raise ConfigError(f"token-file {file} is not there: copy the one that `spa serve` has made.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"token-file {file} cannot be read: {error}.") from None
    if not token or any(c.isspace() for c in token) or not token.isascii():
        raise ConfigError(f"token-file {file}: expected one word of ASCII, e.g. of `openssl rand -hex 32 > {file}`.")
    return token


def make_token(file: Path) -> bool:
    """Put a new secret into a file that only its owner can read, unless there is one; says whether; or ConfigError."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as opened:
            opened.write(secrets.token_hex(32) + "\n")
    except OSError as error:
        if file.exists():
            return False
        raise ConfigError(f"token-file {file} cannot be made: {error}.") from None
    return True


PICTURES = (".png", ".pdf", ".svg")


def check_picture(file: Path | None) -> None:
    """Before anything is measured; raises ConfigError for a file of another kind than pictures are written in."""
    if file is not None and file.suffix.lower() not in PICTURES:
        raise ConfigError(f"picture {file}: expected a file that ends in {', '.join(PICTURES)}.")


def numbers(text: str, name: str) -> list[float]:
    """ "5,20,80" -> [5.0, 20.0, 80.0]; raises ConfigError."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{name} = {text!r}: expected numbers with commas between them, like 5,20,80.") from None
    return found


def budget_ms(text: str) -> float:
    """ "40 ms/token", "40ms" or "40" -> 40.0; raises ConfigError."""
    found = re.fullmatch(r"\s*([\d.]+)\s*(ms)?\s*(/\s*token)?\s*", text)
    try:
        value = float(found[1])
    except (TypeError, ValueError):
        value = 0.0
    if value <= 0:
        raise ConfigError(f'budget = {text!r}: expected ms per token, like "40 ms/token".')
    return value
