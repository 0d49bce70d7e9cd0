"""`mist eval`: run suites, look at runs, compare them. A run lives in the eval stream and nowhere else."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mist.cli._tools import LimitOption
from mist.cli.session import Session, current
from mist.cli.wrap import noun
from mist.kit.signals import drained

if TYPE_CHECKING:
    from mist.broker.base import Stream
    from mist.tools.matchspec.results import Run
    from mist.tools.matchspec.suite import Suite

app = noun("Evals: run a suite, list and compare runs, replay their results.")

StreamOption = Annotated[str, typer.Option("--stream", metavar="STREAM", help="The stream of runs and results.")]
RunArg = Annotated[str, typer.Argument(metavar="RUN", help="A run's id; `mist eval ls` lists them.")]
COLUMNS = ["suite", "model", "passed", "total", "rate", "ci_low", "ci_high"]
NOT_MET = 10
PARTIAL = 9


@app.command()
async def run(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="A suite (.toml), or GSM8K's recorded solutions (.jsonl).")
    ],
    name: Annotated[str, typer.Option("--run", metavar="ID", help="The run's id: go on with it, or give it.")] = "",
    new: Annotated[bool, typer.Option("--new", help="A new run, also where one of this suite is unfinished.")] = False,
    rate: Annotated[
        float, typer.Option("--rate", min=0.0, metavar="N", help="At most N samples a second; 0 = no limit.")
    ] = 0.0,
    stream: StreamOption = "eval",
) -> None:
    """Run a suite; one durable result per sample and model.

    An unfinished run of exactly this suite is gone on with (--new begins another): finished samples are never run
    again. JSON: [{"suite", "model", "passed", "total", "rate", "ci_low", "ci_high"}], the interval is Wilson's at 95 %.
    Exit code 9 when samples had no answer to grade; they count as failed.

    Examples:
      mist eval run suite.toml
      mist eval run gsm8k_model_solutions.jsonl --format json
    """
    from mist.tools.matchspec.run import find_unfinished, new_run_id, run_suite

    session = current()
    out = session.out
    suite = load_suite(Path(file))
    broker, opened = await session.reach(stream, create=True)
    if not name:
        name = (not new and await find_unfinished(opened, suite)) or new_run_id(suite.name)
    out.note(f"run {name}: {suite.total} samples, {len(suite.models)} models, on {broker.url} stream {stream}")
    session.resume = f"go on with: mist eval run {file} --run {name}"
    with out.progress("grading", suite.total) as bar:
        outcome = await drained(
            lambda stop: run_suite(
                broker, opened, suite, run=name, stop=stop, rate=rate, on_progress=lambda done, _total: bar.at(done)
            )
        )
    session.resume = ""
    if outcome.kept:
        out.note(
            f"went on after sequence {outcome.resumed_after}: {outcome.kept} results were there, {outcome.ran} are new"
        )
    if outcome.run.info.errors:
        out.warn(f"{outcome.run.info.errors} samples had no recorded answer and count as failed")
        session.fail_with(PARTIAL)
    table(session, outcome.run)


def load_suite(path: Path) -> Suite:
    """The suite a file holds."""
    from mist.tools.matchspec.load import load_suite

    return load_suite(path)


def table(session: Session, run: Run) -> None:
    """The run's rows: the one shape of `eval run`, `eval show` and the demo."""
    import msgspec

    from mist.tools.matchspec.results import rows

    found = rows((r.result for r in run.results), run.manifest.models)
    session.out.rows([msgspec.to_builtins(r) for r in found], COLUMNS, empty=f"run {run.info.run} has no results yet")


async def _stream(session: Session, name: str) -> Stream:
    return await session.stream(name)


async def _read(session: Session, stream: str, *names: str) -> list[Run]:
    from mist.tools.matchspec.results import read_run

    opened = await _stream(session, stream)
    return [await read_run(opened, name) for name in names]


@app.command()
async def ls(n: LimitOption = 20, stream: StreamOption = "eval") -> None:
    """List the runs, newest first.

    Example:
      mist eval ls
    """
    import msgspec

    from mist.cli.render import moment
    from mist.tools.matchspec.results import list_runs

    session = current()
    runs = (await list_runs(await _stream(session, stream)))[:n]
    rows: list[dict[str, Any]] = [{**msgspec.to_builtins(r), "complete": r.complete} for r in runs]
    if session.out.format == "table":
        rows = [{**r, "started": moment(r["started_ns"]), "models": len(r["models"])} for r in rows]
    session.out.rows(
        rows, ["run", "suite", "started", "models", "done", "total", "errors", "complete"], empty="no runs"
    )


@app.command()
async def show(
    run: RunArg,
    failed: Annotated[bool, typer.Option("--failed", help="The failing samples instead of the table.")] = False,
    n: LimitOption = 20,
    stream: StreamOption = "eval",
) -> None:
    """Show a run's table, or the samples that failed.

    Example:
      mist eval show demo-20260131-120000-ab12 --failed -n 5
    """
    session = current()
    out = session.out
    (found,) = await _read(session, stream, run)
    info = found.info
    out.note(
        f"run {info.run} of {info.suite}: {info.done} of {info.total} results, {info.errors} errors, "
        f"sequences {info.first} to {info.last}"
    )
    if not failed:
        table(session, found)
        return
    rows = [_sample(r.sequence, r.result) for r in found.results if not r.result.passed][:n]
    out.rows(rows, ["sequence", "model", "task", "answer", "expected", "error"], empty="nothing failed")


