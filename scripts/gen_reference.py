"""Write the generated pages: docs/reference/errors.md, docs/reference/backends.md, and the README's table of backends.

    python scripts/gen_reference.py            write what differs
    python scripts/gen_reference.py --check    write nothing, end with 1 when something differs

The source of truth is the code: the error tree and its table of codes, what every broker of ours declares when it is
opened, and the transports' own docstrings. tests/docs/test_generated.py compares the files with this. Does not: judge
whether a declaration is true; the conformance suite does.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import inspect
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import NamedTuple, get_args

from msgspec.structs import asdict, fields

from mist import errors
from mist.broker.base import Capabilities, Durability, StreamConfig, StreamInfo
from mist.broker.registry import GROUP, connect
from mist.errors import CODES, InvalidArgument, MistError
from mist.kit.local import LocalServer, nats_server, redis_server

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- generated: backends -->", "<!-- end of generated -->"
NOTE = "<!-- Written by scripts/gen_reference.py. Do not edit: change the code and run the script. -->"

# How each broker of ours is opened here; "" is a server that is started for it. Schemes that are other ways to the same
# broker are left out.
OPENED = {"log": "log:{place}", "memory": "memory:", "nats": "", "redis": ""}
SAME = frozenset({"tls", "rediss", "redis+sentinel", "redis+cluster"})
SHOWN = {
    "log": "`log:DIR`",
    "memory": "`memory:`, `memory:NAME`",
    "nats": "`nats://`, `tls://`",
    "redis": "`redis://`, `rediss://`, `redis+sentinel://`, `redis+cluster://`",
}
SAID = {
    "log": "Embedded. A directory on a local disk; no server. Linux, and macOS with polling.",
    "memory": "The reference, for tests and single programs. `memory:NAME` is shared within a process.",
    "nats": (
        "NATS JetStream, 2.9 or newer. Shown with `sync_interval: always`, as `mist dev nats` starts it; with the server's"
        " own default the durability is `process`, on a cluster with replicas it is `replicated`."
        " [How to use it](../how-to/use-nats.md)."
    ),
    "redis": (
        "Redis Streams: Valkey, Redis 6.2 or newer. Shown with `appendfsync always`, as `mist dev redis` starts it; with"
        " `everysec` the durability is `process`, with replicas that are waited for `replicated`."
        " [How to use it](../how-to/use-redis.md)."
    ),
}
SURVIVES = {
    "memory": "nothing: it ends with the process",
    "process": "the end of the process, also by `kill -9`; not a power cut",
    "power": "a power cut: synced to the disk before the append returns",
    "replicated": "the loss of a machine: acknowledged by a majority of servers",
}


class Backend(NamedTuple):
    """What one broker said when it was opened with nothing but defaults."""

    scheme: str
    info: StreamInfo
    durabilities: list[str]


def table(head: Sequence[str], rows: Iterator[Sequence[str]] | Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def plain(doc: str | None) -> str:
    """A docstring's text as one Markdown line: single backquotes, no line breaks."""
    return " ".join(inspect.cleandoc(doc or "").replace("``", "`").split())


# --- errors


def classes(root: type[MistError] = MistError) -> Iterator[type[MistError]]:
    """The tree, parents first, in the order of the module."""
    yield root
    for child in root.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from classes(child)


def tree() -> str:
    """The drawing in the module's docstring."""
    doc = inspect.cleandoc(errors.__doc__ or "")
    return inspect.cleandoc("\n".join(line for line in doc.splitlines() if line.startswith("    ")))


def coordinates(cls: type[MistError]) -> str:
    """The attributes an error of this class carries beyond those of every error."""
    own = cls.__dict__.get("__init__")
    if own is None or cls is MistError:
        return ""
    said = re.findall(r"^\s+self\.([a-z_]+) = ", inspect.getsource(own), re.MULTILINE)
    return ", ".join(f"`{name}`" for name in said)


