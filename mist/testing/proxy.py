"""A TCP proxy that misbehaves on command: put it between a client and a server and switch what the network does.

    with FaultProxy("127.0.0.1", server.port) as proxy:
        async with mist.connect(proxy.through(server.url)) as broker:
            ...
            proxy.drop()            # from now on no byte arrives, in either direction, and nobody is told
            ...
            proxy.forward()

It runs in a thread of its own with an event loop of its own; every control call may come from any thread, and has
happened when it returns. What a mode does, to connections that are open and to new ones:

forward    passes everything on.
refuse     new connections are refused (RST, as when nobody listens); open ones go on. With `cut`: a server that is down.
drop       swallows all bytes both ways, also the end of a connection; the connections stay up.
one_way    passes one direction, swallows the other.
stall      holds everything, loses nothing: back pressure now, and what was held passes afterwards.
trickle    passes at most n bytes per interval and direction.
delay      passes every byte, so much later.
half_open  the server's side of every connection is closed, the client's stays open and silent, for new ones as well:
           a machine that lost its power. Such a connection never revives: after the mode has ended, the next byte that
           its client sends is answered with RST.
cut        not a mode: every open connection is reset, once, now.

A connection that lost bytes is reset as soon as that direction would pass something again: TCP never delivers what
comes behind a hole, and a client that were given it would take one request's answer for another's. For a partition that heals
without a reset there is `stall`. Directions are `up` (client to server) and `down`.

`after_bytes=n` lets a mode, or a cut, begin when n more bytes have passed (both directions together), in the
middle of a frame where that is where they end.

What a switch finds on its way (one chunk of at most 64 KiB) still arrives. Where a real partition would lose the SYN, the
proxy takes the new connection and is silent afterwards.

Memory is bounded: 256 KiB per connection and direction are held, then the sender is made to wait; above 1,024 open
connections new ones are reset. It does not look into TLS, and knows no protocol.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from msgspec import Struct

from mist.errors import Closed, InvalidArgument, TimedOut

T = TypeVar("T")
Direction = Literal["up", "down"]
Kind = Literal["forward", "refuse", "drop", "one_way", "stall", "trickle", "delay", "half_open"]
KINDS: tuple[Kind, ...] = ("forward", "refuse", "drop", "one_way", "stall", "trickle", "delay", "half_open")

HELD_BYTES_MAX = 256 * 1024
CONNECTIONS_MAX = 1024
_CHUNK = 64 * 1024
_CONTROL_S = 10.0
_CONNECT_S = 10.0


class Mode(Struct, frozen=True, kw_only=True):
    """What the proxy does now. `passes`: the direction of `one_way`; `bytes` and `interval_s` of `trickle`, `delay_s` of
    `delay`."""

    kind: Kind = "forward"
    passes: Direction = "up"
    bytes: int = 16
    interval_s: float = 0.05
    delay_s: float = 0.1

    def validate(self) -> Mode:
        if (
            self.kind not in KINDS or self.passes not in ("up", "down") or self.bytes < 1
            or not 0 < self.interval_s < 3600 or not 0 <= self.delay_s < 3600
        ):  # fmt: skip
            raise InvalidArgument(f"proxy: {self} cannot be right")
        return self

    def swallows(self, direction: Direction) -> bool:
        return self.kind == "drop" or (self.kind == "one_way" and self.passes != direction)


class Counters(Struct, frozen=True, kw_only=True):
    """Since the start. `unreachable`: connections that were reset because the server did not take them; `surplus`: those
    above the limit. `resets`: those that the proxy reset, for whatever reason."""

    accepted: int = 0
    open: int = 0
    unreachable: int = 0
    surplus: int = 0
    resets: int = 0
    cuts: int = 0
    passed_up: int = 0
    passed_down: int = 0
    swallowed_up: int = 0
    swallowed_down: int = 0


class FaultProxy:
    """Listens on `host:port` (a free port of 127.0.0.1), passes on to `server_host:server_port`. Use it as a context
    manager, or with `start` and `stop`; `stop` is idempotent and leaves no socket and no thread."""

    def __init__(self, server_host: str, server_port: int, *, host: str = "127.0.0.1", port: int = 0) -> None:
        self.host = host
        self.port = port
        self._server = (server_host, server_port)
        self._mode = Mode()
        self._counts: dict[str, int] = dict.fromkeys(Counters.__struct_fields__, 0)
        self._connections: set[_Connection] = set()
        self._later: tuple[int, Callable[[], None]] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._place: socket.socket | None = None
        self._listener: socket.socket | None = None

    # -- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Listen. The port is kept, also while connections are refused."""
        if self._thread is not None:
            raise InvalidArgument("proxy: started already")
        self._place = _bound(self.host, self.port)
        self.port = self._place.getsockname()[1]
        loop = asyncio.SelectorEventLoop()
        thread = threading.Thread(target=self._run, args=(loop,), name=f"fault-proxy-{self.port}", daemon=True)
        self._loop, self._thread = loop, thread
        thread.start()
        try:
            self._call(self._listen)
        except BaseException:
            self.stop()
            raise

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_forever()
            loop.run_until_complete(self._end())
        finally:
            asyncio.set_event_loop(None)
            loop.close()

    async def _end(self) -> None:
        self._unlisten()
        for connection in list(self._connections):
            connection.reset()
        left = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    def stop(self) -> None:
        """Reset every connection and end."""
        thread, loop, place = self._thread, self._loop, self._place
        self._thread = self._loop = self._place = None
        if thread is not None and loop is not None:
            loop.call_soon_threadsafe(loop.stop)
            thread.join(_CONTROL_S)
            if thread.is_alive():
                raise TimedOut(f"proxy: its thread did not end in {_CONTROL_S:g} s")
        if place is not None:
            place.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.stop()

    def through(self, url: str) -> str:
        """The URL of the server, with the proxy's address in place of all its hosts."""
        found = re.match(r"([a-z+]+://(?:[^@/?]*@)?)([^/?]*)(.*)\Z", url, re.DOTALL)
        if not found:
            raise InvalidArgument("proxy: this URL has no host to replace")
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{found[1]}{host}:{self.port}{found[3]}"

    # -- control, from any thread -------------------------------------------------------------------------------------

    @property
    def mode(self) -> Mode:
        return self._mode

    @property
    def counters(self) -> Counters:
        """Also after the end."""
        if self._loop is None:
            return Counters(**self._counts)
        return self._call(lambda: Counters(**{**self._counts, "open": len(self._connections)}))

    def set(self, mode: Mode, *, after_bytes: int | None = None) -> None:
        """Switch, now or when so many more bytes have passed. A newer call replaces one that still waits."""
        mode.validate()
        self._when(after_bytes, lambda: self._switch(mode))

    def forward(self) -> None:
        self.set(Mode())

    def refuse(self, *, after_bytes: int | None = None) -> None:
        self.set(Mode(kind="refuse"), after_bytes=after_bytes)

    def drop(self, *, after_bytes: int | None = None) -> None:
        self.set(Mode(kind="drop"), after_bytes=after_bytes)

    def one_way(self, passes: Direction, *, after_bytes: int | None = None) -> None:
        self.set(Mode(kind="one_way", passes=passes), after_bytes=after_bytes)

    def stall(self, *, after_bytes: int | None = None) -> None:
        self.set(Mode(kind="stall"), after_bytes=after_bytes)

    def trickle(self, bytes: int = 16, interval_s: float = 0.05, *, after_bytes: int | None = None) -> None:
        self.set(Mode(kind="trickle", bytes=bytes, interval_s=interval_s), after_bytes=after_bytes)

    def delay(self, delay_s: float, *, after_bytes: int | None = None) -> None:
        self.set(Mode(kind="delay", delay_s=delay_s), after_bytes=after_bytes)

    def half_open(self, *, after_bytes: int | None = None) -> None:
        self.set(Mode(kind="half_open"), after_bytes=after_bytes)

    def cut(self, *, after_bytes: int | None = None) -> None:
        """Reset every open connection, now or when so many more bytes have passed. The mode stays."""
        self._when(after_bytes, self._cut)

    def retarget(self, server_host: str, server_port: int) -> None:
        """Send new connections to another server: a failover that keeps its address. Open ones stay where they are."""

        def change() -> None:
            self._server = (server_host, server_port)

        self._call(change)

    def _when(self, after_bytes: int | None, what: Callable[[], None]) -> None:
        if after_bytes is not None and after_bytes < 0:
            raise InvalidArgument(f"proxy: after_bytes={after_bytes}")

        def begin() -> None:
            self._later = None
            if not after_bytes:
                what()
            else:
                self._later = (after_bytes, what)

        self._call(begin)

    def _call(self, what: Callable[[], T]) -> T:
        """Run it on the proxy's loop and wait for the answer."""
        loop = self._loop
        if loop is None:
            raise Closed("proxy: not running")

        async def run() -> T:
            return what()

        done = asyncio.run_coroutine_threadsafe(run(), loop)
        try:
            return done.result(_CONTROL_S)
        except TimeoutError as exc:
            raise TimedOut(f"proxy: its thread did not answer in {_CONTROL_S:g} s") from exc

    # -- on the loop --------------------------------------------------------------------------------------------------

    def _switch(self, mode: Mode) -> None:
        before, self._mode = self._mode, mode
        if mode.kind == "refuse":
            self._unlisten()
        elif before.kind == "refuse":
            self._listen()
        for connection in list(self._connections):
            connection.switched(mode)

    def _cut(self) -> None:
        self._counts["cuts"] += 1
        for connection in list(self._connections):
            connection.reset()

    def _listen(self) -> None:
        # the bound socket that never listens keeps the port ours while nobody does
        self._listener = _bound(self.host, self.port)
        self._listener.listen(128)
        asyncio.get_running_loop().add_reader(self._listener, self._accept, self._listener)

    def _unlisten(self) -> None:
        if self._listener is not None:
            _forget(self._listener)
            self._listener.close()
            self._listener = None

    def _accept(self, listener: socket.socket) -> None:
        # a callback and not a task: a task that is cancelled loses the connection it was just given
        try:
            client, _ = listener.accept()
        except (BlockingIOError, ConnectionError):
            return  # gone before we looked
        client.setblocking(False)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.count("accepted")
        if len(self._connections) >= CONNECTIONS_MAX:
            self.count("surplus")
            _reset(client)
            return
        connection = _Connection(self, client)
        self._connections.add(connection)
        connection.begin()

    def count(self, name: str, n: int = 1) -> None:
        self._counts[name] += n

    def gone(self, connection: _Connection) -> None:
        self._connections.discard(connection)

    @property
    def server(self) -> tuple[str, int]:
        return self._server

    def allowance(self, size: int) -> int:
        """How many of these bytes may pass before a mode that waits for them begins."""
        return size if self._later is None else min(size, self._later[0])

    def passed(self, direction: Direction, n: int) -> None:
        """Count them, and begin what waited for the last of them."""
        self.count("passed_up" if direction == "up" else "passed_down", n)
        if self._later is not None:
            left, what = self._later
            self._later = (left - n, what)

    def due(self) -> None:
        if self._later is not None and self._later[0] <= 0:
            what = self._later[1]
            self._later = None
            what()


