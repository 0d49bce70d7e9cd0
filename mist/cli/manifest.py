"""The manifest beside an exported file: what the file holds, and checksums that prove it.

`FILE.manifest.json` is written when the export is complete; until then `FILE.part` and `FILE.part.json` hold what there
is and where it stands.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from mist.errors import Malformed

FORMAT = "mist-export/1"


class Gap(Struct, frozen=True):
    """Sequences first..last that the stream could not give, and why."""

    first: int
    last: int
    why: str


class Manifest(Struct, frozen=True, kw_only=True):
    """`bytes` and `sha256` are of the lines before compression, `file_bytes` and `file_sha256` of the file."""

    format: str = FORMAT
    file: str
    source: str
    stream: str
    incarnation: str
    lines: str
    compression: str
    records: int
    first: int
    last: int
    bytes: int
    sha256: str
    file_bytes: int
    file_sha256: str
    gaps: list[Gap] = []
    created_ns: int = 0


class Partial(Struct, frozen=True, kw_only=True):
    """An export that is under way: the next run cuts FILE.part to `file_bytes` and goes on after `position`."""

    source: str
    incarnation: str
    lines: str
    filters: str
    position: int
    records: int
    first: int
    last: int
    file_bytes: int
    gaps: list[Gap] = []


def manifest_path(file: Path) -> Path:
    return file.with_name(file.name + ".manifest.json")


def write_durably(path: Path, value: Any) -> None:
    """JSON into a file, atomically and durably."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as out:
        out.write(msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")
        out.flush()
        os.fsync(out.fileno())
    temporary.replace(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load(path: Path, kind: type[Any]) -> Any:
    """The decoded file, or None when there is none. Raises Malformed."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as exc:
        raise Malformed(f"{path}: cannot be read: {exc}") from exc


def digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
