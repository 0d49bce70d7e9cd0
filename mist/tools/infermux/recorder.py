"""Calls as envelopes: questions and answers into one stream, spans into another, and never at a caller's expense.

Promises: nothing here is awaited by a call, and nothing raises into one; what waits to be stored is bounded in count and in
bytes, and what does not fit is dropped and counted by its reason; what was taken is appended in batches, in order, again
with the same ids where its fate is unknown, until the publisher's patience ends (mist/broker/publisher.py): then it is counted
too. Streams that hang, are slow, full or gone cost records, never answers. `aclose` stores what waits within its deadline,
counts the rest and says so.

Does not: survive its process. Between a call and its record lie `LINGER_S` and an append; a kill takes what is in between.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable

import msgspec
from msgspec import Struct, field

from mist.broker.base import Message, Stream
from mist.broker.publisher import Publisher
from mist.errors import Ambiguous, Closed, MistError, Overloaded, TimedOut
from mist.protocol.codec import encode
from mist.protocol.envelope import Envelope
from mist.protocol.ids import new_id
from mist.protocol.payloads import INFER_REQUEST, INFER_RESPONSE, TRACE_SPAN, InferResponse, TraceSpan
from mist.protocol.subject import subject_for
from mist.protocol.version import CURRENT
from mist.tools.infermux.chat import ChatRequest
from mist.tools.infermux.envelopes import INFER_STARTED, SOURCE, InferStarted, request_payload
from mist.tools.infermux.settings import Capture

_log = logging.getLogger("mist.tools.infermux.recorder")

VERSION = str(CURRENT)
SPANS = subject_for(TRACE_SPAN, SOURCE)
PENDING_MAX = 10_000
PENDING_BYTES_MAX = 32 * 1024 * 1024
"""For each of the two streams."""
LINGER_S = 0.1
"""How long a record waits for others to share its append."""
DRAIN_S = 5.0
Say = Callable[[str], None]


class _Record(Struct, frozen=True, omit_defaults=True, kw_only=True, gc=False):
    """An envelope on its way out, its payload not yet encoded. Keys as in mist/protocol/envelope.py."""

    version: str = field(default_factory=lambda: VERSION)  # a default would be left out
    id: str
    source: str = field(default_factory=lambda: SOURCE)
    type: str
    timestamp_ns: int
    payload: Struct
    correlation_id: str = ""
    causation_id: str = ""
    traceparent: str = ""
    tenant: str = ""


_encode = msgspec.json.Encoder(order="deterministic").encode


class Recorded(Struct, frozen=True):
    """`dropped` counts by reason: `full` (no room), `closed`, `too_large`, `failed` (a bug), `undelivered` (left at the end), or the code of the
    error that the stream ended its patience with."""

    stored: int
    pending: int
    dropped: dict[str, int]


class Recorder:
    """`infer` gets questions and answers, `trace` spans; None is nowhere. `capture` says how much of texts is kept."""

    def __init__(
        self,
        infer: Stream | None = None,
        trace: Stream | None = None,
        *,
        capture: Capture = "full",
        pending_max: int = PENDING_MAX,
        pending_bytes_max: int = PENDING_BYTES_MAX,
        linger_s: float = LINGER_S,
        say: Say = lambda _text: None,
    ) -> None:
        self.capture: Capture = capture
        self.dropped: Counter[str] = Counter()
        self._say = say
        self._told: set[str] = set()
        self._closing = False
        self._infer, self._trace = [
            Publisher(
                stream, pending_max=pending_max, pending_bytes_max=pending_bytes_max, linger_s=linger_s,
                on_error=self._failed,
            ) if stream is not None else None
            for stream in (infer, trace)
        ]  # fmt: skip

    def request(self, request: ChatRequest, asked: Envelope | None = None) -> None:
        """A question; `asked` is the envelope it came as, which is recorded under its own id."""
        if self._infer is None:
            return
        if asked is not None and self.capture == "full":
            self._put(self._infer, INFER_REQUEST, asked.id, encode(asked))
        else:
            payload = request_payload(request, self.capture)
            self._put(
                self._infer, INFER_REQUEST, request.id,
                _encode(
                    _Record(
                        id=request.id, type=INFER_REQUEST, timestamp_ns=time.time_ns(), payload=payload,
                        traceparent=request.traceparent, tenant=request.tenant,
                    )
                ),
            )  # fmt: skip

    def started(self, request: ChatRequest, *, stream: bool = False) -> None:
        if self._infer is not None:
            self._answer(self._infer, INFER_STARTED, request, InferStarted(request.model, stream, request.caller.key))

    def response(self, request: ChatRequest, payload: InferResponse) -> None:
        """An answer, made with this recorder's `capture`."""
        if self._infer is not None:
            self._answer(self._infer, INFER_RESPONSE, request, payload)

    def span(self, request: ChatRequest, span: TraceSpan) -> None:
        if self._trace is not None:
            self._answer(self._trace, TRACE_SPAN, request, span, SPANS)

    def failed(self) -> None:
        """A record could not be made at all, for the exception that is being handled."""
        _log.exception("a record could not be made")
        self._drop("failed")

    def _answer(
        self, publisher: Publisher, type: str, request: ChatRequest, payload: Struct, subject: str = ""
    ) -> None:
        """What follows from a question. One encoding; `Envelope.new` and `to_message` would make three objects of it."""
        id = new_id()
        record = _Record(
            id=id, type=type, timestamp_ns=time.time_ns(), payload=payload, correlation_id=request.id,
            causation_id=request.id, traceparent=request.traceparent, tenant=request.tenant,
        )  # fmt: skip
        self._put(publisher, subject or type, id, _encode(record))

    def _put(self, publisher: Publisher, subject: str, id: str, data: bytes) -> None:
        try:
            publisher.send_nowait(Message(subject, data, id))
        except Overloaded:
            self._drop("full")
        except Closed:
            self._drop("closed")
        except MistError as exc:
            self._drop(exc.code)

    def _failed(self, message: Message, error: MistError) -> None:
        if self._closing and isinstance(error, Ambiguous | Closed):
            self._drop("undelivered")
        else:
            cause = error.__cause__ if isinstance(error, Ambiguous) else None
            self._drop(cause.code if isinstance(cause, MistError) else error.code)

    def _drop(self, reason: str) -> None:
        self.dropped[reason] += 1
        if reason not in self._told:  # once: the counter tells the rest
            self._told.add(reason)
            self._say(f"records are dropped: {reason}; calls go on")

    @property
    def stats(self) -> Recorded:
        ours = [p for p in (self._infer, self._trace) if p is not None]
        return Recorded(sum(p.stored for p in ours), sum(p.pending for p in ours), dict(self.dropped))

    async def aclose(self, drain_s: float = DRAIN_S) -> None:
        """Store what waits, `drain_s` at most; count what is left. Idempotent. Raises nothing."""
        await asyncio.sleep(0)  # the records of calls that have just ended come in this turn
        self._closing = True
        before = self.dropped.total()
        await asyncio.gather(*[_drained(p, drain_s) for p in (self._infer, self._trace) if p is not None])
        lost = self.dropped.total() - before
        if lost:
            self._say(f"{lost} records could not be stored within {drain_s:g} s and are lost")


async def _drained(publisher: Publisher, drain_s: float) -> None:
    try:
        await publisher.drain(timeout_s=drain_s)
    except TimedOut:
        return  # its messages were reported one by one
    except MistError:
        return  # as these were
