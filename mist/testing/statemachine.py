"""One model of the contract, for every broker: a hypothesis state machine that does whatever a program could do.

    class_ = state_machine(lambda: mist.connect("memory:x"))
    TestModel = class_.TestCase

The model is plain Python: a list of records, a dictionary of ids, per consumer what is leased and what was given back,
per name one position. Rules append (with ids, duplicates, conditions), read pages (filtered, bounded, from any
position), trim, erase, fetch, ack, nak, term, extend, seek, save and delete checkpoints, connect again (where it may), delete
the stream and make it again. After every call the broker's answer must be one the contract allows. Where the contract
leaves a choice (which of two due records comes first, how full a page is), any choice is accepted.

Does not: test time (leases are long; conformance has the short ones), several connections at once, or damage. Needs
hypothesis. `MIST_EXAMPLES` sets the number of examples, `MIST_STEPS` their length.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mist.broker.base import Broker, Checkpoint, Consumer, ConsumerConfig, Delivery, Message, Record, Stream, header
from mist.broker.deadletter import SEQUENCE
from mist.errors import (
    CheckpointRegression,
    CursorAhead,
    NotFound,
    SequenceExpired,
    WrongIncarnation,
    WrongSequence,
)
from mist.protocol.subject import dead_stream, matcher

T = TypeVar("T")
Connect = Callable[[], Awaitable[Broker]]

SUBJECTS = ("a", "a.x", "a.y", "b.x", "b")
FILTERS = ((">",), ("a.*",), ("a", "b.>"), ("*.x",), ("b",), ("none",))
ATTEMPTS_MAX = 3
PENDING_MAX = 6
CONSUMERS = {"all": (">",), "some": ("a.*", "b")}


class _ConsumerModel:
    """What the contract says about one consumer."""

    def __init__(self, subjects: tuple[str, ...]) -> None:
        self.match = matcher(subjects) or (lambda subject: True)
        self.delivered = 0
        self.leased: dict[int, Delivery] = {}
        self.given_back: dict[int, int] = {}
        """Sequence -> attempts so far."""
        self.stale: list[Delivery] = []

    def pending(self) -> set[int]:
        return set(self.leased) | set(self.given_back)

    def forget_below(self, first: int) -> None:
        for sequence in [s for s in self.leased if s < first]:
            del self.leased[sequence]  # whether its token still counts is nobody's promise
        for sequence in [s for s in self.given_back if s < first]:
            del self.given_back[sequence]
        self.delivered = max(self.delivered, first - 1)


class _Model:
    """What the contract says about one stream."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.first = 1
        self.last = 0
        self.ids: dict[str, int] = {}
        self.consumers: dict[str, _ConsumerModel] = {}
        self.checkpoints: dict[str, tuple[str, int]] = {}
        self.dead: set[int] = set()

    def kept(self) -> int:
        """The oldest record's sequence. Between `first` and this one only erased ones lay: a read may refuse there."""
        return self.records[0].sequence if self.records else self.last + 1


