"""Recorded answers, found again by their question.

The key of a question is the SHA-256 (hex) of canonical JSON (keys sorted, no white space, null and empty members left out, whole
floats as integers) of

    {"v": 1, "model": …, "messages": [{role, content, name, tool_calls, tool_call_id}], "params": {…}}

`model` is the provider's name of the model. Of the parameters those count that decide an answer: all but NOT_DECIDING, which say how it
is handed over, billed or attributed. A default that is written out is another question than one left out: whether they
are the same is the provider's affair.

`Recordings` are read from a JSON-lines file or from a stream, from a cursor to its end: envelopes `infer.response`, whose
payload names its question by `request_key`; where it does not, the `infer.request` of its correlation id says it. That
request's `meta.epoch` says which repeat of the question the answer is of. In a file a line may also be a question and its answer together:

    {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "2+2?"}], "content": "4"}

with `params`, `finish_reason`, `tool_calls`, `tokens_in`, `tokens_out` … as in an `infer.response`.

Promises: memory is bounded whatever their number (they lie in a temporary SQLite file of this process); an answer that was stored
twice, same envelope id, is one; reading the same records gives the same answers in the same order.
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
from msgspec import field

from mist.broker.base import Broker
from mist.broker.registry import connect
from mist.client.client import Client
from mist.errors import InvalidArgument, MistError, NotFound, WrongIncarnation
from mist.protocol.codec import decode_foreign
from mist.protocol.envelope import SIZE_BYTES_MAX, Envelope
from mist.protocol.payloads import INFER_REQUEST, INFER_RESPONSE, InferRequest, InferResponse
from mist.protocol.payloads import ChatMessage as WireMessage
from mist.protocol.url import Url, has_scheme, parse_url, redact
from mist.tools.infermux.chat import ChatMessage, ChatRequest, Json, Reply, Usage

KEY_VERSION = 1
NOT_DECIDING = frozenset({
    "metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier", "store", "stream",
    "stream_options", "user",
})  # fmt: skip
EPOCH = "epoch"
"""Key of `meta`: which repeat of a question this is, from 1."""
SUBJECTS = tuple(f"{type}{rest}" for type in (INFER_REQUEST, INFER_RESPONSE) for rest in ("", ".>"))
LINE_BYTES_MAX = SIZE_BYTES_MAX
_EXACT = 2**53

_canonical = msgspec.json.Encoder(order="sorted").encode


def key_of(request: ChatRequest, model: str) -> str:
    """The key of a question put to `model`: 64 hex digits."""
    return question_key(model, request.messages, request.params)


def question_key(model: str, messages: Iterable[ChatMessage | WireMessage], params: Mapping[str, Any]) -> str:
    """`key_of` of the parts."""
    question = {
        "v": KEY_VERSION,
        "model": model,
        "messages": [_message(message) for message in messages],
        "params": {
            name: _plain(value) for name, value in params.items() if value is not None and name not in NOT_DECIDING
        },
    }
    return hashlib.sha256(_canonical(question)).hexdigest()


def _message(message: ChatMessage | WireMessage) -> Json:
    out: Json = {"role": message.role}
    if message.content:
        content = message.content
        out["content"] = content if isinstance(content, str) else _plain(content)
    if message.name:
        out["name"] = message.name
    if message.tool_calls:
        out["tool_calls"] = _plain(message.tool_calls)
    if message.tool_call_id:
        out["tool_call_id"] = message.tool_call_id
    return out


def _plain(value: Any) -> Any:
    """JSON knows one kind of number: 1 and 1.0 are the same question."""
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) <= _EXACT else value
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value


def epoch_of(request: ChatRequest) -> int | None:
    """From `meta`; None where it says none. Raises InvalidArgument."""
    text = request.meta.get(EPOCH)
    if text is None:
        return None
    epoch = _epoch(request.meta)
    if epoch is None:
        raise InvalidArgument(f"meta.{EPOCH}={text[:40]!r} is no number from 1")
    return epoch


def _epoch(meta: Mapping[str, str]) -> int | None:
    text = meta.get(EPOCH, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 15 and int(text) else None


class _Line(InferResponse, frozen=True, omit_defaults=True):
    """A question and its answer together."""

    messages: list[WireMessage] = field(default_factory=list)
    params: dict[str, Any] = field(default_factory=dict)


_line = msgspec.json.Decoder(_Line)
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_asked = msgspec.json.Decoder(InferRequest)
_answered = msgspec.json.Decoder(InferResponse)
_store = msgspec.json.Encoder().encode

_SCHEMA = """
PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA cache_size=-4000;
CREATE TABLE answer (key BLOB, at INTEGER, epoch INTEGER, id TEXT, answer BLOB, PRIMARY KEY (key, at)) WITHOUT ROWID;
CREATE TABLE waiting (id TEXT PRIMARY KEY, epoch INTEGER, question BLOB) WITHOUT ROWID;
"""


class Recordings:
    """For one thread. `close` it, or use it with `with`."""

    def __init__(self) -> None:
        self.answers = 0
        self.passed_over = 0
        """Answers that named no question, and whose request was not among what was read before them."""
        # "" is a file of SQLite's own that is gone when it is closed; its cache is small, the rest on disk
        self._db = sqlite3.connect("", isolation_level=None)
        self._db.executescript(_SCHEMA)
        self._handed: dict[bytes, int] = {}
        """Of questions with several answers: which was handed out last."""

    @classmethod
    def from_file(cls, path: Path) -> Recordings:
        """Raises NotFound, InvalidArgument with file and line."""
        recordings = cls()
        try:
            recordings.read_file(path)
        except BaseException:
            recordings.close()
            raise
        return recordings

    @classmethod
    async def from_stream(
        cls, broker: Broker, stream: str = "infer", *, after: int | None = None, to: int | None = None
    ) -> Recordings:
        """What lies behind the position `after` (None: from the first kept), up to the end as it is now or to `to`."""
        recordings = cls()
        try:
            await recordings.read_stream(broker, stream, after=after, to=to)
        except BaseException:
            recordings.close()
            raise
        return recordings

    def read_file(self, path: Path) -> None:
        """Add what a file holds."""
        number = 0
        try:
            with path.open("rb") as file, self._adding():
                while line := file.readline(LINE_BYTES_MAX + 2):
                    number += 1
                    if line.strip():
                        self._take_line(line, f"{path}:{number}")
        except FileNotFoundError as exc:
            raise NotFound(f"no file {path}") from exc
        except OSError as exc:
            raise InvalidArgument(f"{path}: cannot be read: {exc.strerror}") from exc
        except MistError as exc:
            raise InvalidArgument(f"{path}:{number}: no recorded answer: {exc.message}", hint=exc.hint) from exc

    async def read_stream(
        self, broker: Broker, stream: str = "infer", *, after: int | None = None, to: int | None = None
    ) -> int:
        """Add what a stream holds; the position behind it. Raises as `Client.replay`: nothing is skipped unseen."""
        async with Client(broker) as client:
            reader = client.replay(stream, after=after, to=to, subjects=SUBJECTS)
            while (page := await reader.load(wait_s=0)) is not None:
                with self._adding():
                    for received in reader.hand(page):
                        self.take(received.envelope)
            return reader.position

    def take(self, envelope: Envelope) -> None:
        """Add an envelope; types that are none of ours are passed over. Raises Malformed."""
        if envelope.type == INFER_REQUEST:
            asked = envelope.decode(InferRequest)
            self._db.execute(
                "INSERT OR REPLACE INTO waiting VALUES (?, ?, ?)",
                (envelope.id, _epoch(asked.meta), bytes(envelope.payload)),
            )
        elif envelope.type == INFER_RESPONSE:
            answer = envelope.decode(InferResponse)
            if answer.error_code:  # a question that failed has no answer to give again
                self.passed_over += 1
                return
            row = self._db.execute(
                "SELECT epoch, question FROM waiting WHERE id = ?", (envelope.correlation_id,)
            ).fetchone()
            keys = [answer.request_key] if answer.request_key else _keys(row, answer)
            if not keys:
                self.passed_over += 1
            for key in keys:
                self.add(key, answer, id=envelope.id, epoch=row[0] if row is not None else None)

    def add(self, key: str, answer: InferResponse, *, id: str = "", epoch: int | None = None) -> None:
        """One more answer to a question, of that epoch; without one, of the next. One with an `id` that the question has
        already is passed over."""
        raw = _raw(key)
        last, known = self._db.execute(
            "SELECT max(at), max(id = ? AND id != '') FROM answer WHERE key = ?", (id, raw)
        ).fetchone()
        if not known:
            at = (last or 0) + 1
            self._db.execute("INSERT INTO answer VALUES (?, ?, ?, ?, ?)", (raw, at, epoch or at, id, _store(answer)))
            self.answers += 1

    def count(self, key: str) -> int:
        """How many answers a question has."""
        return self._count(_raw(key))

    def find(self, key: str, *, epoch: int | None = None) -> Reply | None:
        """The first answer recorded for that epoch, None where there is none. Without an epoch the answers are handed out in
        the order they were recorded, the next one each time the question is asked here, and begin anew after the last."""
        raw = _raw(key)
        if epoch is not None:
            found = "SELECT answer FROM answer WHERE key = ? AND epoch = ? ORDER BY at LIMIT 1"
            row = self._db.execute(found, (raw, epoch)).fetchone()
        else:
            at, count = 1, self._count(raw)
            if count > 1:
                at = self._handed[raw] = self._handed.get(raw, 0) % count + 1
            row = self._db.execute("SELECT answer FROM answer WHERE key = ? AND at = ?", (raw, at)).fetchone()
        return None if row is None else _reply(_answered.decode(row[0]))

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def _count(self, raw: bytes) -> int:
        count: int = self._db.execute("SELECT count(*) FROM answer WHERE key = ?", (raw,)).fetchone()[0]
        return count

    @contextlib.contextmanager
    def _adding(self) -> Iterator[None]:
        """Many at once, in one transaction."""
        self._db.execute("BEGIN")
        try:
            yield
        finally:
            self._db.execute("COMMIT")

    def _take_line(self, line: bytes, id: str) -> None:
        if len(line) > LINE_BYTES_MAX + 1:
            raise InvalidArgument(f"the line is longer than {LINE_BYTES_MAX} bytes")
        try:
            fields = _fields.decode(line)
            if "payload" in fields:
                self.take(decode_foreign(line.strip()))
                return
            answer = _line.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise InvalidArgument(str(exc)) from exc
        key = answer.request_key
        if not key:
            if not answer.model or not answer.messages or "content" not in fields:
                raise InvalidArgument("model, messages and content are wanted, or an envelope")
            key = question_key(answer.model, answer.messages, answer.params)
        self.add(key, InferResponse(*(getattr(answer, name) for name in InferResponse.__struct_fields__)), id=id)


def _keys(waiting: tuple[int | None, bytes] | None, answer: InferResponse) -> list[str]:
    """Of the question that waits. The model it was asked of and the one that answered may have two names."""
    if waiting is None:
        return []
    asked = _asked.decode(waiting[1])
    models = dict.fromkeys(model for model in (asked.model, answer.model) if model not in ("", "auto"))
    return [question_key(model, asked.messages or (), asked.params) for model in models]


async def read_recordings(place: str, *, cursor: str = "") -> Recordings:
    """Recordings from where a setting says: a file, or a broker's URL with `?stream=NAME` (else `infer`). For a stream
    `cursor` says where they begin: behind that sequence, or where the cursor of that name stands; empty is the first kept
    record. Raises NotFound where there is nothing to answer with: that is a mistake, not a recording."""
    if not has_scheme(place) or place.startswith("file:"):
        if cursor:
            raise InvalidArgument(f"cursor={cursor!r} is for a stream, {place} is a file")
        recordings = Recordings.from_file(Path(parse_url(place).target if has_scheme(place) else place))
    else:
        url = parse_url(place)
        stream = url.get("stream", "infer")
        bare = Url(url.scheme, url.target, tuple(pair for pair in url.query if pair[0] != "stream"))
        broker = await connect(bare)
        try:
            after = await _position(broker, stream, cursor)
            recordings = await Recordings.from_stream(broker, stream, after=after)
        finally:
            await broker.aclose()
    if not recordings.answers:
        recordings.close()
        raise NotFound(f"{redact(place)} holds no recorded answer" + (f" behind {cursor}" if cursor else ""))
    return recordings


async def _position(broker: Broker, stream: str, cursor: str) -> int | None:
    if not cursor:
        return None
    if cursor.isascii() and cursor.isdigit():
        return int(cursor)
    checkpoint = await broker.checkpoints.load(stream, cursor)
    if checkpoint is None:
        raise NotFound(f"stream {stream}: no cursor is called {cursor[:80]!r}")
    if checkpoint.incarnation != (await (await broker.open(stream, create=False)).info()).incarnation:
        raise WrongIncarnation(f"cursor {cursor}: stream {stream} was deleted and made again since it was saved")
    return checkpoint.sequence


def _raw(key: str) -> bytes:
    try:
        raw = bytes.fromhex(key)
    except ValueError:
        raw = b""
    if len(raw) != 32:
        raise InvalidArgument(f"{key[:80]!r} is no key of a question: 64 hex digits")
    return raw


def _reply(answer: InferResponse) -> Reply:
    return Reply(
        content=answer.content,
        model=answer.answered_by or answer.model,
        finish_reason=answer.finish_reason or "stop",
        tool_calls=answer.tool_calls,
        refusal=answer.refusal,
        usage=Usage(
            tokens_in=answer.tokens_in, tokens_out=answer.tokens_out, cached=answer.tokens_cached,
            reasoning=answer.tokens_reasoning,
        ),
        cost_usd=0.0,
        id=answer.request_id,
    )  # fmt: skip
