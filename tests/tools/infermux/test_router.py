"""The router: what each failure leads to, what a stream that broke off says, what a cancelled call leaves behind."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any, get_args

import pytest
from conftest import run
from hypothesis import given, settings
from hypothesis import strategies as st

from mist.errors import CircuitOpen, InvalidArgument, MistError, NotFound, Overloaded, RateLimited, Refused, Unavailable
from mist.kit.prices import Prices, parse_prices
from mist.quantities import Duration
from mist.tools.infermux.budgets import Ledger
from mist.tools.infermux.chat import Caller, ChatMessage, ChatRequest, Chunk, Reply, Usage
from mist.tools.infermux.failures import COUNTED, FALLS_BACK, OPENS, RETRIED, Kind, ProviderError
from mist.tools.infermux.router import Router
from mist.tools.infermux.settings import BreakerSettings, BudgetSettings, GroupSettings, InferMuxSettings, KeySettings

from .scripted import HANG, Clock, Scripted, at_rest, fail, question, router

PRICES = parse_prices(b"[[price]]\nmodel = '*'\ninput_per_million = 1000\noutput_per_million = 1000\n", "x")
"""A tenth of a cent a token: 1,000,000 billionths."""
TOKEN = 1_000_000


async def kinds(found: Router, request: ChatRequest | None = None) -> list[str]:
    """The attempts of a call, answered or not: provider and kind."""
    try:
        routed = await found.complete(request or question())
    except MistError as exc:
        return exc.meta.get("attempts", str(exc.code)).split(", ")
    return [f"{a.provider}/{a.model}: {a.kind}".strip() for a in routed.attempts]


def test_an_answer_and_its_way() -> None:
    async def body() -> None:
        clock = Clock()
        a = Scripted("a", "onetwo")
        found = router(a, clock=clock, prices=PRICES)
        routed = await found.complete(question(model="a/m"))
        assert (routed.reply.content, routed.provider, routed.model, routed.strategy) == (
            "onetwo",
            "a",
            "m",
            "priority",
        )
        assert (routed.cost_usd, routed.price_version) == (pytest.approx(0.03), PRICES.version)
        assert [(x.provider, x.kind) for x in routed.attempts] == [("a", "")]
        stated = router(Scripted("a", Reply(content="x", model="m", cost_usd=0.5)), prices=PRICES)
        routed = await stated.complete(question())
        assert (routed.cost_usd, routed.price_version) == (0.5, "")
        unknown = await router(Scripted("a")).complete(question())
        assert unknown.cost_usd is None
        vectors = await found.embed("m", ["ab", "c"])
        assert (vectors.embeddings.vectors, vectors.cost_usd) == ([[2.0], [1.0]], None)
        at_rest(found)
        await found.aclose()
        assert a.closed

    run(body())


@pytest.mark.parametrize("kind", get_args(Kind))
def test_what_a_failure_leads_to(kind: Kind) -> None:
    """The table of failures.py: asked again here, then somebody else, then given up; what the breaker hears."""

    async def body() -> None:
        a, b = Scripted("a", fail(kind)), Scripted("b", fail(kind))
        found = router(a, b, breaker=BreakerSettings(failures_max=2))
        with pytest.raises(ProviderError) as failed:
            await found.complete(question())
        assert failed.value.kind == kind
        tries = 2 if kind in RETRIED else 1
        assert len(a.asked) == tries
        assert len(b.asked) == (tries if kind in FALLS_BACK else 0)
        states = [p.models[0].circuit for p in found.providers()]
        opened = kind in OPENS or (kind in COUNTED and tries == 2)
        assert states == ["open" if opened else "closed"] * 2 if kind in FALLS_BACK else ["closed"] * 2
        assert failed.value.meta["attempts"].count("500") == len(a.asked) + len(b.asked)
        at_rest(found)

    run(body())


def test_fallbacks_are_asked_in_order() -> None:
    """First what was asked for, then the fallbacks of its group."""

    async def body() -> None:
        a, b = Scripted("a", fail("credentials", 401), models=("m",)), Scripted("b", "yes", models=("n",))
        found = router(a, b, groups=(GroupSettings(name="g", models=("m",), fallbacks=("n",)),))
        for name in ("g", "m"):
            routed = await found.complete(question(model=name))
            assert routed.provider == "b"
            assert routed.group == ""
        assert len(a.asked) == 1  # its circuit is open
        assert await kinds(found, question(model="n")) == ["b/n:"]

    run(body())


def test_retry_after() -> None:
    """Short: waited for, here. Long: the next one is asked, and the first is left alone as long as it said. When it is the only
    one, it is waited for within the deadline; beyond the deadline the caller is told."""

    async def body() -> None:
        clock = Clock()
        a, b = Scripted("a", fail("rate_limited", 429, 1.5), "here"), Scripted("b", "there")
        found = router(a, b, clock=clock, draw=lambda: 1.0)
        assert (await found.complete(question())).provider == "a"
        assert clock.slept == [1.5]

        a.script = [fail("rate_limited", 429, 30.0), "here"]
        assert await kinds(found) == ["a/m: rate_limited", "b/m:"]
        assert await kinds(found) == ["b/m:"]
        explained = found.explain(question())
        assert [c.provider for c in explained.candidates] == ["b"]
        assert [o.reason for o in explained.left_out] == ["it asked to be left alone for 30.0 s more"]
        clock.now += 31
        assert await kinds(found) == ["a/m:"]

        clock = Clock()
        only = Scripted("a", fail("rate_limited", 429, 30.0), "at last")
        found = router(only, clock=clock, draw=lambda: 1.0)
        assert (await found.complete(question())).reply.content == "at last"
        assert clock.slept == [30.0]
        only.script = [fail("rate_limited", 429, 500.0), "never"]
        with pytest.raises(ProviderError, match="rate_limited"):
            await found.complete(question())
        with pytest.raises(RateLimited) as refused:  # and the next caller, without asking
            await found.complete(question())
        assert refused.value.retry_after_s == 500.0
        assert refused.value.meta["reason"] == "rate_limit"
        at_rest(found)

    run(body())


def test_waits_grow_with_full_jitter() -> None:
    async def body() -> None:
        clock = Clock()
        found = router(Scripted("a", fail("server")), clock=clock, draw=lambda: 0.25, routing={"retries": 3})
        assert len(await kinds(found)) == 4
        assert clock.slept == [0.15, 0.3, 0.6]

    run(body())


def test_attempts_and_deadline_end_a_call() -> None:
    """However many candidates there are; a fallback has the time that is left, and its timeout then is not its fault."""

    async def body() -> None:
        many = [Scripted(f"p{i}", fail("server")) for i in range(5)]
        found = router(*many, routing={"attempts_max": 3, "retries": 0})
        assert len(await kinds(found)) == 3

        clock = Clock()
        a, b = Scripted("a", fail("server")), Scripted("b", HANG)
        found = router(a, b, clock=clock, draw=lambda: 0.0, routing={"retries": 1, "retry_wait": 1.99, "deadline": 2.0})
        assert await kinds(found) == ["a/m: server 500", "a/m: server 500", "b/m: timeout"]
        assert b.asked[0][1] == pytest.approx(0.01)
        assert b.cancelled == 1
        assert found._lanes["b", "m"].breaker.counts.failures == 0
        at_rest(found)

    run(body())


def test_a_hanging_provider_is_cancelled() -> None:
    """The router's own limit holds whatever the adapter does, for answers and for first pieces."""

    async def body() -> None:
        for streamed in (False, True):
            a, b = Scripted("a", HANG), Scripted("b", "yes")
            found = router(a, b, of={"a": {"timeout": 0.01}})
            if streamed:
                async with found.streaming(question()) as call:
                    text = "".join([c.content async for c in call.chunks])
                routed = call.routed()
                assert text == routed.reply.content == "yes"
            else:
                routed = await found.complete(question())
            assert [(x.provider, x.kind) for x in routed.attempts] == [("a", "timeout"), ("b", "")]
            assert (a.cancelled, a.under_way) == (1, 0)
            hung = found.providers()[0].models[0]
            assert (hung.first_s if streamed else hung.latency_s) is not None  # slow, and known to be
            at_rest(found)

    run(body())


