"""The suite itself: its cases for persistence, failures and damage run, its refusals hold, and it bites.

The memory broker declares neither persistence nor damage, so variants of it stand in here; then single promises are
broken one at a time, and the case about each must fail.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest
from msgspec.structs import replace

from mist.broker import memory
from mist.broker.base import (
    BYTES_MAX,
    Broker,
    Capabilities,
    Checkpoint,
    Checkpoints,
    ConsumerConfig,
    Delivery,
    Message,
    Page,
    Stream,
    StreamConfig,
    StreamInfo,
)
from mist.errors import CursorAhead, DataLoss, Internal, PartialAppend, SequenceExpired, StorageFull, Unsupported
from mist.testing.conformance import BrokerConformance

# --- a variant with everything: persistent, failing on demand, damaged on demand ---------------------------------


class KeptStream(memory.MemoryStream):
    """Stores one message at a time, so that it can fail half-way, and has holes."""

    async def append(self, messages: Sequence[Message], *, expected_last: int | None = None) -> list[int]:
        store: Any = self._store
        if getattr(store, "fails_after", None) is None:
            return await super().append(messages, expected_last=expected_last)
        out: list[int] = []
        for m in messages:
            if store.fails_after == 0:
                raise PartialAppend(out, total=len(messages), stream=self.name) from StorageFull("no room")
            store.fails_after -= 1
            out += await super().append([m])
        return out

    def _page(self, after: int, match: Callable[[str], bool] | None, limit: int, bytes_max: int) -> Page:
        page = super()._page(after, match, limit, bytes_max)
        bad = getattr(self._store, "damaged", {}).get(self.name)
        if bad is None or after >= bad[1]:
            return page
        before = [r for r in page.records if r.sequence < bad[0]]
        if not before and (page.scanned >= bad[0] or after >= bad[0] - 1):
            raise DataLoss(first=bad[0], last=bad[1], resume_after=bad[1], stream=self.name)
        return Page(before, min(page.scanned, bad[0] - 1), page.last)

    async def verify(self) -> Any:
        from mist.broker.base import Damage

        answer = await super().verify()
        bad = getattr(self._store, "damaged", {}).get(self.name)
        return replace(answer, damage=[Damage(*bad, "here", "because")]) if bad else answer

    async def consumer(self, name: str, config: ConsumerConfig | None = None, *, create: bool = True) -> Any:
        made = await super().consumer(name, config, create=create)
        made.__class__ = KeptConsumer
        return made


class KeptConsumer(memory.MemoryConsumer):
    async def fetch(self, *, limit: int = 256, bytes_max: int = BYTES_MAX, wait_s: float = 0.0) -> list[Delivery]:
        self._check()
        bad = getattr(self._store, "damaged", {}).get(self.stream)
        if bad and self._state.delivered < bad[1]:
            left = bad[0] - 1 - self._state.delivered
            if left <= 0:
                self._state.delivered = bad[1]
                raise DataLoss(first=bad[0], last=bad[1], resume_after=bad[1], stream=self.stream)
            limit = min(limit, left)
        return await super().fetch(limit=limit, bytes_max=bytes_max, wait_s=wait_s)


class KeptBroker(memory.MemoryBroker):
    capabilities = replace(memory.CAPABILITIES, persistent=True)

    async def open(self, name: str, *, create: bool = True, config: StreamConfig | None = None) -> KeptStream:
        stream = await super().open(name, create=create, config=config)
        return KeptStream(self, stream._state)


class Kept(BrokerConformance):
    def __init__(self) -> None:
        self.url = f"memory:kept-{secrets.token_hex(4)}"

    def failing_append(self, broker: Broker, *, after: int) -> contextlib.AbstractAsyncContextManager[None]:
        @contextlib.asynccontextmanager
        async def broken() -> AsyncIterator[None]:
            store: Any = broker._store  # type: ignore[attr-defined]
            store.fails_after = after
            try:
                yield
            finally:
                store.fails_after = None

        return broken()

    async def damage(self, broker: Broker, stream: str, first: int, last: int) -> tuple[int, int]:
        broker._store.damaged = {stream: (first, last)}  # type: ignore[attr-defined]
        return first, last


@pytest.mark.parametrize(
    "case",
    [
        "test_partial_append_reports_its_prefix",
        "test_damage_is_never_skipped_silently",
        "test_damage_stops_no_consumer",
        "test_reopening_resumes",
        "test_a_trim_survives_reopening",
        "test_acks_work_after_a_restart",
        "test_close_finishes_accepted_appends",
    ],
)
def test_cases_that_need_a_hook_or_persistence_run(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the hooks filled in and persistence declared, these cases run instead of being skipped."""
    monkeypatch.setattr(memory, "MemoryBroker", KeptBroker)
    monkeypatch.setattr(memory, "CAPABILITIES", KeptBroker.capabilities)
    getattr(Kept(), case)()


