"""`mist trace`: spans and traces, from the TokenTrace store; `ingest` and `worker` fill it, `tail` follows the stream."""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Iterable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from mist.cli._tools import LimitOption, SinceOption, StoreOption, UntilOption, store_path, time_option
from mist.cli.options import OptionGroup
from mist.cli.session import Session, current
from mist.cli.wrap import noun
from mist.errors import InvalidArgument
from mist.kit.signals import drained

if TYPE_CHECKING:
    from mist.kit.prices import Prices
    from mist.protocol.envelope import Envelope
    from mist.tools.tokentrace.queries import StoredSpan
    from mist.tools.tokentrace.spans import SpanRow
    from mist.tools.tokentrace.store import Store
    from mist.tools.tokentrace.where import Where

app = noun("Traces of LLM calls: fill the store from the stream, and ask it.")


class SpanOptions(OptionGroup, frozen=True, kw_only=True):
    """Which spans. All given conditions hold at once; an empty text is "those that name none"."""

    model: Annotated[str | None, typer.Option("--model", metavar="NAME", help="Only this model.")] = None
    operation: Annotated[str | None, typer.Option("--operation", metavar="NAME", help="Only this operation.")] = None
    provider: Annotated[str | None, typer.Option("--provider", metavar="NAME", help="Only this provider.")] = None
    source: Annotated[str | None, typer.Option("--source", metavar="NAME", help="Only this envelope source.")] = None
    tenant: Annotated[str | None, typer.Option("--tenant", metavar="NAME", help="Only this tenant.")] = None
    user: Annotated[str | None, typer.Option("--user", metavar="ID", help="Only this user.")] = None
    status: Annotated[str | None, typer.Option("--status", metavar="TEXT", help="Only this status.")] = None
    attr: Annotated[
        list[str], typer.Option("--attr", metavar="KEY=VALUE", help="Only with this attribute, as text. Repeatable.")
    ] = []  # noqa: RUF012  # a Struct copies it
    since: SinceOption = ""
    until: UntilOption = ""

    def where(self, *, failed: bool = False) -> Where:
        """The conditions. Raises InvalidArgument."""
        from mist.tools.tokentrace.where import Where

        attrs = []
        for pair in self.attr:
            key, equals, value = pair.partition("=")
            if not equals or not key:
                raise InvalidArgument(f"--attr {pair!r} is not KEY=VALUE", hint="for example --attr finish_reason=stop")
            attrs.append((key, value))
        return Where(
            model=self.model, operation=self.operation, provider=self.provider, source=self.source, tenant=self.tenant,
            user=self.user, status=self.status, attrs=tuple(attrs), since_ns=time_option(self.since),
            until_ns=time_option(self.until), failed=failed,
        )  # fmt: skip


StreamOption = Annotated[str, typer.Option("--stream", metavar="STREAM", help="The stream of spans.")]
ModelOption = Annotated[str, typer.Option("--model", metavar="NAME", help="Only this model.")]
SHOWN_REFUSED = 5


def store_of(session: Session, given: str) -> Path | str:
    """`--store`, else the settings', else the usual place."""
    return store_path(session.url, "tokentrace", given or session.config.tokentrace.store)


def prices_of(session: Session, file: str = "") -> Prices | None:
    """The price table of the option or the settings."""
    from mist.kit.prices import load_prices

    file = file or session.config.tokentrace.prices
    return load_prices(Path(file)) if file else None


def _store(session: Session, given: str) -> Store:
    from mist.tools.tokentrace.store import Store

    return Store.read(store_of(session, given))


