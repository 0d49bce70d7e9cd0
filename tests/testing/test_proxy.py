"""Every mode of the fault proxy does what it says, to open and to new connections, and nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from mist.errors import Closed, InvalidArgument
from mist.kit.local import LocalServer
from mist.testing import proxy as module
from mist.testing.proxy import FaultProxy, Mode
from mist.testing.servers import run_nats, run_redis

SILENT_S = 0.15
"""How long a test listens before it says that nothing came."""


class Echo:
    """A server that sends back what it gets, notes the ends of its connections, and can be told to say something."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.connections: list[socket.socket] = []
        self.got: list[bytes] = []
        self.ended: list[str] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                s, _ = self._listener.accept()
            except OSError:
                return
            self.connections.append(s)
            self._threads.append(threading.Thread(target=self._serve, args=(s,)))
            self._threads[-1].start()

    def _serve(self, s: socket.socket) -> None:
        try:
            while data := s.recv(65536):
                self.got.append(data)
                s.sendall(data)
            self.ended.append("fin")
            s.close()
        except OSError as exc:
            self.ended.append("rst" if isinstance(exc, ConnectionResetError) else "closed")

    def close(self) -> None:
        for s in (self._listener, *self.connections):
            with contextlib.suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)
            s.close()
        for thread in self._threads:
            thread.join(5)


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.close()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[FaultProxy]:
    with FaultProxy("127.0.0.1", echo.port) as made:
        yield made


@contextlib.contextmanager
def client(proxy: FaultProxy) -> Iterator[socket.socket]:
    with socket.create_connection((proxy.host, proxy.port), timeout=10) as s:
        yield s


def until(condition: Callable[[], object], timeout_s: float = 10) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.002)


def receive(s: socket.socket, size: int) -> bytes:
    out = b""
    while len(out) < size and (data := s.recv(size - len(out))):
        out += data
    return out


def ask(s: socket.socket, text: bytes) -> bytes:
    s.sendall(text)
    return receive(s, len(text))


def silent(s: socket.socket) -> bool:
    """Nothing comes, not even an end."""
    s.settimeout(SILENT_S)
    try:
        s.recv(1)
    except TimeoutError:
        return True
    finally:
        s.settimeout(10)
    return False


def test_forward_passes_everything_both_ways(proxy: FaultProxy, echo: Echo) -> None:
    """A megabyte there and back, then the end; counted."""
    text = os.urandom(1 << 20)
    with client(proxy) as s:
        sender = threading.Thread(target=s.sendall, args=(text,))
        sender.start()
        assert receive(s, len(text)) == text
        sender.join()
        s.shutdown(socket.SHUT_WR)
        assert s.recv(1) == b""
    until(lambda: echo.ended == ["fin"])
    until(lambda: proxy.counters.open == 0)
    counters = proxy.counters
    assert (counters.passed_up, counters.passed_down, counters.resets) == (len(text), len(text), 0)


def test_refuse_refuses_new_ones_and_keeps_its_port(proxy: FaultProxy) -> None:
    """Open connections go on; afterwards new ones are taken again at the same port."""
    with client(proxy) as s:
        ask(s, b"a")
        for _ in range(3):
            proxy.refuse()
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((proxy.host, proxy.port), timeout=10)
            assert ask(s, b"b") == b"b"
            proxy.forward()
            with client(proxy) as other:
                assert ask(other, b"c") == b"c"


def test_cut_resets_every_open_connection(proxy: FaultProxy, echo: Echo) -> None:
    """RST, not FIN, on both sides; the mode stays as it was."""
    with client(proxy) as one, client(proxy) as two:
        assert ask(one, b"1") + ask(two, b"2") == b"12"
        proxy.cut()
        for s in (one, two):
            with pytest.raises(ConnectionResetError):
                s.recv(1)
    until(lambda: echo.ended == ["rst", "rst"])
    assert proxy.counters.resets == 2
    assert proxy.mode.kind == "forward"
    with client(proxy) as s:
        assert ask(s, b"again") == b"again"


def test_drop_swallows_both_ways_and_never_joins_the_halves(proxy: FaultProxy, echo: Echo) -> None:
    """Nothing comes and nobody is told; when bytes would pass again behind a hole, the connection is reset instead."""
    with client(proxy) as s, client(proxy) as idle:
        ask(s, b"before")
        ask(idle, b"idle")
        proxy.drop()
        s.sendall(b"lost")
        until(lambda: proxy.counters.swallowed_up == 4)
        echo.connections[0].sendall(b"also lost")
        until(lambda: proxy.counters.swallowed_down == 9)
        assert silent(s)
        assert b"".join(echo.got) == b"beforeidle"
        proxy.forward()
        with pytest.raises(ConnectionResetError):
            s.recv(1)
        assert ask(idle, b"lost nothing") == b"lost nothing"


def test_drop_swallows_the_end_of_a_connection_too(proxy: FaultProxy, echo: Echo) -> None:
    """The server never hears that its client has gone, until the network is back."""
    with client(proxy) as s:
        ask(s, b"x")
        proxy.drop()
    time.sleep(SILENT_S)
    assert echo.ended == []
    assert proxy.counters.open == 1
    proxy.forward()
    until(lambda: echo.ended == ["rst"])


