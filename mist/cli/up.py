"""`mist up`: the platform in one process, until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mist.cli._tools import StoreOption, store_path
from mist.cli.options import Level, durability_of
from mist.cli.session import Session, current
from mist.cli.wrap import serves
from mist.errors import InvalidArgument
from mist.kit.signals import drained

if TYPE_CHECKING:
    from mist.cli._up_platform import Running, Tool
    from mist.cli.render import Output
    from mist.tools.matchspec.suite import Suite

TOOLS: dict[str, tuple[str, str]] = {
    "door": ("mist.cli._up_tools:door", "POST /mist: envelopes into the stream, answered when they are stored"),
    "tokentrace": ("mist.cli._up_tools:tokentrace", "spans of the stream into the store of `mist trace`"),
    "otlp": ("mist.cli._up_tools:otlp", "POST /v1/traces, and gRPC: OpenTelemetry's spans into the stream"),
    "alerts": ("mist.cli._up_tools:alerts", "the alert rules of mist.toml, over the store"),
    "infermux": (
        "mist.cli._up_tools:infermux",
        "the inference router: /v1/chat/completions, /infer, requests of a stream",
    ),
    "matchspec": ("mist.cli._up_tools:matchspec", "evals over HTTP: POST /run, GET /results"),
}
"""name -> (a function that takes `store()`, which gives the path of a store of that name, and returns a Tool; what it
does). The tools of later issues are lines here."""

STORES = {"alerts": "tokentrace", "matchspec": "tokentrace"}
"""Tools that work on another one's store."""

KEY = "MATCHSPEC_API_KEY"
"""The variable with the key of the evals' routes; unset = open."""

LISTEN = "127.0.0.1:8080"
"""When neither the flag nor the settings say."""


class LogFormat(StrEnum):
    plain = "plain"
    text = "text"
    json = "json"


class LogLevel(StrEnum):
    debug = "debug"
    info = "info"
    warn = "warn"
    error = "error"


