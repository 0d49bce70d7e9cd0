"""Who may come through a door: API keys as Bearer tokens, the token of the management routes, and what headers say of the caller.

Promises: without keys everybody may ask, and says by header who that is; with keys nobody without one, and a key's name,
team and project cannot be overridden by a header, because budgets hang on them. The token is kept as a digest.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping

from mist.errors import NotAuthorised, Refused
from mist.tools.infermux.chat import Caller
from mist.tools.infermux.keys import Keys

LABEL_CHARS_MAX = 128
Named = Mapping[bytes, bytes]
"""Headers by lower-case name."""


class Access:
    """`keys` of the settings; the token of the management routes, if there is one."""

    def __init__(self, keys: Keys | None = None, *, management_token: str = "") -> None:
        self._keys = keys if keys is not None and keys.needed else None
        self._management = _digest(management_token.encode()) if management_token else None

    @property
    def open(self) -> bool:
        """Whether anybody may ask."""
        return self._keys is None

    def who(self, headers: Named) -> Caller:
        """Raises NotAuthorised."""
        project, env = _label(headers, b"x-infermux-project"), _label(headers, b"x-infermux-env")
        if self._keys is not None:
            return self._keys.caller(_token(headers).decode("latin-1"), project=project, env=env)
        name = _label(headers, b"x-infermux-caller")
        return Caller(key=name, project=project, env=env) if name or project or env else _NOBODY

    def look(self, headers: Named) -> None:
        """May these see figures: the management token, or where there is none any key. Raises NotAuthorised."""
        if self._management is None:
            self.who(headers)
        elif not hmac.compare_digest(_digest(_token(headers)), self._management):
            raise NotAuthorised("the management token is needed", hint="Authorization: Bearer TOKEN")

    def manage(self, headers: Named) -> None:
        """May these switch circuits: the management token alone. Raises NotAuthorised, Refused."""
        if self._management is None:
            raise Refused("no management token is set", hint="INFERMUX_MANAGEMENT_TOKEN in the router's environment")
        if not hmac.compare_digest(_digest(_token(headers)), self._management):
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
