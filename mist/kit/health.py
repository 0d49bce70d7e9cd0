"""Health of a service: is it alive, has it started, is it ready; for probes, for people and for `health.ping`.

Promises: checks run side by side, each at most for its timeout; a check that hangs or fails costs its own line and never
the page, and one that hangs is not started a second time while it hangs. A result is used again for `cache_s`, so that
many probes are not many calls. Draining says not ready at once, without asking anybody. What a page shows of an error of
ours is its message with secrets taken out; of any other error only its class, the rest goes to the log.

The JSON is the Go library's (`status`, `tool`, `version`, `uptime`, `checks`), with more keys beside:

    /healthz    200 `ok` while the process can answer at all
    /readyz     200 `ok`, 503 `degraded` when a check fails, 503 `not_ready` when told so; `reason` in words
    /startupz   503 `starting` until it was ready for the first time, 200 `ok` ever after

Checks are coroutine functions; what blocks goes through `asyncio.to_thread`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from msgspec import Struct

from mist.errors import InvalidArgument, MistError
from mist.kit.logging import redact_text
from mist.kit.server import Answer, App, Scope, page
from mist.protocol.envelope import Envelope
from mist.protocol.payloads import HEALTH_PING, HEALTH_PONG, HealthPong

_log = logging.getLogger("mist.kit.health")

TIMEOUT_S = 2.0
CACHE_S = 1.0
OK = "ok"

Check = Callable[[], Awaitable[object]]
"""Returns when all is well, raises when not. Its result means nothing."""


class Outcome(Struct, frozen=True):
    """What a check said: `text` is "ok" or why not; `took_s` how long it took."""

    text: str
    took_s: float


class Report(Struct, frozen=True):
    """One answer: the HTTP status and the JSON of the page."""

    code: int
    body: dict[str, Any]


class _Named:
    """One check, its last outcome, and its run under way."""

    def __init__(self, name: str, check: Check, timeout_s: float, cache_s: float, optional: bool) -> None:
        self.name = name
        self.check = check
        self.timeout_s = timeout_s
        self.cache_s = cache_s
        self.optional = optional
        self.task: asyncio.Task[Outcome] | None = None
        self.began = 0.0
        self.outcome: Outcome | None = None
        self.until = 0.0


class Health:
    """`tool` and `version` are what pages and pongs say. It is ready by default, like the Go library's.

    `detail()` gives more keys for /readyz (counters, for people).
    """

    def __init__(
        self,
        tool: str,
        version: str,
        *,
        detail: Callable[[], dict[str, Any]] = dict,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.tool = tool
        self.version = version
        self._detail = detail
        self._clock = clock
        self._born = clock()
        self._checks: dict[str, _Named] = {}
        self._held = ""
        self._draining = False
        self._started = False

    def add_check(
        self,
        name: str,
        check: Check,
        *,
        timeout_s: float = TIMEOUT_S,
        cache_s: float = CACHE_S,
        optional: bool = False,
    ) -> None:
        """An `optional` check is shown and does not make the service unready. Raises InvalidArgument for a name that
        is taken."""
        if name in self._checks or timeout_s <= 0 or cache_s < 0:
            raise InvalidArgument(f"health check {name!r}: the name is taken or a time cannot be right")
        self._checks[name] = _Named(name, check, timeout_s, cache_s, optional)

    def set_ready(self, ready: bool, reason: str = "not ready") -> None:
        """Say so by hand, whatever the checks find."""
        self._held = "" if ready else reason

    def drain(self) -> None:
        """It is going down: not ready from now on, for good."""
        self._draining = True

    @property
    def uptime_s(self) -> int:
        return int(self._clock() - self._born)

    # the answers

    def liveness(self) -> Report:
        return Report(200, self._body(OK))

    async def readiness(self) -> Report:
        held = "draining" if self._draining else self._held
        if held:
            return Report(503, {**self._body("not_ready"), "reason": held, **self._detail()})
        outcomes = await self._outcomes()
        failed = [
            f"{name}: {found.text}"
            for name, found in outcomes.items()
            if found.text != OK and not self._checks[name].optional
        ]
        if self._draining:  # it began while we asked
            return Report(503, {**self._body("not_ready"), "reason": "draining", **self._detail()})
        self._started = self._started or not failed
        body = self._body("degraded" if failed else OK)
        if outcomes:
            body["checks"] = {name: found.text for name, found in outcomes.items()}
            body["took_ms"] = {name: round(found.took_s * 1000, 3) for name, found in outcomes.items()}
        body["reason"] = "; ".join(failed)
        return Report(503 if failed else 200, {**body, **self._detail()})

    async def startup(self) -> Report:
        if not self._started:
            report = await self.readiness()
            if not self._started:
                return Report(503, {**report.body, "status": "starting"})
        return Report(200, self._body(OK))

    def pong(self, ping: Envelope) -> Envelope:
        """The `health.pong` that answers a `health.ping`. Raises InvalidArgument for another type."""
        if ping.type != HEALTH_PING:
            raise InvalidArgument(f"{ping.type} is not {HEALTH_PING}")
        payload = HealthPong(from_=self.tool, version=self.version, uptime_s=self.uptime_s)
        return Envelope.new(
            HEALTH_PONG, payload, source=self.tool, correlation_id=ping.id, causation_id=ping.id,
            traceparent=ping.traceparent, tenant=ping.tenant,
        )  # fmt: skip

    def pages(self) -> dict[str, App]:
        """The three paths, for a `Site`."""

        async def live(scope: Scope) -> Answer:
            return _answer(self.liveness())

        async def ready(scope: Scope) -> Answer:
            return _answer(await self.readiness())

        async def started(scope: Scope) -> Answer:
            return _answer(await self.startup())

        return {"/healthz": page(live), "/readyz": page(ready), "/startupz": page(started)}

    def _body(self, status: str) -> dict[str, Any]:
        seconds = self.uptime_s
        return {
            "status": status, "tool": self.tool, "version": self.version, "uptime": go_duration(seconds),
            "uptime_s": seconds,
        }  # fmt: skip

    # the checks

    async def _outcomes(self) -> dict[str, Outcome]:
        found = await asyncio.gather(*(self._ask(named) for named in self._checks.values()))
        return dict(zip(self._checks, found, strict=True))

    async def _ask(self, named: _Named) -> Outcome:
        """The outcome of before where it is fresh, else that of the run under way, or of a new one."""
        now = self._clock()
        if named.outcome is not None and now < named.until:
            return named.outcome
        if named.task is None or named.task.done():
            named.began = now
            named.task = asyncio.create_task(self._run(named), name=f"health check {named.name}")
        # not wait_for: that would wait for a check which ignores its cancellation
        await asyncio.wait({named.task}, timeout=max(0.0, named.began + named.timeout_s - now))
        if named.task.done() and not named.task.cancelled():
            return named.task.result()
        named.task.cancel()
        return self._keep(named, f"no answer within {named.timeout_s:g} s")

    async def _run(self, named: _Named) -> Outcome:
        try:
            await named.check()
        except MistError as exc:
            return self._keep(named, redact_text(str(exc)) or type(exc).__name__)
        except Exception as exc:
            _log.warning("health check %s failed", named.name, exc_info=True)
            return self._keep(named, f"failed: {type(exc).__name__}")
        return self._keep(named, OK)

    def _keep(self, named: _Named, text: str) -> Outcome:
        now = self._clock()
        named.outcome = Outcome(text, max(0.0, now - named.began))
        named.until = now + named.cache_s
        return named.outcome


def _answer(report: Report) -> Answer:
    # with the line end that the Go encoder writes
    return Answer(report.code, msgspec.json.encode(report.body) + b"\n", headers=((b"cache-control", b"no-store"),))


def go_duration(seconds: int) -> str:
    """Whole seconds as Go prints a duration: `0s`, `1m0s`, `25h1m1s`."""
    minutes, s = divmod(seconds, 60)
    hours, m = divmod(minutes, 60)
    if hours:
        return f"{hours}h{m}m{s}s"
    return f"{m}m{s}s" if m else f"{s}s"
