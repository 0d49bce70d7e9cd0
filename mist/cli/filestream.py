"""`file:PATH` as a read-only stream: the sequence of a record is its line number, blank lines are gaps.

Lines are plain envelopes or exported records (lines.py); `.gz` and `.zst` are read too. The time of a record is the
line's own. A last line without its newline counts once it is complete. Whoever cuts or replaces the file under a reader
gets WrongIncarnation. With `strict` a line that is neither form raises DataLoss for that line, as damage does elsewhere;
without, it is shown as foreign data.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import os
import re
import time
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NoReturn, cast

from mist.broker.base import (
    ALL,
    BYTES_MAX,
    RECORD_BYTES_MAX,
    Capabilities,
    Consumer,
    ConsumerConfig,
    Damage,
    Message,
    Page,
    Record,
    Stream,
    StreamConfig,
    StreamInfo,
    Verification,
)
from mist.cli.lines import Content, parse_line
from mist.errors import (
    CursorAhead,
    DataLoss,
    InvalidArgument,
    Malformed,
    NotFound,
    Refused,
    Unsupported,
    WrongIncarnation,
)
from mist.protocol.subject import matcher
from mist.protocol.url import Url

CAPABILITIES = Capabilities(
    persistent=True, processes=True, append=False, conditional_append=False, dedupe=False, consumers=False,
    checkpoints=False, trim=False, retention=False, verify=True, delete=False,
)  # fmt: skip
POLL_S = 0.05
LINE_BYTES_MAX = 2 * RECORD_BYTES_MAX
_CHUNK = 256 * 1024
_BLANK = re.compile(rb"^[ \t\r]*\n", re.MULTILINE)


def open_lines(path: Path) -> IO[bytes]:
    """The file's text as bytes, decompressed by its suffix. Raises NotFound, InvalidArgument."""
    try:
        if path.suffix == ".gz":
            import gzip

            return cast(IO[bytes], gzip.open(path, "rb"))
        if path.suffix == ".zst":
            return cast(IO[bytes], zstandard().open(path, "rb"))
        return path.open("rb")
    except FileNotFoundError as exc:
        raise NotFound(f"no file {path}") from exc
    except OSError as exc:
        raise InvalidArgument(f"{path}: cannot be read: {exc.strerror}") from exc


def zstandard() -> Any:
    """The module that reads and writes .zst. Raises InvalidArgument with the install line."""
    try:
        module = importlib.import_module("zstandard")
    except ImportError as exc:
        raise InvalidArgument(".zst needs a package that is not installed", hint="pip install zstandard") from exc
    return module


