"""What one invocation knows: its settings, its output, the brokers it opened.

`current()` gives it to a command function. Brokers opened through it are closed when the command ends. Nothing here
creates a stream or a directory unless `create` says so.
"""

from __future__ import annotations

import shlex
from contextlib import AsyncExitStack
from contextvars import ContextVar
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mist.broker.base import Broker, Stream
from mist.broker.registry import adapter
from mist.cli import render
from mist.cli.manifest import Gap
from mist.cli.render import FORMATS, Output
from mist.cli.settings import Settings
from mist.config import load_config
from mist.errors import InvalidArgument, MistError, NotFound, Unavailable
from mist.protocol.url import Url, has_scheme, parse_url, redact

_current: ContextVar[Session] = ContextVar("mist_session")
STREAMLESS = frozenset({"http", "https", "stdio", "chan"})
REACH_S = 10.0
"""How long a command that then runs long waits for a server at its start."""


class Session:
    """Settings resolved, output ready, brokers on demand. `async with` closes what was opened."""

    def __init__(self, config: Settings, origins: dict[str, str], out: Output, given: dict[str, Any]) -> None:
        self.config = config
        self.origins = origins
        self.out = out
        self.yes = bool(given.get("yes"))
        self.no_input = config.no_input
        self.timeout_s = config.timeout_s or None
        self.exit_code = 0
        self.resume = ""
        self.gaps: list[Gap] = []
        self._stack = AsyncExitStack()
        self._brokers: dict[str, Broker] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    @property
    def url(self) -> Url:
        """The broker's URL: -u, MIST_URL, the selected context, mist.toml, log:.mist."""
        return parse_url(self.config.url)

    def fail_with(self, code: int) -> None:
        """End with this exit code, unless an earlier one was more serious (8 damage, 9 partial, 10 condition)."""
        self.exit_code = self.exit_code or code

    def again(self, command: str) -> str:
        """A command line that goes to the same broker as this one."""
        flag = self.origins.get("url") == "flag"
        return f"mist {f'-u {shlex.quote(self.url.redacted())} ' if flag else ''}{command}"

    def say_resume(self) -> None:
        """Print how to go on, where a command that reads was stopped."""
        if self.resume:
            self.out.note(self.resume)
            self.resume = ""

    async def connect(self, url: Url | None = None, *, create: bool = False) -> Broker:
        """The broker at `url` (default: ours). Raises NotFound when it would have to be made and `create` is off."""
        url = url or self.url
        spool = url.scheme.startswith("spool+")
        key = str(url) if spool else url.without_query()
        broker = self._brokers.get(key)
        if broker is None:
            if url.scheme in STREAMLESS or url.scheme == "file":
                raise _no_broker(url)
            if not create and _absent(url):
                raise NotFound(
                    f"no log in {url.target}",
                    hint="publish something to make one, or name another with -u log:DIR",
                )
            connect = adapter(url.scheme)
            # who only looks at a spool neither makes it nor forwards
            options = {"directory": self.config.spool, "create": create, "forward": create} if spool else {}
            try:
                broker = await connect(url, **options)
            except OSError as exc:
                raise Unavailable(f"cannot reach {url.redacted()}: {exc}", hint="see `mist doctor`") from exc
            self._brokers[key] = broker
            self._stack.push_async_callback(broker.aclose)
        return broker

    async def reach(self, name: str, *, create: bool = False) -> tuple[Broker, Stream]:
        """The stream of that name on our broker, for a command that then runs long: a server that is just restarting
        is waited for, `REACH_S` at most."""
        from mist.broker.patience import again

        async def look() -> tuple[Broker, Stream]:
            broker = await self.connect(create=create)
            return broker, await broker.open(name, create=create)

        said: set[str] = set()

        def tell(error: MistError) -> None:
            if error.message not in said:
                said.add(error.message)
                self.out.note(f"{error.message}; trying again for up to {REACH_S:g} s")

        return await again(look, away_s_max=REACH_S, on_retry=tell)

    async def stream(self, text: str, *, create: bool = False) -> Stream:
        """The stream an argument names: a name on our broker, `URL?stream=NAME`, or `file:PATH`."""
        return (await self.locate(text, create=create))[1]

    async def locate(self, text: str, *, create: bool = False) -> tuple[Broker | None, Stream]:
        """The stream and the broker it lies on (None for a file)."""
        url, name = self.target(text)
        if url.scheme == "file":
            from mist.cli.filestream import FileStream

            if create:
                raise InvalidArgument(f"{url}: a file is read-only here", hint="use copy or export to write one")
            stream = FileStream(url)
            self._stack.callback(stream.close)
            return None, stream
        if not name:
            shown = url.redacted()
            raise InvalidArgument(
                f"{shown}: which stream?", hint=f"write {shown}{'&' if url.query else '?'}stream=NAME"
            )
        broker = await self.connect(url, create=create)
        try:
            opened = await broker.open(name, create=create)
        except NotFound as exc:
            raise await self.no_stream(broker, name) from exc
        if create and url.scheme == "memory":
            self.out.note(f"{url} ends with this command, and what is stored there with it")
        return broker, opened

    def target(self, text: str) -> tuple[Url, str]:
        """URL and stream name of a stream argument; `?stream=` of -u is used when the argument is empty."""
        if has_scheme(text):
            url = parse_url(text)
            if url.scheme in STREAMLESS:
                raise InvalidArgument(
                    f"{url.redacted()}: {url.scheme}: has no stream to look into",
                    hint="use `mist relay` for transports",
                )
            return url, url.get("stream")
        return self.url, text or self.url.get("stream")

    async def no_stream(self, broker: Broker, name: str) -> NotFound:
        """The sentence for a stream that is not there: what is there instead."""
        from difflib import get_close_matches

        names = await broker.streams()
        shown = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
        there = (
            f"{len(names)} stream{'s' * (len(names) != 1)} there: {shown}" if names else "there are no streams there"
        )
        near = get_close_matches(name, names, n=1)
        return NotFound(
            f"no stream {name} in {redact(broker.url)}; {there}", hint=f"did you mean {near[0]}?" if near else ""
        )

    def confirm(self, what: str) -> None:
        """Ask once before something is destroyed. Raises Refused when nobody may or does say yes."""
        from mist.errors import Refused

        if self.yes:
            return
        if self.no_input or not self.out.can_ask:
            raise Refused(f"{what}: not confirmed", hint="add -y to do it, --dry-run to see what would be done")
        if not self.out.ask(f"{what}?"):
            raise Refused(f"{what}: not confirmed")


