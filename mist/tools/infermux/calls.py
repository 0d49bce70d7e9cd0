"""One call, whatever door it came through: recorded as it begins, routed, recorded as it ends.

Promises: every call that begins ends in the record, also when it fails or its caller leaves; the record never delays it: what is
recorded is made in the next turn of the loop, when the question and the answer are out (recorder.py stores it). A call runs in its caller's trace, or begins one; what is asked of a provider carries the call's own span as
`traceparent`.

Does not: retry, choose or pay; that is the router's.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeVar

import msgspec

from mist.errors import MistError
from mist.kit.metrics import Metrics
from mist.protocol.envelope import Envelope
from mist.protocol.ids import new_id
from mist.protocol.payloads import InferResponse
from mist.protocol.tracecontext import TraceContext, new_trace, parse_traceparent
from mist.tools.infermux.chat import Caller, ChatRequest, Chunk, Json
from mist.tools.infermux.envelopes import code_of, error_payload, response_payload, span_of
from mist.tools.infermux.recorder import Recorder
from mist.tools.infermux.routed import Routed, RoutedEmbeddings, Way

if TYPE_CHECKING:
    from mist.tools.infermux.router import Router

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Left(MistError):
    """The caller went away. Recorded, never sent."""

    code = "cancelled"


class Call:
    """A call under way: its request with id and trace, and what becomes of it."""

    __slots__ = ("began_ns", "here", "parent_id", "recorded", "request", "start_ns", "stream", "ttft_ns")

    def __init__(self, request: ChatRequest, recorded: Recording, clock: int, perf: int, stream: bool) -> None:
        above = parse_traceparent(request.traceparent) if request.traceparent else None
        self.here: TraceContext = above.child() if above is not None else new_trace()
        self.parent_id = above.span_id if above is not None else ""
        self.request = msgspec.structs.replace(request, id=request.id or new_id(), traceparent=str(self.here))
        self.recorded = recorded
        self.start_ns = clock
        self.began_ns = perf
        self.ttft_ns: int | None = None
        self.stream = stream


class Recording(msgspec.Struct, frozen=True, kw_only=True):
    """What of a call is somebody else's to record: its request lies on the stream already, its answer will."""

    request: bool = True
    started: bool = True
    response: bool = True
    asked: Envelope | None = None
    """The envelope the question came as."""


ALL = Recording()
SPAN = Recording(request=False, started=False, response=False)
W = TypeVar("W", bound=Way)


class Streaming:
    """A call whose answer comes in pieces. `known()` is its way, and what is known of the answer so far."""

    def __init__(self, request: ChatRequest, chunks: AsyncIterator[Chunk], known: Callable[[], Routed]) -> None:
        self.request = request
        self.chunks = chunks
        self.known = known


