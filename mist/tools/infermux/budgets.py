"""Budgets: what a call may cost is reserved before it goes out and settled when its cost is known. Durable, in one SQLite file.

    ledger = await Ledger.open(path)
    reservation = await ledger.reserve(caller, nano, budgets, provider=…, model=…)      # raises RateLimited
    ledger.settle(reservation, entry)                                                   # or ledger.release(reservation)

Promises
- A reservation is on the disk before `reserve` returns. All that is reserved and spent in a period is never above a limit
  that refuses, however many ask at once, in however many processes: one file, one writer at a time. Only an answer that cost
  more than was reserved for it (nobody knows tokens exactly before) goes above, and is booked as what it was.
- A cancelled `reserve` holds nothing in the end. `settle`, `release` and `book` do not wait: what they say is written with the
  next commit, and written again when that fails. Until then the reservation counts.
- A restart forgets nothing. What a process had reserved when it died counts as spent, at its whole size, in the period it was
  reserved in. It is settled when the answer is found recorded (`orphans`, then `settle`); what is not settled after
  `ORPHAN_S` is booked at its whole size for good. It is never given back: the call may have gone out.

One thread writes; whatever came while it was at it is the next commit. Does not: touch the file for a call without budgets, but to
book its cost, later and together with others.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from msgspec import Struct

from mist.errors import Closed, MistError, RateLimited
from mist.kit.lock import FileLock, is_held
from mist.kit.waiting import in_thread
from mist.protocol.ids import new_id
from mist.tools.infermux.books import (
    Book,
    Books,
    Entry,
    Operation,
    Outcome,
    Reservation,
    Reserve,
    Settle,
    applies,
    cell_of,
    ends_in_s,
    named,
    translated,
)
from mist.tools.infermux.chat import Caller
from mist.tools.infermux.costs import to_dollars
from mist.tools.infermux.settings import NANO, BudgetSettings

By = Literal["day", "key", "team", "project", "env", "provider", "model"]

BATCH_MAX = 1000
FLUSH_S = 1.0
"""What nobody waits for is written after this long."""
ORPHAN_S = 24 * 3600.0
UNWRITTEN_MAX = 100_000
"""What could not be written is kept, and tried again, up to this many; beyond it is counted as lost."""

logger = logging.getLogger(__name__)


class Line(Struct, frozen=True, kw_only=True):
    """One line of a report: `by` holds the names it is grouped by. `unknown`: calls of unknown cost, which are not in `nano`;
    `estimated`: calls that nobody knows the cost of, at the most they may have cost."""

    by: dict[str, str]
    calls: int
    tokens_in: int
    tokens_out: int
    nano: int
    unknown: int
    estimated: int

    @property
    def usd(self) -> float:
        return to_dollars(self.nano)


class BudgetState(Struct, frozen=True, kw_only=True):
    """One budget in its period: `used_nano` is what was spent and what is reserved."""

    budget: BudgetSettings
    name: str
    period: str
    used_nano: int


class _Ask:
    """An operation that somebody waits for."""

    __slots__ = ("error", "future", "loop", "operation", "outcome")

    def __init__(self, operation: Operation, loop: asyncio.AbstractEventLoop, future: asyncio.Future[Outcome]) -> None:
        self.operation = operation
        self.loop = loop
        self.future = future
        self.outcome: Outcome | None = None
        self.error: MistError | None = None

    @property
    def granted(self) -> bool:
        return isinstance(self.operation, Reserve) and self.outcome is not None and self.outcome.refused is None


class _Stop:
    pass


class Ledger:
    """One opening of a ledger. Its calls belong to one event loop; `aclose` writes what is left."""

    def __init__(
        self, books: Books, lock: FileLock, owner: str, *, on_alert: Callable[[BudgetSettings, Caller], None] | None,
        time_ns: Callable[[], int],
    ) -> None:  # fmt: skip
        self._books = books
        self._lock = lock
        self._owner = owner
        self._on_alert = on_alert
        self._time_ns = time_ns
        self._queue: queue.SimpleQueue[_Ask | _Stop | None] = queue.SimpleQueue()
        """None = there is something that nobody waits for."""
        self._later: deque[Settle | Book] = deque()
        self._told = False
        """Whether the thread knows that something lies in `_later`: it is not woken for each."""
        self._unwritten: list[Operation] = []
        self._lost = 0
        self._outstanding = 0
        self._asking = 0
        self._released = False
        self._closed = False
        self._thread = threading.Thread(target=self._write, name="infermux-ledger", daemon=True)
        self._thread.start()

    @classmethod
    async def open(
        cls,
        path: Path | str,
        *,
        on_alert: Callable[[BudgetSettings, Caller], None] | None = None,
        time_ns: Callable[[], int] = time.time_ns,
    ) -> Ledger:
        """Made when absent. `on_alert` is told when a budget with `action = "alert"` passes its limit. Raises InvalidArgument for
        a file that is no ledger, Refused when it cannot be written."""
        path = Path(path)

        def work() -> Ledger:
            books = Books.open(path)
            owner = new_id()
            lock = FileLock(_owners(path) / owner)
            try:
                lock.acquire()
                _bury(books, time_ns())
            except BaseException:
                lock.release()
                books.close()
                raise
            return cls(books, lock, owner, on_alert=on_alert, time_ns=time_ns)

        return await in_thread(work)

    @property
    def path(self) -> Path:
        return self._books.path

    @property
    def outstanding(self) -> int:
        """Reservations of ours that are neither settled nor released."""
        return self._outstanding

    @property
    def unwritten(self) -> int:
        """Operations that a commit failed for and that are tried again."""
        return len(self._unwritten)

    @property
    def lost(self) -> int:
        """Costs that could not be written at all."""
        return self._lost

    async def reserve(
        self,
        caller: Caller,
        nano: int,
        budgets: Sequence[BudgetSettings],
        *,
        provider: str = "",
        model: str = "",
        request: str = "",
        exempt: frozenset[str] = frozenset(),
    ) -> Reservation:
        """Take so much out of all of `budgets` that apply to the caller. Raises RateLimited when one refuses, with
        `meta`: reason, budget, limit_usd, used_usd, and `model_override` where it names one; what cannot be written raises
        StorageFull, Locked, Unavailable."""
        self._check_open()
        reservation = Reservation(
            id=new_id(), owner=self._owner, time_ns=self._time_ns(), caller=caller, provider=provider, model=model,
            request=request, nano=nano,
        )  # fmt: skip
        wanted = [b for b in budgets if applies(b, caller)]
        loop = asyncio.get_running_loop()
        ask = _Ask(Reserve(reservation=reservation, budgets=wanted, exempt=exempt), loop, loop.create_future())
        self._asking += 1
        self._queue.put(ask)
        try:
            outcome = await ask.future
        except asyncio.CancelledError:
            if ask.future.done() and not ask.future.cancelled() and ask.granted:
                self._put(Settle(reservation.id, None))  # it was granted just now
            raise
        if outcome.refused is not None:
            raise _refusal(outcome.refused, outcome.used, reservation)
        for budget in outcome.alerts:
            logger.warning("budget %s: the limit of %s USD is passed", budget.name, budget.limit_usd)
            if self._on_alert is not None:
                self._on_alert(budget, caller)
        self._outstanding += 1
        return reservation

    def settle(self, reservation: Reservation, entry: Entry) -> None:
        """It did cost this. Also for an orphan of another process."""
        self._check_open()
        self._outstanding -= reservation.owner == self._owner
        self._put(Settle(reservation.id, entry))

    def release(self, reservation: Reservation) -> None:
        """Nothing was asked, or nothing is to pay."""
        self._check_open()
        self._outstanding -= reservation.owner == self._owner
        self._put(Settle(reservation.id, None))

    def book(self, entry: Entry) -> None:
        """A cost that nothing was reserved for: of a call without budgets."""
        self._check_open()
        if len(self._later) >= UNWRITTEN_MAX:  # the file cannot be written for long
            self._lost += 1
        else:
            self._put(Book(entry))

    async def orphans(self) -> list[Reservation]:
        """What dead processes had reserved, oldest first: to be settled by whoever finds what became of it."""
        return await in_thread(lambda: _orphans(self._books))

    async def report(self, *by: By, since: str = "", until: str = "") -> list[Line]:
        """What was spent, grouped by these, dearest first. `since` and `until` are days or months (`2026-11`), inclusive."""
        columns = ", ".join(by)
        sql = (
            f"SELECT {columns + ', ' if columns else ''}sum(calls), sum(tokens_in), sum(tokens_out), sum(nano), sum(unknown),"
            " sum(estimated) FROM costs WHERE day >= ? AND substr(day, 1, ?) <= ?"
        )
        if columns:
            sql += f" GROUP BY {columns} ORDER BY sum(nano) DESC, {columns}"
        upper = until or "9999"
        rows = await in_thread(lambda: self._books.fetch(sql, (since, len(upper), upper)))
        size = len(by)
        return [
            Line(
                by=dict(zip(by, row, strict=False)), calls=row[size], tokens_in=row[size + 1], tokens_out=row[size + 2],
                nano=row[size + 3], unknown=row[size + 4], estimated=row[size + 5],
            )
            for row in rows if row[size] is not None
        ]  # fmt: skip

    async def hours(self, first: int, last: int) -> dict[int, Line]:
        """What was spent in these hours, counted from 1970; without those in which nothing was."""
        rows = await in_thread(
            lambda: self._books.fetch(
                "SELECT hour, calls, tokens_in, tokens_out, nano, unknown, estimated FROM hours WHERE hour BETWEEN ? AND ?",
                (first, last),
            )
        )
        return {
            row[0]: Line(
                by={}, calls=row[1], tokens_in=row[2], tokens_out=row[3], nano=row[4], unknown=row[5], estimated=row[6]
            )
            for row in rows
        }

    async def states(self, budgets: Sequence[BudgetSettings]) -> list[BudgetState]:
        """How far budgets are used in their current periods: for `*`, one for each name that has spent anything."""
        now = self._time_ns()

        def work() -> list[BudgetState]:
            out = []
            for budget in budgets:
                kind, of = budget.scope
                _, _, period = cell_of(budget, Caller(), now)
                rows = self._books.fetch(
                    "SELECT name, nano FROM totals WHERE kind = ? AND period = ? ORDER BY name", (kind, period)
                )
                used = dict(rows)
                names = list(used) if of == "*" else [of]
                out += [BudgetState(budget=budget, name=n, period=period, used_nano=used.get(n, 0)) for n in names]
            return out

        return await in_thread(work)

    async def flush(self) -> None:
        """Whatever was said before this is on the disk when it returns, the release of what was cancelled included."""
        self._check_open()
        loop = asyncio.get_running_loop()
        while True:
            self._released = False
            ask = _Ask(Settle("", None), loop, loop.create_future())  # of nothing: it only comes behind the others
            self._asking += 1
            self._queue.put(ask)
            await ask.future
            if not self._released:
                return

    async def aclose(self) -> None:
        """Write what is left. Idempotent. What is still reserved counts as a dead process's does."""
        if self._closed:
            return
        while self._asking:  # answers on their way; a cancelled one is released when it comes
            with contextlib.suppress(MistError):  # the thread has logged it; it is tried once more at the end
                await self.flush()
        self._closed = True
        self._queue.put(_Stop())
        await in_thread(self._thread.join)
        self._books.close()
        left = bool(self._outstanding)
        self._lock.release()
        if not left:
            self._lock.path.unlink(missing_ok=True)

    def _put(self, operation: Settle | Book) -> None:
        self._later.append(operation)
        if not self._told:
            self._told = True
            self._queue.put(None)

    def _check_open(self) -> None:
        if self._closed:
            raise Closed("the ledger is closed")

    def _answer(self, asks: list[_Ask]) -> None:
        """On the loop: hand the outcomes of one commit out."""
        for ask in asks:
            self._asking -= 1
            if ask.future.cancelled():
                if ask.granted and isinstance(ask.operation, Reserve):
                    self._released = True
                    self._put(Settle(ask.operation.reservation.id, None))
            elif ask.error is not None:
                ask.future.set_exception(ask.error)
            elif ask.outcome is not None:
                ask.future.set_result(ask.outcome)

    # --- the thread

    def _write(self) -> None:
        stopped = False
        while not stopped:
            asks, stopped = self._take()
            operations, self._unwritten = self._unwritten, []
            # told again from here on; what nobody waits for was said before what somebody does
            self._told = False
            while self._later:
                operations.append(self._later.popleft())
            before = len(operations)
            operations += [ask.operation for ask in asks]
            if not operations:
                continue
            try:
                outcomes = self._books.apply(operations)
            except MistError as exc:
                self._failed(exc, operations[:before], asks)
                if stopped and self._unwritten:
                    self._lost += len(self._unwritten)
                    logger.error("the ledger is closed with %d costs that could not be written", len(self._unwritten))
            else:
                for ask, outcome in zip(asks, outcomes[before:], strict=True):
                    ask.outcome = outcome
            if asks:
                # a loop that is closed has nobody left who waits
                with contextlib.suppress(RuntimeError):
                    asks[0].loop.call_soon_threadsafe(self._answer, asks)

    def _take(self) -> tuple[list[_Ask], bool]:
        """Whoever waits now, and whether this is the end. What nobody waits for lies for a while, to share a commit."""
        asks: list[_Ask] = []
        until = time.monotonic() + FLUSH_S if self._unwritten else math.inf
        while len(asks) < BATCH_MAX:
            try:
                if asks:
                    item = self._queue.get_nowait()
                else:
                    item = self._queue.get(timeout=max(0.0, until - time.monotonic()) if until < math.inf else None)
            except queue.Empty:
                break
            if isinstance(item, _Stop):
                return asks, True
            if item is None:
                until = min(until, time.monotonic() + FLUSH_S)
            else:
                asks.append(item)
        return asks, False

    def _failed(self, error: MistError, later: list[Operation], asks: list[_Ask]) -> None:
        """Who waits is told; what nobody waits for is kept for the next time."""
        for ask in asks:
            ask.error = error
        over = max(0, len(later) - UNWRITTEN_MAX)
        self._lost += over
        self._unwritten = later[over:]
        logger.error("the ledger cannot be written: %s", error)


