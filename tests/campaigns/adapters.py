"""C31b, the bug bank of the adapters: each broken on purpose, one way at a time, on a real server. Every bug must be caught.

The checks are small campaigns in one process: producers whose answers get lost and whose server is killed, savers of
checkpoints, workers that give back, refuse and forget, cursors that meet a gap or an error. They must pass on the adapters as
they are. A bug that nothing catches says that a check is missing.
"""

from __future__ import annotations

import asyncio
import importlib
import random
import secrets
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, aclosing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from mist.broker.base import Broker, Checkpoint, Checkpoints, Consumer, ConsumerConfig, Delivery, Message, Page, Stream
from mist.broker.checkpoint import check_advance
from mist.broker.cursor import Cursor
from mist.broker.deadletter import SEQUENCE
from mist.broker.registry import connect
from mist.errors import MistError, NotFound, SequenceExpired, Unavailable
from mist.testing.history import Checker, Recorder
from mist.testing.proxy import FaultProxy

from . import recording as rec
from .campaign import Report, Trial
from .sites import Site, lacking, site

KINDS = ("nats", "redis")


class Place(NamedTuple):
    """A server, a proxy before it, and a directory for histories."""

    site: Site
    proxy: FaultProxy
    folder: Path

    @property
    def through(self) -> str:
        return self.proxy.through(self.site.url)

    def name(self) -> str:
        return f"s{secrets.token_hex(4)}"


Check = Callable[[Place, int], Awaitable[None]]


def judge(folder: Path, **options: bool) -> None:
    """Raise AssertionError for what a history says was broken."""
    checker = Checker(remote=True, **options)
    checker.add_files(sorted(folder.glob("*.jsonl")))
    verdict = checker.check()
    assert verdict.ok, str(verdict)


@contextmanager
def recorder(folder: Path, name: str) -> Iterator[Recorder]:
    found = Recorder(folder / f"{name}.jsonl")
    try:
        yield found
    finally:
        found.close()


# -- the checks -------------------------------------------------------------------------------------------------------


async def producers(place: Place, seed: int) -> None:
    """Appends whose answers are lost, whose connection is cut and whose server is killed; a follower beside them."""
    rng = random.Random(seed)
    name = place.name()
    with ExitStack() as files, tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        over = asyncio.Event()
        async with connect(place.through) as broker, connect(place.site.url) as direct:
            stream = await broker.open(name)

            async def lane(number: int) -> None:
                mine = rec.Lane(files.enter_context(recorder(folder, f"p{number}")), stream, f"p{number}", size=100)
                while not over.is_set() or mine.open:
                    if await mine.append(rng.randint(1, 10)):
                        await asyncio.sleep(0.01)

            async def follow() -> None:
                after, log = 0, files.enter_context(recorder(folder, "f"))
                watched = await direct.open(name)
                while not over.is_set():
                    asked = after
                    after = await rec.read(log, watched, "f", after=after, limit=rng.choice((3, 50)), wait_s=0.02)
                    await asyncio.sleep(0.01 if after == asked else 0)

            async def once() -> None:
                """Never repeats: what was refused must not be there."""
                log, number = files.enter_context(recorder(folder, "x")), 0
                while not over.is_set():
                    number += 1
                    await rec.Lane(log, stream, f"x{number}", size=50).append(2)
                    await asyncio.sleep(0.002)

            async with asyncio.TaskGroup() as group:
                for i in range(3):
                    group.create_task(lane(i))
                group.create_task(follow())
                group.create_task(once())
                await asyncio.sleep(0.1)
                place.proxy.one_way("up")
                await asyncio.sleep(0.05)
                place.proxy.forward()
                await asyncio.sleep(0.15)
                place.proxy.cut(after_bytes=rng.randint(1, 500))
                await asyncio.sleep(0.15)
                await asyncio.to_thread(place.site.server.kill)
                await asyncio.to_thread(place.site.server.start)
                await asyncio.sleep(0.15)
                over.set()
        async with connect(place.site.url) as broker:
            await rec.read_all(files.enter_context(recorder(folder, "end")), await broker.open(name), "end")
        judge(folder)


