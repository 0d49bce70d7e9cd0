"""Suites' files for `mist eval`: finding and loading them, `validate`, `init`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mist.cli.session import Session, current
from mist.errors import NotFound

if TYPE_CHECKING:
    from mist.config import Layer
    from mist.tools.matchspec.settings import MatchSpecSettings
    from mist.tools.matchspec.suite import Suite

INVALID = 10
PathsArg = Annotated[
    list[str] | None,
    typer.Argument(metavar="[PATH]...", help="Suites (.toml, .yml, .py, a folder), or recorded solutions (.jsonl)."),
]
ConfigOption = Annotated[
    str, typer.Option("--config", metavar="FILE", help="The configuration, where no PATH is given; else matchspec.yml.")
]


def paths_of(session: Session, paths: Sequence[str] | None, config: str) -> list[Path]:
    """Those named, or the configuration. Raises NotFound."""
    from mist.tools.matchspec.settings import find_config

    if paths:
        return [Path(path) for path in paths]
    found = find_config(config or session.config.matchspec.config)
    if found is None:
        raise NotFound(
            "no suite is named, and there is no matchspec.yml", hint="name one, or begin with `mist eval init`"
        )
    return [found]


def load(session: Session, paths: Sequence[str] | None, config: str = "") -> tuple[list[Suite], MatchSpecSettings]:
    """The suites of these files, or of the configuration, and the settings in force (those of the first file)."""
    from mist.tools.matchspec.load import load as read

    loaded = [read(path, layers=_layers(session)) for path in paths_of(session, paths, config)]
    return [suite for one in loaded for suite in one.suites], loaded[0].settings


def load_one(session: Session, path: str) -> Suite:
    """The one suite of a file."""
    from mist.errors import InvalidArgument

    suites, _ = load(session, [path])
    if len(suites) != 1:
        raise InvalidArgument(
            f"{path} holds {len(suites)} suites: {', '.join(s.name for s in suites)}", hint="name one"
        )
    return suites[0]


def _layers(session: Session) -> list[Layer]:
    from mist.tools.matchspec.settings import layers_of

    return layers_of(session.config.matchspec, session.config.eval)


async def validate(paths: PathsArg = None, config: ConfigOption = "") -> None:
    """Check suites, harnesses and data: everything that is wrong, with file, line and column. Runs nothing.

    Exit code 10 when something is wrong.

    Examples:
      mist eval validate
      mist eval validate evals/basics.yml -o json
    """
    from mist.tools.matchspec.load import validate as check

    session = current()
    named = paths_of(session, paths, config)
    found = check(named, layers=_layers(session))
    rows: list[dict[str, Any]] = [
        {"file": p.file, "line": p.line, "column": p.column, "message": p.message, "hint": p.hint} for p in found
    ]
    out = session.out
    if out.format == "table":
        for r in rows:
            hint = f" ({r['hint']})" if r["hint"] else ""
            out.text(f"{r['file']}:{r['line']}:{r['column']}: {r['message']}{hint}\n")
        out.note(f"{len(rows)} problems" if rows else f"{', '.join(map(str, named))}: nothing is wrong")
    else:
        out.rows(rows, ["file", "line", "column", "message", "hint"])
    if rows:
        session.fail_with(INVALID)


async def init(
    folder: Annotated[str, typer.Argument(metavar="[FOLDER]", help="Where; default here.")] = ".",
    with_examples: Annotated[
        bool, typer.Option("--with-examples", help="More harnesses, on recorded answers.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that are there.")] = False,
) -> None:
    """Write a matchspec.yml and a first harness that run without a model. Never overwrites without --force.

    Example:
      mist eval init --with-examples
    """
    from mist.tools.matchspec.starter import init as write

    written = write(Path(folder), with_examples=with_examples, force=force)
    current().out.rows([{"file": str(path)} for path in written], ["file"])
