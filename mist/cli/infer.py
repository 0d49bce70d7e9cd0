"""`mist infer`: ask models through the router, in this process by `mist.toml`, or through a router that runs elsewhere; and
see whom it would ask, and how they do."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mist.cli._tools import store_path
from mist.cli.render import escape
from mist.cli.session import Session, current
from mist.cli.wrap import noun
from mist.errors import InvalidArgument

if TYPE_CHECKING:
    from mist.tools.infermux.calls import Calls
    from mist.tools.infermux.chat import ChatRequest
    from mist.tools.infermux.router import Router

app = noun("Ask models through the inference router, and see whom it would ask.")

ModelOption = Annotated[str, typer.Option("--model", "-m", metavar="NAME", help="A model, an alias, a group, or auto.")]
ServerOption = Annotated[
    str,
    typer.Option(
        "--server", metavar="URL", envvar="INFERMUX_SERVER",
        help="A router that runs; else this process is one, by mist.toml. Its key: INFERMUX_API_KEY.",
    ),
]  # fmt: skip
PromptArg = Annotated[str, typer.Argument(metavar="PROMPT", help="What a user says; - reads standard input.")]
PROMPT_BYTES_MAX = 32 * 1024 * 1024
NOT_MET = 10


@app.command()
async def chat(
    prompt: PromptArg,
    model: ModelOption = "auto",
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer as it comes.")] = False,
    system: Annotated[str, typer.Option("--system", metavar="TEXT", help="What the system says before it.")] = "",
    param: Annotated[
        list[str],
        typer.Option("--param", metavar="KEY=VALUE", help="A parameter; the value is JSON, or text. Repeatable."),
    ] = [],  # noqa: B006  # typer copies it
    record: Annotated[
        bool, typer.Option("--record/--no-record", help="Keep question, answer and span in the streams of -u.")
    ] = True,
    server: ServerOption = "",
) -> None:
    """Ask a question and print the answer.

    JSON: the payload of an infer.response: {"model", "provider", "content", "tokens_in", "tokens_out", "cost_usd",
    "latency_ms", "finish_reason", …}. What is not known is null.

    Examples:
      mist infer chat "hello world, how are you"
      mist infer chat - --model gpt-4o-mini --param temperature=0 < question.txt
      mist infer chat "hello" --stream --server http://127.0.0.1:8600
    """
    session = current()
    request = _question(_text(prompt), model, system, param)
    found: Any
    if server:
        from mist.cli._infer_server import Server

        async with Server(server) as other:
            if stream:
                found = await other.stream(request, lambda text: show(session, text))
                show(session, "\n")
            else:
                found = await other.ask(request)
    else:
        async with open_calls(session, record=record) as calls:
            found = await _stream(calls, request, session) if stream else await _ask(calls, request)
    out = session.out
    if out.json or not stream:
        out.value(shown(session, found["content"]), found)
        if out.format == "table" and found.get("tool_calls"):
            out.note(f"it wants to call: {', '.join(c['function']['name'] for c in found['tool_calls'])}")


async def _ask(calls: Calls, request: ChatRequest) -> Any:
    import msgspec

    from mist.tools.infermux.envelopes import response_payload

    asked, routed = await calls.complete(request)
    return msgspec.to_builtins(response_payload(asked, routed))


async def _stream(calls: Calls, request: ChatRequest, session: Session) -> Any:
    import msgspec

    from mist.tools.infermux.envelopes import response_payload

    async with calls.streaming(request) as streaming:
        async for chunk in streaming.chunks:
            show(session, chunk.content)
        routed = streaming.known()
    show(session, "\n")
    return msgspec.to_builtins(response_payload(streaming.request, routed))


def show(session: Session, text: str) -> None:
    """A piece of an answer, at once; JSON comes whole at the end."""
    if not session.out.json:
        session.out.text(shown(session, text))
        session.out.flush()


def shown(session: Session, text: str) -> str:
    """A model's words must not steer a terminal; `raw` is as it came."""
    if session.out.format != "table":
        return text
    return "".join(c if c in "\n\t" else escape(c) for c in text) if not text.isprintable() else text


@app.command()
async def route(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help="A model, an alias, a group, or auto.")] = "auto",
    prompt: Annotated[
        str, typer.Option("--prompt", metavar="TEXT", help="A question, for its size and stickiness.")
    ] = "",
    explain: Annotated[bool, typer.Option("--explain", help="All of them, and who is left out and why.")] = False,
    param: Annotated[
        list[str], typer.Option("--param", metavar="KEY=VALUE", help="A parameter (tools …). Repeatable.")
    ] = [],  # noqa: B006  # typer copies it
) -> None:
    """Say whom the router of mist.toml would ask for a model, in which order. Nobody is asked and nothing is counted.

    JSON: {"model", "resolved", "group", "strategy", "candidates": [{"provider", "model", "estimate_usd", …}],
    "left_out": [{"provider", "model", "reason"}]}. Exit code 10 when nobody would be asked.

    Examples:
      mist infer route
      mist infer route fast --explain
    """
    import msgspec

    session = current()
    out = session.out
    found = _router(session).explain(_question(prompt, model, "", param))
    plain = msgspec.to_builtins(found)
    if not found.candidates:
        session.fail_with(NOT_MET)
    if out.json:
        out.item(plain)
        return
    candidates = plain["candidates"] if explain else plain["candidates"][:1]
    out.rows(
        candidates, ["provider", "model", "stage", "group", "strategy", "estimate_usd", "weight", "priority"],
        empty=f"nobody would be asked for {model}",
    )  # fmt: skip
    if explain:
        for left in found.left_out:
            out.note(f"left out: {left.provider} {left.model}: {left.reason}")


