"""`mist config`: the settings in force, and where each came from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from mist.cli.session import current
from mist.cli.settings import TEMPLATE, Settings
from mist.cli.wrap import noun
from mist.config import FILE, Layer, config_file, file_layer, merge, setting, shown, unknown_variables
from mist.errors import AlreadyExists, InvalidArgument, NotFound
from mist.protocol.url import parse_url, redact

app = noun("Settings.")


@app.command("show")
def show(origin: Annotated[bool, typer.Option("--origin", help="Also where each value came from.")] = False) -> None:
    """Show the settings in force. Passwords are printed as ***.

    Examples:
      mist config show
      mist config show --origin
      MIST_FORMAT=json mist config show --origin
      MIST_TOKENTRACE_RETAIN=7d mist config show --origin
    """
    session = current()
    values = {key: shown(setting(session.config, key)) for key in session.origins}
    values["url"] = redact(str(values["url"]))
    if origin:
        rows = [{"key": k, "value": v, "origin": session.origins[k]} for k, v in values.items()]
        session.out.rows(rows, ["key", "value", "origin"])
    else:
        session.out.item(values)


@app.command("validate")
def validate(file: Annotated[str, typer.Argument(metavar="FILE", help="The file in force if absent.")] = "") -> None:
    """Check a configuration file; tell of MIST_* variables that are no settings.

    Examples:
      mist config validate
      mist config validate ./mist.toml
    """
    out = current().out
    path = Path(file) if file else config_file()
    if path is None:
        raise NotFound("no configuration file is in force", hint="`mist config init` writes one")
    layer = file_layer(path)
    loaded = merge(Settings, [Layer(layer.origin, layer.values)])
    parse_url(loaded.value.url)
    for name in unknown_variables(Settings, os.environ):
        out.warn(f"{name} is set and means nothing")
    out.outcome(f"{path} is fine")


@app.command("init")
def init(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Where to write it.")] = FILE,
    force: Annotated[bool, typer.Option("--force", help="Write over an existing file.")] = False,
) -> None:
    """Write a configuration file with every setting, commented out.

    Examples:
      mist config init
    """
    out = current().out
    path = Path(file)
    if path.exists() and not force:
        raise AlreadyExists(f"{path} exists", hint="--force writes over it")
    try:
        path.write_text(TEMPLATE)
    except OSError as exc:
        raise InvalidArgument(f"{path}: cannot be written: {exc.strerror}") from exc
    out.outcome(f"wrote {path}")
