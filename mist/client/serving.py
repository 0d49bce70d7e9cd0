"""`serve(handler, url, out=…)`: the same handler over every URL, until `stop`, or until the input ends.

    log:DIR?stream=A&consumer=NAME      out="B", or another broker's URL?stream=B: outputs are stored, then the request is
    (nats:, redis:, memory: alike)      acknowledged. A crash between the two repeats the request and stores nothing twice.
    stdio:                              lines in, lines out, in order; the end of the input is the end of the run
    file:IN.jsonl                       out="file:OUT.jsonl": a run that was cut off goes on where its outputs end
    http://HOST:PORT[/path]             POST /mist: 200 with the reply (several: a line each); 202 where there is none,
                                        or where `out` says where outputs go

An error of a request is: over a broker a dead letter with the reason (at once where trying again cannot help, else after the
consumer's `attempts_max`; a handler's `last_word` is stored first, see `_deliveries`); over http the documented status and error JSON; over stdio and file one line of error JSON on
stderr, the next request, and in the end the exit code of the first error. An error of the way itself (broker gone, disk
full) ends `serve`.

Does not: supervise. `run` is `serve` for a program's main: signals, exit code.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Coroutine, Iterable, Sequence
from contextlib import AsyncExitStack, closing
from hashlib import blake2b
from typing import Any, Protocol
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from mist.broker.base import ALL, Broker, ConsumerConfig, Stream
from mist.broker.deadletter import EXHAUSTED
from mist.client._position import PositionFile
from mist.client.client import Client, EnvelopePublisher
from mist.client.handler import Handler, output_id
from mist.client.worker import Delivered, Worker
from mist.errors import (
    Conflict,
    EndOfStream,
    Internal,
    InvalidArgument,
    MistError,
    ProtocolError,
    TooLarge,
    Unavailable,
)
from mist.kit.server import parse_address
from mist.kit.signals import fast_loop
from mist.protocol.envelope import Envelope
from mist.protocol.payloads import HEALTH_PING
from mist.protocol.url import Url, has_scheme, parse_url
from mist.transport import dial
from mist.transport._calls import Replies
from mist.transport._lines import Position
from mist.transport.base import Transport
from mist.transport.file import FileTransport
from mist.transport.server import HttpServer, Limits
from mist.transport.stream import open_place

BATCH_MAX = 500
LINES_MAX = 256
FLUSH_S = 0.2
"""How long finished outputs of a file or a pipe may wait for those of the next requests."""
DRAIN_S = 30.0
_TRANSPORTS = frozenset({"stdio", "file", "chan", "http", "https"})
Report = Callable[[MistError, str], None]


class Served(Struct):
    """`failed` counts requests that ended in an error, bad lines among them; `error` is the first of these."""

    requests: int = 0
    outputs: int = 0
    failed: int = 0
    error: MistError | None = None

    @property
    def exit_code(self) -> int:
        return self.error.exit_code if self.error is not None else 0


def to_stderr(error: MistError, id: str) -> None:
    """The error JSON as one line, with the id of the request where there is one."""
    wire = error.to_wire()
    if id:
        wire["meta"] = {**wire.get("meta", {}), "id": id}
    sys.stderr.write(msgspec.json.encode(wire).decode() + "\n")


async def serve(
    handler: Handler,
    url: str | Url,
    *,
    out: str = "",
    stop: asyncio.Event | None = None,
    concurrency: int = 1,
    batch_max: int = 0,
    config: ConsumerConfig | None = None,
    limits: Limits | None = None,
    drain_s: float = DRAIN_S,
    report: Report = to_stderr,
    on_ready: Callable[[str], None] | None = None,
) -> Served:
    """Run it. `concurrency` calls of the handler at a time, each with up to `batch_max` requests (0 = 1 for `one`,
    500 for `many`). With concurrency 1 requests are handled in order.

    `config` is what a new consumer gets; `report` is told of each request that failed (stdio, file, broker); `on_ready` gets
    the address once requests are taken. Raises InvalidArgument for URLs that cannot be served, and errors of the way.
    """
    url = parse_url(url) if isinstance(url, str) else url
    if concurrency < 1 or batch_max < 0:
        raise InvalidArgument(f"serve: concurrency={concurrency}, batch_max={batch_max} cannot be right")
    each = batch_max or (BATCH_MAX if handler.batched else 1)
    run = _Run(handler, concurrency, each, stop or asyncio.Event(), report, on_ready or (lambda _url: None))
    if url.scheme in ("http", "https"):
        await run.over_http(url, out, limits)
    elif url.scheme == "file":
        await run.over_file(url, out)
    elif url.scheme in _TRANSPORTS:
        async with AsyncExitStack() as stack:
            source = await stack.enter_async_context(dial(url))
            await run.over_lines(source, await _open_out(stack, out, None) if out else source)
    else:
        await run.over_broker(url, out, config, drain_s)
    return run.served


def run(handler: Handler, url: str, *, out: str = "", concurrency: int = 1, batch_max: int = 0) -> int:
    """`serve` for a program's main: SIGINT and SIGTERM stop it in order. Returns the exit code; what ends the run by an
    error is told on stderr like the others."""

    async def main() -> int:
        stop = asyncio.Event()
        caught: list[int] = []

        def signalled(number: int) -> None:
            caught.append(number)
            stop.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, signalled, number)
        try:
            served = await serve(handler, url, out=out, stop=stop, concurrency=concurrency, batch_max=batch_max)
        except MistError as exc:
            to_stderr(exc, "")
            return exc.exit_code
        return 128 + caught[0] if caught else served.exit_code

    # not for pipes: uvloop does not wait for every kind of file that may be standard input
    with asyncio.Runner(loop_factory=fast_loop() if url.startswith("http:") else None) as runner:
        return runner.run(main())


class _Out(Protocol):
    async def send_many(self, envelopes: Sequence[Envelope]) -> object: ...


class _ToStream:
    """Outputs to a stream, those of several calls in one append."""

    def __init__(self, publisher: EnvelopePublisher, stream: Stream) -> None:
        self._publisher = publisher
        self._stream = stream

    def check(self, envelopes: Iterable[Envelope]) -> None:
        """Raises TooLarge and InvalidArgument for what the stream would refuse, so that one request pays for it."""
        for envelope in envelopes:
            self._publisher.message(envelope)

    async def send_many(self, envelopes: Sequence[Envelope]) -> None:
        await self._publisher.publish_many(envelopes)

    async def stored(self, ids: set[str], since_ns: int) -> set[str]:
        """Those of the ids that are in the stream, as far as it reaches back to `since_ns`: the ids of a redelivered request
        may have left the de-duplication window long ago, or been pushed out of it."""
        found: set[str] = set()
        after = await self._stream.locate(since_ns) - 1
        while ids - found:
            page = await self._stream.read(after=after, limit=1000)
            found.update(ids.intersection([r.id for r in page.records]))
            after = page.scanned
            if after >= page.last:
                break
        return found


class _FilePosition(Struct, frozen=True):
    """`run` is a digest of who reads what; the input was read up to `line` and `offset` when `out` was `out_bytes` long."""

    run: str
    line: int = 0
    offset: int = 0
    out_bytes: int = 0


class _Run:
    def __init__(
        self,
        handler: Handler,
        concurrency: int,
        each: int,
        stop: asyncio.Event,
        report: Report,
        on_ready: Callable[[str], None],
    ) -> None:
        self.served = Served()
        self._handler = handler
        self._concurrency = concurrency
        self._each = each
        self._stop = stop
        self._report = report
        self._on_ready = on_ready

    def _failed(self, error: MistError, id: str) -> None:
        self.served.failed += 1
        self.served.error = self.served.error or error
        self._report(error, id)

    async def _handle(self, requests: Sequence[Envelope]) -> list[list[Envelope] | MistError]:
        """Some requests of one input, `concurrency` calls at a time; the next ones begin when those are through."""
        if self._handler.batched:
            chunks = [requests[at : at + self._each] for at in range(0, len(requests), self._each)]
            outcomes: list[list[Envelope] | MistError] = []
            for at in range(0, len(chunks), self._concurrency):
                got = await asyncio.gather(*[self._handler.handle(c) for c in chunks[at : at + self._concurrency]])
                outcomes += [outcome for part in got for outcome in part]
            return outcomes
        width = self._each * self._concurrency
        out: list[list[Envelope] | MistError] = []
        for at in range(0, len(requests), width):
            out += await self._handler.handle(requests[at : at + width])
        return out

    # stdio and file

    async def over_lines(
        self, source: Transport, out: _Out, stored: Callable[[], None] | None = None, known: Collection[str] = ()
    ) -> None:
        """Until the input ends or `stop`. Outputs whose ids are `known` are not written again. `stored` is called when
        everything received so far is handled and its outputs are written."""
        width = self._each * self._concurrency
        outputs: list[Envelope] = []
        waiting = 0  # requests, and bad lines, since the last write
        since_s = 0.0

        async def write() -> None:
            nonlocal waiting
            ready, waiting = [e for e in outputs if e.id not in known], 0
            outputs.clear()
            if ready:
                await out.send_many(ready)
                self.served.outputs += len(ready)
            if stored is not None:
                await asyncio.to_thread(stored)

        self._on_ready(source.url)
        try:
            while not self._stop.is_set():
                try:
                    requests = await self._unless_stopped(source.receive_many(width, 0.0 if waiting else None))
                except EndOfStream:
                    break
                except (ProtocolError, TooLarge) as exc:
                    self.served.requests += 1
                    self._failed(exc, "")
                    waiting += 1
                    continue
                if requests:
                    since_s = since_s if waiting else time.monotonic()
                    waiting += len(requests)
                    outputs += await self._handled(requests)
                if waiting and (not requests or waiting >= LINES_MAX or time.monotonic() - since_s >= FLUSH_S):
                    await write()
            if waiting:
                await write()
        except EndOfStream:
            return  # whoever read our outputs has enough

    async def _handled(self, requests: Sequence[Envelope]) -> list[Envelope]:
        outputs: list[Envelope] = []
        for request, outcome in zip(requests, await self._handle(requests), strict=True):
            if isinstance(outcome, MistError):
                self._failed(outcome, request.id)
            else:
                outputs += outcome
        self.served.requests += len(requests)
        return outputs

    async def _unless_stopped(self, receiving: Coroutine[Any, Any, list[Envelope]]) -> list[Envelope]:
        """What is received; nothing when we are to stop (a receive that is cancelled has lost nothing)."""
        task = asyncio.ensure_future(receiving)
        stopping = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
        return [] if task.cancelled() else task.result()

    async def over_file(self, url: Url, out: str) -> None:
        target = parse_url(out) if has_scheme(out) else None
        if target is None or target.scheme != "file":
            raise InvalidArgument(f"serve {url.redacted()}: out={out!r} is no file", hint='out="file:OUT.jsonl"')
        sink = await dial(target)
        source = await dial(url)
        assert isinstance(sink, FileTransport)  # noqa: S101 - what `file:` dials
        assert isinstance(source, FileTransport)  # noqa: S101
        async with source, sink:
            if source.path == sink.path:
                raise InvalidArgument(f"serve {url.redacted()}: the outputs would be its own input")
            with closing(PositionFile(sink.path + ".position", _FilePosition)) as saved:
                await self._between_files(source, sink, saved)

    async def _between_files(
        self, source: FileTransport, sink: FileTransport, saved: PositionFile[_FilePosition]
    ) -> None:
        run = blake2b(f"{self._handler.name}\0{source.path}".encode(), digest_size=8).hexdigest()
        size = _size(sink.path)
        at = saved.value or _FilePosition(run)
        if size == 0:
            at = _FilePosition(run)  # whoever removes the outputs wants them anew
        if at.run != run:
            raise Conflict(
                f"{sink.path} holds the outputs of another handler or input",
                hint=f"name another file, or remove it and {saved.path}",
            )
        if size < at.out_bytes:
            raise Conflict(
                f"{sink.path} was cut to {size} bytes after {at.out_bytes} were written",
                hint="remove it to begin anew",
            )
        known = await _ids(sink.path, at.out_bytes)
        if at.offset:
            source = FileTransport(
                source.path,
                start=Position(at.line, at.offset),
                follow=source.follow,
                size_bytes_max=source.size_bytes_max,
            )

        def stored() -> None:
            position = source.position
            if position is not None:
                saved.save(_FilePosition(run, position.line, position.offset, _size(sink.path)))

        async with source:
            await self.over_lines(source, sink, stored, known)

    # http

    async def over_http(self, url: Url, out: str, limits: Limits | None) -> None:
        host, port, path = _address(url)
        async with AsyncExitStack() as stack:
            sink = await _open_out(stack, out, None) if out else None

            async def answer(requests: list[Envelope]) -> Replies:
                outputs: list[Envelope] = []
                for number, (request, outcome) in enumerate(
                    zip(requests, await self._handle(requests), strict=True), 1
                ):
                    self.served.requests += 1
                    if isinstance(outcome, MistError):
                        self.served.failed += 1
                        if len(requests) > 1:
                            outcome.meta.update(item=str(number), id=request.id)
                        raise outcome
                    outputs += outcome
                self.served.outputs += len(outputs)
                if sink is None:
                    return Replies(outputs)
                if outputs:
                    await sink.send_many(outputs)
                return Replies([])

            server = await stack.enter_async_context(HttpServer(answer, host=host, port=port, path=path, limits=limits))
            self._on_ready(server.url)
            await self._stop.wait()

    # brokers

    async def over_broker(self, url: Url, out: str, config: ConsumerConfig | None, drain_s: float) -> None:
        if not url.get("consumer"):
            raise InvalidArgument(
                f"serve {url.redacted()}: names no consumer", hint=f"add &consumer={self._handler.name}"
            )
        wanted = self._handler.accepts and (*self._handler.accepts, HEALTH_PING)
        subjects = tuple(s for t in wanted for s in (t, f"{t}.>")) or ALL
        place = await open_place(url, config=config, subjects=subjects)
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(place.broker)
            assert place.consumer is not None  # noqa: S101 - the URL names one
            sink = await _open_out(stack, out, place.broker) if out else None

            async def batch(items: list[Delivered]) -> None:
                await self._deliveries(items, sink, place.consumer.config.attempts_max)  # type: ignore[union-attr]

            worker = Worker(
                place.consumer,
                batch_handler=batch,
                batch_max=self._each,
                concurrency=self._concurrency,
                drain_s=drain_s,
            )
            self._on_ready(url.redacted())
            await worker.run(self._stop)
            self.served.failed += worker.stats.undecodable

    async def _deliveries(self, items: list[Delivered], sink: _Out | None, attempts_max: int) -> None:
        """Store the outputs; then the worker acknowledges what is not settled here, or gives it back if this raises.

        A handler with a last word is not called at the last attempt: that one is for the word, of requests whose attempts were
        all cut off. The letter follows when the word is stored."""
        speaks = self._handler.last_word is not None and sink is not None
        most = attempts_max - 1 if speaks and attempts_max > 1 else attempts_max
        called = [item for item in items if not most or item.attempt <= most]
        outcomes = dict(zip(called, await self._handler.handle([item.envelope for item in called]), strict=True))
        outputs: dict[Delivered, list[Envelope]] = {}
        dead: dict[Delivered, MistError] = {}
        for item in items:
            outcome = outcomes[item] if item in outcomes else _cut_off(item)
            error = outcome if isinstance(outcome, MistError) else self._unstorable(item, outcome, sink)
            if error is None:
                outputs[item] = outcome if sink is not None and not isinstance(outcome, MistError) else []
            elif (error.retryable or isinstance(error, Internal)) and not (most and item.attempt >= most):
                item.nak()
            else:
                dead[item] = error
                words = self._handler.last_words(item.envelope, error) if speaks else []
                unstorable = self._unstorable(item, words, sink)
                outputs[item] = [] if unstorable is not None else words
                if unstorable is not None:
                    self._report(unstorable, item.envelope.id)
        if isinstance(sink, _ToStream):
            await self._without_stored(sink, outputs, dead)
        wanted = [envelope for of_one in outputs.values() for envelope in of_one]
        if sink is not None and wanted:
            await sink.send_many(wanted)
        for item, error in dead.items():
            item.term(f"{error.code}: {error.message}")
            self._failed(error, item.envelope.id)
        self.served.requests += len(items)
        self.served.outputs += len(wanted)

    async def _without_stored(
        self, sink: _ToStream, outputs: dict[Delivered, list[Envelope]], dead: dict[Delivered, MistError]
    ) -> None:
        """Leave out what was stored at an earlier attempt. A dead one whose own outputs are there is not dead."""
        again = [item for item in outputs if item.attempt > 1 and outputs[item]]
        if not again:
            return
        first = {item: output_id(self._handler.name, item.envelope, 0) for item in again if item in dead}
        ids = {e.id for item in again for e in outputs[item]} | set(first.values())
        stored = await sink.stored(ids, min(item.timestamp_ns for item in again))
        for item in again:
            if first.get(item) in stored:
                del dead[item]
                outputs[item] = []
            else:
                outputs[item] = [e for e in outputs[item] if e.id not in stored]

    def _unstorable(self, item: Delivered, outcome: list[Envelope], sink: _Out | None) -> MistError | None:
        """Why these outputs can never be stored; one request must not hold up the others."""
        if not outcome:
            return None
        if sink is None:
            if item.envelope.type == HEALTH_PING:
                return None
            return InvalidArgument(
                f"handler {self._handler.name} made outputs, and nothing says where they go", hint="out="
            )
        try:
            if isinstance(sink, _ToStream):
                sink.check(outcome)
        except MistError as exc:
            return exc
        return None


def _cut_off(item: Delivered) -> MistError:
    """Why a request is dead that was handed out so often and never came to an end."""
    return Unavailable(
        f"{EXHAUSTED}: the {item.attempt - 1} before were cut off or failed", meta={"id": item.envelope.id}
    )


async def _open_out(stack: AsyncExitStack, out: str, broker: Broker | None) -> _Out:
    """`out` is a stream's name on `broker`, or a URL: of a broker with `?stream=`, or of a transport."""
    url = parse_url(out) if has_scheme(out) else None
    if url is not None and url.scheme in _TRANSPORTS:
        return await stack.enter_async_context(dial(url))
    if url is not None:
        place = await open_place(url)
        broker, stream = await stack.enter_async_context(place.broker), place.stream
    elif broker is not None:
        stream = await broker.open(out)
    else:
        raise InvalidArgument(f"serve: out={out!r} is no URL", hint=f"log:DIR?stream={out}")
    client = await stack.enter_async_context(Client(broker))
    return _ToStream(await client.publisher(stream.name), stream)