# --- a variant with nothing: every optional call refuses -----------------------------------------------------------

NOTHING = Capabilities(
    conditional_append=False, dedupe=False, consumers=False, pending=False, checkpoints=False, trim=False, locate=False,
    retention=False, delete=False,
)  # fmt: skip


class BareStream(memory.MemoryStream):
    async def append(self, messages: Sequence[Message], *, expected_last: int | None = None) -> list[int]:
        if expected_last is not None:
            raise Unsupported("conditional_append", "bare")
        return await super().append(messages)

    async def info(self) -> StreamInfo:
        return replace(await super().info(), capabilities=NOTHING)

    async def locate(self, time_ns: int) -> int:
        raise Unsupported("locate", "bare")

    async def trim(self, *, before: int) -> int:
        raise Unsupported("trim", "bare")

    async def erase(self, sequences: Sequence[int]) -> int:
        raise Unsupported("erase", "bare")

    async def verify(self) -> Any:
        raise Unsupported("verify", "bare")

    async def consumer(self, name: str, config: ConsumerConfig | None = None, *, create: bool = True) -> Any:
        raise Unsupported("consumers", "bare")

    async def consumers(self) -> list[str]:
        raise Unsupported("consumers", "bare")


class NoCheckpoints(Checkpoints):
    async def save(self, checkpoint: Checkpoint, *, force: bool = False) -> Checkpoint:
        raise Unsupported("checkpoints", "bare")

    async def load(self, stream: str, name: str) -> Checkpoint | None:
        raise Unsupported("checkpoints", "bare")

    async def delete(self, stream: str, name: str) -> bool:
        raise Unsupported("checkpoints", "bare")

    async def list(self, stream: str = "") -> list[Checkpoint]:
        raise Unsupported("checkpoints", "bare")


class BareBroker(memory.MemoryBroker):
    backend = "bare"
    capabilities = NOTHING

    async def open(self, name: str, *, create: bool = True, config: StreamConfig | None = None) -> BareStream:
        asked = config or StreamConfig()
        if asked.records_max or asked.bytes_max or asked.age_s_max:
            raise Unsupported("retention", "bare")
        if asked.dedupe_window_s is not None or asked.dedupe_ids_max is not None:
            raise Unsupported("dedupe", "bare")
        # stored without a window, so that nothing is ever compared
        stream = await super().open(name, create=create, config=replace(asked, dedupe_ids_max=0))
        return BareStream(self, stream._state)

    async def delete(self, name: str) -> None:
        raise Unsupported("delete", "bare")

    @property
    def checkpoints(self) -> Any:
        return NoCheckpoints()


class TestBareMemory(BrokerConformance):
    @pytest.fixture(autouse=True)
    def _store(self) -> None:
        self.store = memory._Store(memory.SYSTEM)

    async def connect(self) -> Broker:
        return BareBroker("bare:", self.store)

    async def reconnect(self) -> Broker:
        return BareBroker("bare:", self.store)


# --- one promise broken at a time ----------------------------------------------------------------------------------


class Broken(BrokerConformance):
    patience_s = 1.0
    case_timeout_s = 6.0

    def __init__(self) -> None:
        self.url = f"memory:broken-{secrets.token_hex(4)}"


original: dict[str, Any] = {
    "append": memory.MemoryStream.append,
    "read": memory.MemoryStream.read,
    "page": memory.MemoryStream._page,
    "trim": memory.MemoryStream.trim,
    "locate": memory.MemoryStream.locate,
    "fetch": memory.MemoryConsumer.fetch,
    "ack": memory.MemoryConsumer.ack,
    "nak": memory.MemoryConsumer.nak,
    "seek": memory.MemoryConsumer.seek,
    "lease": memory.MemoryConsumer._lease,
    "bury": memory.MemoryConsumer._bury,
    "save": memory.MemoryCheckpoints.save,
    "close": memory.MemoryBroker.aclose,
    "delete": memory.MemoryBroker.delete,
}


async def append_in_reverse(self: Stream, messages: Sequence[Message], **kw: Any) -> Any:
    return await original["append"](self, list(reversed(messages)), **kw)


async def append_forgetting_the_condition(self: Stream, messages: Sequence[Message], **kw: Any) -> Any:
    return await original["append"](self, messages)


async def append_checking_the_condition_first(self: Any, messages: Sequence[Message], **kw: Any) -> Any:
    if messages and kw.get("expected_last") not in (None, self._state.last):
        return await original["append"](self, [replace(m, id="") for m in messages], **kw)
    return await original["append"](self, messages, **kw)


async def append_stripping(self: Stream, messages: Sequence[Message], **kw: Any) -> Any:
    headers = [replace(m, headers=tuple((k, v.strip()) for k, v in m.headers)) for m in messages]
    return await original["append"](self, headers, **kw)