def test_an_adapter_that_breaks_its_promise() -> None:
    """What is no ProviderError is one of its kind bad_answer, with its cause; the next one is asked."""

    async def body() -> None:
        found = router(Scripted("a", KeyError("choices")), Scripted("b"), routing={"retries": 0})
        assert await kinds(found) == ["a/m: bad_answer", "b/m:"]
        with pytest.raises(ProviderError, match="KeyError: 'choices'") as failed:
            await router(Scripted("a", KeyError("choices")), routing={"retries": 0}).complete(question())
        assert isinstance(failed.value.__cause__, KeyError)

    run(body())


def test_a_question_too_long_goes_where_there_is_room() -> None:
    """After a context_window only to those known to have more; without anybody it is raised."""

    async def body() -> None:
        a, b, c, d = (Scripted(n, models=("m",)) for n in "abcd")
        a.script = [fail("context_window", 400)]
        of = {
            "a": {"context_tokens": {"m": 8000}},
            "b": {"context_tokens": {"m": 4000}},
            "d": {"context_tokens": {"m": 32000}},
        }
        found = router(a, b, c, d, of=of)
        assert await kinds(found) == ["a/m: context_window", "d/m:"]
        long = question("x" * 80_000)
        assert await kinds(found, long) == ["c/m:"]  # surely more than 8000; nobody knows about c
        left_out = {o.provider: o.reason for o in found.explain(long).left_out}
        assert left_out == {
            "a": "the question has 10000 tokens or more, it has room for 8000",
            "b": "the question has 10000 tokens or more, it has room for 4000",
        }
        with pytest.raises(ProviderError) as failed:
            await found.complete(question("x" * 80_000, provider="b"))
        assert failed.value.kind == "context_window"

    run(body())


