"""Who answers questions and embeds texts for the evals: the router of mist.toml in this process, one behind a URL, or
nobody (then questions go over the stream `infer`).

The one place where the command line puts MatchSpec and InferMux together; the tools know nothing of one another.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import msgspec

from mist.errors import InvalidArgument, Malformed

if TYPE_CHECKING:
    from mist.cli.session import Session
    from mist.tools.matchspec.graders.hands import Hands


LOCAL, STREAM = "local", "stream"


@asynccontextmanager
async def hands(session: Session, url: str) -> AsyncIterator[Hands]:
    """Hands for graders and models. `url`: of an InferMux over HTTP; `local`: the one of mist.toml, which is also meant by
    nothing where mist.toml has one; `stream`: nobody."""
    from mist.tools.matchspec.graders.hands import Hands

    if not url:
        url = LOCAL if session.config.infermux.providers else STREAM
    if url == STREAM:
        yield Hands()
        return
    if url == LOCAL:
        async with _in_process(session) as found:
            yield found
        return
    if urlsplit(url).scheme not in ("http", "https"):
        raise InvalidArgument(f"--ask {url}: not an http(s) URL", hint="or local, or stream")
    from mist.protocol.codec import decode_foreign, encode
    from mist.protocol.envelope import Envelope
    from mist.tools.matchspec.models import Posting

    base = url.rstrip("/")
    http = Posting(base)
    json = {"Content-Type": "application/json"}

    async def ask(request: Envelope) -> Envelope:
        headers = {**json, "traceparent": request.traceparent} if request.traceparent else json
        return decode_foreign(await http.send("POST", f"{base}/mist", encode(request), headers))

    async def embed(model: str, texts: list[str]) -> list[list[float]]:
        body = msgspec.json.encode({"model": model, "input": texts})
        answer = await http.send("POST", f"{base}/v1/embeddings", body, json)
        try:
            rows = msgspec.json.decode(answer, type=_Embeddings).data
        except msgspec.DecodeError as exc:
            raise Malformed(f"{base}/v1/embeddings: not an answer with embeddings: {exc}") from exc
        return [row.embedding for row in sorted(rows, key=lambda row: row.index)]

    try:
        yield Hands(ask=ask, embed=embed)
    finally:
        await http.aclose()


@asynccontextmanager
async def _in_process(session: Session) -> AsyncIterator[Hands]:
    """The router itself. Questions and answers are recorded by who asks, spans by the router."""
    from mist.cli.infer import _calls
    from mist.protocol.envelope import Envelope
    from mist.tools.infermux.calls import SPAN
    from mist.tools.infermux.handler import answered
    from mist.tools.matchspec.graders.hands import Hands

    async with _calls(session, record=True) as calls:

        async def ask(request: Envelope) -> Envelope:
            return await answered(calls, request, SPAN, errors=False)

        async def embed(model: str, texts: list[str]) -> list[list[float]]:
            return (await calls.router.embed(model, texts)).embeddings.vectors

        yield Hands(ask=ask, embed=embed)


class _Row(msgspec.Struct):
    index: int
    embedding: list[float]


class _Embeddings(msgspec.Struct):
    data: list[_Row]