class FileStream(Stream):
    """A JSON-lines file, read-only."""

    size_bytes_max = RECORD_BYTES_MAX

    def __init__(self, url: Url, *, strict: bool = False) -> None:
        if not url.target:
            raise InvalidArgument("file: needs a path", hint="for example file:./spans.jsonl")
        self.path = Path(url.target)
        if self.path.is_dir():
            raise InvalidArgument(f"{self.path} is a directory", hint="name a JSON-lines file")
        self.name = str(self.path)
        self.strict = strict
        self._plain = self.path.suffix not in (".gz", ".zst")
        self._file = open_lines(self.path)
        self._offsets = [0]  # of each chunk looked at …
        self._lines = [0]  # … and how many line ends lie before it
        self._end = 0
        self._ends = 0
        self._blank = 0
        self._torn = False
        self._size = 0
        self._at = (1, 0)  # a line and its offset: where the last page ended
        self.incarnation = self._identify()

    def close(self) -> None:
        self._file.close()

    def _identify(self) -> str:
        """Of the first line: a file that grows stays the same stream, a replaced one does not."""
        return hashlib.sha256(self._readline(0)).hexdigest()[:16]

    # the index of line ends

    def _extend(self) -> int:
        """Look at what was written since; the number of the last complete line."""
        if self._plain:
            size = os.fstat(self._file.fileno()).st_size
            if size < self._end:
                raise WrongIncarnation(f"{self.path} was cut while it was read", hint="start again")
            if size == self._size:
                return self._last
            self._size = size
        elif self._size:
            return self._last
        try:
            carry = self._readline(self._offset(self._ends + 1)) if self._end else b""
            self._file.seek(self._end)
            while chunk := self._file.read(_CHUNK):
                self._offsets.append(self._end + len(chunk))
                self._ends += chunk.count(b"\n")
                self._lines.append(self._ends)
                self._end += len(chunk)
                whole = carry + chunk
                cut = whole.rfind(b"\n") + 1
                self._blank += len(_BLANK.findall(whole, 0, cut))
                carry = whole[cut:]
        except (OSError, EOFError) as exc:
            raise Malformed(f"{self.path}: cannot be decompressed: {exc}") from exc
        self._size = self._size or self._end or 1
        self._torn = False
        start = self._offset(self._ends + 1)
        if start < self._end:
            rest = self._readline(start)
            self._torn = bool(rest.strip()) and parse_line(rest.strip()).error is not None
            self._unfinished = not self._torn and bool(rest.strip())
        else:
            self._unfinished = False
        return self._last

    _unfinished = False

    @property
    def _last(self) -> int:
        return self._ends + self._unfinished

    def _offset(self, line: int) -> int:
        """Where a line starts."""
        if line <= 1:
            return 0
        if self._at[0] == line:
            return self._at[1]
        chunk = bisect_left(self._lines, line - 1) - 1
        if chunk < 0:
            return 0
        offset, missing = self._offsets[chunk], line - 1 - self._lines[chunk]
        self._file.seek(offset)
        for _ in range(missing):
            offset += len(self._file.readline())
        return offset

    def _readline(self, offset: int) -> bytes:
        self._file.seek(offset)
        return self._file.readline(LINE_BYTES_MAX + 1)

    # the contract

    async def read(
        self,
        *,
        after: int = 0,
        subjects: Sequence[str] = ALL,
        limit: int = 256,
        bytes_max: int = BYTES_MAX,
        wait_s: float = 0.0,
    ) -> Page:
        match = matcher(subjects)
        until = time.monotonic() + wait_s
        while True:
            last = self._extend()
            if after > last:
                raise CursorAhead(after=after, last=last, stream=self.name)
            page = self._page(after, last, match, limit, bytes_max)
            if page.records or time.monotonic() >= until:
                return page
            after = page.scanned
            await asyncio.sleep(POLL_S)

    def _page(self, after: int, last: int, match: Any, limit: int, bytes_max: int) -> Page:
        records: list[Record] = []
        size = 0
        scanned = after
        offset = self._offset(after + 1)
        self._file.seek(offset)
        for number in range(after + 1, last + 1):
            line = self._file.readline(LINE_BYTES_MAX + 1)
            body = line.strip()
            if body:
                try:
                    content = self._content(number, line, body)
                except DataLoss:
                    if records:
                        break
                    self._at = (number, offset)
                    raise
                if match is None or match(content.subject):
                    size += len(content.data)
                    if records and size > bytes_max:
                        break
                    records.append(
                        Record(number, content.subject, content.data, content.timestamp_ns, content.id, content.headers)
                    )
            offset += len(line)
            scanned = number
            if len(records) >= limit:
                break
        self._at = (scanned + 1, offset)
        return Page(records, scanned, last)

    def _content(self, number: int, line: bytes, body: bytes) -> Content:
        if len(line) > LINE_BYTES_MAX:
            raise Malformed(f"{self.path}: line {number} is longer than {LINE_BYTES_MAX} bytes")
        content = parse_line(body)
        if content.error is not None and self.strict:
            raise DataLoss(
                first=number, last=number, resume_after=number, stream=self.name,
                why=f"not an envelope ({content.error.message})",
            )  # fmt: skip
        return content

    async def info(self) -> StreamInfo:
        last = self._extend()
        warnings = ("the last line is not complete",) if self._torn else ()
        return StreamInfo(
            name=self.name, incarnation=self.incarnation, first=1, last=last, records=last - self._blank, bytes=self._end,
            durability="process", capabilities=CAPABILITIES, config=StreamConfig(), warnings=warnings,
            created_ns=int(self.path.stat().st_mtime_ns),
        )  # fmt: skip

    async def locate(self, time_ns: int) -> int:
        """A scan: lines are in no promised order of time."""
        after, last = 0, self._extend()
        while after < last:
            page = self._page(after, last, None, 1000, BYTES_MAX)
            for record in page.records:
                if record.timestamp_ns >= time_ns:
                    return record.sequence
            after = page.scanned
        return last + 1

    async def verify(self) -> Verification:
        last = self._extend()
        damage: list[Damage] = []
        records = 0
        offset = 0
        self._file.seek(0)
        for number in range(1, last + 1):
            line = self._file.readline(LINE_BYTES_MAX + 1)
            body = line.strip()
            if body:
                error = parse_line(body).error
                if error is None:
                    records += 1
                else:
                    damage.append(Damage(number, number, f"{self.path} at byte {offset}", error.message))
            offset += len(line)
        return Verification(records=records, bytes=offset, first=1, last=last, damage=damage)

    # what a file does not have

    def _refuse(self) -> NoReturn:
        raise Refused(f"{self.path}: a file is read-only here", hint="`mist copy` and `mist export` write files")

    async def append(self, messages: Sequence[Message], *, expected_last: int | None = None) -> list[int]:
        self._refuse()

    async def trim(self, *, before: int) -> int:
        self._refuse()

    async def consumer(self, name: str, config: ConsumerConfig | None = None, *, create: bool = True) -> Consumer:
        raise Unsupported("consumers", "file:")

    async def consumers(self) -> list[str]:
        return []