async def savers(place: Place, seed: int) -> None:
    """Two connections save rising positions under one name as fast as they can, and load."""
    name = place.name()
    rng = random.Random(seed)
    with ExitStack() as files, tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        position = [0]

        async def save(number: int) -> None:
            log = files.enter_context(recorder(folder, f"s{number}"))
            async with connect(place.site.url) as broker:
                stream = await broker.open(name)
                for _ in range(40):
                    position[0] += rng.randint(0, 2)
                    at = Checkpoint(stream=name, name="n", incarnation=stream.incarnation, sequence=position[0])
                    await rec.save(log, broker.checkpoints, at)
                    if rng.random() < 0.5:
                        await rec.load(log, broker.checkpoints, name, "n")

        async with connect(place.site.url) as broker:
            await broker.open(name)
        async with asyncio.TaskGroup() as group:
            for i in range(4):
                group.create_task(save(i))
        judge(folder)


async def workers(place: Place, seed: int) -> None:
    """Two workers ack, give back, refuse and forget; all is settled in the end, the dead letters are what they should be."""
    name = place.name()
    rng = random.Random(seed)
    config = ConsumerConfig(ack_wait_s=0.25, attempts_max=3)
    with ExitStack() as files, tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        async with connect(place.site.url) as broker:
            stream = await broker.open(name)
            lane = rec.Lane(files.enter_context(recorder(folder, "p")), stream, "p", size=50)
            await lane.append(60)
            await stream.consumer("c", config)
        until = time.monotonic() + 30

        async def work(number: int) -> None:
            log = files.enter_context(recorder(folder, f"w{number}"))
            async with connect(place.site.url) as broker:
                consumer = await (await broker.open(name)).consumer("c", config)
                mine = rec.Work(log, consumer)
                while True:
                    deliveries, _ = await mine.fetch(limit=rng.randint(1, 12), wait_s=0.05)
                    for how in ("ack", "nak", "term"):
                        some = [d for d in deliveries if _fate(d) == how]
                        await mine.settle(how, some, **({"reason": "poison"} if how == "term" else {}))
                    if rng.random() < 0.3:
                        await mine.look()
                    if not deliveries and not (await consumer.info()).lag:
                        return
                    assert time.monotonic() < until, f"work is left: {await consumer.info()}"

        async with asyncio.TaskGroup() as group:
            for i in range(2):
                group.create_task(work(i))
        with recorder(folder, "end") as log:
            async with connect(place.site.url) as broker:
                stream = await broker.open(name)
                await rec.read_all(log, stream, "end")
                await asyncio.sleep(config.ack_wait_s + 0.1)
                again = rec.Work(log, await stream.consumer("c", config))
                late, _ = await again.fetch(limit=100, wait_s=0.1)  # what was settled never comes back
                await again.settle("ack", late)
                await again.look(final=True)
                try:
                    dead = await rec.record_dead(log, await broker.open(f"{name}--dead", create=False))
                except NotFound:
                    dead = []
                want = [s for s in range(1, 61) if s % 20 in (1, 2, 3)]
                found = sorted(int(dict(r.headers)[SEQUENCE]) for r in dead)
                assert found == want, f"dead letters are {found}, they should be {want}"
        judge(folder)


def _fate(d: Delivery) -> str:
    """By sequence: most are acked, some once given back or forgotten first, three of twenty never."""
    kind = d.record.sequence % 20
    if kind == 1:
        return "term"
    if kind == 2 or (kind == 4 and d.attempt == 1):
        return "nak"
    return "forget" if kind == 3 or (kind == 5 and d.attempt == 1) else "ack"


async def a_letter_stays(place: Place, seed: int) -> None:
    """When `term` has returned, the dead letter is there, whatever becomes of the process."""
    name = place.name()
    async with connect(place.site.url) as broker:
        stream = await broker.open(name)
        await stream.append([Message("a", b"x", "1")])
        consumer = await stream.consumer("c", ConsumerConfig(ack_wait_s=0.2))
        await consumer.term(await consumer.fetch(wait_s=2), reason="poison")
        async with connect(place.site.url) as other:
            page = await (await other.open(f"{name}--dead")).read(limit=10)
            left = (await (await other.open(name)).consumer("c")).info
            assert page.records or (await left()).lag, "the record is neither pending nor a dead letter"


