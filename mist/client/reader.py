"""A reader: a cursor that gives envelopes.

Iterating gives `Received`. Foreign data (a record that is no acceptable envelope) is raised, skipped and counted, or
given as `Bad`, as `on_bad` says. After a raise, iterating again goes on behind the record; a checkpoint saved before
that gives it again. Positions, checkpoints and gaps are the cursor's and work the same, and so does its rule that a
record is done when the next is asked for.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from types import TracebackType
from typing import Generic, Self, TypeVar, cast

from mist.broker.base import Page, Record
from mist.broker.cursor import Cursor, Gap, Lag
from mist.client.blobs import Blobs
from mist.client.received import Bad, OnBad, Received, receive
from mist.errors import InvalidArgument, MistError

R = TypeVar("R", bound=Received | Bad)
Opening = Callable[[], Awaitable[Cursor]]


class Reader(Generic[R]):
    """Made by `Client.replay` and `Client.follow`. With a name, use it as `async with` so that its position is saved.

    `opening` makes the cursor and is called once, at the first use.
    """

    def __init__(
        self, opening: Opening, *, follow: bool, to: int | None, on_bad: OnBad, wait_s: float = 30.0,
        blobs: Blobs | None = None,
    ) -> None:  # fmt: skip
        if on_bad not in ("raise", "skip", "yield"):
            raise InvalidArgument(f'on_bad is "raise", "skip" or "yield", not {on_bad!r}')
        self._opening = opening
        self._cursor: Cursor | None = None
        self._follow = follow
        self._to = to
        self._on_bad = on_bad
        self._wait_s = wait_s
        self._blobs = blobs
        self._pages: AsyncGenerator[Page, None] | None = None
        self.bad_count = 0
        """Records that were no acceptable envelope so far."""

    async def open(self) -> Cursor:
        """The cursor below, opened and its checkpoint loaded. Raises NotFound, WrongIncarnation."""
        if self._cursor is None:
            self._cursor = await self._opening()
        return self._cursor

    @property
    def position(self) -> int:
        return 0 if self._cursor is None else self._cursor.position

    @property
    def gaps(self) -> tuple[Gap, ...]:
        """The ranges that were skipped (on_gap="skip"), the newest 1000 of them."""
        return () if self._cursor is None else tuple(self._cursor.gaps)

    async def seek(self, after: int) -> None:
        (await self.open()).seek(after)

    async def lag(self) -> Lag:
        return await (await self.open()).lag()

    async def save(self, *, force: bool = False) -> int:
        """Everything given so far is done; store that position now."""
        return await (await self.open()).save(force=force)

    def __aiter__(self) -> AsyncIterator[R]:
        return self._records()

    async def _records(self) -> AsyncGenerator[R, None]:
        cursor = await self.open()
        records = cursor.follow(wait_s=self._wait_s) if self._follow else cursor.replay(to=self._to)
        async for record in records:
            received = self._receive(record)
            if received is not None:
                yield received

    async def load(self, *, wait_s: float) -> Page | None:
        """The next page for `hand`; None at the end of a replay. A follower waits up to `wait_s`, then gives an empty
        page. This and `hand` are for reading here and using there (mist.sync)."""
        cursor = await self.open()
        if self._follow:
            return await cursor.read_page(wait_s=wait_s)
        if self._pages is None:
            self._pages = cursor.pages_to_hand(to=self._to)
        page: Page | None = None
        try:
            page = await anext(self._pages, None)
        finally:
            if page is None:
                self._pages = None
        return page

    def hand(self, page: Page) -> Iterator[R]:
        """The envelopes of a page from `load`, moving the position with each."""
        cursor = self._cursor
        if cursor is None:
            return
        for record in cursor.hand(page):
            received = self._receive(record)
            if received is not None:
                yield received

    def _receive(self, record: Record) -> R | None:
        try:
            return cast(R, receive(record, self._blobs))
        except MistError as exc:
            self.bad_count += 1
            if self._on_bad == "raise":
                raise
            return cast(R, Bad(record, exc)) if self._on_bad == "yield" else None

    async def aclose(self) -> None:
        """Save what is done (with a name) and stop. Idempotent."""
        if self._cursor is not None:
            await self._cursor.aclose()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.aclose()
