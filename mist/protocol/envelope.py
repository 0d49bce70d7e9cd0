"""The envelope: our typed wrapper around a payload, wire-compatible with mist-go v1.

Values only. Encoding, decoding and every check of incoming bytes live in codec.py.
"""

from __future__ import annotations

import builtins
import time
import zlib
from math import isfinite
from typing import Annotated, Any, TypeVar, overload

import msgspec
from msgspec import Meta, Raw, Struct

from mist.errors import LoneSurrogate, Malformed, MissingField, NotFinite
from mist.protocol.ids import new_id
from mist.protocol.payloads import PAYLOADS, Int64
from mist.protocol.version import CURRENT

P = TypeVar("P")
Uint32 = Annotated[int, Meta(ge=0, le=0xFFFFFFFF)]

SIZE_BYTES_MAX = 10 * 1024 * 1024
"""The one size limit of an encoded envelope, for every path (10 MiB)."""

_encode_payload = msgspec.json.Encoder(order="deterministic").encode


class Envelope(Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """`payload` keeps the bytes as they came, so that a relay never changes what a checksum covers.

    `timestamp_ns` is the sender's clock, Unix nanoseconds; positions and retention never use it. `checksum` is CRC-32
    (zlib polynomial) of the payload bytes, 0 = absent. `correlation_id` names the request this answers,
    `causation_id` the envelope that led to this one; `traceparent` is W3C; `tenant` is free text.
    """

    version: str
    id: str
    source: str
    type: str
    timestamp_ns: Int64
    payload: Raw
    checksum: Uint32 = 0
    correlation_id: str = ""
    causation_id: str = ""
    traceparent: str = ""
    tenant: str = ""

    @classmethod
    def new(
        cls,
        type: str,
        payload: Any = None,
        *,
        source: str,
        id: str = "",
        timestamp_ns: int = 0,
        checksum: bool = False,
        correlation_id: str = "",
        causation_id: str = "",
        traceparent: str = "",
        tenant: str = "",
    ) -> Envelope:
        """A new envelope; id and time are made where absent. `payload` is any JSON-able value, or `msgspec.Raw`.

        Raises MissingField for an empty source or type, Malformed for a payload that has no JSON form.
        """
        if not source:
            raise MissingField("source")
        if not type:
            raise MissingField("type")
        raw = payload if payload.__class__ is Raw else Raw(encode_payload(payload))
        return cls(
            version=str(CURRENT),
            id=id or new_id(),
            source=source,
            type=type,
            timestamp_ns=timestamp_ns or time.time_ns(),
            payload=raw,
            checksum=zlib.crc32(raw) if checksum else 0,
            correlation_id=correlation_id,
            causation_id=causation_id,
            traceparent=traceparent,
            tenant=tenant,
        )

    @overload
    def decode(self) -> Any: ...
    @overload
    def decode(self, into: builtins.type[P]) -> P: ...
    def decode(self, into: Any = None) -> Any:
        """The payload as the class `into`, or as the payload class of this envelope's type, or as plain values.

        Unknown keys are ignored. A `null` payload gives None. Raises Malformed when it does not fit.
        """
        target = into or PAYLOADS.get(self.type, Any)
        raw = self.payload
        if into is None and bytes(raw) == b"null":
            return None
        try:
            return _decoder(target).decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise Malformed(f"envelope {self.id}: payload of {self.type} cannot be read: {exc}") from exc

    def data(self) -> Any:
        """The payload as plain values (dict, list, str, int, float, bool, None)."""
        return self.decode(object) if self.payload else None


_decoders: dict[Any, msgspec.json.Decoder[Any]] = {}


def _decoder(target: Any) -> msgspec.json.Decoder[Any]:
    decoder = _decoders.get(target)
    if decoder is None:
        decoder = _decoders[target] = msgspec.json.Decoder(Any if target is object else target)
    return decoder


def encode_payload(value: Any) -> bytes:
    """JSON bytes of a payload: compact, map keys sorted (as the seed does), struct keys in declaration order.

    Values without a JSON form raise: NotFinite for NaN and infinities, LoneSurrogate, Malformed for unknown types.
    """
    try:
        raw = _encode_payload(value)
    except UnicodeEncodeError as exc:
        raise LoneSurrogate(f"payload of type {value.__class__.__name__} has no JSON form: {exc}") from exc
    except (TypeError, ValueError, msgspec.EncodeError, RecursionError, OverflowError) as exc:
        raise Malformed(f"payload of type {value.__class__.__name__} has no JSON form: {exc}") from exc
    if b"null" in raw:
        _refuse_not_finite(value)  # the encoder writes NaN and the infinities as null
    return raw


def _refuse_not_finite(value: Any) -> None:
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, float) and not isfinite(item):
            raise NotFinite(f"payload: {item} has no JSON form")
        if isinstance(item, dict):
            left.extend(item.values())
        elif isinstance(item, list | tuple | set | frozenset):
            left.extend(item)
        else:
            names = getattr(item, "__struct_fields__", ()) or getattr(item, "__dataclass_fields__", ())
            left.extend(getattr(item, name) for name in names)