class Calls:
    """The one way to the router. Counters are of this process."""

    def __init__(
        self,
        router: Router,
        recorder: Recorder | None = None,
        *,
        metrics: Metrics | None = None,
        clock: Callable[[], int] = time.time_ns,
        perf: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        self.router = router
        self.recorder = recorder or Recorder()
        self.under_way = 0
        self.requests = 0
        self._clock = clock
        self._perf = perf
        self._since_ns = perf()
        self._records: list[Callable[[], None]] = []
        self._minute: deque[list[int]] = deque(maxlen=60)
        """Of the last seconds with calls: [second, calls, failures]."""
        metrics = metrics or Metrics()
        self._total = metrics.counter("infermux_requests_total", "Calls.", ("provider", "model", "status"))
        self._seconds = metrics.histogram(
            "infermux_latency_seconds", "Of whole calls.", ("provider", "model"), bounds=SECONDS
        )
        self._cost = metrics.counter("infermux_cost_usd_total", "Known costs.", ("provider", "model"))
        self._unpriced = metrics.counter(
            "infermux_unpriced_total", "Answers whose cost is not known.", ("provider", "model")
        )

    async def complete(self, request: ChatRequest, recording: Recording = ALL) -> tuple[ChatRequest, Routed]:
        """The request as it was asked (with its id), and what the router made of it. Raises what the router raises."""
        call = self._begin(request, recording, stream=False)
        return call.request, await self._ended(call, self.router.complete(call.request))

    async def embed(
        self, model: str, texts: Sequence[str], params: Json, caller: Caller, traceparent: str = ""
    ) -> RoutedEmbeddings:
        """Of the record it gets the span alone: vectors are not for replay."""
        request = ChatRequest(model=model, messages=(), caller=caller, traceparent=traceparent)
        call = self._begin(request, SPAN, stream=False)
        return await self._ended(call, self.router.embed(model, texts, params, caller, id=call.request.id))

    async def _ended(self, call: Call, work: Awaitable[W]) -> W:
        try:
            found = await work
        except MistError as exc:
            self._end(call, None, exc)
            raise
        except asyncio.CancelledError:
            self._end(call, None, Left("the caller left before the answer"))
            raise
        except BaseException as exc:
            self._end(call, None, _bug(exc))
            raise
        self._end(call, found, None)
        return found

    @asynccontextmanager
    async def streaming(self, request: ChatRequest, recording: Recording = ALL) -> AsyncIterator[Streaming]:
        """As the router's; leaving the block early ends the call upstream, and records what was answered by then."""
        call = self._begin(request, recording, stream=True)
        error: MistError | None = None
        known: Callable[[], Routed] | None = None
        try:
            async with self.router.streaming(call.request) as routing:
                call.ttft_ns = self._perf() - call.began_ns  # the router has the first piece
                known = routing.routed
                yield Streaming(call.request, routing.chunks, known)
        except MistError as exc:
            error = exc
            raise
        except (asyncio.CancelledError, GeneratorExit):
            error = Left("the caller left in the middle of the answer")
            raise
        except BaseException as exc:
            error = _bug(exc)
            raise
        finally:
            if known is None and error is None:
                error = Left("the stream was left before it began")
            self._end(call, known() if known is not None else None, error)

    # the record

    def _begin(self, request: ChatRequest, recording: Recording, *, stream: bool) -> Call:
        call = Call(request, recording, self._clock(), self._perf(), stream)
        self.under_way += 1
        if recording.request or recording.started:
            self._later(lambda: self._record_begin(call))
        return call

    def _record_begin(self, call: Call) -> None:
        if call.recorded.request:
            self.recorder.request(call.request, call.recorded.asked)
        if call.recorded.started:
            self.recorder.started(call.request, stream=call.stream)

    def _later(self, record: Callable[[], None]) -> None:
        """In the next turn of the loop, in order: whoever waits for the answer does not wait for this."""
        self._records.append(record)
        if len(self._records) == 1:
            asyncio.get_running_loop().call_soon(self._record)

    def _record(self) -> None:
        records, self._records = self._records, []
        for record in records:
            try:
                record()
            except Exception:  # the call is answered, and the records behind this one are none of its business
                self.recorder.failed()

    def _end(self, call: Call, way: Way | None, error: MistError | None) -> None:
        took_ns = self._perf() - call.began_ns
        end_ns = call.start_ns + took_ns
        self.under_way -= 1
        self.requests += 1
        second = end_ns // 1_000_000_000
        if not self._minute or self._minute[-1][0] != second:
            self._minute.append([second, 0, 0])
        self._minute[-1][1] += 1
        self._minute[-1][2] += error is not None
        self._later(lambda: self._record_end(call, way, error, took_ns))

    def _record_end(self, call: Call, way: Way | None, error: MistError | None, took_ns: int) -> None:
        request, recorder = call.request, self.recorder
        if call.recorded.response:
            routed = way if isinstance(way, Routed) else None
            recorder.response(request, self._answer(request, routed, error, took_ns))
        span = span_of(
            request, here=call.here, parent_id=call.parent_id, start_ns=call.start_ns, end_ns=call.start_ns + took_ns,
            way=way, error=error, ttft_ns=call.ttft_ns, stream=call.stream,
        )  # fmt: skip
        recorder.span(request, span)
        provider = model = ""
        if way is not None:
            provider, model = way.provider, way.model
            if way.cost_usd is None:
                self._unpriced.add(provider=provider, model=model)
            else:
                self._cost.add(way.cost_usd, provider=provider, model=model)
        elif error is not None:
            provider = error.meta.get("provider", "")
        self._total.add(provider=provider, model=model, status=code_of(error) if error is not None else "ok")
        self._seconds.observe(took_ns / 1e9, provider=provider, model=model)

    def _answer(
        self, request: ChatRequest, routed: Routed | None, error: MistError | None, took_ns: int = 0
    ) -> InferResponse:
        """The answer as it is recorded. What came of a stream that broke is kept, and is no answer to replay."""
        capture = self.recorder.capture
        if error is None and routed is not None:
            return response_payload(request, routed, capture)
        assert error is not None  # noqa: S101 - a call ends with one of the two
        failed = error_payload(request, error, took_ns)
        if routed is None:
            return failed
        partly = response_payload(request, routed, capture)
        return msgspec.structs.replace(
            partly, finish_reason=failed.finish_reason, error=failed.error, error_code=failed.error_code,
            request_key="", latency_ms=failed.latency_ms,
        )  # fmt: skip

    def uptime_s(self) -> float:
        return (self._perf() - self._since_ns) / 1e9

    def last_minute(self) -> tuple[int, int]:
        """Calls that ended in the last 60 seconds, and how many of them failed."""
        since = self._clock() // 1_000_000_000 - 60
        recent = [entry for entry in self._minute if entry[0] > since]
        return sum(e[1] for e in recent), sum(e[2] for e in recent)


def _bug(exc: BaseException) -> MistError:
    error = MistError(f"the router failed: {type(exc).__name__}")
    error.__cause__ = exc
    return error