def errors_page() -> str:
    """docs/reference/errors.md."""
    by_code: dict[str, list[str]] = {}
    for cls in list(classes())[1:]:
        by_code.setdefault(cls.code, []).append(f"`{cls.__name__}`")
    rows = [
        [f"`{code}`", ", ".join(by_code.get(code, ["-"])), str(i.http), f"`{i.grpc}`", str(i.exit), "yes" if i.retryable else "no"]
        for code, i in CODES.items()
    ]  # fmt: skip
    said = [
        [f"`{c.__name__}`", plain(c.__doc__) if c.__doc__ else "", coordinates(c)]
        for c in list(classes())[1:]
        if c.__doc__ or coordinates(c)
    ]
    return "\n".join(
        [
            "# Errors",
            "",
            NOTE,
            "",
            "Everything this package raises is a `mist.errors.MistError`, apart from `asyncio.CancelledError`. An error",
            "carries `code` (stable, for programs), `message` (what and where), `hint` (the next step), `meta`",
            "(coordinates as text), `retryable`, `http_status`, `exit_code` and `retry_after_s`. Texts may change,",
            "codes do not. On the wire an error is one flat JSON object: `code`, `message`, `meta`, `cause`.",
            "",
            "```python",
            "from mist.errors import CODES, SequenceExpired",
            "",
            'expired = SequenceExpired(after=10, first=500, stream="trace")',
            'assert expired.code == "sequence_expired"',
            "assert (expired.after, expired.first) == (10, 500)",
            "assert expired.exit_code == CODES[expired.code].exit == 3",
            "assert not expired.retryable",
            "```",
            "",
            "## The tree",
            "",
            "A class exists for each decision a caller can take. `except Conflict` catches what lies below it.",
            "",
            "```text",
            tree(),
            "```",
            "",
            "## Codes",
            "",
            "The exit code is the command line's. `retryable` says whether the same call may succeed later without a",
            "change; one error may know better than its class.",
            "",
            *table(["code", "class", "HTTP", "gRPC", "exit", "retryable"], rows),
            "",
            "`cancelled` has no class: it stands for a cancelled call where one has to be written down.",
            "",
            "## Coordinates",
            "",
            *table(["class", "meaning", "attributes"], said),
            "",
        ]
    )


# --- backends


def installed() -> list[str]:
    """The schemes of the brokers that come with this distribution, sorted."""
    ours = {p.name for p in entry_points(group=GROUP) if p.dist is not None and p.dist.name == "mist-stack"}
    return sorted((ours | set(OPENED)) - SAME)


@contextlib.contextmanager
def opened(scheme: str, place: str) -> Iterator[str]:
    """The URL of a broker to look at; a server is started where it takes one."""
    if scheme not in OPENED:
        raise InvalidArgument(f"scripts/gen_reference.py does not know how to open {scheme}:", hint="add it to OPENED")
    if OPENED[scheme]:
        yield OPENED[scheme].format(place=place)
        return
    server: LocalServer = nats_server(place) if scheme == "nats" else redis_server(place)
    server.start()
    try:
        yield server.url
    finally:
        server.kill()


async def look(scheme: str, url: str) -> Backend:
    """Open one broker and ask it what it is and which durabilities it gives."""
    async with connect(url) as broker:
        info = await (await broker.open("s")).info()
        given = []
        for level in get_args(Durability):
            try:
                await broker.open(f"s-{level}", config=StreamConfig(durability=level))
            except InvalidArgument:
                continue
            given.append(level)
        return Backend(scheme, info, given)


def backends() -> list[Backend]:
    found = []
    with tempfile.TemporaryDirectory() as place:
        for scheme in installed():
            with opened(scheme, f"{place}/{scheme}") as url:
                found.append(asyncio.run(look(scheme, url)))
    return found


def yes(value: bool) -> str:
    return "yes" if value else "-"


def capability_docs() -> dict[str, str]:
    """The docstrings of the fields of Capabilities, which stand below them in the source."""
    source = inspect.getsource(Capabilities)
    found = re.findall(r'^    (\w+): bool = \w+\n    """(.*?)"""', source, re.MULTILINE | re.DOTALL)
    docs = {name: plain(text) for name, text in found}
    docs["dedupe"] = f"An id that is known within the window is stored once. {docs['dedupe']}"
    return docs


def backend_table(found: Sequence[Backend]) -> list[str]:
    """One line per backend: what it says of itself."""
    names = [f.name for f in fields(Capabilities)]
    rows = []
    for b in found:
        caps = asdict(b.info.capabilities)
        levels = ", ".join(f"**{d}**" if d == b.info.durability else d for d in b.durabilities)
        missing = ", ".join(n for n in names if not caps[n])
        rows.append([SHOWN[b.scheme], levels, yes(caps["persistent"]), yes(caps["processes"]), missing or "nothing"])
    return table(["URL", "durability (default in bold)", "persistent", "many processes", "capabilities it lacks"], rows)