@app.command()
async def ingest(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A .csv with a header, or .jsonl.")],
    model: Annotated[
        str, typer.Option("--model", metavar="NAME", help="For rows without one; else the file's name.")
    ] = "",
    operation: Annotated[str, typer.Option("--operation", metavar="NAME", help="For rows without one.")] = "chat",
    column: Annotated[
        list[str] | None, typer.Option("--column", metavar="OURS=THEIRS", help="Which column is which. Repeatable.")
    ] = None,
    rate: Annotated[
        float, typer.Option("--rate", min=0.0, metavar="N", help="At most N rows a second; 0 = no limit.")
    ] = 0.0,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Return when the rows can be queried.")] = True,
    stream: StreamOption = "trace",
    store: StoreOption = "",
) -> None:
    """Publish a file of calls durably, and return when its rows can be queried.

    Columns are found by name: TIMESTAMP, ContextTokens, GeneratedTokens (the Azure traces), or ours. Ids come from the
    file's digest and the row, so the same file can be ingested again without making new spans. Without --no-wait this
    command also runs the ingest up to its last row; a `mist trace worker` on the same store may run beside it.

    Examples:
      mist trace ingest azure_llm_conv_2023.csv --model gpt-4
      mist trace ingest calls.csv --column tokens_in=PromptTokens --column tokens_out=CompletionTokens
    """
    from mist.client.blobs import beside
    from mist.tools.tokentrace import files, publish
    from mist.tools.tokentrace.ingest import Options
    from mist.tools.tokentrace.ingest import ingest as run_ingest
    from mist.tools.tokentrace.intake import Intake
    from mist.tools.tokentrace.store import Store

    session = current()
    out = session.out
    rows = files.envelopes_of(Path(file), model=model, operation=operation, columns=_columns(column or []))
    broker, opened = await session.reach(stream, create=True)
    if wait and not broker.capabilities.read:
        out.note(f"{broker.url} is for publishing only: its rows can be queried when a worker has read them behind it")
        wait = False
    path = store_of(session, store) if wait else None
    intake = Intake(session.config.tokentrace.redact, session.config.tokentrace.sample)

    def taken() -> Iterator[Envelope | files.BadRow]:
        for row in rows:
            if isinstance(row, files.BadRow):
                yield row
            else:
                yield from intake([row])

    with out.progress("publishing") as bar:
        published = await publish.publish(
            opened,
            taken(),
            rate=rate,
            blobs=beside(broker),
            on_acked=lambda _e, sequences: bar.at(sequences[-1] if sequences else 0),
        )
    for bad in published.refused[:SHOWN_REFUSED]:
        out.warn(f"{file}:{bad.line}: {bad.reason}")
    if published.refused_count:
        out.warn(f"{published.refused_count} rows of {file} were refused, {published.acknowledged} published")
        session.fail_with(9)
    row: dict[str, Any] = {
        "file": file,
        "stream": stream,
        "acknowledged": published.acknowledged,
        "refused": published.refused_count,
        "last": published.last,
    }
    if path is not None and published.acknowledged:
        with Store.open(path) as opened_store:
            options = Options(prices=prices_of(session))
            await drained(
                lambda stop: run_ingest(
                    broker, opened, opened_store, until=published.last, stop=stop, options=options, on_event=out.warn
                )
            )
            row["spans"] = opened_store.count()
        out.note(f"{published.acknowledged} rows can be queried: try `mist trace stats`")
    out.item(row)


def _columns(pairs: Iterable[str]) -> dict[str, str]:
    columns = {}
    for pair in pairs:
        ours, equals, theirs = pair.partition("=")
        if not equals or not ours or not theirs:
            raise InvalidArgument(f"--column {pair!r} is not OURS=THEIRS", hint="for example tokens_in=PromptTokens")
        columns[ours] = theirs
    return columns


