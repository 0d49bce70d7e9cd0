"""The alerts over HTTP, as the seed's documents have them: list, status, silence, delete.

| route | answer |
|---|---|
| `GET /alerts` | `{"alerts": [...]}` |
| `GET /alerts/{name}/status` | one of them |
| `POST /alerts/{name}/silence` | `{"duration": "2h"}` (`"0"` ends a silence) -> `{"silenced_until"}`, RFC 3339, null when ended |
| `DELETE /alerts/{name}` | 204: evaluated no more until its configuration changes |

Rules are configuration: there is no route that makes one. Each order is one transaction on the store.
"""

from __future__ import annotations

import asyncio
import datetime
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec import Struct

from mist.errors import InvalidArgument, Malformed, MistError, NotFound
from mist.kit.server import Answer, App, Receive, Scope, Send, refusal, reply
from mist.quantities import Duration
from mist.tools.tokentrace.alerts import control
from mist.tools.tokentrace.alerts.rules import Rule
from mist.tools.tokentrace.store import Store
from mist.transport.body import Gone, Intake, Limits

T = TypeVar("T")
_LIMITS = Limits(body_bytes_max=4096, inflight_requests_max=16)


class Silence(Struct, frozen=True, forbid_unknown_fields=True):
    duration: str


class AlertApi:
    """The routes, as doors of a site."""

    def __init__(self, place: Path | str, rules: Sequence[Rule], *, clock: Callable[[], int] = time.time_ns) -> None:
        self._place = place
        self._rules = rules
        self._clock = clock
        self._intake = Intake(_LIMITS)

    def doors(self) -> dict[str, App]:
        return {"/alerts": self._app, "/alerts/": self._app}

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            answer = await self._answer(scope, receive)
        except Gone:
            return
        except MistError as exc:
            answer = refusal(exc.http_status, exc)
        await reply(scope, send, answer)

    async def _answer(self, scope: Scope, receive: Receive) -> Answer:
        path, method, now = scope["path"], scope["method"], self._clock()
        parts = path.removeprefix("/alerts").strip("/").split("/")
        name = parts[0]
        if len(parts) == 1:
            wanted: str | None = "DELETE" if name else "GET"
        else:
            wanted = {"status": "GET", "silence": "POST"}.get("/".join(parts[1:]))
        if wanted is None:
            raise NotFound(
                f"nothing is served at {path}", hint="/alerts, /alerts/{name}/status, /alerts/{name}/silence"
            )
        if method != wanted and (method, wanted) != ("HEAD", "GET"):
            hint = f"{wanted}; rules are configuration" if not name else wanted
            error = InvalidArgument(f"{method} is not served at {path}", hint=hint)
            return refusal(405, error, ((b"allow", wanted.encode()),))
        if not name:
            found = await self._on(lambda store: control.list_alerts(store, self._rules, now_ns=now))
            return Answer(200, msgspec.json.encode({"alerts": found}))
        if method == "DELETE":
            await self._on(lambda store: control.delete(store, self._rules, name))
            return Answer(204, b"")
        if parts[-1] == "status":
            status = await self._on(lambda store: control.status(store, self._rules, name, now_ns=now))
            return Answer(200, msgspec.json.encode(status))
        headers = {bytes(k).lower(): bytes(v) for k, v in scope["headers"]}
        with self._intake.request() as request:
            body = await request.read(headers, receive)
        try:
            asked = msgspec.json.decode(body, type=Silence)
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            raise Malformed(f"body: {exc}") from exc
        seconds = float(Duration(asked.duration))
        until = await self._on(lambda store: control.silence(store, self._rules, name, seconds, now_ns=now))
        text = datetime.datetime.fromtimestamp(until // 10**9, datetime.UTC).isoformat() if until else None
        return Answer(200, msgspec.json.encode({"silenced_until": text}))

    async def _on(self, work: Callable[[Store], T]) -> T:
        def within() -> T:
            with Store.open(self._place) as store:
                return work(store)

        return await asyncio.to_thread(within)
