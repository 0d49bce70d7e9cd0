"""`mist import`: a file of JSON lines into a stream, ids kept."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated

import typer

from mist.cli.copy import Restart
from mist.cli.filestream import FileStream
from mist.cli.filters import compile_filter
from mist.cli.manifest import Manifest, digest_of, load, manifest_path
from mist.cli.options import DryRun, Rate
from mist.cli.scan import Scan
from mist.cli.session import Session, current
from mist.cli.transfer import Mismatch, Transfer, open_sink, report, resume_after, source_url, span_of, transfer_key
from mist.errors import InvalidArgument
from mist.protocol.url import Url, has_scheme, parse_url

INVALID = 10
DIFFERENT = 10


async def command(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="What `export` wrote, or a file of envelopes; .gz, .zst.")
    ],
    stream: Annotated[str, typer.Argument(metavar="STREAM", help="The stream to fill; made if it is not there.")],
    rate: Rate = None,
    restart: Restart = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where it stopped; it does so anyway.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Read a file into a stream. Ids, subjects, headers and bytes are those of the file; sequence and time are new.

    With a manifest beside it, the file is checked against it first (exit 8 if it is another file). Importing again
    stores nothing twice. Bad lines are told with their number and passed over (exit 9; 10 if there is no good one).

    Examples:
      mist import trace.jsonl.gz trace
      mist -u log:./copy import eval.jsonl eval --rate 2000
      mist import spans.jsonl trace --dry-run
    """
    session = current()
    if resume and restart:
        raise InvalidArgument("--resume and --restart exclude each other")
    url = parse_url(file) if has_scheme(file) else Url("file", file)
    if url.scheme != "file":
        raise InvalidArgument(f"{url.redacted()}: not a file", hint="`mist copy` goes from stream to stream")
    source = FileStream(url, strict=True)
    try:
        manifest = _checked(source.path)
        if dry_run:
            info = await source.info()
            session.out.outcome(f"import {info.records:,} lines of {source.path} to {stream}", dry_run=True)
            if info.records:
                session.fail_with(DIFFERENT)
            return
        await _import(session, source, stream, manifest, rate=rate, restart=restart)
    finally:
        source.close()


async def _import(
    session: Session, source: FileStream, stream: str, manifest: Manifest | None, *, rate: float | None, restart: bool
) -> None:
    info = await source.info()
    for warning in info.warnings:
        session.out.warn(f"{source.path}: {warning}")
    key = transfer_key("import", source_url(session, f"file:{source.path}"))
    async with AsyncExitStack() as stack:
        sink = await open_sink(session, stream, "", stack)
        position = await resume_after(session, sink, key, source.incarnation, restart=restart)
        scan = Scan(session, source, compile_filter(), after=min(position or 0, info.last))
        transfer = Transfer(scan, sink, key=key, incarnation=source.incarnation, rate=rate)
        session.resume = "the same command goes on where this one stopped"
        with session.out.progress("importing", span_of(info, scan.position, None)) as progress:
            await transfer.run(progress)
        session.resume = ""
        digest = await sink.check()
        if scan.damaged and not sink.stored + sink.repeated:
            session.exit_code = INVALID
        moved = sink.stored + sink.repeated
        if manifest is not None and not position and not scan.damaged and moved != manifest.records:
            raise Mismatch(f"{source.path}: {moved} records came out, its manifest says {manifest.records}")
        report(session, sink, source=str(source.path), scan=scan, digest=digest, verb="imported")


def _checked(path: Path) -> Manifest | None:
    """The manifest, after the file was found to be the one it describes."""
    manifest: Manifest | None = load(manifest_path(path), Manifest)
    if manifest is None:
        return None
    found = digest_of(path)
    if found != manifest.file_sha256:
        raise Mismatch(
            f"{path}: is not the file its manifest describes (SHA-256 {found[:16]}…, not {manifest.file_sha256[:16]}…)",
            hint=f"export it again, or delete {manifest_path(path).name} to import it as it is",
        )
    return manifest
