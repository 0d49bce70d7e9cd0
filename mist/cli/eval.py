"""`mist eval`: run suites, look at runs, compare them. A run lives in the eval stream and nowhere else."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mist.cli._eval_files import init, validate
from mist.cli._eval_judging import RunArg, StreamOption, calibrate, diff, gate, report
from mist.cli._eval_making import AskOption, NameOption, fork, history, replayed, rescore
from mist.cli._eval_run import COLUMNS, run
from mist.cli._eval_serve import serve
from mist.cli._tools import LimitOption
from mist.cli.session import Session, current
from mist.cli.wrap import noun

if TYPE_CHECKING:
    from mist.broker.base import Stream

app = noun("Evals: run suites, judge and compare runs, make runs of runs.")
app.command()(run)


async def _stream(session: Session, name: str) -> Stream:
    return await session.stream(name)


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
    import msgspec

    from mist.tools.matchspec.results import Counting, Table, each_result, read_head

    session = current()
    out = session.out
    opened = await _stream(session, stream)
    counting = Counting(await read_head(opened, run))
    manifest = counting.head.manifest
    table, worst = Table(), _First(n)
    order = {h.name: i for i, h in enumerate(manifest.harnesses)}
    async for stored in each_result(opened, counting.head, counting):
        r = stored.result
        table.add(r.suite, r.model, r.passed)
        if failed and not r.passed:
            worst.add((order.get(r.harness, 0), r.index, r.epoch, stored.sequence), r)
    info = counting.info
    out.note(
        f"run {info.run} of {info.suite}: {info.done} of {info.total} results, {info.errors} errors, "
        f"sequences {info.first} to {info.last}"
    )
    if failed:
        rows = [_sample(place[-1], r) for place, r in worst.sorted()]
        out.rows(rows, ["sequence", "model", "task", "answer", "expected", "error"], empty="nothing failed")
        return
    found = [msgspec.to_builtins(r) for r in table.rows(manifest.models)]
    out.rows(found, COLUMNS, empty=f"run {run} has no results yet")


class _First:
    """The first `n` by their place, of any number."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._kept: list[tuple[tuple[int, ...], Any]] = []

    def add(self, place: tuple[int, ...], value: Any) -> None:
        self._kept.append((place, value))
        if len(self._kept) > 2 * self._n + 100:
            self._kept = self.sorted()

    def sorted(self) -> list[tuple[tuple[int, ...], Any]]:
        return sorted(self._kept, key=lambda kept: kept[0])[: self._n]


def _sample(sequence: int, result: Any) -> dict[str, Any]:
    import msgspec

    from mist.cli.render import seq

    row: dict[str, Any] = {"sequence": seq(sequence), **{k: getattr(result, k) for k in result.__struct_fields__}}
    if current().out.format == "table":
        row["expected"] = row["expected"][-40:]
        row["answer"] = None if row["answer"] is None else row["answer"][-40:]
    return dict(msgspec.to_builtins(row))


@app.command()
async def replay(
    run: RunArg,
    from_: Annotated[
        str, typer.Option("--from", metavar="POS", help="First record: start, N, +N, @TIME, cursor:eval-RUN.")
    ] = "start",
    suite: Annotated[
        str, typer.Option("--suite", metavar="FILE", help="Judge what follows again, on the recorded answers.")
    ] = "",
    name: NameOption = "",
    ask: AskOption = "",
    stream: StreamOption = "eval",
) -> None:
    """Read the results of a run again from a position of the eval stream, without running anything.

    With --suite a run of its own is made: results before the position are taken over, the others are judged again on the
    recorded answers, and no model is asked.

    jsonl, csv and raw give one result per line; json gives {"run", "from", "last", "results", "eval": [rows]}, where the
    rows cover what was replayed. A run that was stopped keeps its position as the cursor eval-RUN.

    Examples:
      mist eval replay basics-20260131-1 --from cursor:eval-basics-20260131-1 --format json
      mist eval replay basics-20260131-1 --from 500 --format jsonl
      mist eval replay basics-20260131-1 --from 500 --suite suite.toml --run again
    """
    import msgspec

    from mist.cli.position import after_of, parse_position
    from mist.tools.matchspec.results import Table, read_head, records, result_of, result_subject

    session = current()
    out = session.out
    broker, opened = await session.locate(stream)
    manifest = (await read_head(opened, run)).manifest
    position = parse_position(from_, now_ns=time.time_ns())
    after = await after_of(position, opened, broker.checkpoints if broker is not None else None, await opened.info())
    if suite:
        await replayed(run, suite, name, ask, stream, after)
        return
    count, table = 0, Table()
    last = after
    with out.lines() if out.format in ("jsonl", "csv", "raw") else _Silent() as lines:
        async for record in records(opened, (result_subject(run),), after=after):
            stored = result_of(record)
            if stored is None:
                continue
            r = stored.result
            table.add(r.suite, r.model, r.passed)
            count += 1
            last = stored.sequence
            if lines is not None:
                lines.row(_sample(stored.sequence, stored.result))
    found = [msgspec.to_builtins(r) for r in table.rows(manifest.models)]
    if out.format == "json":
        out.item({"run": run, "from": after + 1, "last": last, "results": count, "eval": found})
    elif out.format == "table":
        out.note(f"{count} results of run {run} after sequence {after}")
        out.rows(found, COLUMNS, empty="no results there")


class _Silent:
    """Stands in for a list of lines where the answer is one document."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


for _verb in (report, diff, gate, calibrate, rescore, fork, history, validate, init, serve):
    app.command()(_verb)