def _refusal(budget: BudgetSettings, used: int, wanted: Reservation) -> RateLimited:
    kind, _ = budget.scope
    who = f"{kind} {named(kind, wanted.caller)!r}" if kind != "all" else "everybody"
    left = max(0, budget.limit_nano - used)
    meta = {
        "reason": "budget_exceeded", "budget": budget.name, "limit_usd": str(budget.limit_usd), "used_usd": dollars(used),
        "wanted_usd": dollars(wanted.nano),
    }  # fmt: skip
    if budget.model_override:
        meta["model_override"] = budget.model_override
    return RateLimited(
        f"budget {budget.name}: {dollars(left)} USD of {budget.limit_usd} are left for {who}, this may cost {dollars(wanted.nano)}",
        hint="a smaller max_tokens, a cheaper model, or a higher limit_usd in [infermux]", meta=meta, retryable=False,
        retry_after_s=ends_in_s(budget.period, wanted.time_ns),
    )  # fmt: skip


def dollars(nano: int) -> str:
    """The exact amount as text, without a tail of zeros."""
    text = f"{nano // NANO}.{nano % NANO:09d}".rstrip("0")
    return text + "0" * max(0, 2 - len(text.partition(".")[2]))


def _owners(path: Path) -> Path:
    return path.with_name(f"{path.name}.owners")


def _orphans(books: Books) -> list[Reservation]:
    """The reservations of processes that do not live: nobody holds their lock."""
    dead = [owner for owner in books.owners() if not is_held(_owners(books.path) / owner)]
    return sorted((r for owner in dead for r in books.of_owner(owner)), key=lambda r: r.time_ns)


def _bury(books: Books, time_ns: int) -> None:
    """Book for good what has been an orphan for too long, and forget who has left nothing."""
    old = [r for r in _orphans(books) if time_ns - r.time_ns > ORPHAN_S * NANO]
    if old:
        books.apply([Settle(r.id, whole(r)) for r in old])
    owners = set(books.owners())
    with translated(books.path):
        for path in _owners(books.path).iterdir():
            if path.name not in owners and not is_held(path):
                path.unlink(missing_ok=True)


def whole(reservation: Reservation) -> Entry:
    """The cost of a call that nobody knows the cost of: all that was reserved."""
    return Entry(
        time_ns=reservation.time_ns, caller=reservation.caller, provider=reservation.provider, model=reservation.model,
        nano=reservation.nano, estimated=True,
    )  # fmt: skip
