"""`mist demo`: the main job end to end, on this machine, in about half a minute."""

from __future__ import annotations

import asyncio
import shlex
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from mist.cli.session import Session, current
from mist.errors import Conflict, InvalidArgument, NotFound, Refused
from mist.protocol.url import parse_url

if TYPE_CHECKING:
    from mist.cli._demo_run import Outcome, Plan
    from mist.kit.local import LocalServer

SPANS = 50_000
QUESTIONS = 600
SEED = 2023
LIMIT_S = 300.0
"""Thirty times what it takes on an idle machine: a child that ends too early is noticed long before."""
AZURE = "azure_llm_conv_2023.csv"
GSM8K = "gsm8k_model_solutions.jsonl"


async def command(
    data: Annotated[
        str, typer.Option("--data", metavar="DIR", help=f"Real files to use where they are there: {AZURE}, {GSM8K}.")
    ] = "",
    dir: Annotated[str, typer.Option("--dir", metavar="DIR", help="An empty or new directory for the data.")] = "",
    spans: Annotated[
        int, typer.Option("--spans", min=100, max=5_000_000, metavar="N", help="How many made-up spans.")
    ] = SPANS,
    questions: Annotated[
        int, typer.Option("--questions", min=30, max=100_000, metavar="N", help="How many made-up questions per model.")
    ] = QUESTIONS,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Other traffic, other answers.")] = SEED,
    server: Annotated[
        str,
        typer.Option("--server", metavar="NAME", help="nats or redis: start one for the demo, and kill it on the way."),
    ] = "",
) -> int:
    """Run the main job: durable ingest, a killed worker, an eval that is killed and replayed.

    A producer publishes spans while a worker stores them; the worker is killed (SIGKILL) halfway and started again. An
    eval asks models through the router, which gives recorded answers; it is killed halfway, gone on with, and replayed from
    its cursor. Then the judge counts what was lost, what was done twice and what was asked twice. Exit code 0 only if
    nothing was and both tables are complete.

    Without -u the broker is the embedded log in a fresh directory, which is left behind for you to look at. With --server
    it is a NATS or Redis server that the demo starts on this machine, kills with SIGKILL while spans are published,
    starts again, and stops at the end. A broker of -u should have no InferMux that runs: it would answer the demo's questions,
    of which it knows nothing.

    Examples:
      mist demo
      mist demo --server nats
      mist demo --data ../shared/data --format json
      mist demo -u nats://localhost:4222
    """
    from mist.cli._demo_run import run_demo

    session = current()
    if server not in ("", "nats", "redis"):
        raise InvalidArgument(f"no server {server!r}", hint="nats or redis")
    if server and session.origins.get("url", "default") == "flag":
        raise InvalidArgument("--server starts a broker of its own, --url names one", hint="give one of the two")
    plan = make_plan(session, data, dir, spans=spans, questions=questions, seed=seed, server=server)
    try:
        if plan.server is not None:
            await asyncio.to_thread(plan.server.start)
        outcome = await run_demo(plan, session.out.note)
    finally:
        if plan.server is not None:
            await asyncio.to_thread(plan.server.stop)
    if session.out.json:
        session.out.item(document(plan, outcome))
    else:
        _print(session, plan, outcome)
    return 0 if outcome.ok else 1


def make_plan(session: Session, data: str, dir: str, *, spans: int, questions: int, seed: int, server: str) -> Plan:
    """Choose the directories and files; the first thing written."""
    from mist.cli._demo_run import Plan
    from mist.cli._demo_suite import write_recorded, write_suite
    from mist.cli._tools import store_path

    given = session.origins.get("url", "default") != "default" and not server
    stamp = f"{datetime.now(UTC):%Y%m%d-%H%M%S}"
    trace_file, solutions = _real_files(Path(data), session) if data else (None, None)
    url = session.url
    if given and url.scheme == "log" and not dir:
        data_dir = Path(url.target or ".").absolute()
    else:
        data_dir = _fresh(dir, stamp)
    started = _server(server, data_dir / server) if server else None
    broker = started.url if started else str(url) if given else f"log:{quote(str(data_dir), safe='/')}"
    files = _unused(data_dir / f"demo-{stamp}")
    files.mkdir(parents=True)
    store = Path(store_path(parse_url(f"log:{quote(str(data_dir), safe='/')}"), "tokentrace"))
    if store.exists():
        store = files / "tokentrace.db"  # somebody's spans are in the usual place: keep ours apart
    right: dict[str, int] = {}
    if solutions is None:
        suite_file, right = write_suite(files / "suite", seed=seed, samples=questions)
    else:
        suite_file = write_recorded(files / "suite", solutions)
    if trace_file is not None:
        from mist.tools.tokentrace.files import BadRow, envelopes_of

        spans = sum(1 for row in envelopes_of(trace_file) if not isinstance(row, BadRow))
    return Plan(
        url=broker,
        data_dir=data_dir,
        files=files,
        store=store,
        spans=spans,
        seed=seed,
        run=f"demo-{stamp}-{time.time_ns() % 10_000:04d}",
        trace_file=trace_file,
        suite_file=suite_file,
        right=right,
        limit_s=session.timeout_s or LIMIT_S,
        server=started,
    )


