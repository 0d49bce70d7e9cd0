"""Answers that lie in the stream already: what makes a repeat free.

`Recalled.load` reads questions and answers once, from where the run began; `get(id)` is then the first answer to a
question, None where there is none. Up to `BYTES_MAX` of answers are kept in memory, of those beyond only where they lie.
"""

from __future__ import annotations

import msgspec
from msgspec import Struct

from mist.broker.base import Page, Record, Stream
from mist.broker.patience import again
from mist.client.received import decode_record
from mist.errors import MistError, SequenceExpired
from mist.protocol.payloads import INFER_REQUEST, INFER_RESPONSE
from mist.tools.matchspec.asking import Answer, answer_of

BYTES_MAX = 64 * 1024 * 1024
PAGE = 1000
SUBJECTS = (INFER_REQUEST, f"{INFER_REQUEST}.>", INFER_RESPONSE, f"{INFER_RESPONSE}.>")


class Shelf:
    """Things by a number, in memory as long as they fit, else by the sequence of their record. The first of a number
    stays."""

    def __init__(self, stream: Stream, *, bytes_max: int = BYTES_MAX) -> None:
        self._stream = stream
        self._bytes_left = bytes_max
        self._found: dict[int, bytes | int] = {}

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, key: int) -> bool:
        return key in self._found

    def put(self, key: int, record: Record) -> None:
        if key in self._found:
            return
        if len(record.data) <= self._bytes_left and not record.headers:
            self._bytes_left -= len(record.data)
            self._found[key] = record.data
        else:
            self._found[key] = record.sequence

    async def get(self, key: int) -> Record | None:
        found = self._found.get(key)
        if found is None:
            return None
        if isinstance(found, bytes):
            return Record(0, "", found, 0, "known")
        page = await again(lambda: self._stream.read(after=found - 1, limit=1))
        if not page.records or page.records[0].sequence != found:
            raise SequenceExpired(after=found - 1, first=page.last, stream=self._stream.name)
        return page.records[0]


class _Told(Struct):
    """The keys of an envelope that say what it is."""

    type: str = ""
    id: str = ""
    correlation_id: str = ""


_told = msgspec.json.Decoder(_Told).decode


class Recalled:
    """The answers on one stream from one position on."""

    def __init__(self, stream: Stream, *, bytes_max: int = BYTES_MAX) -> None:
        self._answers = Shelf(stream, bytes_max=bytes_max)
        self._asked: set[int] = set()
        self.stream = stream

    def __len__(self) -> int:
        return len(self._answers)

    async def load(self, after: int, *, stream: Stream | None = None) -> int:
        """Read up to the present end (of another stream, where questions lie); the position reached. Records that are no envelopes are nobody's answers; where the
        oldest are gone, those that are kept still count."""
        while True:
            try:
                page = await _page(stream or self.stream, after)
            except SequenceExpired as exc:
                after = exc.first - 1
                continue
            for record in page.records:
                self._note(record, answers=stream is None)
            after = page.scanned
            if after >= page.last:
                return after

    def _note(self, record: Record, *, answers: bool) -> None:
        try:
            if record.headers:
                env = decode_record(record)
                told = _Told(env.type, env.id, env.correlation_id)
            else:
                told = _told(record.data)
        except (MistError, msgspec.DecodeError, UnicodeDecodeError):
            return
        if told.type == INFER_RESPONSE and told.correlation_id and answers:
            self._answers.put(_number(told.correlation_id), record)
        elif told.type == INFER_REQUEST:
            self._asked.add(_number(told.id))

    def asked(self, id: str) -> bool:
        """Whether a question of this id lies on the stream."""
        return _number(id) in self._asked

    def has(self, id: str) -> bool:
        return _number(id) in self._answers

    async def get(self, id: str) -> Answer | None:
        """The first answer to the question of this id. Raises Malformed when that cannot be read, TransportError when it
        is an error."""
        record = await self._answers.get(_number(id))
        if record is None:
            return None
        env = decode_record(record)
        if env.correlation_id != id:
            return None
        return answer_of(env.payload, env.id, env.correlation_id, env.traceparent, recalled=True)


async def _page(stream: Stream, after: int) -> Page:
    return await again(lambda: stream.read(after=after, subjects=SUBJECTS, limit=PAGE))


def _number(id: str) -> int:
    """64 bits of an id: ours are digests in hexadecimal, those of others are anything."""
    try:
        return int(id[:16], 16)
    except ValueError:
        return hash(id)
