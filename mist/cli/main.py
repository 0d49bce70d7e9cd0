"""The entry point: one table of commands, the global options, and the one place where errors become exit codes.

Promises: `mist --help` and `mist --version` answer from this module alone; only the chosen command's module is
imported. A MistError is one line on stderr (one JSON object with a JSON format) and its exit code; a broken pipe is
success; SIGINT and SIGTERM end with 130 and 143 after the command has flushed. Anything else is a bug: one line, the
traceback with `--verbose`, exit code 1.

Adding a command: write `mist/cli/NAME.py` with `app` (a typer.Typer, for a noun) or `command` (a plain or async function,
for a verb) and add one line to COMMANDS. Its functions get the session from `mist.cli.session.current()`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mist.errors import CODES, InvalidArgument, MistError

if TYPE_CHECKING:
    from mist.cli.render import Output

COMMANDS: dict[str, tuple[str, str]] = {
    "version": ("mist.cli.version:command", "Print the version, and those of what it stands on"),
    "completion": ("mist.cli.completion:command", "Print the completion script of a shell"),
    "doctor": ("mist.cli.doctor:command", "Check reachability, round trip, durability in force, disk and locks"),
    "demo": ("mist.cli.demo:command", "Run the guided main job: ingest, kill, resume, eval, replay"),
    "up": ("mist.cli.up:command", "Run the platform in one process: tools, HTTP door, health"),
    "dev": ("mist.cli.dev:app", "Local NATS and Redis servers: nats, redis, ls, stop"),
    "context": ("mist.cli.context:app", "Named broker URLs: ls, save, select, show, rm"),
    "config": ("mist.cli.config:app", "Settings and where each came from: show, validate, init"),
    "stream": ("mist.cli.stream:app", "Streams: ls, info, create, rm, purge, subjects, gaps, verify, compact"),
    "tail": ("mist.cli.tail:command", "Show the last records of a stream, or follow it"),
    "get": ("mist.cli.get:command", "Show one record, decoded"),
    "count": ("mist.cli.count:command", "Count records, by type, source, subject or hour"),
    "pub": ("mist.cli.pub:command", "Publish to a stream"),
    "sub": ("mist.cli.sub:command", "Follow a stream as a worker"),
    "ping": ("mist.cli.ping:command", "Reach a URL and time it"),
    "validate": ("mist.cli.validate:command", "Check envelopes in a file or on standard input"),
    "relay": ("mist.cli.relay:command", "Copy envelopes from one transport to another"),
    "consumer": ("mist.cli.consumer:app", "Consumers: ls, info, create, rm, lag, next, pending, seek, reset"),
    "cursor": ("mist.cli.cursor:app", "Named replay positions: ls, show, set, rm, export, import"),
    "checkpoint": ("mist.cli.checkpoint:app", "Stored positions: ls, show, rm"),
    "dlq": ("mist.cli.dlq:app", "Dead letters: ls, show, retry, drop, export"),
    "copy": ("mist.cli.copy:command", "Copy a stream's records to another stream, resumable and verified"),
    "mirror": ("mist.cli.mirror:command", "Copy a stream continuously"),
    "spool": ("mist.cli.spool:app", "A log in front of a broker: what waits in it, and forwarding it"),
    "export": ("mist.cli.export:command", "Write a stream to a file with a manifest"),
    "import": ("mist.cli.import_:command", "Read a file into a stream, ids kept"),
    "replay": ("mist.cli.replay:command", "Send a stream's records again, at their pace or faster"),
    "bench": ("mist.cli.bench:app", "Measure rates and latencies"),
    "trace": ("mist.cli.trace:app", "Traces: ls, show, tail, stats, errors, ingest, export"),
    "eval": ("mist.cli.eval:app", "Evals: run, report, gate, diff, replay, rescore, fork, history"),
    "infer": ("mist.cli.infer:app", "Ask models through the router: chat, route, providers, status"),
}
ALIASES = {"s": "stream", "c": "consumer"}

EXIT_CODES: dict[int, str] = {
    0: "done; also when the reader of a pipe has had enough",
    1: "failure, or a bug of ours",
    2: "usage: the command, a name, a position or a setting cannot be right",
    3: "not found: stream, record, consumer, cursor, file",
    4: "not authorised",
    5: "conflict: it exists, is locked, or is of another incarnation",
    6: "timeout",
    7: "the broker cannot be reached",
    8: "an integrity problem was found",
    9: "partial success: something was damaged, refused or left out, and told on stderr",
    10: "a condition does not hold: a gate, a dry run with something to do, invalid input",
    11: "refused by policy: read-only, size, quota, not confirmed",
    130: "interrupted (SIGINT), after flushing",
    143: "terminated (SIGTERM), after flushing",
}
"""What `mist` ends with. The four tools' own console scripts keep the codes of their documents."""

