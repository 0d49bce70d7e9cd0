"""The NATS client protocol as functions over bytes: no sockets, no clock, no nats-py.

`Splitter` cuts what the server sends into control lines, messages by subscription, and publish acknowledgements; the
builders make what we send. Promises: any cut of the same bytes into chunks gives the same answer; bytes that are not
the protocol raise `Garbled` and never a wrong message; nothing is kept beyond the unfinished frame. Acknowledgements
without an error are found by one regular expression per run of them, because building an object per acknowledgement is
what limits a Python publisher.

Does not: know JetStream beyond the shape of its acknowledgements and of its ack subjects.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from operator import ge

LINE_BYTES_MAX = 1024 * 1024
"""A control line longer than this is no control line (an INFO of a large cluster is some kilobytes)."""
FRAME_BYTES_MAX = 64 * 1024 * 1024
"""The server's own upper bound of a message."""

Frame = tuple[bytes, bytes, bytes, bytes]
"""Subject, reply subject, header block, data; what is absent is empty."""


class Garbled(ValueError):
    """The bytes are not the NATS protocol: the connection cannot be trusted any more."""


class Fed:
    """What one chunk held: control lines without their CRLF, runs of frames of one subscription id in the order they
    came (also across subscriptions), (number, sequence) of plain acknowledgements."""

    __slots__ = ("acks", "frames", "lines")

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.frames: list[tuple[bytes, list[Frame]]] = []
        self.acks: list[tuple[bytes, bytes]] = []


_ONE_ACK = (
    rb'MSG [^ \r\n]+\.([0-9]+) %s [0-9]+\r\n\{"stream": ?"[^"\r\n]*", ?"seq": ?([0-9]+)'
    rb'(?:, ?"domain": ?"[^"\r\n]*")?(?:, ?"duplicate": ?true)?\}\r\n'
)


class Splitter:
    """`ack_sid` is the subscription whose messages are publish acknowledgements (empty: none). The size that a plain
    acknowledgement states is not compared with its text: it is a whole JSON object either way."""

    def __init__(self, ack_sid: bytes = b"") -> None:
        one = _ONE_ACK % re.escape(ack_sid) if ack_sid else None
        self._ack = re.compile(one).findall if one else None
        self._run = re.compile(b"(?:%s)+" % re.sub(rb"\((?!\?)", b"(?:", one)).match if one else None
        self._parts: list[bytes] = []
        self._missing = 0

    def feed(self, chunk: bytes) -> Fed:
        """Everything that is complete now. Raises Garbled."""
        fed = Fed()
        if self._parts:
            self._parts.append(chunk)
            self._missing -= len(chunk)
            if self._missing > 0:  # a large message in many chunks is joined once, not once per chunk
                return fed
            chunk = b"".join(self._parts)
            self._parts = []
        rest = self._split(chunk, fed)
        if rest < len(chunk):
            self._parts = [chunk[rest:] if rest else chunk]
        return fed

    def _split(self, buf: bytes, fed: Fed) -> int:
        """Fill `fed`; return where the unfinished frame begins, with `_missing` set."""
        pos, end = 0, len(buf)
        find, frames, run = buf.find, fed.frames, self._run
        sid: bytes = b""
        box: list[Frame] = []
        while pos < end:
            first = buf[pos]
            if first == 77 and run is not None and (found := run(buf, pos)):
                fed.acks += self._ack(buf, pos, found.end())  # type: ignore[misc]
                pos = found.end()
                continue
            eol = find(b"\r\n", pos)
            if eol < 0:
                if end - pos > LINE_BYTES_MAX:
                    raise Garbled(f"a line of more than {LINE_BYTES_MAX} bytes")
                self._missing = 1
                return pos
            # HMSG subject sid [reply] header total; MSG subject sid [reply] size
            if first == 72 and buf.startswith(b"HMSG ", pos):
                few = 5
            elif first == 77 and buf.startswith(b"MSG ", pos):
                few = 4
            else:
                fed.lines.append(buf[pos:eol])
                pos = eol + 2
                continue
            part = buf[pos:eol].split()
            try:
                size = int(part[-1])
                head = int(part[-2]) if few == 5 else 0
            except (ValueError, IndexError) as exc:
                raise Garbled(f"a message without its size: {buf[pos : pos + 80]!r}") from exc
            if not few <= len(part) <= few + 1 or not 0 <= head <= size <= FRAME_BYTES_MAX:
                raise Garbled(f"not a message: {buf[pos : pos + 80]!r}")
            middle = eol + 2 + head
            stop = eol + 2 + size
            if stop + 2 > end:
                self._missing = stop + 2 - end
                return pos
            if buf[stop] != 13 or buf[stop + 1] != 10:
                raise Garbled("a message that does not end where it should")
            if part[2] != sid:
                sid, box = part[2], []
                frames.append((sid, box))
            box.append((part[1], part[3] if len(part) > few else b"", buf[eol + 2 : middle], buf[middle:stop]))
            pos = stop + 2
        return pos


# --- what we send --------------------------------------------------------------------------------------------------


def pub(subject: bytes, data: bytes, reply: bytes = b"") -> bytes:
    if reply:
        return b"PUB %s %s %d\r\n%b\r\n" % (subject, reply, len(data), data)
    return b"PUB %s %d\r\n%b\r\n" % (subject, len(data), data)