class Machine(RuleBasedStateMachine):
    """The rules. `connect` and `reconnect` are filled in by `state_machine`."""

    connect: Connect
    reconnect: Connect | None

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.model = _Model()
        self.name = f"model-{secrets.token_hex(5)}"
        self.number = 0
        self.handles: dict[str, Consumer] = {}
        self.broker: Broker = self.run(type(self).connect())
        self.stream: Stream = self.run(self.broker.open(self.name))

    def run(self, call: Awaitable[T]) -> T:
        async def bounded() -> T:
            async with asyncio.timeout(60):
                return await call

        coroutine: Coroutine[Any, Any, T] = bounded()
        return self.runner.run(coroutine)

    def teardown(self) -> None:
        try:
            if self.broker.capabilities.delete:
                for name in self.run(self.broker.streams()):
                    if name in (self.name, dead_stream(self.name)):
                        self.run(self.broker.delete(name))
        finally:
            self.run(self.broker.aclose())
            self.runner.close()

    # --- appending ---

    @rule(
        subjects=st.lists(st.sampled_from(SUBJECTS), min_size=1, max_size=6),
        ids=st.lists(st.one_of(st.just(""), st.integers(0, 12).map(str)), min_size=6, max_size=6),
        condition=st.sampled_from(("none", "none", "right", "wrong")),
    )
    def append(self, subjects: list[str], ids: list[str], condition: str) -> None:
        caps, model = self.broker.capabilities, self.model
        batch = []
        for subject, id in zip(subjects, ids, strict=False):
            self.number += 1
            batch.append(Message(subject, b"%d" % self.number, id if caps.dedupe else ""))
        expected: int | None = None
        if condition != "none" and caps.conditional_append:
            expected = model.last if condition == "right" else model.last + 3
        known = dict(model.ids)
        new = []
        for m in batch:
            if not m.id or m.id not in known:
                new.append(m)
                known[m.id] = -1
        call = self.stream.append(batch, expected_last=expected)
        if expected not in (None, model.last) and new:
            self._raises(WrongSequence, call)
            return
        got = self.run(call)  # where nothing new is to be stored, the condition is not looked at
        assert len(got) == len(batch)
        for message, sequence in zip(batch, got, strict=True):
            if message.id and message.id in model.ids:
                assert sequence == model.ids[message.id], "a duplicate got another sequence"
                continue
            assert sequence > model.last
            model.last = sequence
            model.records.append(Record(sequence, message.subject, message.data, 0, message.id))
            if message.id:
                model.ids[message.id] = sequence

    # --- reading ---

    @rule(
        where=st.floats(0, 1),
        subjects=st.sampled_from(FILTERS),
        limit=st.integers(1, 9),
        bytes_max=st.sampled_from((1, 4, 10, 10**6)),
    )
    def read(self, where: float, subjects: tuple[str, ...], limit: int, bytes_max: int) -> None:
        model = self.model
        after = round(where * (model.last - max(model.first - 3, 0) + 2)) + max(model.first - 3, 0)
        call = self.stream.read(after=after, subjects=subjects, limit=limit, bytes_max=bytes_max)
        if after > model.last:
            self._raises(CursorAhead, call)
            return
        if after + 1 < model.first:
            self._raises(SequenceExpired, call)
            return
        refused: SequenceExpired | None = None
        try:
            page = self.run(call)
        except SequenceExpired as exc:
            refused = exc
        if refused is not None:
            assert after + 1 < model.kept() == refused.first, "refused although nothing is missing"
            return
        match = matcher(subjects) or (lambda subject: True)
        expected = [r for r in model.records if r.sequence > after and match(r.subject)]
        assert page.last == model.last
        assert page.scanned >= after
        self._same(page.records, expected[: len(page.records)])
        assert len(page.records) <= limit
        assert len(page.records) < 2 or sum(len(r.data) for r in page.records) <= bytes_max
        passed = [r for r in expected if r.sequence <= page.scanned]
        assert len(passed) == len(page.records), "a page passed over records that match"
        if not page.records:
            assert page.scanned > after or after >= model.last, "an empty page that stands still before the end"

    @rule(subjects=st.sampled_from(FILTERS), limit=st.integers(1, 50))
    def replay(self, subjects: tuple[str, ...], limit: int) -> None:
        match = matcher(subjects) or (lambda subject: True)
        got: list[Record] = []
        after = self.model.kept() - 1
        while True:
            page = self.run(self.stream.read(after=after, subjects=subjects, limit=limit))
            got += page.records
            after = page.scanned
            if after >= page.last:
                break
        self._same(got, [r for r in self.model.records if match(r.subject)])
        assert [r.timestamp_ns for r in got] == sorted(r.timestamp_ns for r in got)

    @precondition(lambda self: self.broker.capabilities.trim)
    @rule(where=st.floats(0, 1), beyond=st.booleans())
    def trim(self, where: float, beyond: bool) -> None:
        model = self.model
        if beyond and where > 0.8:
            self._raises(CursorAhead, self.stream.trim(before=model.last + 2))
            return
        before = model.first + round(where * where * (model.last + 1 - model.first))
        gone = [r for r in model.records if r.sequence < before]
        assert self.run(self.stream.trim(before=before)) == len(gone)
        del model.records[: len(gone)]
        model.first = max(model.first, before)
        for consumer in model.consumers.values():
            consumer.forget_below(model.first)

    @precondition(lambda self: self.broker.capabilities.erase)
    @rule(where=st.lists(st.floats(0, 1), min_size=1, max_size=4), unknown=st.booleans())
    def erase(self, where: list[float], unknown: bool) -> None:
        model = self.model
        doomed = {round(w * model.last) for w in where} | ({model.last + 5} if unknown else set())
        gone = {r.sequence for r in model.records if r.sequence in doomed}
        assert self.run(self.stream.erase(sorted(doomed, reverse=True))) == len(gone)
        model.records = [r for r in model.records if r.sequence not in gone]
        # also those of trimmed ones: a store that still has their bytes erases these, and the ids with them
        forgotten = {i for i, s in model.ids.items() if s in doomed}
        model.ids = {i: s for i, s in model.ids.items() if i not in forgotten}
        for consumer in model.consumers.values():
            for sequence in gone:
                consumer.leased.pop(sequence, None)  # whether its token still counts is nobody's promise
                consumer.given_back.pop(sequence, None)
        for name, handle in self.handles.items():
            self.run(self._settled(handle, len(model.consumers[name].pending())))
        self._end_the_doubt(forgotten)

    async def _settled(self, consumer: Consumer, pending: int) -> None:
        """A server may settle the deliveries of erased records a moment later."""
        for _ in range(200):
            if (await consumer.info()).pending <= pending:
                return
            await asyncio.sleep(0.01)

    def _end_the_doubt(self, ids: set[str]) -> None:
        """Whether these ids are still remembered is the backend's business: one append with each tells."""
        model = self.model
        for id in sorted(ids) if self.broker.capabilities.dedupe else []:
            self.number += 1
            message = Message("a", b"%d" % self.number, id)
            (sequence,) = self.run(self.stream.append([message]))
            known = model.ids.get(id)
            assert known in (None, sequence), "a duplicate got another sequence"
            model.ids[id] = sequence
            if sequence > model.last:
                model.last = sequence
                model.records.append(Record(sequence, "a", message.data, 0, id))

    # --- consumers ---

    def _consumer(self, name: str) -> tuple[Consumer, _ConsumerModel]:
        if name not in self.handles:
            config = ConsumerConfig(
                subjects=CONSUMERS[name], ack_wait_s=600.0, attempts_max=ATTEMPTS_MAX, pending_max=PENDING_MAX
            )
            self.handles[name] = self.run(self.stream.consumer(name, config))
        model = self.model.consumers.setdefault(name, _ConsumerModel(CONSUMERS[name]))
        model.forget_below(self.model.first)
        return self.handles[name], model

    @precondition(lambda self: self.broker.capabilities.consumers)
    @rule(name=st.sampled_from(sorted(CONSUMERS)), limit=st.integers(1, 8))
    def fetch(self, name: str, limit: int) -> None:
        self._fetch(name, limit)

    @precondition(lambda self: self.broker.capabilities.consumers)
    @rule(name=st.sampled_from(sorted(CONSUMERS)), times=st.integers(1, 3), how=st.sampled_from(("nak", "nak", "ack")))
    def work(self, name: str, times: int, how: str) -> None:
        """A worker's loop: fetch, and settle all it holds. Reaches the last attempts, and the bound, far sooner."""
        for _ in range(times):
            self._fetch(name, 8)
            self._settle(name, list(range(PENDING_MAX)), how, False)

    def _fetch(self, name: str, limit: int) -> None:
        consumer, model = self._consumer(name)
        new = [r for r in self.model.records if r.sequence > model.delivered and model.match(r.subject)]
        room = PENDING_MAX - len(model.pending())
        available = len(model.given_back) + min(len(new), room)
        # a server may need a moment for what was just given back; where there is nothing it is not asked to wait
        got = self.run(consumer.fetch(limit=limit, wait_s=10.0 if available else 0.0))
        assert len(got) <= limit
        assert bool(got) == bool(available), f"{len(got)} deliveries, {available} available"
        by_sequence = {r.sequence: r for r in self.model.records}
        fresh: list[int] = []
        for d in got:
            sequence = d.record.sequence
            self._same([d.record], [by_sequence[sequence]])
            if sequence in model.given_back:
                assert d.attempt == model.given_back.pop(sequence) + 1
            else:
                assert sequence not in model.leased, "a leased record was handed out again"
                assert d.attempt == 1
                fresh.append(sequence)
            model.leased[sequence] = d
        assert fresh == [r.sequence for r in new[: len(fresh)]], "new records came out of order or were passed over"
        assert len(fresh) <= room, "more than pending_max"
        if fresh:
            model.delivered = fresh[-1]

    def _some(self, name: str, pick: list[int]) -> tuple[Consumer, _ConsumerModel, list[Delivery]]:
        consumer, model = self._consumer(name)
        held = [model.leased[s] for s in sorted(model.leased)]
        return consumer, model, [held[i] for i in sorted({p % len(held) for p in pick})] if held else []

    @precondition(lambda self: self.broker.capabilities.consumers)
    @rule(
        name=st.sampled_from(sorted(CONSUMERS)),
        pick=st.lists(st.integers(0, 20), min_size=1, max_size=5),
        how=st.sampled_from(("ack", "ack", "ack", "nak", "nak", "term", "extend")),
        with_stale=st.booleans(),
    )
    def settle(self, name: str, pick: list[int], how: str, with_stale: bool) -> None:
        self._settle(name, pick, how, with_stale)

    def _settle(self, name: str, pick: list[int], how: str, with_stale: bool) -> None:
        consumer, model, chosen = self._some(name, pick)
        given = [*model.stale[-3:], *chosen, *chosen[:1]] if with_stale else chosen
        count = self.run(getattr(consumer, how)(given))
        assert count == len(chosen), f"{how} settled {count} of {len(chosen)} (and {len(given)} given)"
        if how == "extend":
            return
        for d in chosen:
            sequence = d.record.sequence
            del model.leased[sequence]
            model.stale.append(d)
            if how == "nak" and d.attempt < ATTEMPTS_MAX:
                model.given_back[sequence] = d.attempt
            elif how != "ack":
                self.model.dead.add(sequence)

    @precondition(lambda self: self.broker.capabilities.consumers)
    @rule(name=st.sampled_from(sorted(CONSUMERS)), where=st.floats(0, 1), beyond=st.booleans())
    def seek(self, name: str, where: float, beyond: bool) -> None:
        consumer, model = self._consumer(name)
        if beyond and where > 0.8:
            self._raises(CursorAhead, consumer.seek(self.model.last + 1))
            return
        after = round(where * self.model.last)
        self.run(consumer.seek(after))
        model.stale += model.leased.values()
        model.leased.clear()
        model.given_back.clear()
        model.delivered = max(after, self.model.first - 1)

    @precondition(lambda self: self.broker.capabilities.consumers)
    @rule(name=st.sampled_from(sorted(CONSUMERS)))
    def delete_consumer(self, name: str) -> None:
        consumer, model = self._consumer(name)
        self.run(consumer.delete())
        self._raises(NotFound, consumer.info())
        assert name not in self.run(self.stream.consumers())
        del self.handles[name], self.model.consumers[name]
        _, new = self._consumer(name)
        new.stale = [*model.stale, *model.leased.values()]

    # --- checkpoints ---

    @precondition(lambda self: self.broker.capabilities.checkpoints)
    @rule(
        name=st.sampled_from(("p", "q")),
        sequence=st.integers(0, 30),
        force=st.booleans(),
        incarnation=st.sampled_from(("", "", "", "other")),
    )
    def save(self, name: str, sequence: int, force: bool, incarnation: str) -> None:
        checkpoint = Checkpoint(
            stream=self.name, name=name, incarnation=incarnation or self.stream.incarnation, sequence=sequence
        )
        stored = self.model.checkpoints.get(name)
        call = self.broker.checkpoints.save(checkpoint, force=force)
        if stored is not None and not force and stored[0] != checkpoint.incarnation:
            self._raises(WrongIncarnation, call)
        elif stored is not None and not force and stored[1] > sequence:
            self._raises(CheckpointRegression, call)
        else:
            saved = self.run(call)
            assert (saved.incarnation, saved.sequence) == (checkpoint.incarnation, sequence)
            self.model.checkpoints[name] = (checkpoint.incarnation, sequence)

    @precondition(lambda self: self.broker.capabilities.checkpoints)
    @rule(name=st.sampled_from(("p", "q")))
    def forget(self, name: str) -> None:
        assert self.run(self.broker.checkpoints.delete(self.name, name)) == (name in self.model.checkpoints)
        self.model.checkpoints.pop(name, None)

    # --- connections and incarnations ---

    @precondition(lambda self: self.reconnect is not None)
    @rule()
    def connect_again(self) -> None:
        again = type(self).reconnect
        assert again is not None
        self.run(self.broker.aclose())
        self.broker = self.run(again())
        incarnation = self.stream.incarnation
        self.stream = self.run(self.broker.open(self.name, create=False))
        assert self.stream.incarnation == incarnation
        self.handles = {n: self.run(self.stream.consumer(n, create=False)) for n in self.handles}
        # Whether ids of trimmed and erased records are remembered beyond a restart is the backend's business, also when
        # the trim comes before the first append of the new connection: an append with an id ends that doubt here.
        there = {r.sequence for r in self.model.records}
        self.model.ids = {i: s for i, s in self.model.ids.items() if s in there}
        self._end_the_doubt({str(n) for n in range(13)} - self.model.ids.keys() or {"0"})

    @precondition(lambda self: self.broker.capabilities.delete)
    @rule(sure=st.integers(0, 3))
    def delete_and_make_again(self, sure: int) -> None:
        if sure:
            return
        self.the_dead_letters_agree()
        old = self.stream
        self.run(self.broker.delete(self.name))
        if dead_stream(self.name) in self.run(self.broker.streams()):
            self.run(self.broker.delete(dead_stream(self.name)))
        self._raises(NotFound, self.broker.open(self.name, create=False))
        self.stream = self.run(self.broker.open(self.name))
        assert self.stream.incarnation != old.incarnation
        self._raises(NotFound, old.read())
        stale = {n: [*c.stale, *c.leased.values()] for n, c in self.model.consumers.items()}
        self.model, self.handles = _Model(), {}
        for name, deliveries in stale.items():
            _, consumer = self._consumer(name)
            consumer.stale = deliveries

    # --- what must always hold ---

    @initialize()
    def a_new_stream_is_empty(self) -> None:
        page = self.run(self.stream.read())
        assert (page.records, page.scanned, page.last) == ([], 0, 0)

    @invariant()
    def the_figures_agree(self) -> None:
        info = self.run(self.stream.info())
        model = self.model
        assert (info.first, info.last, info.records) == (model.kept(), model.last, len(model.records))
        for name in self.handles:
            consumer, expected = self._consumer(name)
            figures = self.run(consumer.info())
            pending = expected.pending()
            assert figures.pending == len(pending), f"{name}: pending {figures.pending}, not {sorted(pending)}"
            assert figures.redelivered == sum(expected.leased[s].attempt > 1 for s in expected.leased) + sum(
                a > 1 for a in expected.given_back.values()
            )
            if self.broker.capabilities.pending:
                assert {p.sequence for p in self.run(consumer.pending())} == pending
            unsettled = [*pending, *(r.sequence for r in model.records if r.sequence > figures.delivered)]
            assert all(figures.floor < s for s in unsettled), "the floor passed an unsettled record"
            matching = [r for r in model.records if r.sequence > expected.delivered and expected.match(r.subject)]
            assert figures.lag >= len(matching) + len(pending)

    @invariant()
    def the_checkpoints_agree(self) -> None:
        if not self.broker.capabilities.checkpoints:
            return
        stored = {c.name: (c.incarnation, c.sequence) for c in self.run(self.broker.checkpoints.list(self.name))}
        assert stored == self.model.checkpoints

    @rule()
    def the_dead_letters_agree(self) -> None:
        found: set[int] = set()
        if dead_stream(self.name) in self.run(self.broker.streams()):
            stream = self.run(self.broker.open(dead_stream(self.name), create=False))
            page = self.run(stream.read(limit=10_000))
            found = {int(header(r.headers, SEQUENCE)) for r in page.records}
        assert found == self.model.dead

    def _raises(self, error: type[Exception], call: Awaitable[object]) -> None:
        try:
            answer = self.run(call)
        except error:
            return
        raise AssertionError(f"{error.__name__} expected, the answer was {answer!r}")

    def _same(self, got: list[Record], expected: list[Record]) -> None:
        assert [(r.sequence, r.subject, r.data, r.id) for r in got] == [
            (r.sequence, r.subject, r.data, r.id) for r in expected
        ]


def state_machine(connect: Connect, reconnect: Connect | None = None) -> type[RuleBasedStateMachine]:
    """The machine for one broker; its `.TestCase` is what pytest collects.

    `connect` gives a broker on any store (the machine uses stream names of its own); `reconnect`, for persistent
    brokers, one more connection to the store that the last `connect` gave.
    """

    class Bound(Machine):
        pass

    Bound.connect = staticmethod(connect)
    Bound.reconnect = None if reconnect is None else staticmethod(reconnect)
    Bound.TestCase.settings = settings(
        max_examples=int(os.environ.get("MIST_EXAMPLES", "60")),
        stateful_step_count=int(os.environ.get("MIST_STEPS", "30")),
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )
    return Bound
