"""One URL grammar for brokers and transports.

`log:DIR`, `nats://host:4222`, `memory:NAME`, `file:PATH.jsonl`, `chan:NAME`, `http://host/mist`, each with
`?stream=NAME&subject=a.*.>&consumer=NAME`. The seed's `file:///p`, `stdio://` and `chan://` are read too.
Pure: parsing never touches the disk or the network. `parse_url(str(url)) == url` for every parsed URL. Local targets are
percent-decoded (`log:a%20b` is the folder `a b`), except for `file:`, whose path is taken as written, as the seed does.
"""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, quote, unquote

from msgspec import Struct

from mist.errors import InvalidArgument

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{1,31}):", re.ASCII)
_UNSAFE = re.compile(r"[%?\x00\r\n]")
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
        target = self.target
        if self.scheme in LOCAL_SCHEMES:
            target = f"//{target}" if target.startswith("//") else target
            target = target if self.scheme == "file" else _UNSAFE.sub(lambda m: f"%{ord(m[0]):02X}", target)
        query = "&".join(f"{quote(k, safe='')}={quote(v, safe='.*>,:/')}" for k, v in self.query)
        return f"{self.scheme}:{target}" + (f"?{query}" if query else "")

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
            f"not a URL: {redact(text)[:120]!r}", hint="for example log:./data, memory:, nats://localhost:4222"
        )
    scheme = m[1].lower()
    rest, _, query = text[m.end() :].partition("?")
    try:
        query.encode()
        pairs = tuple(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query), errors="strict"))
    except ValueError as exc:
        raise InvalidArgument(f"{redact(text)[:120]}: the part after ? is not key=value&…") from exc
    if scheme in LOCAL_SCHEMES:
        # file:///tmp/x, file://rel and file:rel all name a path; the seed has no host part either
        rest = rest[2:] if rest.startswith("//") else rest
        if "%" in rest and scheme != "file":
            try:
                rest = unquote(rest, errors="strict")
            except UnicodeDecodeError as exc:
                raise InvalidArgument(f"{redact(text)[:120]}: not UTF-8 after decoding the % signs") from exc
    return Url(scheme, rest, pairs)


_SECRET_KEY = re.compile(r"token|pass|secret|key|auth|cred|signature|^(?:pwd|sig)$", re.IGNORECASE)
_PARAMETER = re.compile(r"([?&])([^=&]*)=[^&]*")
_LOCAL = frozenset(f"{s}:" for s in LOCAL_SCHEMES)
_WEB = frozenset({"http:", "https:"})
_HOSTS = re.compile(r"(?:(?:^|,)(?:\[[^\]]*\]|[^:,\[\]]*)(?::[0-9]*)?)*")
_NESTED = re.compile(r"(?<=//)[^/?#&]*(?:@|%40)")


def redact(text: str) -> str:
    """The text as it may be printed: `scheme://user:password@host` and secret query values with *** in their place.

    Hides too much rather than too little: a password that holds `/`, `?` or `#` unescaped is hidden as well. The paths
    of local schemes are left alone, and so is an `@` in a query.
    """
    scheme, slashes, rest = text.partition("//")
    if slashes and "@" in rest and scheme.lower() not in _LOCAL:
        authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
        plain = "@" not in authority and _HOSTS.fullmatch(authority) is not None
        path, mark, query = rest.partition("?")
        no_query = not plain or (scheme.lower() not in _WEB and "=" not in query.partition("@")[0])
        if no_query and "@" not in path:
            path, mark, query = rest, "", ""  # that was no query, but a password (or token) with a question mark
        if "@" in path and not (plain and scheme.lower() in _WEB):
            # everything up to the last @ is, or may be, a secret; a user name that is plainly one is kept
            user, colon, _ = authority.partition(":")
            user = f"{user}:" if user and colon and "@" not in user else ""
            path = f"{user}***@{path[path.rindex('@') + 1 :]}"
        text = f"{scheme}//{path}{mark}{_NESTED.sub('***@', query)}"
    # in two parts: an & before the ? must not take the ? for a part of its value
    head, mark, query = text.partition("?")
    return _PARAMETER.sub(_hidden, head) + _PARAMETER.sub(_hidden, mark + query)


def _hidden(parameter: re.Match[str]) -> str:
    key = parameter[2]
    return f"{parameter[1]}{key}=***" if _SECRET_KEY.search(unquote(key)) else parameter[0]
