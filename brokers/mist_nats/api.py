"""Requests to JetStream's API: what is asked and answered as Structs, its errors as `ApiError`, translated in one place."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

import msgspec
from msgspec import Struct, field

from mist.errors import Closed, InvalidArgument, MistError, NotAuthorised, StorageFull, TimedOut, Unavailable
from mist_nats import wire
from mist_nats.link import CALL_S, Link, Lost

T = TypeVar("T")

STREAM_NOT_FOUND = 10059
CONSUMER_NOT_FOUND = 10014
STREAM_EXISTS = 10058
CONSUMER_EXISTS = frozenset({10013, 10148, 10105})
WRONG_LAST = frozenset({10071, 10164})
WRONG_LAST_ID = frozenset({10070})
DUPLICATE_IN_BATCH = 10201
FULL = frozenset({10023, 10047, 10077, 10028, 10027, 10026})
"""Insufficient resources, storage or memory of the server or account, and what the store itself says."""
NO_JETSTREAM = frozenset({10039, 10076})
BUSY = frozenset({10007, 10008, 10009})
RESET_BELOW_START = 10204
NO_MESSAGE = frozenset({10037, 10043})
"""No message with that sequence."""
DELETE_FAILED = 10057


class ApiError(Exception):
    """An error as the server states it. Never leaves this package: `translated` makes ours of it."""

    def __init__(self, code: int, err_code: int, description: str) -> None:
        super().__init__(description)
        self.code = code
        self.err_code = err_code
        self.description = description


class NoAnswer(Exception):
    """Nobody listens on that subject (503)."""


class Error(Struct):
    code: int = 0
    err_code: int = 0
    description: str = ""


class Answer(Struct):
    """The part that every answer may have."""

    error: Error | None = None


class State(Struct):
    messages: int = 0
    bytes: int = 0
    first_seq: int = 0
    last_seq: int = 0
    num_deleted: int = 0
    subjects: dict[str, int] = field(default_factory=dict)


class StreamConf(Struct):
    """The settings we look at; others of a foreign stream are not read."""

    name: str = ""
    subjects: list[str] = field(default_factory=list)
    retention: str = "limits"
    storage: str = "file"
    discard: str = "old"
    max_msgs: int = -1
    max_bytes: int = -1
    max_age: int = 0
    max_msg_size: int = -1
    num_replicas: int = 1
    duplicate_window: int = 0
    allow_direct: bool = False
    allow_atomic: bool = False
    sealed: bool = False
    description: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    mirror: Any = None
    persist_mode: str = ""


class Cluster(Struct):
    name: str = ""
    leader: str = ""


class StreamInfo(Struct):
    config: StreamConf
    state: State
    created: str = ""
    cluster: Cluster | None = None


class Position(Struct):
    consumer_seq: int = 0
    stream_seq: int = 0


class ConsumerConf(Struct):
    name: str = ""
    durable_name: str = ""
    deliver_policy: str = "all"
    opt_start_seq: int = 0
    ack_policy: str = "explicit"
    ack_wait: int = 30_000_000_000
    max_deliver: int = -1
    max_ack_pending: int = 0
    filter_subject: str = ""
    filter_subjects: list[str] = field(default_factory=list)
    deliver_subject: str = ""
    description: str = ""
    metadata: dict[str, str] = field(default_factory=dict)


class ConsumerInfo(Struct):
    name: str
    config: ConsumerConf
    delivered: Position
    ack_floor: Position
    num_ack_pending: int = 0
    num_redelivered: int = 0
    num_pending: int = 0
    created: str = ""
    paused: bool = False


class Names(Struct):
    streams: list[str] | None = None
    consumers: list[str] | None = None
    total: int = 0


class Purged(Struct):
    purged: int = 0


class Stored(Struct):
    """A message of STREAM.MSG.GET; data and header block are base64."""

    subject: str
    seq: int
    time: str
    data: bytes = b""
    hdrs: bytes = b""


class Got(Struct):
    message: Stored


class Ack(Struct):
    seq: int = 0
    duplicate: bool = False
    count: int = 0
    error: Error | None = None


_error = msgspec.json.Decoder(Answer).decode
ack_of = msgspec.json.Decoder(Ack).decode
_QUESTIONS = ("STREAM.INFO.", "STREAM.MSG.GET.", "STREAM.NAMES", "CONSUMER.INFO.", "CONSUMER.NAMES.")
"""What changes nothing."""
_RETRIES_S = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0)


class Api:
    """JetStream's API over one link."""

    def __init__(self, link: Link, domain: str) -> None:
        self.link = link
        self.prefix = f"$JS.{domain}.API." if domain else "$JS.API."

    def subject(self, what: str) -> bytes:
        return (self.prefix + what).encode()

    async def call(
        self,
        what: str,
        body: object = None,
        type: type[T] = Answer,  # type: ignore[assignment]
        *,
        patient: bool = True,
    ) -> T:
        """One request. Repeats nothing but what nobody was there to take (a cluster without a leader for a moment), when
        `patient`, and questions that are not answered. Raises ApiError and errors of mist.errors."""
        subject = self.subject(what)
        data = b"" if body is None else msgspec.json.encode(body)
        until = asyncio.get_running_loop().time() + CALL_S
        for pause_s in (*_RETRIES_S, None):
            try:
                header, answer = await self.ask(subject, data, until)
            except NoAnswer as exc:
                if pause_s is None or not patient:
                    raise Unavailable(
                        f"{self.link.name}: JetStream does not answer", hint="is it enabled there?"
                    ) from exc
                await asyncio.sleep(pause_s)
                continue
            del header
            error = _error(answer).error
            if error is None:
                return msgspec.json.decode(answer, type=type)
            if error.err_code in BUSY and pause_s is not None and patient:
                await asyncio.sleep(pause_s)
                continue
            raise ApiError(error.code, error.err_code, error.description)
        raise AssertionError("unreachable")

    async def ask(self, subject: bytes, data: bytes, until: float) -> tuple[bytes, bytes]:
        """Header block and data of the answer. Raises NoAnswer, and errors of mist.errors."""
        what = subject.decode().removeprefix(self.prefix)
        try:
            again = what.startswith(_QUESTIONS)
            frame = await self.link.request(lambda reply: wire.pub(subject, data, reply), until, again=again)
        except TimeoutError as exc:
            why = self.link.last_error
            if why is not None and "permissions violation" in str(why).lower():
                raise NotAuthorised(f"{self.link.name}: not permitted: {what}") from why
            raise TimedOut(f"{self.link.name}: no answer to {what} within {CALL_S:g} s") from exc
        except Lost as exc:
            if self.link.closed:
                raise Closed("the broker is closed") from exc
            raise Unavailable(f"{self.link.name}: the connection was lost during {what}") from exc
        if wire.status(frame[2]) == 503:
            raise NoAnswer(what)
        return frame[2], frame[3]


def translated(exc: ApiError, what: str) -> MistError:
    """Our error for the server's."""
    text = f"{what}: {exc.description} ({exc.err_code})"
    if exc.err_code in FULL:
        return StorageFull(text, hint="make room on the server, or raise the account's limits")
    if exc.err_code in NO_JETSTREAM:
        return Unavailable(text, hint="enable JetStream on the server, and for this account", retryable=False)
    if exc.code in (401, 403):
        return NotAuthorised(text)
    if exc.code == 400:
        return InvalidArgument(text)
    return Unavailable(text)
