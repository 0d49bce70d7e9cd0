"""TokenTrace at work beside a stream: ingest, limits and the questions over HTTP, on one store.

Promises: a question waits for no ingest; the first error that waiting does not mend ends all of it, in order. Spans beyond
the limits of age and size go in pieces, so that the ingest waits for no more than one of them.

Does not: open brokers or listeners, or read settings: the caller hands them in.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from msgspec import Struct

from mist.broker.base import Broker, Stream
from mist.errors import Locked, MistError
from mist.kit.prices import Prices
from mist.kit.server import App
from mist.kit.waiting import in_thread, sleep_unless
from mist.tools.tokentrace.api import Api
from mist.tools.tokentrace.ingest import Options, Progress, ingest, start
from mist.tools.tokentrace.readers import Readers
from mist.tools.tokentrace.stats import Metrics, metrics
from mist.tools.tokentrace.store import Store

HOUSEKEEPING_S = 30.0
"""Between two looks at the limits of the store."""
TOTALS_S = 5.0
"""How old the totals may be that a scrape of metrics sees."""
_CHUNK = 5000
Say = Callable[[str], None]


class Retention(Struct, frozen=True, kw_only=True):
    """How long spans stay in the store, and how large it may grow. 0 = no limit."""

    retain_s: float = 0.0
    retain_bytes: int = 0


class Service:
    """One store's work. `run` opens the store; `doors` are its routes."""

    def __init__(
        self,
        place: Path | str,
        *,
        prices: Prices | None = None,
        retention: Retention = Retention(),  # noqa: B008  # a frozen value
        prometheus: App | None = None,
        say: Say = lambda _text: None,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self.place = place
        self._options = Options(prices=prices)
        self._retention = retention
        self._say = say
        self._clock = clock
        self.readers = Readers(place)
        self._api = Api(self.readers, prometheus=prometheus, clock=clock)
        self._progress = Progress(0, 0)
        self._retired = 0
        self.totals: list[Metrics] = []
        """Everything ever, by tenant, operation, model and provider; at most TOTALS_S old while it runs."""

    def doors(self) -> Mapping[str, App]:
        return self._api.doors()

    def facts(self) -> dict[str, Any]:
        """Counters of this process."""
        p = self._progress
        return {
            "position": p.position, "spans": p.spans, "refused": p.refused, "gaps": p.gaps, "retired": self._retired,
        }  # fmt: skip

    async def run(self, broker: Broker, stream: Stream, stop: asyncio.Event, *, ready: Callable[[], None]) -> None:
        """Until `stop`; the page in hand is finished. `ready` is called once the store is open and its position known."""
        with await asyncio.to_thread(Store.open, self.place) as store:
            after = start(store, stream)
            self._progress = Progress(after, after)
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._housekeeping(stop))
                    group.create_task(self._refresh(stop))
                    ready()
                    await ingest(
                        broker, stream, store, stop=stop, options=self._options, on_event=self._say,
                        progress=self._progress,
                    )  # fmt: skip
            except* MistError as found:
                raise _first(found) from None
            finally:
                self.readers.close()

    async def _housekeeping(self, stop: asyncio.Event) -> None:
        kept = self._retention
        if not kept.retain_s and not kept.retain_bytes:
            return
        with await asyncio.to_thread(Store.open, self.place) as store:
            while not stop.is_set():
                before = self._clock() - round(kept.retain_s * 1e9) if kept.retain_s else None
                try:
                    gone = await in_thread(
                        partial(store.retain, before_ns=before, bytes_max=kept.retain_bytes or None, limit=_CHUNK)
                    )
                except Locked as exc:
                    self._say(f"{exc}; the limits of the store are looked at again in {HOUSEKEEPING_S:g} s")
                    gone = 0
                self._retired += gone
                await sleep_unless(0.05 if gone else HOUSEKEEPING_S, stop)

    async def _refresh(self, stop: asyncio.Event) -> None:
        groups = ("tenant", "operation", "model", "provider")
        while not stop.is_set():
            try:
                self.totals = await self.readers.ask(lambda store: metrics(store, group_by=groups))
            except MistError as exc:
                if not exc.retryable:
                    raise
            await sleep_unless(TOTALS_S, stop)


def _first(group: BaseExceptionGroup[MistError]) -> MistError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if not isinstance(error, MistError):
        raise group
    return error
