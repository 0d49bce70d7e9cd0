"""Write docs/reference/cli.md and docs/reference/exit-codes.md from the commands and the error table.

    python scripts/gen_cli_docs.py           writes both
    python scripts/gen_cli_docs.py --check   ends with 1 when a page is not what the code says

What stands in the pages is what `--help` says, in the order of the table of commands.
"""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mist import errors
from mist.cli import filters, position, records
from mist.cli.main import COMMANDS, EXIT_CODES, GLOBAL_HELP
from mist.cli.wrap import load

ROOT = Path(__file__).parents[1]
MARK = "<!-- Written by scripts/gen_cli_docs.py from the commands themselves: change them, then run it. -->"

INTRO = """\
# The `mist` command line

{mark}

One tool, noun then verb. Values go to stdout, talk to stderr; nothing needs a terminal. What a command ends with is in
[exit codes](exit-codes.md); a first walk is [how to inspect a stream](../how-to/inspect-a-stream.md).

## Global options

```text
{globals}
```

Settings come from `mist.toml` (`./`, then the user's configuration directory, or `MIST_CONFIG`), the selected context,
`MIST_*` variables and flags; later ones win. `mist config show --origin` tells where each came from. Secrets are never
flags: put a URL that holds one into `MIST_URL`. `NO_COLOR`, `FORCE_COLOR` and `TERM=dumb` are respected.

## Streams

A stream argument is a name on the broker of `-u`, or a URL with `?stream=NAME`, or `file:PATH`: JSON lines (`.gz` and
`.zst` too), read-only, the sequence is the line number. Read verbs never create anything; an empty answer says why.

## Positions

```text
{positions}
```

`--to` is inclusive. `--since` and `--until` take an age (`1h`) or a time. `-n` alone is the last n, with `--from` or
`--since` the first n.

## Filters

All given conditions hold at once; `--invert` turns the answer round. `--subject` is applied by the broker.
`--select a,b` shows only these fields. Regular expressions are stopped after a second on one record. `--where`:

```text
{where}
```

## JSON

`json` is one document, `jsonl` one object a line, in the same shape. A list is an array, one named thing is an object.
Sequences above 2^53 are strings. Keys may be added at the end. Errors are `{{"error":{{"code","message","hint","retryable"}}}}`
on stderr.

A record (`tail`, `get`, `sub`, `consumer next`, `replay`, and the lines of `export`):

```text
{record}
```

| noun | shape |
|---|---|
| stream | `{{"name","incarnation","first","last","records","bytes","durability","capabilities":{{…}},"config","created_ns","size_bytes_max","warnings"}}` |
| consumer | `{{"stream","consumer","pending","lag","lag_s","redelivered","floor","delivered","config"}}`; `lag` the first six |
| cursor, checkpoint | `{{"stream","name","sequence","incarnation","time_ns"}}`; `ls` adds `lag`, `state`, `saved` |
| published | `{{"stream","sequence","id","subject"}}`; many: `{{"stream","published","repeated","invalid","first","last"}}` |
| copy, import | `{{"source","destination","stored","repeated","refused","damaged_ranges","position","sha256"}}` |
| what was done (`rm`, `context`, `config`), what `--dry-run` would do | `{{"what","dry_run"}}` |
| mirror | `{{"source","destination","position","last","lag","lag_s","stored","repeated"}}` |
| export | `{{"file","manifest","records","first","last","bytes","sha256","file_sha256"}}` |

## Exported files

A line is the record's object; bytes that cannot stand in a line of JSON are in `data` as base64, so that an import makes
the same records again. `import` takes plain envelopes too, also mixed. `FILE.manifest.json` holds `format`, `file`,
`source`, `stream`, `incarnation`, `lines` (`records` or `envelopes`), `compression`, `records`, `first`, `last`, `bytes` and
`sha256` of the lines, `file_bytes` and `file_sha256` of the file, and `gaps`. While an export is under way there are
`FILE.part` and `FILE.part.json`; `--resume` goes on from them.

## Commands
"""

EXITS = """\
# Exit codes

{mark}

They hold for `mist …`. The console scripts of the tools (`matchspec`, `infermux`, `schemaflux`, `tokentrace`) keep the codes
of their own documents.

| exit | meaning | error codes |
|---:|---|---|
{rows}

## Errors

`code` is stable and stands in JSON errors and in HTTP answers. A retryable error may go away by itself.

| code | HTTP | gRPC | exit | retryable |
|---|---:|---|---:|---|
{codes}
"""