@app.command()
async def worker(
    until_end: Annotated[bool, typer.Option("--until-end", help="Stop at what is the end of the stream now.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="The stream was made again: begin it anew.")] = False,
    page: Annotated[
        int, typer.Option("--page", min=1, max=100_000, metavar="N", help="Records per transaction.")
    ] = 2000,
    record: Annotated[
        str, typer.Option("--record", metavar="NAME", help="Keep an append-only record of every row applied.")
    ] = "",
    from_: Annotated[
        str, typer.Option("--from", metavar="POS", help="Where a store without a position begins.")
    ] = "start",
    stream: StreamOption = "trace",
    store: StoreOption = "",
) -> None:
    """Copy the stream into the store, from where the store stands, until stopped.

    Spans and position are stored in one transaction: kill it whenever you like and start it again. SIGTERM finishes the
    page in hand. Records that are no spans are kept in quarantine (`mist trace errors --quarantined`).

    Examples:
      mist trace worker
      mist trace worker --until-end -u log:./data
    """
    from mist.cli.position import after_of, parse_position
    from mist.tools.tokentrace.ingest import Options, Progress, start
    from mist.tools.tokentrace.ingest import ingest as run_ingest
    from mist.tools.tokentrace.store import Store

    session = current()
    out = session.out
    prices = prices_of(session)
    broker, opened = await session.reach(stream, create=not until_end)
    info = await opened.info()
    position = parse_position(from_, now_ns=time.time_ns())
    first_after = await after_of(position, opened, broker.checkpoints, info)
    with Store.open(store_of(session, store)) as opened_store:
        after = start(opened_store, opened, restart=restart, first_after=first_after)
        until = info.last if until_end else None
        out.note(f"ingesting {stream} into {opened_store.place}, after sequence {after}")
        progress = Progress(after, after)
        try:
            await drained(
                lambda stop: run_ingest(
                    broker,
                    opened,
                    opened_store,
                    until=until,
                    stop=stop,
                    first_after=first_after,
                    options=Options(prices=prices, record=record, page_records=page),
                    on_event=out.warn,
                    progress=progress,
                )
            )
        finally:
            out.item(
                {
                    "stream": stream,
                    "started_after": progress.started_after,
                    "position": progress.position,
                    "records": progress.records,
                    "spans": progress.spans,
                    "known": progress.known,
                    "refused": progress.refused,
                    "gaps": progress.gaps,
                    "busy_s": round(progress.busy_s, 6),
                }
            )
            out.flush()


@app.command()
def ls(
    which: SpanOptions,
    n: LimitOption = 20,
    failed: Annotated[bool, typer.Option("--failed", help="Only traces with a failed span.")] = False,
    store: StoreOption = "",
) -> None:
    """List the newest traces.

    Example:
      mist trace ls -n 5 --failed
    """
    import msgspec

    from mist.cli.render import moment
    from mist.tools.tokentrace.queries import traces

    session = current()
    with _store(session, store) as opened:
        found = traces(opened, which.where(failed=failed), limit=n).traces
    rows = [msgspec.to_builtins(t) for t in found]
    if session.out.format == "table":
        rows = [{**r, "start": moment(r["start_ns"] or 0), "models": ", ".join(r["models"])} for r in rows]
    columns = ["trace_id", "start", "spans", "failed", "latency_ms", "tokens_in", "tokens_out", "cost_usd", "models"]
    session.out.rows(rows, columns, empty="no traces match")


@app.command()
def show(
    trace_id: Annotated[str, typer.Argument(metavar="ID", help="A trace id, or a beginning of it that is unique.")],
    tree: Annotated[bool, typer.Option("--tree", help="Draw parents and children.")] = False,
    store: StoreOption = "",
) -> None:
    """Show the spans of one trace, in the order they started.

    Example:
      mist trace show 4bf92f35 --tree
    """
    from mist.cli.render import escape
    from mist.tools.tokentrace.queries import trace
    from mist.tools.tokentrace.tree import tree as draw

    session = current()
    out = session.out
    with _store(session, store) as opened:
        spans = trace(opened, trace_id)
    if tree and out.format == "table":
        out.text(f"trace {escape(spans[0].trace_id)}\n")
        for branch, span in draw(spans):
            out.text(f"{branch}{escape(_line(span))}\n")
    elif out.format == "json":
        out.item({"trace_id": spans[0].trace_id, "spans": [_span(s) for s in spans]})
    else:
        out.rows([_span(s) for s in spans], _COLUMNS)


_COLUMNS = [
    "span_id", "parent_id", "start", "operation", "model", "status", "latency_ms", "tokens_in", "tokens_out", "cost_usd",
]  # fmt: skip


def _span(span: StoredSpan) -> dict[str, Any]:
    import msgspec

    from mist.cli.render import moment

    row: dict[str, Any] = {name: getattr(span, name) for name in span.__struct_fields__}
    row["attrs"] = msgspec.json.decode(span.attrs)
    if current().out.format == "table":
        row["start"] = moment(span.start_ns or 0)
    return row


def _line(span: StoredSpan | SpanRow) -> str:
    parts = [span.operation or "span", span.model or "", span.status]
    if span.latency_ms is not None:
        parts.append(f"{span.latency_ms:,.0f} ms")
    if span.tokens_in is not None or span.tokens_out is not None:
        known = [("?" if t is None else f"{t:,}") for t in (span.tokens_in, span.tokens_out)]
        parts.append(f"{known[0]} → {known[1]} tokens")
    if span.cost_usd is not None:
        parts.append(f"${span.cost_usd:.6f}")
    return "  ".join(p for p in parts if p)


@app.command()
async def tail(
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Wait for more.")] = False,
    n: LimitOption = 10,
    model: ModelOption = "",
    stream: StreamOption = "trace",
) -> None:
    """Show the last spans of the stream, or follow it. Needs no store.

    Example:
      mist trace tail -f --model gpt-4
    """
    from mist.tools.tokentrace.spans import BadSpan, row_of

    session = current()
    out = session.out
    opened = await session.stream(stream)
    info = await opened.info()
    after = max(info.first - 1, info.last - n, 0)
    with out.lines() as lines:
        while True:
            page = await opened.read(after=after, wait_s=1.0 if follow else 0.0)
            for record in page.records:
                try:
                    row = row_of(record)
                except BadSpan as exc:
                    out.warn(f"sequence {record.sequence}: {exc}")
                    continue
                if row is None or (model and row.model != model):
                    continue
                if out.format == "table":
                    from mist.cli.render import escape, moment

                    lines.line(f"{row.sequence:>8}  {moment(row.start_ns or 0)}  {escape(_line(row))}")
                else:
                    lines.row(_tail_row(row))
            after = page.scanned
            if after >= page.last:
                if not follow:
                    return
                out.flush()
            session.resume = f"go on with: mist trace tail -f (stopped after sequence {after})"


def _tail_row(row: SpanRow) -> dict[str, Any]:
    import msgspec

    fields = row._asdict()
    fields["attrs"] = msgspec.json.decode(fields["attrs"])
    return fields


@app.command()
def stats(which: SpanOptions, store: StoreOption = "") -> None:
    """Latency, tokens and cost by model: percentiles within 0.8 % of the exact ones (nearest rank).

    JSON: {"total", "spans": [{"model", "count", "errors", "latency_ms": {"p50", "p90", "p95", "p99"}, "tokens_in": {…},
    "tokens_out": {…}, "cost_usd", "cost_known"}]}. What is unknown is null, never zero.

    Example:
      mist trace stats --since 1h --format json
    """
    import msgspec

    from mist.tools.tokentrace.stats import stats as compute

    session = current()
    out = session.out
    with _store(session, store) as opened:
        found = compute(opened, which.where())
    if out.json:
        out.item(msgspec.to_builtins(found))
        return
    out.rows(stats_rows(msgspec.to_builtins(found)["spans"]), STATS_COLUMNS, empty="no spans match")


STATS_COLUMNS = [
    "model", "count", "latency_p50_ms", "latency_p90_ms", "latency_p99_ms", "tokens_in_p50", "tokens_in_p99",
    "tokens_out_p50", "tokens_out_p99", "cost_usd",
]  # fmt: skip


def stats_rows(spans: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of `trace stats` without nesting, for tables and CSV."""
    rows = []
    for s in spans:
        row: dict[str, Any] = {"model": s["model"], "count": s["count"]}
        for p in ("p50", "p90", "p99"):
            row[f"latency_{p}_ms"] = s["latency_ms"][p]
        for name in ("tokens_in", "tokens_out"):
            for p in ("p50", "p90", "p99"):
                row[f"{name}_{p}"] = s[name][p]
        row["cost_usd"] = s["cost_usd"]
        rows.append(row)
    return rows


@app.command()
def errors(
    which: SpanOptions,
    n: LimitOption = 20,
    quarantined: Annotated[bool, typer.Option("--quarantined", help="Records that are no spans, and why.")] = False,
    store: StoreOption = "",
) -> None:
    """List failed spans (a status other than ok), or the records that were refused; newest first.

    Example:
      mist trace errors --quarantined
    """
    import msgspec

    from mist.tools.tokentrace.queries import quarantined as refused
    from mist.tools.tokentrace.queries import spans

    session = current()
    out = session.out
    with _store(session, store) as opened:
        if quarantined:
            rows = [msgspec.to_builtins(r) for r in refused(opened, limit=n)]
            out.rows(rows, ["stream", "sequence", "subject", "reason"], empty="nothing was refused")
            return
        failed = spans(opened, which.where(failed=True), limit=n).spans
    rows = [_span(s) for s in failed]
    for row in rows:
        row["error"] = row["attrs"].get("error") if isinstance(row["attrs"], dict) else None
    out.rows(rows, ["trace_id", "span_id", "start", "operation", "model", "status", "error"], empty="no failed spans")


class ExportForm(StrEnum):
    jsonl = "jsonl"
    otlp = "otlp"
    parquet = "parquet"


@app.command()
async def export(
    which: SpanOptions,
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="Where to; - is standard output; otlp+http://HOST is an endpoint.")
    ] = "-",
    form: Annotated[
        ExportForm | None,
        typer.Option("--as", help="jsonl (wire shape), otlp (OTLP JSON, a request a line), parquet. Default: by name."),
    ] = None,
    store: StoreOption = "",
) -> None:
    """Write spans of the store to a file, or send them to an OpenTelemetry endpoint.

    JSON lines are the wire shape, which `mist trace ingest` reads; Parquet has the columns of the store. A file is never
    written over.

    Examples:
      mist trace export spans.jsonl --since 1d
      mist trace export calls.parquet --model gpt-4o
      mist trace export otlp+http://localhost:4318 --since 1h
    """
    from mist.tools.tokentrace import export as out
    from mist.tools.tokentrace.queries import every_span

    session = current()
    with contextlib.ExitStack() as stack:
        found = every_span(stack.enter_context(_store(session, store)), which.where())
        spans = stack.enter_context(contextlib.closing(found))  # type: ignore[type-var]
        if file.startswith(("otlp+http://", "otlp+https://")):
            from mist.tools.tokentrace.otlp.send import export as send

            sent = await send(out.envelopes(spans), file)
            for reason in sent.reasons[:SHOWN_REFUSED]:
                session.out.warn(reason)
            if sent.rejected or sent.refused:
                session.fail_with(9)
            session.out.note(f"{sent.spans} spans sent, {sent.rejected} rejected, {sent.refused} not sendable")
            return
        if form is None:
            if Path(file).suffix in (".csv", ".tsv", ".xlsx"):
                raise InvalidArgument(
                    f"{file}: there is no such form of spans", hint="name it .jsonl or .parquet, or say --as jsonl"
                )
            kind = ".parquet" if file.endswith(".parquet") else ".otlp" if ".otlp" in Path(file).suffixes else ""
            form = {".parquet": ExportForm.parquet, ".otlp": ExportForm.otlp}.get(kind, ExportForm.jsonl)
        if form is ExportForm.parquet:
            if file == "-":
                raise InvalidArgument("Parquet is no text for standard output", hint="name a file")
            count = out.parquet(spans, stack.enter_context(_create(Path(file))))
        else:
            write = session.out.write if file == "-" else stack.enter_context(_create(Path(file))).write
            lines = out.otlp_lines(spans) if form is ExportForm.otlp else out.json_lines(spans)
            count = 0
            for line, many in lines:
                write(line)
                count += many
    session.out.note(f"{count} spans written")


@contextlib.contextmanager
def _create(path: Path) -> Iterator[BinaryIO]:
    """A file that was not there; what cannot be written to its end is not left behind."""
    from mist.errors import AlreadyExists, Refused, StorageFull

    made = False
    try:
        with path.open("xb") as file:
            made = True
            yield file
    except BaseException as exc:
        if made:
            path.unlink(missing_ok=True)
        if isinstance(exc, FileExistsError):
            raise AlreadyExists(f"{path} exists", hint="name another file") from exc
        if isinstance(exc, OSError):
            full = exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            raise (StorageFull if full else Refused)(f"{path}: {exc.strerror or exc}") from exc
        raise


import mist.cli._trace_keeping  # noqa: E402, F401  # registers the verbs that change a store or its alerts
