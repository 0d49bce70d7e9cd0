"""Any bytes as what a NATS server sends, in any cuts: the same messages, or refused; and any header block."""

from __future__ import annotations

import sys

from mist_nats import wire
from mist_nats.headers import read_header
from tests.fuzz.driver import Target, main


def fed(chunks: list[bytes]) -> tuple[list[bytes], list[tuple[bytes, wire.Frame]], list[tuple[bytes, bytes]]] | None:
    """Everything that came out, or None when it was refused."""
    splitter = wire.Splitter(b"1")
    lines: list[bytes] = []
    frames: list[tuple[bytes, wire.Frame]] = []
    acks: list[tuple[bytes, bytes]] = []
    try:
        for chunk in chunks:
            got = splitter.feed(chunk)
            lines += got.lines
            frames += [(sid, f) for sid, run in got.frames for f in run]
            acks += got.acks
    except wire.Garbled:
        return None
    return lines, frames, acks


def check(data: bytes) -> bool:
    whole = fed([data])
    step = 1 + sum(data) % 7
    parts = fed([data[i : i + step] for i in range(0, len(data), step)])
    if b"MSG" in data and b'"stream"' in data and whole != parts:
        return False  # the size of a whole acknowledgement is not compared with its text: speed, and the server's word
    assert whole == parts, "the same, refused or not, whatever the cuts"
    if whole is None:
        return False
    for _, (_, reply, header, body) in whole[1]:
        wire.status(header)
        wire.status_text(header)
        wire.ack_subject(reply)
        id, headers, rest = read_header(header, body)
        assert isinstance(id, str)
        assert isinstance(headers, tuple)
        assert body.startswith(rest)
    return bool(whole[1] or whole[2])


SEEDS = [
    b'MSG _INBOX.a.a.7 1 25\r\n{"stream":"S", "seq":1234}\r\nMSG _INBOX.a.a.8 1 24\r\n{"stream":"S","seq":1235}\r\n',
    b"MSG a.b 4 2\r\nhi\r\nPING\r\n",
    b"MSG a.b 4 $JS.ACK.S.c.1.2.3.1795613647334509076.5 0\r\n\r\n+OK\r\n",
    b"HMSG a.b 5 $JS.ACK.d.h.S.c.1.2.3.4.5.r 12 14\r\nNATS/1.0\r\n\r\nhi\r\n",
    b'HMSG a 5 51 53\r\nNATS/1.0\r\nMist-Headers: [["a","b"]]\r\nX: y\r\nZ: 12\r\n\r\nhi\r\n',
    b"HMSG a 5 30 32\r\nNATS/1.0\r\nNats-Msg-Id: =a=2Eb\r\n\r\n[]\r\n",
    b"HMSG a 6 28 28\r\nNATS/1.0 404 No Messages\r\n\r\n\r\n",
]
WORDS = [
    b"MSG ", b"HMSG ", b"\r\n", b"PING\r\n", b"-ERR 'x'\r\n", b" 1 ", b" 0\r\n", b"NATS/1.0", b"Nats-Msg-Id: ",
    b"Mist-Headers-Bytes: 2\r\n", b"Mist-Headers: ", b"99999999999", b"-1", b"\xff", b"\x00", b'{"stream":"', b'"seq":',
]  # fmt: skip
TARGET = Target("nats_wire", SEEDS, WORDS, check)

if __name__ == "__main__":
    sys.exit(main(["nats_wire"]))