async def append_raising_its_own(self: Stream, messages: Sequence[Message], **kw: Any) -> Any:
    if kw.get("expected_last", 0) is not None and kw.get("expected_last", 0) > 2**63:
        raise OverflowError("int too large to convert")
    return await original["append"](self, messages, **kw)


async def read_inclusive(self: Stream, *, after: int = 0, **kw: Any) -> Any:
    return await original["read"](self, after=max(after - 1, 0), **kw)


def page_that_stands_still_without_a_match(self: Any, after: int, match: Any, limit: int, bytes_max: int) -> Page:
    page: Page = original["page"](self, after, None, 5, bytes_max)
    found = [r for r in page.records if match is None or match(r.subject)][:limit]
    return Page(found, found[-1].sequence if found else after, page.last)


def page_counting_only_matches(self: Any, after: int, match: Any, limit: int, bytes_max: int) -> Page:
    page: Page = original["page"](self, after, None, limit, bytes_max)
    return Page([r for r in page.records if match is None or match(r.subject)], page.last, page.last)


def page_skipping_what_is_gone(self: Any, after: int, match: Any, limit: int, bytes_max: int) -> Page:
    try:
        return original["page"](self, after, match, limit, bytes_max)  # type: ignore[no-any-return]
    except SequenceExpired as exc:
        return original["page"](self, exc.first - 1, match, limit, bytes_max)  # type: ignore[no-any-return]


def page_waiting_for_the_future(self: Any, after: int, match: Any, limit: int, bytes_max: int) -> Page:
    try:
        return original["page"](self, after, match, limit, bytes_max)  # type: ignore[no-any-return]
    except CursorAhead as exc:
        return Page([], after, exc.last)


def page_without_byte_bound(self: Any, after: int, match: Any, limit: int, bytes_max: int) -> Page:
    return original["page"](self, after, match, limit, BYTES_MAX)  # type: ignore[no-any-return]


async def read_swallowing_cancellation(self: Stream, **kw: Any) -> Any:
    try:
        return await original["read"](self, **kw)
    except asyncio.CancelledError:
        return await original["read"](self, **{**kw, "wait_s": 0.0})


async def trim_clamped(self: Any, *, before: int) -> Any:
    return await original["trim"](self, before=max(0, min(before, self._state.last + 1)))


async def locate_off_by_one(self: Stream, time_ns: int) -> Any:
    return await original["locate"](self, time_ns + 1)


async def ack_whatever(self: Any, deliveries: Sequence[Delivery]) -> int:
    with self._store.lock:
        self._check()
        return sum(self._state.leases.pop(d.record.sequence, None) is not None for d in deliveries)


async def nak_without_delay(self: Any, deliveries: Sequence[Delivery], *, delay_s: float = 0.0) -> Any:
    return await original["nak"](self, deliveries)


async def seek_keeping_leases(self: Any, after: int) -> None:
    kept = dict(self._state.leases)
    await original["seek"](self, after)
    self._state.leases.update(kept)


def lease_without_attempt(self: Any, sequence: int, lease: Any, now: float) -> Any:
    lease.attempt = 1
    return original["lease"](self, sequence, lease, now)


def lease_with_one_token(self: Any, sequence: int, lease: Any, now: float) -> Any:
    given = original["lease"](self, sequence, lease, now)
    lease.token = 7
    return replace(given, token=f"{sequence}.7")


async def bury_nowhere(self: Any, deliveries: Sequence[Delivery], reason: str) -> None:
    await self.ack(deliveries)


async def bury_without_reason(self: Any, deliveries: Sequence[Delivery], reason: str) -> None:
    await original["bury"](self, deliveries, "")


async def fetch_beyond_the_bound(self: Any, **kw: Any) -> Any:
    state = self._state
    state.config = replace(state.config, pending_max=10**6)
    return await original["fetch"](self, **kw)


async def save_anything(self: Any, checkpoint: Checkpoint, *, force: bool = False) -> Any:
    return await original["save"](self, checkpoint, force=True)


async def close_in_silence(self: Any) -> None:
    self._closed = True


async def delete_keeping_checkpoints(self: Any, name: str) -> None:
    kept = dict(self._store.checkpoints)
    await original["delete"](self, name)
    self._store.checkpoints.update(kept)


async def close_once(self: Any) -> None:
    if self._closed:
        raise Internal("closed twice")
    await original["close"](self)