def _bound(host: str, port: int) -> socket.socket:
    s = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        s.setblocking(False)
        s.bind((host, port))
    except OSError:
        s.close()
        raise
    return s


class _Connection:
    """A client's socket, the server's, and a pipe for each direction. `dead`: its server side was closed by half_open."""

    def __init__(self, proxy: FaultProxy, client: socket.socket) -> None:
        self.proxy = proxy
        self.client = client
        self.server: socket.socket | None = None
        self.pipes: list[_Pipe] = []
        self.dead = False
        self.closed = False
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self) -> None:
        if self.proxy.mode.kind == "half_open":
            self._die()
        else:
            self._task(self._connect())

    def _task(self, coro: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coro)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        host, port = self.proxy.server
        server = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        server.setblocking(False)
        try:
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            async with asyncio.timeout(_CONNECT_S):
                await loop.sock_connect(server, (host, port))
        except OSError:  # TimeoutError is one
            server.close()
            self.proxy.count("unreachable")
            self.reset()
            return
        except BaseException:
            server.close()
            raise
        if self.closed or self.dead:  # cut, or half_open, meanwhile
            server.close()
            return
        self.server = server
        up, down = _Pipe(self, self.client, server, "up"), _Pipe(self, server, self.client, "down")
        self.pipes = [up, down]
        for pipe in self.pipes:
            self._task(pipe.fill())
            self._task(pipe.empty())

    def switched(self, mode: Mode) -> None:
        if mode.kind == "half_open" and not self.dead:
            self._die()
            return
        if any(p.lost and not mode.swallows(p.direction) for p in self.pipes):
            self.reset()
            return
        for pipe in self.pipes:
            pipe.wake()

    def _die(self) -> None:
        """Close the server's side without a word to the client."""
        self.dead = True
        for task in self._tasks:
            task.cancel()
        self.pipes = []
        _forget(self.client)
        if self.server is not None:
            _forget(self.server)
            _reset(self.server)
            self.server = None
        self._task(self._silent())

    async def _silent(self) -> None:
        """Swallow what the client sends; once the mode has ended, answer it with a reset."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                data = await loop.sock_recv(self.client, _CHUNK)
            except OSError:
                data = b""
            if not data or self.proxy.mode.kind != "half_open":
                self.reset()
                return
            self.proxy.count("swallowed_up", len(data))

    def reset(self) -> None:
        """RST to both sides. Idempotent."""
        if not self.closed:
            self.proxy.count("resets")
            self._close(_reset)

    def finished(self) -> None:
        """Both directions have ended: close in order."""
        if not self.closed and all(p.ended for p in self.pipes):
            self._close(socket.socket.close)

    def _close(self, how: Callable[[socket.socket], None]) -> None:
        self.closed = True
        here = asyncio.current_task()
        for task in self._tasks:
            if task is not here:
                task.cancel()
        for s in (self.client, self.server):
            if s is not None:
                _forget(s)
                how(s)
        self.proxy.gone(self)


def _forget(s: socket.socket) -> None:
    """Before it is closed: a cancelled wait must not take its number away from the next socket that gets it."""
    loop = asyncio.get_running_loop()
    loop.remove_reader(s)
    loop.remove_writer(s)


def _reset(s: socket.socket) -> None:
    """Close with RST instead of FIN."""
    with contextlib.suppress(OSError):
        s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    s.close()


class _Pipe:
    """One direction: `fill` reads into a bounded buffer, `empty` passes it on as the mode says."""

    def __init__(self, of: _Connection, source: socket.socket, sink: socket.socket, direction: Direction) -> None:
        self._of = of
        self._source = source
        self._sink = sink
        self.direction = direction
        self.lost = False
        self.ended = False
        self._held: deque[tuple[float, bytes]] = deque()
        self._size = 0
        self._eof = False
        self._broken = False
        self._next_at = 0.0
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    def wake(self) -> None:
        """The mode has changed."""
        self._changed.set()

    async def fill(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._room.wait()
            try:
                data = await loop.sock_recv(self._source, _CHUNK)
            except OSError:
                self._broken = True  # a reset takes its turn behind what was sent before it, and is swallowed like it
                data = b""
            if not data:
                self._eof = True
                self._changed.set()
                return
            self._held.append((loop.time(), data))
            self._size += len(data)
            if self._size >= HELD_BYTES_MAX:
                self._room.clear()
            self._changed.set()

    def _take(self, most: int) -> bytes:
        at, data = self._held.popleft()
        if len(data) > most:
            self._held.appendleft((at, data[most:]))
            data = data[:most]
        self._size -= len(data)
        if self._size < HELD_BYTES_MAX:
            self._room.set()
        return data

    async def _sleep(self, seconds: float | None) -> None:
        """Until something changes, or so long."""
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()

    def _wait_s(self, mode: Mode) -> float:
        """How long the mode holds back what comes next."""
        if not self._held:
            return 0.0
        if mode.kind == "delay":
            return self._held[0][0] + mode.delay_s - _now()
        return self._next_at - _now() if mode.kind == "trickle" else 0.0

    async def empty(self) -> None:
        proxy = self._of.proxy
        while True:
            mode = proxy.mode
            if mode.swallows(self.direction):
                await self._swallow()
            elif mode.kind == "stall" or not (self._held or self._eof):
                await self._sleep(None)
            elif (wait_s := self._wait_s(mode)) > 0:
                await self._sleep(wait_s)
            elif self._held:
                if not await self._pass_on(mode):
                    return
            elif self._broken:
                self._of.reset()
                return
            else:
                with contextlib.suppress(OSError):
                    self._sink.shutdown(socket.SHUT_WR)
                self.ended = True
                self._of.finished()
                return

    async def _swallow(self) -> None:
        while self._held:
            self._of.proxy.count(
                "swallowed_up" if self.direction == "up" else "swallowed_down", len(self._take(_CHUNK))
            )
            self.lost = True
        if self._eof:
            self.lost = True
        await self._sleep(None)

    async def _pass_on(self, mode: Mode) -> bool:
        """Send what the mode allows. False when the connection is gone."""
        proxy = self._of.proxy
        data = self._take(proxy.allowance(mode.bytes if mode.kind == "trickle" else _CHUNK))
        # counted before the send: with `after_bytes` no other pipe may spend the same allowance meanwhile
        proxy.passed(self.direction, len(data))
        try:
            await asyncio.get_running_loop().sock_sendall(self._sink, data)
        except OSError:
            self._of.reset()
            return False
        self._next_at = _now() + mode.interval_s
        proxy.due()
        return not (self._of.closed or self._of.dead)


def _now() -> float:
    return asyncio.get_running_loop().time()
