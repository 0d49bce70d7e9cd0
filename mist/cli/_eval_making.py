"""The verbs of `mist eval` that make a run of another one: replay, rescore, fork; and the history of a sample."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mist.cli._eval_files import load_one
from mist.cli._eval_judging import RunArg, StreamOption
from mist.cli._eval_run import COLUMNS, PARTIAL
from mist.cli._tools import LimitOption
from mist.cli.session import Session, current
from mist.kit.signals import drained

if TYPE_CHECKING:
    from mist.tools.matchspec.run import Outcome
    from mist.tools.matchspec.suite import Suite

SuiteArg = Annotated[str, typer.Argument(metavar="SUITE", help="The suite's file, as it is now.")]
NameOption = Annotated[str, typer.Option("--run", metavar="ID", help="The new run's id; also to go on with it.")]
AskOption = Annotated[
    str, typer.Option("--ask", metavar="URL", help="Who answers `infer` models, judges and embeddings: http(s)://…")
]


async def rescore(
    run: RunArg, suite: SuiteArg, name: NameOption = "", ask: AskOption = "", stream: StreamOption = "eval"
) -> None:
    """Grade the recorded outputs of a run again, by a suite with other graders or expectations. Asks no model.

    It is a run of its own; `mist eval diff` compares it with the first one.

    Example:
      mist eval rescore basics-20260131-1 suite.toml --run stricter
    """
    from mist.cli._ask import hands
    from mist.tools.matchspec.derive import rescore as derive
    from mist.tools.matchspec.run import new_run_id

    session = current()
    loaded = load_one(session, suite)
    broker, opened = await session.reach(stream)
    id = name or new_run_id(loaded.name)
    async with hands(session, ask, [loaded]) as given:
        equipped = _equipped(loaded, given)
        with session.out.progress("grading", loaded.total) as bar:

            async def work(stop: asyncio.Event) -> Outcome:
                return await derive(
                    broker,
                    opened,
                    equipped,
                    source=run,
                    run=id,
                    stop=stop,
                    on_progress=lambda done, _total: bar.at(done),
                    collect=False,
                )

            outcome = await drained(work)
    _told(session, id, outcome)


async def fork(
    run: RunArg,
    suite: SuiteArg,
    at: Annotated[int, typer.Option("--at", min=0, metavar="N", help="Take over the first N results.")] = 0,
    name: NameOption = "",
    ask: AskOption = "",
    stream: StreamOption = "eval",
) -> None:
    """Begin a run with the first N results of another one, and do the rest with what has changed: model, graders, prompt.

    Results are taken over by reference; the data must be the same. The manifest says what has changed.

    Example:
      mist eval fork basics-20260131-1 suite.toml --at 100 --run other-model
    """
    from mist.tools.matchspec.derive import fork as derive

    await _derived(derive, run, suite, name, ask, stream, at=at)


async def replayed(run: str, suite: str, name: str, ask: str, stream: str, after: int) -> None:
    """What `mist eval replay RUN --suite FILE` does."""
    from mist.tools.matchspec.derive import replay as derive

    await _derived(derive, run, suite, name, ask, stream, after=after)


async def _derived(derive: Any, run: str, suite: str, name: str, ask: str, stream: str, **more: int) -> None:
    from mist.cli._ask import hands
    from mist.tools.matchspec.run import new_run_id

    session = current()
    loaded = load_one(session, suite)
    broker, opened = await session.reach(stream)
    id = name or new_run_id(loaded.name)
    session.resume = f"go on with: mist eval run {suite} --run {id}"
    async with hands(session, ask, [loaded]) as given:
        equipped = _equipped(loaded, given)
        with session.out.progress("grading", loaded.total) as bar:

            async def work(stop: asyncio.Event) -> Outcome:
                found: Outcome = await derive(
                    broker, opened, equipped, source=run, run=id, stop=stop, ask=given.ask,
                    on_progress=lambda done, _total: bar.at(done), collect=False, **more,
                )  # fmt: skip
                return found

            outcome = await drained(work)
    session.resume = ""
    _told(session, id, outcome)


def _equipped(suite: Suite, given: Any) -> Suite:
    from msgspec.structs import replace

    from mist.tools.matchspec.graders.hands import equip

    return replace(suite, harnesses=tuple(replace(h, graders=equip(h.graders, given)) for h in suite.harnesses))


def _told(session: Session, id: str, outcome: Outcome) -> None:
    import msgspec

    out = session.out
    parent = outcome.run.manifest.parent
    taken = f", {parent.taken} results taken over from {parent.run}" if parent is not None and parent.taken else ""
    out.note(f"run {id}: {outcome.ran} results, {outcome.calls} calls, {outcome.recalled} recorded answers{taken}")
    if outcome.why:
        out.warn(f"run {id} is not complete: {outcome.why}")
    if outcome.run.info.errors:
        out.warn(f"{outcome.run.info.errors} samples ended with an error and count as failed")
    if outcome.stopped or outcome.run.info.errors:
        session.fail_with(PARTIAL)
    out.rows([msgspec.to_builtins(r) for r in outcome.rows], COLUMNS)


async def history(
    sample: Annotated[str, typer.Argument(metavar="SAMPLE", help="A sample's id, or its stable key.")],
    harness: Annotated[str, typer.Option("--harness", metavar="NAME", help="Only of this harness.")] = "",
    n: LimitOption = 20,
    stream: StreamOption = "eval",
) -> None:
    """Every result of one sample over all runs, newest first.

    Example:
      mist eval history 17
    """
    import msgspec

    from mist.cli.render import moment, seq
    from mist.tools.matchspec.derive import history as seen

    session = current()
    found = await seen(await session.stream(stream), sample, harness=harness)
    rows = [{**msgspec.to_builtins(s), "sequence": seq(s.sequence)} for s in reversed(found)][:n]
    if session.out.format == "table":
        rows = [{**r, "time": moment(r["timestamp_ns"])} for r in rows]
    session.out.rows(
        rows, ["sequence", "time", "run", "model", "epoch", "passed", "score", "counts", "error"],
        empty=f"no result of sample {sample}",
    )  # fmt: skip