def test_who_cannot_do_it_is_left_out() -> None:
    async def body() -> None:
        found = router(Scripted("a"), Scripted("b"), of={"a": {"can": {"m": ("json",)}}})
        tools: dict[str, Any] = {"tools": [{"type": "function"}]}
        picture = ChatRequest(model="m", messages=(ChatMessage(role="user", content=[{"type": "image_url"}]),))
        for request in (question(params=tools), picture):
            assert await kinds(found, request) == ["b/m:"]
        assert await kinds(found, question(params={"response_format": {"type": "json_object"}})) == ["a/m:"]
        with pytest.raises(ProviderError, match="cannot do tools") as failed:
            await found.complete(question(params=tools, provider="a"))
        assert failed.value.kind == "unsupported"

    run(body())


def test_names_and_keys() -> None:
    """An unknown model names the known ones; a key asks for what it may; one provider when one is named."""

    async def body() -> None:
        found = router(
            Scripted("a"), Scripted("b"), aliases={"fast": "m"},
            keys=(KeySettings(name="k", env="K", models=("fast", "gpt-*"), requests_per_minute=2),),
        )  # fmt: skip
        with pytest.raises(NotFound, match="no model 'nothing'") as missing:
            await found.complete(question(model="nothing"))
        assert "fast" in missing.value.hint
        assert (await found.complete(question(provider="b"))).provider == "b"
        with pytest.raises(Refused, match="the key k may not ask for 'm'"):
            await found.complete(question(caller=Caller(key="k")))
        for _ in range(2):
            await found.complete(question(model="fast", caller=Caller(key="k")))
        with pytest.raises(RateLimited) as refused:
            await found.complete(question(model="fast", caller=Caller(key="k")))
        assert refused.value.meta == {"reason": "rate_limit", "key": "k"}
        assert found.names() == {"fast": "infermux", "m": "a", "auto": "infermux"}
        with pytest.raises(InvalidArgument, match="ledger"):
            Router(InferMuxSettings(budgets=(BudgetSettings(limit_usd=1),)), [])

    run(body())


def test_a_provider_has_its_rates() -> None:
    """Over its rate the next one is asked; when all are, the caller is told when to come back. Tokens are corrected to what
    they were."""

    async def body() -> None:
        clock = Clock()
        a, b = Scripted("a"), Scripted("b")
        found = router(a, b, clock=clock, of={"a": {"requests_per_minute": 1}, "b": {"tokens_per_minute": 70}})
        assert [await kinds(found) for _ in range(3)] == [["a/m:"], ["b/m:"], ["b/m:"]]
        assert [(p.requests_headroom, p.tokens_headroom) for p in found.providers()] == [(0, None), (None, 10)]
        with pytest.raises(RateLimited) as refused:
            await found.complete(question("x" * 30))
        assert 60 <= (refused.value.retry_after_s or 0) <= 61
        clock.now += 62
        assert await kinds(found) == ["a/m:"]
        at_rest(found)

    run(body())


def test_places_of_a_provider() -> None:
    """Never more than `concurrency_max` at once; whoever has a place free is asked first; the rest waits in line."""

    async def body() -> None:
        a, b = Scripted("a"), Scripted("b")
        a.gate = b.gate = asyncio.Event()
        found = router(a, b, of={n: {"concurrency_max": 2} for n in "ab"}, routing={"queue_max": 3})
        tasks = [asyncio.create_task(found.complete(question())) for _ in range(8)]
        for _ in range(5):
            await asyncio.sleep(0)
        assert (a.under_way, b.under_way) == (2, 2)
        assert found.providers()[0].waiting == 3
        a.gate.set()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert len([d for d in done if not isinstance(d, Exception)]) == 8  # the fourth in line went to b's
        at_rest(found)
        a.gate = b.gate = asyncio.Event()
        tasks = [asyncio.create_task(found.complete(question(provider="a"))) for _ in range(6)]
        for _ in range(5):
            await asyncio.sleep(0)
        a.gate.set()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(d) for d in done if isinstance(d, Exception)] == [Overloaded]
        at_rest(found)

    run(body())


