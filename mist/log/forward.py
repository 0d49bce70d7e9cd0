"""The forwarder of a spool: every stream's records to the broker behind, in order, each once.

One process forwards, whoever gets the lock; the others look again every half second, so that one that ends or is killed is
replaced. How far a stream was forwarded is a checkpoint of the spool's own log. After a kill the records behind it may be
at the broker or not: their ids tell, while the broker still knows them, and else a look at what it holds (mist.broker.feed).
A record without an id gets one, made from the spool's incarnation and the record's sequence: the same at every try.

Nothing but the broker's own answer removes a record: while it is away, refuses the connection or is full, all waits here.
What it will never take (too large, a subject that its stream does not have) becomes a dead letter of the spool.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from mist.broker.backoff import Backoff
from mist.broker.base import Broker, Message, Record
from mist.broker.clock import SYSTEM
from mist.broker.deadletter import bury, dead_letter
from mist.broker.feed import REFUSED, Feed, Place, Places
from mist.broker.patience import Patience
from mist.errors import DataLoss, Internal, MistError, NotFound, SequenceExpired
from mist.log.broker import LogBroker, LogStream
from mist.log.spooldir import SpoolDirectory
from mist.protocol.subject import DEAD

KEY = "forwarded"
"""The checkpoint's name."""
PAGE = 1000
LOOK_EVERY_S = 0.5
SAVE_EVERY_S = 0.5
TRIM_EVERY_S = 1.0
KEEP_RECORDS = 10_000
KEEP_BYTES = 64 * 1024 * 1024
"""Forwarded records stay that long, while the spool is small: their ids tell a publisher's repeat after a restart,
whatever the broker behind still knows."""
SPOOL = "spool"
_BACKOFF = Backoff(first_s=0.1, most_s=5.0)
_DEAD = f"--{DEAD}"


