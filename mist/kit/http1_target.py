"""Where a request of http1_client goes and what stands in its head, from texts that come from outside: checked, so that nothing in
them can begin another line of the head or name another server than the one that is seen.

Errors repeat nothing that may be a credential. Does not: look a name up.
"""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import quote, urlsplit

from msgspec import Struct

from mist.errors import InvalidArgument
from mist.kit._http1_connection import Origin
from mist.protocol.url import redact

_PATH = "/:@!$&'()*+,;=-._~%"
_OURS = frozenset({"connection", "content-length", "expect", "te", "trailer", "transfer-encoding", "upgrade"})


class Target(Struct, frozen=True):
    """A server, a path (empty or from its first slash on), and a query with its question mark; both percent-encoded."""

    origin: Origin
    path: str
    query: str

    @classmethod
    def of(cls, url: str, what: str) -> Target:
        """From an http or https URL; a fragment is left out. `what` the URL is, for errors. Raises InvalidArgument."""
        shown = redact(url)
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port
        except ValueError:
            raise InvalidArgument(f"{what} is no URL") from None  # either may say a password
        if parts.scheme not in ("http", "https") or not host or port == 0:
            raise InvalidArgument(f"{what}={shown!r} is no http URL", hint="for example http://127.0.0.1:11434/v1")
        if parts.username is not None or parts.password is not None or shown != url:
            raise InvalidArgument(f"{what} holds credentials", hint="keys go into headers; there is a setting for them")
        if not url.isprintable() or " " in url:
            raise InvalidArgument(f"{what}={shown!r} holds what no URL may hold")
        if not host.isascii():
            try:
                host = host.encode("idna").decode("ascii")
            except UnicodeError as exc:
                raise InvalidArgument(f"{what}={shown!r} names no host: {exc}") from exc
        tls = parts.scheme == "https"
        query = f"?{quote(parts.query, safe=_PATH + '?')}" if parts.query else ""
        return cls(Origin(host, port or (443 if tls else 80), tls), quote(parts.path, safe=_PATH), query)


def host_of(origin: Origin) -> str:
    """The value of the header `host`."""
    host = f"[{origin.host}]" if ":" in origin.host else origin.host
    return host if origin.port == (443 if origin.tls else 80) else f"{host}:{origin.port}"


def checked_headers(headers: Mapping[str, str], what: str) -> dict[str, str]:
    """With their names in lower case. `what` they are headers of, for errors. Raises InvalidArgument."""
    for name, value in headers.items():
        if not (value.isprintable() and value.isascii()):
            raise InvalidArgument(f"{what}: the value of the header {name} holds what no header may hold")
        if not name or not name.replace("-", "").replace("_", "").isalnum() or not name.isascii():
            raise InvalidArgument(f"{what}: {name!r} is no name of a header")
        if name.lower() in _OURS:
            raise InvalidArgument(f"{what}: the header {name} is the connection's own")
    return {name.lower(): value for name, value in headers.items()}
