"""The one place that touches nats-py: a connection that nats-py makes and keeps, and frames that go round it.

nats-py chooses the server, shakes hands, authenticates, starts TLS, pings, and connects again for ever. Its per-message
machinery is not used: it is given our `Socket` as its transport, which hands it control lines only (INFO, PING, PONG)
and the messages to us. What we rely on is listed in `RELIED_ON` and pinned by tests/nats/test_link.py.

Promises: a lost connection fails everything that waits for an answer, at once, with `Lost`; afterwards every
subscription stands again before anything new is sent. Writes of one loop turn leave in one write. A server that answers
no ping is noticed within three pings. Does not: repeat anything.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import Any

import nats.aio.client
import nats.aio.transport
import nats.errors

from mist.broker.backoff import Backoff
from mist.errors import Closed, MistError, NotAuthorised, Unavailable
from mist_nats import wire
from mist_nats.wire import Fed, Frame, Garbled, Splitter

RELIED_ON = {
    "nats.aio.client.Client": ("connect", "close", "_transport", "_server_info"),
    "nats.aio.transport.Transport": (
        "connect", "connect_tls", "write", "writelines", "read", "readline", "drain", "wait_closed", "close", "at_eof",
    ),
}  # fmt: skip
"""Attributes of nats-py, public and private, that this module uses or implements."""
VERSIONS = (2, 12), (2, 17)
"""nats-py from .. below, with which RELIED_ON was checked."""

CALL_S = 10.0
"""How long a call may take in all: waiting for a connection, sending, waiting for the answer."""
AGAIN_S = 2.0
"""A question that changes nothing is asked again after this: a server that is killed with it in its hands says nothing, and
the next leader answers."""
PING_S = 5.0
WRITE_BYTES_HIGH = 4 * 1024 * 1024
CLOSE_S = 1.0
"""How long unsent bytes may hold up a close: a stopped server reads nothing."""
RETRY = Backoff(first_s=0.05, most_s=2.0)

Handler = Callable[[list[Frame]], None]


class Lost(Exception):
    """The connection went away while an answer was awaited. Never leaves this package."""


class Socket(asyncio.Protocol, nats.aio.transport.Transport):
    """What nats-py takes for its transport. Control lines are its own, everything else goes to `link`."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._transport: asyncio.Transport | None = None
        self._lines: list[bytes] = []
        self._waiter: asyncio.Future[None] | None = None
        self._writable = asyncio.Event()
        self._gone = asyncio.Event()
        self._greeted = False
        self._tries = 0
        self._splitter = Splitter(link.ack_sid)

    def __bool__(self) -> bool:
        return True  # else nats-py would put its own transport in our place

    # --- nats-py's side ---

    async def connect(self, uri: Any, buffer_size: int, connect_timeout: float) -> None:
        if self._tries:
            await asyncio.sleep(RETRY.delay_s(self._tries))
        self._tries += 1
        self._reset()
        async with asyncio.timeout(connect_timeout):
            loop = asyncio.get_running_loop()
            transport, _ = await loop.create_connection(lambda: self, uri.hostname, uri.port)
        self._use(transport)

    async def connect_tls(
        self, uri: Any, ssl_context: ssl.SSLContext, buffer_size: int, connect_timeout: float
    ) -> None:
        if self._transport is None:
            raise ConnectionResetError("no connection to start TLS on")
        name = uri if isinstance(uri, str) else uri.hostname
        async with asyncio.timeout(connect_timeout):
            loop = asyncio.get_running_loop()
            transport = await loop.start_tls(self._transport, self, ssl_context, server_hostname=name)
        if transport is None:
            raise ConnectionResetError("the connection was lost while TLS was started")
        self._use(transport)

    def write(self, payload: bytes) -> None:
        if self._transport is not None:
            self._transport.write(payload)

    def writelines(self, payload: list[bytes]) -> None:
        self.write(b"".join(payload))

    async def drain(self) -> None:
        if self._transport is None or self._gone.is_set():
            raise ConnectionResetError("the connection is lost")
        await self._writable.wait()

    async def readline(self) -> bytes:
        """The next line of the handshake. After the greeting, further INFO lines wait for `read`."""
        while True:
            for at, line in enumerate(self._lines):
                if self._greeted and line.startswith(b"INFO"):
                    continue
                del self._lines[at]
                self._greeted = True
                return line + b"\r\n"
            if self._gone.is_set():
                return b""
            await self._more()

    async def read(self, buffer_size: int) -> bytes:
        while not self._lines and not self._gone.is_set():
            await self._more()
        lines, self._lines = self._lines, []
        return b"".join([line + b"\r\n" for line in lines])

    def at_eof(self) -> bool:
        return self._gone.is_set() and not self._lines

    def close(self) -> None:
        if self._transport is not None and not self._gone.is_set():
            self._transport.close()
            asyncio.get_running_loop().call_later(CLOSE_S, self._transport.abort)

    async def wait_closed(self) -> None:
        if self._transport is not None:
            await self._gone.wait()

    # --- asyncio's side ---

    def data_received(self, data: bytes) -> None:
        try:
            fed = self._splitter.feed(data)
        except Garbled as exc:
            self.fail(exc)
            return
        if fed.lines:
            self._control(fed.lines)
        if fed.frames or fed.acks:
            self._link.dispatch(fed)

    def _control(self, lines: list[bytes]) -> None:
        for line in lines:
            if line.startswith(b"-ERR") and self._link.connected:
                # nats-py would close for good on most of them; a lost connection is what it repairs
                self._link.server_error(line[4:].strip().strip(b"'").decode(errors="replace"))
            else:
                self._lines.append(line)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def fail(self, exc: Exception) -> None:
        """Give this connection up; nats-py makes the next one."""
        self._link.last_error = exc
        if self._transport is not None:
            self._transport.abort()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self._gone.set()
        self._writable.set()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        self._link.lost(exc)

    # --- ours ---

    def _reset(self) -> None:
        self._transport = None  # the old one is gone: nobody may wait for it to close again
        self._lines = []
        self._greeted = False
        self._gone = asyncio.Event()
        self._writable.set()
        self._splitter = Splitter(self._link.ack_sid)

    def _use(self, transport: Any) -> None:
        self._transport = transport
        transport.set_write_buffer_limits(high=WRITE_BYTES_HIGH)

    def calm(self) -> None:
        """A connection stands: the next failure is a first one."""
        self._tries = 1

    async def _more(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None


class Inbox:
    """A subscription of our own, for one exchange at a time. `handler` gets its frames, chunk by chunk."""

    __slots__ = ("handler", "sid", "subject")

    def __init__(self, subject: bytes, sid: bytes) -> None:
        self.subject = subject
        self.sid = sid
        self.handler: Handler | None = None


class Link:
    """One connection. Made by `open_link`."""

    ack_sid = b"1"

    def __init__(self, name: str, new_id: str) -> None:
        self.name = name
        self.box = b"_INBOX.%s" % new_id.encode()
        self.connected = False
        self.closed = False
        self.generation = 0
        """Goes up with every connection."""
        self.last_error: Exception | None = None
        self.on_acks: Callable[[list[tuple[bytes, bytes]]], None] | None = None
        self.on_lost: list[Callable[[], None]] = []
        self.on_back: list[Callable[[], None]] = []
        self.client = nats.aio.client.Client()
        self.socket = Socket(self)
        self._loop = asyncio.get_running_loop()
        self._out: list[bytes] = []
        self._subs: dict[bytes, tuple[bytes, Handler]] = {}
        self._sids = 1
        self._numbers = 0
        self._answers: dict[bytes, asyncio.Future[Frame]] = {}
        self._idle: list[Inbox] = []
        self._ending: set[bytes] = set()
        self._state = asyncio.Event()
        self.subscribe(self.box + b".a.*", self._plain_acks)
        self.subscribe(self.box + b".r.*", self._replies)
        self.on_ack_frames: Handler | None = None

    # --- what the server said about itself ---

    @property
    def info(self) -> dict[str, Any]:
        return self.client._server_info

    @property
    def version(self) -> tuple[int, int]:
        return version_of(str(self.info.get("version", "0.0")))

    @property
    def max_payload(self) -> int:
        return int(self.info.get("max_payload", 1024 * 1024))

    # --- connecting ---

    async def connect(self, timeout_s: float, seeds: int, **options: Any) -> None:
        """Connect, trying every seed once. Raises Unavailable or NotAuthorised."""
        failures: list[Exception] = []
        enough = asyncio.Event()

        async def failed(exc: Exception) -> None:
            self.last_error = exc
            failures.append(exc)
            if not self.generation and (len(failures) >= seeds or refused(exc)):
                enough.set()

        async def back() -> None:
            self._stand()

        self.client._transport = self.socket
        connecting = asyncio.ensure_future(
            self.client.connect(
                error_cb=failed,
                reconnected_cb=back,
                connect_timeout=timeout_s,  # type: ignore[arg-type]
                reconnect_time_wait=0,  # the socket waits, with jitter
                max_reconnect_attempts=-1,
                ping_interval=PING_S,  # type: ignore[arg-type]
                max_outstanding_pings=2,
                **options,
            )
        )
        waiting = asyncio.ensure_future(enough.wait())
        try:
            await asyncio.wait({connecting, waiting}, timeout=timeout_s * seeds, return_when=asyncio.FIRST_COMPLETED)
            if not connecting.done() or connecting.exception() is not None:
                if connecting.done():
                    failures.append(connecting.exception())  # type: ignore[arg-type]
                raise self._why(failures[-1] if failures else None)
        except BaseException:
            connecting.cancel()
            await asyncio.gather(connecting, return_exceptions=True)
            self.closed = True
            self.socket.close()
            raise
        finally:
            waiting.cancel()
        self._stand()

    def _why(self, exc: Exception | None) -> MistError:
        text = _words(exc)
        error: MistError
        if exc is not None and refused(exc):
            error = NotAuthorised(f"{self.name}: the server refuses these credentials ({text})")
        elif isinstance(exc, ssl.SSLError):
            error = Unavailable(f"{self.name}: TLS failed ({text})", hint="tls_ca names the CA's file", retryable=False)
        else:
            error = Unavailable(f"{self.name}: cannot connect ({text})", hint="is the server running there?")
        error.__cause__ = exc
        return error

    def _stand(self) -> None:
        """A connection stands: subscribe anew, let the callers go on."""
        if self.closed or self.socket.at_eof():
            return
        self._out = []
        self.generation += 1
        self.socket.write(b"".join([wire.sub(t, sid) for sid, (t, _) in self._subs.items() if sid not in self._ending]))
        self.connected = True
        self.last_error = None
        self.socket.calm()
        self._state.set()
        for call in list(self.on_back):
            call()

    def lost(self, exc: Exception | None) -> None:
        if exc is not None:
            self.last_error = exc
        if not self.connected:
            return
        self.connected = False
        self._state.clear()
        self._out = []
        self._fail_answers()
        for call in list(self.on_lost):
            call()

    def _fail_answers(self) -> None:
        answers, self._answers = self._answers, {}
        for answer in answers.values():
            if not answer.done():
                answer.set_exception(Lost("the connection was lost"))

    def server_error(self, text: str) -> None:
        """An -ERR outside the handshake. A permission is one request's trouble (it gets no answer); others end it."""
        self.last_error = nats.errors.Error(text)
        if "permissions violation" not in text.lower():
            self.socket.fail(self.last_error)

    async def ready(self, until: float) -> None:
        """Wait for a connection until loop time `until`. Raises Unavailable, NotAuthorised, Closed."""
        while not self.connected:
            self.check_open()
            try:
                async with asyncio.timeout_at(until):
                    await self._state.wait()
            except TimeoutError:
                why = self.last_error
                if why is not None and refused(why):
                    raise self._why(why) from why
                raise Unavailable(
                    f"{self.name}: not connected ({_words(why)})", hint="it goes on trying; call again later"
                ) from why
        self.check_open()

    def check_open(self) -> None:
        if self.closed:
            raise Closed("the broker is closed")

    async def aclose(self) -> None:
        if self.closed:
            return
        self.flush()
        self.closed = True
        self._state.set()
        self._fail_answers()
        for call in list(self.on_lost):
            call()
        await self.client.close()
        self.connected = False

    # --- sending ---

    def send(self, data: bytes) -> None:
        """Write it with everything else of this loop turn. Dropped when the connection is lost meanwhile."""
        if not self._out:
            self._loop.call_soon(self.flush)
        self._out.append(data)

    def flush(self) -> None:
        if self._out:
            data = self._out[0] if len(self._out) == 1 else b"".join(self._out)
            self._out = []
            if self.connected:
                self.socket.write(data)

    async def writable(self) -> None:
        """Wait until the server has taken most of what was written. Raises Lost."""
        self.flush()
        try:
            await self.socket.drain()
        except ConnectionError as exc:
            raise Lost(str(exc)) from exc

    # --- receiving ---

    def dispatch(self, fed: Fed) -> None:
        if fed.acks and self.on_acks is not None:
            self.on_acks(fed.acks)
        for sid, frames in fed.frames:
            entry = self._subs.get(sid)
            if entry is not None:
                entry[1](frames)

    def subscribe(self, subject: bytes, handler: Handler) -> bytes:
        """Returns the subscription's id; it stands again after every reconnect."""
        sid = b"%d" % self._sids
        self._sids += 1
        self._subs[sid] = (subject, handler)
        if self.connected:
            self.send(wire.sub(subject, sid))
        return sid

    def unsubscribe(self, sid: bytes) -> None:
        if self._subs.pop(sid, None) is not None and self.connected:
            self.send(wire.unsub(sid))

    def inbox(self) -> Inbox:
        """An inbox that nobody uses. Give it back with `release`, or end it with `drop`."""
        if self._idle:
            return self._idle.pop()
        subject = self.box + b".i.%d" % self._sids
        box = Inbox(subject, b"")

        def handle(frames: list[Frame]) -> None:
            if box.handler is not None:
                box.handler(frames)

        box.sid = self.subscribe(subject, handle)
        return box

    def release(self, box: Inbox) -> None:
        """Only after the exchange has ended: what comes late would fall into the next one."""
        box.handler = None
        if box.sid in self._subs and len(self._idle) < 64:
            self._idle.append(box)
        else:
            self.unsubscribe(box.sid)

    def drop(self, box: Inbox, late: Handler | None = None) -> None:
        """End it. `late` gets what the server had sent before it heard of it."""
        box.handler = late
        if box.sid in self._subs and self.connected:
            self.send(wire.unsub(box.sid))
            self._ending.add(box.sid)
            self._loop.call_later(CALL_S, self._ended, box.sid)
        else:
            self._subs.pop(box.sid, None)

    def _ended(self, sid: bytes) -> None:
        self._subs.pop(sid, None)
        self._ending.discard(sid)

    def _plain_acks(self, frames: list[Frame]) -> None:
        if self.on_ack_frames is not None:
            self.on_ack_frames(frames)

    def _replies(self, frames: list[Frame]) -> None:
        for frame in frames:
            answer = self._answers.pop(frame[0].rpartition(b".")[2], None)
            if answer is not None and not answer.done():
                answer.set_result(frame)

    def expect(self) -> tuple[bytes, bytes, asyncio.Future[Frame]]:
        """A reply subject, its token and the future of its answer. End it with `forget(token)`."""
        self._numbers += 1
        token = b"%d" % self._numbers
        answer: asyncio.Future[Frame] = self._loop.create_future()
        self._answers[token] = answer
        return self.box + b".r." + token, token, answer

    def forget(self, token: bytes) -> None:
        self._answers.pop(token, None)

    async def request(self, build: Callable[[bytes], bytes], until: float, *, again: bool = False) -> Frame:
        """Send what `build` makes with a reply subject, and wait; with `again` send it every AGAIN_S. Raises Lost,
        TimeoutError, Unavailable, Closed."""
        while True:
            await self.ready(until)
            reply, token, answer = self.expect()
            self.send(build(reply))
            end = min(until, self._loop.time() + AGAIN_S) if again else until
            try:
                async with asyncio.timeout_at(end):
                    return await answer
            except TimeoutError:
                if end >= until:
                    raise
            finally:
                self.forget(token)


def version_of(text: str) -> tuple[int, int]:
    """(2, 15) of `2.15.1-beta`; (0, 0) when it is none."""
    parts = text.split(".")
    if len(parts) >= 2 and parts[0].isdigit() and parts[1].isdigit():
        return int(parts[0]), int(parts[1])
    return 0, 0


def refused(exc: Exception) -> bool:
    """Whether the server refused who we are."""
    text = str(exc).lower()
    return (
        isinstance(exc, nats.errors.AuthorizationError) or "authorization violation" in text or "authentication" in text
    )


def _words(exc: Exception | None) -> str:
    """What to tell of it: never the URL with its password."""
    if exc is None:
        return "no answer in time"
    if isinstance(exc, TimeoutError):
        return "no answer in time"
    return (str(exc) or type(exc).__name__).removeprefix("nats: ")
