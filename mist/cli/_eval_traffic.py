"""Production traffic for `mist eval run --from-stream`: which part of the stream, and how far it was judged."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from msgspec import Struct

from mist.cli.position import after_of, last_of, parse_position
from mist.cli.session import Session

if TYPE_CHECKING:
    from mist.broker.base import Broker, Stream
    from mist.tools.matchspec.suite import Suite


class Judged(Struct, frozen=True):
    """Suites made of traffic, and where the reading of it ended."""

    suites: list[Suite]
    broker: Broker | None
    stream: Stream
    last: int


async def judged(session: Session, base: Sequence[Suite], source: str, from_: str, to: str) -> Judged:
    """The traffic of a stream under each suite. Raises NotFound where there is nothing to judge."""
    from mist.tools.matchspec.traffic import ANSWERS_MAX, read_traffic, suite_of_traffic

    out = session.out
    broker, stream = await session.locate(source)
    info = await stream.info()
    checkpoints = broker.checkpoints if broker is not None else None
    now = time.time_ns()
    after = await after_of(parse_position(from_ or "start", now_ns=now), stream, checkpoints, info)
    until = await last_of(parse_position(to or "end", now_ns=now), stream, checkpoints, info)
    found = await read_traffic(stream, after=after, to=until)
    suites = []
    for suite in base:
        made = suite_of_traffic(suite, found)
        suites.append(made.suite)
        if made.left_out:
            out.warn(f"{made.left_out} answers have no expectation in suite {suite.name} and were left out")
    out.note(f"{len(found.exchanges)} answers of stream {stream.name}, after {after} up to {found.last}")
    if found.unmatched:
        out.warn(f"{found.unmatched} answers whose questions lie before the position were left out")
    if found.full:
        out.warn(f"only the first {ANSWERS_MAX} answers were taken; go on with --from +{found.last}")
    return Judged(suites, broker, stream, found.last)


async def save(session: Session, done: Judged, name: str) -> None:
    """Remember how far the traffic was judged, as a cursor of its stream."""
    from mist.broker.base import Checkpoint

    if done.broker is not None:
        await done.broker.checkpoints.save(
            Checkpoint(stream=done.stream.name, name=name, incarnation=done.stream.incarnation, sequence=done.last)
        )
        session.out.note(f"go on with: --from cursor:{name}")
