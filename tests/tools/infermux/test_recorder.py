"""The record of calls: what is in it, and that no call ever waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from conftest import run

import mist
from mist.broker.base import Message, Stream
from mist.errors import StorageFull, TooLarge, Unavailable
from mist.protocol.codec import decode
from mist.protocol.envelope import Envelope
from mist.protocol.payloads import ChatMessage as WireMessage
from mist.protocol.payloads import InferRequest, InferResponse, TraceSpan
from mist.tools.infermux.calls import Calls, Recording
from mist.tools.infermux.chat import Caller, ChatMessage, ChatRequest
from mist.tools.infermux.envelopes import chat_request
from mist.tools.infermux.failures import ProviderError
from mist.tools.infermux.recorder import Recorder
from mist.tools.infermux.recordings import key_of
from mist.tools.infermux.settings import Capture

from .fakes import FakeRouter

ASKED = ChatRequest(
    model="fast", messages=(ChatMessage(role="user", content="a secret"),), params={"temperature": 0.5, "user": "ada"},
    caller=Caller(key="ci", team="t"), meta={"run": "r"},
)  # fmt: skip


class Sink:
    """A stream whose appends do what a test says. Everything else is the memory broker's."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.append: Any = stream.append

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


async def sinks() -> tuple[Any, Any]:
    broker = await mist.connect("memory:")
    return Sink(await broker.open("infer")), Sink(await broker.open("trace"))


async def envelopes(stream: Stream) -> list[Envelope]:
    return [decode(r.data) for r in (await stream.read()).records]


def test_a_call_is_four_envelopes() -> None:
    """Question, beginning, answer, span: tied together, with what is known and without what is not."""

    async def main() -> None:
        infer, trace = await sinks()
        recorder, router = Recorder(infer, trace), FakeRouter()
        request, _ = await Calls(router, recorder).complete(ASKED)
        await recorder.aclose()
        question, started, answer = await envelopes(infer)
        (span,) = await envelopes(trace)

        assert [e.type for e in (question, started, answer, span)] == [
            "infer.request", "infer.started", "infer.response", "trace.span",
        ]  # fmt: skip
        assert question.id == request.id
        assert {e.correlation_id for e in (started, answer, span)} == {question.id}
        assert answer.causation_id == question.id
        assert chat_request(question) == ChatRequest(
            model="fast", messages=ASKED.messages, params=ASKED.params, caller=ASKED.caller, id=question.id,
            meta={"run": "r", "caller.key": "ci", "caller.team": "t"}, traceparent=question.traceparent,
        )  # fmt: skip
        said = answer.decode(InferResponse)
        assert (said.model, said.provider, said.content, said.answered_by) == ("m", "fake", "echo: a secret", "m-1")
        assert (said.tokens_in, said.tokens_out, said.cost_usd, said.price_version) == (6, 7, 0.00013, "p1")
        assert said.request_key == key_of(request, "m")
        found = span.decode(TraceSpan)
        assert found.operation == "infermux.infer"
        assert span.traceparent == f"00-{found.trace_id}-{found.span_id}-01"
        assert found.status == "ok"
        wanted = {
            "model": "m", "model_requested": "fast", "model_answered": "m-1", "provider": "fake", "tokens_in": 6,
            "tokens_out": 7, "cost_usd": 0.00013, "price_version": "p1", "strategy": "priority", "group": "g",
            "finish_reason": "stop", "attempts": 1, "caller": "ci", "team": "t", "user": "ada", "request_id": question.id,
        }  # fmt: skip
        assert found.attrs.pop("latency_ms") == pytest.approx((found.end_ns - found.start_ns) / 1e6)
        assert found.attrs == wanted
        assert (await trace.read(subjects=("trace.span.infermux",))).records
        assert recorder.stats.stored == 4

    run(main())


def test_the_trace_of_the_caller_goes_on() -> None:
    async def main() -> None:
        infer, trace = await sinks()
        recorder, router = Recorder(infer, trace), FakeRouter()
        above = f"00-{'a' * 32}-{'b' * 16}-01"
        await Calls(router, recorder).complete(ChatRequest(model="m", messages=(), traceparent=above))
        await recorder.aclose()
        found = (await envelopes(trace))[0].decode(TraceSpan)
        assert (found.trace_id, found.parent_id) == ("a" * 32, "b" * 16)
        assert router.asked[0].traceparent == f"00-{'a' * 32}-{found.span_id}-01"

    run(main())