@pytest.mark.parametrize("passes", ["up", "down"])
def test_one_way_passes_one_direction(proxy: FaultProxy, echo: Echo, passes: str) -> None:
    """What goes the other way is swallowed."""
    with client(proxy) as s:
        ask(s, b"before")
        proxy.one_way("up" if passes == "up" else "down")
        s.sendall(b"up")
        if passes == "up":
            until(lambda: proxy.counters.swallowed_down == 2)
            assert echo.got[-1] == b"up"
            assert silent(s)
        else:
            until(lambda: proxy.counters.swallowed_up == 2)
            echo.connections[0].sendall(b"down")
            assert receive(s, 4) == b"down"
            assert echo.got == [b"before"]
        proxy.forward()
        with pytest.raises(ConnectionResetError):
            s.recv(1)


def test_stall_loses_nothing_and_holds_little(proxy: FaultProxy, echo: Echo) -> None:
    """The sender is made to wait; what was held passes afterwards, in order."""
    text = os.urandom(64 << 20)
    with client(proxy) as s:
        proxy.stall()
        s.setblocking(False)
        sent = 0
        for _ in range(20):
            with contextlib.suppress(BlockingIOError):
                while True:
                    sent += s.send(text[sent : sent + 65536])
            time.sleep(0.01)
        # what is missing from 64 MiB is not in the proxy: it and the two sockets hold a few
        assert 0 < sent < 32 << 20
        s.settimeout(10)
        assert silent(s)
        assert proxy.counters.swallowed_up == 0
        proxy.forward()
        assert receive(s, sent) == text[:sent]


def test_trickle_passes_a_few_bytes_at_a_time(proxy: FaultProxy) -> None:
    """No more than n per interval; a switch ends the waiting."""
    with client(proxy) as s:
        proxy.trickle(3, 0.02)
        start = time.monotonic()
        assert ask(s, b"x" * 30) == b"x" * 30
        assert time.monotonic() - start >= 9 * 0.02
        proxy.trickle(1, 3000)
        s.sendall(b"abc")
        assert receive(s, 1) == b"a"
        assert silent(s)
        proxy.forward()
        assert receive(s, 2) == b"bc"


def test_delay_is_latency_and_not_a_narrow_pipe(proxy: FaultProxy) -> None:
    """Each byte comes later, many come at once."""
    with client(proxy) as s:
        proxy.delay(0.1)
        start = time.monotonic()
        for _ in range(50):
            s.sendall(b"y" * 1000)
            time.sleep(0.001)
        assert receive(s, 50_000) == b"y" * 50_000
        assert 0.2 <= time.monotonic() - start < 5  # fifty times 0.2 s, one after the other, would be ten


def test_half_open_closes_one_side_and_never_revives(proxy: FaultProxy, echo: Echo) -> None:
    """The client hears nothing, now or later; what it sends after the mode has ended is answered with a reset."""
    with client(proxy) as s:
        ask(s, b"x")
        proxy.half_open()
        until(lambda: len(echo.ended) == 1)
        s.sendall(b"nobody is there")
        assert silent(s)
        with client(proxy) as new:
            assert silent(new)
            proxy.forward()
            assert silent(s)
            assert silent(new)
            for dead in (s, new):
                dead.sendall(b"?")
                with pytest.raises(ConnectionResetError):
                    dead.recv(1)
    assert echo.got == [b"x"]
    assert proxy.counters.swallowed_up == len(b"nobody is there")


@pytest.mark.parametrize("kind", ["cut", "drop", "half_open"])
def test_a_fault_can_strike_in_the_middle_of_a_frame(proxy: FaultProxy, echo: Echo, kind: str) -> None:
    """`after_bytes`: so many bytes pass, the next one does not."""
    with client(proxy) as s:
        ask(s, b"12345")
        getattr(proxy, kind)(after_bytes=7)
        with contextlib.suppress(OSError):
            s.sendall(b"abcdefghij")
        until(lambda: b"".join(echo.got) == b"12345abcdefg")
        if kind == "cut":
            with pytest.raises(ConnectionResetError):
                receive(s, 1 << 20)
        else:
            assert silent(s)
        assert b"".join(echo.got) == b"12345abcdefg"
    assert proxy.counters.passed_up + proxy.counters.passed_down == 5 + 5 + 7


def test_a_later_call_replaces_one_that_waits(proxy: FaultProxy) -> None:
    """And nothing at all may pass before a mode with `after_bytes=0`."""
    with client(proxy) as s:
        proxy.drop(after_bytes=100)
        proxy.forward()
        assert ask(s, b"z" * 200) == b"z" * 200
        proxy.stall(after_bytes=0)
        assert proxy.mode.kind == "stall"
        s.sendall(b"held")
        assert silent(s)


