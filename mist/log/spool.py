"""`spool+URL` — a log in front of a broker: publishing goes on, durably, while the broker is away.

    spool+nats://host:4222?spool=DIR        spool+redis://host/0        any broker's URL behind `spool+`

Promises
- An append returns when the records are durable *here* (a local log, fdatasync: they survive a power cut of this machine,
  not the loss of its disk). They are forwarded in order, in the background, by one of the processes that have the spool
  open, and stay here until the broker behind has them, as durably as its stream promises.
- Each record arrives once: ids are kept, and after a crash the forwarder finds out what arrived (forward.py).
- The sequence an append returns is the spool's: it names the record here, and says nothing about the one at the broker.
- Bounded: above `spool_bytes` per stream (1 GiB) an append raises StorageFull; with `spool_full=drop_oldest` the oldest
  records that wait are dropped instead, and counted.
- `aclose` waits up to `spool_drain` seconds (2) for what is waiting, while the broker takes it; the rest stays for whoever
  opens the spool next, or `mist spool flush`.

Does not: read. A stream here is for publishing; reading, consumers, positions and trims go to the broker behind, and are
refused here as capabilities that are not declared. ADR 13 says why.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal, NoReturn

from msgspec.structs import asdict

from mist.broker.base import (
    ALL,
    BYTES_MAX,
    Broker,
    Capabilities,
    Checkpoint,
    Checkpoints,
    Consumer,
    ConsumerConfig,
    Fact,
    Message,
    Page,
    Stream,
    StreamConfig,
    StreamInfo,
    Verification,
    check_messages,
)
from mist.broker.clock import SYSTEM
from mist.broker.feed import Places
from mist.broker.registry import adapter
from mist.errors import (
    Closed,
    DataLoss,
    InvalidArgument,
    MistError,
    NotFound,
    SequenceExpired,
    StorageFull,
    Unsupported,
)
from mist.log.broker import LogBroker, LogStream
from mist.log.broker import connect as connect_log
from mist.log.forward import KEY, Forwarder
from mist.log.spooldir import Figures, SpoolDirectory, behind
from mist.log.spooldir import directory as place_of
from mist.protocol.subject import DEAD, check_stream, dead_stream
from mist.protocol.url import Url

CAPABILITIES = Capabilities(
    persistent=True, processes=True, threads=True, read=False, conditional_append=False, consumers=False, pending=False,
    checkpoints=False, trim=False, locate=False, retention=False, delete=False,
)  # fmt: skip
FULL_BYTES = 1024**3
SEGMENT_BYTES = 8 * 1024 * 1024
DRAIN_S = 2.0
STOP_S = 1.0
LOOK_S = 5.0


async def connect(
    url: Url, *, directory: str = "", forward: bool = True, create: bool = True, log: dict[str, Any] | None = None,
    **options: Any,
) -> SpoolBroker:  # fmt: skip
    """The adapter's door. `directory` is where spools are kept when the URL does not say; `forward=False` only looks, or
    leaves forwarding to others; `log` are options of the log, all others those of the broker behind, which need not
    be there.

    Raises InvalidArgument, NotFound (no spool there, not `create`), Conflict (the spool of another broker).
    """
    inner = behind(url)
    reach = adapter(inner.scheme)  # a scheme nobody knows, or a missing package, shows now
    config = StreamConfig(
        durability="power", bytes_max=_number(url, "spool_bytes", FULL_BYTES), full=_full(url),
        segment_bytes=SEGMENT_BYTES,
    )  # fmt: skip
    drain_s = float(_number(url, "spool_drain", DRAIN_S))
    path = place_of(url, directory)
    found = SpoolDirectory(path)
    opened = await connect_log(Url("log", str(path)), create=create, **(log or {}))
    try:
        if create or found.destination() is not None:
            found.belong_to(inner)
        return SpoolBroker(
            url.redacted(),
            inner,
            opened,
            found,
            config,
            lambda: reach(inner, **options),
            drain_s=drain_s,
            forward=forward,
        )
    except BaseException:
        await opened.aclose()
        raise


def _number(url: Url, key: str, default: float) -> int:
    text = url.get(key)
    if not text:
        return int(default)
    if not (text.isascii() and text.isdigit()):
        raise InvalidArgument(f"{url.redacted()}: {key}={text[:20]!r} is not a number")
    return int(text)


def _full(url: Url) -> Literal["drop_oldest", "refuse"]:
    match url.get("spool_full", "refuse"):
        case "refuse":
            return "refuse"
        case "drop_oldest":
            return "drop_oldest"
        case other:
            raise InvalidArgument(f"{url.redacted()}: spool_full={other[:20]!r}", hint="refuse or drop_oldest")


class SpoolInfo(StreamInfo, frozen=True, kw_only=True):
    """What waits here: `first`, `last`, `records` and `bytes` are of the spool."""

    destination: str
    figures: Figures


class SpoolBroker(Broker):
    backend = "spool"
    capabilities = CAPABILITIES

    def __init__(
        self,
        url: str,
        inner: Url,
        log: LogBroker,
        spool: SpoolDirectory,
        config: StreamConfig,
        reach: Callable[[], Awaitable[Broker]],
        *,
        drain_s: float,
        forward: bool,
    ) -> None:
        self.url = url
        self.destination = inner.redacted()
        self.log = log
        self.spool = spool
        self.config = config
        self.drain_s = drain_s
        self._reach = reach
        self._closed = False
        self._checkpoints = _NoCheckpoints(self)
        self._streams: dict[str, SpoolStream] = {}
        self.forwarder = Forwarder(log, spool, reach, self.destination)
        self._forwarding = asyncio.get_running_loop().create_task(self.forwarder.run()) if forward else None

    def check_open(self) -> None:
        if self._closed:
            raise Closed("the broker is closed")

    def refuse(self, capability: str) -> NoReturn:
        raise Unsupported(capability, "a spool", hint=f"go to the broker behind it: {self.destination}")

    async def open(self, name: str, *, create: bool = True, config: StreamConfig | None = None) -> SpoolStream:
        self.check_open()
        check_stream(name)
        if name.endswith(f"--{DEAD}"):
            raise InvalidArgument(
                f"{name}: dead letters of a spool are its own", hint=f"they lie in log:{self.spool.path}?stream={name}"
            )
        asked = (config or StreamConfig()).validate()
        if asked.age_s_max or asked.bytes_max or asked.records_max:
            self.refuse("retention")
        if (
            any(v is not None for k, v in asdict(asked).items() if k != "durability")
            or asked.durability == "replicated"
        ):
            raise InvalidArgument(
                f"stream {name}: a spool cannot set up the stream behind it",
                hint=f"make it at {self.destination} first",
            )
        stream = await self.log.open(name, create=create, config=self.config if create else None)
        found = self._streams.get(name)
        if found is None or found.stream is not stream:
            found = self._streams[name] = SpoolStream(self, stream)
        self.forwarder.look()
        return found

    async def streams(self) -> list[str]:
        self.check_open()
        return [n for n in await self.log.streams() if not n.endswith(f"--{DEAD}")]

    async def delete(self, name: str) -> None:
        self.check_open()
        self.refuse("delete")

    async def ping(self) -> float:
        self.check_open()
        return await self.log.ping()

    async def describe(self) -> list[Fact]:
        self.check_open()
        out = [Fact("spool", f"{self.spool.path}, for {self.destination}")]
        running = self.spool.forwarding()
        if running is None:
            out.append(await self._look_behind())
            waits = sum([f.waiting for f in await self.figures()])
            warning = f"{waits:,} records wait: `mist spool flush` forwards them" if waits else ""
            out.append(Fact("forwarding", "no process has this spool open for publishing", warning))
        else:
            out.append(Fact("forwarding", f"process {running.pid}", running.error))
        return out

    async def _look_behind(self) -> Fact:
        """Whether the broker behind can be reached, where no process tells."""
        try:
            async with asyncio.timeout(LOOK_S):
                broker = await self._reach()
                try:
                    return Fact("behind", f"{self.destination}, {await broker.ping() * 1000:.1f} ms")
                finally:
                    await broker.aclose()
        except (MistError, TimeoutError) as exc:
            return Fact("behind", self.destination, str(exc) or f"no answer within {LOOK_S:g} s")

    async def figures(self) -> list[Figures]:
        """One per stream."""
        return [await self.figures_of(await self.log.open(name, create=False)) for name in await self.streams()]

    async def figures_of(self, stream: LogStream) -> Figures:
        info = await stream.info()
        position = info.first - 1
        place = await Places(self.log.checkpoints, stream.name).load(KEY)
        if place is not None and place.incarnation == stream.incarnation:
            position = max(position, place.sequence)
        if self.forwarder.ours:
            position = max(position, self.forwarder.positions.get(stream.name, 0))
        waiting = max(0, info.last - position)
        dropped = self.spool.dropped().get(stream.name, 0)
        refused = await self._refused(stream.name)
        return Figures(
            stream=stream.name, waiting=waiting, bytes=info.bytes if waiting else 0,
            lag_s=await self._age_s(stream, position) if waiting else 0.0,
            forwarded=max(0, info.last - waiting - refused - dropped), refused=refused, dropped=dropped,
        )  # fmt: skip

    async def _age_s(self, stream: LogStream, position: int) -> float:
        try:
            page = await stream.read(after=position, limit=1)
        except (SequenceExpired, DataLoss):
            return 0.0  # what is oldest is just going, or cannot be read
        return max(0.0, (SYSTEM.time_ns() - page.records[0].timestamp_ns) / 1e9) if page.records else 0.0

    async def _refused(self, name: str) -> int:
        try:
            dead = await self.log.open(dead_stream(name), create=False)
        except (NotFound, InvalidArgument):
            return 0
        return (await dead.info()).last

    async def waiting(self) -> int:
        """How many records are here and not yet at the broker behind."""
        return sum([f.waiting for f in await self.figures()])

    async def flush(self) -> None:
        """Return when nothing waits. Has no end of its own while the broker behind is away: bound it with a timeout."""
        self.check_open()
        while await self.waiting():
            await asyncio.sleep(0.05)
            self.check_open()

    @property
    def checkpoints(self) -> Checkpoints:
        return self._checkpoints

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        task = self._forwarding
        try:
            if task is not None:
                await self._drain()
                await self.forwarder.stop(STOP_S)
        finally:
            if task is not None:
                task.cancel()
                await asyncio.wait({task})
                if (
                    not task.cancelled()
                    and (error := task.exception()) is not None
                    and not isinstance(error, MistError)
                ):
                    raise error
            await self.log.aclose()

    async def _drain(self) -> None:
        """Give what waits a moment, while it gets on."""
        with contextlib.suppress(TimeoutError, MistError):  # it is kept here, whatever happens now
            async with asyncio.timeout(self.drain_s):
                while not self.forwarder.error and not (self._forwarding and self._forwarding.done()):
                    if not sum([(await self.figures_of(s.stream)).waiting for s in self._streams.values()]):
                        return
                    await asyncio.sleep(0.01)


class SpoolStream(Stream):
    def __init__(self, broker: SpoolBroker, stream: LogStream) -> None:
        self.broker = broker
        self.stream = stream
        self.name = stream.name
        self.incarnation = stream.incarnation
        known = broker.spool.destination()
        self._size = min(stream.size_bytes_max, known.size_bytes_max if known and known.size_bytes_max else 1 << 62)

    @property
    def size_bytes_max(self) -> int:  # type: ignore[override]
        """Of the broker behind as far as it is known, else of a log."""
        return self._size

    async def append(self, messages: Sequence[Message], *, expected_last: int | None = None) -> list[int]:
        self.broker.check_open()
        if expected_last is not None:
            self.broker.refuse("conditional_append")
        if messages:
            check_messages(messages, self._size)
        try:
            try:
                return await self.stream.append(messages)
            except StorageFull:
                if not await self._let_go():
                    raise
                return await self.stream.append(messages)
        except StorageFull as exc:
            raise StorageFull(
                f"the spool of stream {self.name} is full ({exc.message})",
                hint=f"{self.broker.destination} has to take what waits; `mist spool status` says why it does not",
            ) from exc

    async def _let_go(self) -> int:
        """Remove what was forwarded since the last trim. How many records went."""
        place = await Places(self.broker.log.checkpoints, self.name).load(KEY)
        if place is None or place.incarnation != self.incarnation:
            return 0
        return await self.stream.trim(before=place.sequence + 1)

    async def info(self) -> SpoolInfo:
        self.broker.check_open()
        info = await self.stream.info()
        figures = await self.broker.figures_of(self.stream)
        warnings = list(info.warnings)
        running = self.broker.spool.forwarding()
        if figures.waiting:
            why = "no process forwards" if running is None else running.error or "being forwarded"
            warnings.append(f"{figures.waiting:,} records wait here, the oldest for {figures.lag_s:.1f} s: {why}")
        if figures.refused:
            where = f"log:{self.broker.spool.path}?stream={dead_stream(self.name)}"
            warnings.append(f"{figures.refused:,} records were not taken by {self.broker.destination}: see {where}")
        if figures.dropped:
            warnings.append(f"{figures.dropped:,} records were dropped before they could be forwarded")
        return SpoolInfo(
            name=self.name, incarnation=self.incarnation, first=info.last - figures.waiting + 1, last=info.last,
            records=figures.waiting, bytes=figures.bytes, durability=info.durability, capabilities=CAPABILITIES,
            config=info.config, created_ns=info.created_ns, size_bytes_max=self._size, warnings=tuple(warnings),
            destination=self.broker.destination, figures=figures,
        )  # fmt: skip

    def _refuse(self, capability: str) -> NoReturn:
        self.broker.check_open()
        self.broker.refuse(capability)

    async def read(
        self,
        *,
        after: int = 0,
        subjects: Sequence[str] = ALL,
        limit: int = 256,
        bytes_max: int = BYTES_MAX,
        wait_s: float = 0.0,
    ) -> Page:
        self._refuse("read")

    async def locate(self, time_ns: int) -> int:
        self._refuse("locate")

    async def trim(self, *, before: int) -> int:
        self._refuse("trim")

    async def verify(self) -> Verification:
        self._refuse("verify")

    async def consumer(self, name: str, config: ConsumerConfig | None = None, *, create: bool = True) -> Consumer:
        self._refuse("consumers")

    async def consumers(self) -> list[str]:
        self._refuse("consumers")


class _NoCheckpoints(Checkpoints):
    def __init__(self, broker: SpoolBroker) -> None:
        self._broker = broker

    def _refuse(self) -> NoReturn:
        self._broker.check_open()
        self._broker.refuse("checkpoints")

    async def save(self, checkpoint: Checkpoint, *, force: bool = False) -> Checkpoint:
        self._refuse()

    async def load(self, stream: str, name: str) -> Checkpoint | None:
        self._refuse()

    async def delete(self, stream: str, name: str) -> bool:
        self._refuse()

    async def list(self, stream: str = "") -> list[Checkpoint]:
        self._refuse()
