"""URL scheme -> broker adapter, through the entry-point group "mist.brokers".

An adapter is a coroutine function `connect(url: Url, **options) -> Broker`. Ours arrive through the same door as a third
party's; only the two built-in ones skip the metadata scan, which costs more than opening a log.
"""

from __future__ import annotations

import importlib
from collections.abc import Awaitable, Callable, Generator
from types import TracebackType
from typing import Any

from mist.broker.base import Broker
from mist.errors import InvalidArgument
from mist.protocol.url import Url, parse_url

GROUP = "mist.brokers"
_BUILT_IN = {"memory": "mist.broker.memory:connect", "log": "mist.log:connect"}
_EXTRAS = {
    "nats": "nats",
    "tls": "nats",
    "redis": "redis",
    "rediss": "redis",
    "redis+sentinel": "redis",
    "redis+cluster": "redis",
}
_SPOOL = "spool+"
"""A log in front of any broker: `spool+nats://…` (mist.log.spool)."""
_LIGHT = frozenset({"file", "http", "https", "stdio", "chan"})

Adapter = Callable[..., Awaitable[Broker]]


def adapter(scheme: str) -> Adapter:
    """The adapter for a scheme. Raises InvalidArgument with the install line, or naming `transport.dial`."""
    if scheme in _BUILT_IN:
        module, _, name = _BUILT_IN[scheme].partition(":")
        return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]
    if scheme.startswith(_SPOOL):
        adapter(scheme.removeprefix(_SPOOL))
        return getattr(importlib.import_module("mist.log.spool"), "connect")  # type: ignore[no-any-return]  # noqa: B009
    if scheme in _LIGHT:
        raise InvalidArgument(
            f"{scheme}: is a transport, it keeps no streams", hint=f'use mist.transport.dial("{scheme}:…")'
        )
    from importlib.metadata import entry_points  # a third of what `import mist` would cost

    for point in entry_points(group=GROUP, name=scheme):
        try:
            return point.load()  # type: ignore[no-any-return]
        except ImportError as exc:
            extra = _EXTRAS.get(scheme, scheme)
            raise InvalidArgument(
                f"{scheme}: needs a package that is not installed ({exc.name})",
                hint=f"pip install 'mist-stack[{extra}]'",
            ) from exc
    known = sorted({*_BUILT_IN, *(p.name for p in entry_points(group=GROUP))})
    raise InvalidArgument(f"no broker for the scheme {scheme!r}", hint=f"known here: {', '.join(known)}")


class connect:
    """`await connect(url)`, or `async with connect(url) as broker:`. The broker belongs to the running event loop."""

    def __init__(self, url: str | Url, **options: Any) -> None:
        self._url = parse_url(url) if isinstance(url, str) else url
        self._options = options
        self._broker: Broker | None = None

    def __await__(self) -> Generator[Any, None, Broker]:
        return self._connect().__await__()

    async def _connect(self) -> Broker:
        return await adapter(self._url.scheme)(self._url, **self._options)

    async def __aenter__(self) -> Broker:
        self._broker = await self._connect()
        return self._broker

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self._broker is not None:
            await self._broker.aclose()
