"""TokenTrace, first slice: spans from the stream into SQLite, and the questions people ask of them.

`ingest` copies the stream into a `store`, `spans` decides what a row is, `stats` answers with exact percentiles,
`files` turns CSV and JSON lines into envelopes, `publish` appends them, `tree` draws a trace. No windows, sketches,
alerts, price tables or HTTP in this slice.
"""
