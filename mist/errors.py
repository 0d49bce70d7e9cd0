"""The whole error tree, and one table: code -> HTTP status, gRPC status, exit code, retryable.

A class exists per decision a caller can take. Every error carries `code` (stable, for programs), a message
(what and where), `hint` (the next step) and `meta` (coordinates as text). Texts may change, codes do not.

    MistError
    ├─ ProtocolError              the bytes are not an acceptable envelope
    │  ├─ Malformed                 not JSON or msgpack, or a field of the wrong type
    │  ├─ MissingField              version, id, source or type absent or empty
    │  ├─ VersionUnsupported        a protocol version outside what we speak
    │  ├─ ChecksumMismatch          the payload is not the one that was sent
    │  ├─ TooDeep                   nesting above the limit
    │  ├─ TooManyKeys               more object keys than the limit
    │  ├─ NotFinite                 NaN or an infinity
    │  └─ LoneSurrogate             text that cannot be written as UTF-8
    ├─ TooLarge                   an envelope, record or request above the one size limit
    ├─ InvalidArgument            a name, subject, URL, position or configuration that cannot be right
    ├─ Unsupported                the backend does not declare this capability
    ├─ NotFound                   no such stream, consumer, cursor or record
    ├─ Conflict                   somebody was faster
    │  ├─ AlreadyExists
    │  ├─ WrongSequence             `expected_last` did not hold
    │  ├─ WrongIncarnation          the stream was deleted and made again
    │  ├─ CheckpointRegression      a checkpoint would move backwards
    │  └─ Locked                    another process holds it
    ├─ SequenceExpired            the position lies below the first kept record
    ├─ CursorAhead                the position lies beyond the last record
    ├─ DataLoss                   a range of the stream is damaged
    ├─ PartialAppend              a prefix of the batch was stored, the rest was not
    ├─ Ambiguous                  the fate of an append is unknown; repeating it with the same ids is safe
    ├─ Unavailable                try again later
    │  ├─ StorageFull
    │  ├─ Overloaded                a bounded queue is full and the caller asked not to wait
    │  └─ CircuitOpen
    ├─ RateLimited
    ├─ TimedOut
    ├─ NotAuthorised
    ├─ Refused                    refused by policy (read-only, quota)
    ├─ Closed                     used after close
    ├─ TransportError             a transport failed to deliver or receive
    │  └─ EndOfStream               the other side is done; nothing is wrong
    └─ Internal                   a bug of ours; please report it
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class CodeInfo(NamedTuple):
    """What one code means to HTTP, gRPC, the shell and a retry loop."""

    http: int
    grpc: str
    exit: int
    retryable: bool


# HTTP status and `retryable` agree with the seed's error table where the code is the seed's
# (internal, timeout, cancelled, transport, protocol, validation, not_found, unavailable, rate_limit, auth,
# conflict), except that protocol faults of the *sender* are 400 and not 500. Exit codes are docs/reference/exit-codes.
CODES: dict[str, CodeInfo] = {
    "internal": CodeInfo(500, "INTERNAL", 1, False),
    "protocol": CodeInfo(400, "INVALID_ARGUMENT", 10, False),
    "malformed": CodeInfo(400, "INVALID_ARGUMENT", 10, False),
    "missing_field": CodeInfo(400, "INVALID_ARGUMENT", 10, False),
    "version_unsupported": CodeInfo(400, "FAILED_PRECONDITION", 10, False),
    "checksum_mismatch": CodeInfo(400, "DATA_LOSS", 8, False),
    "too_deep": CodeInfo(400, "INVALID_ARGUMENT", 10, False),
    "too_many_keys": CodeInfo(400, "INVALID_ARGUMENT", 10, False),
    "not_finite": CodeInfo(400, "INVALID_ARGUMENT", 10, False),
    "lone_surrogate": CodeInfo(400, "INVALID_ARGUMENT", 10, False),
    "too_large": CodeInfo(413, "RESOURCE_EXHAUSTED", 11, False),
    "validation": CodeInfo(400, "INVALID_ARGUMENT", 2, False),
    "unsupported": CodeInfo(501, "UNIMPLEMENTED", 2, False),
    "not_found": CodeInfo(404, "NOT_FOUND", 3, False),
    "conflict": CodeInfo(409, "ABORTED", 5, False),
    "already_exists": CodeInfo(409, "ALREADY_EXISTS", 5, False),
    "wrong_sequence": CodeInfo(409, "ABORTED", 5, False),
    "wrong_incarnation": CodeInfo(409, "FAILED_PRECONDITION", 5, False),
    "checkpoint_regression": CodeInfo(409, "FAILED_PRECONDITION", 5, False),
    "locked": CodeInfo(409, "UNAVAILABLE", 5, True),
    "sequence_expired": CodeInfo(410, "OUT_OF_RANGE", 3, False),
    "cursor_ahead": CodeInfo(416, "OUT_OF_RANGE", 2, False),
    "data_loss": CodeInfo(500, "DATA_LOSS", 8, False),
    "partial_append": CodeInfo(500, "ABORTED", 9, True),
    "ambiguous": CodeInfo(504, "UNKNOWN", 1, True),
    "unavailable": CodeInfo(503, "UNAVAILABLE", 7, True),
    "storage_full": CodeInfo(507, "RESOURCE_EXHAUSTED", 11, True),
    "overloaded": CodeInfo(503, "RESOURCE_EXHAUSTED", 7, True),
    "circuit_open": CodeInfo(503, "UNAVAILABLE", 7, False),
    "rate_limit": CodeInfo(429, "RESOURCE_EXHAUSTED", 11, True),
    "timeout": CodeInfo(504, "DEADLINE_EXCEEDED", 6, True),
    "cancelled": CodeInfo(499, "CANCELLED", 130, False),
    "auth": CodeInfo(401, "UNAUTHENTICATED", 4, False),
    "refused": CodeInfo(403, "PERMISSION_DENIED", 11, False),
    "closed": CodeInfo(500, "FAILED_PRECONDITION", 1, False),
    "transport": CodeInfo(500, "UNAVAILABLE", 7, True),
    "end_of_stream": CodeInfo(500, "OUT_OF_RANGE", 0, False),
}


class MistError(Exception):
    """Base of every error this package raises.

    `retryable` overrides the table for one error (a transport that knows better); `retry_after_s` is set where the
    other side said when to come back.
    """

    code = "internal"

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        meta: dict[str, str] | None = None,
        retryable: bool | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.meta = dict(meta) if meta else {}
        self.retry_after_s = retry_after_s
        self._retryable = retryable

    @property
    def info(self) -> CodeInfo:
        return CODES[self.code]

    @property
    def retryable(self) -> bool:
        return self.info.retryable if self._retryable is None else self._retryable

    @property
    def exit_code(self) -> int:
        return self.info.exit

    @property
    def http_status(self) -> int:
        return self.info.http

    def to_wire(self) -> dict[str, Any]:
        """The seed's flat error JSON: code, message, meta (omitted when empty), cause (omitted when none). The next step
        stands in meta as `hint`."""
        out: dict[str, Any] = {"code": self.code, "message": self.message}
        meta = {**self.meta, "hint": self.hint} if self.hint else self.meta
        if meta:
            out["meta"] = meta
        if self.__cause__ is not None:
            out["cause"] = str(self.__cause__)
        return out

    def __str__(self) -> str:
        return f"{self.message}. {self.hint}" if self.hint else self.message


class Internal(MistError):
    code = "internal"


class ProtocolError(MistError):
    code = "protocol"


class Malformed(ProtocolError):
    code = "malformed"


class MissingField(ProtocolError):
    code = "missing_field"

    def __init__(self, field: str, **kw: Any) -> None:
        super().__init__(f"envelope: missing {field}", meta={"field": field}, **kw)
        self.field = field


class VersionUnsupported(ProtocolError):
    code = "version_unsupported"


class ChecksumMismatch(ProtocolError):
    code = "checksum_mismatch"

    def __init__(self, *, stated: int, computed: int) -> None:
        super().__init__(
            f"envelope: checksum is {stated}, the payload's is {computed}",
            hint="the payload was changed on its way, or re-encoded by a relay",
            meta={"stated": str(stated), "computed": str(computed)},
        )
        self.stated = stated
        self.computed = computed


class TooDeep(ProtocolError):
    code = "too_deep"


class TooManyKeys(ProtocolError):
    code = "too_many_keys"


class NotFinite(ProtocolError):
    code = "not_finite"


class LoneSurrogate(ProtocolError):
    code = "lone_surrogate"


class TooLarge(MistError):
    """`size_bytes` is what came, `size_bytes_max` the limit that was in force."""

    code = "too_large"

    def __init__(self, what: str, *, size_bytes: int, size_bytes_max: int, **kw: Any) -> None:
        super().__init__(
            f"{what} too large: {size_bytes} bytes (max {size_bytes_max})",
            meta={"size_bytes": str(size_bytes), "size_bytes_max": str(size_bytes_max)},
            **kw,
        )
        self.size_bytes = size_bytes
        self.size_bytes_max = size_bytes_max


class InvalidArgument(MistError):
    code = "validation"


class Unsupported(MistError):
    code = "unsupported"

    def __init__(self, capability: str, backend: str, **kw: Any) -> None:
        super().__init__(f"{backend} cannot do this: it does not have the capability `{capability}`", **kw)
        self.capability = capability
        self.backend = backend


class NotFound(MistError):
    code = "not_found"


class Conflict(MistError):
    code = "conflict"


class AlreadyExists(Conflict):
    code = "already_exists"


class WrongSequence(Conflict):
    """A conditional append lost the race: `expected` was asked for, `last` is the truth."""

    code = "wrong_sequence"

    def __init__(self, *, expected: int, last: int, stream: str = "") -> None:
        super().__init__(
            f"stream {stream}: expected last sequence {expected}, it is {last}",
            hint="read what was appended in between and try again",
            meta={"expected": str(expected), "last": str(last)},
        )
        self.expected = expected
        self.last = last


class WrongIncarnation(Conflict):
    code = "wrong_incarnation"


class CheckpointRegression(Conflict):
    code = "checkpoint_regression"


class Locked(Conflict):
    code = "locked"


class SequenceExpired(MistError):
    """The records after this position are partly gone (trimmed or expired); `first` is the first kept sequence."""

    code = "sequence_expired"

    def __init__(self, *, after: int, first: int, stream: str = "") -> None:
        super().__init__(
            f"stream {stream}: sequence {after + 1} is gone, the first kept one is {first}",
            hint=f"continue with after={first - 1} (--from start), accepting the gap",
            meta={"after": str(after), "first": str(first)},
        )
        self.after = after
        self.first = first


class CursorAhead(MistError):
    """The position lies beyond the last record: the stream was replaced or the position is another stream's."""

    code = "cursor_ahead"

    def __init__(self, *, after: int, last: int, stream: str = "") -> None:
        super().__init__(
            f"stream {stream}: position {after} lies beyond the last record, {last}",
            hint="is this position another stream's? use `end` for new records only",
            meta={"after": str(after), "last": str(last)},
        )
        self.after = after
        self.last = last


