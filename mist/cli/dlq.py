"""`mist dlq`: dead letters of a stream: look, send them again, drop them.

The stream argument is the original stream; its letters lie in `STREAM--dead`. `retry` and `drop` work from the oldest
letter on, because the store can only remove from its beginning.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mist.broker.base import Broker, Message, Record, Stream, header
from mist.broker.deadletter import ATTEMPTS, CONSUMER, REASON, SEQUENCE, original
from mist.cli.emit import Emitter
from mist.cli.export import command as export_stream
from mist.cli.options import DryRun, FilterOptions, Limit, RangeOptions, Select
from mist.cli.records import summary
from mist.cli.render import escape, moment, seq
from mist.cli.scan import Scan, filter_of, last_matching
from mist.cli.session import Session, current
from mist.cli.wrap import noun
from mist.errors import InvalidArgument, NotFound
from mist.protocol.subject import dead_stream
from mist.protocol.url import Url

app = noun("Dead letters.")
DIFFERENT = 10
SUFFIX = "--dead"
BATCH = 500

StreamArg = Annotated[str, typer.Argument(metavar="STREAM", help="The stream whose dead letters are meant.")]


async def _letters(session: Session, text: str) -> tuple[Broker, Stream, str]:
    """The broker, the stream of dead letters and the original's name. Raises NotFound when there are none."""
    url, name = session.target(text)
    broker = await session.connect(url)
    name = name.removesuffix(SUFFIX)
    try:
        return broker, await broker.open(dead_stream(name), create=False), name
    except NotFound as exc:
        if name in await broker.streams():
            raise NotFound(f"stream {name} has no dead letters") from exc
        raise await session.no_stream(broker, name) from exc


def row(record: Record) -> dict[str, Any]:
    """What a dead letter says of itself."""
    return {
        "letter": seq(record.sequence),
        "sequence": header(record.headers, SEQUENCE),
        "consumer": header(record.headers, CONSUMER),
        "attempts": header(record.headers, ATTEMPTS),
        "died": moment(record.timestamp_ns),
        "reason": header(record.headers, REASON),
        "subject": record.subject,
    }


@app.command("ls")
async def ls() -> None:
    """List the streams that have dead letters.

    Examples:
      mist dlq ls
      mist dlq ls --format json
    """
    session = current()
    broker = await session.connect()
    rows = []
    for name in await broker.streams():
        if name.endswith(SUFFIX):
            info = await (await broker.open(name, create=False)).info()
            rows.append(
                {
                    "stream": name.removesuffix(SUFFIX),
                    "letters": info.records,
                    "first": seq(info.first),
                    "last": seq(info.last),
                }
            )
    session.out.rows(rows, ["stream", "letters", "first", "last"], empty=f"no dead letters in {broker.url}")


@app.command("show")
async def show(
    stream: StreamArg,
    wanted: FilterOptions,
    count: Annotated[int, typer.Option("-n", "--count", min=1, metavar="N", help="The last N letters.")] = 20,
    full: Annotated[bool, typer.Option("--full", help="The records themselves, as `mist tail` shows them.")] = False,
    select: Select = None,
) -> None:
    """Show dead letters with their reasons.

    Examples:
      mist dlq show trace
      mist dlq show trace --full --format jsonl
      mist dlq show eval --where 'headers.Mist-Consumer=report'
    """
    session = current()
    _, dead, name = await _letters(session, stream)
    info = await dead.info()
    views = await last_matching(session, dead, filter_of(wanted), count, to=info.last)
    if full or select is not None:
        with Emitter(session.out, select) as emitter:
            emitter.views(views)
        return
    rows = [{**row(v.record), "summary": summary(v)} for v in views]
    columns = ["letter", "sequence", "consumer", "attempts", "died", "reason", "summary"]
    session.out.rows(rows, columns, empty=f"stream {name} has no dead letters that match")


