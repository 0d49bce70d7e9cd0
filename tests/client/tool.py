"""A small tool, the same over every way: `python tests/client/tool.py URL [OUT]`."""

from __future__ import annotations

import sys
import time
from typing import Any

from mist.client.handler import Handler
from mist.client.serving import run
from mist.errors import InvalidArgument
from mist.protocol.envelope import Envelope

ITEM, DONE = "work.item", "work.done"
BAD = 13
"""The number that cannot be worked on."""


def outputs_of(n: int) -> int:
    """How many outputs number `n` has: none, one or two."""
    return n % 3 if n != BAD else 0


async def work(request: Envelope) -> list[Envelope]:
    n = request.decode(dict)["n"]
    if n == BAD:
        raise InvalidArgument(f"nobody can work on {n}")
    if len(sys.argv) > 3:
        time.sleep(float(sys.argv[3]))  # noqa: ASYNC251 - slow enough to be killed in the middle
    return [Envelope.new(DONE, {"n": n, "part": part}, source="tool") for part in range(outputs_of(n))]


async def work_many(requests: list[Envelope]) -> list[Any]:
    outcomes: list[Any] = []
    for request in requests:
        try:
            outcomes.append(await work(request))
        except InvalidArgument as exc:
            outcomes.append(exc)
    return outcomes


def tool(*, many: bool = False) -> Handler:
    how: dict[str, Any] = {"many": work_many} if many else {"one": work}
    return Handler("tool", **how, accepts=(ITEM,), version="7")


def item(n: int, **fields: Any) -> Envelope:
    return Envelope.new(ITEM, {"n": n}, source="test", id=f"item-{n}", **fields)


if __name__ == "__main__":
    sys.exit(run(tool(), sys.argv[1], out=sys.argv[2] if len(sys.argv) > 2 else ""))