def _absent(url: Url) -> bool:
    """Whether opening this URL would make something new on disk. A file in its place is the adapter's to refuse."""
    if url.scheme != "log" or not url.target or Path(url.target).is_file():
        return False
    return not (Path(url.target) / "streams").is_dir()


def _no_broker(url: Url) -> InvalidArgument:
    """The sentence for a transport's URL where a broker's is wanted."""
    if url.scheme == "file":
        return InvalidArgument(
            f"{url}: is one file, not a broker", hint=f"name it as the stream: `mist tail {shlex.quote(str(url))}`"
        )
    return InvalidArgument(
        f"{url.redacted()}: {url.scheme}: keeps no streams", hint="`mist relay` and `mist ping` take such a URL"
    )


def start(given: dict[str, Any]) -> Session:
    """Make the session of this invocation from the global options that were given, and set it as current."""
    wanted = given.get("format")
    if given.get("json"):
        wanted = "json"
    if wanted is not None and wanted not in FORMATS:
        raise InvalidArgument(f"no format {wanted!r}", hint=f"one of {', '.join(FORMATS)}")
    timeout = given.get("timeout")
    flags: dict[str, Any] = {
        "url": given.get("url"),
        "format": wanted,
        "timeout_s": _seconds(timeout) if timeout is not None else None,
        "no_input": True if given.get("no_input") else None,
        "quiet": True if given.get("quiet") else None,
        "verbose": True if given.get("verbose") else None,
    }
    loaded = load_config({k: v for k, v in flags.items() if v is not None}, schema=Settings)
    config = loaded.value
    out = Output(format=config.format, quiet=config.quiet, verbose=config.verbose, pager=config.pager)
    render.active = out
    session = Session(config, loaded.origins, out, given)
    _current.set(session)
    return session


def _seconds(value: Any) -> float:
    try:
        seconds = float(value)
    except ValueError:
        raise InvalidArgument(
            f"--timeout {value!r} is not a number of seconds", hint="for example --timeout 30"
        ) from None
    if not 0 < seconds < 1e9:
        raise InvalidArgument(f"--timeout {value} cannot be right", hint="a positive number of seconds")
    return seconds


def current() -> Session:
    """The session of the running command."""
    return _current.get()


def message_of(exc: BaseException) -> str:
    """One line for an error: its message and hint."""
    return str(exc) if isinstance(exc, MistError) else f"{exc.__class__.__name__}: {exc}"
