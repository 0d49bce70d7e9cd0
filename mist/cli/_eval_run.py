"""`mist eval run`: suites to runs, and to their verdicts. A run lives in the eval stream; files are copies for CI."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mist.cli._eval_files import ConfigOption, PathsArg, load
from mist.cli._eval_judging import ALL_FAILED, NOT_MET, BaselineOption, Format, StreamOption, say, write_text
from mist.cli.session import Session, current
from mist.errors import InvalidArgument, NotFound
from mist.kit.signals import drained

if TYPE_CHECKING:
    from mist.broker.base import Broker, Stream
    from mist.kit.prices import Prices
    from mist.tools.matchspec.graders.hands import Hands
    from mist.tools.matchspec.reports import Report
    from mist.tools.matchspec.run import Outcome
    from mist.tools.matchspec.suite import Suite

COLUMNS = ["suite", "model", "passed", "total", "rate", "ci_low", "ci_high"]
PARTIAL = 9
_RESULT = re.compile(r"-([0-9]{8}-[0-9]{6})\.(?:json|xml|md|txt|html)$")


async def run(
    paths: PathsArg = None,
    name: Annotated[str, typer.Option("--run", metavar="ID", help="The run's id: go on with it, or give it.")] = "",
    new: Annotated[bool, typer.Option("--new", help="A new run, also where one of this suite is unfinished.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Only go on with an unfinished run.")] = False,
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="Run samples again whose result is an error.")
    ] = False,
    suite: Annotated[
        list[str] | None, typer.Option("--suite", metavar="NAME", help="Only this suite. Repeatable.")
    ] = None,
    tags: Annotated[
        str, typer.Option("--tags", metavar="A,B", help="Only suites or samples with one of these tags.")
    ] = "",
    concurrency: Annotated[
        int | None, typer.Option("--concurrency", min=1, metavar="N", help="Questions at once; default the harness's.")
    ] = None,
    sample_timeout: Annotated[
        float | None, typer.Option("--sample-timeout", min=0.0, metavar="S", help="For one answer.")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option("--epochs", min=1, metavar="N", help="Ask every sample N times.")
    ] = None,
    limit_usd: Annotated[
        float | None, typer.Option("--limit-usd", min=0.0, metavar="N", help="Stop when this much was spent.")
    ] = None,
    limit_tokens: Annotated[
        int | None, typer.Option("--limit-tokens", min=1, metavar="N", help="Stop when so many tokens were used.")
    ] = None,
    limit_s: Annotated[
        float | None, typer.Option("--limit-s", min=0.0, metavar="S", help="Stop after so long.")
    ] = None,
    rate: Annotated[
        float, typer.Option("--rate", min=0.0, metavar="N", help="At most N samples a second; 0 = no limit.")
    ] = 0.0,
    ask: Annotated[
        str, typer.Option("--ask", metavar="URL", help="Who answers `infer` models, judges and embeddings: http(s)://…")
    ] = "",
    prices: Annotated[
        str, typer.Option("--prices", metavar="FILE", help="A price table; default tokentrace.prices of mist.toml.")
    ] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what is left to do, what it would cost, and run nothing.")
    ] = False,
    judge: Annotated[
        bool, typer.Option("--judge", help="Judge by the gate even where the suite states none (then 1 for all).")
    ] = False,
    baseline: BaselineOption = "",
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="Stop after the first suite that fails.")] = False,
    show_all_failures: Annotated[
        bool, typer.Option("--show-all-failures", help="All failing examples instead of the first 5.")
    ] = False,
    output_dir: Annotated[
        str, typer.Option("--output-dir", metavar="DIR", help="Write the report as <suite>-YYYYMMDD-HHMMSS.json there.")
    ] = "",
    as_: Annotated[
        Format | None, typer.Option("--as", help="With --output-dir: a report in this format beside the JSON.")
    ] = None,
    badge: Annotated[str, typer.Option("--badge", metavar="FILE", help="Write an SVG badge there.")] = "",
    from_stream: Annotated[
        str,
        typer.Option("--from-stream", metavar="STREAM", help="Judge the answers of this stream, as infer; ask nobody."),
    ] = "",
    from_: Annotated[
        str,
        typer.Option("--from", metavar="POS", help="With --from-stream: from there; start, N, +N, @TIME, cursor:NAME."),
    ] = "",
    to: Annotated[str, typer.Option("--to", metavar="POS", help="With --from-stream: up to there.")] = "",
    save_cursor: Annotated[
        str, typer.Option("--save-cursor", metavar="NAME", help="With --from-stream: remember how far this got.")
    ] = "",
    spans: Annotated[
        str,
        typer.Option(
            "--spans", metavar="STREAM", help="Publish the results as spans there, so that traces show quality."
        ),
    ] = "",
    config: ConfigOption = "",
    write: Annotated[bool, typer.Option("--write", hidden=True, help="To the directory of the settings.")] = False,
    stream: StreamOption = "eval",
) -> None:
    """Run suites; one durable result per sample, model and repeat.

    An unfinished run of exactly this suite is gone on with (--new begins another): finished samples are never run, or
    paid, again. JSON: [{"suite", "model", "passed", "total", "rate", "ci_low", "ci_high"}], the interval is Wilson's at 95 %.

    A suite that states a gate is judged by it: exit code 10 when it fails, 1 when nothing could be judged. Without a gate
    9 when samples had no answer to grade (they count as failed), or the run stopped at a limit.

    Examples:
      mist eval run suite.toml
      mist eval run gsm8k_model_solutions.jsonl --format json
      mist eval run suite.toml --dry-run --limit-usd 2
      mist eval run suite.toml --from-stream infer --from @-24h --spans trace
    """
    from mist.cli._ask import hands
    from mist.tools.matchspec.run import Limits

    session = current()
    loaded, settings = load(session, paths, config)
    suites = chosen(loaded, suite or ([] if paths else session.config.eval.suites), tags)
    if write and not output_dir:
        output_dir, as_ = settings.output.dir, as_ or Format(settings.output.format)
    traffic = None
    if from_stream:
        from mist.cli._eval_traffic import judged as judged_traffic

        traffic = await judged_traffic(session, suites, from_stream, from_, to)
        suites = traffic.suites
    elif from_ or to or save_cursor:
        raise InvalidArgument("--from, --to and --save-cursor are for --from-stream")
    suites = [tuned(s, concurrency=concurrency, timeout_s=sample_timeout, epochs=epochs) for s in suites]
    if name and len(suites) > 1:
        raise InvalidArgument(f"--run names one run, there are {len(suites)} suites", hint="choose one with --suite")
    priced = price_table(session, prices)
    if dry_run:
        await _plan(session, suites, name, stream, new=new, prices=priced, retry_errors=retry_errors)
        return
    broker, opened = await session.reach(stream, create=True)
    limits = Limits(usd=limit_usd, tokens=limit_tokens, seconds=limit_s)
    rows: list[dict[str, Any]] = []
    whole, worst = True, None
    async with hands(session, ask, suites) as given:
        for one in suites:
            id = await _run_id(opened, one, name, new=new, resume=resume)
            options: dict[str, Any] = {"rate": rate, "limits": limits, "prices": priced, "retry_errors": retry_errors}
            options |= {"baseline": baseline}
            outcome = await _one(session, broker, opened, one, id, options, given, name_of(paths))
            judged = judge or bool(baseline) or _states_a_gate(one)
            found = None
            if judged or output_dir or badge:
                from mist.tools.matchspec.report import report_of

                found = await report_of(opened, id, gate=one.gate, baseline=baseline, complete=not outcome.stopped)
                _written(found, output_dir, as_)
                worst = found if worst is None or _worse(found, worst) else worst
                if write and settings.output.retain_days:
                    _retired(Path(output_dir), settings.output.retain_days, time.time())
            rows += _rows(outcome)
            whole = whole and not outcome.stopped
            if spans:
                from mist.tools.matchspec.tracing import publish_spans

                count = await publish_spans(opened, id, await broker.open(spans))
                session.out.note(f"{count} spans to stream {spans}")
            if judged and found is not None:
                if session.out.format == "table":
                    say(session, found, Format.text, show_all=show_all_failures)
                code = 0 if found.ok else ALL_FAILED if found.status == "error" else NOT_MET
                session.fail_with(code)
                if code and fail_fast:
                    break
            elif session.out.format == "table":
                session.out.rows(_rows(outcome), COLUMNS, empty=f"run {id} has no results yet")
            if not judged and (outcome.stopped or outcome.run.info.errors):
                session.fail_with(PARTIAL)
    if badge and worst is not None:
        from mist.tools.matchspec.reports import badge as drawing

        write_text(Path(badge), drawing.write(worst))
    if traffic is not None and save_cursor and whole:
        from mist.cli._eval_traffic import save

        await save(session, traffic, save_cursor)
    if session.out.format != "table":
        session.out.rows(rows, COLUMNS)


def chosen(suites: list[Suite], names: Sequence[str], tags: str) -> list[Suite]:
    """Those named, and of them what has a tag. Raises NotFound for a name, InvalidArgument where nothing is left: a gate
    that looked at nothing would be green."""
    from mist.tools.matchspec.select import by_tags, split

    for name in names:
        if name not in {s.name for s in suites}:
            raise NotFound(f"no suite {name!r}", hint=f"there are {', '.join(s.name for s in suites)}")
    kept = [s for s in suites if not names or s.name in names]
    wanted = split(tags)
    found = [part for s in kept if (part := by_tags(s, wanted)) is not None]
    if not found:
        raise InvalidArgument(f"nothing has one of the tags {tags!r}" if tags else "there is no suite to run")
    return found


def tuned(suite: Suite, *, concurrency: int | None, timeout_s: float | None, epochs: int | None) -> Suite:
    """The suite as these options have it. Repeats belong to what it is (another digest), the others do not."""
    from msgspec.structs import replace

    from mist.tools.matchspec.suite import suite_of

    changes: dict[str, Any] = {"concurrency": concurrency, "timeout_s": timeout_s, "epochs": epochs}
    changes = {key: value for key, value in changes.items() if value is not None}
    if not changes:
        return suite
    return suite_of(
        suite.name, [replace(h, **changes) for h in suite.harnesses], where=suite.name, gate=suite.gate,
        description=suite.description, tags=suite.tags, seed=suite.seed,
    )  # fmt: skip


def price_table(session: Session, path: str) -> Prices | None:
    from mist.kit.prices import load_prices

    path = path or session.config.tokentrace.prices
    return load_prices(Path(path)) if path else None


async def _run_id(stream: Stream, suite: Suite, name: str, *, new: bool, resume: bool) -> str:
    from mist.tools.matchspec.run import find_unfinished, new_run_id

    if name:
        return name
    found = None if new else await find_unfinished(stream, suite)
    if found is None and resume:
        raise NotFound(f"no unfinished run of suite {suite.name} as it is now", hint="`mist eval ls` lists the runs")
    return found or new_run_id(suite.name)


async def _one(
    session: Session,
    broker: Broker,
    stream: Stream,
    suite: Suite,
    id: str,
    options: dict[str, Any],
    given: Hands,
    files: str,
) -> Outcome:
    from msgspec.structs import replace

    from mist.tools.matchspec.graders.hands import equip
    from mist.tools.matchspec.run import run_suite

    out = session.out
    suite = replace(suite, harnesses=tuple(replace(h, graders=equip(h.graders, given)) for h in suite.harnesses))
    out.note(f"run {id}: {suite.total} samples, {len(suite.models)} models, on {broker.url} stream {stream.name}")
    session.resume = f"go on with: mist eval run {files} --run {id}"
    with out.progress("grading", suite.total) as bar:

        async def work(stop: asyncio.Event) -> Outcome:
            return await run_suite(
                broker, stream, suite, run=id, stop=stop, ask=given.ask,
                on_progress=lambda done, _total: bar.at(done), collect=False, **options,
            )  # fmt: skip

        outcome = await drained(work)
    session.resume = ""
    if outcome.kept:
        out.note(
            f"went on after sequence {outcome.resumed_after}: {outcome.kept} results were there, {outcome.ran} are new"
        )
    if outcome.why:
        out.warn(f"run {id} is not complete: {outcome.why}")
    errors = outcome.run.info.errors
    if errors:
        what = "had no recorded answer" if outcome.unanswered == errors else "ended with an error"
        out.warn(f"{errors} samples {what} and count as failed")
    return outcome


def _states_a_gate(suite: Suite) -> bool:
    from mist.tools.matchspec.suite import Gate

    return suite.gate != Gate() or any(g.threshold is not None for h in suite.harnesses for g in h.graders)


def _rows(outcome: Outcome) -> list[dict[str, Any]]:
    import msgspec

    return [msgspec.to_builtins(r) for r in outcome.rows]


def _worse(a: Report, b: Report) -> bool:
    """Whether a badge should rather show A: a failure before a success, then the lower score."""

    def key(report: Report) -> tuple[bool, float]:
        scores = [g.score for g in report.grader_results if g.score is not None and g.threshold is not None]
        return report.ok, min(scores, default=0.0)

    return key(a) < key(b)


def _written(report: Report, output_dir: str, as_: Format | None) -> None:
    """The result file (a run gone on with has the same one), and a second format beside it."""
    from mist.protocol.subject import encode_token
    from mist.tools.matchspec.reports import FORMATS, render

    if output_dir:
        began = report.started_at.translate(str.maketrans("", "", "-:Z")).replace("T", "-")
        stem = f"{encode_token(report.suite)}-{began}"
        for format in dict.fromkeys((Format.json, as_ or Format.json)):
            write_text(Path(output_dir) / f"{stem}.{FORMATS[format]}", render(report, format))


def _retired(directory: Path, days: int, now_s: float) -> None:
    """Result files of ours that are older go, by the time in their names."""
    before = datetime.fromtimestamp(now_s - days * 86400, UTC).strftime("%Y%m%d-%H%M%S")
    for path in directory.iterdir():
        found = _RESULT.search(path.name)
        if found is not None and found[1] < before:
            path.unlink(missing_ok=True)


def name_of(paths: Sequence[str] | None) -> str:
    import shlex

    return " ".join(map(shlex.quote, paths or []))


async def _plan(
    session: Session,
    suites: list[Suite],
    name: str,
    stream: str,
    *,
    new: bool,
    prices: Prices | None,
    retry_errors: bool,
) -> None:
    """What a run would do, in rows; makes nothing."""
    import msgspec

    from mist.protocol.url import parse_url
    from mist.tools.matchspec.derive import dry_run
    from mist.tools.matchspec.run import find_unfinished

    rows = []
    for suite in suites:
        opened, id = None, name
        try:
            broker = await session.connect()
            opened = await broker.open(stream, create=False)
            id = id or (not new and await find_unfinished(opened, suite)) or ""
        except NotFound:  # nothing was ever run there
            broker = await session.connect(parse_url("memory:"), create=True)
        plan = await dry_run(
            broker, opened, suite, run=id, prices=prices, time_ns=time.time_ns(), retry_errors=retry_errors
        )
        rows.append({"suite": suite.name, **msgspec.to_builtins(plan)})
    columns = ["suite", "run", "total", "finished", "left", "calls", "recorded", "usd", "how"]
    session.out.rows(rows, columns)
