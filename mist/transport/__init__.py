"""`dial(url)`: the seed's three verbs (send, receive, close) over every URL, in envelopes.

`file:PATH`, `stdio:`, `chan:NAME`, `http(s)://host`, and every broker URL with `?stream=NAME`. What each promises is in
the module of its name; what all promise is in base.py. `serve` is the receiving end of http for a stream.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Generator
from types import TracebackType
from typing import TYPE_CHECKING, Any

from mist.protocol.url import Url, parse_url
from mist.transport._lines import Position
from mist.transport.base import Transport

if TYPE_CHECKING:
    from mist.transport.chan import pair
    from mist.transport.server import serve

_SCHEMES = {
    "file": "mist.transport.file",
    "stdio": "mist.transport.stdio",
    "chan": "mist.transport.chan",
    "http": "mist.transport.http",
    "https": "mist.transport.http",
}


class dial:
    """`await dial(url)`, or `async with dial(url) as transport:`. Options are those of the scheme's `from_url`.

    Raises InvalidArgument for a URL that cannot be right; a missing package is named with its install line.
    """

    def __init__(self, url: str | Url, **options: Any) -> None:
        self._url = parse_url(url) if isinstance(url, str) else url
        self._options = options
        self._transport: Transport | None = None

    def __await__(self) -> Generator[Any, None, Transport]:
        return self._dial().__await__()

    async def _dial(self) -> Transport:
        module = importlib.import_module(_SCHEMES.get(self._url.scheme, "mist.transport.stream"))
        made = module.from_url(self._url, **self._options)
        transport: Transport = await made if inspect.isawaitable(made) else made
        start = getattr(transport, "start", None)
        if start is not None:
            await start()
        return transport

    async def __aenter__(self) -> Transport:
        self._transport = await self._dial()
        return await self._transport.__aenter__()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self._transport is not None:
            await self._transport.__aexit__(exc_type, exc, tb)


def __getattr__(name: str) -> Any:
    if name == "serve":
        from mist.transport.server import serve

        return serve
    if name == "pair":
        from mist.transport.chan import pair

        return pair
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["Position", "Transport", "dial", "pair", "serve"]
