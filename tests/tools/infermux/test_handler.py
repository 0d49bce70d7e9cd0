"""`infer.request` to `infer.response`, embedded and over a stream. What every handler promises, kills included, is in
tests/client/test_handler.py."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from conftest import run

import mist
from mist.broker.base import Broker, ConsumerConfig
from mist.client import Client, serve
from mist.errors import Internal, MistError, NotFound, RateLimited, Unavailable
from mist.protocol.codec import decode
from mist.protocol.envelope import Envelope
from mist.protocol.payloads import ChatMessage, InferRequest, InferResponse
from mist.tools.infermux.calls import Calls
from mist.tools.infermux.chat import Reply, Usage
from mist.tools.infermux.failures import KINDS, ProviderError
from mist.tools.infermux.handler import handler
from mist.tools.infermux.openai_api import said
from mist.tools.infermux.recorder import Recorder
from mist.tools.infermux.recordings import key_of

from .fakes import FakeRouter


def asked(text: str = "hi", **fields: Any) -> Envelope:
    return Envelope.new("infer.request", InferRequest("m", "", [ChatMessage("user", text)]), source="them", **fields)


def test_a_question_is_answered_with_what_it_was_asked_with() -> None:
    async def main() -> None:
        router = FakeRouter()
        handle = handler(Calls(router))
        request = asked(tenant="t", traceparent=f"00-{'a' * 32}-{'b' * 16}-01")
        (answer,) = await handle(request)
        (again,) = await handle(request)
        assert answer.id == again.id
        assert (answer.type, answer.source, answer.tenant) == ("infer.response", "infermux", "t")
        assert answer.correlation_id == answer.causation_id == request.id
        assert answer.traceparent.split("-")[1] == "a" * 32
        said = answer.decode(InferResponse)
        assert said.content == "echo: hi"
        assert said.request_key == key_of(router.asked[0], "m")
        pong = await handle(Envelope.new("health.ping", {"from": "x"}, source="x"))
        assert pong[0].type == "health.pong"

    run(main())


PERMANENT: list[tuple[MistError, str]] = [
    (NotFound("no model zzz"), "not_found"),
    (RateLimited("spent", meta={"reason": "budget_exceeded"}), "budget_exceeded"),
    *[(ProviderError(k, "x"), k) for k in ("context_window", "content_policy", "invalid", "unsupported", "credentials")],
]  # fmt: skip


def test_what_fails_for_good_is_answered_and_what_may_pass_is_given_back() -> None:
    async def main() -> None:
        router = FakeRouter()
        handle = handler(Calls(router))
        for error, code in PERMANENT:
            router.error = error
            said_ = (await handle(asked()))[0].decode(InferResponse)
            assert (said_.finish_reason, said_.error_code, said_.error) == ("error", code, error.message)
            assert (said_.request_key, said_.tokens_in, said_.cost_usd) == ("", None, None)
        for kind in KINDS:
            router.error = ProviderError(kind, "x", retry_after_s=3.0)
            if said(router.error).again:
                with pytest.raises(MistError) as found:
                    await handle(asked())
                assert found.value.retryable, kind
                assert found.value.retry_after_s == 3.0
        router.error = Unavailable("all are down")
        with pytest.raises(Unavailable):
            await handle(asked())
        nonsense = Envelope.new("infer.request", {"messages": 7}, source="them")
        assert (await handle(nonsense))[0].decode(InferResponse).error_code == "malformed"

    run(main())


def test_a_bug_is_no_answer() -> None:
    async def main() -> None:
        router = FakeRouter()
        router.reply = lambda _request: 1 / 0  # type: ignore[assignment,return-value]
        with pytest.raises(Internal):
            await handler(Calls(router))(asked())

    run(main())


async def served(broker: Broker, router: FakeRouter, until: int, **options: Any) -> list[Envelope]:
    """Over the stream `questions` until `until` answers lie in `infer` and one question is dead."""
    stop = asyncio.Event()
    dead = await broker.open("questions--dead")
    infer = await broker.open("infer")
    recorder = Recorder(infer, await broker.open("trace"), linger_s=0.0)
    serving = serve(
        handler(Calls(router, recorder)),
        f"{broker.url}?stream=questions&consumer=infermux",
        out="infer",
        stop=stop,
        config=ConsumerConfig(attempts_max=2),
        report=lambda _error, _id: None,
        **options,
    )
    work = asyncio.create_task(serving)
    after, answers = 0, 0
    while answers < until:
        page = await infer.read(after=after, wait_s=10.0)
        after = page.scanned
        answers += sum(r.subject == "infer.response" for r in page.records)
    while not (await dead.read(wait_s=10.0)).records:
        pass
    stop.set()
    await work
    await recorder.aclose()
    return [decode(r.data) for r in (await infer.read()).records]


def test_over_a_stream(tmp_path: Path) -> None:
    """Each question one answer; the stream of answers holds the questions too and is complete in itself; a question that
    nobody can answer for now is answered so and ends as a dead letter, and the others do not wait for it."""

    async def main() -> None:
        router = FakeRouter()

        def reply(request: Any) -> Reply:
            if request.messages[-1].text == "down":
                raise ProviderError("server", "it is down", provider="p")
            if request.messages[-1].text == "bad":
                raise ProviderError("invalid", "no", provider="p")
            return Reply(content=request.messages[-1].text.upper(), model="m", usage=Usage(tokens_in=1, tokens_out=1))

        router.reply = reply
        async with mist.connect("memory:questions") as broker:
            questions = [asked(t, id=f"q-{t}") for t in ("a", "down", "bad", "b")]
            await Client(broker).publish("questions", questions)
            found = await served(broker, router, 4, concurrency=4)
            answers = {e.correlation_id: e.decode(InferResponse) for e in found if e.type == "infer.response"}
            assert {k: v.content or v.error_code for k, v in answers.items()} == {
                "q-a": "A",
                "q-bad": "invalid",
                "q-b": "B",
                "q-down": "server",  # and then a dead letter
            }
            assert {e.id for e in found if e.type == "infer.request"} == {q.id for q in questions}
            dead = await (await broker.open("questions--dead")).read()
            assert [decode(r.data).id for r in dead.records] == ["q-down"]

    run(main())