def test_a_server_that_is_away_resets_the_client(proxy: FaultProxy, echo: Echo) -> None:
    """And another one can take its place at the same address."""
    echo.close()
    with pytest.raises(ConnectionResetError), client(proxy) as s:
        s.recv(1)
    assert proxy.counters.unreachable == 1
    other = Echo()
    try:
        proxy.retarget("127.0.0.1", other.port)
        with client(proxy) as s:
            assert ask(s, b"here") == b"here"
    finally:
        other.close()


def test_it_can_be_switched_from_many_threads_under_load(proxy: FaultProxy) -> None:
    """Random switching while clients come and go; at the end it forwards, and holds no connection."""
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            with contextlib.suppress(OSError), socket.create_connection((proxy.host, proxy.port), timeout=0.05) as s:
                s.sendall(b"q" * 5000)
                s.recv(5000)

    clients = [threading.Thread(target=load) for _ in range(4)]
    for thread in clients:
        thread.start()

    def switch(number: int) -> None:
        modes = [Mode(kind=k, interval_s=0.001, delay_s=0.001) for k in module.KINDS]
        for i in range(60):
            proxy.set(modes[(i * 7 + number) % len(modes)], after_bytes=(i % 3) * 1000 or None)
            if i % 5 == 0:
                proxy.cut()

    switchers = [threading.Thread(target=switch, args=(n,)) for n in range(3)]
    for thread in switchers:
        thread.start()
    for thread in switchers:
        thread.join(20)
        assert not thread.is_alive()
    stop.set()
    for thread in clients:
        thread.join(10)
    proxy.forward()
    proxy.cut()
    with client(proxy) as s:
        assert ask(s, b"well") == b"well"
    until(lambda: proxy.counters.open == 0)


def test_too_many_connections_are_reset(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """One more than the limit."""
    monkeypatch.setattr(module, "CONNECTIONS_MAX", 2)
    with client(proxy) as one, client(proxy) as two:
        assert ask(one, b"1") + ask(two, b"2") == b"12"
        with pytest.raises(ConnectionResetError), client(proxy) as three:
            three.recv(1)
    assert proxy.counters.surplus == 1


def test_it_leaves_nothing_behind(echo: Echo) -> None:
    """No thread, no socket, in any mode, with connections open; `stop` twice is fine, control afterwards is Closed."""
    before = (threading.active_count(), len(os.listdir("/proc/self/fd")))
    for kind in module.KINDS:
        proxy = FaultProxy("127.0.0.1", echo.port)
        with proxy, client(proxy) as s:
            ask(s, b"x")
            proxy.set(Mode(kind=kind))
            with contextlib.suppress(OSError):
                s.sendall(b"y")
            held = socket.socket()
            held.settimeout(1)
            with contextlib.suppress(OSError):
                held.connect((proxy.host, proxy.port))
            proxy.stop()
            held.close()
        proxy.stop()
        assert proxy.counters.open == 0
        with pytest.raises(Closed):
            proxy.forward()
    echo.close()
    echo.connections.clear()
    until(lambda: threading.active_count() < before[0])
    assert len(os.listdir("/proc/self/fd")) < before[1]


def test_what_cannot_be_right_is_refused(proxy: FaultProxy) -> None:
    """Modes, and URLs without a host."""
    for mode in (Mode(bytes=0), Mode(interval_s=0), Mode(delay_s=-1), Mode(kind="slow"), Mode(passes="back")):  # type: ignore[arg-type]
        with pytest.raises(InvalidArgument):
            proxy.set(mode)
    with pytest.raises(InvalidArgument):
        proxy.cut(after_bytes=-1)
    with pytest.raises(InvalidArgument):
        proxy.through("log:somewhere")
    with pytest.raises(InvalidArgument):
        proxy.start()


def test_a_url_through_the_proxy_keeps_everything_else(proxy: FaultProxy) -> None:
    """User, password, path and options stay; several hosts become one."""
    here = f"127.0.0.1:{proxy.port}"
    assert proxy.through("redis://u:p@example:6379/0?wait=1") == f"redis://u:p@{here}/0?wait=1"
    assert proxy.through("nats://a:1,b:2?monitor=3") == f"nats://{here}?monitor=3"
    assert proxy.through("nats://a") == f"nats://{here}"


@pytest.mark.parametrize("run", [run_redis, run_nats])
def test_in_front_of_a_real_server(run: Callable[..., contextlib.AbstractContextManager[LocalServer]]) -> None:
    """Its protocol passes, a partition silences it, and after a cut it is there again."""
    question, greeting = (b"PING\r\n", b"") if run is run_redis else (b"CONNECT {}\r\nPING\r\n", b"INFO")
    with run(own_process=True) as server, FaultProxy("127.0.0.1", server.port) as proxy:
        for _ in range(2):
            with client(proxy) as s:
                if greeting:
                    assert receive(s, 4) == greeting
                    s.recv(65536)
                s.sendall(question)
                until(lambda s=s: b"PONG" in s.recv(65536))  # type: ignore[misc]
                proxy.drop()
                s.sendall(b"PING\r\n")
                assert silent(s)
                proxy.forward()
                with pytest.raises(ConnectionResetError):
                    s.recv(1)
