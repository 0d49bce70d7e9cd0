"""Who may ask: API keys as Bearer tokens, the token of the management routes, and what headers say of the caller.

Promises: without keys everybody may ask, and says by header who that is; with keys nobody without one, and a key's name,
team and project cannot be overridden by a header, because budgets hang on them. Secrets are kept as digests and looked up by
these, so that the time of a comparison says nothing. Does not: make keys, or keep them; they come from the environment.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from mist.errors import NotAuthorised, Refused
from mist.tools.infermux.chat import Caller

LABEL_CHARS_MAX = 128
Named = Mapping[bytes, bytes]
"""Headers by lower-case name."""


class Access:
    """`keys`: the SHA-256 of a key (hex) -> who has it."""

    def __init__(self, keys: Mapping[str, Caller] | None = None, *, management_token: str = "") -> None:
        self._keys = dict(keys or {})
        self._management = _digest(management_token.encode()) if management_token else None

    @property
    def open(self) -> bool:
        """Whether anybody may ask."""
        return not self._keys

    def who(self, headers: Named) -> Caller:
        """Raises NotAuthorised."""
        project, env = _label(headers, b"x-infermux-project"), _label(headers, b"x-infermux-env")
        if not self._keys:
            name = _label(headers, b"x-infermux-caller")
            return Caller(key=name, project=project, env=env) if name or project or env else _NOBODY
        found = self._keys.get(_digest(_token(headers)))
        if found is None:
            raise NotAuthorised(
                "no such API key" if _token(headers) else "an API key is needed", hint="Authorization: Bearer KEY"
            )
        if not (project or env):
            return found
        return Caller(key=found.key, team=found.team, project=found.project or project, env=found.env or env)

    def look(self, headers: Named) -> None:
        """May these see figures: the management token, or where there is none any key. Raises NotAuthorised."""
        if self._management is not None and _digest(_token(headers)) == self._management:
            return
        if self._management is not None:
            raise NotAuthorised("the management token is needed", hint="Authorization: Bearer TOKEN")
        self.who(headers)

    def manage(self, headers: Named) -> None:
        """May these switch circuits: the management token alone. Raises NotAuthorised, Refused."""
        if self._management is None:
            raise Refused("no management token is set", hint="INFERMUX_MANAGEMENT_TOKEN in the router's environment")
        if _digest(_token(headers)) != self._management:
            raise NotAuthorised("the management token is needed", hint="Authorization: Bearer TOKEN")


_NOBODY = Caller()


def _digest(secret: bytes) -> str:
    return hashlib.sha256(secret).hexdigest()


def _token(headers: Named) -> bytes:
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" else b""


def _label(headers: Named, name: bytes) -> str:
    value = headers.get(name)
    return value.decode("latin-1").strip()[:LABEL_CHARS_MAX] if value else ""
