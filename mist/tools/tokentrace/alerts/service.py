"""The alerts at work: evaluates what is due, appends envelopes to the stream, delivers webhooks, all through saved state.

Promises: state is saved before it is acted on. An envelope is appended again with the same id after a crash, which the
stream's dedupe window (two minutes by default) makes one; a webhook is delivered at least once, with the same
`webhook-id`. Webhooks of one target keep their order: a resolved never overtakes its firing. A refusal for good (a status
of 400 to 499 but 408 and 429, or a redirect) is given up at once and counted, anything else is tried again with full jitter, also
over restarts. An error that is worth waiting for costs a period, not the service.
Does not: share its open store with others (ingest and questions open their own), or one database among several loops: run
one `watch` for each.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Any, TypeVar

import msgspec
from msgspec.structs import replace

from mist.broker.clock import SYSTEM, Clock
from mist.errors import InvalidArgument, MistError
from mist.kit.retry import RetryPolicy
from mist.kit.waiting import in_thread
from mist.protocol.envelope import Envelope
from mist.tools.tokentrace.alerts import control, engine
from mist.tools.tokentrace.alerts.measure import measure, read
from mist.tools.tokentrace.alerts.rules import Rule, Target
from mist.tools.tokentrace.alerts.webhook import HttpPost, Post, request
from mist.tools.tokentrace.stats import Metrics
from mist.tools.tokentrace.store import Store

T = TypeVar("T")
Append = Callable[[list[Envelope]], Awaitable[object]]
"""Stores envelopes durably, a known id once: `mist.transport.server.stream_sink`, for example."""

SOURCE = "tokentrace"
AGAIN = RetryPolicy(attempts_max=30, wait_s=1.0, wait_s_max=300.0, jitter=1.0, deadline_s=None)
"""For one webhook: given up after 30 attempts, an hour or two."""
RETRY_AFTER_S_MAX = 3600.0
"""What a receiver may ask us to wait."""
POLL_S_MAX = 30.0
"""How long the loop sleeps at most; a rule or silence given meanwhile is seen then."""


Measure = Callable[[Rule, int, int], Sequence[Metrics]]
"""(rule, since_ns, until_ns) -> the figures of its groups. Called in threads, one call at a time."""


class Alerts:
    """`tick` and `deliver` are the two things to do; `run` does them in time. Not for several loops on one store."""

    def __init__(
        self,
        store: control.States,
        measure: Measure,
        append: Append,
        rules: Sequence[Rule],
        *,
        post: Post | None = None,
        clock: Clock = SYSTEM,
        draw: Callable[[], float] = random.random,
        env: Mapping[str, str] = os.environ,
        source: str = SOURCE,
        on_event: Callable[[str], None] | None = None,
    ) -> None:
        self._store = store
        self._measure = measure
        self._append = append
        self._rules = tuple(rules)
        self._post = post
        self._clock = clock
        self._draw = draw
        self._env = env
        self._source = source
        self._say = on_event or (lambda _text: None)
        self._saved: engine.Saved | None = None
        self._lock = asyncio.Lock()
        self._one_at_a_time = asyncio.Lock()
        self._more = asyncio.Event()
        self.told = engine.Told()
        self.delivered = 0
        self.delivery_failed = 0
        self.delivery_retried = 0

    def facts(self) -> dict[str, Any]:
        """Counters of this process, and how many wait."""
        saved = self._saved or engine.Saved()
        phases = [g.phase for state in saved.rules.values() for g in state.groups]
        return {
            "rules": len(self._rules),
            "firing": phases.count("firing"),
            "pending": phases.count("pending"),
            **msgspec.structs.asdict(self.told),
            "webhooks_delivered": self.delivered,
            "webhooks_failed": self.delivery_failed,
            "webhooks_retried": self.delivery_retried,
            "webhooks_waiting": len(saved.outbox),
            "envelopes_waiting": len(saved.unsent),
        }

    async def tick(self) -> None:
        """Evaluate what is due, save, then append what is to be said. Raises what the store or the stream raise: then
        nothing happened, or it is saved and the next tick goes on. A stream that is away stops no evaluation."""
        now = self._clock.time_ns()
        kept = {}
        for rule in self._rules:
            orders = await self._ask(partial(control.orders_of, self._store, rule.name))
            if not control.deleted(rule, orders):
                kept[rule.name] = rule
                await self._evaluate(rule, now, silenced=control.silenced(rule, orders, now))
        await self._change(lambda saved: engine.retire(saved, kept, now, self.told, source=self._source))
        await self._send()

    async def _evaluate(self, rule: Rule, now_ns: int, *, silenced: bool) -> None:
        saved = await self._load()
        moment = engine.due_ns(rule, saved, now_ns)
        if moment is None or len(saved.unsent) >= engine.UNSENT_MAX:
            return
        since = moment - round(rule.window_s * 1e9)
        try:
            readings = read(rule, await self._ask(partial(self._measure, rule, since, moment)))
        except InvalidArgument as exc:  # more groups than anybody can look at, say: the other rules go on
            self.told.failed += 1
            self._say(f"alert {rule.name!r}: cannot be measured: {exc}")
            return
        await self._change(
            lambda saved: engine.evaluate(
                rule, saved, readings, moment, self.told, silenced=silenced, source=self._source
            )
        )

    async def deliver(self, stop: asyncio.Event | None = None) -> None:
        """Try every webhook that is due, the oldest of each target first, until none is or `stop` is set. Raises what the
        store raises."""
        self._more.clear()
        while (due := await self._due()) and not (stop is not None and stop.is_set()):
            ends = await asyncio.gather(*(self._deliver(webhook) for webhook in due), return_exceptions=True)
            for end in ends:
                if end is not None:
                    raise end

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop`: what is in hand is finished. Raises the first error that waiting does not mend."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._again(self._evaluating, stop))
                group.create_task(self._again(self._delivering, stop))
        except ExceptionGroup as ended:
            raise ended.exceptions[0] from ended

    # the two loops

    async def _again(self, turn: Callable[[asyncio.Event], Awaitable[None]], stop: asyncio.Event) -> None:
        failures = 0
        while not stop.is_set():
            try:
                await turn(stop)
                failures = 0
            except MistError as exc:
                if not exc.retryable:
                    raise
                failures += 1
                pause = min(AGAIN.pause_s(failures, self._draw()), POLL_S_MAX)
                self._say(f"alerts: {exc}; trying again in {pause:.2g} s")
                await _until(stop, pause)

    async def _evaluating(self, stop: asyncio.Event) -> None:
        await self.tick()
        now = self._clock.time_ns()
        periods = [round(rule.every_s * 1e9) for rule in self._rules]
        wait_ns = min((every - now % every for every in periods), default=round(POLL_S_MAX * 1e9))
        await _until(stop, min(wait_ns / 1e9, POLL_S_MAX))

    async def _delivering(self, stop: asyncio.Event) -> None:
        await self.deliver(stop)
        now = self._clock.time_ns()
        waits = [webhook.due_ns - now for webhook in _heads((await self._load()).outbox)]
        wait_s = min((max(0, wait) / 1e9 for wait in waits), default=POLL_S_MAX)
        await _until(stop, min(wait_s, POLL_S_MAX), self._more)

    # state

    async def _ask(self, work: Callable[[], T]) -> T:
        """Something of the store, in a thread."""
        async with self._one_at_a_time:
            return await in_thread(work)

    async def _load(self) -> engine.Saved:
        if self._saved is None:
            self._saved = engine.decode(await self._ask(partial(self._store.load, engine.STATE)))
        return self._saved

    async def _change(self, change: Callable[[engine.Saved], engine.Saved]) -> None:
        """Make a change durable, then make it so."""
        async with self._lock:
            before = await self._load()
            after = change(before)
            if after == before:
                return
            await self._ask(partial(self._store.save, engine.STATE, engine.encode(after)))
            self._saved = after
        if after.outbox:
            self._more.set()

    async def _send(self) -> None:
        unsent = (await self._load()).unsent
        if not unsent:
            return
        await self._append(list(unsent))
        ids = {env.id for env in unsent}
        await self._change(lambda saved: replace(saved, unsent=[e for e in saved.unsent if e.id not in ids]))

    # webhooks

    async def _due(self) -> list[engine.Webhook]:
        now = self._clock.time_ns()
        return [webhook for webhook in _heads((await self._load()).outbox) if webhook.due_ns <= now]

    async def _deliver(self, webhook: engine.Webhook) -> None:
        try:
            target = self._target(webhook)
            url, headers = request(
                target, webhook.id, webhook.body.encode(), now_s=self._clock.time_ns() // 1_000_000_000, env=self._env
            )
            await (self._post or _no_post)(url, headers, webhook.body.encode(), target.timeout_s)
        except MistError as exc:
            failures = webhook.failures + 1
            if exc.retryable and failures < AGAIN.attempts_max:
                self.delivery_retried += 1
                pause = AGAIN.pause_s(failures, self._draw())
                pause = max(pause, min(exc.retry_after_s or 0.0, RETRY_AFTER_S_MAX))
                due = self._clock.time_ns() + max(1, round(pause * 1e9))
                later = replace(webhook, failures=failures, due_ns=due)
                await self._change(lambda saved: _replaced(saved, later))
                return
            self.delivery_failed += 1
            self._say(f"alert {webhook.rule!r}: webhook given up after {failures} attempts: {exc}")
        else:
            self.delivered += 1
        await self._change(lambda saved: _removed(saved, webhook.id))

    def _target(self, webhook: engine.Webhook) -> Target:
        for rule in self._rules:
            for target in rule.targets if rule.name == webhook.rule else ():
                if engine.target_key(target) == webhook.target:
                    return target
        raise MistError("the rule delivers there no more", retryable=False)


async def watch(
    store: Store,
    append: Append,
    rules: Sequence[Rule],
    *,
    stop: asyncio.Event,
    clock: Clock = SYSTEM,
    env: Mapping[str, str] = os.environ,
    source: str = SOURCE,
    on_event: Callable[[str], None] | None = None,
    on_start: Callable[[Alerts], None] | None = None,
) -> None:
    """Evaluate and deliver until `stop`. `store` is this loop's own; `on_start` is given the Alerts, for its facts."""
    async with AsyncExitStack() as stack:
        post = await stack.enter_async_context(HttpPost()) if any(rule.targets for rule in rules) else None
        alerts = Alerts(
            store, partial(measure, store), append, rules, post=post, clock=clock, env=env, source=source,
            on_event=on_event,
        )  # fmt: skip
        if on_start is not None:
            on_start(alerts)
        await alerts.run(stop)


def _heads(outbox: Sequence[engine.Webhook]) -> list[engine.Webhook]:
    """The oldest webhook of every target."""
    heads: dict[str, engine.Webhook] = {}
    for webhook in outbox:
        heads.setdefault(webhook.target, webhook)
    return list(heads.values())


def _removed(saved: engine.Saved, id: str) -> engine.Saved:
    return replace(saved, outbox=[w for w in saved.outbox if w.id != id])


def _replaced(saved: engine.Saved, webhook: engine.Webhook) -> engine.Saved:
    return replace(saved, outbox=[webhook if w.id == webhook.id else w for w in saved.outbox])


async def _no_post(url: str, headers: Mapping[str, str], body: bytes, timeout_s: float) -> None:
    raise MistError("nobody delivers webhooks here", retryable=False)


async def _until(stop: asyncio.Event, seconds: float, also: asyncio.Event | None = None) -> None:
    """Sleep so long, or until one of the events is set."""
    tasks = [asyncio.ensure_future(event.wait()) for event in (stop, also) if event is not None]
    try:
        await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
