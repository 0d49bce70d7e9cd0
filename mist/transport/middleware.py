"""Wrappers around a transport: retry, circuit breaker, tracing, metrics. Each is a transport, so they nest:

    Retrying(Breaking(await dial(url), Breaker("peer")), RetryPolicy(attempts_max=5))

Promises: a wrapper changes nothing but what it is for; positions, `ack` and every other attribute of the inner transport
are reached through it. Errors stay the inner one's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any, TypeVar

from msgspec.structs import replace

from mist.errors import EndOfStream, MistError
from mist.kit.breaker import Breaker
from mist.kit.metrics import Metrics
from mist.kit.retry import RetryPolicy, retry
from mist.protocol.envelope import Envelope
from mist.protocol.payloads import TRACE_ALERT, TRACE_SPAN, TraceSpan
from mist.protocol.tracecontext import TraceContext, new_trace, parse_traceparent
from mist.transport.base import RECEIVE_LIMIT, Transport

T = TypeVar("T")
_log = logging.getLogger("mist.transport.middleware")


class Wrapper(Transport):
    """Passes everything through. Subclass it and override what you need."""

    def __init__(self, inner: Transport) -> None:
        self.inner = inner
        self.url = inner.url
        self.size_bytes_max = inner.size_bytes_max

    async def send(self, envelope: Envelope) -> None:
        await self.inner.send(envelope)

    async def send_many(self, envelopes: Sequence[Envelope]) -> None:
        await self.inner.send_many(envelopes)

    async def receive(self) -> Envelope:
        return await self.inner.receive()

    async def receive_many(self, limit: int = RECEIVE_LIMIT, wait_s: float | None = None) -> list[Envelope]:
        return await self.inner.receive_many(limit, wait_s)

    async def ack(self) -> int:
        return await self.inner.ack()

    async def close(self) -> None:
        await self.inner.close()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.inner.__aexit__(exc_type, exc, tb)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)


class Retrying(Wrapper):
    """Sends again what failed and can be repeated. Receiving is not retried: it takes from where it stands anyway.

    A send whose fate is unknown (Ambiguous) is repeated too; a broker knows the ids, a file or a Go peer does not and
    may then hold it twice: pass `classify` to leave that out. `send_many` repeats the whole batch.
    """

    def __init__(self, inner: Transport, policy: RetryPolicy | None = None, **options: Any) -> None:
        super().__init__(inner)
        self._policy = policy or RetryPolicy()
        self._options = options

    async def send(self, envelope: Envelope) -> None:
        await retry(lambda: self.inner.send(envelope), self._policy, **self._options)

    async def send_many(self, envelopes: Sequence[Envelope]) -> None:
        await retry(lambda: self.inner.send_many(envelopes), self._policy, **self._options)


class Breaking(Wrapper):
    """Sends through a breaker, which may be shared by the transports to one peer."""

    def __init__(self, inner: Transport, breaker: Breaker | None = None) -> None:
        super().__init__(inner)
        self.breaker = breaker or Breaker(inner.url)

    async def send(self, envelope: Envelope) -> None:
        await self.breaker.call(lambda: self.inner.send(envelope))

    async def send_many(self, envelopes: Sequence[Envelope]) -> None:
        await self.breaker.call(lambda: self.inner.send_many(envelopes))


class Tracing(Wrapper):
    """Makes each send a span: the envelope leaves with a child of its `traceparent`, and the span goes to `export` as a
    `trace.span` envelope when the send is over.

    Envelopes without a traceparent pass as they are, or begin a trace with `roots=True`; spans and alerts are never
    traced themselves. A trace that is not sampled stays so and exports nothing. An export that fails does not fail the
    send: it is counted in `export_failures` and logged.
    """

    def __init__(
        self, inner: Transport, export: Callable[[Envelope], Awaitable[None]], *, source: str, roots: bool = False
    ) -> None:
        super().__init__(inner)
        self.export_failures = 0
        self._export = export
        self._source = source
        self._roots = roots

    async def send(self, envelope: Envelope) -> None:
        await self._traced((envelope,), single=True)

    async def send_many(self, envelopes: Sequence[Envelope]) -> None:
        await self._traced(envelopes, single=False)

    async def _traced(self, envelopes: Sequence[Envelope], *, single: bool) -> None:
        spans: list[tuple[Envelope, str, TraceContext]] = []
        out: list[Envelope] = []
        for envelope in envelopes:
            parent = self._parent(envelope)
            if parent is None:
                out.append(envelope)
                continue
            context, parent_id = parent
            out.append(replace(envelope, traceparent=str(context)))
            if context.flags & 1:
                spans.append((envelope, parent_id, context))
        start_ns = time.time_ns()
        began = time.monotonic_ns()
        error = ""
        try:
            if single:
                await self.inner.send(out[0])
            else:
                await self.inner.send_many(out)
        except BaseException as exc:
            error = f"{exc.code}: {exc.message}" if isinstance(exc, MistError) else type(exc).__name__
            raise
        finally:
            took = time.monotonic_ns() - began
            for envelope, parent_id, context in spans:
                await self._finish(envelope, parent_id, context, start_ns, took, error)

    def _parent(self, envelope: Envelope) -> tuple[TraceContext, str] | None:
        """The context this envelope leaves with, and the id of the span above ours ("" for a root)."""
        if envelope.type in (TRACE_SPAN, TRACE_ALERT):
            return None
        above = parse_traceparent(envelope.traceparent) if envelope.traceparent else None
        if above is not None:
            return above.child(), above.span_id
        return (new_trace(), "") if self._roots else None

    async def _finish(
        self, envelope: Envelope, parent_id: str, context: TraceContext, start_ns: int, took_ns: int, error: str
    ) -> None:
        attrs: dict[str, Any] = {
            "msg_type": envelope.type, "msg_source": envelope.source, "duration_ms": took_ns // 1_000_000,
        }  # fmt: skip
        if error:
            attrs["error"] = error
        span = TraceSpan(
            trace_id=context.trace_id, span_id=context.span_id, parent_id=parent_id, operation="transport.send",
            start_ns=start_ns, end_ns=start_ns + took_ns, status="error" if error else "ok", attrs=attrs,
        )  # fmt: skip
        try:
            await self._export(Envelope.new(TRACE_SPAN, span, source=self._source))
        except Exception:
            self.export_failures += 1
            _log.warning("a span could not be exported", exc_info=True)


class Counting(Wrapper):
    """Counts envelopes and errors, labelled with the scheme, and errors with their code: `transport_sent_total`,
    `transport_received_total`, `transport_send_errors_total`, `transport_receive_errors_total`, and how long sends take:
    `transport_send_seconds`.
    """

    def __init__(self, inner: Transport, metrics: Metrics | None = None) -> None:
        super().__init__(inner)
        self.metrics = metrics or Metrics()
        self._scheme = inner.url.partition(":")[0]
        by_scheme, by_code = ("scheme",), ("scheme", "code")
        self._sent = self.metrics.counter("transport_sent_total", "Envelopes sent.", by_scheme)
        self._received = self.metrics.counter("transport_received_total", "Envelopes received.", by_scheme)
        self._send_errors = self.metrics.counter("transport_send_errors_total", "Sends that failed.", by_code)
        self._receive_errors = self.metrics.counter("transport_receive_errors_total", "Receives that failed.", by_code)
        self._seconds = self.metrics.histogram("transport_send_seconds", "Time of a send that worked.", by_scheme)

    async def send(self, envelope: Envelope) -> None:
        await self._send(lambda: self.inner.send(envelope), 1)

    async def send_many(self, envelopes: Sequence[Envelope]) -> None:
        await self._send(lambda: self.inner.send_many(envelopes), len(envelopes))

    async def _send(self, call: Callable[[], Awaitable[None]], count: int) -> None:
        began = time.monotonic()
        try:
            await call()
        except Exception as exc:
            self._send_errors.add(scheme=self._scheme, code=_code(exc))
            raise
        self._sent.add(count, scheme=self._scheme)
        self._seconds.observe(time.monotonic() - began, scheme=self._scheme)

    async def receive(self) -> Envelope:
        envelope = await self._receive(self.inner.receive)
        self._received.add(scheme=self._scheme)
        return envelope

    async def receive_many(self, limit: int = RECEIVE_LIMIT, wait_s: float | None = None) -> list[Envelope]:
        envelopes = await self._receive(lambda: self.inner.receive_many(limit, wait_s))
        self._received.add(len(envelopes), scheme=self._scheme)
        return envelopes

    async def _receive(self, call: Callable[[], Awaitable[T]]) -> T:
        try:
            return await call()
        except EndOfStream:
            raise
        except Exception as exc:
            self._receive_errors.add(scheme=self._scheme, code=_code(exc))
            raise


def _code(error: Exception) -> str:
    return error.code if isinstance(error, MistError) else "foreign"
