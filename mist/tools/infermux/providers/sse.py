"""Server-sent events from bytes, however they are cut.

Promises: the same events wherever the bytes were split; lines end with LF, CR or CRLF; comments, `id` and `retry` are passed
over; an event that no blank line ended is not given. An event is bounded: TooLarge.
"""

from __future__ import annotations

from typing import NamedTuple

from mist.errors import TooLarge

EVENT_BYTES_MAX = 8 * 1024 * 1024
_BOM = b"\xef\xbb\xbf"


class Event(NamedTuple):
    """`name` is empty where the sender gave none. `data` is what stood in the `data` lines, joined by LF."""

    name: str
    data: bytes


class Parser:
    def __init__(self, event_bytes_max: int = EVENT_BYTES_MAX) -> None:
        self._event_bytes_max = event_bytes_max
        self._rest: list[bytes] = []
        """The line under way, in the pieces it came in."""
        self._size = 0
        """Of the event under way, its unfinished line included."""
        self._name = b""
        self._data: list[bytes] = []
        self._after_cr = False
        self._first = True

    def feed(self, data: bytes) -> list[Event]:
        """The events that these bytes complete."""
        if self._after_cr and data.startswith(b"\n"):
            data = data[1:]  # the second half of a CRLF
            self._after_cr = False
        if not data:
            return []
        if b"\r" in data:
            self._after_cr = data.endswith(b"\r")
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        else:
            self._after_cr = False
        events: list[Event] = []
        lines = data.split(b"\n")
        if len(lines) > 1 and self._rest:
            lines[0] = b"".join([*self._rest, lines[0]])
            self._size -= sum(map(len, self._rest))
            self._rest = []
        rest = lines.pop()
        for line in lines:
            if self._first:
                line = line.removeprefix(_BOM)
                self._first = False
            if line:
                self._grow(len(line))
                self._line(line)
            else:
                self._size = 0
                if self._data:
                    events.append(Event(self._name.decode("utf-8", "replace"), b"\n".join(self._data)))
                    self._data = []
                self._name = b""
        if rest:
            self._grow(len(rest))
            self._rest.append(rest)
        return events

    def _line(self, line: bytes) -> None:
        if line.startswith(b"data: "):
            self._data.append(line[6:])
            return
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            self._data.append(value)
        elif field == b"event":
            self._name = value

    def _grow(self, more: int) -> None:
        self._size += more
        if self._size > self._event_bytes_max:
            raise TooLarge("server-sent event", size_bytes=self._size, size_bytes_max=self._event_bytes_max)
