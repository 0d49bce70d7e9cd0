"""Wrappers around transports."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from conftest import run

from mist.errors import CircuitOpen, EndOfStream, Malformed, Unavailable
from mist.kit.breaker import Breaker, BreakerPolicy
from mist.kit.metrics import Metrics
from mist.kit.retry import RetryPolicy
from mist.protocol.envelope import Envelope
from mist.protocol.payloads import TraceSpan
from mist.protocol.tracecontext import parse_traceparent
from mist.testing.transports import envelope
from mist.transport import dial, pair
from mist.transport.middleware import Breaking, Counting, Retrying, Tracing, Wrapper

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Flaky(Wrapper):
    """Fails the first sends."""

    def __init__(self, inner: object, failures: int, error: Exception) -> None:
        super().__init__(inner)  # type: ignore[arg-type]
        self.failures = failures
        self.error = error
        self.tries = 0

    async def send(self, envelope: Envelope) -> None:
        await self.send_many((envelope,))

    async def send_many(self, envelopes: Sequence[Envelope]) -> None:
        self.tries += 1
        if self.tries <= self.failures:
            raise self.error
        await self.inner.send_many(envelopes)


QUICK = RetryPolicy(attempts_max=3, wait_s=0)


def test_retrying() -> None:
    """Sends are repeated while that can help; permanent errors and the end are not."""

    async def case() -> None:
        a, b = pair()
        async with a, b:
            flaky = Flaky(a, 2, Unavailable("x"))
            await Retrying(flaky, QUICK).send(envelope(1))
            assert flaky.tries == 3
            flaky = Flaky(a, 2, Unavailable("x"))
            await Retrying(flaky, QUICK).send_many([envelope(2), envelope(3)])
            assert [e.data()["n"] for e in await b.receive_many()] == [1, 2, 3]
            for error in (Malformed("x"), Unavailable("x", retryable=False)):
                flaky = Flaky(a, 1, error)
                with pytest.raises(type(error)):
                    await Retrying(flaky, QUICK).send(envelope())
                assert flaky.tries == 1
            await b.close()
            with pytest.raises(EndOfStream):
                await Retrying(a, RetryPolicy(attempts_max=2, wait_s=0)).send(envelope())

    run(case())


def test_breaking() -> None:
    """A breaker shared by two transports opens for both, and is not opened by bad envelopes."""

    async def case() -> None:
        a, b = pair()
        async with a, b:
            breaker = Breaker("peer", BreakerPolicy(failures_max=2))
            bad = Breaking(Flaky(a, 9, Malformed("x")), breaker)
            for _ in range(3):
                with pytest.raises(Malformed):
                    await bad.send(envelope())
            broken = Breaking(Flaky(a, 9, Unavailable("x")), breaker)
            for _ in range(2):
                with pytest.raises(Unavailable):
                    await broken.send_many([envelope()])
            with pytest.raises(CircuitOpen) as caught:
                await Breaking(a, breaker).send(envelope())
            assert 0 < (caught.value.retry_after_s or 0) <= 30

    run(case())


def test_tracing() -> None:
    """An envelope leaves with a child of its trace, and the span that is exported joins the two."""
    spans: list[Envelope] = []

    async def export(span: Envelope) -> None:
        spans.append(span)

    async def case() -> None:
        a, b = pair()
        async with a, b:
            t = Tracing(a, export, source="svc")
            await t.send(envelope(1, traceparent=TRACE))
            await t.send(envelope(2))
            got = await b.receive_many()
            above, child = parse_traceparent(TRACE), parse_traceparent(got[0].traceparent)
            assert above is not None
            assert child is not None
            assert (child.trace_id, child.flags) == (above.trace_id, 1)
            assert child.span_id != above.span_id
            assert got[1].traceparent == ""
            span = spans[0].decode(TraceSpan)
            assert (span.trace_id, span.parent_id, span.span_id) == (above.trace_id, above.span_id, child.span_id)
            assert (span.operation, span.status, spans[0].source) == ("transport.send", "ok", "svc")
            assert span.attrs["msg_type"] == "test.case"
            assert span.end_ns >= span.start_ns
            assert len(spans) == 1

    run(case())


def test_tracing_of_failures_roots_and_unsampled() -> None:
    """A failed send is an error span; roots begin traces; unsampled traces stay so; spans are never traced; an export
    that fails does not fail the send."""
    spans: list[Envelope] = []

    async def export(span: Envelope) -> None:
        spans.append(span)
        raise RuntimeError("the collector is down")

    async def case() -> None:
        a, b = pair()
        async with a, b:
            t = Tracing(Flaky(a, 1, Unavailable("gone")), export, source="svc", roots=True)
            with pytest.raises(Unavailable):
                await t.send(envelope(1, traceparent=TRACE))
            assert spans[0].decode(TraceSpan).status == "error"
            assert spans[0].decode(TraceSpan).attrs["error"] == "unavailable: gone"
            await t.send_many([envelope(2), envelope(3, traceparent=TRACE[:-1] + "0"), envelope(4, type="trace.span")])
            root, unsampled, span = await b.receive_many()
            assert parse_traceparent(root.traceparent) is not None
            assert unsampled.traceparent.endswith("-00")
            assert unsampled.traceparent != TRACE[:-1] + "0"
            assert span.traceparent == ""
            assert len(spans) == 2
            assert spans[1].decode(TraceSpan).parent_id == ""
            assert t.export_failures == 2

    run(case())


def test_counting() -> None:
    """Envelopes and errors are counted by scheme and code; the end of a stream is no error."""

    async def case() -> None:
        metrics = Metrics()
        a, b = pair()
        out, into = Counting(Flaky(a, 1, Unavailable("x")), metrics), Counting(b, metrics)
        with pytest.raises(Unavailable):
            await out.send(envelope())
        await out.send(envelope())
        await out.send_many([envelope()] * 3)
        await into.receive()
        await into.receive_many()
        await out.close()
        with pytest.raises(EndOfStream):
            await into.receive()
        await into.close()
        assert metrics.get("transport_sent_total", scheme="chan") == 4
        assert metrics.get("transport_received_total", scheme="chan") == 4
        assert metrics.get("transport_send_errors_total", scheme="chan", code="unavailable") == 1
        assert b"transport_receive_errors_total" not in metrics.json()

    run(case())


def test_inner_attributes_and_exit() -> None:
    """Positions and ack of the inner transport are reached through wrappers, and leaving `async with` settles them."""

    async def case() -> None:
        async with dial("memory:wrapped?stream=s") as t:
            await t.send_many([envelope(i) for i in range(3)])
        async with Counting(Retrying(await dial("memory:wrapped?stream=s&consumer=c"))) as t:
            await t.receive()
            assert t.position == 1
            await t.receive()
            assert await t.ack() == 1
            await t.receive()
            with pytest.raises(AttributeError):
                t.nothing_like_that  # noqa: B018
        async with dial("memory:wrapped?stream=s&consumer=c&follow=0") as t2:
            assert [e async for e in t2] == []

    run(case())