async def cursors(place: Place, seed: int) -> None:
    """A record whose handling failed comes again; a gap is raised."""
    name = place.name()
    async with connect(place.site.url) as broker:
        stream = await broker.open(name)
        await stream.append([Message("a", b"%d" % i, f"{i}") for i in range(20)])
        handled: list[int] = []
        for failing in (6, 0):
            cursor = await Cursor.open(stream, checkpoints=broker.checkpoints, name="n", limit=4)
            try:
                async with asyncio.timeout(10), aclosing(cursor.replay()) as records:
                    async for record in records:
                        if record.sequence == failing:
                            raise ZeroDivisionError
                        handled.append(record.sequence)
                        if record.sequence == 10:
                            break
            except ZeroDivisionError:
                pass
            finally:
                await cursor.aclose()
        assert sorted(set(handled)) == list(range(1, 11)), f"handled {handled}"
        await stream.trim(before=16)
        cursor = await Cursor.open(stream, checkpoints=broker.checkpoints, name="n")
        try:
            async for record in cursor.replay():
                raise AssertionError(f"record {record.sequence} came without a word about the gap before it")
        except SequenceExpired:
            return
        finally:
            await cursor.aclose()


CHECKS: tuple[Check, ...] = (producers, savers, workers, a_letter_stays, cursors)


# -- the bugs ---------------------------------------------------------------------------------------------------------


class Classes(NamedTuple):
    stream: type[Stream]
    consumer: type[Consumer]
    checkpoints: type[Checkpoints]


def classes(kind: str) -> Classes:
    def of(module: str, name: str) -> Any:
        return getattr(importlib.import_module(f"mist_{kind}.{module}"), name)

    title = kind.capitalize()
    return Classes(
        of("stream", f"{title}Stream"), of("consumer", f"{title}Consumer"), of("checkpoints", f"{title}Checkpoints")
    )


Breaks = Callable[[str], AbstractContextManager[Any]]


class Bug(NamedTuple):
    """`kinds`: the backends that it is tried on."""

    what: str
    breaks: Breaks
    caught_by: Sequence[Check]
    kinds: Sequence[str] = KINDS


def _ack_before_the_server(kind: str) -> AbstractContextManager[Any]:
    """The caller is answered when the messages are on their way."""
    cls = classes(kind).stream
    real = cls.append
    going: set[asyncio.Task[Any]] = set()

    async def behind(self: Stream, messages: Sequence[Message]) -> None:
        try:
            await real(self, messages)
        except MistError:
            return

    async def append(self: Stream, messages: Sequence[Message], *, expected_last: int | None = None) -> list[int]:
        last = (await self.info()).last
        task = asyncio.create_task(behind(self, messages))
        going.add(task)
        task.add_done_callback(going.discard)
        return list(range(last + 1, last + 1 + len(messages)))

    return mock.patch.object(cls, "append", append)


def _ids_not_compared(kind: str) -> AbstractContextManager[Any]:
    """Repeats are stored again."""
    if kind == "redis":
        from mist_redis import scripts

        text = scripts.TEXTS["append"].replace("local dedupe = ids ~= 0 and", "local dedupe = false and")
        assert text != scripts.TEXTS["append"]
        return _script("append", text)
    from mist_nats.publish import Publisher

    real = Publisher.__init__

    def init(self: Any, *args: Any, **options: Any) -> None:
        real(self, *args, **{**options, "dedupe": False})

    return mock.patch.object(Publisher, "__init__", init)


@contextmanager
def _script(name: str, text: str) -> Iterator[None]:
    from hashlib import sha1

    from mist_redis import scripts

    sha = sha1(text.encode(), usedforsecurity=False).hexdigest()
    with (
        mock.patch.dict(scripts.TEXTS, {name: text}), mock.patch.dict(scripts.SHAS, {name: sha}),
        mock.patch.dict(scripts.SCRIPTS, {sha: text}),
    ):  # fmt: skip
        yield


class _Certain(Unavailable):
    """Says "not stored" where nobody knows."""

    def __init__(self, message: str, *, ids: Sequence[str] = (), hint: str = "") -> None:
        super().__init__(message)
        self.ids = list(ids)


def _certain_when_unknown(kind: str) -> AbstractContextManager[Any]:
    return mock.patch(f"mist_{kind}.{'publish' if kind == 'nats' else 'append'}.Ambiguous", _Certain)


def _first_of_a_page_lost(kind: str) -> AbstractContextManager[Any]:
    cls = classes(kind).stream
    real = cls.read

    async def read(self: Stream, **options: Any) -> Page:
        page = await real(self, **options)
        return page if len(page.records) < 3 else Page(page.records[1:], page.scanned, page.last)

    return mock.patch.object(cls, "read", read)