def _server(name: str, directory: Path) -> LocalServer:
    """A server of the demo's own, not started."""
    from mist.kit.local import nats_server, redis_server

    return nats_server(directory) if name == "nats" else redis_server(directory)


def _real_files(data: Path, session: Session) -> tuple[Path | None, Path | None]:
    if not data.is_dir():
        raise NotFound(f"no directory {data}")
    found = []
    for name in (AZURE, GSM8K):
        path = (data / name).absolute()
        if not path.is_file():
            session.out.warn(f"{data} has no {name}: made-up data instead")
        found.append(path if path.is_file() else None)
    if found == [None, None]:
        raise NotFound(f"{data} has neither {AZURE} nor {GSM8K}", hint="leave --data out to use made-up data")
    return found[0], found[1]


def _fresh(dir: str, stamp: str) -> Path:
    path = Path(dir).absolute() if dir else _unused(Path.cwd() / f".mist-demo-{stamp}")
    try:
        path.mkdir(parents=True, exist_ok=bool(dir))
        if any(path.iterdir()):
            raise Conflict(f"{path} is not empty", hint="the demo wants a directory of its own; leave --dir out")
    except OSError as exc:
        raise Refused(f"{path}: {exc.strerror or exc}", hint="name a directory with --dir") from exc
    return path


def _unused(path: Path) -> Path:
    number = 1
    found = path
    while found.exists():
        number += 1
        found = path.with_name(f"{path.name}-{number}")
    return found


def document(plan: Plan, outcome: Outcome) -> dict[str, Any]:
    """`mist demo --format json`."""
    import msgspec

    from mist.cli.render import seq
    from mist.protocol.url import redact

    t, e = outcome.traces, outcome.evals
    return {
        "broker": redact(plan.url),
        "acknowledged": t.verdict.acknowledged,
        "stored": t.verdict.stored,
        "lost": t.verdict.lost,
        "duplicated": t.verdict.duplicated,
        "worker_kills": t.worker_kills,
        **({"broker_kills": t.broker_kills} if plan.server is not None else {}),
        "spans": msgspec.to_builtins(t.spans),
        "eval": msgspec.to_builtins(e.rows),
        "asked": e.asked,
        "asked_again": e.asked_again,
        "replayed_from": seq(e.replayed_from),
        "elapsed_s": round(outcome.elapsed_s, 3),
        "data_dir": str(plan.data_dir),
        "ok": outcome.ok,
    }


def _print(session: Session, plan: Plan, outcome: Outcome) -> None:
    import msgspec

    from mist.cli._eval_run import COLUMNS
    from mist.cli.trace import STATS_COLUMNS, stats_rows

    out = session.out
    d = document(plan, outcome)
    t, e = outcome.traces, outcome.evals
    out.text("\n")
    out.item(
        {
            "spans acknowledged": f"{d['acknowledged']:,} (durability {outcome.durability})",
            "stored": f"{d['stored']:,}",
            "lost": d["lost"],
            "duplicated": d["duplicated"],
            "worker": f"killed once (SIGKILL) at sequence {t.killed_at}, went on after {t.resumed_after}",
            **(
                {"broker": f"killed once (SIGKILL) while spans were published, away for {t.broker_away_s:.1f} s"}
                if plan.server is not None
                else {}
            ),
            "throughput": (
                f"published {t.published_per_s:,.0f}/s (paced), durable appends {t.appended_per_s:,.0f}/s, "
                f"ingest {t.applied_per_s:,.0f}/s"
            ),
            "eval": (
                f"killed (SIGKILL) at {e.kept:,} of {e.total:,} results, went on, replayed {e.replayed:,} from sequence "
                f"{e.replayed_from}"
            ),
            "inference": f"{e.asked:,} questions answered by the router, {e.asked_again} of them asked again",
            "elapsed": f"{d['elapsed_s']:.1f} s",
        }
    )
    out.text("\n")
    out.rows(stats_rows(d["spans"]), STATS_COLUMNS)
    out.text("\n")
    out.rows([msgspec.to_builtins(r) for r in e.rows], COLUMNS)
    out.text(f"\ndata: {plan.data_dir}\n")
    for line in _more(plan, e.run):
        out.text(f"  {line}\n")
    out.text("\nok\n" if outcome.ok else "\nFAILED: something was lost, done twice or left incomplete\n")


def _more(plan: Plan, run: str) -> Iterator[str]:
    from mist.cli._tools import store_path
    from mist.protocol.url import redact

    if plan.server is not None:
        yield f"mist dev {plan.server.name.partition('-')[0]} --dir {plan.server.directory} --port {plan.server.port} &"

    mist = f"mist -u {shlex.quote(redact(plan.url))}"
    usual = parse_url(plan.url).scheme == "log" and plan.store == store_path(parse_url(plan.url), "tokentrace")
    store = "" if usual else f" --store {plan.store}"
    yield f"{mist} trace stats{store}"
    yield f"{mist} trace ls -n 5{store}"
    yield f"{mist} eval show {run}"
    yield f"{mist} tail trace -n 5"
    yield f"{mist} stream info eval"


__all__ = ["command"]