def _address(url: Url) -> tuple[str, int, str]:
    """Where `http://HOST:PORT/path` (or `http:?listen=HOST:PORT`) listens."""
    if url.scheme == "https":
        raise InvalidArgument(f"serve {url.redacted()}: TLS is not spoken here", hint="http://, behind a proxy")
    listen = url.get("listen")
    url.refuse_unknown("listen")
    try:
        parts = urlsplit(f"http:{url.target}")
        host, port = parse_address(listen) if listen else (parts.hostname or "127.0.0.1", parts.port)
    except ValueError as exc:
        raise InvalidArgument(f"{url.redacted()}: {exc}") from exc
    if port is None:
        raise InvalidArgument(f"{url.redacted()}: names no port", hint="http://127.0.0.1:8081")
    return host, port, parts.path if parts.path not in ("", "/") else "/mist"


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0


async def _ids(path: str, offset: int) -> set[str]:
    """The ids in a file of outputs from `offset` on. What is no envelope there is nobody's output."""
    ids: set[str] = set()
    if _size(path) <= offset:
        return ids
    async with FileTransport(path, start=Position(0, offset)) as outputs:
        while True:
            try:
                ids.update([e.id for e in await outputs.receive_many(1000)])
            except EndOfStream:
                return ids
            except (ProtocolError, TooLarge):
                continue