def test_a_circuit_opens_and_closes_again() -> None:
    """Left alone for a while, tried by one call, then given its share back bit by bit."""

    async def body() -> None:
        clock = Clock()
        draws = iter([0.5] * 1000)
        a, b = Scripted("a", fail("server")), Scripted("b")
        found = router(
            a, b, clock=clock, draw=lambda: next(draws), routing={"retries": 0}, breaker=BreakerSettings(failures_max=1)
        )
        assert await kinds(found) == ["a/m: server", "b/m:"]
        assert await kinds(found) == ["b/m:"]
        with pytest.raises(CircuitOpen) as refused:
            await found.complete(question(provider="a"))
        assert refused.value.retry_after_s == pytest.approx(30.0, abs=1)
        clock.now += 31
        a.script = ["well again"]
        a.gate = asyncio.Event()
        probe = asyncio.create_task(found.complete(question()))
        await asyncio.sleep(0)
        assert await kinds(found) == ["b/m:"]  # one probe at a time
        a.gate.set()
        assert (await probe).provider == "a"
        assert await kinds(found) == ["b/m:"]  # a share of 0.05 now, 0.5 was drawn
        clock.now += 16
        assert await kinds(found) == ["a/m:"]
        assert found.explain(question()).candidates[0].share < 1
        clock.now += 16
        assert found.explain(question()).candidates[0].share == 1
        found.circuit("a", "open")
        clock.now += 10_000
        assert await kinds(found) == ["b/m:"]
        assert "opened by hand" in found.explain(question()).left_out[0].reason
        found.circuit("a", "close")
        clock.now += 31
        assert await kinds(found) == ["a/m:"]
        with pytest.raises(NotFound):
            found.circuit("c", "open")
        at_rest(found)

    run(body())


# --- streams


async def read(found: Router, request: ChatRequest | None = None) -> Any:
    async with found.streaming(request or question()) as call:
        async for _ in call.chunks:
            pass
    return call


def test_before_the_first_piece_failures_are_not_seen() -> None:
    async def body() -> None:
        a = Scripted("a", [fail("overloaded", 529)], [], [fail("server", 503)])
        b = Scripted(
            "b",
            ["one", "two", Chunk(finish_reason="stop", usage=Usage(tokens_in=1, tokens_out=2), model="m-1", id="i")],
        )
        found = router(a, b, routing={"retries": 2}, prices=PRICES)
        routed = (await read(found)).routed()
        assert [x.kind for x in routed.attempts] == ["overloaded", "bad_answer", "server", ""]
        assert (routed.reply.content, routed.reply.finish_reason, routed.reply.model, routed.reply.id) == (
            "onetwo",
            "stop",
            "m-1",
            "i",
        )
        assert routed.cost_usd == pytest.approx(0.003)
        assert [c.content async for c in found.stream(question(provider="b"))] == ["one", "two", ""]
        at_rest(found)

    run(body())


@pytest.mark.parametrize("broken", [fail("connection", 0), HANG, ValueError("bits"), fail("invalid", 400)])
def test_after_the_first_piece_a_failure_is_the_end(broken: Any) -> None:
    """Never a second beginning: what is raised says `begun`, nobody else is asked, the breaker hears of it."""

    async def body() -> None:
        a, b = Scripted("a", ["one", broken]), Scripted("b")
        found = router(a, b, of={"a": {"timeout": 0.01}}, prices=PRICES)
        got: list[str] = []
        call = found.streaming(question())

        async def read_into() -> None:
            async with call:
                async for chunk in call.chunks:
                    got.append(chunk.content)  # noqa: PERF401 - what came before the error counts

        with pytest.raises(ProviderError) as failed:
            await read_into()
        assert failed.value.begun
        assert (got, b.asked, a.under_way) == (["one"], [], 0)
        routed = call.routed()
        assert (routed.reply.content, routed.reply.finish_reason, [x.kind for x in routed.attempts]) == (
            "one",
            "",
            [failed.value.kind],
        )
        assert found._lanes["a", "m"].breaker.counts.failures == (failed.value.kind != "invalid")
        at_rest(found)

    run(body())


def test_leaving_a_stream() -> None:
    """Early, by an error of the reader, by a cancellation: the provider's stream is closed and everything given back. After the
    last piece it was answered, also when nobody looked for the end."""

    async def body() -> None:
        a = Scripted("a", ["1", "2", "3", Chunk(finish_reason="stop")])
        found = router(a, of={"a": {"concurrency_max": 1}})
        async with found.streaming(question()) as call:
            await anext(call.chunks)
        assert [x.kind for x in call.routed().attempts] == ["cancelled"]
        assert call.routed().reply.content == "1"

        async def fail_on_reading() -> None:
            async with found.streaming(question()) as call:
                async for _ in call.chunks:
                    raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await fail_on_reading()
        async with found.streaming(question()) as call:
            for _ in range(4):
                await anext(call.chunks)
        assert [x.kind for x in call.routed().attempts] == [""]
        a.script = [["1", HANG]]

        async def reader() -> None:
            async with found.streaming(question()) as call:
                async for _ in call.chunks:
                    pass

        task = asyncio.create_task(reader())
        while len(a.asked) < 4 or not found._lanes["a", "m"].in_flight:
            await asyncio.sleep(0)
        for _ in range(3):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        assert (task.cancelled(), a.under_way) == (True, 0)
        assert found._lanes["a", "m"].breaker.counts.failures == 0
        at_rest(found)

    run(body())


