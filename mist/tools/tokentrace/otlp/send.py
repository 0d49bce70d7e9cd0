"""OTLP out: stored spans to any OTLP endpoint over HTTP.

    sent = await export(envelopes, "otlp+http://collector:4318")

Promises: batches of bounded size, in order; a batch is repeated while that can help (429, 502, 503, 504, no connection, no
answer), no sooner than the endpoint asks for, and the error that is raised at last is the last one, its `meta["spans"]`
saying how many were taken before; a batch whose answer was lost is sent again, so that a span may arrive twice. What the
endpoint rejected is counted with its words, what OTLP cannot say with the reason: neither stops the rest.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from mist.errors import Ambiguous, InvalidArgument, MistError, TransportError, Unavailable
from mist.kit.retry import RetryPolicy, retry
from mist.protocol.envelope import Envelope
from mist.tools.tokentrace.otlp import wire
from mist.tools.tokentrace.otlp.encode import encode_json, encode_protobuf, request_of
from mist.tools.tokentrace.otlp.receive import JSON, PATH, PROTOBUF
from mist.transport._status import error_for

if TYPE_CHECKING:
    import httpx

SCHEMES = {"otlp+http": "http", "otlp+https": "https"}
PORT = 4318
BATCH_SPANS = 1000
BATCH_BYTES_MAX = 4 * 1024 * 1024
TIMEOUT_S = 10.0
REASONS_KEPT = 100
REPEATED = ("429", "502", "503", "504")
POLICY = RetryPolicy(attempts_max=8, wait_s=0.5, wait_s_max=15.0, deadline_s=120.0)


class Sent(Struct):
    """`spans` were taken by the endpoint, `rejected` not; `refused` could not be sent. `reasons`: the first 100."""

    spans: int = 0
    rejected: int = 0
    refused: int = 0
    reasons: list[str] = []

    def tell(self, reason: str) -> None:
        if reason and len(self.reasons) < REASONS_KEPT:
            self.reasons.append(reason)


def endpoint(url: str) -> str:
    """`otlp+http://host[:4318][/v1/traces]` as the URL that is posted to. Raises InvalidArgument."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as exc:
        raise InvalidArgument(f"{url!r}: {exc}") from exc
    scheme = SCHEMES.get(parts.scheme)
    if scheme is None or not parts.hostname:
        raise InvalidArgument(f"{url!r} is no OTLP endpoint", hint="for example otlp+http://localhost:4318")
    place = parts.netloc if port is not None or scheme == "https" else f"{parts.netloc.rstrip(':')}:{PORT}"
    return f"{scheme}://{place}{parts.path if parts.path not in ('', '/') else PATH}" + (
        f"?{parts.query}" if parts.query else ""
    )


async def export(
    envelopes: Iterable[Envelope],
    to: str,
    *,
    headers: Mapping[str, str] | None = None,
    json: bool = False,
    zipped: bool = True,
    timeout_s: float = TIMEOUT_S,
    policy: RetryPolicy = POLICY,
    on_retry: Callable[[Exception, int, float], None] | None = None,
    client: httpx.AsyncClient | None = None,
) -> Sent:
    """Send them all. `headers` go with every request (authorization). Raises the endpoint's last error."""
    url = endpoint(to)
    sent = Sent()

    def refuse(error: InvalidArgument) -> None:
        sent.refused += 1
        sent.tell(error.message)

    httpx = _httpx()
    kind = JSON if json else PROTOBUF
    head = {**(headers or {}), "content-type": kind, **({"content-encoding": "gzip"} if zipped else {})}
    pool = client or httpx.AsyncClient(timeout=timeout_s)
    try:
        for batch in _batches(envelopes):
            refused = sent.refused
            request = request_of(batch, refuse)
            spans = len(batch) - (sent.refused - refused)
            if not spans:
                continue
            data = encode_json(request) if json else encode_protobuf(request)
            body = gzip.compress(data, 6, mtime=0) if zipped else data
            try:
                rejected, reason = await retry(
                    partial(_post, pool, url, head, body), policy, classify=_again, on_retry=on_retry
                )
            except MistError as exc:
                exc.meta["spans"] = str(sent.spans)
                raise
            rejected = min(rejected, spans)
            sent.rejected += rejected
            sent.spans += spans - rejected
            sent.tell(reason)
    finally:
        if client is None:
            await pool.aclose()
    return sent


def _batches(envelopes: Iterable[Envelope]) -> Iterator[list[Envelope]]:
    batch: list[Envelope] = []
    size = 0
    for envelope in envelopes:
        if batch and (len(batch) >= BATCH_SPANS or size + len(envelope.payload) > BATCH_BYTES_MAX):
            yield batch
            batch, size = [], 0
        batch.append(envelope)
        size += len(envelope.payload)
    if batch:
        yield batch


def _again(error: Exception) -> bool:
    """What OTLP says may be repeated; an error that is no answer, what it says itself."""
    if not isinstance(error, MistError):
        return False
    status = error.meta.get("status")
    return error.retryable if status is None else status in REPEATED


async def _post(client: Any, url: str, headers: Mapping[str, str], body: bytes) -> tuple[int, str]:
    """How many spans were rejected, and the endpoint's words."""
    httpx = _httpx()
    try:
        answer = await client.post(url, content=body, headers=headers, follow_redirects=False)
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as exc:
        raise Unavailable(f"{url}: cannot connect: {exc}", hint="is the endpoint running?") from exc
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as exc:
        raise InvalidArgument(f"{url}: {exc}") from exc
    except (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError) as exc:
        raise Ambiguous(f"{url}: no answer: {type(exc).__name__}: {exc}") from exc
    except httpx.HTTPError as exc:
        raise TransportError(f"{url}: {exc}") from exc
    kind = answer.headers.get("content-type", "").split(";")[0].strip()
    if answer.status_code >= 300:
        raise error_for(answer.status_code, answer.headers, _reason(answer.content, kind).encode(), url)
    return _partial(answer.content, kind, url)


def _reason(body: bytes, kind: str) -> str:
    """The message of a google.rpc.Status, else the text that came."""
    try:
        if kind == PROTOBUF:
            return str(wire.Status.FromString(body).message)
        if kind == JSON:
            found = msgspec.json.decode(body)
            if isinstance(found, dict) and isinstance(found.get("message"), str):
                return str(found["message"])
    except (wire.DecodeError, msgspec.DecodeError, UnicodeDecodeError):
        pass  # a proxy's page under a content type that is not its own: the text will do
    return body.decode("utf-8", "replace")


def _partial(body: bytes, kind: str, url: str) -> tuple[int, str]:
    try:
        if kind == JSON:
            found = msgspec.json.decode(body or b"{}", type=_Response).partial_success
            return int(found.rejected_spans), found.error_message
        told = wire.service.ExportTraceServiceResponse.FromString(body).partial_success
        return told.rejected_spans, told.error_message
    except (wire.DecodeError, msgspec.DecodeError, UnicodeDecodeError, ValueError) as exc:
        raise TransportError(
            f"{url}: answered 2xx with something that is no OTLP response", hint="is it an OTLP endpoint?",
            retryable=False,
        ) from exc  # fmt: skip


class _Partial(Struct, rename="camel"):
    rejected_spans: str | int = 0
    error_message: str = ""


class _Response(Struct, rename="camel"):
    partial_success: _Partial = msgspec.field(default_factory=_Partial)


def _httpx() -> Any:
    try:
        import httpx
    except ImportError as exc:
        raise InvalidArgument(
            "sending by OTLP needs a package that is not installed (httpx)", hint="pip install 'mist-stack[client]'"
        ) from exc
    return httpx
