"""The verbs of `mist eval` that judge runs which are there: report, diff, gate, calibrate."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mist.cli.session import Session, current
from mist.errors import InvalidArgument

if TYPE_CHECKING:
    from mist.tools.matchspec.reports import Report

NOT_MET = 10
ALL_FAILED = 1
SHOWN = 10
"""Ids of regressions that a table's note names."""

StreamOption = Annotated[str, typer.Option("--stream", metavar="STREAM", help="The stream of runs and results.")]
RunArg = Annotated[str, typer.Argument(metavar="RUN", help="A run's id; `mist eval ls` lists them.")]


class Format(StrEnum):
    text = "text"
    json = "json"
    junit = "junit"
    markdown = "markdown"
    html = "html"


AsOption = Annotated[
    Format | None, typer.Option("--as", help="The report's format; default text, or json with -o json.")
]
BaselineOption = Annotated[
    str, typer.Option("--baseline", metavar="RUN", help="Compare with this run; a significant loss fails the gate.")
]


def say(session: Session, report: Report, format: Format | None, **options: Any) -> None:
    """Print a report on stdout."""
    from mist.tools.matchspec.reports import render

    out = session.out
    if format is None:
        format = Format.json if out.json else Format.text
    if format is Format.text:
        encoding = (getattr(sys.stdout, "encoding", "") or "").lower().replace("-", "")
        options |= {"color": out.color, "ascii": not encoding.startswith("utf")}
    elif format is Format.markdown:
        options.pop("show_passing", None)
    else:
        options = {}
    out.text(render(report, format, **options))


def verdict(session: Session, report: Report) -> None:
    """The exit code a report asks for."""
    if report.status == "error":
        session.fail_with(ALL_FAILED)
    elif not report.ok:
        session.fail_with(NOT_MET)


async def report(
    run: Annotated[
        str, typer.Argument(metavar="[RUN]", help="A run's id, or a result file (.json); default: the newest run.")
    ] = "",
    as_: AsOption = None,
    compare: Annotated[
        str, typer.Option("--compare", metavar="FILE", help="An earlier result file: show its scores beside.")
    ] = "",
    baseline: BaselineOption = "",
    show_passing: Annotated[bool, typer.Option("--show-passing", help="Passing examples too (text).")] = False,
    show_all_failures: Annotated[
        bool, typer.Option("--show-all-failures", help="All failing examples instead of the first 5.")
    ] = False,
    badge: Annotated[str, typer.Option("--badge", metavar="FILE", help="Write an SVG badge there too.")] = "",
    stream: StreamOption = "eval",
) -> None:
    """Judge a run by its own gate and print the report: text, JSON, JUnit XML, Markdown or one HTML file.

    Exit code 0 when the verdict is PASS, 10 when it is FAIL, 1 when nothing could be judged.

    Examples:
      mist eval report basics-20260131-1
      mist eval report basics-20260131-1 --as junit > junit.xml
      mist eval report basics-20260131-1 --as html > report.html
    """
    from mist.tools.matchspec.report import report_of, with_earlier
    from mist.tools.matchspec.reports import badge as drawing

    session = current()
    if run.endswith(".json") and Path(run).is_file():
        found = read_file(Path(run))
    else:
        opened = await session.stream(stream)
        found = await report_of(opened, run or await newest(session, stream), baseline=baseline)
    if compare:
        found = with_earlier(found, read_file(Path(compare)))
    say(session, found, as_, show_all=show_all_failures, show_passing=show_passing)
    if badge:
        write_text(Path(badge), drawing.write(found))
    verdict(session, found)


async def newest(session: Session, stream: str) -> str:
    from mist.errors import NotFound
    from mist.tools.matchspec.results import list_runs

    runs = await list_runs(await session.stream(stream))
    if not runs:
        raise NotFound(f"no run in stream {stream}", hint="`mist eval run SUITE` makes one")
    return runs[0].run


def read_file(path: Path) -> Report:
    """A result file. Raises NotFound, InvalidArgument."""
    import msgspec

    from mist.tools.matchspec.reports import Report
    from mist.tools.matchspec.suite import read_text

    try:
        return msgspec.json.decode(read_text(path).encode(), type=Report)
    except msgspec.DecodeError as exc:
        raise InvalidArgument(f"{path}: not a result file: {exc}") from exc


