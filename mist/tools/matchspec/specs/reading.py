"""The state of one reading of a suite's files, and which files it may touch."""

from __future__ import annotations

import os
from pathlib import Path

from mist.errors import InvalidArgument
from mist.tools.matchspec.positions import Document, Problems, Table, nearest
from mist.tools.matchspec.settings import MatchSpecSettings


class Reading:
    """What is being read: `root` is the folder that no path in the files may leave."""

    def __init__(self, root: Path, problems: Problems, settings: MatchSpecSettings) -> None:
        self.root = root.resolve()
        self.problems = problems
        self.settings = settings

    def path(self, table: Table, key: str | int, text: str, folder: Path) -> Path | None:
        """The file that a text names, relative to the folder of the file it stands in."""
        found = folder / text
        resolved = found.resolve()
        short = Path(os.path.normpath(found))
        label = "" if isinstance(key, int) else f"{key}: "
        if not resolved.is_relative_to(self.root):
            table.wrong(
                f"{label}{text} lies outside of {self.root}",
                "files of a suite lie in the folder of the file that is run, or below",
                key=key,
            )
        elif not resolved.is_file():
            table.wrong(f"{label}no file {text}", _nearest_file(resolved), key=key, missing=True)
        else:
            return short if short.resolve() == resolved else found
        return None


def _nearest_file(path: Path) -> str:
    try:
        names = sorted(p.name for p in path.parent.iterdir() if p.is_file())
    except OSError:
        return f"there is no folder {path.parent.name}"
    return nearest(path.name, names) if names else ""


def yaml_document(path: Path, problems: Problems) -> Document | None:
    from mist.tools.matchspec import yaml
    from mist.tools.matchspec.suite import read_text

    if path.stat().st_size > yaml.FILE_BYTES_MAX:
        raise InvalidArgument(
            f"{path}: larger than {yaml.FILE_BYTES_MAX} bytes",
            hint="put large data into JSON lines: they are read line by line",
        )
    return yaml.read(read_text(path), str(path), problems)
