"""Health probes: a question of one token to each provider that has a `health_check`, again and again, so that one that is down is
known before a call finds out, and one that works again before a call is risked.

Promises: a provider whose probe failed is asked by nobody until one works, whatever its circuits say; what says nothing about
its health (it is busy, it refuses the question) counts as well. A probe is paid, and booked under the key `infermux.health`.

Does not: probe who was not asked to be: a probe costs money. Open circuits, which are for what calls find out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from mist.tools.infermux.books import Entry
from mist.tools.infermux.chat import Caller, ChatMessage, ChatRequest, Usage
from mist.tools.infermux.costs import to_nano
from mist.tools.infermux.failures import COUNTED, OPENS, ProviderError
from mist.tools.infermux.lanes import Side
from mist.tools.infermux.router import Router

PROBER = Caller(key="infermux.health")
QUESTION = (ChatMessage(role="user", content="ping"),)
Say = Callable[[str], None]


async def probe(
    router: Router, *, say: Say = lambda _text: None, sleep: Callable[[float], Awaitable[object]] = asyncio.sleep
) -> None:
    """Until it is cancelled; returns at once where nobody is to be probed."""
    async with asyncio.TaskGroup() as group:
        for side in router.sides():
            if side.settings.probed:
                group.create_task(_again_and_again(router, side, say, sleep))


async def _again_and_again(router: Router, side: Side, say: Say, sleep: Callable[[float], Awaitable[object]]) -> None:
    interval_s = float(side.settings.health_check.interval)
    while True:
        before, side.sick = side.sick, await once(router, side)
        if bool(before) != bool(side.sick):
            say(f"provider {side.settings.name}: {side.sick or 'its health probe works again'}")
        # apart, so that the probes of many providers, or of many routers, are not one burst
        await sleep(interval_s * (0.9 + 0.2 * router.draw()))


async def once(router: Router, side: Side) -> str:
    """Why it is not to be asked; empty when it is well."""
    settings = side.settings
    model, timeout_s = settings.models[0], float(settings.health_check.timeout)
    request = ChatRequest(model=model, messages=QUESTION, params={"max_tokens": 1}, caller=PROBER)
    try:
        async with asyncio.timeout(timeout_s):
            reply = await side.adapter.complete(request, model, timeout_s=timeout_s)
    except TimeoutError:
        return f"its health probe had no answer within {timeout_s:g} s"
    except ProviderError as exc:
        return f"its health probe failed: {exc.message}" if exc.kind in COUNTED | OPENS else ""
    except Exception as exc:  # an adapter promises ProviderError; whatever else it is, this provider does not work
        return f"its health probe failed: {type(exc).__name__}: {exc}"
    _book(router, side, model, reply.usage, reply.cost_usd)
    return ""


def _book(router: Router, side: Side, model: str, usage: Usage, stated: float | None) -> None:
    if router.ledger is None or side.settings.type == "replay":
        return
    now_ns = router.time_ns()
    usd = stated if stated is not None else router.costs.actual(side.settings.name, model, usage, now_ns)
    router.ledger.book(
        Entry(
            time_ns=now_ns, caller=PROBER, provider=side.settings.name, model=model, tokens_in=usage.tokens_in or 0,
            tokens_out=usage.tokens_out or 0, nano=None if usd is None else to_nano(usd),
        )
    )  # fmt: skip
