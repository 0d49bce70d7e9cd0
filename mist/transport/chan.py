"""`chan:NAME` — in-process, two ends that share a name; `chan:` — a private loop-back, as in the Go library.

    chan:NAME?size=256&full=wait|fail

Promises: the first dial of a name is one end, the second the other; what one sends the other receives, in order. A send
waits while `size` envelopes lie unreceived, or raises Overloaded at once with `full=fail`, then sending nothing.
Closing an end lets the other drain what was sent and then raises EndOfStream there, for a waiting receive too; sending
to a closed end raises EndOfStream. The name is free again when both ends are closed. The ends may be used in different
threads and event loops.

Does not: copy. Envelopes are values and are handed over as they are. Nothing survives the process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from mist.errors import Conflict, InvalidArgument, TooLarge
from mist.protocol import codec
from mist.protocol.envelope import SIZE_BYTES_MAX, Envelope
from mist.protocol.url import Url
from mist.transport._queue import Queue
from mist.transport.base import RECEIVE_LIMIT, Transport, check_limit, closed_error

SIZE = 256
_FULL = ("wait", "fail")


class ChanTransport(Transport):
    """One end. Made by `dial`, `pair` or `loop_back`."""

    def __init__(
        self, url: str, out: Queue[Envelope], into: Queue[Envelope], *, full: str, size_bytes_max: int,
        on_close: Callable[[], None],
    ) -> None:  # fmt: skip
        self.url = url
        self.size_bytes_max = size_bytes_max
        self._out = out
        self._into = into
        self._fail = full == "fail"
        self._on_close = on_close
        self._closed = False

    async def send(self, envelope: Envelope) -> None:
        if len(envelope.payload) > self.size_bytes_max >> 1:
            self._check_size(envelope)
        if self._closed:
            raise closed_error(self.url)
        if self._fail:
            self._out.put_nowait((envelope,))
        else:
            await self._out.put(envelope)

    async def send_many(self, envelopes: Sequence[Envelope]) -> None:
        if self._closed:
            raise closed_error(self.url)
        half = self.size_bytes_max >> 1
        for envelope in envelopes:
            if len(envelope.payload) > half:
                self._check_size(envelope)
        if self._fail:
            self._out.put_nowait(envelopes)
        else:
            await self._out.put_many(envelopes)

    def _check_size(self, envelope: Envelope) -> None:
        """The limit of the paths that encode holds here too, or a larger one would fail at the next hop. Nothing is
        encoded here, so only a payload above half of it has its envelope measured."""
        size = len(codec.encode(envelope))
        if size > self.size_bytes_max:
            raise codec.refuse(TooLarge(f"envelope {envelope.id}", size_bytes=size, size_bytes_max=self.size_bytes_max))

    async def receive(self) -> Envelope:
        if self._closed:
            raise closed_error(self.url)
        return await self._into.get()

    async def receive_many(self, limit: int = RECEIVE_LIMIT, wait_s: float | None = None) -> list[Envelope]:
        check_limit(limit)
        if self._closed:
            raise closed_error(self.url)
        return await self._into.get_many(limit, wait_s)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._out.end()
        self._into.abandon()
        self._on_close()


class _Name:
    """The two ends of one name: how many were dialled, how many are open."""

    def __init__(self, size: int, name: str) -> None:
        self.size = size
        self.there: Queue[Envelope] = Queue(size, name)
        self.back: Queue[Envelope] = Queue(size, name)
        self.dialled = 0
        self.open = 0


_names: dict[str, _Name] = {}
_lock = threading.Lock()


def from_url(url: Url, *, size_bytes_max: int = SIZE_BYTES_MAX) -> ChanTransport:
    url.refuse_unknown("size", "full")
    text = url.get("size", str(SIZE))
    if not (text.isascii() and text.isdigit()):
        raise InvalidArgument(f"{url}: size={text!r} is not a number")
    size, full = int(text), url.get("full", "wait")
    if not url.target:
        return loop_back(size, full=full, size_bytes_max=size_bytes_max)
    return _named(url.target, size, full, size_bytes_max)


def loop_back(size: int = SIZE, *, full: str = "wait", size_bytes_max: int = SIZE_BYTES_MAX) -> ChanTransport:
    """One end that receives what it sends."""
    _check(size, full)
    queue: Queue[Envelope] = Queue(size, "chan:")
    return ChanTransport("chan:", queue, queue, full=full, size_bytes_max=size_bytes_max, on_close=_nothing)


def pair(
    size: int = SIZE, *, full: str = "wait", size_bytes_max: int = SIZE_BYTES_MAX
) -> tuple[ChanTransport, ChanTransport]:
    """Two ends without a name."""
    _check(size, full)
    there: Queue[Envelope] = Queue(size, "chan:")
    back: Queue[Envelope] = Queue(size, "chan:")
    return (
        ChanTransport("chan:", there, back, full=full, size_bytes_max=size_bytes_max, on_close=_nothing),
        ChanTransport("chan:", back, there, full=full, size_bytes_max=size_bytes_max, on_close=_nothing),
    )


def _named(name: str, size: int, full: str, size_bytes_max: int) -> ChanTransport:
    _check(size, full)
    url = f"chan:{name}"
    with _lock:
        shared = _names.get(name)
        if shared is None:
            shared = _names[name] = _Name(size, url)
        if shared.dialled == 2:
            raise Conflict(f"{url}: both ends are taken", hint="close them, or choose another name")
        if shared.size != size:
            raise Conflict(f"{url}: the other end was made with size={shared.size}, this one asks for {size}")
        out, into = (shared.there, shared.back) if shared.dialled == 0 else (shared.back, shared.there)
        shared.dialled += 1
        shared.open += 1

    def on_close() -> None:
        with _lock:
            shared.open -= 1
            # An end that closed before the other was dialled leaves what it sent for that one.
            if shared.open == 0 and (shared.dialled == 2 or not shared.there) and _names.get(name) is shared:
                del _names[name]

    return ChanTransport(url, out, into, full=full, size_bytes_max=size_bytes_max, on_close=on_close)


def _check(size: int, full: str) -> None:
    if size < 1:
        raise InvalidArgument(f"chan: size={size} cannot be right", hint="at least 1")
    if full not in _FULL:
        raise InvalidArgument(f"chan: full={full!r} is not known", hint=f"one of {', '.join(_FULL)}")


def _nothing() -> None:
    """A nameless end has nothing to give back."""
