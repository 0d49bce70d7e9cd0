"""Who answers questions and embeds texts for the evals: a URL, or nobody (then they go over the stream `infer`).

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


@asynccontextmanager
async def hands(session: Session, url: str) -> AsyncIterator[Hands]:
    """Hands for graders and models. `url`: of an InferMux over HTTP; empty: nobody."""
    from mist.tools.matchspec.graders.hands import Hands

    if not url:
        yield Hands()
        return
    if urlsplit(url).scheme not in ("http", "https"):
        raise InvalidArgument(
            f"--ask {url}: not an http(s) URL", hint="over a broker nothing is needed: questions go to the stream infer"
        )
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


class _Row(msgspec.Struct):
    index: int
    embedding: list[float]


class _Embeddings(msgspec.Struct):
    data: list[_Row]
