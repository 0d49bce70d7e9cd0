"""The console script `matchspec`: the verbs of `mist eval` under the tool's own name, with the flags of its documents, and
`serve`. Exit codes: 0 all thresholds met, 1 a suite failed, 2 configuration or usage, 3 runtime (nothing could be judged,
a broker or file system failed), 130/143 interrupted.

`run` judges, and writes a result file to .matchspec/results (or as MATCHSPEC_OUTPUT_DIR,
matchspec.yml or --output-dir say; not with --no-write).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mist.cli import main as mist
from mist.cli._script import begin

LISTEN = "127.0.0.1:8090"
HELP = """\
Usage: matchspec COMMAND [ARGS]...

  Evals that gate: run suites, judge them, report.

  run        run suites, judge them, write a result file (--output json|junit|markdown|html|text, --output-dir, --no-write)
  serve      the HTTP API: POST /run, GET /results… (--host, --port; default 127.0.0.1:8090)
  version    print the version

  and the verbs of `mist eval`:

"""
_RUN = {
    "--output": "--as", "-o": "--as", "--timeout": "--sample-timeout", "-s": "--suite", "-c": "--concurrency",
}  # fmt: skip
_REPORT = {"--format": "--as", "-f": "--as", "-o": "--as", "--output": "--as"}
_CODES = {0: 0, 2: 2, 3: 2, 10: 1, 130: 130, 143: 143}
"""Exit codes of `mist` as those of the documents; a file or run that is not there is configuration. Others are 3."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. The console script's entry point."""
    begun = begin(argv, "eval", HELP, code)
    if isinstance(begun, int):
        return begun
    given, verb, after = begun
    if verb == "serve":
        return code(mist.main([*given, "up", *_serve(after)]))
    if verb == "run":
        return code(mist.main([*given, "eval", "run", *_run(after)]))
    if verb == "report":
        after = renamed(after, _REPORT)
    found = mist.main([*given, "eval", verb, *after])
    # what is not valid is configuration, not a suite that failed
    return 2 if verb == "validate" and found == 10 else code(found)


def _run(args: list[str]) -> list[str]:
    out = renamed(args, _RUN)
    words = {word.partition("=")[0] for word in out}
    if "--help" in words or "-h" in words:
        return out
    if "--no-write" in words:
        out = [word for word in out if word != "--no-write"]
    elif "--dry-run" not in words:
        out.append("--write")
    return [*out, "--judge"]


def renamed(args: Sequence[str], names: Mapping[str, str]) -> list[str]:
    """The arguments with options called as `mist` calls them; what follows `--` stays."""
    out: list[str] = []
    for at, word in enumerate(args):
        if word == "--":
            return [*out, *args[at:]]
        name, equals, value = word.partition("=")
        out.append(names[name] + equals + value if name in names else word)
    return out


def _serve(args: list[str]) -> list[str]:
    """The arguments of `mist up` for those of `serve`."""
    host, _, port = LISTEN.rpartition(":")
    out: list[str] = []
    left = list(args)
    while left:
        word = left.pop(0)
        name, equals, value = word.partition("=")
        if name in ("--host", "--port", "-p") and (equals or left):
            value = value if equals else left.pop(0)
            host, port = (value, port) if name == "--host" else (host, value)
            continue
        out.append(f"--suites{equals}{value}" if name == "--config" else word)
    if not any(word.partition("=")[0] == "--tools" for word in out):
        out += ["--tools", "matchspec"]
    return [*out, "--usual-listen", f"{host}:{port}"]


def code(found: int) -> int:
    return _CODES.get(found, 3)
