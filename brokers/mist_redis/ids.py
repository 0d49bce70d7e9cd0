"""Sequence <-> entry id, pure and both ways.

In a stream of ours the ids are `0-N` with the sequence N, dense from 1; what others add there with `XADD *` has the id
`ms-n` and the sequence `ms << 20 | n`. The two never meet: our numbers stay below 2**50 (a quadrillion records), and
`ms << 20` is above that for every time after 13 January 1970. In a foreign stream the one formula holds for all ids, so
that small explicit ids (`1-1`, `2-1`) have sequences too. Order of ids is order of sequences in both.

What has no sequence is refused as NoSequence: `n` of 2**20 or more beside a time, times after the year 2248, and in
our own streams explicit ids between `1-0` and `2**30-0`.
"""

from __future__ import annotations

from mist.errors import Conflict

BITS = 20
SMALL = 1 << BITS
OWN_MAX = 1 << 50
MS_MAX = 1 << 43


class NoSequence(Conflict):
    """An entry whose id cannot be a sequence."""


def to_sequence(id: bytes | str, *, own: bool) -> int:
    """The sequence of an entry id. Raises NoSequence, naming the id."""
    text = id.decode("ascii") if isinstance(id, bytes) else id
    head, _, tail = text.partition("-")
    ms, n = int(head), int(tail)
    if ms == 0 and own:
        if n < OWN_MAX:
            return n
    elif ms < MS_MAX and n < SMALL and not (own and ms < OWN_MAX >> BITS):
        return ms << BITS | n
    raise NoSequence(
        f"the entry id {text} has no sequence",
        hint="ids are 0-N or MS-N with N below 2^20; remove that entry with XDEL to read on",
    )


def to_id(sequence: int, *, own: bool) -> str:
    """The id with this sequence; for a sequence nothing can have, an id that sorts where it would."""
    if own and sequence < OWN_MAX:
        return f"0-{max(sequence, 0)}"
    return f"{max(sequence, 0) >> BITS}-{sequence & (SMALL - 1)}"


def runs(sequences: list[int], *, own: bool) -> list[int]:
    """The ids of these sequences as runs `ms, n of the first, n of the last`, flat: what the scripts take."""
    out: list[int] = []
    at = 0
    count = len(sequences)
    while at < count:
        first = sequences[at]
        end = count - 1
        # the usual answer to a fetch is one run without a hole
        if sequences[end] - first != end - at:
            end = at
            while end + 1 < count and sequences[end + 1] == sequences[end] + 1:
                end += 1
        ms, n = split(first, own=own)
        last_ms, last_n = split(sequences[end], own=own)
        if last_ms != ms:  # a run over the end of a millisecond's numbers: entries never are that dense
            end = at
            last_n = n
        out += (ms, n, last_n)
        at = end + 1
    return out


def split(sequence: int, *, own: bool) -> tuple[int, int]:
    """Both parts of `to_id`."""
    if own and sequence < OWN_MAX:
        return 0, sequence
    return sequence >> BITS, sequence & (SMALL - 1)
