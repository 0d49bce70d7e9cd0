"""What the records of one run mean: who holds it, what is done. Pure: records and their broker's times in, state out.

A claim counts when nobody holds the run, or when the holder's last record plus its lease lies before the claim's own record
time. Every record of somebody else than the holder counts for nothing. Both times are the broker's, so that no clock of a
process decides, and whoever reads the records comes to the same answer.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Raw, Struct

NULL = Raw(b"null")
Kind = Literal["claim", "renew", "release", "reset", "running", "completed", "failed"]


class StepRecord(Struct, frozen=True, omit_defaults=True):
    """One record of a run, the payload of a `run.step` envelope. `owner` names one opening of the run."""

    kind: Kind
    owner: str
    lease_s: float = 0.0
    step: str = ""
    attempt: int = 0
    inputs: str = ""
    result: Raw = NULL
    error: str = ""


class Ledger:
    """The state of a run. `done` holds the completed steps in the order of completion: their `completed` records."""

    def __init__(self) -> None:
        self.holder = ""
        self.until_ns = 0
        self.done: dict[str, StepRecord] = {}
        self.attempts: dict[str, int] = {}
        self._lease_ns = 0

    def read(self, record: StepRecord, time_ns: int) -> None:
        """One record of the stream, in order."""
        if record.kind == "claim":
            if not self.holder or self.holder == record.owner or time_ns >= self.until_ns:
                self.holder = record.owner
                self._lease_ns = int(record.lease_s * 1e9)
                self.until_ns = time_ns + self._lease_ns
            return
        if record.owner != self.holder:
            return
        self.until_ns = time_ns + self._lease_ns
        if record.kind == "release":
            self.holder = ""
        else:
            self.note(record)

    def note(self, record: StepRecord) -> None:
        """What the record says about its step. Saying it twice changes nothing."""
        if record.kind == "reset":
            self.done.clear()
            self.attempts.clear()
        elif record.kind == "completed":
            self.done.pop(record.step, None)
            self.done[record.step] = record
        elif record.kind in ("running", "failed"):
            self.attempts[record.step] = max(record.attempt, self.attempts.get(record.step, 0))
            self.done.pop(record.step, None)