def write_text(path: Path, text: str) -> None:
    """Raises Refused. The directory is made; a reader sees the old file or the new one."""
    from mist.errors import Refused

    beside = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text, encoding="utf-8", errors="backslashreplace")
        beside.replace(path)
    except OSError as exc:
        raise Refused(f"{path}: {exc.strerror or exc}") from exc


async def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="The earlier run, or RUN:MODEL.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The later run, or RUN:MODEL.")],
    confidence: Annotated[float, typer.Option("--confidence", metavar="C", help="Of the interval.")] = 0.95,
    stream: StreamOption = "eval",
) -> None:
    """Compare two runs sample by sample: what was gained, what was lost, and whether that could be chance.

    p_value is McNemar's exact test; score_delta with ci_low, ci_high is the paired bootstrap of the mean score; p_adjusted
    is Holm's over all models; samples_needed says how many samples would show a difference this small. One model each are
    compared whatever they are called, several by their names, RUN:MODEL picks one, also of the same run.

    Examples:
      mist eval diff basics-20260130-1 basics-20260131-1
      mist eval diff gsm8k-1:175b_finetuning gsm8k-1:175b_verification
    """
    import msgspec

    from mist.tools.matchspec.compare import compare
    from mist.tools.matchspec.report import count

    session = current()
    opened = await session.stream(stream)
    (run_a, _, model_a), (run_b, _, model_b) = a.partition(":"), b.partition(":")
    left = (await count(opened, run_a, ids=True, examples_max=0)).tally
    right = left if run_a == run_b else (await count(opened, run_b, ids=True, examples_max=0)).tally
    found = compare(left, right, model_a=model_a, model_b=model_b, confidence=confidence)
    rows = [msgspec.to_builtins(d) for d in found]
    columns = ["model", "common", "rate_a", "rate_b", "delta", "gained", "lost", "p_value"]
    if session.out.format == "table":
        columns += ["p_adjusted", "score_delta", "ci_low", "ci_high"]
        short = ("p_value", "p_adjusted")
        rows = [
            {**r, "gained": len(r["gained"]), "lost": len(r["lost"])} | {p: f"{r[p]:.3g}" for p in short} for r in rows
        ]
    session.out.rows(rows, columns)
    for d in found:
        if d.lost and session.out.format == "table":
            more = f" and {len(d.lost) - SHOWN} more" if len(d.lost) > SHOWN else ""
            session.out.note(f"{d.model} lost: {', '.join(d.lost[:SHOWN])}{more}")
        if d.changed:
            session.out.warn(f"{d.model}: {d.changed} samples have another input or expectation now and were left out")
        if d.samples_needed:
            session.out.note(f"{d.model}: it would take about {d.samples_needed} samples to show this difference")


