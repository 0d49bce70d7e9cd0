"""Any bytes as an OTLP request in JSON: refused as one, or the same envelopes as the request in protobuf."""

from __future__ import annotations

import sys
from pathlib import Path

from mist.errors import ProtocolError, TooLarge
from mist.protocol import codec
from mist.tools.tokentrace.otlp.decode import decode_json, decode_protobuf
from mist.tools.tokentrace.otlp.encode import encode_json, encode_protobuf, request_of
from tests.fuzz import otlp
from tests.fuzz.driver import Target, main

GOLDEN = Path(__file__).parents[1] / "otlp/golden"
SEEDS = [
    *(path.read_bytes() for path in sorted(GOLDEN.glob("*.json"))),
    *(encode_json(otlp.ExportTraceServiceRequest.FromString(seed)) for seed in otlp.SEEDS),
]
WORDS = [
    b'"9223372036854775807"',
    b"null",
    b"-1",
    b'"NaN"',
    b"{}",
    b"[]",
    b'"kvlistValue":',
    b"1e3",
    b"\\ud800",
    b"\xff",
]


def check(data: bytes) -> bool:
    try:
        decoded = decode_json(data, spans_max=otlp.SPANS_MAX)
    except (ProtocolError, TooLarge):
        return False
    for env in decoded.envelopes:
        assert codec.decode_foreign(codec.encode(env)) == env, "the codec's door takes it"
    request = request_of(decoded.envelopes)
    if b"mist." not in data:
        binary, text = decode_protobuf(encode_protobuf(request)), decode_json(encode_json(request))
        assert binary == text, "both encodings mean the same"
        assert len(binary.envelopes) == len(decoded.envelopes)
    return bool(decoded.envelopes)


TARGET = Target("otlp_json", SEEDS, WORDS, check)

if __name__ == "__main__":
    sys.exit(main(["otlp_json"]))