def test_a_slow_reader_is_not_a_silent_provider() -> None:
    """The time that a reader takes is not the provider's; a reader that is cancelled at the limit is cancelled."""

    async def body() -> None:
        found = router(Scripted("a"), of={"a": {"timeout": 0.01}})
        async with found.streaming(question()) as call:
            async for _ in call.chunks:
                await asyncio.sleep(0.012)
        assert call.routed().reply.content == "hello"
        found = router(Scripted("a", ["1", HANG]), of={"a": {"timeout": 0.01}})

        async def reader() -> None:
            await read(found)

        task = asyncio.create_task(reader())
        asyncio.get_running_loop().call_later(0.01, task.cancel)
        await asyncio.wait({task})
        assert task.cancelled() or isinstance(task.exception(), ProviderError)
        call = found.streaming(question())
        async with call:
            await anext(call.chunks)
            silence = call._silence
            task = asyncio.create_task(anext(call.chunks))  # type: ignore[arg-type]
            await asyncio.sleep(0)
            silence._since -= 1
            silence._look()  # too late, and in the same moment somebody cancels
            task.cancel()
            await asyncio.wait({task})
            assert task.cancelled()
        at_rest(found)

    run(body())


def test_tool_calls_are_put_together() -> None:
    async def body() -> None:
        deltas = [
            {"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": ""}},
            {"index": 0, "function": {"arguments": '{"x":'}},
            {"index": 1, "id": "c2", "function": {"name": "g", "arguments": "{}"}},
            {"index": 0, "function": {"arguments": "1}"}},
        ]
        chunks: list[Any] = [Chunk(tool_calls=[d]) for d in deltas]
        call = await read(router(Scripted("a", [*chunks, Chunk(refusal="no", finish_reason="tool_calls")])))
        reply = call.routed().reply
        assert reply.tool_calls == [
            {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}},
            {"id": "c2", "type": "function", "function": {"name": "g", "arguments": "{}"}},
        ]
        assert (reply.refusal, reply.finish_reason) == ("no", "tool_calls")

    run(body())


# --- hedging


def test_the_second_of_two_may_be_first() -> None:
    """Whoever answers first is taken, the other is cancelled and stands in the attempts; both failures are seen."""

    async def body() -> None:
        a, b = Scripted("a", HANG), Scripted("b", "quick")
        found = router(a, b, routing={"hedge_after": 0.001})
        routed = await found.complete(question())
        assert [(x.provider, x.kind) for x in routed.attempts] == [("a", "cancelled"), ("b", "")]
        assert (a.cancelled, a.under_way) == (1, 0)
        call = await read(found)
        assert call.routed().reply.content == "quick"
        at_rest(found)
        a.script = ["at once"]
        assert (await found.complete(question())).provider == "a"
        assert len(b.asked) == 2
        a.script = b.script = [fail("invalid", 400)]
        with pytest.raises(ProviderError):
            await found.complete(question())
        at_rest(found)
        a.script, b.script = [HANG], [fail("server")]
        task = asyncio.create_task(found.complete(question()))
        while len(b.asked) < 3:
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()
        assert a.under_way == b.under_way == 0
        at_rest(found)

    run(body())


def test_cancelled_while_the_second_of_two_is_stopped() -> None:
    """The answer is there, the other attempt takes its time to end, and the caller goes, twice: nothing is left."""

    class Slow(Scripted):
        async def complete(self, request: ChatRequest, model: str, *, timeout_s: float) -> Reply:
            try:
                return await super().complete(request, model, timeout_s=timeout_s)
            except asyncio.CancelledError:
                for _ in range(10):
                    await asyncio.sleep(0)
                raise

    async def body() -> None:
        a, b = Slow("a", HANG), Scripted("b", "quick")
        b.gate = asyncio.Event()
        found = router(a, b, routing={"hedge_after": 0.001})
        task = asyncio.create_task(found.complete(question()))
        while not b.asked:
            await asyncio.sleep(0)
        b.gate.set()
        while not a.cancelled:
            await asyncio.sleep(0)
        for _ in range(2):
            task.cancel()
            await asyncio.sleep(0)
        await asyncio.wait({task})
        assert task.cancelled()
        at_rest(found)

    run(body())


# --- money


