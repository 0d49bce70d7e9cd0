"""What an acknowledged record survives: asked of the server where it can be asked, else the operator's word.

NATS acknowledges before it syncs, unless its configuration says `sync_interval: always`: what was acknowledged then
survives kill -9, and a power cut takes up to sync_interval (two minutes by default). Clients are not told; the
monitoring endpoint is. It counts only when it is the endpoint of the server we are connected to (`server_id`).
"""

from __future__ import annotations

import asyncio
import ssl
from contextlib import suppress
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from mist.broker.base import RECORD_BYTES_MAX, Fact

ASK_S = 2.0
GUESS_S = 0.5
"""For an endpoint that nobody named: the usual port may belong to anything."""
ANSWER_BYTES_MAX = 4 * 1024 * 1024
HOW = "set `jetstream { sync_interval: always }` and say ?monitor=PORT, or ask for durability=replicated"


class Sync(Struct, frozen=True):
    """Whether the server syncs before it acknowledges, and what to tell about it."""

    always: bool
    asked: bool = False
    """The server itself said so."""
    interval_s: float = 120.0
    warning: str = ""


class _Config(Struct):
    sync_interval: int = 120_000_000_000
    sync_always: bool = False


class _Jsz(Struct):
    server_id: str = ""
    config: _Config = msgspec.field(default_factory=_Config)


async def sync_of(monitor: str, said: str, server_id: str) -> Sync:
    """Ask `monitor` (with `?` in front: a guess) about the server `server_id`; `said` is the URL's `sync`."""
    guess = monitor.startswith("?")
    try:
        async with asyncio.timeout(GUESS_S if guess else ASK_S):
            found = msgspec.json.decode(await _get(monitor.lstrip("?") + "/jsz?config=1"), type=_Jsz)
        trouble = "" if found.server_id == server_id else "is another server's"
    except (OSError, TimeoutError, ValueError, asyncio.IncompleteReadError) as exc:
        found, trouble = _Jsz(), f"does not answer ({type(exc).__name__})"
    if not trouble:
        return Sync(found.config.sync_always, True, found.config.sync_interval / 1e9)
    if said:
        always = said == "always"
        return Sync(always, warning=f"sync={said} is the operator's word, nothing verified it" if always else "")
    where = "" if guess else f"; its monitoring endpoint {trouble}"
    return Sync(False, warning=f"the server's sync_interval is unknown{where}")


async def _get(url: str) -> bytes:
    """The body of a small HTTP GET. Raises OSError, ValueError."""
    at = urlsplit(url)
    context = ssl.create_default_context() if at.scheme == "https" else None
    reader, writer = await asyncio.open_connection(at.hostname, at.port or (443 if context else 80), ssl=context)
    try:
        writer.write(f"GET {at.path}?{at.query} HTTP/1.0\r\nHost: {at.netloc}\r\n\r\n".encode())
        answer = b""
        while chunk := await reader.read(65536):
            answer += chunk
            if len(answer) > ANSWER_BYTES_MAX:
                raise ValueError("an answer without end")
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
    head, _, body = answer.partition(b"\r\n\r\n")
    if b" 200 " not in head[:20]:
        raise ValueError("not 200")
    return body


def process_warning(sync: Sync) -> str:
    """What a stream of level `process` has to say."""
    why = f"{sync.warning}; " if sync.warning else ""
    return f"{why}a power cut may take what was acknowledged in the last sync_interval ({sync.interval_s:g} s): {HOW}"


def sync_fact(sync: Sync) -> Fact:
    """For `mist doctor`: when the server syncs, and who said so."""
    said = "as the server says" if sync.asked else "as the URL says" if sync.always else "not asked"
    if sync.always:
        return Fact("sync", f"always, {said}", sync.warning)
    return Fact("sync", f"every {sync.interval_s:g} s, {said}", process_warning(sync))


def server_facts(info: dict[str, object], version: tuple[int, int], max_payload: int, replicas: int) -> list[Fact]:
    """For `mist doctor`: from what the server said when it was connected to."""
    cluster = f", cluster {info['cluster']}" if info.get("cluster") else ""
    found = [name for name, since in FEATURES.items() if version >= since]
    missing = [name for name, since in FEATURES.items() if version < since]
    small = max_payload < RECORD_BYTES_MAX
    return [
        Fact("server", f"nats-server {info.get('version', '?')} ({info.get('server_name', '?')}{cluster})"),
        Fact("features", ", ".join(found), f"without {', '.join(missing)}: a newer server" if missing else ""),
        Fact(
            "largest message", f"{max_payload:,} bytes",
            f"records of {RECORD_BYTES_MAX:,} bytes are refused: set max_payload" if small else "",
        ),
        Fact("replicas of new streams", str(replicas or 1)),
    ]  # fmt: skip


FEATURES = {
    "direct get": (2, 9),
    "several filters": (2, 10),
    "batched direct get": (2, 11),
    "atomic batches": (2, 12),
}
"""What this adapter uses where it is there, and the release that brought it."""
