"""Webhooks: a signed POST of JSON, and how a receiver checks it.

The headers are those of the Standard Webhooks specification, so its libraries verify ours: `webhook-id`,
`webhook-timestamp` (Unix seconds) and, where a secret is set, `webhook-signature: v1,<base64>` with HMAC-SHA256 over
`<id>.<timestamp>.<body>`. The timestamp is inside the signature: a request that is replayed later is refused, and one
that is replayed at once has an id the receiver has seen. A secret `whsec_<base64>` stands for these bytes, any other for
its UTF-8.

Promises: redirects are not followed; every phase has a time limit; the answer is not read beyond a bound; what went
wrong is an error of ours that says whether to try again. The client is httpx (extra `client`), as for `http:`.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from mist.errors import InvalidArgument, Refused, TimedOut, TransportError, Unavailable
from mist.protocol.url import redact
from mist.tools.tokentrace.alerts.rules import Target
from mist.transport._status import error_for

if TYPE_CHECKING:
    import httpx

ANSWER_BYTES_MAX = 16 * 1024
CONNECTIONS_MAX = 20
TOLERANCE_S = 300.0
Post = Callable[[str, Mapping[str, str], bytes, float], Awaitable[None]]
"""(url, headers, body, timeout_s); raises a MistError where that was no success."""


def sign(id: str, time_s: int, body: bytes, secret: str) -> str:
    """The value of `webhook-signature`."""
    content = b"%s.%d.%s" % (id.encode(), time_s, body)
    return "v1," + base64.b64encode(hmac.digest(_key(secret), content, hashlib.sha256)).decode()


def verify(
    headers: Mapping[str, str], body: bytes, secret: str, *, now_s: float, tolerance_s: float = TOLERANCE_S
) -> str:
    """The id of a webhook that is genuine and fresh. Raises Refused. Header names are compared in any case.

    Remember the ids for `tolerance_s` and refuse one that was seen, where acting twice would harm.
    """
    lower = {key.lower(): value for key, value in headers.items()}
    id, stamp = lower.get("webhook-id", ""), lower.get("webhook-timestamp", "")
    if not id or not (stamp.isascii() and stamp.isdigit() and len(stamp) < 15):
        raise Refused("webhook: id or timestamp is missing")
    if abs(now_s - int(stamp)) > tolerance_s:
        raise Refused(f"webhook {id[:64]}: it is more than {tolerance_s:g} s old, or ahead")
    expected = sign(id, int(stamp), body, secret).encode()
    given = lower.get("webhook-signature", "").split()
    if not any(hmac.compare_digest(expected, one.encode()) for one in given):
        raise Refused(f"webhook {id[:64]}: the signature is not ours")
    return id


def request(target: Target, id: str, body: bytes, *, now_s: int, env: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """URL and headers. Raises InvalidArgument for a variable that is gone since the rules were loaded."""
    headers = {
        **target.headers,
        **{key: _variable(env, variable) for key, variable in target.headers_env.items()},
        "content-type": "application/json",
        "webhook-id": id,
        "webhook-timestamp": str(now_s),
    }
    if target.secret_env:
        headers["webhook-signature"] = sign(id, now_s, body, _variable(env, target.secret_env))
    return target.url or _variable(env, target.url_env), headers


def _variable(env: Mapping[str, str], name: str) -> str:
    value = env.get(name)
    if not value:
        raise InvalidArgument(f"the environment variable {name} is not set any more")
    return value


def _key(secret: str) -> bytes:
    if not secret.startswith("whsec_"):
        return secret.encode()
    try:
        return base64.b64decode(secret[6:], validate=True)
    except binascii.Error as exc:
        raise InvalidArgument("a webhook secret that begins with whsec_ goes on in base64") from exc


class HttpPost:
    """`Post` over one pool of connections; for `async with`."""

    def __init__(self) -> None:
        self._httpx = _httpx()
        self._client: httpx.AsyncClient | None = None

    async def __aenter__(self) -> HttpPost:
        limits = self._httpx.Limits(max_connections=CONNECTIONS_MAX, keepalive_expiry=30.0)
        self._client = self._httpx.AsyncClient(limits=limits, follow_redirects=False)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._client is not None:
            await self._client.aclose()

    async def __call__(self, url: str, headers: Mapping[str, str], body: bytes, timeout_s: float) -> None:
        httpx, where = self._httpx, redact(url)
        assert self._client is not None  # noqa: S101 - a programming error
        try:
            async with (
                asyncio.timeout(2 * timeout_s),  # httpx's limit is for each phase: an answer could drip for ever
                self._client.stream("POST", url, content=body, headers=dict(headers), timeout=timeout_s) as answer,
            ):
                status, said, got = answer.status_code, answer.headers, b""
                async for chunk in answer.aiter_raw():
                    got += chunk
                    if len(got) > ANSWER_BYTES_MAX:
                        break
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as exc:
            raise InvalidArgument(f"{where}: {exc}") from exc
        except (httpx.TimeoutException, TimeoutError) as exc:
            raise TimedOut(f"{where}: no answer within {timeout_s:g} s ({type(exc).__name__})") from exc
        except httpx.NetworkError as exc:
            raise Unavailable(f"{where}: cannot be reached: {exc}") from exc
        except httpx.HTTPError as exc:
            raise TransportError(f"{where}: {exc}") from exc
        if not 200 <= status < 300:
            raise error_for(status, said, got, where)


def _httpx() -> Any:
    try:
        import httpx
    except ImportError as exc:
        raise InvalidArgument(
            "webhooks need a package that is not installed (httpx)", hint="pip install 'mist-stack[client]'"
        ) from exc
    return httpx