# option -> (field of session.Globals, takes a value); the same list as options.GlobalOptions, which a test compares
GLOBALS: dict[str, tuple[str, bool]] = {
    "-u": ("url", True),
    "--url": ("url", True),
    "-o": ("format", True),
    "--format": ("format", True),
    "-j": ("json", False),
    "--json": ("json", False),
    "-y": ("yes", False),
    "--yes": ("yes", False),
    "--no-input": ("no_input", False),
    "-q": ("quiet", False),
    "--quiet": ("quiet", False),
    "-v": ("verbose", False),
    "--verbose": ("verbose", False),
    "--timeout": ("timeout", True),
}

GLOBAL_HELP = """\
Global options, before or after the command:
  -u, --url URL        the broker; else MIST_URL, the selected context, log:.mist
  -o, --format FORMAT  table, json, jsonl, csv or raw (-j, --json = json)
  -y, --yes            do not ask
  --no-input           never ask: refuse what would need an answer
  -q, --quiet          values and errors only
  -v, --verbose        more on stderr, tracebacks of bugs
  --timeout S          give up after S seconds (exit code 6)
  --version, --help"""


def help_text() -> str:
    """What `mist --help` prints, from the table alone."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{text}" for name, (_, text) in COMMANDS.items()]
    return (
        "Usage: mist [OPTIONS] COMMAND [ARGS]...\n\n"
        "  Event streams for LLM tool stacks: publish, replay, inspect.\n\n"
        "Examples:\n"
        "  mist pub notes 'hello'\n"
        "  mist tail notes -f\n"
        "  mist -u log:./data stream ls\n\n"
        "Commands (s = stream, c = consumer):\n" + "\n".join(lines) + "\n\n" + GLOBAL_HELP + "\n"
    )


def split_globals(args: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The global options at the head of `args`, and the rest. Raises InvalidArgument when a value is missing."""
    found: dict[str, Any] = {}
    rest = list(args)
    while rest and rest[0].startswith("-"):
        word, equals, value = rest[0].partition("=")
        short = word[:2]
        if word in GLOBALS and GLOBALS[word][1]:
            if not equals:
                if len(rest) < 2:
                    raise InvalidArgument(f"{word} needs a value", hint="see `mist --help`")
                value = rest.pop(1)
            found[GLOBALS[word][0]] = value
        elif word in GLOBALS and not equals:
            found[GLOBALS[word][0]] = True
        elif not word.startswith("--") and len(word) > 2 and short in GLOBALS:
            if GLOBALS[short][1]:
                found[GLOBALS[short][0]] = rest[0][2:]
            else:  # -qy
                found[GLOBALS[short][0]] = True
                rest[0] = "-" + rest[0][2:]
                continue
        else:
            break
        del rest[0]
    return found, rest


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. The console script's entry point."""
    from mist.cli import render

    _fill_standard_streams()
    args = list(sys.argv[1:] if argv is None else argv)
    render.active = None
    out = render.Output(format=_wanted_format(args), verbose="-v" in args or "--verbose" in args)
    try:
        try:
            return _main(args, out)
        finally:
            out.flush()
    except BrokenPipeError:
        (render.active or out).abandon()
        return 0
    except MistError as exc:
        (render.active or out).error(exc)
        return exc.exit_code
    except KeyboardInterrupt:
        return 130
    except Exception as exc:  # the boundary: whatever gets here is our bug, and is printed
        (render.active or out).bug(exc)
        return CODES["internal"].exit


def _fill_standard_streams() -> None:
    """Give standard streams that were closed the null device: a file opened later must not become one of them."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115


def _wanted_format(args: Sequence[str]) -> str | None:
    """The format for errors that come before the options are parsed."""
    for i, word in enumerate(args):
        if word in ("-j", "--json"):
            return "json"
        if word in ("-o", "--format") and i + 1 < len(args):
            return args[i + 1]
        if word.startswith("--format="):
            return word.partition("=")[2]
    return None


def _main(args: list[str], out: Output) -> int:
    found, rest = split_globals(args)
    if not rest or rest[0] in ("-h", "--help", "help"):
        if len(rest) > 1 and rest[0] == "help":
            return _main([*rest[1:], "--help"], out)
        out.text(help_text())
        return 0
    if rest[0] == "--version":
        from mist import __version__

        out.text(f"mist {__version__}\n")
        return 0
    if rest[0] == "__complete":
        from mist.cli.completion import complete

        return complete(rest[1:], out)
    name = ALIASES.get(rest[0], rest[0])
    if name not in COMMANDS:
        from difflib import get_close_matches

        near = get_close_matches(name, COMMANDS, n=1)
        what = "option" if name.startswith("-") else "command"
        raise InvalidArgument(
            f"no such {what}: {rest[0]}", hint=f"did you mean `mist {near[0]}`?" if near else "see `mist --help`"
        )
    inner, rest = split_globals(rest[1:])
    return invoke(name, rest, {**found, **inner})


def invoke(name: str, args: list[str], found: dict[str, Any]) -> int:
    """Run one command of the table with its arguments; `found` are global options given before it."""
    from mist.cli.wrap import UsageFault, load, parse_and_run

    try:
        return parse_and_run(load(name, args[0] if args else ""), args, f"mist {name}", found)
    except UsageFault as exc:
        raise InvalidArgument(exc.message, hint=exc.hint) from exc
