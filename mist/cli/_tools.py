"""What the tools' commands share: where a store lies, ages as times. Nothing here prints."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Annotated

import typer

from mist.errors import InvalidArgument
from mist.protocol.url import Url, redact

StoreOption = Annotated[
    str,
    typer.Option(
        "--store", metavar="FILE", help="The store: a file, or postgresql://…; default DIR/tools/TOOL.db for log:DIR."
    ),
]
SinceOption = Annotated[
    str, typer.Option("--since", metavar="AGE", help="Started in the last 1h, 30m, 2d, or since a time.")
]
UntilOption = Annotated[str, typer.Option("--until", metavar="AGE", help="Started before this long ago, or this time.")]
LimitOption = Annotated[int, typer.Option("-n", "--count", min=1, metavar="N", help="At most N.")]


def store_path(url: Url, tool: str, given: str = "") -> Path | str:
    """`--store` (a file, or a postgresql:// URL), or DIR/tools/<tool>.db for log:DIR, or a file in the user's state
    directory for a server."""
    if given:
        return given if "://" in given else Path(given)
    if url.scheme == "log":
        return Path(url.target or ".") / "tools" / f"{tool}.db"
    if url.scheme == "memory":
        raise InvalidArgument("memory: is gone when this command ends", hint="use log:DIR, a server, or name a --store")
    server = redact(url.without_query())
    return state_home() / hashlib.sha256(server.encode()).hexdigest()[:16] / f"{tool}.db"


def state_home() -> Path:
    """Where this user's programs keep what is to survive them: XDG_STATE_HOME/mist."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "mist"


def time_option(text: str) -> int | None:
    """Unix nanoseconds of `--since` and `--until`: an age or a time; None for the empty text."""
    if not text:
        return None
    from mist.cli.position import since_position

    return since_position(text, now_ns=time.time_ns()).number