STREAM, CONSUMER = memory.MemoryStream, memory.MemoryConsumer
MUTANTS: list[tuple[type, str, Callable[..., Any], str]] = [
    (STREAM, "append", append_in_reverse, "test_order_is_kept"),
    (STREAM, "append", append_forgetting_the_condition, "test_conditional_append_has_one_winner"),
    (STREAM, "append", append_checking_the_condition_first, "test_duplicates_come_before_the_condition"),
    (STREAM, "append", append_stripping, "test_headers_come_back_exactly"),
    (STREAM, "append", append_raising_its_own, "test_no_foreign_exception_escapes"),
    (STREAM, "read", read_inclusive, "test_after_is_exclusive"),
    (STREAM, "_page", page_that_stands_still_without_a_match, "test_paging_at_every_limit"),
    (STREAM, "_page", page_counting_only_matches, "test_filtered_paging_reaches_a_late_match"),
    (STREAM, "_page", page_skipping_what_is_gone, "test_a_trimmed_range_is_refused"),
    (STREAM, "_page", page_waiting_for_the_future, "test_a_position_past_the_end_is_refused"),
    (STREAM, "_page", page_without_byte_bound, "test_pages_respect_their_byte_bound"),
    (STREAM, "read", read_swallowing_cancellation, "test_a_cancelled_read_loses_nothing"),
    (STREAM, "trim", trim_clamped, "test_trim_past_the_end_is_refused"),
    (STREAM, "locate", locate_off_by_one, "test_locate_by_time_agrees_with_a_scan"),
    (STREAM, "_expire_ids", lambda self, now: self._state.ids.clear(), "test_duplicate_ids_across_batches"),
    (STREAM, "_expire_ids", lambda self, now: None, "test_the_window_by_count"),
    (STREAM, "_make_room", lambda self, new: None, "test_a_full_stream_refuses"),
    (STREAM, "_retain", lambda self: None, "test_retention_by_count"),
    (STREAM, "_retain", lambda self: None, "test_retention_by_age"),
    (CONSUMER, "ack", ack_whatever, "test_a_stale_token_is_a_no_op"),
    (CONSUMER, "nak", nak_without_delay, "test_nak_with_a_delay"),
    (CONSUMER, "seek", seek_keeping_leases, "test_seek"),
    (CONSUMER, "_lease", lease_without_attempt, "test_an_abandoned_delivery_returns"),
    (CONSUMER, "_lease", lease_with_one_token, "test_a_stale_token_is_a_no_op"),
    (CONSUMER, "_bury", bury_nowhere, "test_naks_use_up_attempts"),
    (CONSUMER, "_bury", bury_without_reason, "test_term_makes_a_dead_letter"),
    (memory._ConsumerState, "forget_below", lambda self, first: None, "test_consumers_pass_over_what_was_trimmed"),
    (memory.MemoryCheckpoints, "save", save_anything, "test_checkpoints_move_forward"),
    (memory.MemoryCheckpoints, "save", save_anything, "test_another_incarnation_is_refused"),
    (memory.MemoryCheckpoints, "save", save_anything, "test_concurrent_savers_end_at_the_maximum"),
    (memory.MemoryBroker, "aclose", close_in_silence, "test_close_wakes_every_waiter"),
    (memory.MemoryBroker, "aclose", close_once, "test_close_is_idempotent"),
    (memory.MemoryBroker, "check_open", lambda self: None, "test_use_after_close_raises_closed"),
    (memory.MemoryBroker, "delete", delete_keeping_checkpoints, "test_deleting_a_stream_deletes_its_checkpoints"),
]


@pytest.mark.parametrize(("where", "name", "mutant", "case"), MUTANTS, ids=[f"{m[1]}-{m[3]}" for m in MUTANTS])
def test_the_suite_bites(
    where: type, name: str, mutant: Callable[..., Any], case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broker that breaks one promise fails the case about it."""
    monkeypatch.setattr(where, name, mutant)
    with pytest.raises((AssertionError, Exception, pytest.fail.Exception)) as failure:
        getattr(Broken(), case)()
    assert not isinstance(failure.value, (pytest.skip.Exception, AttributeError, TypeError, NameError)), failure.value


def test_every_case_is_documented() -> None:
    """Every case says in a sentence what it checks."""
    cases = [n for n in dir(BrokerConformance) if n.startswith("test_")]
    assert len(cases) > 130
    for name in cases:
        assert (getattr(BrokerConformance, name).__doc__ or "").strip().endswith("."), name


def test_a_case_that_is_not_declared_tests_the_refusal() -> None:
    """A broker that does not declare a capability and yet answers the call fails."""

    class Lying(BareBroker):
        async def open(self, name: str, *, create: bool = True, config: StreamConfig | None = None) -> Any:
            return await memory.MemoryBroker.open(self, name, create=create, config=config)

    class Case(Broken):
        async def connect(self) -> Broker:
            return Lying("bare:", memory._Store(memory.SYSTEM))

    for case in ("test_seek", "test_a_trimmed_range_is_refused", "test_conditional_append", "test_retention_by_count"):
        with pytest.raises(pytest.fail.Exception):
            getattr(Case(), case)()
