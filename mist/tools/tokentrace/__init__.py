"""TokenTrace: the durable trace store. Spans from a stream into a database, and the questions people ask of them.

In: `files` and `publish` (CSV, JSON lines), `bare` (`POST /spans`), `otlp` (OpenTelemetry, both ways), behind `intake`, which samples
and redacts before anything is stored. Through: `ingest` copies the stream into a `store`; `spans` decides what a row is,
`rollup` and `sketch` what it adds to the totals, kept in the same transaction; `sqlite` and `postgres` are the databases.
Out: `queries`, `stats` and `tree` answer, `api` over HTTP, `export` to files; `alerts` watches; `erase` takes out again.
`service` puts these beside a stream.

The stream is the durable copy, the store follows from it and can be built again. There is no authentication, no web page, and no
span in memory only: who wants these puts a gateway, a dashboard or nothing in front.
"""
