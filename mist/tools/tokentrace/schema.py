"""The tables of the store, for SQLite and PostgreSQL. `spans` is the truth; `rollups` and `series` follow from it.

`applied` (written only where asked for) is an append-only record of every row handed to the store, without any
uniqueness, from which a judge can see a record applied twice.
"""

from __future__ import annotations

from collections.abc import Iterator

from mist.tools.tokentrace.spans import SpanRow

VERSION = 2
COLUMNS = SpanRow._fields
DERIVED = ("spans", "rollups", "series", "quarantine", "gaps", "position")
"""What a rebuild makes anew from the stream."""

_TABLES = """
CREATE TABLE spans (
  id {serial}, trace_id {ascii} NOT NULL, span_id {ascii} NOT NULL, parent_id TEXT NOT NULL, source TEXT NOT NULL,
  tenant TEXT NOT NULL, user_id TEXT NOT NULL, operation TEXT NOT NULL, status TEXT NOT NULL, model TEXT, provider TEXT,
  time_ns BIGINT NOT NULL, start_ns BIGINT, end_ns BIGINT, latency_ms {float}, ttft_ms {float}, tokens_in BIGINT,
  tokens_out BIGINT, cost_usd {float}, score {float}, price TEXT, attrs TEXT NOT NULL, sequence BIGINT NOT NULL
);
CREATE UNIQUE INDEX spans_id ON spans (trace_id, span_id);
CREATE INDEX spans_time ON spans (time_ns, sequence, id);
CREATE INDEX spans_failed ON spans (time_ns, sequence, id) WHERE status NOT IN ('', 'ok');
CREATE INDEX spans_user ON spans (user_id, time_ns) WHERE user_id <> '';
CREATE INDEX spans_tenant ON spans (tenant, time_ns) WHERE tenant <> '';
CREATE TABLE rollups (
  step INTEGER NOT NULL, at BIGINT NOT NULL, tenant TEXT NOT NULL, operation TEXT NOT NULL, model TEXT NOT NULL,
  provider TEXT NOT NULL, spans BIGINT NOT NULL, failed BIGINT NOT NULL, timeouts BIGINT NOT NULL,
  measures {blob} NOT NULL, PRIMARY KEY (step, at, tenant, operation, model, provider)
){keyed};
CREATE TABLE series (
  tenant TEXT NOT NULL, operation TEXT NOT NULL, model TEXT NOT NULL, provider TEXT NOT NULL,
  PRIMARY KEY (tenant, operation, model, provider)
){keyed};
CREATE TABLE quarantine (
  stream TEXT NOT NULL, incarnation TEXT NOT NULL, sequence BIGINT NOT NULL, time_ns BIGINT NOT NULL,
  reason TEXT NOT NULL, subject TEXT NOT NULL, data {blob} NOT NULL, PRIMARY KEY (stream, incarnation, sequence)
){keyed};
CREATE TABLE gaps (
  stream TEXT NOT NULL, incarnation TEXT NOT NULL, first BIGINT NOT NULL, last BIGINT NOT NULL,
  time_ns BIGINT NOT NULL, reason TEXT NOT NULL
);
CREATE TABLE position (
  stream TEXT PRIMARY KEY, incarnation TEXT NOT NULL, sequence BIGINT NOT NULL, time_ns BIGINT NOT NULL
);
CREATE TABLE state (name TEXT PRIMARY KEY, data {blob} NOT NULL);
CREATE TABLE applied (sequence BIGINT NOT NULL, trace_id TEXT NOT NULL, span_id TEXT NOT NULL, worker TEXT NOT NULL);
"""
_STAYS = {
    "sqlite": """
CREATE TRIGGER applied_stays BEFORE UPDATE ON applied BEGIN SELECT RAISE(ABORT, 'applied is append-only')\\; END;
CREATE TRIGGER applied_keeps BEFORE DELETE ON applied BEGIN SELECT RAISE(ABORT, 'applied is append-only')\\; END;
""",
    "postgres": """
CREATE FUNCTION mist_append_only() RETURNS trigger LANGUAGE plpgsql
  AS 'BEGIN RAISE EXCEPTION ''applied is append-only''\\; END';
CREATE TRIGGER applied_stays BEFORE UPDATE OR DELETE ON applied EXECUTE FUNCTION mist_append_only();
""",
}
_WORDS = {
    "sqlite": {
        "serial": "INTEGER PRIMARY KEY", "blob": "BLOB", "float": "REAL", "keyed": " WITHOUT ROWID", "ascii": "TEXT",
    },
    "postgres": {
        "serial": "BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY", "blob": "BYTEA", "float": "DOUBLE PRECISION",
        "keyed": "", "ascii": 'TEXT COLLATE "C"',  # by bytes, whatever the database's language: prefixes and cursors compare
    },
}  # fmt: skip


def statements(dialect: str) -> Iterator[str]:
    """What makes the tables, one statement each."""
    words = _WORDS[dialect]
    for text in (_TABLES, _STAYS[dialect]):
        for name, word in words.items():
            text = text.replace("{" + name + "}", word)
        for statement in text.replace("\\;", "\0").split(";"):
            if statement.strip():
                yield statement.replace("\0", ";").strip()
