"""One URL grammar for brokers and transports.

`log:DIR`, `nats://host:4222`, `memory:NAME`, `file:PATH.jsonl`, `chan:NAME`, `http://host/mist`, each with
`?stream=NAME&subject=a.*.>&consumer=NAME`. The seed's `file:///p`, `stdio://` and `chan://` are read too.
Pure: parsing never touches the disk or the network.
"""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, quote, unquote, urlsplit, urlunsplit

from msgspec import Struct

from mist.errors import InvalidArgument

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{1,31}):", re.ASCII)
LOCAL_SCHEMES = frozenset({"log", "memory", "file", "stdio", "chan"})


class Url(Struct, frozen=True):
    """A parsed URL. `target` is everything between the scheme and the query: a path, a name, or `//host:port/…`."""

    scheme: str
    target: str
    query: tuple[tuple[str, str], ...] = ()

    def get(self, key: str, default: str = "") -> str:
        """The last value of a query parameter, or the default."""
        for k, v in reversed(self.query):
            if k == key:
                return v
        return default

    def all(self, key: str) -> tuple[str, ...]:
        return tuple(v for k, v in self.query if k == key)

    def without_query(self) -> str:
        return f"{self.scheme}:{self.target}"

    def refuse_unknown(self, *known: str) -> None:
        """Raise InvalidArgument for a query parameter that is not one of `known` (a typo must not be ignored)."""
        for key, _ in self.query:
            if key not in known:
                raise InvalidArgument(
                    f"{self.redacted()}: unknown parameter {key!r}", hint=f"known here: {', '.join(known) or 'none'}"
                )

    def __str__(self) -> str:
        query = "&".join(f"{quote(k, safe='')}={quote(v, safe='.*>,:/')}" for k, v in self.query)
        return self.without_query() + (f"?{query}" if query else "")

    def redacted(self) -> str:
        """The URL as it may be printed: passwords and tokens replaced by ***."""
        return redact(str(self))


def has_scheme(text: str) -> bool:
    """Whether a command-line argument is a URL rather than a stream name or a path."""
    return _SCHEME.match(text) is not None


def parse_url(text: str) -> Url:
    """Parse a URL. Raises InvalidArgument with what to write instead."""
    m = _SCHEME.match(text)
    if m is None or "\x00" in text or "\n" in text or "\r" in text:
        raise InvalidArgument(
            f"not a URL: {text[:120]!r}", hint="for example log:./data, memory:, nats://localhost:4222"
        )
    scheme = m[1].lower()
    rest = text[m.end() :]
    rest, _, query = rest.partition("?")
    try:
        pairs = tuple(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
    except ValueError as exc:
        raise InvalidArgument(f"{redact(text[:120])}: the part after ? is not key=value&…") from exc
    if scheme in LOCAL_SCHEMES:
        # file:///tmp/x, file://rel and file:rel all name a path; the seed has no host part either
        rest = rest[2:] if rest.startswith("//") else rest
        rest = unquote(rest) if "%" in rest and scheme != "file" else rest
    return Url(scheme, rest, pairs)


_SECRET_KEYS = frozenset({"token", "password", "secret", "api_key", "key", "access_token"})


def redact(text: str) -> str:
    """The text with the password of `scheme://user:password@host` and secret query values replaced by ***."""
    try:
        parts = urlsplit(text)
    except ValueError:
        return text
    netloc = parts.netloc
    if "@" in netloc:
        user, _, host = netloc.rpartition("@")
        name, colon, _ = user.partition(":")
        netloc = f"{name}:***@{host}" if colon else f"***@{host}"
    query = parts.query
    if query:
        pairs = [p.split("=", 1) for p in query.split("&")]
        query = "&".join(f"{p[0]}=***" if p[0].lower() in _SECRET_KEYS and len(p) == 2 else "=".join(p) for p in pairs)
    if netloc == parts.netloc and query == parts.query:
        return text
    return urlunsplit((parts.scheme, netloc, parts.path, query, parts.fragment))
