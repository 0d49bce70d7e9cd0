"""Whose delivery is it: JetStream takes an ack for a record whoever sends it, so what is still ours is kept here.

One table per consumer and process, shared by every connection of the process: a worker that connects again still owns
what it holds. Promises: a token is given once, ever; a delivery is ours while its token is the record's current one
here and its ack wait has not run out (less `MARGIN` of it, for the way from the server). What another process was given,
or this one before it was restarted, is not ours: its ack is a no-op and the record comes again after its ack wait.

Cannot know: that another process made the consumer seek, until the next delivery shows it.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterable, Sequence
from itertools import repeat

from mist.broker.base import Delivery

MARGIN = 0.05
MARGIN_S_MAX = 0.5
TABLES_MAX = 10_000

_tables: dict[str, Leases] = {}
_lock = threading.Lock()


class Leases:
    """Of one consumer. Callable from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[int, tuple[str, float]] = {}
        self.returned: dict[int, str] = {}
        """Given back without a delay and not seen since: sequence -> tail of the ack subject."""
        self.epoch = self._new_epoch()
        self.prefix = ""
        """The consumer's ack subject up to what differs per delivery."""

    def _new_epoch(self) -> str:
        return secrets.token_hex(4) + "."

    def empty(self) -> bool:
        now = time.monotonic()
        with self._lock:
            return all(deadline <= now for _, deadline in self._held.values())

    def forget(self) -> None:
        """Every delivery so far is stale, and no later one has its token."""
        with self._lock:
            self._held.clear()
            self.returned.clear()
            self.epoch = self._new_epoch()

    def drop(self, sequences: Iterable[int]) -> None:
        """The server settles the deliveries of these records by itself."""
        with self._lock:
            for sequence in sequences:
                self._held.pop(sequence, None)
                self.returned.pop(sequence, None)

    def give(self, sequences: Iterable[int], tokens: Sequence[str], ack_wait_s: float, received: float) -> None:
        """These are ours now, from monotonic time `received` on."""
        deadline = received + ack_wait_s - min(ack_wait_s * MARGIN, MARGIN_S_MAX)
        with self._lock:
            self._held.update(zip(sequences, zip(tokens, repeat(deadline)), strict=False))

    def take(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """Those that are ours, each once; they are not ours any more."""
        now = time.monotonic()
        out: list[Delivery] = []
        with self._lock:
            held = self._held
            for d in deliveries:
                sequence = d.record.sequence
                lease = held.get(sequence)
                if lease is not None and lease[0] == d.token and lease[1] > now:
                    del held[sequence]
                    out.append(d)
        return out

    def renew(self, deliveries: Sequence[Delivery], ack_wait_s: float) -> list[Delivery]:
        """Those that are ours, each once; their time begins anew."""
        out = self.take(deliveries)
        self.give([d.record.sequence for d in out], [d.token for d in out], ack_wait_s, time.monotonic())
        return out


def leases_of(key: str) -> Leases:
    """The table of a consumer (its stream's incarnation and its own identity)."""
    with _lock:
        found = _tables.get(key)
        if found is None:
            if len(_tables) >= TABLES_MAX:
                for old in [k for k, t in _tables.items() if t.empty()]:
                    del _tables[old]
            found = _tables[key] = Leases()
        return found


def returned_of(incarnation: str, first: int) -> list[tuple[str, list[str]]]:
    """What was given back by this process, per consumer of a stream: ack subjects, from sequence `first` on."""
    with _lock:
        tables = [t for k, t in _tables.items() if k.startswith(f"{incarnation}/")]
    return [(t.prefix, [tail for s, tail in list(t.returned.items()) if s >= first]) for t in tables if t.returned]