async def gate(
    run: RunArg,
    min_rate: Annotated[
        float | None,
        typer.Option("--min-rate", min=0.0, max=1.0, metavar="R", help="What every model must reach, 0 to 1."),
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option("--model", metavar="NAME", help="Only these models. Repeatable.")
    ] = None,
    lower_bound: Annotated[
        bool, typer.Option("--lower-bound", help="Compare the lower end of the interval, not the rate.")
    ] = False,
    baseline: BaselineOption = "",
    stream: StreamOption = "eval",
) -> None:
    """Exit 0 when the run is complete and meets its gate, 10 otherwise. Never passes on nothing.

    The gate is that of the suite, as the run's manifest keeps it; with --min-rate it is this share of passed samples for
    every model. Incomplete runs, samples that could not be judged, unknown names and unknown costs never pass.

    Examples:
      mist eval gate basics-20260131-1
      mist eval gate basics-20260131-1 --min-rate 0.9 --lower-bound
    """
    from msgspec.structs import replace

    from mist.tools.matchspec.report import report_of
    from mist.tools.matchspec.reports.values import OVERALL
    from mist.tools.matchspec.results import read_head
    from mist.tools.matchspec.suite import Gate

    session = current()
    out = session.out
    opened = await session.stream(stream)
    manifest = (await read_head(opened, run)).manifest
    rules = manifest.gate
    if min_rate is not None:  # of samples as a whole; the graders only inform, but each must have judged something
        names = {str(g.get("name") or g.get("type")) for h in manifest.harnesses for g in h.graders}
        rules = Gate(overall=min_rate, per_grader=dict.fromkeys(names, 0.0), cluster=rules.cluster)
    if lower_bound:
        rules = replace(rules, use_lower_bound=True)
    found = await report_of(opened, run, gate=rules, baseline=baseline, examples_max=0)
    complete = 0 < found.total <= found.completed
    grades = found.grader_results
    rows: list[dict[str, Any]] = []
    for name in model or dict.fromkeys(g.model for g in grades):
        ours = [g for g in grades if g.model == name]
        met = complete and bool(ours) and all(g.passed for g in ours)
        shown = [g for g in ours if min_rate is None or g.name == OVERALL]
        for g in shown:
            reached = g.ci_lower if rules.use_lower_bound else g.score
            row = {"model": name, "reached": reached, "min_rate": g.threshold, "met": g.passed and complete}
            rows.append(row if min_rate is not None else {**row, "grader": g.name, "n": g.n, "why": g.why})
            if min_rate is not None:
                rows[-1]["met"] = met
        if not ours:
            rows.append({"model": name, "reached": None, "min_rate": min_rate, "met": False})
    if not complete:
        out.warn(f"run {run} is not complete: {found.completed} of {found.total}")
    columns = ["model", "reached", "min_rate", "met"] + ([] if min_rate is not None else ["grader", "n", "why"])
    out.rows(rows, columns)
    known = {f"{g.harness or g.model}: {g.name}: {g.why}" for g in grades}
    of_run = [reason for reason in found.reasons if reason not in known]
    for reason in of_run:
        if complete or "not complete" not in reason:
            out.warn(reason)
    if of_run or not rows or not all(r["met"] for r in rows):
        session.fail_with(NOT_MET)


async def calibrate(
    run: RunArg,
    labels: Annotated[
        str, typer.Option("--labels", metavar="FILE", help='JSON lines {"id", "passed", "grader"?, "model"?}.')
    ],
    confidence: Annotated[float, typer.Option("--confidence", metavar="C", help="Of the intervals.")] = 0.95,
    stream: StreamOption = "eval",
) -> None:
    """How far the graders of a run agree with people: accuracy and Cohen's kappa, each with its interval.

    Kappa is agreement beyond chance; null where chance alone explains it all. too_kind and too_strict name the samples.
    Exit code 9 when labels met no verdict.

    Example:
      mist eval calibrate basics-20260131-1 --labels people.jsonl
    """
    import msgspec

    from mist.tools.matchspec.calibrate import Label
    from mist.tools.matchspec.calibrate import calibrate as compare
    from mist.tools.matchspec.results import each_result, read_head
    from mist.tools.matchspec.suite import json_lines

    session = current()
    given = []
    for number, row in json_lines(Path(labels)):
        try:
            given.append(msgspec.convert(row, Label))
        except msgspec.ValidationError as exc:
            raise InvalidArgument(f"{labels}:{number}: {exc}", hint='{"id": "1", "passed": true}') from exc
    opened = await session.stream(stream)
    head = await read_head(opened, run)
    found = await compare(each_result(opened, head), given, confidence=confidence)
    rows = [msgspec.to_builtins(c) for c in found]
    if session.out.format == "table":
        rows = [{**r, "too_kind": len(r["too_kind"]), "too_strict": len(r["too_strict"])} for r in rows]
    session.out.rows(
        rows,
        [
            "grader",
            "n",
            "accuracy",
            "accuracy_low",
            "accuracy_high",
            "kappa",
            "kappa_low",
            "kappa_high",
            "too_kind",
            "too_strict",
        ],
    )
    missed = sum(c.unmatched for c in found)
    if missed:
        session.out.warn(f"{missed} labels met no verdict of run {run}")
        session.fail_with(9)
