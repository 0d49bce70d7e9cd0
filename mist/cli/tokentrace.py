"""The console script `tokentrace`: the verbs of `mist trace` under the tool's own name, `serve`, and the exit codes of its
documents: 0 done, 1 failed (or a condition does not hold), 2 configuration or usage, 3 runtime, 130/143 interrupted."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mist.cli import main as mist
from mist.errors import MistError

LISTEN = "127.0.0.1:8700"
TOOLS = "door,otlp,tokentrace,alerts"
_SAME = frozenset({0, 1, 2, 130, 143})
HELP = """\
Usage: tokentrace COMMAND [ARGS]...

  The durable trace store: spans in by HTTP, OTLP or the stream, answers and alerts out.

  serve      take spans at /mist and /v1/traces, keep them, answer questions (mist up; --listen or --addr, default
             127.0.0.1:8700)
  version    print the version

  and the verbs of `mist trace`:

"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. The console script's entry point."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        _, rest = mist.split_globals(args)
    except MistError:
        return _code(mist.main(args))  # it says what is wrong
    given = args[: len(args) - len(rest)]
    if not rest or rest[0] in ("-h", "--help", "help"):
        sys.stdout.write(HELP)
        sys.stdout.flush()
        return _code(mist.main(["trace", "--help"]))
    if rest[0] in ("version", "--version"):
        return _code(mist.main([*given, "version", *rest[1:]]))
    if rest[0] == "serve":
        return _code(mist.main([*given, "up", *_serve(rest[1:])]))
    return _code(mist.main([*given, "trace", *rest]))


def _serve(args: list[str]) -> list[str]:
    """The arguments of `mist up` for those of `serve`, the seed's `--addr` among them."""
    out = []
    for word in args:
        name, equals, value = word.partition("=")
        if name == "--addr":
            word = f"--listen{equals}{value}"
        out.append(word)
    if not any(word.partition("=")[0] == "--tools" for word in out):
        out += ["--tools", TOOLS]
    return [*out, "--usual-listen", LISTEN]


def _code(code: int) -> int:
    if code in _SAME:
        return code
    return 1 if code == 10 else 3
