"""The router's bookkeeping against a small model: calls that begin, are answered, fail, hang, are read on, left and cancelled, in any
order over any time. What is under way in the books is what is under way at the providers, at every moment; at the end it is nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mist.errors import MistError, RateLimited
from mist.tools.infermux.chat import Caller, ChatRequest, Chunk, Reply, Usage
from mist.tools.infermux.failures import KINDS, Kind
from mist.tools.infermux.settings import BreakerSettings, BudgetSettings, KeySettings

from .scripted import Clock, Scripted, at_rest, fail, question, router
from .test_router import PRICES

WHICH = st.integers(0, 11)


class Held(Scripted):
    """Every attempt, and every piece of a stream, waits until the test says how it ends."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.waiting: list[asyncio.Future[bool]] = []

    async def _turn(self) -> bool:
        """Whether this is the end. Raises what the test says."""
        turn: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.waiting.append(turn)
        try:
            return await turn
        finally:
            self.waiting.remove(turn)

    async def complete(self, request: ChatRequest, model: str, *, timeout_s: float) -> Reply:
        self.under_way += 1
        try:
            await self._turn()
            return Reply(content="x", model=model, usage=Usage(tokens_in=1, tokens_out=1))
        finally:
            self.under_way -= 1

    async def stream(self, request: ChatRequest, model: str, *, timeout_s: float) -> AsyncIterator[Chunk]:
        self.under_way += 1
        try:
            while not await self._turn():
                yield Chunk(content="x")
            yield Chunk(finish_reason="stop")
        finally:
            self.under_way -= 1


class FakeLedger:
    """Grants up to a limit; every grant is settled or released once."""

    def __init__(self) -> None:
        self.held: dict[int, int] = {}
        self.spent = 0
        self._next = 0

    @property
    def outstanding(self) -> int:
        return len(self.held)

    async def reserve(self, caller: Caller, nano: int, budgets: Sequence[BudgetSettings], **more: Any) -> int:
        self._next += 1
        mine = self._next
        if self.spent + sum(self.held.values()) + nano > budgets[0].limit_nano:
            raise RateLimited("no more", meta={"reason": "budget_exceeded", "budget": budgets[0].name})
        self.held[mine] = nano  # granted before its caller runs again
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            del self.held[mine]
            raise
        return mine

    def settle(self, reservation: int, entry: Any) -> None:
        del self.held[reservation]
        self.spent += entry.nano or 0

    def release(self, reservation: int) -> None:
        del self.held[reservation]

    def book(self, entry: Any) -> None:
        self.spent += entry.nano or 0


