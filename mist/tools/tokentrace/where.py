"""Which spans a question is about, as SQL: conditions are ours, values are bound."""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from mist.errors import InvalidArgument
from mist.tools.tokentrace.spans import INT_MAX
from mist.tools.tokentrace.store import Store

FAILED = "status NOT IN ('', 'ok')"
KEY_CHARS_MAX = 256
ATTRS_MAX = 10


class Where(Struct, frozen=True, kw_only=True):
    """Spans that began in [since_ns, until_ns) and have these values; None = any. `attrs` are (key, value as text).

    `tenant`, `model` and so on given as "" mean those that name none.
    """

    since_ns: int | None = None
    until_ns: int | None = None
    tenant: str | None = None
    operation: str | None = None
    model: str | None = None
    provider: str | None = None
    source: str | None = None
    user: str | None = None
    status: str | None = None
    failed: bool = False
    attrs: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if len(self.attrs) > ATTRS_MAX:
            raise InvalidArgument(f"at most {ATTRS_MAX} attributes at a time")
        for key, _ in self.attrs:
            check_key(key)
        texts = (self.tenant, self.operation, self.model, self.provider, self.source, self.user, self.status)
        if any("\0" in text for text in (*texts, *(value for _, value in self.attrs)) if text):
            raise InvalidArgument("a value to look for holds the character NUL, which no span has")

    @property
    def from_totals(self) -> bool:
        """Whether the totals know enough to answer."""
        return self.source is self.user is self.status is None and not self.failed and not self.attrs


def check_key(key: str) -> None:
    """Raises InvalidArgument for a name of an attribute that cannot be asked for in every database."""
    if not 0 < len(key) <= KEY_CHARS_MAX or '"' in key or "\\" in key or "\0" in key:
        raise InvalidArgument(
            f"{key[:80]!r} cannot be asked for", hint=f"1 to {KEY_CHARS_MAX} characters, no quotes, no backslashes"
        )


_PLAIN = (
    ("since_ns", "time_ns >= ?"), ("until_ns", "time_ns < ?"), ("tenant", "tenant = ?"), ("operation", "operation = ?"),
    ("source", "source = ?"), ("user", "user_id = ?"), ("status", "status = ?"),
)  # fmt: skip


def conditions(store: Store, where: Where) -> tuple[list[str], list[Any]]:
    """SQL conditions over `spans`, and their values."""
    out: list[str] = []
    values: list[Any] = []
    for name, condition in _PLAIN:
        value = getattr(where, name)
        if value is not None:
            out.append(condition)
            # a time may lie beyond what a database can count: 9999-12-31 does
            values.append(min(value, INT_MAX) if name.endswith("_ns") else value)
    for name in ("model", "provider"):
        value = getattr(where, name)
        if value is not None:
            out.append(f"{name} = ?" if value else f"{name} IS NULL")
            values.extend([value] if value else [])
    if where.failed:
        out.append(FAILED)
    for key, value in where.attrs:
        expression, parameters = store.attribute(key)
        out.append(f"{expression} = ?")
        values.extend([*parameters, value])
    return out, values


def clause(found: list[str]) -> str:
    return f" WHERE {' AND '.join(found)}" if found else ""