def test_failures_and_callers_that_leave_are_recorded() -> None:
    """Whatever begins ends in the record; a failure is no answer to replay."""

    async def main() -> None:
        infer, trace = await sinks()
        recorder, router = Recorder(infer, trace), FakeRouter()
        calls = Calls(router, recorder)
        router.error = ProviderError("rate_limited", "too many", provider="p")
        with pytest.raises(ProviderError):
            await calls.complete(ASKED)
        router.error, router.after = ProviderError("server", "broke", provider="p", begun=True), 2
        with pytest.raises(ProviderError):
            async with calls.streaming(ASKED) as streaming:
                [c async for c in streaming.chunks]
        router.error, router.gate = None, asyncio.Event()
        router.reached.clear()
        task = asyncio.create_task(calls.complete(ASKED))
        await router.reached.wait()
        task.cancel()
        await asyncio.wait({task})
        await recorder.aclose()
        answers = [e.decode(InferResponse) for e in await envelopes(infer) if e.type == "infer.response"]
        assert [(a.finish_reason, a.error_code, a.content, a.request_key) for a in answers] == [
            ("error", "rate_limited", "", ""), ("error", "server", "one two", ""), ("error", "cancelled", "", ""),
        ]  # fmt: skip
        assert [a.tokens_in for a in answers] == [None, None, None]
        spans = [e.decode(TraceSpan) for e in await envelopes(trace)]
        assert [(s.status, s.attrs["error_kind"], s.attrs.get("provider")) for s in spans] == [
            ("error", "rate_limited", "p"), ("error", "server", "fake"), ("error", "cancelled", None),
        ]  # fmt: skip
        assert "ttft_ms" in spans[1].attrs
        assert calls.under_way == 0
        assert calls.last_minute() == (3, 3)

    run(main())


def test_a_question_that_came_as_an_envelope_is_recorded_as_that_one_or_not_at_all() -> None:
    async def main() -> None:
        infer, trace = await sinks()
        recorder = Recorder(infer, trace)
        calls = Calls(FakeRouter(), recorder)
        asked = Envelope.new("infer.request", InferRequest("m", "", [WireMessage("user", "hi")]), source="them")
        await calls.complete(chat_request(asked), Recording(asked=asked))
        await calls.complete(chat_request(asked), Recording(request=False, response=False))
        await recorder.aclose()
        found = await envelopes(infer)
        assert [e.type for e in found] == ["infer.request", "infer.started", "infer.response", "infer.started"]
        assert found[0] == asked
        assert len(await envelopes(trace)) == 2

    run(main())


@pytest.mark.parametrize(("capture", "kept"), [("metadata", {"temperature": 0.5, "user": "ada"}), ("none", {})])
def test_how_much_of_the_texts_is_kept(capture: Capture, kept: dict[str, Any]) -> None:
    """No text of question or answer anywhere; the figures are there all the same."""

    async def main() -> None:
        infer, trace = await sinks()
        recorder, router = Recorder(infer, trace, capture=capture), FakeRouter()
        asked = Envelope.new(
            "infer.request", InferRequest("m", "", [WireMessage("user", "a secret")], ASKED.params), source="them"
        )
        await Calls(router, recorder).complete(chat_request(asked), Recording(asked=asked))
        await recorder.aclose()
        records = [*(await infer.read()).records, *(await trace.read()).records]
        assert len(records) == 4
        assert not any(b"secret" in r.data for r in records)
        question, _, answer = await envelopes(infer)
        assert question.id == asked.id
        assert question.decode(InferRequest).params == kept
        assert answer.decode(InferResponse).tokens_out == 7
        assert answer.decode(InferResponse).request_key == ""

    run(main())