def _scanned_too_far(kind: str) -> AbstractContextManager[Any]:
    """A page that was cut short says that it had seen everything."""
    cls = classes(kind).stream
    real = cls.read

    async def read(self: Stream, **options: Any) -> Page:
        page = await real(self, **options)
        return Page(page.records, page.last, page.last)

    return mock.patch.object(cls, "read", read)


def _three_steps(kind: str) -> AbstractContextManager[Any]:
    """Load, decide, store."""
    cls = classes(kind).checkpoints
    real = cls.save

    async def save(self: Checkpoints, checkpoint: Checkpoint, *, force: bool = False) -> Checkpoint:
        stored = await self.load(checkpoint.stream, checkpoint.name)
        if stored is not None and not force:
            check_advance(stored, checkpoint)
        await asyncio.sleep(0.01)
        return await real(self, checkpoint, force=True)

    return mock.patch.object(cls, "save", save)


def _not_saved(kind: str) -> AbstractContextManager[Any]:
    cls = classes(kind).checkpoints
    real = cls.save

    async def save(self: Checkpoints, checkpoint: Checkpoint, *, force: bool = False) -> Checkpoint:
        return checkpoint if checkpoint.sequence % 3 == 0 else await real(self, checkpoint, force=force)

    return mock.patch.object(cls, "save", save)


def _acks_not_sent(kind: str) -> AbstractContextManager[Any]:
    async def ack(self: Consumer, deliveries: Sequence[Delivery]) -> int:
        return len(deliveries)

    cls = classes(kind).consumer
    real = cls.ack

    async def mostly(self: Consumer, deliveries: Sequence[Delivery]) -> int:
        if any(d.record.sequence % 10 == 7 and d.attempt == 1 for d in deliveries):
            return await ack(self, deliveries)
        return await real(self, deliveries)

    return mock.patch.object(cls, "ack", mostly)


def _acked_when_fetched(kind: str) -> AbstractContextManager[Any]:
    cls = classes(kind).consumer
    real = cls.fetch

    async def fetch(self: Consumer, **options: Any) -> list[Delivery]:
        deliveries = await real(self, **options)
        await self.ack(deliveries)
        return deliveries

    return mock.patch.object(cls, "fetch", fetch)


def _attempts_not_counted(kind: str) -> AbstractContextManager[Any]:
    cls = classes(kind).consumer
    real = cls.fetch

    async def fetch(self: Consumer, **options: Any) -> list[Delivery]:
        return [Delivery(d.record, 1, d.token) for d in await real(self, **options)]

    return mock.patch.object(cls, "fetch", fetch)


def _handed_out_twice(kind: str) -> AbstractContextManager[Any]:
    """What one fetch got, the next one of the same process gets too."""
    cls = classes(kind).consumer
    real = cls.fetch
    kept: list[Delivery] = []

    async def fetch(self: Consumer, **options: Any) -> list[Delivery]:
        again, kept[:] = list(kept), []
        found = await real(self, **options)
        kept[:] = [Delivery(d.record, d.attempt + 1, d.token) for d in found[:1]]
        return found + [d for d in again if d.record.sequence not in {f.record.sequence for f in found}]

    return mock.patch.object(cls, "fetch", fetch)


def _letter_after_the_ack(kind: str) -> AbstractContextManager[Any]:
    """The original is settled first; the process may die before the letter is written."""

    async def bury(broker: Broker, letters: Sequence[Message], *, stream: str) -> None:
        return None

    return mock.patch(f"mist_{kind}.consumer.bury", bury)


def _letter_without_an_id(kind: str) -> AbstractContextManager[Any]:
    """A letter that is written twice is there twice."""
    from mist.broker.deadletter import bury as real

    async def bury(broker: Broker, letters: Sequence[Message], *, stream: str) -> None:
        loose = [Message(m.subject, m.data, "", m.headers) for m in letters]
        await real(broker, loose, stream=stream)
        await real(broker, loose, stream=stream)

    return mock.patch(f"mist_{kind}.consumer.bury", bury)


def _floor_ahead(kind: str) -> AbstractContextManager[Any]:
    from msgspec.structs import replace

    cls = classes(kind).consumer
    real = cls.info

    async def info(self: Consumer) -> Any:
        found = await real(self)
        return replace(found, floor=found.delivered)

    return mock.patch.object(cls, "info", info)


