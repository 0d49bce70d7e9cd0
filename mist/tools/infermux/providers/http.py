"""How adapters ask over HTTP: one pool of connections that are kept, everything bounded, every failure a ProviderError.

Promises
- One try. No redirects, no proxies or credentials out of the environment, no cookies; TLS certificates are verified.
- Bounded: the time to connect, the time of the answer, the bytes of a body, of an event and of a whole stream.
- A call that is cancelled or left half read closes its connection; one that was read to its end hands it back.
- No error and no log line holds a key: neither ours nor one that a provider repeats.

Needs aiohttp (extra `infer`), looked for when the pool is made. A pool belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from mist.errors import InvalidArgument, TooLarge
from mist.protocol.url import redact
from mist.tools.infermux.failures import Kind, ProviderError
from mist.tools.infermux.providers.refusals import asked_to_wait_s, error_of, kind_of, reason_of, said_by
from mist.tools.infermux.providers.sse import EVENT_BYTES_MAX, Event, Parser

if TYPE_CHECKING:
    import aiohttp

CONNECT_TIMEOUT_S = 10.0
CONNECTIONS_MAX = 1024
KEEPALIVE_S = 60.0
BODY_BYTES_MAX = 64 * 1024 * 1024
ERROR_BYTES_MAX = 64 * 1024
DRAIN_S = 0.25
"""How long the end of a stream that said its last word is waited for, to keep its connection."""
_LARGE = 1024 * 1024
_SECRET_CHARS_MIN = 6
"""Shorter values are not taken out of texts: they are no keys, and stand in many words."""


def utc_now() -> datetime:
    return datetime.now(UTC)


class Pool:
    """The connections of one or more providers."""

    def __init__(
        self,
        *,
        connections_max: int = CONNECTIONS_MAX,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        keepalive_s: float = KEEPALIVE_S,
    ) -> None:
        self.aiohttp = _aiohttp()
        self._connections_max = connections_max
        self._keepalive_s = keepalive_s
        self._timeout = self.aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout_s)
        self._session: aiohttp.ClientSession | None = None

    @property
    def session(self) -> aiohttp.ClientSession:
        if self._session is None:
            http = self.aiohttp
            self._session = http.ClientSession(
                connector=http.TCPConnector(
                    limit=self._connections_max, keepalive_timeout=self._keepalive_s, ttl_dns_cache=60
                ),
                timeout=self._timeout,
                cookie_jar=http.DummyCookieJar(),
                trust_env=False,
                auto_decompress=False,  # nothing compressed is asked for: a small body stays a small body
                skip_auto_headers=("accept", "accept-encoding", "user-agent"),
            )
        return self._session

    async def aclose(self) -> None:
        if self._session is not None:
            await self._session.close()


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
        self._base = _checked_url(provider, base_url)
        self._headers = {
            "user-agent": "mist-infermux", "accept-encoding": "identity", **_checked_headers(provider, headers),
            "content-type": "application/json",
        }  # fmt: skip
        hidden = {*headers.values(), *secrets}
        self._hidden = sorted((s for s in hidden if len(s) >= _SECRET_CHARS_MIN), key=len, reverse=True)
        self._now = now
        self._body_bytes_max = body_bytes_max
        self._event_bytes_max = event_bytes_max
        self._urls: dict[str, Any] = {}

    async def post(self, path: str, body: bytes, *, timeout_s: float) -> bytes:
        """The body of a 200."""
        try:
            async with asyncio.timeout(timeout_s):
                response = await self._send(path, body)
                try:
                    if response.status != 200:
                        raise await self._refused(response)
                    return await self._body(response, self._body_bytes_max)
                finally:
                    response.release()
        except TimeoutError as exc:
            raise self.error("timeout", f"no answer within {timeout_s:g} s") from exc

    @asynccontextmanager
    async def stream(self, path: str, body: bytes, *, timeout_s: float) -> AsyncIterator[Events]:
        """The events of a 200. Raises before it gives any whatever the head of the answer says."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        try:
            async with asyncio.timeout_at(deadline):
                response = await self._send(path, body)
                try:
                    if response.status != 200:
                        raise await self._refused(response)
                    if response.content_type == "application/json":
                        raise await self._no_stream(response)
                    self._check_plain(response)
                except BaseException:
                    response.close()
                    raise
        except TimeoutError as exc:
            raise self.error("timeout", f"no answer within {timeout_s:g} s") from exc
        events = Events(self, response, timeout_s, deadline)
        try:
            yield events
        except BaseException:
            response.close()
            raise
        if not response.content.is_eof():
            await events.drain()

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

    async def _send(self, path: str, body: bytes) -> aiohttp.ClientResponse:
        url = self._urls.get(path)
        if url is None:
            base = self._base
            url = self._urls[path] = base.with_path(base.path.rstrip("/") + path, keep_query=True)
        with self._translated("connection", "cannot be reached"):
            return await self._pool.session.post(
                url,
                data=body if len(body) <= _LARGE else io.BytesIO(body),
                headers=self._headers,
                allow_redirects=False,
            )

    async def _body(self, response: aiohttp.ClientResponse, bytes_max: int, *, cut: bool = False) -> bytes:
        """All of it, or with `cut` what fits."""
        self._check_plain(response)
        content = response.content
        parts: list[bytes] = []
        size = 0
        with self._translated("bad_answer", "the answer broke off"):
            while not content.at_eof():
                part = await content.readany()
                parts.append(part)
                size += len(part)
                if size > bytes_max:
                    if cut:
                        response.close()
                        return b"".join(parts)[:bytes_max]
                    response.close()
                    raise self.error(
                        "bad_answer", f"the answer is larger than {bytes_max} bytes", status=response.status
                    )
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _check_plain(self, response: aiohttp.ClientResponse) -> None:
        if response.headers.get("content-encoding", "identity") != "identity":
            what = "answered with a compressed body, which nobody asked for"
            raise self.error("bad_answer", what, status=response.status)

    async def _refused(self, response: aiohttp.ClientResponse) -> ProviderError:
        status, headers = response.status, response.headers
        if 300 <= status < 400:
            where = redact(headers.get("location", ""))
            return self.error(
                "bad_answer", f"answered {status} and sends us to {where or 'nowhere'}", status=status,
                hint="redirects are not followed; is base_url right?",
            )  # fmt: skip
        try:
            error = said_by(await self._body(response, ERROR_BYTES_MAX, cut=True))
        except ProviderError:
            error = {}  # the status says enough
        reason = reason_of(error)
        return self.error(
            kind_of(status, error), f"answered {status}" + (f": {reason}" if reason else ""), status=status,
            retry_after_s=asked_to_wait_s(headers, self._now()),
        )  # fmt: skip

    async def _no_stream(self, response: aiohttp.ClientResponse) -> ProviderError:
        """Some servers refuse with status 200."""
        error = error_of(await self._body(response, ERROR_BYTES_MAX, cut=True))
        if error is not None:
            return self.told(error, status=response.status)
        return self.error("bad_answer", "answered a stream with a JSON document", status=response.status)

    @contextlib.contextmanager
    def _translated(self, kind: Kind, what: str) -> Iterator[None]:
        http = self._pool.aiohttp
        try:
            yield
        except http.ConnectionTimeoutError as exc:
            raise self.error("connection", "cannot be reached: no connection in time") from exc
        except TimeoutError:
            raise
        except http.ClientConnectorError as exc:
            raise self.error("connection", f"cannot be reached: {exc.os_error or exc}") from exc
        except (http.ClientPayloadError, http.ClientResponseError) as exc:
            raise self.error("bad_answer", f"the answer is no proper HTTP: {type(exc).__name__}") from exc
        except (http.ClientError, OSError) as exc:
            raise self.error(kind, f"{what}: {type(exc).__name__}: {exc}") from exc

    def _clean(self, text: str) -> str:
        for secret in self._hidden:
            text = text.replace(secret, "***")
        return text


