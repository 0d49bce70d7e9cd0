"""`mist export`: a stream into a file of JSON lines, with a manifest."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import IO, Annotated, cast

import typer

from mist.broker.base import Record
from mist.broker.clock import SYSTEM
from mist.cli.filestream import open_lines, zstandard
from mist.cli.manifest import Gap, Manifest, Partial, digest_of, load, manifest_path, sync_directory, write_durably
from mist.cli.options import FilterOptions, RangeOptions, StreamArg
from mist.cli.records import View, document
from mist.cli.render import seq
from mist.cli.scan import Bounds, Scan, filter_of
from mist.cli.session import current
from mist.cli.transfer import open_source, source_url, span_of
from mist.errors import AlreadyExists, Conflict, InvalidArgument, NotFound
from mist.protocol import codec

SAVE_EVERY_S = 5.0
PARTIAL = 9
SUFFIXES = {".gz": "gzip", ".zst": "zstd"}


async def command(
    stream: StreamArg,
    file: Annotated[str, typer.Argument(metavar="FILE|-", help="FILE.jsonl, .jsonl.gz or .jsonl.zst; - = stdout.")],
    span: RangeOptions,
    wanted: FilterOptions,
    envelopes: Annotated[bool, typer.Option("--envelopes", help="Plain envelopes, as in a file: transport.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an export that was stopped.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Write over FILE.")] = False,
) -> None:
    """Write a stream to a file, one record a line, with FILE.manifest.json: counts, range and SHA-256.

    A line is the object of `mist tail --format jsonl`; bytes that cannot stand in a line are base64, so that `mist import`
    makes the same records again. With --envelopes a line is the envelope alone (headers and foreign records are left
    out, exit 9). The file appears under its name when it is whole. A broker that goes away is waited for.

    Examples:
      mist export trace trace.jsonl.gz
      mist export trace trace.jsonl.gz --resume
      mist export eval - --subject 'eval.result.*' | gzip > results.gz
    """
    session = current()
    filters, bounds = filter_of(wanted), Bounds(span)
    broker, source = await open_source(session, stream, strict=False)
    info = await source.info()
    checkpoints = broker.checkpoints if broker is not None else None
    after = await bounds.after(source, checkpoints, info)
    to = await bounds.to(source, checkpoints, info)
    lines = "envelopes" if envelopes else "records"
    scan = Scan(session, source, filters, after=after, to=to, from_start=bounds.start is None)
    left_out = 0

    def encode(view: View) -> bytes | None:
        nonlocal left_out
        if not envelopes:
            return document(view, exact=True) + b"\n"
        env = view.envelope
        if env is None:
            left_out += 1
            return None
        return codec.encode(env).replace(b"\n", b" ").replace(b"\r", b" ") + b"\n"

    if file == "-":
        session.out.format = "raw"
        async for views in scan.pages():
            for view in views:
                line = encode(view)
                if line is not None:
                    session.out.write(line)
            session.out.flush()
    else:
        writer = _Writer(
            Path(file), source_url(session, stream), source.incarnation, lines, repr(wanted), resume, force
        )
        position = writer.open(after)
        scan.position = max(position, after)
        session.resume = f"resume with: mist export {stream} {file} --resume (and the same filters)"
        begun = scan.position
        total = span_of(info, begun, to)
        try:
            with session.out.progress("exporting", total) as progress:
                gaps = session.gaps
                async for views in scan.pages():
                    for view in views:
                        line = encode(view)
                        if line is not None:
                            writer.line(view.record, line)
                    writer.at(scan.position, gaps)
                    progress.at(scan.matched)
            writer.at(scan.position, session.gaps)
        except BaseException:
            writer.stop(session.gaps)
            raise
        manifest = writer.finish(source.name, session.gaps)
        session.resume = ""
        if session.out.format == "table":
            session.out.note(f"{manifest.records:,} records of {source.name} in {file}; {manifest_path(Path(file))}")
        else:
            session.out.item(
                {
                    "file": file, "manifest": str(manifest_path(Path(file))), "records": manifest.records,
                    "first": seq(manifest.first), "last": seq(manifest.last), "bytes": manifest.bytes,
                    "sha256": manifest.sha256, "file_sha256": manifest.file_sha256,
                }
            )  # fmt: skip
    if left_out:
        session.out.warn(
            f"{left_out} records are no envelopes and were left out; export without --envelopes keeps them"
        )
        session.fail_with(PARTIAL)


class _Writer:
    """FILE.part and FILE.part.json while it is under way; FILE and its manifest at the end."""

    def __init__(
        self, path: Path, source: str, incarnation: str, lines: str, filters: str, resume: bool, force: bool
    ) -> None:
        self._path = path
        self._part = path.with_name(path.name + ".part")
        self._state = path.with_name(path.name + ".part.json")
        self._source = source
        self._incarnation = incarnation
        self._lines = lines
        self._filters = filters
        self._resume = resume
        self._force = force
        self._compression = SUFFIXES.get(path.suffix, "none")
        if self._compression == "zstd":
            zstandard()
        self._digest = hashlib.sha256()
        self._bytes = 0
        self._records = self._first = self._last = 0
        self._gaps: list[Gap] = []
        self._position = 0
        self._raw: IO[bytes] | None = None
        self._out: IO[bytes] | None = None
        self._next = time.monotonic() + SAVE_EVERY_S

    def open(self, after: int) -> int:
        """Make or reopen FILE.part; the sequence to go on after."""
        if self._path.exists() and not self._force:
            raise AlreadyExists(f"{self._path} exists", hint="--force writes over it")
        state: Partial | None = load(self._state, Partial)
        if self._resume:
            if state is None:
                raise NotFound(f"no export of {self._path} to go on with", hint="start it without --resume")
            self._check(state)
        elif state is not None and not self._force:
            raise Conflict(
                f"{self._part} is an export that was stopped at {state.position}",
                hint="--resume goes on, --force starts again",
            )
        try:
            self._raw = self._part.open("r+b" if self._resume else "wb")
        except OSError as exc:
            raise InvalidArgument(f"{self._part}: cannot be written: {exc.strerror}") from exc
        self._position = after
        if self._resume and state is not None:
            self._raw.truncate(state.file_bytes)
            self._raw.seek(state.file_bytes)
            self._read_back(state)
        self._begin()
        return self._position

    def _check(self, state: Partial) -> None:
        if state.incarnation != self._incarnation or state.source != self._source:
            raise Conflict(f"{self._part} is an export of another stream ({state.source})", hint="--force starts again")
        if state.lines != self._lines or state.filters != self._filters:
            raise Conflict(f"{self._part} was begun with other filters", hint="give the same ones, or --force")

    def _read_back(self, state: Partial) -> None:
        """The digest so far, from the lines that are there."""
        count = 0
        with open_lines(self._readable()) as file:
            for line in file:
                self._digest.update(line)
                self._bytes += len(line)
                count += 1
        if self._readable() != self._part:
            self._readable().unlink()
        if count != state.records:
            raise Conflict(
                f"{self._part} holds {count} lines, {state.records} were written", hint="--force starts again"
            )
        self._records, self._first, self._last = state.records, state.first, state.last
        self._gaps = list(state.gaps)
        self._position = state.position

    def _readable(self) -> Path:
        """FILE.part under a name whose suffix says how it is compressed."""
        if self._compression == "none":
            return self._part
        link = self._part.with_name(self._part.name + self._path.suffix)
        if not link.exists():
            link.hardlink_to(self._part)
        return link

    def _begin(self) -> None:
        """A new compressed member: what is saved can be cut exactly behind a whole one."""
        raw = cast(IO[bytes], self._raw)
        if self._compression == "gzip":
            import gzip

            self._out = cast(IO[bytes], gzip.GzipFile(fileobj=raw, mode="wb", mtime=0, filename=""))
        elif self._compression == "zstd":
            self._out = cast(IO[bytes], zstandard().ZstdCompressor().stream_writer(raw, closefd=False))
        else:
            self._out = raw

    def _end(self) -> None:
        if self._out is not None and self._out is not self._raw:
            self._out.close()
        raw = cast(IO[bytes], self._raw)
        raw.flush()
        os.fsync(raw.fileno())

    def line(self, record: Record, line: bytes) -> None:
        cast(IO[bytes], self._out).write(line)
        self._digest.update(line)
        self._bytes += len(line)
        self._records += 1
        self._first = self._first or record.sequence
        self._last = self._position = record.sequence

    def at(self, position: int, gaps: list[Gap]) -> None:
        """Everything up to `position` was written; saved every five seconds."""
        self._position = position
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + SAVE_EVERY_S
            self._save(gaps)
            self._begin()

    def _save(self, gaps: list[Gap]) -> None:
        self._end()
        write_durably(
            self._state,
            Partial(
                source=self._source, incarnation=self._incarnation, lines=self._lines, filters=self._filters,
                position=self._position, records=self._records, first=self._first, last=self._last,
                file_bytes=cast(IO[bytes], self._raw).tell(), gaps=self._gaps + gaps,
            ),
        )  # fmt: skip

    def stop(self, gaps: list[Gap]) -> None:
        """Interrupted or failed: keep what is whole."""
        if self._raw is not None:
            self._save(gaps)
            self._raw.close()

    def finish(self, stream: str, gaps: list[Gap]) -> Manifest:
        self._end()
        raw = cast(IO[bytes], self._raw)
        size = raw.tell()
        raw.close()
        manifest = Manifest(
            file=self._path.name, source=self._source, stream=stream, incarnation=self._incarnation, lines=self._lines,
            compression=self._compression, records=self._records, first=self._first, last=self._last, bytes=self._bytes,
            sha256=self._digest.hexdigest(), file_bytes=size, file_sha256=digest_of(self._part),
            gaps=self._gaps + gaps, created_ns=SYSTEM.time_ns(),
        )  # fmt: skip
        write_durably(manifest_path(self._path), manifest)
        self._part.replace(self._path)
        self._state.unlink(missing_ok=True)
        sync_directory(self._path.parent)
        return manifest
