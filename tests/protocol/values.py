"""Hypothesis strategies and small makers shared by the protocol tests."""

from __future__ import annotations

import json
import zlib
from typing import Any

from hypothesis import strategies as st
from msgspec import Raw

from mist.protocol.envelope import Envelope

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
name = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
integers = st.integers(-(2**63), 2**64 - 1)  # what JSON and msgpack both hold
numbers = integers | st.floats(allow_nan=False, allow_infinity=False)
scalars = st.none() | st.booleans() | numbers | text
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4), max_leaves=12
)


def raw_json(value: Any, draw: Any) -> str:
    """One of the many spellings of a value: white space, escapes, number forms."""
    space = st.sampled_from(["", "", " ", "\t", "\r ", "  "])

    def gap() -> str:
        return str(draw(space))

    if isinstance(value, dict):
        inside = ",".join(f"{gap()}{raw_json(k, draw)}{gap()}:{raw_json(v, draw)}" for k, v in value.items())
        return f"{gap()}{{{inside or gap()}}}{gap()}"
    if isinstance(value, list):
        return f"{gap()}[{','.join(raw_json(v, draw) for v in value) or gap()}]{gap()}"
    if isinstance(value, str):
        out = []
        for char in value:
            if char in '"\\' or char < " " or (ord(char) < 0x10000 and draw(st.integers(0, 5)) == 0):
                form = "\\u%04X" if draw(st.booleans()) else "\\u%04x"
                out.append(form % ord(char))
            else:
                out.append(char)
        return f'{gap()}"{"".join(out)}"{gap()}'
    if value is None or isinstance(value, bool):
        return f"{gap()}{json.dumps(value)}{gap()}"
    if isinstance(value, float):
        return f"{gap()}{value!r}{gap()}"
    return f"{gap()}{value}{gap()}"


@st.composite
def spellings(draw: Any) -> bytes:
    """The bytes of some JSON value, as odd as JSON allows."""
    return raw_json(draw(values), draw).encode()


@st.composite
def envelopes(draw: Any) -> Envelope:
    """Any envelope that we could make or receive."""
    payload = Raw(draw(spellings()).strip(b" \t\r\n"))
    return Envelope(
        version="1", id=draw(name), source=draw(name), type=draw(name),
        timestamp_ns=draw(st.integers(-(2**63), 2**63 - 1)), payload=payload,
        checksum=draw(st.sampled_from([0, zlib.crc32(payload)])),
        correlation_id=draw(text), causation_id=draw(text), traceparent=draw(text), tenant=draw(text),
    )  # fmt: skip


def document(payload: str | bytes = b"{}", **fields: Any) -> bytes:
    """A JSON envelope written by hand; a field that is None is left out, bytes go in as they are."""
    known: dict[str, Any] = {"version": "1", "id": "a1", "source": "test", "type": "x.y", "timestamp_ns": 1}
    known |= fields
    body = payload.encode() if isinstance(payload, str) else payload
    parts = [b'"%s":%s' % (k.encode(), _form(v)) for k, v in known.items() if v is not None]
    return b"{%s}" % b",".join([*parts, b'"payload":' + body])


def _form(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    return str(value).encode() if isinstance(value, int) else b'"%s"' % str(value).encode()


def nested(depth: int, *, objects: bool = False) -> bytes:
    """A payload of so many lists (or objects) inside one another."""
    return b'{"a":' * depth + b"1" + b"}" * depth if objects else b"[" * depth + b"]" * depth