def test_what_a_call_reserves_and_pays(tmp_path: Path) -> None:
    """Reserved at the dearest candidate's price, settled as it was; a refusal costs nothing, a timeout what it may have cost."""

    async def body() -> None:
        ledger = await Ledger.open(tmp_path / "l.db", time_ns=lambda: 1_795_608_000_000_000_000)
        limit = BudgetSettings(limit_usd="1.00", key="*")
        a = Scripted("a")
        found = router(
            a, of={"a": {"timeout": 0.01}}, prices=PRICES, ledger=ledger, budgets=(limit,), routing={"retries": 0}
        )

        async def used() -> int:
            await ledger.flush()
            return next((s.used_nano for s in await ledger.states([limit]) if s.name == "k"), 0)

        def ask(**more: Any) -> ChatRequest:
            return question("abc", params={"max_tokens": 100}, caller=Caller(key="k"), **more)

        await found.complete(ask())
        assert await used() == 30 * TOKEN
        a.script = [fail("overloaded", 529)]
        assert await kinds(found, ask()) == ["a/m: overloaded 529"]
        assert await used() == 30 * TOKEN
        a.script = [HANG]
        assert await kinds(found, ask()) == ["a/m: timeout"]
        assert await used() == (30 + 109) * TOKEN  # 9 for the question, 100 for the answer
        a.script = [["abcdef", fail("connection", 0)]]
        with pytest.raises(ProviderError):
            await read(found, ask())
        assert await used() == (30 + 109 + 9 + 2) * TOKEN
        a.script = ["x"]
        with pytest.raises(RateLimited) as refused:
            await found.complete(question("abc", params={"max_tokens": 860}, caller=Caller(key="k")))
        assert refused.value.meta["reason"] == "budget_exceeded"
        a.usage = Usage()
        await found.complete(ask())  # nobody says how many tokens: by the text
        assert await used() == (150 + 9 + 1) * TOKEN
        lines = await ledger.report("key")
        assert [(n.calls, n.estimated, n.unknown) for n in lines] == [(4, 3, 0)]
        at_rest(found)
        await ledger.aclose()

    run(body())


def test_without_a_price(tmp_path: Path) -> None:
    """A budget refuses candidates whose price is unknown; others are asked. `allow` asks them and counts their calls."""

    async def body() -> None:
        ledger = await Ledger.open(tmp_path / "l.db")
        prices = parse_prices(
            b"[[price]]\nprovider = 'b'\nmodel = 'm'\ninput_per_million = 1\noutput_per_million = 1\n", "x"
        )
        strict = router(
            Scripted("a"), Scripted("b"), prices=prices, ledger=ledger, budgets=(BudgetSettings(limit_usd=9),)
        )
        assert await kinds(strict) == ["b/m:"]
        with pytest.raises(RateLimited, match="price of 'm' is unknown") as refused:
            await strict.complete(question(provider="a"))
        assert refused.value.meta["reason"] == "budget_exceeded"
        loose = router(
            Scripted("a"), prices=prices, ledger=ledger, budgets=(BudgetSettings(limit_usd=9, unpriced="allow"),)
        )
        assert (await loose.complete(question())).cost_usd is None
        await ledger.flush()
        assert [(n.by["provider"], n.unknown) for n in await ledger.report("provider")] == [("b", 0), ("a", 1)]
        at_rest(loose)
        await ledger.aclose()

    run(body())


def test_a_budget_has_another_model_asked(tmp_path: Path) -> None:
    async def body() -> None:
        ledger = await Ledger.open(tmp_path / "l.db")
        a, b = Scripted("a", models=("large",)), Scripted("b", models=("small",))
        budget = BudgetSettings(limit_usd="0.05", action="model_override", model_override="small")
        found = router(a, b, prices=PRICES, ledger=ledger, budgets=(budget,))
        ask = question(model="large", params={"max_tokens": 20})
        for instead, provider in (("", "a"), ("small", "b"), ("small", "b")):
            routed = await found.complete(ask)
            assert (routed.budget_override, routed.provider) == (instead, provider)
        at_rest(found)
        await ledger.aclose()

    run(body())


def test_without_budgets_nothing_waits_for_the_ledger(tmp_path: Path) -> None:
    """Its thread may hang: calls go on, and what they cost is written later."""

    async def body() -> None:
        import threading

        ledger = await Ledger.open(tmp_path / "l.db")
        gate = threading.Event()
        real = ledger._books.apply
        ledger._books.apply = lambda operations: (gate.wait(), real(operations))[1]  # type: ignore[method-assign]
        found = router(Scripted("a"), prices=PRICES, ledger=ledger)
        for _ in range(5):
            await found.complete(question())
        assert await ledger.report("model") == []
        gate.set()
        await ledger.flush()
        assert [n.calls for n in await ledger.report("model")] == [5]
        await ledger.aclose()

    run(body())


