"""Who answers questions, embeds texts and shows traces to the evals: the router of mist.toml in this process, one behind a URL,
or nobody (then questions go over the stream `infer`); the trace store of `-u`, or a TokenTrace behind a URL.

The one place where the command line puts MatchSpec, InferMux and TokenTrace together; the tools know nothing of one another.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

import msgspec

from mist.errors import InvalidArgument, Malformed, NotFound
from mist.protocol.payloads import TraceSpan

if TYPE_CHECKING:
    from pathlib import Path

    from mist.cli.session import Session
    from mist.tools.matchspec.asking import Ask
    from mist.tools.matchspec.graders.hands import Embed, Hands, Trace
    from mist.tools.matchspec.suite import Suite

LOCAL, STREAM = "local", "stream"
SPANS_MAX = 10_000
"""Of one trace that a grader looks at."""


@asynccontextmanager
async def hands(session: Session, url: str, suites: Sequence[Suite]) -> AsyncIterator[Hands]:
    """Hands for the models and graders of these suites; what none of them needs is not opened. `url`: of an InferMux over
    HTTP; `local`: the one of mist.toml, which is also meant by nothing where mist.toml has one; `stream`: nobody."""
    from mist.tools.matchspec.graders.hands import Hands

    models, graders, traces = _needs(suites)
    async with AsyncExitStack() as stack:
        ask: Ask | None = None
        embed: Embed | None = None
        if not url:
            url = LOCAL if session.config.infermux.providers else STREAM
        if models or graders:
            if url == LOCAL:
                ask, embed = await stack.enter_async_context(_in_process(session))
            elif url != STREAM:
                ask, embed = await stack.enter_async_context(_over_http(url))
        yield Hands(ask=ask, embed=embed, trace=_store(session, stack) if traces else None)


def _needs(suites: Sequence[Suite]) -> tuple[bool, bool, bool]:
    """Whether there are models without a URL, graders that ask, and graders that look at traces."""
    from mist.tools.matchspec.graders.traces import Trace as TraceGrader
    from mist.tools.matchspec.grading import Asking
    from mist.tools.matchspec.suite import Infer

    harnesses = [h for suite in suites for h in suite.harnesses]
    graders = [g for h in harnesses for g in h.graders if isinstance(g, Asking)]
    return (
        any(isinstance(h.model, Infer) and not h.model.url for h in harnesses),
        any(not isinstance(g, TraceGrader) for g in graders),
        any(isinstance(g, TraceGrader) for g in graders),
    )


@asynccontextmanager
async def _in_process(session: Session) -> AsyncIterator[tuple[Ask, Embed]]:
    """The router itself. Questions and answers are recorded by who asks, spans by the router."""
    from mist.cli.infer import open_calls
    from mist.protocol.envelope import Envelope
    from mist.tools.infermux.calls import SPAN
    from mist.tools.infermux.handler import answered

    async with open_calls(session, record=True) as calls:

        async def ask(request: Envelope) -> Envelope:
            return await answered(calls, request, SPAN, errors=False)

        async def embed(model: str, texts: list[str]) -> list[list[float]]:
            return (await calls.router.embed(model, texts)).embeddings.vectors

        yield ask, embed


@asynccontextmanager
async def _over_http(url: str) -> AsyncIterator[tuple[Ask, Embed]]:
    if urlsplit(url).scheme not in ("http", "https"):
        raise InvalidArgument(f"--ask {url}: not an http(s) URL", hint="or local, or stream")
    from mist.protocol.codec import decode_foreign, encode
    from mist.protocol.envelope import Envelope
    from mist.tools.matchspec.models import Posting

    base = url.rstrip("/")
    http = Posting(base)

    async def ask(request: Envelope) -> Envelope:
        return decode_foreign(await http.send("POST", f"{base}/mist", encode(request), request.traceparent))

    async def embed(model: str, texts: list[str]) -> list[list[float]]:
        body = msgspec.json.encode({"model": model, "input": texts})
        answer = await http.send("POST", f"{base}/v1/embeddings", body)
        try:
            rows = msgspec.json.decode(answer, type=_Embeddings).data
        except msgspec.DecodeError as exc:
            raise Malformed(f"{base}/v1/embeddings: not an answer with embeddings: {exc}") from exc
        return [row.embedding for row in sorted(rows, key=lambda row: row.index)]

    try:
        yield ask, embed
    finally:
        await http.aclose()


class _Spans(msgspec.Struct):
    spans: list[TraceSpan]


class _Row(msgspec.Struct):
    index: int
    embedding: list[float]


class _Embeddings(msgspec.Struct):
    data: list[_Row]


def _store(session: Session, stack: AsyncExitStack) -> Trace:
    from mist.cli._tools import store_path

    return traces_of(store_path(session.url, "tokentrace", session.config.tokentrace.store), stack)


def traces_of(place: Path | str, stack: AsyncExitStack) -> Trace:
    """Traces out of the store there (a file, PostgreSQL), or of a TokenTrace over HTTP; no spans where it has none."""
    if isinstance(place, str) and urlsplit(place).scheme in ("http", "https"):
        from mist.tools.matchspec.models import Posting

        base = place.rstrip("/")
        http = Posting(base)
        stack.push_async_callback(http.aclose)

        async def over_http(trace_id: str) -> Sequence[TraceSpan]:
            try:
                found = await http.send("GET", f"{base}/traces/{quote(trace_id, safe='')}?limit={SPANS_MAX}", None)
            except NotFound:
                return []
            return msgspec.json.decode(found, type=_Spans).spans

        return over_http

    from mist.tools.tokentrace import queries
    from mist.tools.tokentrace.readers import Readers

    readers = Readers(place)
    stack.callback(readers.close)

    async def out_of_store(trace_id: str) -> Sequence[TraceSpan]:
        try:
            page = await readers.ask(lambda store: queries.trace_page(store, trace_id, limit=SPANS_MAX))
        except NotFound:
            return []
        return [
            TraceSpan(
                trace_id=s.trace_id, span_id=s.span_id, parent_id=s.parent_id, operation=s.operation,
                start_ns=s.start_ns or 0, end_ns=s.end_ns or 0, status=s.status, attrs=msgspec.json.decode(s.attrs),
            )
            for s in page.spans
        ]  # fmt: skip

    return out_of_store