def _sample(sequence: int, result: Any) -> dict[str, Any]:
    import msgspec

    from mist.cli.render import seq

    row: dict[str, Any] = {"sequence": seq(sequence), **{k: getattr(result, k) for k in result.__struct_fields__}}
    if current().out.format == "table":
        row["expected"] = row["expected"][-40:]
        row["answer"] = None if row["answer"] is None else row["answer"][-40:]
    return dict(msgspec.to_builtins(row))


@app.command()
async def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="The earlier run.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The later run.")],
    stream: StreamOption = "eval",
) -> None:
    """Compare two runs sample by sample: what was gained, what was lost, and whether that could be chance.

    Example:
      mist eval diff basics-20260130-1 basics-20260131-1
    """
    import msgspec

    from mist.tools.matchspec.results import diff as compare

    session = current()
    left, right = await _read(session, stream, a, b)
    rows = [msgspec.to_builtins(d) for d in compare(left, right)]
    if session.out.format == "table":
        rows = [{**r, "gained": len(r["gained"]), "lost": len(r["lost"])} for r in rows]
    session.out.rows(rows, ["model", "common", "rate_a", "rate_b", "delta", "gained", "lost", "p_value"])


@app.command()
async def replay(
    run: RunArg,
    from_: Annotated[
        str, typer.Option("--from", metavar="POS", help="First record: start, N, +N, @TIME, cursor:eval-RUN.")
    ] = "start",
    stream: StreamOption = "eval",
) -> None:
    """Read the results of a run again from a position of the eval stream, without running anything.

    jsonl, csv and raw give one result per line; json gives {"run", "from", "last", "results", "eval": [rows]}, where the
    rows cover what was replayed. A run that was stopped keeps its position as the cursor eval-RUN.

    Examples:
      mist eval replay basics-20260131-1 --from cursor:eval-basics-20260131-1 --format json
      mist eval replay basics-20260131-1 --from 500 --format jsonl
    """
    import msgspec

    from mist.cli.position import after_of, parse_position
    from mist.tools.matchspec.results import read_run, records, result_of, result_subject, rows

    session = current()
    out = session.out
    broker, opened = await session.locate(stream)
    whole = await read_run(opened, run)
    position = parse_position(from_, now_ns=time.time_ns())
    after = await after_of(position, opened, broker.checkpoints if broker is not None else None, await opened.info())
    results = []
    last = after
    with out.lines() if out.format in ("jsonl", "csv", "raw") else _Silent() as lines:
        async for record in records(opened, (result_subject(run),), after=after):
            stored = result_of(record)
            if stored is None:
                continue
            results.append(stored.result)
            last = stored.sequence
            if lines is not None:
                lines.row(_sample(stored.sequence, stored.result))
    found = [msgspec.to_builtins(r) for r in rows(results, whole.manifest.models)]
    if out.format == "json":
        out.item({"run": run, "from": after + 1, "last": last, "results": len(results), "eval": found})
    elif out.format == "table":
        out.note(f"{len(results)} results of run {run} after sequence {after}")
        out.rows(found, COLUMNS, empty="no results there")


class _Silent:
    """Stands in for a list of lines where the answer is one document."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


@app.command()
async def gate(
    run: RunArg,
    min_rate: Annotated[
        float, typer.Option("--min-rate", min=0.0, max=1.0, metavar="R", help="What every model must reach, 0 to 1.")
    ],
    model: Annotated[
        list[str] | None, typer.Option("--model", metavar="NAME", help="Only these models. Repeatable.")
    ] = None,
    lower_bound: Annotated[
        bool, typer.Option("--lower-bound", help="Compare the lower end of the interval, not the rate.")
    ] = False,
    stream: StreamOption = "eval",
) -> None:
    """Exit 0 when the run is complete and every model reaches the rate, 10 otherwise. Never passes on nothing.

    Example:
      mist eval gate basics-20260131-1 --min-rate 0.9 --lower-bound
    """
    import msgspec

    from mist.tools.matchspec.results import rows

    session = current()
    out = session.out
    (found,) = await _read(session, stream, run)
    wanted = model or found.manifest.models
    table_rows = {r.model: r for r in rows((r.result for r in found.results), found.manifest.models)}
    verdicts = []
    for name in wanted:
        row = table_rows.get(name)
        reached = None if row is None else row.ci_low if lower_bound else row.rate
        met = found.info.complete and reached is not None and reached >= min_rate
        verdicts.append({"model": name, "reached": reached, "min_rate": min_rate, "met": met})
    if not found.info.complete:
        out.warn(f"run {run} is not complete: {found.info.done} of {found.info.total}")
    out.rows([msgspec.to_builtins(v) for v in verdicts], ["model", "reached", "min_rate", "met"])
    if not verdicts or not all(v["met"] for v in verdicts):
        session.fail_with(NOT_MET)