def capability_table(found: Sequence[Backend]) -> list[str]:
    docs = capability_docs()
    said = {
        "append": "`append`; undeclared for a stream that can only be read",
        "consumers": "`consumer`, and everything a consumer does",
        "checkpoints": "`broker.checkpoints`, and with them named cursors",
        "trim": "`trim` removes the oldest records",
        "locate": "`locate` finds a position by time",
        "delete": "`delete` removes a stream",
    }
    rows = []
    for f in fields(Capabilities):
        states = [yes(getattr(b.info.capabilities, f.name)) for b in found]
        rows.append([f"`{f.name}`", docs.get(f.name) or said[f.name], *states])
    return table(["capability", "means", *(f"`{b.scheme}:`" for b in found)], rows)


def transport_sections() -> list[str]:
    """One section per transport module: its docstring, whose first paragraph names the URL."""
    package = importlib.import_module("mist.transport")
    schemes: dict[str, str] = package._SCHEMES
    base = inspect.cleandoc(importlib.import_module("mist.transport.base").__doc__ or "")
    out = [
        "## Transports",
        "",
        "`mist.transport.dial(url)` gives three verbs over every URL: `send`, `receive`, `close`",
        "([how to use them](transports.md)). What all of them promise:",
        "",
        *block(base.split("\n\n", 1)[1]),
    ]
    modules: dict[str, list[str]] = {}
    for scheme, module in {**schemes, "any broker's URL": "mist.transport.stream"}.items():
        modules.setdefault(module, []).append(scheme)
    for module, names in modules.items():
        doc = inspect.cleandoc(importlib.import_module(module).__doc__ or "")
        out += [f"### {', '.join(f'`{n}:`' if ' ' not in n else n for n in names)}", "", *block(doc)]
    return out


def block(text: str) -> list[str]:
    """Our docstrings are laid out for reading in a fixed pitch: they are shown as they are."""
    return ["```text", *text.strip().splitlines(), "```", ""]


def backends_page(found: Sequence[Backend]) -> str:
    """docs/reference/backends.md."""
    out = [
        "# Backends",
        "",
        NOTE,
        "",
        "What each backend says of itself. Declared means that the conformance suite exercises it; undeclared means that the",
        "call raises `Unsupported`. `mist stream info NAME` prints both for a stream that exists. Which one to take:",
        "[choose a backend](../how-to/choose-a-backend.md).",
        "",
        "## Brokers",
        "",
        *backend_table(found),
        "",
    ]
    out += [f"- {SHOWN[b.scheme]}: {SAID[b.scheme]}" for b in found]
    out += ["", "### Durability", ""]
    out += ["It belongs to the stream and is set when the stream is made. No parameter of a URL weakens it.", ""]
    out += table(
        ["level", "an acknowledged record survives", *(f"`{b.scheme}:`" for b in found)],
        [[f"`{d}`", SURVIVES[d], *(yes(d in b.durabilities) for b in found)] for d in get_args(Durability)],
    )
    out += ["", "### Capabilities", "", *capability_table(found), "", "### Limits and defaults", ""]
    rows = [["largest record, bytes", *(f"{b.info.size_bytes_max:,}" for b in found)]]
    rows += [[f"`{f.name}`", *(str(getattr(b.info.config, f.name)) for b in found)] for f in fields(StreamConfig)]
    out += table(["of a stream made with defaults", *(f"`{b.scheme}:`" for b in found)], rows)
    out += ["", "0 is no limit; a dedupe window of 0 s or 0 ids is no de-duplication.", "", *transport_sections()]
    return "\n".join(out).rstrip() + "\n"


def readme_with(text: str, found: Sequence[Backend]) -> str:
    """The README with its generated part made anew."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"README.md lacks the lines {BEGIN} and {END}")
    return "\n".join([f"{head}{begin}", "", *backend_table(found), "", f"{end}{tail}"])


def generated() -> dict[Path, str]:
    """Every generated file and what it should hold."""
    found = backends()
    readme = ROOT / "README.md"
    return {
        ROOT / "docs/reference/errors.md": errors_page(),
        ROOT / "docs/reference/backends.md": backends_page(found),
        readme: readme_with(readme.read_text(encoding="utf-8"), found),
    }


def main(argv: Sequence[str]) -> int:
    differ = [
        (path, text)
        for path, text in generated().items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    for path, text in differ:
        if "--check" in argv:
            print(f"{path.relative_to(ROOT)} is not what scripts/gen_reference.py writes")
        else:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")
    return 1 if differ and "--check" in argv else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
