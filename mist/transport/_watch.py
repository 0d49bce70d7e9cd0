"""Wait until a file changes, by looking every 10 ms: it works on every file system and needs nothing.

Does not: notice a change that leaves identity and size as they were.
"""

from __future__ import annotations

import asyncio
import os

from msgspec import Struct

POLL_S = 0.01


class Seen(Struct, frozen=True):
    """What a look at a path showed. A missing file has identity (0, 0)."""

    identity: tuple[int, int] = (0, 0)
    size: int = 0


def look(path: str) -> Seen:
    try:
        st = os.stat(path)
    except FileNotFoundError:
        return Seen()
    return Seen((st.st_dev, st.st_ino), st.st_size)


async def changed(
    path: str, seen: Seen, *, closing: asyncio.Future[None], wait_s: float | None, poll_s: float = POLL_S
) -> bool:
    """True when a look shows something else than `seen`; False when the time ran out or `closing` is done."""
    loop = asyncio.get_running_loop()
    until = None if wait_s is None else loop.time() + wait_s
    while not closing.done():
        if look(path) != seen:
            return True
        left = poll_s if until is None else min(poll_s, until - loop.time())
        if left <= 0:
            return False
        await asyncio.wait([closing], timeout=left)
    return False
