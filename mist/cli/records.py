"""A record as the command line sees it: decoded when asked, shown in each format, summed up in one line.

`View` is lazy: a filter by subject decodes nothing. Data that is no acceptable envelope is foreign and is shown as it
is, never dropped. `document` is the documented JSON shape:

    {"sequence":1,"subject":"a.b","timestamp_ns":1,"envelope":{…}}                      the envelope's bytes verbatim
    {"sequence":1,"subject":"a.b","timestamp_ns":1,"data":"…","encoding":"utf-8"}       foreign, text
    {"sequence":1,"subject":"a.b","timestamp_ns":1,"data":"…","encoding":"base64"}      foreign, bytes
    … ,"id":"…"        when the record's id is not the envelope's       … ,"headers":[["name","value"]]  when there are any
    … ,"error":{"code":"checksum_mismatch","message":"…"}               when an envelope was refused
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import msgspec

from mist.broker.base import Record, header
from mist.cli.render import moment, seq
from mist.errors import MistError
from mist.protocol import codec
from mist.protocol.envelope import Envelope
from mist.protocol.tracecontext import parse_traceparent

_encode = msgspec.json.Encoder().encode
_UNREAD: Any = object()
MISSING: Any = object()
"""What `View.get` gives for a path that leads nowhere."""


class View:
    """One record, decoded at most once."""

    __slots__ = ("_envelope", "_payload", "error", "record")

    def __init__(self, record: Record) -> None:
        self.record = record
        self.error: MistError | None = None
        self._envelope: Envelope | None = _UNREAD
        self._payload: Any = _UNREAD

    @property
    def msgpack(self) -> bool:
        return bool(self.record.headers) and header(self.record.headers, "Content-Type") == codec.MSGPACK

    @property
    def envelope(self) -> Envelope | None:
        """The envelope, or None for foreign data; `error` says why."""
        if self._envelope is _UNREAD:
            try:
                data = self.record.data
                self._envelope = codec.decode_msgpack(data) if self.msgpack else codec.decode(data)
            except MistError as exc:
                self.error = exc
                self._envelope = None
        return self._envelope

    @property
    def type(self) -> str:
        env = self.envelope
        return env.type if env is not None else ""

    @property
    def source(self) -> str:
        env = self.envelope
        return env.source if env is not None else ""

    @property
    def id(self) -> str:
        env = self.envelope
        return env.id if env is not None else self.record.id

    @property
    def payload(self) -> Any:
        """The payload as plain values; for foreign data its JSON, or None."""
        if self._payload is _UNREAD:
            env = self.envelope
            try:
                self._payload = env.data() if env is not None else msgspec.json.decode(self.record.data)
            except (MistError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                self._payload = None  # foreign bytes have no fields; the data itself is still shown
        return self._payload

    @property
    def trace_id(self) -> str:
        env = self.envelope
        if env is not None and env.traceparent:
            context = parse_traceparent(env.traceparent)
            if context is not None:
                return context.trace_id
        payload = self.payload
        found = payload.get("trace_id") if isinstance(payload, dict) else None
        return found if isinstance(found, str) else ""

    def get(self, path: tuple[str, ...]) -> Any:
        """The value at a path, or MISSING."""
        head, rest = path[0], path[1:]
        record, env = self.record, self.envelope
        value: Any
        if head == "envelope" and rest:
            head, rest = rest[0], rest[1:]
        if head == "payload":
            value = self.payload
        elif head == "headers":
            value = dict(record.headers)
            return value.get(".".join(rest), MISSING) if rest else value
        elif head in ("sequence", "subject", "timestamp_ns"):
            value = getattr(record, head)
        elif head == "time":
            value = moment(record.timestamp_ns)
        elif head == "size":
            value = len(record.data)
        elif head == "summary":
            value = summary(self)
        elif head == "trace_id":
            value = self.trace_id
        elif head == "id":
            value = self.id
        elif head == "sent_ns":
            value = env.timestamp_ns if env is not None else MISSING
        elif env is not None and head in Envelope.__struct_fields__:
            value = getattr(env, head)
        else:
            return MISSING
        for step in rest:
            if isinstance(value, dict):
                value = value.get(step, MISSING)
            elif isinstance(value, list) and step.isdigit() and int(step) < len(value):
                value = value[int(step)]
            else:
                return MISSING
        return value


def document(view: View, *, exact: bool = False) -> bytes:
    """The JSON object of a record, on one line. `exact` keeps bytes that JSON lines cannot hold as base64, so that an
    import gives the same record; otherwise such an envelope is shown with its line breaks turned to spaces."""
    record = view.record
    env = view.envelope
    number = record.sequence
    head = b'{"sequence":%s,"subject":%s,"timestamp_ns":%d,' % (
        _encode(seq(number)),
        _encode(record.subject),
        record.timestamp_ns,
    )
    data = record.data
    if env is not None and not view.msgpack:
        broken = b"\n" in data or b"\r" in data
        if not _is_utf8(data):
            body = _foreign(data) if exact else b'"envelope":' + codec.encode(env)
        elif broken and exact:
            body = b'"data":%s,"encoding":"base64"' % _encode(base64.b64encode(data).decode())
        else:
            # outside of strings JSON allows line breaks, inside it does not: they can all become spaces
            body = b'"envelope":' + (data.replace(b"\n", b" ").replace(b"\r", b" ") if broken else data).strip()
    elif env is not None and not exact:
        body = b'"envelope":' + codec.encode(env)
    else:
        body = _foreign(data)
    tail = b""
    if record.id and (env is None or record.id != env.id):
        tail += b',"id":' + _encode(record.id)
    if not record.id and env is not None:
        tail += b',"id":""'
    if record.headers:
        tail += b',"headers":' + _encode(record.headers)
    if env is None and view.error is not None and _looks_like_envelope(data):
        tail += b',"error":' + _encode({"code": view.error.code, "message": view.error.message})
    return head + body + tail + b"}"


def _foreign(data: bytes) -> bytes:
    try:
        return b'"data":%s,"encoding":"utf-8"' % _encode(data.decode())
    except UnicodeDecodeError:
        return b'"data":%s,"encoding":"base64"' % _encode(base64.b64encode(data).decode())


def _is_utf8(data: bytes) -> bool:
    if data.isascii():
        return True
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _looks_like_envelope(data: bytes) -> bool:
    return data[:1] == b"{" and b'"payload"' in data


def as_row(view: View) -> dict[str, Any]:
    """Flat columns for CSV."""
    env = view.envelope
    return {
        "sequence": seq(view.record.sequence),
        "timestamp_ns": view.record.timestamp_ns,
        "subject": view.record.subject,
        "type": view.type,
        "source": view.source,
        "id": view.id,
        "payload": bytes(env.payload).decode("utf-8", "replace") if env is not None else _text(view.record.data),
    }


def selected(view: View, paths: list[tuple[str, tuple[str, ...]]]) -> dict[str, Any]:
    """The chosen fields, by the names they were asked for; absent ones are null."""
    out: dict[str, Any] = {}
    for name, path in paths:
        value = view.get(path)
        if path == ("sequence",):
            value = seq(value)
        out[name] = None if value is MISSING else value
    return out


def _text(data: bytes) -> str:
    return data.decode("utf-8", "backslashreplace")


def line(view: View) -> str:
    """One line of a table: sequence, time, subject or type, summary. Escaping is the caller's."""
    record = view.record
    return f"{record.sequence:>8}  {moment(record.timestamp_ns)}  {record.subject}  {summary(view)}"