def main(argv: list[str]) -> int:
    pages = {
        ROOT / "docs" / "reference" / "cli.md": cli_page(),
        ROOT / "docs" / "reference" / "exit-codes.md": exits_page(),
    }
    stale = [p for p, text in pages.items() if not p.exists() or p.read_text() != text]
    if "--check" in argv:
        for page in stale:
            print(f"{page.relative_to(ROOT)} is not what the code says: run scripts/gen_cli_docs.py")
        return 1 if stale else 0
    for page in stale:
        page.write_text(pages[page])
    return 0


def cli_page() -> str:
    """The whole reference, as text."""
    intro = INTRO.format(
        mark=MARK,
        globals=GLOBAL_HELP,
        positions=_indented(position.__doc__),
        where=_indented(filters.__doc__),
        record=_indented(records.__doc__),
    )
    return intro + "\n" + "\n".join(_sections()).rstrip() + "\n"


def _indented(doc: str | None) -> str:
    """The indented lines of a docstring: its grammar."""
    lines = [line for line in (doc or "").splitlines() if line.startswith("    ")]
    return inspect.cleandoc("\n".join(lines))


def commands() -> Iterator[tuple[str, Any]]:
    """Every command that can be called, by its full name, nouns included."""
    for name in COMMANDS:
        command = load(name)
        yield f"mist {name}", command
        for verb, inner in (getattr(command, "commands", None) or {}).items():
            yield f"mist {name} {verb}", inner


def _sections() -> Iterator[str]:
    for name, command in commands():
        noun = getattr(command, "commands", None)
        level = "###" if name.count(" ") == 1 else "####"
        yield f"{level} `{name}`\n"
        prose, examples = split_help(command.help or "")
        yield prose + "\n"
        if noun:
            continue
        yield f"```text\n{usage(name, command)}\n```\n"
        rows = list(_rows(command))
        if rows:
            yield "| | |\n|---|---|\n" + "\n".join(rows) + "\n"
        if examples:
            yield f"```text\n{examples}\n```\n"


def split_help(text: str) -> tuple[str, str]:
    """Prose and examples of a command's help."""
    parts = text.replace("\b\n", "").split("\n\n")
    prose = [p for p in parts if not p.startswith(("Example:", "Examples:"))]
    examples = [re.sub(r"\AExamples?:", "", p) for p in parts if p.startswith(("Example:", "Examples:"))]
    return _escape("\n\n".join(prose)), "\n".join(textwrap.dedent(e).strip() for e in examples)


def _escape(text: str) -> str:
    """Prose as Markdown: what looks like HTML or JSON stands as it is."""
    return re.sub(r"(?<!`)(\{[^}]*\}+)(?!`)", r"`\1`", text).replace("<", "&lt;")


def usage(name: str, command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    return " ".join([name, *(p.metavar if p.required else f"[{p.metavar}]" for p in arguments), "[OPTIONS]"])


def _rows(command: Any) -> Iterator[str]:
    for p in command.params:
        if getattr(p, "hidden", False):
            continue
        if p.param_type_name == "argument":
            yield f"| `{_cell(p.metavar)}` | {_cell(p.help or '')} |"
        else:
            names = ", ".join([*p.opts, *p.secondary_opts])
            value = "" if p.is_flag else f" {p.metavar or _kind(p)}"
            yield f"| `{_cell(names + value)}` | {_cell(p.help or '')}{_default(p)} |"


def _kind(p: Any) -> str:
    choices = getattr(getattr(p, "type_descriptor", None), "choices", None) or ()
    return "|".join(str(getattr(c, "value", c)) for c in choices) or p.name.strip("_").upper()


def _default(p: Any) -> str:
    default = p.default
    if p.is_flag or default in (None, "", [], ()) or callable(default):
        return ""
    return f" Default: `{getattr(default, 'value', default)}`."


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def exits_page() -> str:
    by_exit: dict[int, list[str]] = defaultdict(list)
    for code, info in errors.CODES.items():
        by_exit[info.exit].append(f"`{code}`")
    rows = [f"| {n} | {meaning} | {' '.join(by_exit[n])} |" for n, meaning in EXIT_CODES.items()]
    codes = [
        f"| `{code}` | {i.http} | {i.grpc} | {i.exit} | {'yes' if i.retryable else 'no'} |"
        for code, i in errors.CODES.items()
    ]
    return EXITS.format(mark=MARK, rows="\n".join(rows), codes="\n".join(codes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
