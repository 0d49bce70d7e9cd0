"""What the store needs of a database: a connection, transactions, and the few things that SQL dialects say differently.

Statements are written once, in `store`, with `?` for parameters and without any other `?` or `%`. A driver is not for
two threads at once. Everything a driver raises is of mist.errors; a lost connection or a lock that is held is retryable.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from mist.tools.tokentrace.spans import Row

Values = Sequence[Any]


class Driver(Protocol):
    """One connection. `place` is where the database lies, for people: never with a password."""

    place: str

    def begin(self) -> None:
        """Start the one writing transaction of the whole store: others wait for it."""

    def commit(self) -> None: ...

    def rollback(self) -> None:
        """Undo what was done since `begin`; harmless where there is nothing to undo."""

    def execute(self, sql: str, values: Values = ()) -> int:
        """Run it; the number of rows it changed."""

    def execute_many(self, sql: str, rows: Sequence[Values]) -> int: ...

    def fetch(self, sql: str, values: Values = ()) -> list[tuple[Any, ...]]:
        """All rows of a short answer."""

    def query(self, sql: str, values: Values = ()) -> Iterator[tuple[Any, ...]]:
        """The rows, as they come; to be read to the end or closed."""

    def insert_spans(self, rows: Sequence[Row]) -> int:
        """Insert those whose (trace_id, span_id) is not there; how many that were."""

    def attribute(self, key: str) -> tuple[str, tuple[str, ...]]:
        """The SQL expression that gives an attribute as text (NULL where it is absent), and its parameters."""

    def changed_elsewhere(self) -> bool:
        """Whether another connection may have committed since this was last asked."""

    def size_bytes(self) -> int:
        """The space the spans and what belongs to them occupy."""

    def scrub(self) -> None:
        """Make deleted values unreadable in the database's files, as far as the database can. Outside a transaction."""

    def interrupt(self) -> None:
        """Make the statement that runs now fail; called from another thread."""

    def close(self) -> None: ...