def test_a_sink_that_never_returns_costs_records_and_no_call() -> None:
    """Calls go on as if nothing were; what fits waits, what does not is counted; the end comes within its deadline."""

    async def main() -> None:
        infer, trace = await sinks()
        hanging = asyncio.Event()
        appended: list[int] = []

        async def never(messages: Sequence[Message], **_: Any) -> list[int]:
            appended.append(len(messages))
            await hanging.wait()
            raise AssertionError

        infer.append = trace.append = never
        told: list[str] = []
        recorder = Recorder(infer, trace, pending_max=10, linger_s=0.0, say=told.append)
        calls = Calls(FakeRouter(), recorder)
        for _ in range(50):
            await calls.complete(ASKED)
        await asyncio.sleep(0)  # a record is made when its call is over
        assert appended  # it did hang there all the time
        assert recorder.stats.pending == 20
        assert recorder.stats.dropped == {"full": 50 * 4 - 20}
        await recorder.aclose(0.01)
        assert recorder.stats.dropped == {"full": 50 * 4 - 20, "undelivered": 20}
        assert told == [
            "records are dropped: full; calls go on", "records are dropped: undelivered; calls go on",
            "20 records could not be stored within 0.01 s and are lost",
        ]  # fmt: skip
        await calls.complete(ASKED)
        await asyncio.sleep(0)
        assert recorder.stats.dropped["closed"] == 4

    run(main())


def test_a_record_is_made_after_its_answer_and_one_that_cannot_be_costs_itself() -> None:
    """An answer does not wait for it; one that fails is counted and logged, and those behind it are made."""

    async def main() -> None:
        infer, trace = await sinks()
        recorder = Recorder(infer, trace, linger_s=0.0)
        calls = Calls(FakeRouter(), recorder)
        span = recorder.span
        tried: list[str] = []

        def fails(request: Any, found: Any) -> None:
            tried.append(request.id)
            raise ZeroDivisionError("a bug")

        recorder.span = fails  # type: ignore[method-assign]
        await calls.complete(ASKED)
        assert tried == []
        await asyncio.sleep(0)
        assert len(tried) == 1
        recorder.span = span  # type: ignore[method-assign]
        await calls.complete(ASKED)
        await recorder.aclose()
        assert (recorder.stats.stored, recorder.stats.dropped) == (3 + 4, {"failed": 1})

    run(main())


def test_what_waits_is_bounded_in_bytes() -> None:
    async def main() -> None:
        infer, _ = await sinks()
        recorder = Recorder(infer, None, pending_bytes_max=3000, linger_s=60.0)
        calls = Calls(FakeRouter(), recorder)
        for _ in range(10):
            await calls.complete(ASKED)
        await asyncio.sleep(0)
        assert 0 < recorder.stats.pending < 30
        assert recorder.stats.dropped["full"] == 30 - recorder.stats.pending
        await recorder.aclose()
        assert sum(len(r.data) for r in (await infer.read()).records) <= 3000

    run(main())


def test_what_a_stream_refuses_is_counted_by_its_reason() -> None:
    """A full store is not waited for; one that is away is asked again, and stores what it then can."""

    async def main() -> None:
        infer, trace = await sinks()
        tries = 0

        async def full(messages: Sequence[Message], **_: Any) -> list[int]:
            raise StorageFull("no space left")

        real = trace.append

        async def away(messages: Sequence[Message], **_: Any) -> list[int]:
            nonlocal tries
            tries += 1
            if tries < 3:
                raise Unavailable("gone")
            return list(await real(messages))

        infer.append, trace.append = full, away
        recorder = Recorder(infer, trace, linger_s=0.0)
        await Calls(FakeRouter(), recorder).complete(ASKED)
        await recorder.aclose()
        assert recorder.stats.dropped == {"storage_full": 3}
        assert len(await envelopes(trace)) == 1

    run(main())


def test_a_record_too_large_for_the_stream_is_counted() -> None:
    async def main() -> None:
        infer, _ = await sinks()
        infer.size_bytes_max = 700
        recorder = Recorder(infer, None)
        big = ChatRequest(model="m", messages=(ChatMessage(role="user", content="x" * 5000),))
        _, routed = await Calls(FakeRouter(), recorder).complete(big)
        assert len(routed.reply.content) > 5000
        await recorder.aclose()
        assert recorder.stats.dropped == {TooLarge.code: 2}
        assert recorder.stats.stored == 1

    run(main())
