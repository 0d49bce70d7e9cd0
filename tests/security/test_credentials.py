"""A password is in no error, log line, repr, output or argument list, whatever goes wrong.

The secret stands where users put it (the URL, the environment, a file), the calls succeed and fail in every way we can
arrange, and everything that was said is searched for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import mist
from mist.broker.base import Message
from mist.errors import MistError, NotAuthorised
from mist.kit.local import LocalServer, NatsServer, RedisServer
from mist.testing.proxy import FaultProxy
from mist.testing.servers import run_nats, run_redis
from tests.campaigns.sites import lacking

SECRET = "pw-Zx9Kq7Lm3"
WRONG = "wrong-Tr4Vn8Bc2"
"""A wrong password is a secret too: it is often another service's right one."""
SAID = (SECRET, WRONG)


class Door(NamedTuple):
    """A server that asks who you are. `url(password)` is how one says it."""

    backend: str
    server: LocalServer
    login: str

    def url(self, password: str, *, port: int = 0) -> str:
        scheme, rest = self.server.url.split("://")
        rest = rest.replace(str(self.server.port), str(port), 1) if port else rest
        return f"{scheme}://{self.login.format(password)}@{rest}"


@pytest.fixture(scope="module", params=["nats user", "nats token", "redis password", "redis ACL"])
def door(request: pytest.FixtureRequest) -> Iterator[Door]:
    backend, _, kind = request.param.partition(" ")
    if why := lacking(backend):
        (pytest.fail if os.environ.get("CI") else pytest.skip)(why)
    with contextlib.ExitStack() as stack:
        if backend == "nats":
            who = f"user: tester, password: {SECRET}" if kind == "user" else f"token: {SECRET}"
            server = stack.enter_context(run_nats(own_process=True, extra=f"authorization {{ {who} }}\n"))
            assert isinstance(server, NatsServer)
            yield Door(backend, server, "tester:{}" if kind == "user" else "{}")
            return
        found = stack.enter_context(run_redis(own_process=True))
        assert isinstance(found, RedisServer)
        import socket

        with socket.create_connection(("127.0.0.1", found.port)) as s:
            # not in its arguments: those of the server are seen by `ps` like ours
            user = b"tester" if kind == "ACL" else b"default"
            s.sendall(b"ACL SETUSER %b on resetpass >%b ~* &* +@all\r\n" % (user, SECRET.encode()))
            assert s.recv(100) == b"+OK\r\n"
        found.password = SECRET
        yield Door(backend, found, "tester:{}" if kind == "ACL" else ":{}")