def hpub(subject: bytes, lines: bytes, data: bytes, reply: bytes = b"") -> bytes:
    """`lines` are whole header lines, each with its CRLF."""
    head = len(lines) + 12
    return b"HPUB %s %s %d %d\r\nNATS/1.0\r\n%b\r\n%b\r\n" % (subject, reply, head, head + len(data), lines, data)


def sub(subject: bytes, sid: bytes) -> bytes:
    return b"SUB %s %s\r\n" % (subject, sid)


def unsub(sid: bytes) -> bytes:
    return b"UNSUB %s\r\n" % sid


def settle(prefix: str, tails: Iterable[str], what: bytes) -> bytes:
    """One publish per delivery: `prefix` + tail is its ack subject, `what` the verb (+ACK, -NAK …)."""
    before = f"PUB {prefix}"
    after = f" {len(what)}\r\n{what.decode()}\r\n"
    joined = (after + before).join(tails)
    return (before + joined + after).encode() if joined else b""


# --- what the server says in headers -------------------------------------------------------------------------------


def status(header: bytes) -> int:
    """The status of a header block: 404, 408, 503…; 0 for a plain one."""
    return int(header[9:12]) if header[8:9] == b" " and header[9:12].isdigit() else 0


def status_text(header: bytes) -> str:
    """`409 Consumer Deleted`."""
    return header[9 : header.find(b"\r\n")].decode(errors="replace").strip() if header[8:9] == b" " else ""


def field(header: bytes, name: bytes) -> bytes:
    """The value of the last header line of that name (ours are written first, the server's last), or empty."""
    at = header.rfind(b"\r\n%s: " % name)
    if at < 0:
        return b""
    start = at + len(name) + 4
    return header[start : header.find(b"\r\n", start)]


_ACK_SUBJECT = re.compile(
    rb"(\$JS\.ACK\.(?:[^.]+\.[^.]+\.)?[^.]+\.[^.]+\.)(([0-9]+)\.([0-9]+)\.([0-9]+)\.([0-9]+)\.([0-9]+)(?:\.[^.]+)?)"
).fullmatch


def ack_subject(reply: bytes) -> tuple[bytes, bytes, int, int, int, int, int] | None:
    """An ack subject in parts: prefix, tail, deliveries, stream sequence, consumer sequence, time in ns, what is left.

    Both forms: `$JS.ACK.<stream>.<consumer>.…` and the one with domain and account.
    """
    found = _ACK_SUBJECT(reply)
    if found is None:
        return None
    prefix, tail, tried, stream, consumer, time_ns, left = found.groups()
    return prefix, tail, int(tried), int(stream), int(consumer), int(time_ns), int(left)


delivery = re.compile(
    rb"(\$JS\.ACK\.(?:[^.]+\.[^.]+\.)?[^.]+\.[^.]+\.)(([0-9]+)\.([0-9]+)\.([0-9]+)\.([0-9]+)\.[0-9]+(?:\.[^.]+)?)"
).fullmatch
"""The match of an ack subject: prefix, tail, deliveries, stream sequence, consumer sequence, time in ns (as bytes)."""


@lru_cache(maxsize=4096)
def second_ns(text: bytes) -> int:
    """`2026-11-25T13:34:07` as Unix nanoseconds. Raises ValueError."""
    from calendar import timegm

    y, mo, d, h, mi, s = text[:4], text[5:7], text[8:10], text[11:13], text[14:16], text[17:19]
    return timegm((int(y), int(mo), int(d), int(h), int(mi), int(s))) * 1_000_000_000


def time_ns(text: bytes) -> int:
    """RFC 3339 in UTC, as the server writes it, as Unix nanoseconds. Raises Garbled."""
    try:
        at = second_ns(text[:19])
        if text[19:20] == b".":
            at += int(text[20:-1].ljust(9, b"0"))
    except ValueError as exc:
        raise Garbled(f"not a time: {text[:40]!r}") from exc
    return at


def rfc3339(ns: int) -> str:
    """Unix nanoseconds as the server reads them."""
    from time import gmtime, strftime

    seconds, part = divmod(ns, 1_000_000_000)
    return f"{strftime('%Y-%m-%dT%H:%M:%S', gmtime(seconds))}.{part:09d}Z"


def deliveries(prefix: bytes, newest: int, frames: list[Frame]) -> tuple[list[int], list[int], list[str], int] | None:
    """Stream sequences, times in ns, tails of the ack subjects, and the last consumer sequence, of a run of first
    deliveries whose ack subjects all begin with `prefix` and whose consumer sequences grow from above `newest`. None
    when any frame is something else: then each is looked at alone."""
    size = len(prefix)
    tails = [f[1][size:] for f in frames]
    flat = b".".join(tails).split(b".")
    parts = 5 if len(flat) == 5 * len(tails) else 6  # with domains, a random token comes last
    if (
        not tails
        or len(flat) != parts * len(tails)
        or b"".join([f[1][:size] for f in frames]) != prefix * len(tails)
        or flat[::parts].count(b"1") != len(tails)
        or {t.count(b".") for t in tails} != {parts - 1}
    ):
        return None
    try:
        numbers = list(map(int, flat[2::parts]))
        if numbers[0] <= newest or any(map(ge, numbers, numbers[1:])):
            return None
        return list(map(int, flat[1::parts])), list(map(int, flat[3::parts])), _lines(tails), numbers[-1]
    except ValueError:
        return None


def _lines(texts: list[bytes]) -> list[str]:
    """All of them decoded at once."""
    return b"\n".join(texts).decode().split("\n")
