"""OTLP in and out: OpenTelemetry's spans as `trace.span` envelopes and back.

`genai` and `values` are pure and import the standard library and msgspec; `decode`, `receive`, `grpc` and `send` need the
extra `otel`, `grpc` the extra of its name. docs/reference/otlp.md has the mapping.
"""