class Machine(RuleBasedStateMachine):
    @initialize(
        places=st.sampled_from([0, 1, 2]), probes_max=st.integers(1, 2), hedged=st.booleans(),
        strategy=st.sampled_from(["priority", "round_robin", "least_latency", "sticky"]), retries=st.integers(0, 1),
    )  # fmt: skip
    def begin(self, places: int, probes_max: int, hedged: bool, strategy: str, retries: int) -> None:
        self.loop = asyncio.new_event_loop()
        self.clock = Clock()
        self.providers = [Held("a"), Held("b")]
        self.ledger = FakeLedger()
        self.router = router(
            *self.providers, clock=self.clock, draw=lambda: 0.5, prices=PRICES, ledger=self.ledger,
            of={"a": {"concurrency_max": places, "requests_per_minute": 9}, "b": {"tokens_per_minute": 4000}},
            routing={"strategy": strategy, "retries": retries, "queue_max": 2, "hedge_after": 1e-9 if hedged else 0.0},
            breaker=BreakerSettings(failures_max=2, open=5.0, probes_max=probes_max),
            budgets=(BudgetSettings(limit_usd="2.00"),),
            keys=(KeySettings(name="k", env="K", concurrency_max=2),),
        )  # fmt: skip
        self.calls: list[asyncio.Task[None]] = []
        self.streams: list[asyncio.Queue[str]] = []

    def settle_down(self) -> None:
        async def turns() -> None:
            for _ in range(12):
                await asyncio.sleep(0)

        self.loop.run_until_complete(turns())

    @rule(keyed=st.booleans())
    def ask(self, keyed: bool) -> None:
        async def one() -> None:
            await self.router.complete(
                question("q", caller=Caller(key="k" if keyed else ""), params={"max_tokens": 20})
            )

        self._start(one())

    @rule(pieces=st.integers(0, 3), keyed=st.booleans())
    def ask_for_a_stream(self, pieces: int, keyed: bool) -> None:
        """Read to its end, or left after so many pieces."""

        async def one() -> None:
            left = pieces
            request = question("q", caller=Caller(key="k" if keyed else ""), params={"max_tokens": 20})
            async with self.router.streaming(request) as call:
                async for _ in call.chunks:
                    left -= 1
                    if left == 0:
                        return

        self._start(one())

    def _start(self, coroutine: Any) -> None:
        self.calls.append(self.loop.create_task(coroutine))
        self.settle_down()

    def _waiting(self) -> list[asyncio.Future[bool]]:
        return [turn for p in self.providers for turn in p.waiting]

    def _turn(self, which: int) -> asyncio.Future[bool]:
        waiting = self._waiting()
        return waiting[which % len(waiting)]

    @precondition(lambda self: self._waiting())
    @rule(which=WHICH, end=st.booleans())
    def answer(self, which: int, end: bool) -> None:
        self._turn(which).set_result(end)
        self.settle_down()

    @precondition(lambda self: self._waiting())
    @rule(which=WHICH, kind=st.sampled_from(KINDS), after=st.sampled_from([None, 1.0, 50.0]))
    def refuse(self, which: int, kind: Kind, after: float | None) -> None:
        self._turn(which).set_exception(fail(kind, 0, after))
        self.settle_down()

    @precondition(lambda self: self.calls)
    @rule(which=WHICH, twice=st.booleans())
    def cancel(self, which: int, twice: bool) -> None:
        call = self.calls[which % len(self.calls)]
        call.cancel()
        if twice:
            self.loop.run_until_complete(asyncio.sleep(0))
            call.cancel()
        self.settle_down()

    @precondition(lambda self: self._waiting() and self.calls)
    @rule(which=WHICH, whom=WHICH)
    def answer_and_cancel_at_once(self, which: int, whom: int) -> None:
        self._turn(which).set_result(True)
        self.calls[whom % len(self.calls)].cancel()
        self.settle_down()

    @rule(seconds=st.sampled_from([0.5, 6.0, 61.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @invariant()
    def the_books_are_right(self) -> None:
        if not hasattr(self, "router"):
            return
        still = []
        for call in self.calls:
            if not call.done():
                still.append(call)
            elif not call.cancelled() and call.exception() is not None:
                assert isinstance(call.exception(), MistError), call.exception()
        self.calls = still
        for state, provider in zip(self.router.providers(), self.providers, strict=True):
            assert state.in_flight == provider.under_way
            assert sum(m.in_flight for m in state.models) == provider.under_way
            side = self.router._sides[provider.name]
            if side.slots is not None:
                assert side.slots.in_use == provider.under_way
                assert side.slots.in_use <= side.slots.size
            lane = self.router._lanes[provider.name, "m"]
            assert lane.breaker._probes <= provider.under_way
        under_way = sum(p.under_way for p in self.providers)
        assert under_way <= self.ledger.outstanding <= under_way + len(self.calls)
        assert self.ledger.spent + sum(self.ledger.held.values()) <= 2_000_000_000
        key = self.router.rules["k"].slots
        assert key is not None
        assert key.in_use <= 2

    def teardown(self) -> None:
        if not hasattr(self, "router"):
            return
        try:
            for call in self.calls:
                call.cancel()
            self.settle_down()
            assert all(call.done() for call in self.calls)
            at_rest(self.router)
            assert [p.under_way for p in self.providers] == [0, 0]
        finally:
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            self.loop.close()


TestRouterMachine = Machine.TestCase
TestRouterMachine.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
