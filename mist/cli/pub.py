"""`mist pub`: one message, or many envelopes from standard input or a file."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Annotated, BinaryIO

import msgspec
import typer
from msgspec import Raw

from mist.broker.base import Message, Stream
from mist.cli.options import OptionGroup, Rate, StreamArg
from mist.cli.render import seq
from mist.cli.session import Session, current
from mist.errors import InvalidArgument, Malformed, MistError, TooLarge
from mist.kit.parallel import RateLimiter
from mist.protocol import codec
from mist.protocol.envelope import SIZE_BYTES_MAX, Envelope
from mist.protocol.screen import screen
from mist.protocol.subject import check_subject, subject_for

BATCH = 1000
BATCH_BYTES = 4 * 1024 * 1024
PARTIAL = 9
INVALID = 10


class Fields(OptionGroup, frozen=True, kw_only=True):
    """What the envelope of one message says."""

    type: Annotated[str, typer.Option("--type", metavar="TYPE", help="The envelope's type.")] = "message"
    source: Annotated[str, typer.Option("--source", metavar="NAME", help="The envelope's source.")] = "mist-cli"
    id: Annotated[str, typer.Option("--id", metavar="ID", help="The envelope's id; the same id is stored once.")] = ""
    subject: Annotated[str, typer.Option("--subject", metavar="SUBJECT", help="The subject; the type if absent.")] = ""
    correlation_id: Annotated[str, typer.Option("--correlation-id", metavar="ID", help="What it answers.")] = ""
    traceparent: Annotated[str, typer.Option("--traceparent", metavar="TEXT", help="W3C trace context.")] = ""
    tenant: Annotated[str, typer.Option("--tenant", metavar="NAME", help="The envelope's tenant.")] = ""
    checksum: Annotated[bool, typer.Option("--checksum", help="Add the payload's checksum.")] = False


async def command(
    stream: StreamArg,
    fields: Fields,
    body: Annotated[str, typer.Argument(metavar="BODY|-", help="JSON, or plain text; - reads standard input.")] = "-",
    jsonl: Annotated[
        bool, typer.Option("--jsonl", help="Standard input holds whole envelopes, one per line; ids are kept.")
    ] = False,
    rate: Rate = None,
    repeat: Annotated[int, typer.Option("--repeat", min=1, metavar="N", help="Publish it N times, with new ids.")] = 1,
) -> None:
    """Publish to a stream, which is made if it is not there.

    BODY is the payload: JSON where it is JSON, else text; what begins with { or [ has to be JSON. With --jsonl whole envelopes are read; publishing one
    again is not an error, it is counted as repeated. The command ends when everything is stored as durably as the
    stream promises.

    Examples:
      mist pub notes 'hello'
      mist pub infer '{"model":"m1","messages":[]}' --type infer.request --source api
      cat payload.json | mist pub notes -
      mist pub trace --jsonl < spans.jsonl
      mist pub load '{"n":1}' --repeat 1000 --rate 100
    """
    session = current()
    if jsonl:
        if body != "-":
            raise InvalidArgument("--jsonl reads standard input", hint=f"mist pub {stream} --jsonl < {body}")
        if repeat > 1:
            raise InvalidArgument("--jsonl and --repeat exclude each other", hint="the ids would be the same")
        await _publish_lines(session, await session.stream(stream, create=True), rate)
        return
    if repeat > 1 and fields.id:
        raise InvalidArgument("--id and --repeat exclude each other", hint="the same id is stored once")
    if body == "-":
        data = _stdin(session).read(SIZE_BYTES_MAX + 1)
        if not data:
            raise InvalidArgument(
                "nothing to publish: standard input is empty", hint="give a BODY; '\"\"' is an empty one"
            )
    else:
        data = body.encode("utf-8", "surrogateescape")
    payload = _payload(data)
    subject = check_subject(fields.subject or subject_for(fields.type))
    first = _message(fields, payload, subject)
    target = await session.stream(stream, create=True)
    pace = RateLimiter(rate or math.inf, burst=1)
    sequences: list[int] = []
    step = BATCH if rate is None else max(1, min(BATCH, int(rate // 10)))
    with session.out.progress("publishing", repeat) as progress:
        while len(sequences) < repeat:
            part = min(step, repeat - len(sequences))
            messages = [first if repeat == 1 else _message(fields, payload, subject) for _ in range(part)]
            await pace.take(part)
            try:
                sequences.extend(await target.append(messages))
            except BaseException:
                if sequences:
                    session.out.note(f"{len(sequences):,} of {repeat:,} were stored in {target.name} before that")
                raise
            progress.at(len(sequences))
    if repeat == 1:
        row = {"stream": target.name, "sequence": seq(sequences[0]), "id": first.id, "subject": first.subject}
        if session.out.format == "table":
            session.out.note(f"stored as {target.name} {sequences[0]}")
        else:
            session.out.item(row)
        return
    _summary(session, target, published=len(sequences), repeated=0, invalid=0, first=sequences[0], last=sequences[-1])


def _stdin(session: Session) -> BinaryIO:
    if sys.stdin.isatty():
        if session.no_input:
            raise InvalidArgument("nothing to publish", hint="give a BODY, or pipe it in")
        session.out.note("reading from the terminal; end with Ctrl-D")
    return sys.stdin.buffer


def _payload(data: bytes) -> Raw:
    """The body as JSON: as it is where it is JSON, else as a string. What begins like an object or array must be one."""
    if len(data) > SIZE_BYTES_MAX:
        raise TooLarge("payload", size_bytes=len(data), size_bytes_max=SIZE_BYTES_MAX)
    body = data.strip()
    try:
        text = data.decode()
    except UnicodeDecodeError as exc:
        raise InvalidArgument(
            "the body is neither JSON nor UTF-8 text", hint="encode it, for example with base64"
        ) from exc
    structured = body[:1] in (b"{", b"[")
    if structured:
        screen(body)
    try:
        msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError) as exc:
        if structured:
            raise Malformed(
                f"the body is no JSON: {exc}", hint="to publish it as text, quote it as a JSON string"
            ) from exc
        return Raw(msgspec.json.encode(text.removesuffix("\n")))
    return Raw(body)


def _message(fields: Fields, payload: Raw, subject: str) -> Message:
    env = Envelope.new(
        fields.type, payload, source=fields.source, id=fields.id, checksum=fields.checksum,
        correlation_id=fields.correlation_id, traceparent=fields.traceparent, tenant=fields.tenant,
    )  # fmt: skip
    data = codec.encode(env)
    if len(data) > SIZE_BYTES_MAX:
        raise TooLarge("envelope", size_bytes=len(data), size_bytes_max=SIZE_BYTES_MAX)
    return Message(subject, data, env.id)


async def _publish_lines(session: Session, target: Stream, rate: float | None) -> None:
    known = (await target.info()).last
    published = repeated = invalid = first = 0
    pace = RateLimiter(rate or math.inf, burst=1)
    step = BATCH if rate is None else max(1, min(BATCH, int(rate // 10)))
    with session.out.progress("publishing") as progress:
        for batch, bad in _batches(session, _stdin(session), step):
            invalid += bad
            if not batch:
                continue
            await pace.take(len(batch))
            for sequence in await target.append(batch):
                if sequence > known:
                    known = sequence
                    first = first or sequence
                    published += 1
                else:
                    repeated += 1
            progress.at(published + repeated)
    if invalid:
        session.fail_with(PARTIAL if published + repeated else INVALID)
    _summary(session, target, published=published, repeated=repeated, invalid=invalid, first=first, last=known)


def _batches(session: Session, source: BinaryIO, step: int) -> Iterator[tuple[list[Message], int]]:
    """Messages of whole lines; a bad line is told on stderr and counted, the others go on."""
    batch: list[Message] = []
    size = bad = number = 0
    while line := source.readline(SIZE_BYTES_MAX + 2):
        number += 1
        if not line.strip():
            continue
        try:
            env = codec.decode_foreign(line.strip())
            data = codec.encode(env)
            batch.append(Message(subject_for(env.type), data, env.id))
            size += len(data)
        except MistError as exc:
            session.out.warn(f"line {number}: {exc.message}")
            bad += 1
            while line and not line.endswith(b"\n"):
                line = source.readline(SIZE_BYTES_MAX)
        if len(batch) >= step or size >= BATCH_BYTES:
            yield batch, bad
            batch, size, bad = [], 0, 0
    yield batch, bad


def _summary(
    session: Session, stream: Stream, *, published: int, repeated: int, invalid: int, first: int, last: int
) -> None:
    if session.out.format == "table":
        more = f", {repeated:,} repeated" if repeated else ""
        more += f", {invalid:,} line{'s' * (invalid != 1)} refused" if invalid else ""
        session.out.note(f"{published:,} stored in {stream.name}{more}")
        return
    session.out.item(
        {
            "stream": stream.name, "published": published, "repeated": repeated, "invalid": invalid,
            "first": seq(first), "last": seq(last),
        }
    )  # fmt: skip