@app.command()
async def providers(server: ServerOption = "") -> None:
    """List the providers, their models and how they do.

    Without --server these are the providers of mist.toml, of which nothing is known yet. JSON: [{"name", "type", "healthy",
    "models": [{"model", "circuit", "latency_s", …}], "in_flight", "requests_headroom", "tokens_headroom"}].

    Examples:
      mist infer providers
      mist infer providers --server http://127.0.0.1:8600 --format json
    """
    import msgspec

    session = current()
    if server:
        from mist.cli._infer_server import Server

        async with Server(server) as other:
            found = await other.get("/_infermux/providers")
    else:
        found = msgspec.to_builtins(_router(session).providers())
    if session.out.format == "table":
        found = [
            {
                **p, "models": ", ".join(m["model"] for m in p["models"]) or "any",
                "circuits": ", ".join(sorted({m["circuit"] for m in p["models"]})) or "closed",
            }
            for p in found
        ]  # fmt: skip
    session.out.rows(found, ["name", "type", "healthy", "models", "circuits", "in_flight"], empty="no providers")


@app.command()
async def status(server: ServerOption = "") -> None:
    """Show how a router that runs does; exit code 10 when a circuit is open.

    JSON: {"version", "uptime_seconds", "providers_healthy", "providers_total", "requests_total", "requests_last_minute",
    "errors_last_minute", …}.

    Example:
      mist infer status --server http://127.0.0.1:8600
    """
    from mist.cli._infer_server import Server

    session = current()
    async with Server(server or f"http://{session.config.infermux.listen}") as other:
        session.out.item(await other.get("/_infermux/status"))
        states = await other.get("/_infermux/providers")
    bad = [f"{p['name']} {m['model']}" for p in states for m in p["models"] if m["circuit"] == "open"]
    if bad:
        session.out.warn(f"open circuits: {', '.join(bad)}")
        session.fail_with(NOT_MET)


# ---------------------------------------------------------------------------- in this process


def _router(session: Session) -> Router:
    """One that is looked at."""
    from msgspec.structs import replace

    from mist.tools.infermux.router import Router

    # a router that asks nobody needs no ledger, which would have to be made
    return Router.from_settings(replace(session.config.infermux, budgets=()), prices=_prices(session))


def _prices(session: Session) -> Any:
    from mist.kit.prices import load_prices

    file = session.config.infermux.prices
    return load_prices(Path(file)) if file else None


@asynccontextmanager
async def open_calls(session: Session, *, record: bool) -> AsyncIterator[Calls]:
    """The router of mist.toml with its ledger, and the record in the streams of `-u`."""
    from mist.tools.infermux.budgets import Ledger
    from mist.tools.infermux.calls import Calls
    from mist.tools.infermux.recorder import Recorder
    from mist.tools.infermux.router import Router

    settings = session.config.infermux
    async with AsyncExitStack() as stack:
        ledger = None
        if record or settings.budgets:
            ledger = await Ledger.open(Path(store_path(session.url, "infermux", settings.store)))
            stack.push_async_callback(ledger.aclose)
        router = Router.from_settings(settings, prices=_prices(session), ledger=ledger)
        stack.push_async_callback(router.aclose)
        recorder = Recorder()
        if record:
            broker = await session.connect(create=True)
            infer, trace = await broker.open(settings.stream), await broker.open(session.config.tokentrace.stream)
            recorder = Recorder(infer, trace, capture=settings.capture, linger_s=0.0, say=session.out.warn)
        stack.push_async_callback(recorder.aclose)
        yield Calls(router, recorder)


def _question(text: str, model: str, system: str, params: list[str]) -> ChatRequest:
    import msgspec

    from mist.tools.infermux.chat import ChatMessage, ChatRequest

    found: dict[str, Any] = {}
    for pair in params:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise InvalidArgument(f"--param {pair!r} is not KEY=VALUE", hint="for example --param temperature=0")
        try:
            found[key] = msgspec.json.decode(value)
        except msgspec.DecodeError:
            found[key] = value
    messages = [ChatMessage(role="user", content=text)]
    if system:
        messages.insert(0, ChatMessage(role="system", content=system))
    return ChatRequest(model=model, messages=tuple(messages), params=found)


def _text(prompt: str) -> str:
    if prompt != "-":
        return prompt
    raw = sys.stdin.buffer.read(PROMPT_BYTES_MAX + 1)
    if len(raw) > PROMPT_BYTES_MAX:
        raise InvalidArgument(f"the prompt is longer than {PROMPT_BYTES_MAX} bytes")
    try:
        return raw.decode()
    except UnicodeDecodeError as exc:
        raise InvalidArgument(f"the prompt is not UTF-8: {exc}") from exc
