"""The console script `infermux`: the verbs of `mist infer` under the tool's own name, `serve`, `validate`, and the exit codes of its
documents: 0 done, 1 failed (or a condition does not hold), 2 configuration or usage, 3 runtime, 130/143 interrupted. Two verbs
have codes of their own: `validate` 1 no such file, 2 no TOML, 3 a setting that cannot be right; `status` 1 a circuit is open, 2 no
router there."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mist.cli import main as mist
from mist.cli._script import begin, code, served
from mist.errors import InvalidArgument, NotFound

LISTEN = "127.0.0.1:8600"
TOOLS = "infermux"
HELP = """\
Usage: infermux COMMAND [ARGS]...

  The inference router: one address for many model providers.

  serve      answer /v1/chat/completions, /infer, /mist and the requests of a stream (mist up --tools infermux;
             --listen or --addr, default 127.0.0.1:8600; --tokentrace URL; --config FILE)
  infer      ask a question (mist infer chat; --prompt TEXT)
  validate   check the settings (--config FILE)
  version    print the version

  and the verbs of `mist infer`:

"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. The console script's entry point."""
    found = begin(argv, "infer", HELP, code)
    if isinstance(found, int):
        return found
    given, verb, words = found
    words = _config(words)
    if verb == "validate":
        return _validate(words)
    if verb == "serve":
        return code(mist.main([*given, "up", *_serve(words)]))
    if verb == "infer":
        return code(mist.main([*given, "infer", "chat", *_infer(words)]))
    ended = mist.main([*given, "infer", verb, *words])
    return 2 if verb == "status" and ended in (6, 7) else code(ended)


def _config(words: list[str]) -> list[str]:
    """`--config FILE` (or `INFERMUX_CONFIG`) is the file of MIST_CONFIG."""
    out: list[str] = []
    file = os.environ.get("INFERMUX_CONFIG", "")
    left = iter(words)
    for word in left:
        name, equals, value = word.partition("=")
        if name == "--config":
            file = value if equals else next(left, "")
        else:
            out.append(word)
    if file:
        os.environ["MIST_CONFIG"] = file
    return out


def _serve(words: list[str]) -> list[str]:
    """The arguments of `mist up` for those of `serve`."""
    if listen := os.environ.get("INFERMUX_LISTEN", ""):
        words = ["--listen", listen, *words]  # a flag comes later and wins
    return served(words, TOOLS, LISTEN)


def _infer(words: list[str]) -> list[str]:
    """The prompt may come by `--prompt`, as in the seed."""
    out: list[str] = []
    prompt: list[str] = []
    left = iter(words)
    for word in left:
        name, equals, value = word.partition("=")
        if name == "--prompt":
            prompt = [value if equals else next(left, "")]
        else:
            out.append(word)
    return [*out, "--", *prompt] if prompt else out


def _validate(words: list[str]) -> int:
    """0 the settings are right, 1 there is no such file, 2 it is no TOML, 3 a setting cannot be right."""
    import tomllib

    from mist.cli.settings import Settings
    from mist.config import config_file, load_config

    if words:
        sys.stderr.write(f"error: validate takes no {words[0]!r}. use --config FILE\n")
        return 2
    file = config_file()
    try:
        config = load_config(schema=Settings).value
        _usable(config)
    except NotFound as exc:
        sys.stderr.write(f"error: {exc}\n")
        return 1
    except InvalidArgument as exc:
        sys.stderr.write(f"error: {exc}\n")
        return 2 if isinstance(exc.__cause__, tomllib.TOMLDecodeError | UnicodeDecodeError) else 3
    names = ", ".join(p.name for p in config.infermux.asked)
    sys.stdout.write(f"{file or 'no file, the defaults'}: in order; providers: {names}\n")
    return 0


def _usable(config: object) -> None:
    """What a router would find wrong as it begins: variables that are not set, a price table that cannot be read."""
    from msgspec.structs import replace

    from mist.cli.settings import Settings
    from mist.kit.prices import load_prices
    from mist.tools.infermux.keys import Keys
    from mist.tools.infermux.router import Router

    assert isinstance(config, Settings)  # noqa: S101
    settings = config.infermux
    if settings.prices:
        try:
            load_prices(Path(settings.prices))
        except NotFound as exc:
            raise InvalidArgument(f"infermux.prices: {exc.message}") from exc
    Router.from_settings(replace(settings, budgets=()))
    Keys(settings)
