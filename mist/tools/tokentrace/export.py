"""Stored spans to files: JSON lines in the wire shape, OTLP JSON, Parquet. One span or one batch in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, BinaryIO

import msgspec

from mist.errors import InvalidArgument
from mist.protocol.envelope import Envelope
from mist.protocol.payloads import TRACE_SPAN
from mist.tools.tokentrace.queries import StoredSpan, payload_of

BATCH = 1000
ROWS = 20_000
"""Of one row group of a Parquet file."""


def json_lines(spans: Iterable[StoredSpan]) -> Iterator[tuple[bytes, int]]:
    """(a line, 1): `mist trace ingest` reads them."""
    for span in spans:
        yield msgspec.json.encode(payload_of(span)) + b"\n", 1


def envelopes(spans: Iterable[StoredSpan]) -> Iterator[Envelope]:
    """As they came, with ids of their own: an envelope's id is not kept in the store."""
    for span in spans:
        yield Envelope.new(TRACE_SPAN, payload_of(span), source=span.source or "tokentrace", tenant=span.tenant)


def otlp_lines(spans: Iterable[StoredSpan]) -> Iterator[tuple[bytes, int]]:
    """(an ExportTraceServiceRequest in OTLP's JSON as one line, how many spans are in it)."""
    from mist.tools.tokentrace.otlp.encode import encode_json, request_of

    found = envelopes(spans)
    while batch := list(islice(found, BATCH)):
        yield encode_json(request_of(batch)) + b"\n", len(batch)


def parquet(spans: Iterable[StoredSpan], file: BinaryIO) -> int:
    """Write a Parquet file with the store's columns (`attrs` as JSON text); how many spans. Needs the extra `parquet`."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as exc:
        raise InvalidArgument(
            "Parquet needs a package that is not installed (pyarrow)", hint="pip install 'mist-stack[parquet]'"
        ) from exc
    text, whole, real = pyarrow.string(), pyarrow.int64(), pyarrow.float64()
    kinds: dict[str, Any] = {"time_ns": whole, "start_ns": whole, "end_ns": whole, "sequence": whole}
    kinds |= {"tokens_in": whole, "tokens_out": whole}
    kinds |= dict.fromkeys(("latency_ms", "ttft_ms", "cost_usd", "score"), real)
    schema = pyarrow.schema([(name, kinds.get(name, text)) for name in StoredSpan.__struct_fields__])
    count = 0
    source = iter(spans)
    with pyarrow.parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        while rows := list(islice(source, ROWS)):
            columns = {
                name: [bytes(v).decode() if isinstance(v, msgspec.Raw) else v for v in (getattr(r, name) for r in rows)]
                for name in schema.names
            }
            writer.write_table(pyarrow.table(columns, schema=schema))
            count += len(rows)
    return count