class Forwarder:
    """`run` forwards until it is cancelled; `stop` lets it finish what it is doing first."""

    def __init__(
        self, log: LogBroker, spool: SpoolDirectory, connect: Callable[[], Awaitable[Broker]], name: str
    ) -> None:
        self.log = log
        self.spool = spool
        self.positions: dict[str, int] = {}
        """Per stream, everything up to it was forwarded: only in the process that forwards."""
        self.ours = False
        """Whether this process is the one that forwards."""
        self.error = ""
        """Why it does not get on."""
        self._connect = connect
        self._name = name
        self._broker: Broker | None = None
        self._connecting = asyncio.Lock()
        self._busy = 0
        self._savers: dict[str, Callable[[], Awaitable[None]]] = {}
        self._stopping = False
        self._streams: set[str] = set()
        self._looked = asyncio.Event()

    def look(self) -> None:
        """There may be a new stream."""
        self._looked.set()

    async def stop(self, within_s: float) -> None:
        """Begin no new batch, wait for the one under way, and note how far it went."""
        self._stopping = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while self._busy:
                    await asyncio.sleep(0.005)
                for save in list(self._savers.values()):
                    await save()

    async def run(self) -> None:
        try:
            while not self._take():
                await asyncio.sleep(LOOK_EVERY_S)
            self.ours = True
            self._say("", always=True)
            await self._forward()
        finally:
            self.ours = False
            broker, self._broker = self._broker, None
            if broker is not None:
                await broker.aclose()
            self.spool.release()

    async def _forward(self) -> None:
        async with asyncio.TaskGroup() as group:
            while True:
                self._looked.clear()
                for name in await self.log.streams():
                    if name not in self._streams and not name.endswith(_DEAD):
                        self._streams.add(name)
                        group.create_task(self._keep_on(name))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_EVERY_S):
                        await self._looked.wait()

    async def _keep_on(self, name: str) -> None:
        """Forward one stream, and begin again from the last saved place after whatever went wrong."""
        failures = 0
        while not self._stopping:
            begun = self.positions.get(name, 0)
            try:
                await self._stream(name)
                return
            except NotFound as exc:
                if name not in await self.log.streams():
                    self._streams.discard(name)  # somebody removed it here
                    return
                error: MistError = exc
            except MistError as exc:
                error = exc
            except Exception as exc:  # a bug below must not stop what waits for ever
                error = Internal(f"spool: forwarding {name}: {exc!r}")
            failures = failures + 1 if self.positions.get(name, 0) == begun else 1
            self._say(f"{name}: {error}")
            await asyncio.sleep(_BACKOFF.delay_s(failures))

    def _take(self) -> bool:
        try:
            return self.spool.take()
        except MistError as exc:  # for example a full disk: looked at again
            self.error = str(exc)
            return False

    def _say(self, error: str, *, always: bool = False) -> None:
        if always or error != self.error:
            self.error = error
            with contextlib.suppress(MistError):  # a full disk: what is said is not what matters
                self.spool.say(error)

    async def _reach(self, patience: Patience) -> Broker:
        """The broker behind, connected to once for all streams."""
        async with self._connecting:
            if self._broker is None:
                self._broker = await patience(self._connect)
            return self._broker

    async def _stream(self, name: str) -> None:
        source = await self.log.open(name, create=False)
        places = Places(self.log.checkpoints, name)
        patience = _Telling(self)
        broker = await self._reach(patience)
        target = await patience(lambda: broker.open(name))
        self.spool.learn_size(target.size_bytes_max)
        refused: list[tuple[Message, MistError]] = []
        feed = Feed(target, patience, on_refused=lambda m, e: refused.append((m, e)))
        place = await places.load(KEY)
        if place is None or place.incarnation != source.incarnation:
            place = None
        saved_ns = await places.saved_ns(KEY)
        await feed.begin(place, idle_s=max(0.0, (SYSTEM.time_ns() - saved_ns) / 1e9) if place else None)
        self._say("")
        await self._feed(name, source, places, place, feed, refused)

    async def _feed(
        self,
        name: str,
        source: LogStream,
        places: Places,
        place: Place | None,
        feed: Feed,
        refused: list[tuple[Message, MistError]],
    ) -> None:
        loop = asyncio.get_running_loop()
        position = place.sequence if place is not None else 0
        saved, trimmed = (position if place is not None else -1), position
        next_save = next_trim = 0.0
        target = feed.stream.incarnation

        async def save() -> None:
            nonlocal saved
            if position != saved:
                at = position
                await places.save(KEY, Place(source.incarnation, at, feed.at, target))
                saved = at

        self._savers[name] = save
        while True:
            now = loop.time()
            if position != saved and now >= next_save:  # the first time before anything goes over
                await save()
                next_save = now + SAVE_EVERY_S
            self.positions[name] = position
            if saved > trimmed and now >= next_trim:
                before = saved + 1
                if (await source.info()).bytes < KEEP_BYTES:
                    before -= KEEP_RECORDS
                if before > trimmed + 1:
                    await source.trim(before=before)
                trimmed, next_trim = max(trimmed, before - 1), now + TRIM_EVERY_S
            if self._stopping:
                return
            late = saved > trimmed + KEEP_RECORDS
            due = [t - now for t, wanted in ((next_save, position != saved), (next_trim, late)) if wanted]
            try:
                page = await source.read(after=position, limit=PAGE, wait_s=max(0.0, min(due, default=30.0)))
            except SequenceExpired as exc:
                self.spool.add_dropped(name, exc.first - 1 - position)
                position = exc.first - 1
                continue
            except DataLoss as exc:
                self.spool.add_dropped(name, exc.resume_after - position)
                position = exc.resume_after
                continue
            if not page.records:
                position = max(position, page.scanned)
                continue
            self._busy += 1
            try:
                await self._put(name, source, page.records, feed, refused)
                position = page.scanned
                self.positions[name] = position
            finally:
                self._busy -= 1

    async def _put(
        self,
        name: str,
        source: LogStream,
        records: list[Record],
        feed: Feed,
        refused: list[tuple[Message, MistError]],
    ) -> None:
        refused.clear()
        messages = [message_of(r, source.incarnation) for r in records]
        answer = await feed.put(messages)
        if refused:
            why = {id(m): e for m, e in refused}
            letters = [
                dead_letter(
                    record, stream=name, incarnation=source.incarnation, consumer=SPOOL, attempts=1,
                    reason=f"not taken by {self._name}: {why[id(message)].message}",
                )
                for record, message, outcome in zip(records, messages, answer, strict=True)
                if outcome == REFUSED
            ]  # fmt: skip
            await bury(self.log, letters, stream=name)


def message_of(record: Record, incarnation: str) -> Message:
    """What is sent for a record of the spool."""
    return Message(record.subject, record.data, record.id or f"spool-{incarnation}-{record.sequence}", record.headers)


class _Telling(Patience):
    """Patience that notes at the forwarder what it waits for."""

    def __init__(self, forwarder: Forwarder) -> None:
        super().__init__(backoff=_BACKOFF)
        self._forwarder = forwarder

    async def wait(self, error: MistError) -> None:
        self._forwarder._say(str(error))
        await super().wait(error)

    def back(self) -> None:
        self._forwarder._say("")
        super().back()