def summary(view: View) -> str:
    """What matters in one line, by type."""
    env = view.envelope
    if env is None:
        why = f"[{view.error.code}] " if view.error is not None and _looks_like_envelope(view.record.data) else ""
        return why + _text(view.record.data[:400])
    payload = view.payload
    made = _SUMMARIES.get(env.type)
    if made is not None and isinstance(payload, dict):
        return " ".join(p for p in made(payload) if p)
    body = bytes(env.payload)[:400].decode("utf-8", "replace")
    return f"{env.source}: {body}"


def _get(payload: dict[str, Any], *path: str) -> Any:
    value: Any = payload
    for step in path:
        value = value.get(step) if isinstance(value, dict) else None
    return value


def _span(p: dict[str, Any]) -> list[str]:
    start, end = p.get("start_ns"), p.get("end_ns")
    took = ""
    if isinstance(start, int) and isinstance(end, int) and end > start > 0:
        took = f"{(end - start) / 1e6:.0f}ms"
    tokens_in, tokens_out = _get(p, "attrs", "tokens_in"), _get(p, "attrs", "tokens_out")
    tokens = f"{tokens_in}>{tokens_out} tokens" if tokens_in is not None and tokens_out is not None else ""
    return [
        str(p.get("operation") or ""),
        str(_get(p, "attrs", "model") or ""),
        str(p.get("status") or ""),
        took,
        tokens,
        f"trace={str(p.get('trace_id') or '')[:16]}",
    ]


def _result(p: dict[str, Any]) -> list[str]:
    verdict = "pass" if p.get("passed") else "FAIL"
    return [f"{p.get('suite')}/{p.get('task')}", verdict, f"score={p.get('score')}", str(p.get("error") or "")]


def _request(p: dict[str, Any]) -> list[str]:
    messages = p.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    said = str(last.get("content") or "") if isinstance(last, dict) else ""
    return [str(p.get("model") or ""), said[:120]]


def _response(p: dict[str, Any]) -> list[str]:
    tokens = f"{p.get('tokens_in')}>{p.get('tokens_out')} tokens"
    return [str(p.get("model") or ""), f"{p.get('latency_ms')}ms", tokens, str(p.get("content") or "")[:120]]


def _alert(p: dict[str, Any]) -> list[str]:
    return [
        str(p.get("level") or ""),
        f"{p.get('metric')}={p.get('value')} (limit {p.get('threshold')})",
        str(p.get("message") or ""),
    ]


_SUMMARIES: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "trace.span": _span,
    "trace.alert": _alert,
    "eval.result": _result,
    "eval.run": lambda p: [str(p.get("suite") or ""), "baseline" if p.get("baseline") else ""],
    "infer.request": _request,
    "infer.response": _response,
    "data.entities": lambda p: [f"{p.get('count')} {p.get('format')}", str(p.get("path") or "")],
    "data.schema": lambda p: [str(p.get("name") or ""), f"{len(p.get('fields') or [])} fields"],
    "health.ping": lambda p: [f"from {p.get('from')}"],
    "health.pong": lambda p: [f"from {p.get('from')}", str(p.get("version") or ""), f"up {p.get('uptime_s')}s"],
}
