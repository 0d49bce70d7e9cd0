"""The verdict of the demo, from two append-only records: what the producer was told is stored, and what the worker did.

`acknowledged` are the distinct spans of the producer's record, written after each append returned. `lost` are those of
them that the store does not hold. `duplicated` counts every time beyond the first that the worker applied one of
them: its record is a table without any uniqueness, filled in the transaction that also moves the position, so a position
that is not moved with the rows, or moved back, shows here although the table of spans would hide it.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from msgspec import Struct

from mist.errors import Internal
from mist.tools.tokentrace.store import Store


class Verdict(Struct, frozen=True, kw_only=True):
    """`unrecorded`: stored spans that the worker's record does not know (a broken record is no proof)."""

    acknowledged: int
    stored: int
    lost: int
    duplicated: int
    refused: int
    unrecorded: int

    @property
    def ok(self) -> bool:
        whole = self.acknowledged > 0 and self.stored == self.acknowledged
        return whole and not (self.lost or self.duplicated or self.refused or self.unrecorded)


def judge(acknowledged: Path, store: Store) -> Verdict:
    """Compare the two records with the store. Memory: the ids of all spans."""
    acked = read_acknowledged(acknowledged)
    stored = set(store.query("SELECT trace_id, span_id FROM spans"))
    applied = Counter(store.query("SELECT trace_id, span_id FROM applied"))
    ours = acked & stored
    return Verdict(
        acknowledged=len(acked),
        stored=len(ours),
        lost=len(acked - stored),
        duplicated=sum(applied[key] - 1 for key in acked if applied[key] > 1),
        refused=store.count("quarantine"),
        unrecorded=sum(1 for key in ours if key not in applied),
    )


def acknowledged_line(sequence: int, trace_id: str, span_id: str) -> bytes:
    """One line of the producer's record."""
    return f"{sequence} {trace_id} {span_id}\n".encode()


def read_acknowledged(path: Path) -> set[tuple[str, str]]:
    """The distinct spans of the producer's record. A torn last line (the producer was killed) is not an acknowledgement."""
    out = set()
    for line in path.read_bytes().split(b"\n")[:-1]:
        fields = line.decode("ascii", "replace").split(" ")
        if len(fields) != 3:
            raise Internal(f"{path}: not a line of the record: {line[:80]!r}")
        out.add((fields[1], fields[2]))
    return out