class Said:
    """Everything that was logged, warned, printed or raised in a block."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def error(self, exc: BaseException) -> None:
        self.parts += traceback.format_exception(exc)
        seen: BaseException | None = exc
        while seen is not None:
            self.parts += [str(seen), repr(seen), repr(seen.args), repr(vars(seen))]
            if isinstance(seen, MistError):
                self.parts.append(repr(seen.to_wire()))
            seen = seen.__cause__ or seen.__context__

    def check(self) -> None:
        assert self.parts, "nothing was said: this proves nothing"
        for part in self.parts:
            for secret in SAID:
                assert secret not in part, part.replace(secret, "<<the secret>>")[-1500:]


@pytest.fixture
def said(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Said]:
    """Collects; checks at the end."""
    out = Said()
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(name)s %(message)s %(args)s"))
    root = logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        yield out
    finally:
        root.removeHandler(handler)
        root.setLevel(before)
    captured = capfd.readouterr()
    out.parts += [stream.getvalue(), captured.out, captured.err]
    out.check()


def test_what_a_broker_says_about_itself(door: Door, said: Said) -> None:
    """url, repr and str of broker, stream and consumer, and of everything the stream states."""

    async def main() -> None:
        async with mist.connect(door.url(SECRET)) as broker:
            stream = await broker.open("s")
            await stream.append([Message("a", b"x", "1")])
            consumer = await stream.consumer("c")
            for thing in (broker, stream, consumer, broker.checkpoints, await stream.info(), await consumer.info()):
                said.parts += [repr(thing), str(thing)]
            said.parts += [broker.url, repr(await broker.describe())]
            for call in (lambda: broker.open("no", create=False), lambda: stream.read(after=99)):
                with pytest.raises(MistError) as caught:
                    await call()
                said.error(caught.value)

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_wrong_password_is_refused_without_a_word_of_it(door: Door, said: Said) -> None:
    """NotAuthorised; neither the wrong one nor the right one is told."""

    async def main() -> None:
        with pytest.raises(NotAuthorised) as caught:
            await mist.connect(door.url(WRONG))
        said.error(caught.value)

    asyncio.run(asyncio.wait_for(main(), 60))


def test_servers_that_are_not_there_and_urls_that_cannot_be_right(door: Door, said: Said) -> None:
    """Refused connections, names that do not resolve, unknown parameters, missing hosts and ports out of range."""

    async def main() -> None:
        good = door.url(SECRET)
        scheme, rest = good.split("://")
        login = rest.rpartition("@")[0]
        for url in (
            door.url(SECRET, port=1), f"{scheme}://{login}@nowhere.invalid:1", f"{good}{'&' if '?' in good else '?'}typo=1",
            f"{scheme}://{login}@", f"{scheme}://{login}@host:99999", f"{scheme}://{login}@h:1,h:2/9/9/9",
            f"{scheme}://{login}@[::1", f"{scheme}://{login}/x@127.0.0.1:1", f"{scheme}://{login}?x@127.0.0.1:1",
        ):  # fmt: skip
            with pytest.raises(MistError) as caught:
                await mist.connect(url)
            said.error(caught.value)

    asyncio.run(asyncio.wait_for(main(), 100))


def test_a_connection_that_breaks_under_calls(door: Door, said: Said) -> None:
    """Cut, refused and silent while appends, reads and fetches run: every error and log line of it."""

    async def main() -> None:
        with FaultProxy("127.0.0.1", door.server.port) as proxy:
            async with mist.connect(proxy.through(door.url(SECRET))) as broker:
                stream = await broker.open("broken")
                consumer = await stream.consumer("c")
                for fault in (proxy.cut, proxy.refuse):
                    fault()
                    proxy.cut()
                    for i in range(2):
                        for call in (
                            stream.append([Message("a", b"x", f"{fault.__name__}{i}")]), stream.read(wait_s=0.01),
                            consumer.fetch(wait_s=0.01), broker.ping(),
                        ):  # fmt: skip
                            try:
                                async with asyncio.timeout(0.5):
                                    await call
                            except (MistError, TimeoutError) as exc:
                                said.error(exc)
                proxy.forward()

    asyncio.run(asyncio.wait_for(main(), 100))


def _mist(door: Door, *argv: str, password: str = SECRET, port: int = 0) -> str:
    env = {**os.environ, "MIST_URL": door.url(password, port=port), "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "mist", *argv], env=env, capture_output=True, text=True, timeout=60,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return done.stdout + done.stderr


def test_the_command_line(door: Door, said: Said) -> None:
    """What `mist` prints, when all is well and when it is not, in text and in JSON."""
    if door.login != "tester:{}":
        pytest.skip("the same code as with a user's name")
    for argv in (("doctor",), ("tail", "nothing"), ("config", "show"), ("stream", "ls", "--json")):
        said.parts.append(_mist(door, *argv))
    said.parts.append(_mist(door, "ping", password=WRONG))
    said.parts.append(_mist(door, "doctor", "--json", password=WRONG))
    said.parts.append(_mist(door, "stream", "ls", port=1))


class Arguments:
    """Watches the arguments of this process's descendants, as `ps` shows them."""

    def __init__(self) -> None:
        self.seen: dict[str, str] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Arguments:
        self._thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            todo = _children(os.getpid())
            while todo:
                pid = todo.pop()
                todo += _children(pid)
                with contextlib.suppress(OSError):
                    line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    self.seen[f"{pid} {line[:4000]}"] = line


def _children(pid: int) -> list[int]:
    """The processes that a process has started and that are there, whichever of its threads it was."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, path.read_text().split())
    return found


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_process_carries_it_in_its_arguments(door: Door, said: Said, tmp_path: Path) -> None:
    """`mist demo` starts workers, an eval and more: the URL with its password reaches them another way."""
    if door.login != "tester:{}":
        pytest.skip("the same code as with a user's name")
    command = [sys.executable, "-m", "mist", "demo", "--spans", "400", "--questions", "30"]
    with Arguments() as arguments:
        env = {**os.environ, "MIST_URL": door.url(SECRET), "NO_COLOR": "1", "HOME": str(tmp_path)}
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=110, cwd=tmp_path, stdin=subprocess.DEVNULL
        )
        time.sleep(0.05)
    said.parts += [done.stdout, done.stderr, *arguments.seen]
    assert done.returncode == 0, (done.stdout + done.stderr).replace(SECRET, "***")
    assert any("mist" in line for line in arguments.seen)