class DataLoss(MistError):
    """Sequences first..last (inclusive) cannot be read; `resume_after` is the `after` that continues behind them."""

    code = "data_loss"

    def __init__(self, *, first: int, last: int, resume_after: int, stream: str = "", why: str = "damaged") -> None:
        super().__init__(
            f"stream {stream}: records {first} to {last} are {why}",
            hint=f"`mist stream verify {stream}` shows all damage; continue with after={resume_after} (--from +{resume_after})",
            meta={"first": str(first), "last": str(last), "resume_after": str(resume_after)},
        )
        self.first = first
        self.last = last
        self.resume_after = resume_after


class PartialAppend(MistError):
    """The first `len(sequences)` messages of the batch are stored, the others are not. `__cause__` says why."""

    code = "partial_append"

    def __init__(self, sequences: Sequence[int], *, total: int, stream: str = "", hint: str = "") -> None:
        super().__init__(
            f"stream {stream}: {len(sequences)} of {total} messages were stored",
            hint=hint or "append the rest again; ids make it safe to repeat all",
            meta={"stored": str(len(sequences)), "total": str(total)},
        )
        self.sequences = list(sequences)
        self.total = total


class Ambiguous(MistError):
    """Nobody knows whether these messages are stored. Repeating them with the same ids is safe."""

    code = "ambiguous"

    def __init__(self, message: str, *, ids: Sequence[str] = (), hint: str = "") -> None:
        super().__init__(message, hint=hint or "repeat it with the same ids: a stored one is not stored twice")
        self.ids = list(ids)


class Unavailable(MistError):
    code = "unavailable"


class StorageFull(Unavailable):
    code = "storage_full"


class Overloaded(Unavailable):
    code = "overloaded"


class CircuitOpen(Unavailable):
    code = "circuit_open"


class RateLimited(MistError):
    code = "rate_limit"


class TimedOut(MistError):
    code = "timeout"


class NotAuthorised(MistError):
    code = "auth"


class Refused(MistError):
    code = "refused"


class Closed(MistError):
    code = "closed"


class TransportError(MistError):
    code = "transport"


class EndOfStream(TransportError):
    code = "end_of_stream"