@serves
async def command(
    tools: Annotated[
        str, typer.Option("--tools", metavar="A,B", help=f"Which, with commas: {', '.join(TOOLS)}. Default: all.")
    ] = "",
    listen: Annotated[
        str,
        typer.Option(
            "--listen", metavar="HOST:PORT", help=f"Where to listen; port 0 takes a free one. Default: {LISTEN}."
        ),
    ] = "",
    stream: Annotated[
        str, typer.Option("--stream", metavar="STREAM", help="The stream they work on. Default: trace.")
    ] = "",
    usual_listen: Annotated[str, typer.Option("--usual-listen", hidden=True)] = LISTEN,
    otlp_grpc: Annotated[
        str,
        typer.Option("--otlp-grpc", metavar="HOST:PORT", help="Where to take OTLP over gRPC too; 4317 is usual."),
    ] = "",
    tokentrace: Annotated[
        str,
        typer.Option(
            "--tokentrace", metavar="URL", help="Send the router's spans to this TokenTrace as well, durably."
        ),
    ] = "",
    durability: Annotated[
        Level | None, typer.Option("--durability", help="Of the stream: what an acknowledged envelope survives.")
    ] = None,
    wait: Annotated[
        float,
        typer.Option(
            "--wait", min=0.0, metavar="S", help="How long to wait for the broker at the start; 0 = for ever."
        ),
    ] = 30.0,
    suites: Annotated[
        list[str] | None,
        typer.Option("--suites", metavar="FILE", help="Suites to serve. Default: matchspec.yml. Repeatable."),
    ] = None,
    store: StoreOption = "",
    log_format: Annotated[
        LogFormat, typer.Option("--log-format", help="Of what is said on stderr: sentences, or lines for a collector.")
    ] = LogFormat.plain,
    log_level: Annotated[
        LogLevel, typer.Option("--log-level", help="With text and json: from which level; debug has every request.")
    ] = LogLevel.info,
) -> None:
    """Run the platform in one process: the tools, the HTTP door, health. It runs until SIGINT or SIGTERM.

    When all is ready the addresses are printed: envelopes are posted to /mist, OpenTelemetry's spans to /v1/traces;
    /healthz says that the process lives, /readyz that the broker answers and every tool works (200, else 503 with the
    reason), /startupz that it once did; /metrics is for Prometheus, /metricsz the same as JSON. There is no authentication
    but the router's keys ([infermux] of mist.toml): listen on an address that only friends reach. What no option says is
    taken from [tokentrace] of mist.toml, for the router alone from [infermux].

    What it says goes to stderr: as sentences, or with --log-format json or text as structured lines without secrets.

    The first signal drains: no new request is taken, those under way are answered, the worker finishes its page and
    stores its position; then the exit code is 143 or 130. A second signal does not wait.

    Examples:
      mist up
      mist up -u log:./data --listen 127.0.0.1:9000
      mist up -u nats://localhost:4222 --tools tokentrace
      mist up --otlp-grpc 127.0.0.1:4317
      mist up --tools infermux --listen 127.0.0.1:8600
      mist up -u nats://a:4222,b:4222,c:4222 --durability replicated
    """
    from mist.broker.base import StreamConfig
    from mist.cli import _up_platform
    from mist.cli._up_tools import OTLP_REFUSED
    from mist.kit.server import parse_address
    from mist.tools.tokentrace.alerts.rules import configured
    from mist.tools.tokentrace.intake import Intake
    from mist.transport.body import Limits

    session = current()
    out = session.out
    chosen = _chosen(tools)
    settings = session.config.tokentrace
    router = session.config.infermux
    if not listen:
        table = "infermux" if chosen == ["infermux"] else "tokentrace"
        set_there = session.origins[f"{table}.listen"] != "default"
        listen = (router if table == "infermux" else settings).listen if set_there else usual_listen
    stream = stream or settings.stream
    store = store or settings.store
    host, port = parse_address(listen)
    if tokentrace and "infermux" not in chosen:
        raise InvalidArgument("--tokentrace is for the tool infermux, which is not among the chosen ones")
    if otlp_grpc and "otlp" not in chosen:
        raise InvalidArgument("--otlp-grpc is for the tool otlp, which is not among the chosen ones")
    intake = Intake(settings.redact, settings.sample)  # one for all doors: they share its rates
    limits = Limits(
        size_bytes_max=int(settings.envelope_bytes_max), body_bytes_max=int(settings.body_bytes_max),
        inflight_requests_max=settings.requests_max, read_timeout_s=float(settings.read_timeout),
    )  # fmt: skip
    options: dict[str, dict[str, Any]] = {
        "door": {"intake": intake, "limits": limits},
        "otlp": {"intake": intake, "limits": limits, "grpc_listen": otlp_grpc or settings.otlp_grpc},
        "tokentrace": {"settings": settings},
        "alerts": {"rules": configured(settings) if "alerts" in chosen else ()},
        "infermux": {
            "settings": router, "url": session.url, "limits": limits, "door": "door" in chosen, "tokentrace": tokentrace,
            "host": host,
        },
        "matchspec": {
            "suites": lambda: _suites(session, suites or []), "prices": settings.prices, "key": os.environ.get(KEY, ""),
            "door": bool({"door", "infermux"} & set(chosen)), "router": "infermux" in chosen, "host": host,
        },
    }  # fmt: skip
    stores = {"infermux": router.store}
    made: dict[str, Tool] = {}
    for name in chosen:
        try:
            made[name] = _load(TOOLS[name][0])(
                lambda name=STORES.get(name, name): store_path(session.url, name, stores.get(name, store)),
                **options.get(name, {}),
            )
        except InvalidArgument as exc:
            asked_for = tools or (name == "otlp" and otlp_grpc) or (name == "infermux" and tokentrace)
            if asked_for or name not in ("otlp", "infermux"):
                raise
            # nobody asked for it by name; its extra is not installed, or it may not be open to everybody
            out.warn(f"{name} is left out: {exc}")

    def on_ready(url: str, running: Running) -> None:
        addresses: dict[str, Any] = {"broker": session.url.redacted(), "stream": stream, "tools": list(made)}
        for tool in running.tools.values():
            addresses |= {path.strip("/"): url + path for path in tool.doors if path not in OTLP_REFUSED}
            if grpc := tool.facts().get("grpc"):
                addresses["grpc"] = grpc
        addresses |= {path.strip("/"): url + path for path in running.pages}
        out.item(addresses)
        out.flush()

    level = durability_of(durability) if durability is not None else settings.durability or None
    config = StreamConfig(durability=level) if level is not None else None

    async def work(stop: asyncio.Event) -> None:
        with _talk(out, log_format, log_level) as (say, note):
            facts = await _up_platform.run(
                lambda: session.connect(create=True), made, stream=stream, config=config, host=host, port=port,
                wait_s=wait, drain_s=float(settings.drain), stop=stop, say=say, on_ready=on_ready,
            )  # fmt: skip
            for name, values in facts.items():
                note(f"{name} ended", values)

    await drained(work)


@contextlib.contextmanager
def _talk(
    out: Output, format: LogFormat, level: LogLevel
) -> Iterator[tuple[Callable[[str], None], Callable[[str, dict[str, Any]], None]]]:
    """How warnings are said, and what there is to note at the end: as sentences, or as lines of the kit's log."""
    if format is LogFormat.plain:
        yield (
            out.warn,
            lambda text, values: out.note(f"{text}: " + ", ".join(f"{key} {value}" for key, value in values.items())),
        )
        return
    from mist.cli._up_platform import NAME
    from mist.kit.logging import open_log

    with open_log(NAME, level=level.value, format="json" if format is LogFormat.json else "text") as log:
        logger = log.logger()
        yield logger.warning, lambda text, values: logger.info(text, **values)


def _suites(session: Session, paths: list[str]) -> list[Suite]:
    """Those named, or those of matchspec.yml; none where there is no such file."""
    from mist.cli._eval_files import load
    from mist.tools.matchspec.settings import find_config

    if not paths and find_config(session.config.matchspec.config) is None:
        return []
    return load(session, paths)[0]


def _chosen(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()] or list(TOOLS)
    for name in names:
        if name not in TOOLS:
            raise InvalidArgument(f"no tool {name!r}", hint=f"known: {', '.join(TOOLS)}")
    return list(dict.fromkeys(names))


def _load(path: str) -> Any:
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)