class Events:
    """The events of an answer under way."""

    def __init__(self, http: Http, response: aiohttp.ClientResponse, timeout_s: float, deadline: float) -> None:
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
            async with asyncio.timeout_at(self._deadline):
                with self._http._translated("bad_answer", "the answer broke off"):
                    data = await self._response.content.readany()
        except TimeoutError as exc:
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
        try:
            async with asyncio.timeout(DRAIN_S):
                while await self._response.content.readany():
                    pass
        except (TimeoutError, self._http._pool.aiohttp.ClientError, OSError):
            self._response.close()  # nothing is lost but the connection


def _checked_url(provider: str, base_url: str) -> Any:
    from yarl import URL

    try:
        url = URL(base_url)
    except ValueError as exc:
        raise InvalidArgument(f"provider {provider}: base_url={redact(base_url)!r} is no URL: {exc}") from exc
    if url.scheme not in ("http", "https") or not url.host:
        raise InvalidArgument(
            f"provider {provider}: base_url={redact(base_url)!r} is no http URL",
            hint="for example http://127.0.0.1:11434/v1",
        )
    if url.user or url.password or redact(base_url) != base_url:
        raise InvalidArgument(
            f"provider {provider}: base_url holds credentials", hint="api_key and headers are for these"
        )
    return url


def _checked_headers(provider: str, headers: Mapping[str, str]) -> dict[str, str]:
    for name, value in headers.items():
        if not (value.isprintable() and value.isascii()):
            raise InvalidArgument(f"provider {provider}: the value of the header {name} holds what no header may hold")
        if not name or not name.replace("-", "").replace("_", "").isalnum() or not name.isascii():
            raise InvalidArgument(f"provider {provider}: {name!r} is no name of a header")
    return {name.lower(): value for name, value in headers.items()}


def _aiohttp() -> Any:
    try:
        import aiohttp
    except ImportError as exc:
        raise InvalidArgument(
            "asking providers over HTTP needs a package that is not installed (aiohttp)",
            hint="pip install 'mist-stack[infer]'",
        ) from exc
    return aiohttp