def test_a_ledger_that_hangs_ends_with_the_deadline(tmp_path: Path) -> None:
    """Nobody is asked, and what is granted too late is given back."""

    async def body() -> None:
        import threading

        ledger = await Ledger.open(tmp_path / "l.db")
        gate = threading.Event()
        real = ledger._books.apply
        ledger._books.apply = lambda operations: (gate.wait(), real(operations))[1]  # type: ignore[method-assign]
        a, limit = Scripted("a"), BudgetSettings(limit_usd=1)
        found = router(a, prices=PRICES, ledger=ledger, budgets=(limit,), routing={"deadline": 0.02})
        with pytest.raises(Unavailable, match="ledger"):
            await found.complete(question(params={"max_tokens": 5}))
        gate.set()
        await ledger.flush()
        assert [s.used_nano for s in await ledger.states([limit])] == [0]
        assert a.asked == []
        at_rest(found)
        await ledger.aclose()

    run(body())


# --- nothing leaks


STEPS = ["yes", HANG, fail("server"), fail("rate_limited", 429, 0.5), fail("timeout", 0), fail("invalid", 400), fail("credentials", 401),
         ["a", "b", Chunk(finish_reason="stop")], ["a", fail("connection", 0)], ["a", HANG], KeyError("x")]  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**32),
    st.booleans(),
    st.sampled_from(["priority", "round_robin", "weighted", "least_latency", "cost", "sticky"]),
)
def test_nothing_leaks(tmp_path_factory: pytest.TempPathFactory, seed: int, hedged: bool, strategy: str) -> None:
    """Calls of every sort over providers of every sort, cancelled at any moment: at the end nothing is under way, no probe, place,
    or reservation is held, no provider's stream is open, and money is the sum of what was booked."""
    rng = random.Random(seed)
    place = tmp_path_factory.mktemp("ledger")

    async def body() -> None:
        ledger = await Ledger.open(place / "l.db")
        providers = [Scripted(n, *(rng.choice(STEPS) for _ in range(30))) for n in "abc"]
        clock = Clock()
        found = router(
            *providers, clock=clock, draw=rng.random, prices=PRICES, ledger=ledger,
            of={"a": {"concurrency_max": 2, "timeout": 0.02}, "b": {"requests_per_minute": 20, "tokens_per_minute": 2000, "timeout": 0.02},
                "c": {"timeout": 0.02, "priority": 1}},
            routing={"strategy": strategy, "hedge_after": 0.002 if hedged else 0.0, "queue_max": 4},
            budgets=(BudgetSettings(limit_usd="5.00", key="x"), BudgetSettings(limit_usd="0.5", team="*", action="alert")),
            keys=(KeySettings(name="x", env="X", concurrency_max=3, tokens_per_minute=5000),),
            breaker=BreakerSettings(failures_max=2, open=0.2),
        )  # fmt: skip

        async def one() -> None:
            caller = Caller(key=rng.choice(["x", ""]), team="t")
            request = question("q", params={"max_tokens": rng.choice([5, 50])}, caller=caller)
            if rng.random() < 0.5:
                await found.complete(request)
            else:
                async with found.streaming(request) as call:
                    async for _ in call.chunks:
                        if rng.random() < 0.2:
                            break

        tasks = [asyncio.create_task(one()) for _ in range(16)]
        for task in tasks:
            for _ in range(rng.randrange(4)):
                await asyncio.sleep(0)
            clock.now += rng.random() / 10
            rng.choice(tasks).cancel() if rng.random() < 0.4 else None
            if rng.random() < 0.3:
                await asyncio.sleep(0.001)
            del task
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            assert result is None or isinstance(result, MistError | asyncio.CancelledError), repr(result)
        at_rest(found)
        assert [p.under_way for p in providers] == [0, 0, 0]
        await ledger.flush()
        assert ledger._books.of_owner(ledger._owner) == []
        spent = sum(n.nano for n in await ledger.report("model"))
        total = ledger._books.fetch("SELECT nano FROM totals WHERE kind = 'all' AND period = ''")
        assert spent == (total[0][0] if total else 0)
        await ledger.aclose()

    run(body())


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names come from outside where a provider takes anything: routes and lanes are forgotten, open circuits are not."""
    from mist.tools.infermux import router as module

    monkeypatch.setattr(module, "ROUTES_MAX", 20)
    monkeypatch.setattr(module, "LANES_MAX", 30)

    async def body() -> None:
        a = Scripted("a", fail("unknown_model", 404), "yes", models=())
        found = router(a, prices=Prices([], "1"))
        assert await kinds(found, question(model="bad")) == ["a/bad: unknown_model 404"]
        for n in range(200):
            await found.complete(question(model=f"m{n}"))
        assert len(found._routes) <= 20
        assert len(found._lanes) <= 31
        with pytest.raises(CircuitOpen):
            await found.complete(question(model="bad"))

    run(body())


def test_providers_as_the_settings_name_them(tmp_path: Path) -> None:
    """Every type is built with what its settings say; a variable that is not set is named; recordings are read when asked for."""
    from mist.cli.settings import Settings
    from mist.config import merge, toml_layer

    (tmp_path / "answers.jsonl").write_text(
        '{"model": "gpt", "messages": [{"role": "user", "content": "hi"}], "content": "recorded"}\n'
    )
    text = f"""
    [[infermux.providers]]
    name = "cloud"
    type = "openai"
    base_url = "http://127.0.0.1:1/${{VERSION}}"
    api_key = "${{CLOUD_KEY}}"
    headers = {{ "x-org" = "${{ORG}}" }}
    models = ["gpt"]
    [[infermux.providers]]
    name = "claude"
    type = "anthropic"
    base_url = "http://127.0.0.1:1"
    api_key_env = "CLAUDE_KEY"
    models = ["opus"]
    [[infermux.providers]]
    name = "tape"
    type = "replay"
    recordings = "{tmp_path}/answers.jsonl"
    [[infermux.providers]]
    name = "shell"
    type = "command"
    argv = ["cat"]
    question = "text"
    models = ["cat"]
    [[infermux.providers]]
    name = "echo"
    type = "echo"
    models = ["echo"]
    """
    found = merge(Settings, [toml_layer(text.encode(), "mist.toml")]).value.infermux
    env = {"VERSION": "v1", "CLOUD_KEY": "k", "ORG": "o", "CLAUDE_KEY": "k"}
    for name in env:
        with pytest.raises(InvalidArgument, match=f"variable {name} is not set"):
            Router.from_settings(found, env={k: v for k, v in env.items() if k != name})

    async def body() -> None:
        made = Router.from_settings(found, env=env)
        assert (await made.complete(question(model="echo"))).reply.content == "echo: hi"
        assert (await made.complete(question(model="tape/gpt"))).reply.content == "recorded"
        assert (await made.complete(question(model="cat"))).reply.content == "hi"
        assert [c.content async for c in made.stream(question(model="echo"))]
        routed = await made.complete(question("hello world, how are you", model="echo"))
        assert routed.cost_usd == pytest.approx(0.00013)  # the seed's
        await made.aclose()

    run(body())


def test_over_the_real_wire() -> None:
    """A provider of each dialect on a real server, and everything that can fail: the other one answers, unseen; after the first piece
    of a stream the failure is said."""
    from mist.testing.providers import FaultName, run_providers
    from mist.tools.infermux.settings import ProviderSettings, RoutingSettings

    with run_providers() as there:
        one = ProviderSettings(
            name="one",
            type="openai",
            base_url=there.openai_url,
            api_key_env="KEY",
            models=("gpt-4o-mini",),
            timeout=0.3,
        )
        two = ProviderSettings(
            name="two", type="anthropic", base_url=there.anthropic_url, api_key_env="KEY", models=("claude-haiku",)
        )
        settings = InferMuxSettings(
            providers=(one, two), groups=(GroupSettings(name="g", models=("gpt-4o-mini", "claude-haiku")),),
            routing=RoutingSettings(retries=0, slow_start=Duration("0")), breaker=BreakerSettings(failures_max=100),
        )  # fmt: skip

        async def body() -> None:
            found = Router.from_settings(settings, env={"KEY": there.api_key})
            kinds_of: dict[FaultName, str] = {
                "rate_limited": "rate_limited", "server": "server", "overloaded": "overloaded", "slow_headers": "timeout",
                "bad_json": "bad_answer", "hang_up": "connection", "html": "overloaded",
            }  # fmt: skip
            for fault, kind in kinds_of.items():
                # on a kept connection it is asked once more
                there.fail(fault, model="gpt-4o-mini", times=2 if fault == "hang_up" else 1)
                routed = await found.complete(question(model="g"))
                assert (routed.provider, routed.reply.content) == ("two", "Hello from claude-haiku."), fault
                assert [a.kind for a in routed.attempts] == [kind, ""]
            for fault in ("truncated", "error_in_stream", "slow_chunks"):
                there.fail(fault, model="gpt-4o-mini")
                with pytest.raises(ProviderError) as failed:
                    await read(found, question(model="g"))
                assert failed.value.begun, fault
            there.fail("credentials", model="gpt-4o-mini")
            for attempts in (["credentials", ""], [""]):  # its circuit is open
                assert [a.kind for a in (await found.complete(question(model="g"))).attempts] == attempts
            found.circuit("one", "reset")
            call = await read(found, question(model="g"))
            assert call.routed().reply.content == "Hello from gpt-4o-mini."
            at_rest(found)
            await found.aclose()

        run(body())