def _saved_before_the_effect(kind: str) -> AbstractContextManager[Any]:
    real = Cursor.aclose

    async def aclose(self: Cursor) -> None:
        if self._at > self._done:
            self._done, self._moved = self._at, True
        await real(self)

    return mock.patch.object(Cursor, "aclose", aclose)


def _gap_skipped(kind: str) -> AbstractContextManager[Any]:
    real = Cursor.__init__

    def init(self: Cursor, stream: Stream, **options: Any) -> None:
        real(self, stream, **{**options, "on_gap": "skip"})

    return mock.patch.object(Cursor, "__init__", init)


BUGS: tuple[Bug, ...] = (
    Bug("acknowledged before the server answered", _ack_before_the_server, [producers]),
    Bug("ids of repeated appends are not compared", _ids_not_compared, [producers]),
    Bug("refused for certain when the fate is unknown", _certain_when_unknown, [producers]),
    Bug("the first record of a page is lost", _first_of_a_page_lost, [producers]),
    Bug("a page says it has seen what it left out", _scanned_too_far, [producers]),
    Bug("checkpoints are loaded, compared and stored in three steps", _three_steps, [savers]),
    Bug("a save answers and does not store", _not_saved, [savers]),
    Bug("acks are not sent", _acks_not_sent, [workers]),
    Bug("acked when fetched, before the work", _acked_when_fetched, [workers]),
    Bug("attempts are not counted", _attempts_not_counted, [workers]),
    Bug("one record is handed out twice", _handed_out_twice, [workers]),
    Bug("the floor passes what is not settled", _floor_ahead, [workers]),
    Bug("the dead letter after the ack that removes the original", _letter_after_the_ack, [a_letter_stays]),
    Bug("dead letters without an id", _letter_without_an_id, [workers]),
    Bug("the checkpoint is saved before the effect", _saved_before_the_effect, [cursors]),
    Bug("a cursor skips a gap without a word", _gap_skipped, [cursors]),
)


@contextmanager
def places(folder: Path, kinds: Sequence[str]) -> Iterator[dict[str, Place]]:
    """A server of every kind, with short timeouts in this process too."""
    with ExitStack() as stack:
        out = {}
        for kind in kinds:
            (folder / kind).mkdir()
            where = stack.enter_context(site(kind, folder / kind))
            for at, value in where.tuning.items():
                module, _, name = at.partition(":")
                stack.enter_context(mock.patch.object(importlib.import_module(module), name, value))
            proxy = stack.enter_context(FaultProxy("127.0.0.1", where.server.port))
            out[kind] = Place(where, proxy, folder / kind)
        yield out


def _run(check: Check, place: Place, seed: int) -> None:
    place.proxy.forward()

    async def bounded() -> None:
        async with asyncio.timeout(40):
            await check(place, seed)

    asyncio.run(bounded())


def c31b(budget_s: float, seed: int, report: Report, *, units: int | None = None) -> dict[str, Any]:
    """Break each adapter in every known way; each must be caught. The checks themselves must pass on the adapters as
    they are."""
    trial = Trial("C31b", budget_s, seed, report, units)
    kinds = [k for k in KINDS if not lacking(k)]
    with places(trial.folder, kinds) as found:
        for kind, place in found.items():
            for check in CHECKS:
                try:
                    _run(check, place, seed)
                except Exception as exc:
                    trial.fail(f"{kind} as it is does not pass {check.__name__}: {_words(exc)}")
        whole = sum(k in kinds for b in BUGS for k in b.kinds)
        for bug in BUGS:
            for kind in (k for k in bug.kinds if k in kinds):
                caught = _caught(bug, kind, found[kind], seed)
                if caught:
                    trial.reached += 1
                else:
                    trial.fail(f"nothing catches on {kind}: {bug.what}")
                trial.say(f"{kind}: {bug.what}: {caught or 'NOT CAUGHT'}")
    return {**trial.result(), "whole": whole}


def _caught(bug: Bug, kind: str, place: Place, seed: int) -> str:
    for attempt in range(3):
        for check in bug.caught_by:
            try:
                with bug.breaks(kind):
                    _run(check, place, seed + attempt)
            except Exception as exc:
                return _words(exc)
    return ""


def _words(exc: BaseException) -> str:
    """The first line of what went wrong, also inside a group of tasks."""
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    text = str(exc).splitlines()
    return f"{type(exc).__name__}: {text[0][:200] if text else ''}"
