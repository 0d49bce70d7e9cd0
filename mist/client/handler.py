"""The one shape of a tool: envelopes in, envelopes out.

    async def answer(request: Envelope) -> list[Envelope]: ...

    echo = Handler("echo", answer, accepts=("infer.request",))
    replies = await echo(envelope)                      # embedded
    await serve(echo, "log:./data?stream=infer&consumer=echo", out="infer-out")

`serve` (see serving.py) runs it over a broker's consumer, `stdio:`, `file:` and `http:`; the handler does not know which.

Promises: an output carries the request's tenant, its trace context (unless the handler set another), `causation_id` = the
request's id and `correlation_id` = the request's, or its id where it has none. The id of an output is made from the
handler's name, the request and the output's place among the outputs, so that handling a request again makes the same
ids, and a stream that stores both times keeps one. `health.ping` is answered with `health.pong`, without the handler.
A type that is not accepted is InvalidArgument. Whatever a handler raises that is not in mist.errors becomes Internal,
with the original as its cause.

A handler that must leave nobody without an answer has a `last_word`: the outputs of a request that becomes a dead letter.
They are stored before the letter is, under ids of their own, so that the request's own outputs are new when the letter is
sent again and answered.

Does not: keep state, retry, or catch cancellation. A handler is called again for a request whose outputs were not stored.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence

import mist
from mist.errors import Internal, InvalidArgument, MistError
from mist.protocol.envelope import Envelope
from mist.protocol.payloads import HEALTH_PING, HEALTH_PONG, HealthPong

_log = logging.getLogger("mist.client.handler")

One = Callable[[Envelope], Awaitable[Iterable[Envelope] | None]]
"""One request to its outputs; None is none."""
Outcome = Iterable[Envelope] | MistError | None
Many = Callable[[list[Envelope]], Awaitable[Sequence[Outcome]]]
"""Requests to one outcome each, in order: outputs, or the error of that request alone. What it raises fails them all."""
LastWord = Callable[[Envelope, MistError], Iterable[Envelope]]
"""A request that nobody will handle again, and why, to its outputs."""


class Handler:
    """Give either `one` or `many`. `accepts` are the types it takes (none = all). `name` is the tool's: it is part of its
    outputs' ids, and what a pong says. `last_word`: see above."""

    def __init__(
        self,
        name: str,
        one: One | None = None,
        *,
        many: Many | None = None,
        accepts: Sequence[str] = (),
        last_word: LastWord | None = None,
        version: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if (one is None) == (many is None):
            raise InvalidArgument(f"handler {name}: give either one or many")
        if not name:
            raise InvalidArgument("a handler needs a name", hint="its outputs' ids are made from it")
        if isinstance(accepts, str):
            raise InvalidArgument(f"handler {name}: accepts={accepts!r} is one text", hint=f"use ({accepts!r},)")
        self.name = name
        self.accepts = tuple(accepts)
        self.version = version or mist.__version__
        self.batched = many is not None
        self.last_word = last_word
        self._one = one
        self._many = many
        self._clock = clock
        self._began = clock()

    async def __call__(self, request: Envelope) -> list[Envelope]:
        """The outputs of one request. Raises its error."""
        outcome = (await self.handle([request]))[0]
        if isinstance(outcome, MistError):
            raise outcome
        return outcome

    async def handle(self, requests: Sequence[Envelope]) -> list[list[Envelope] | MistError]:
        """For each request, in order, its outputs or its error. Raises nothing but CancelledError."""
        outcomes: list[list[Envelope] | MistError] = [[]] * len(requests)
        ours: list[int] = []
        for at, request in enumerate(requests):
            if request.type == HEALTH_PING:
                outcomes[at] = finish(self.name, request, [self._pong()])
            elif self.accepts and request.type not in self.accepts:
                expected = " or ".join(self.accepts)
                outcomes[at] = InvalidArgument(
                    f"expected type {expected}, got {request.type}", meta={"id": request.id, "type": request.type}
                )
            else:
                ours.append(at)
        if ours:
            asked = [requests[at] for at in ours]
            for at, outcome in zip(ours, await self._outcomes(asked), strict=True):
                outcomes[at] = self._finished(requests[at], outcome)
        return outcomes

    def last_words(self, request: Envelope, error: MistError) -> list[Envelope]:
        """What is stored of a request that becomes a dead letter for this error. Raises nothing."""
        if self.last_word is None or (self.accepts and request.type not in self.accepts):
            return []
        try:
            return finish(self.name, request, self.last_word(request, error), dead=True)
        except Exception:  # the request is lost to its handler already; its letter is not to be
            _log.exception("handler %s has no last word for envelope %s", self.name, request.id)
            return []

    async def _outcomes(self, requests: list[Envelope]) -> Sequence[Outcome]:
        if self._many is not None:
            try:
                outcomes = await self._many(requests)
                if len(outcomes) == len(requests):
                    return outcomes
                raise Internal(f"handler {self.name}: {len(outcomes)} outcomes for {len(requests)} requests")
            except Exception as exc:
                return [self._error(exc, requests[0])] * len(requests)
        if len(requests) == 1:
            return [await self._guarded(requests[0])]
        return await asyncio.gather(*[self._guarded(request) for request in requests])

    async def _guarded(self, request: Envelope) -> Outcome:
        assert self._one is not None  # noqa: S101 - one of the two, see __init__
        try:
            return await self._one(request)
        except Exception as exc:  # a handler may raise anything; whoever runs it decides what becomes of the request
            return self._error(exc, request)

    def _finished(self, request: Envelope, outcome: Outcome) -> list[Envelope] | MistError:
        if outcome is None or isinstance(outcome, MistError):
            return outcome or []
        try:
            return finish(self.name, request, outcome)
        except Exception as exc:  # a generator may raise as well
            return self._error(exc, request)

    def _error(self, exc: Exception, request: Envelope) -> MistError:
        if isinstance(exc, MistError):
            return exc
        _log.error("handler %s failed on envelope %s", self.name, request.id, exc_info=exc)
        error = Internal(f"handler {self.name} failed: {type(exc).__name__}: {exc}", meta={"id": request.id})
        error.__cause__ = exc
        return error

    def _pong(self) -> Envelope:
        pong = HealthPong(from_=self.name, version=self.version, uptime_s=int(self._clock() - self._began))
        return Envelope.new(HEALTH_PONG, pong, source=self.name)


def finish(name: str, request: Envelope, outputs: Iterable[Envelope], *, dead: bool = False) -> list[Envelope]:
    """The outputs with what they owe to the request (see above). `dead`: they are last words."""
    return [
        Envelope(
            version=out.version, id=output_id(name, request, ~at if dead else at), source=out.source, type=out.type,
            timestamp_ns=out.timestamp_ns, payload=out.payload, checksum=out.checksum,
            correlation_id=out.correlation_id or request.correlation_id or request.id, causation_id=request.id,
            traceparent=out.traceparent or request.traceparent, tenant=request.tenant or out.tenant,
        )
        for at, out in enumerate(outputs)
    ]  # fmt: skip


def output_id(name: str, request: Envelope, at: int) -> str:
    """32 hex digits, the same whenever this handler makes its output number `at` of this request; last words count down
    from -1."""
    key = f"{name}\0{request.source}\0{request.id}\0{at}".encode()
    return hashlib.blake2b(key, digest_size=16).hexdigest()
