"""Dead letters: what a record becomes when its attempts are used up or a worker says never again.

They lie in the stream `<stream>--dead`: data, id and headers of the original, and headers that say where it came from.
The id is made from stream, incarnation, sequence and consumer, so that writing one twice (a crash between the dead
letter and the ack) stores it once within the window. Original headers that would not fit beside ours are left out and
counted, because a dead letter that cannot be written would stop its consumer for ever.
"""

from __future__ import annotations

from collections.abc import Sequence

from mist.broker.base import HEADERS_BYTES_MAX, Broker, Headers, Message, Record, header
from mist.protocol.subject import dead_stream

STREAM = "Mist-Stream"
SEQUENCE = "Mist-Sequence"
CONSUMER = "Mist-Consumer"
ATTEMPTS = "Mist-Attempts"
REASON = "Mist-Reason"
ORIGINAL_ID = "Mist-Id"
HEADERS_DROPPED = "Mist-Headers-Dropped"
OURS = frozenset({STREAM, SEQUENCE, CONSUMER, ATTEMPTS, REASON, ORIGINAL_ID, HEADERS_DROPPED})
REASON_CHARS_MAX = 2000
EXHAUSTED = "attempts used up"
"""The reason of a record that was delivered `attempts_max` times and never settled."""
_COUNTER_BYTES = len(HEADERS_DROPPED) + 6


def dead_letter(record: Record, *, stream: str, incarnation: str, consumer: str, attempts: int, reason: str) -> Message:
    """The message to append to `<stream>--dead`. Control characters of the reason become spaces."""
    text = "".join(c if c.isprintable() else " " for c in reason[:REASON_CHARS_MAX])
    ours: Headers = (
        (STREAM, stream),
        (SEQUENCE, str(record.sequence)),
        (CONSUMER, consumer),
        (ATTEMPTS, str(attempts)),
        (REASON, text or "no reason given"),
        (ORIGINAL_ID, record.id),
    )
    room = HEADERS_BYTES_MAX - sum(_size(k, v) for k, v in ours) - _COUNTER_BYTES
    kept: list[tuple[str, str]] = []
    dropped = 0
    for key, value in record.headers:
        if key in OURS:
            continue
        size = _size(key, value)
        if size > room:
            dropped += 1
            continue
        room -= size
        kept.append((key, value))
    if dropped:
        ours = (*ours, (HEADERS_DROPPED, str(dropped)))
    return Message(record.subject, record.data, f"dead:{incarnation}:{record.sequence}:{consumer}", (*kept, *ours))


def _size(key: str, value: str) -> int:
    return len(key.encode()) + len(value.encode())


async def bury(broker: Broker, letters: Sequence[Message], *, stream: str) -> None:
    """Append dead letters. The caller settles the originals afterwards, never before."""
    if letters:
        await (await broker.open(dead_stream(stream))).append(letters)


def original(record: Record) -> Message:
    """The message a dead letter was made from: same subject, data, id and headers."""
    return Message(
        record.subject,
        record.data,
        header(record.headers, ORIGINAL_ID),
        tuple((k, v) for k, v in record.headers if k not in OURS),
    )
