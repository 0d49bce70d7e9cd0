"""`mist eval serve`: MatchSpec as a handler, `eval.run` in and `eval.result` out, over a broker, a pipe, files or HTTP."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer

from mist.cli._eval_files import load
from mist.cli._eval_judging import StreamOption
from mist.cli.session import current
from mist.cli.wrap import serves
from mist.kit.signals import drained

if TYPE_CHECKING:
    from mist.client.serving import Served


@serves
async def serve(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="stdio:, file:IN.jsonl, http://HOST:PORT, or URL?stream=A&consumer=NAME."
        ),
    ],
    suites: Annotated[list[str], typer.Option("--suites", metavar="FILE", help="Suites to run. Repeatable.")],
    out: Annotated[
        str, typer.Option("--out", metavar="DEST", help="Where results go: a stream, URL?stream=B, or file:OUT.jsonl.")
    ] = "",
    ask: Annotated[
        str,
        typer.Option("--ask", metavar="URL", help="Who answers `infer` models and judges: http(s)://…, local, stream."),
    ] = "",
    stream: StreamOption = "eval",
) -> None:
    """Answer `eval.run` envelopes with `eval.result` envelopes, wherever they come from, until the input ends or a signal.

    Over a broker a request is acknowledged after its results are stored; one that is handled again is the same run. The
    documents' HTTP API is `matchspec serve` (`mist up --tools matchspec`).

    Examples:
      mist eval serve stdio: --suites suite.toml < requests.jsonl
      mist eval serve 'log:./data?stream=asked&consumer=evals' --suites suite.toml --out results
    """
    from mist.cli._ask import hands
    from mist.client.serving import serve as serve_handler
    from mist.tools.matchspec.api import Api
    from mist.tools.matchspec.service import Service

    session = current()
    found, _ = load(session, suites)
    broker, opened = await session.reach(stream, create=True)

    async def work(stop: asyncio.Event) -> Served:
        async with hands(session, ask, found) as given, asyncio.TaskGroup() as group:
            service = Service(found, hands=given, say=session.out.warn)
            ended, ready = asyncio.Event(), asyncio.Event()
            group.create_task(service.run(broker, opened, ended, ready=ready.set))
            await ready.wait()
            try:
                return await serve_handler(Api(service).handler, source, out=out, stop=stop, on_ready=session.out.note)
            finally:
                ended.set()

    served = await drained(work)
    if served.exit_code:
        session.fail_with(served.exit_code)
