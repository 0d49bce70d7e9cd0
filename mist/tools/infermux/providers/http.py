"""How adapters ask over HTTP: one pool of connections that are kept, everything bounded, every failure a ProviderError.

Promises
- One try; a kept connection that the provider had closed is none, a new one is made then. No redirects, no proxies or credentials
  out of the environment, no cookies; TLS certificates are verified.
- Bounded: the time to connect, the time of the answer, the bytes of a body, of an event and of a whole stream.
- A call that is cancelled or left half read closes its connection; one that was read to its end hands it back.
- No error and no log line holds a key: neither ours nor one that a provider repeats.

The connections are those of mist/kit/http1_client.py (httptools, extra `infer`), looked for when the pool is made. A pool belongs to
one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

from mist.errors import ProtocolError, TimedOut, TooLarge, Unavailable
from mist.kit.http1_client import CONNECT_TIMEOUT_S, Pool, Response
from mist.kit.http1_target import Target, checked_headers, host_of
from mist.protocol.url import redact
from mist.tools.infermux.failures import Kind, ProviderError
from mist.tools.infermux.providers.refusals import asked_to_wait_s, error_of, kind_of, reason_of, said_by
from mist.tools.infermux.providers.sse import EVENT_BYTES_MAX, Event, Parser

BODY_BYTES_MAX = 64 * 1024 * 1024
ERROR_BYTES_MAX = 64 * 1024
DRAIN_S = 0.25
"""How long the end of a stream that said its last word is waited for, to keep its connection."""
_SECRET_CHARS_MIN = 6
"""Shorter values are not taken out of texts: they are no keys, and stand in many words."""


def utc_now() -> datetime:
    return datetime.now(UTC)


class Http:
    """What one provider is asked through. `headers` go with every request; their values, and `secrets`, are kept out of
    errors. A `pool` that is given is used as it is, and
    `aclose` leaves it open. `now` is for a Retry-After that is a date."""

    def __init__(
        self,
        provider: str,
        base_url: str,
        headers: Mapping[str, str],
        *,
        secrets: Sequence[str] = (),
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        pool: Pool | None = None,
        now: Callable[[], datetime] = utc_now,
        body_bytes_max: int = BODY_BYTES_MAX,
        event_bytes_max: int = EVENT_BYTES_MAX,
    ) -> None:
        self._provider = provider
        self._own = pool is None
        self._pool = pool or Pool(connect_timeout_s=connect_timeout_s)
        where = Target.of(base_url, f"provider {provider}: base_url")
        self._origin, self._path, self._query = where.origin, where.path.rstrip("/"), where.query
        common = {
            "host": host_of(self._origin), "user-agent": "mist-infermux", "accept-encoding": "identity",
            **checked_headers(headers, f"provider {provider}"), "content-type": "application/json",
        }  # fmt: skip
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in common.items())
        hidden = {*headers.values(), *secrets}
        self._hidden = sorted((s for s in hidden if len(s) >= _SECRET_CHARS_MIN), key=len, reverse=True)
        self._now = now
        self._body_bytes_max = body_bytes_max
        self._event_bytes_max = event_bytes_max
        self._heads: dict[str, bytes] = {}

    async def post(self, path: str, body: bytes, *, timeout_s: float) -> bytes:
        """The body of a 200."""
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        try:
            response = await self._send(path, body, deadline_s)
            try:
                if response.status != 200:
                    raise await self._refused(response, deadline_s)
                return await self._body(response, self._body_bytes_max, deadline_s)
            finally:
                response.release()
        except TimedOut as exc:
            raise self.error("timeout", f"no answer within {timeout_s:g} s") from exc

    @asynccontextmanager
    async def stream(self, path: str, body: bytes, *, timeout_s: float) -> AsyncIterator[Events]:
        """The events of a 200. Raises before it gives any whatever the head of the answer says."""
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        try:
            response = await self._send(path, body, deadline_s)
            try:
                if response.status != 200:
                    raise await self._refused(response, deadline_s)
                if response.headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json":
                    raise await self._no_stream(response, deadline_s)
                self._check_plain(response)
            except BaseException:
                response.close()
                raise
        except TimedOut as exc:
            raise self.error("timeout", f"no answer within {timeout_s:g} s") from exc
        events = Events(self, response, timeout_s, deadline_s)
        try:
            yield events
            await events.drain()
        finally:
            response.release()

    def error(
        self,
        kind: Kind,
        message: str,
        *,
        status: int = 0,
        retry_after_s: float | None = None,
        begun: bool = False,
        hint: str = "",
    ) -> ProviderError:
        """To be raised. What must not be seen is taken out of the message."""
        return ProviderError(
            kind, self._clean(message), provider=self._provider, status=status, retry_after_s=retry_after_s, begun=begun,
            hint=hint,
        )  # fmt: skip

    def told(self, error: Mapping[str, Any], *, begun: bool = False, status: int = 0) -> ProviderError:
        """An error object that came inside an answer."""
        return self.error(kind_of(0, error), f"failed while answering: {reason_of(error)}", status=status, begun=begun)

    async def aclose(self) -> None:
        if self._own:
            await self._pool.aclose()

    async def _send(self, path: str, body: bytes, deadline_s: float) -> Response:
        head = self._heads.get(path)
        if head is None:
            target = f"POST {self._path}{path}{self._query} HTTP/1.1\r\n{self._headers}content-length: "
            head = self._heads[path] = target.encode("ascii")
        try:
            return await self._pool.post(
                self._origin, b"%b%d\r\n\r\n" % (head, len(body)), body, deadline_s=deadline_s, repeatable=True
            )
        except Unavailable as exc:
            raise self.error("connection", f"cannot be reached: {exc.message}") from exc
        except (ProtocolError, TooLarge) as exc:
            raise self.error("bad_answer", exc.message) from exc

    async def _read(self, response: Response, deadline_s: float) -> bytes:
        try:
            return await response.read(deadline_s)
        except (ProtocolError, TooLarge, Unavailable) as exc:
            raise self.error("bad_answer", exc.message) from exc

    async def _body(self, response: Response, bytes_max: int, deadline_s: float, *, cut: bool = False) -> bytes:
        """All of it, or with `cut` what fits."""
        self._check_plain(response)
        parts: list[bytes] = []
        size = 0
        while part := await self._read(response, deadline_s):
            parts.append(part)
            size += len(part)
            if size > bytes_max:
                response.close()
                if cut:
                    return b"".join(parts)[:bytes_max]
                raise self.error("bad_answer", f"the answer is larger than {bytes_max} bytes", status=response.status)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _check_plain(self, response: Response) -> None:
        if response.headers.get("content-encoding", "identity") != "identity":
            what = "answered with a compressed body, which nobody asked for"
            raise self.error("bad_answer", what, status=response.status)

    async def _refused(self, response: Response, deadline_s: float) -> ProviderError:
        status, headers = response.status, response.headers
        if 300 <= status < 400:
            where = redact(headers.get("location", ""))
            return self.error(
                "bad_answer", f"answered {status} and sends us to {where or 'nowhere'}", status=status,
                hint="redirects are not followed; is base_url right?",
            )  # fmt: skip
        try:
            error = said_by(await self._body(response, ERROR_BYTES_MAX, deadline_s, cut=True))
        except ProviderError:
            error = {}  # the status says enough
        reason = reason_of(error)
        return self.error(
            kind_of(status, error), f"answered {status}" + (f": {reason}" if reason else ""), status=status,
            retry_after_s=asked_to_wait_s(headers, self._now()),
        )  # fmt: skip

    async def _no_stream(self, response: Response, deadline_s: float) -> ProviderError:
        """Some servers refuse with status 200."""
        error = error_of(await self._body(response, ERROR_BYTES_MAX, deadline_s, cut=True))
        if error is not None:
            return self.told(error, status=response.status)
        return self.error("bad_answer", "answered a stream with a JSON document", status=response.status)

    def _clean(self, text: str) -> str:
        for secret in self._hidden:
            text = text.replace(secret, "***")
        return text


class Events:
    """The events of an answer under way."""

    def __init__(self, http: Http, response: Response, timeout_s: float, deadline: float) -> None:
        self._http = http
        self._response = response
        self._parser = Parser(http._event_bytes_max)
        self._timeout_s = timeout_s
        self._deadline = deadline
        self._loop = asyncio.get_running_loop()
        self._left = http._body_bytes_max
        self.begun = False
        """Whether a piece was handed out."""

    async def read(self) -> list[Event] | None:
        """The next events, maybe none; None at the end of the answer. The time limit goes on over reads."""
        try:
            data = await self._http._read(self._response, self._deadline)
        except TimedOut as exc:
            what = "nothing more came" if self.begun else "nothing came"
            raise self._http.error("timeout", f"{what} within {self._timeout_s:g} s", begun=self.begun) from exc
        except ProviderError as exc:
            exc.begun = self.begun
            raise
        if not data:
            return None
        self._left -= len(data)
        if self._left < 0:
            limit = self._http._body_bytes_max
            raise self._http.error("bad_answer", f"the answer is larger than {limit} bytes", begun=self.begun)
        try:
            return self._parser.feed(data)
        except TooLarge as exc:
            raise self._http.error("bad_answer", exc.message, begun=self.begun) from exc

    def handed_out(self) -> None:
        """A piece was taken: the time until the next one begins."""
        self.begun = True
        self._deadline = self._loop.time() + self._timeout_s

    async def drain(self) -> None:
        """The last word was said; what follows is the end of the body, mostly there already."""
        deadline_s = self._loop.time() + DRAIN_S
        with contextlib.suppress(TimedOut, ProviderError):  # nothing is lost but the connection
            while not self._response.complete and await self._http._read(self._response, deadline_s):
                pass
