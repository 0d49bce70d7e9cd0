"""What dead processes had reserved, settled with what their calls did cost, where the answers are recorded.

The record is read from where the oldest of these reservations was made. An answer names its question by its correlation id, a
reservation by the same. Of several reservations for one question (a call that was asked twice) one is settled with the cost of
the answer; the others belong to attempts that nobody knows the cost of, and are booked whole.

Promises: an answer without a known cost settles nothing; reading changes nothing in the stream; doing it twice does nothing.
"""

from __future__ import annotations

from mist.broker.base import Broker
from mist.client.client import Client
from mist.errors import Malformed, NotFound
from mist.protocol.payloads import INFER_RESPONSE, InferResponse
from mist.tools.infermux.books import Entry, Reservation
from mist.tools.infermux.budgets import Ledger, whole
from mist.tools.infermux.costs import to_nano

SUBJECTS = (INFER_RESPONSE, f"{INFER_RESPONSE}.>")
EARLIER_S = 60.0
"""Clocks of this machine and of the broker may differ by so much."""


async def reconcile(ledger: Ledger, broker: Broker, stream: str = "infer") -> int:
    """How many were settled. To be called when a service begins. Raises what reading raises."""
    orphans: dict[str, list[Reservation]] = {}
    for reservation in await ledger.orphans():
        if reservation.request:
            orphans.setdefault(reservation.request, []).append(reservation)
    if not orphans:
        return 0
    try:
        record = await broker.open(stream, create=False)
    except NotFound:
        return 0
    after: int | None = None
    if (await record.info()).capabilities.locate:
        oldest_ns = min(r.time_ns for found in orphans.values() for r in found)
        after = await record.locate(oldest_ns - round(EARLIER_S * 1e9)) - 1
    settled = 0
    async with Client(broker) as client:
        reader = client.replay(stream, after=after, subjects=SUBJECTS, on_gap="skip", on_bad="skip")
        async for received in reader:
            if received.envelope.correlation_id not in orphans:
                continue
            try:
                answer = received.envelope.decode(InferResponse)
            except Malformed:  # somebody else's, under our type: it says nothing of what was paid
                continue
            if answer.cost_usd is None or answer.error_code:
                continue
            first, *others = orphans.pop(received.envelope.correlation_id)
            ledger.settle(
                first,
                Entry(
                    time_ns=first.time_ns, caller=first.caller, provider=answer.provider, model=answer.model,
                    tokens_in=answer.tokens_in or 0, tokens_out=answer.tokens_out or 0, nano=to_nano(answer.cost_usd),
                ),
            )  # fmt: skip
            for other in others:
                ledger.settle(other, whole(other))
            settled += 1 + len(others)
    await ledger.flush()
    return settled
