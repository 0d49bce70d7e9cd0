"""The wire: frames out, replies in, many commands under way on one connection.

Replies come in the order of the commands, so a caller that stops waiting (cancelled, timed out) leaves its place in the
queue, and nobody gets another's reply. Every call has a time after which the connection is given up: a server that
holds the connection and says nothing (stopped, cut off) must not hold its callers. Does not: connect, authenticate,
reconnect (link.py), or know what a command means.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, cast

import hiredis

Command = tuple[Any, ...]
ReplyError: type[Exception] = hiredis.ReplyError


class Lost(Exception):
    """The connection ended while this call was under way: nobody knows whether it was executed."""


class NotSent(Exception):
    """The connection had ended before: nothing was sent."""


def pack(commands: Sequence[Command]) -> bytes:
    """The bytes of these commands."""
    return b"".join([hiredis.pack_command(c) for c in commands])


class _Call:
    __slots__ = ("begun", "count", "deadline", "future", "replies")

    def __init__(
        self, future: asyncio.Future[list[Any]], count: int, deadline: float, begun: Callable[[], None] | None
    ) -> None:
        self.begun = begun
        self.future = future
        self.count = count
        self.deadline = deadline
        self.replies: list[Any] = []


class Wire(asyncio.Protocol):
    """One connection. Made by link.py, which hands it a transport that has said hello already."""

    def __init__(self, on_lost: Callable[[Wire], None] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._reader = hiredis.Reader()
        self._calls: deque[_Call] = deque()
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._on_lost = on_lost
        self.role_at = 0.0
        """The loop time at which its server last said that it is a primary."""
        self.kept: object = None
        """What must live as long as the transport."""

    @property
    def alive(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def call(
        self, frame: bytes, count: int, timeout_s: float, begun: Callable[[], None] | None = None
    ) -> asyncio.Future[list[Any]]:
        """Send commands; the future holds their `count` replies (an error reply is a value, not raised). It fails with
        Lost, or NotSent. `begun` is called when the first bytes of a reply arrive: the server is free again."""
        future: asyncio.Future[list[Any]] = self._loop.create_future()
        if self._transport is None or self._transport.is_closing():
            future.set_exception(NotSent("not connected"))
            return future
        self._calls.append(_Call(future, count, self._loop.time() + timeout_s, begun))
        if self._timer is None:
            self._timer = self._loop.call_later(timeout_s, self._tick)
        self._transport.write(frame)
        return future

    def data_received(self, data: bytes) -> None:
        reader, calls = self._reader, self._calls
        try:
            reader.feed(data)
            if calls and calls[0].begun is not None:
                begun, calls[0].begun = calls[0].begun, None
                begun()
            while True:
                reply = reader.gets()
                if reply is False:
                    return
                if not calls:
                    self.abort("a reply that nobody asked for")
                    return
                call = calls[0]
                call.replies.append(reply)
                if len(call.replies) == call.count:
                    calls.popleft()
                    if not call.future.done():
                        call.future.set_result(call.replies)
        except hiredis.HiredisError as exc:
            self.abort(f"not the Redis protocol: {exc}")

    def _tick(self) -> None:
        """Give up when the oldest call's time is over, else look again when it will be."""
        self._timer = None
        if not self._calls:
            return
        # a blocking read waits longer than what stands behind it, so the whole queue is looked at
        now, next_ = self._loop.time(), min(c.deadline for c in self._calls)
        if next_ <= now:
            self.abort("no answer in time")
        else:
            self._timer = self._loop.call_later(next_ - now, self._tick)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(f"the connection was lost{f': {exc}' if exc else ''}")

    def abort(self, why: str = "closed") -> None:
        """End the connection now; calls under way fail with Lost."""
        if self._transport is not None:
            self._transport.abort()
        self._end(why)

    def _end(self, why: str) -> None:
        self._transport = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        calls, self._calls = self._calls, deque()
        for call in calls:
            if not call.future.done():
                call.future.set_exception(Lost(why))
                call.future.exception()  # a caller that went away must not make a warning
        on_lost, self._on_lost = self._on_lost, None
        if on_lost is not None:
            on_lost(self)


def first_error(replies: Sequence[Any]) -> Exception | None:
    """The first error among these replies, MULTI's answers included, when there is one."""
    for reply in replies:
        if isinstance(reply, ReplyError):
            return reply
    return None
