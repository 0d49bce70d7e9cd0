"""The console script `tokentrace`: the verbs of `mist trace` under the tool's own name, `serve`, and the exit codes of its
documents: 0 done, 1 failed (or a condition does not hold), 2 configuration or usage, 3 runtime, 130/143 interrupted."""

from __future__ import annotations

from collections.abc import Sequence

from mist.cli import main as mist
from mist.cli._script import begin, code, served

LISTEN = "127.0.0.1:8700"
TOOLS = "door,otlp,tokentrace,alerts"
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
    found = begin(argv, "trace", HELP, code)
    if isinstance(found, int):
        return found
    given, verb, words = found
    if verb == "serve":
        return code(mist.main([*given, "up", *served(words, TOOLS, LISTEN)]))
    return code(mist.main([*given, "trace", verb, *words]))
