"""Who asks, by the key they show; and what a key may ask for, how often.

Promises: keys are compared by their SHA-256, in time that does not tell how much of one was right; no key is kept or shown.
Without `keys` in the settings everybody may ask, as nobody in particular.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Mapping

from mist.errors import InvalidArgument, NotAuthorised
from mist.tools.infermux.chat import Caller
from mist.tools.infermux.limits import Limits, Slots
from mist.tools.infermux.settings import InferMuxSettings, KeySettings


class Keys:
    """The keys of the settings. Raises InvalidArgument when the variable of one is not set."""

    def __init__(self, settings: InferMuxSettings, env: Mapping[str, str] = os.environ) -> None:
        self._digests: list[tuple[str, KeySettings]] = []
        for key in settings.keys:
            if key.env and not env.get(key.env):
                raise InvalidArgument(f"infermux.keys {key.name!r}: the environment variable {key.env} is not set")
            self._digests.append((key.sha256 or _sha256(env[key.env]), key))

    @property
    def needed(self) -> bool:
        return bool(self._digests)

    def caller(self, shown: str, *, project: str = "", env: str = "") -> Caller:
        """Who shows this key. What the key's settings say of the project wins over what the caller says. Raises NotAuthorised."""
        if not self._digests:
            return Caller(project=project, env=env)
        digest = _sha256(shown)
        found: KeySettings | None = None
        for known, key in self._digests:
            if hmac.compare_digest(known, digest):
                found = key
        if found is None:
            raise NotAuthorised("no key, or none that is known here", hint="Authorization: Bearer KEY")
        return Caller(key=found.name, team=found.team, project=found.project or project, env=env)


class KeyRules:
    """What one key may do."""

    __slots__ = ("_models", "limits", "name", "slots")

    def __init__(self, settings: KeySettings, queue_max: int) -> None:
        self.name = settings.name
        self._models = settings.models
        limits = Limits(settings.requests_per_minute, settings.tokens_per_minute)
        self.limits = limits if limits else None
        self.slots = Slots(settings.concurrency_max, queue_max) if settings.concurrency_max else None

    def may_ask(self, model: str) -> bool:
        """Names as they are asked, so that a key for a group is none for its models."""
        if not self._models:
            return True
        return any(model.startswith(m[:-1]) if m.endswith("*") else model == m for m in self._models)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