@app.command("retry")
async def retry(
    stream: StreamArg,
    to: Annotated[
        str | None, typer.Option("--to", metavar="STREAM", help="Another stream than the original one.")
    ] = None,
    limit: Limit = None,
    dry_run: DryRun = False,
) -> None:
    """Publish dead letters again, oldest first, and remove them from the dead letters.

    They become new records at the end of the stream, with the same data, subject and headers; every consumer gets them.
    Their record id is a new one (`retry:…`), because the stream may still know the old one as a duplicate; the envelope's
    own id stays.

    Examples:
      mist dlq retry trace --limit 1
      mist dlq retry trace -y
      mist dlq retry trace --to trace-repaired --dry-run
    """
    session = current()
    broker, dead, name = await _letters(session, stream)
    info = await dead.info()
    count = info.records if limit is None else min(limit, info.records)
    if not count:
        _told(session, name, 0, "published")
        return
    what = f"publish {count:,} dead letters of stream {name} to {to or name} and remove them here"
    if dry_run:
        session.out.outcome(what, dry_run=True)
        session.fail_with(DIFFERENT)
        return
    if limit is None:
        session.confirm(what)
    target = await session.stream(to, create=True) if to else await broker.open(name, create=False)
    scan = Scan(
        session, dead, filter_of(FilterOptions()), after=info.first - 1, to=info.last, limit=count, from_start=True
    )
    done = 0
    with session.out.progress("retrying", count) as progress:
        async for views in scan.pages():
            for at in range(0, len(views), BATCH):
                part = [v.record for v in views[at : at + BATCH]]
                await target.append([_again(dead, r) for r in part])
                await dead.trim(before=part[-1].sequence + 1)
                done += len(part)
                progress.at(done)
    _told(session, name, done, f"published again to {to or name}")


def _again(dead: Stream, letter: Record) -> Message:
    """The original message under an id of its own: doing it twice after a crash stores it once."""
    message = original(letter)
    return Message(message.subject, message.data, f"retry:{dead.incarnation}:{letter.sequence}", message.headers)


@app.command("drop")
async def drop(
    stream: StreamArg,
    limit: Limit = None,
    all_: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Remove dead letters for good, oldest first.

    Examples:
      mist dlq drop trace --limit 1 -y
      mist dlq drop trace --all --dry-run
    """
    session = current()
    if (limit is None) == (not all_):
        raise InvalidArgument("say how many: --limit N, or --all")
    _, dead, name = await _letters(session, stream)
    info = await dead.info()
    count = info.records if limit is None else min(limit, info.records)
    if not count:
        _told(session, name, 0, "dropped")
        return
    what = f"drop {count:,} dead letters of stream {name} for good"
    if dry_run:
        session.out.outcome(what, dry_run=True)
        session.fail_with(DIFFERENT)
        return
    session.confirm(what)
    before = info.last + 1
    if count < info.records:
        after, seen = info.first - 1, 0
        while seen < count:
            page = await dead.read(after=after, limit=min(count - seen, 1000))
            seen += len(page.records)
            after = page.scanned
        before = after + 1
    await dead.trim(before=before)
    _told(session, name, count, "dropped")


def _told(session: Session, name: str, count: int, what: str) -> None:
    if session.out.format == "table":
        session.out.note(
            f"{count:,} dead letters of stream {escape(name)} {what}" if count else f"stream {name} has no dead letters"
        )
    else:
        session.out.item({"stream": name, "letters": count, "done": what.partition(" ")[0]})


@app.command("export")
async def export(
    stream: StreamArg,
    file: Annotated[
        str, typer.Argument(metavar="FILE|-", help="FILE.jsonl, .jsonl.gz or .jsonl.zst; - = stdout.")
    ] = "-",
    force: Annotated[bool, typer.Option("--force", help="Write over FILE.")] = False,
) -> None:
    """Write the dead letters to a file, with their reasons as headers; see `mist export`.

    Examples:
      mist dlq export trace dead.jsonl.gz
    """
    session = current()
    url, _ = session.target(stream)
    _, dead, _ = await _letters(session, stream)
    where = str(Url(url.scheme, url.target, (("stream", dead.name),)))
    await export_stream(where, file, RangeOptions(), FilterOptions(), force=force)
