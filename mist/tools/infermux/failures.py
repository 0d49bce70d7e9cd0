"""What a provider can fail with, and what the router makes of it. One class; `kind` decides.

kind              retry here   fall back   breaker    said to the caller
rate_limited      yes          yes         no         429, Retry-After
overloaded        yes          yes         yes        503
server            yes          yes         yes        502
timeout           no           yes         yes        504
connection        yes          yes         yes        502
bad_answer        yes          yes         yes        502    not JSON, not the shape, a stream that ends in the middle
credentials       no           yes         opens      502    our key is refused (401, 403): a fault of the configuration
unknown_model     no           yes         opens      404    the provider does not have it
context_window    no           bigger      no         400    only to a model with more room
content_policy    no           no          no         400
invalid           no           no          no         400    the request is wrong whoever is asked
unsupported       no           yes         no         400    this provider cannot do what is asked

"opens": at once, not after so many failures: no retry mends it, and somebody must look.
"""

from __future__ import annotations

from typing import Literal, get_args

from mist.errors import MistError

Kind = Literal[
    "rate_limited", "overloaded", "server", "timeout", "connection", "bad_answer", "credentials", "unknown_model",
    "context_window", "content_policy", "invalid", "unsupported",
]  # fmt: skip
KINDS: tuple[Kind, ...] = get_args(Kind)

_CODES: dict[Kind, str] = {
    "rate_limited": "rate_limit", "overloaded": "overloaded", "server": "transport", "timeout": "timeout",
    "connection": "unavailable", "bad_answer": "transport", "credentials": "transport", "unknown_model": "not_found",
    "context_window": "validation", "content_policy": "validation", "invalid": "validation",
    "unsupported": "validation",
}  # fmt: skip

_STATUS: dict[Kind, int] = {
    "rate_limited": 429, "overloaded": 503, "server": 502, "timeout": 504, "connection": 502, "bad_answer": 502,
    "credentials": 502, "unknown_model": 404, "context_window": 400, "content_policy": 400, "invalid": 400,
    "unsupported": 400,
}  # fmt: skip

RETRIED: frozenset[Kind] = frozenset({"rate_limited", "overloaded", "server", "connection", "bad_answer"})
FALLS_BACK: frozenset[Kind] = RETRIED | {"timeout", "credentials", "unknown_model", "unsupported"}
COUNTED: frozenset[Kind] = frozenset({"overloaded", "server", "timeout", "connection", "bad_answer"})
OPENS: frozenset[Kind] = frozenset({"credentials", "unknown_model"})


class ProviderError(MistError):
    """A provider failed. `status` is its HTTP status (0: there was none); `retry_after_s` what it asked for; `begun`: a
    part of the answer was already handed out, so that nobody may answer the question anew unseen."""

    def __init__(
        self,
        kind: Kind,
        message: str,
        *,
        provider: str = "",
        status: int = 0,
        retry_after_s: float | None = None,
        begun: bool = False,
        hint: str = "",
    ) -> None:
        super().__init__(
            f"provider {provider}: {message}" if provider else message,
            hint=hint,
            meta={"kind": kind, "provider": provider, "status": str(status)},
            retryable=kind in RETRIED,
            retry_after_s=retry_after_s,
        )
        self.code = _CODES[kind]
        self.kind: Kind = kind
        self.provider = provider
        self.status = status
        self.begun = begun

    @property
    def http_status(self) -> int:
        """What a caller of ours is told: the code's status does not say that the fault lies behind us."""
        return _STATUS[self.kind]
