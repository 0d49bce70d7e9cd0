"""What the tools' own console scripts share: the way to the verb, `serve` as `mist up`, and the documents' exit codes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from mist.cli import main as mist
from mist.errors import MistError

_SAME = frozenset({0, 1, 2, 130, 143})


def begin(
    argv: Sequence[str] | None, noun: str, help: str, code: Callable[[int], int]
) -> tuple[list[str], str, list[str]] | int:
    """(global options, verb, what follows it); or the exit code, where it is done: help, the version, options that cannot be
    right. `noun` is the tool's in `mist`, whose help follows `help`."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        _, rest = mist.split_globals(args)
    except MistError:
        return code(mist.main(args))  # it says what is wrong
    given = args[: len(args) - len(rest)]
    if not rest or rest[0] in ("-h", "--help", "help"):
        sys.stdout.write(help)
        sys.stdout.flush()
        return code(mist.main([noun, "--help"]))
    if rest[0] in ("version", "--version"):
        return code(mist.main([*given, "version", *rest[1:]]))
    return given, rest[0], rest[1:]


def served(words: Sequence[str], tools: str, listen: str) -> list[str]:
    """The arguments of `mist up` for those of `serve`, the seeds' `--addr` among them. `listen` is where it listens when nobody
    says."""
    out = []
    for word in words:
        name, equals, value = word.partition("=")
        out.append(f"--listen{equals}{value}" if name == "--addr" else word)
    if not any(word.partition("=")[0] == "--tools" for word in out):
        out += ["--tools", tools]
    return [*out, "--usual-listen", listen]


def code(found: int) -> int:
    """0 done, 1 failed (or a condition does not hold), 2 configuration or usage, 3 runtime, 130/143 interrupted."""
    if found in _SAME:
        return found
    return 1 if found == 10 else 3
