"""A broker that fails on purpose: wraps any Broker and injects what real ones do under stress.

    broker = FaultyBroker(await mist.connect("memory:"), Script({"append": [None, Fault(after=Ambiguous("lost reply"))]}))

A plan decides, per call of an operation (`append`, `read`, `fetch`, `ack`, `nak`, `term`, `extend`, `info`, `save`,
`load`), which Fault it gets. `Script` is a list per operation, `Dice` is seeded chance. What is injected:
- `before`: the error, and nothing was done (Unavailable; or Ambiguous for a request that never arrived),
- `after`: the call was done, then the error (Ambiguous for a reply that was lost),
- `stored`: of an append, only this many messages, then PartialAppend whose cause is `before`,
- `gate`: the call waits for this event first (to hold an append in flight, or a handler's ack),
- `turns`: the call first yields to the loop this many times (reordering without clocks).

Does not break the contract in ways brokers must not: records are never altered, reordered or lost by it.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol, TypeVar

from msgspec import Struct

from mist.broker.base import (
    ALL,
    BYTES_MAX,
    Broker,
    Checkpoint,
    Checkpoints,
    Consumer,
    ConsumerConfig,
    ConsumerInfo,
    Delivery,
    Message,
    Page,
    Pending,
    Stream,
    StreamConfig,
    StreamInfo,
    Verification,
)
from mist.errors import Ambiguous, MistError, PartialAppend, Unavailable

T = TypeVar("T")


class Fault(Struct, frozen=True, kw_only=True):
    """What happens to one call; see the module."""

    before: MistError | None = None
    after: MistError | None = None
    stored: int | None = None
    gate: asyncio.Event | None = None
    turns: int = 0


class Plan(Protocol):
    def __call__(self, operation: str, /) -> Fault | None: ...


class Script:
    """The n-th call of an operation gets the n-th fault of its list; past the end nothing fails."""

    def __init__(self, faults: Mapping[str, Sequence[Fault | None]]) -> None:
        self._left = {operation: list(listed) for operation, listed in faults.items()}

    def __call__(self, operation: str, /) -> Fault | None:
        left = self._left.get(operation)
        return left.pop(0) if left else None


class Dice:
    """Faults by chance, the same for the same seed. `rates` is the chance per operation that a call gets one."""

    def __init__(self, seed: int, rates: Mapping[str, float], *, turns_max: int = 3) -> None:
        self._random = random.Random(seed)
        self._rates = dict(rates)
        self._turns_max = turns_max

    def __call__(self, operation: str, /) -> Fault | None:
        chance = self._random
        turns = chance.randint(0, self._turns_max)
        if chance.random() >= self._rates.get(operation, 0.0):
            return Fault(turns=turns)
        kinds = ["away", "lost_request", "lost_reply", *(["partial"] if operation == "append" else [])]
        if operation in ("read", "info", "fetch", "load", "extend"):
            kinds = ["away"]
        kind = chance.choice(kinds)
        if kind == "lost_request":
            return Fault(turns=turns, before=Ambiguous("injected: the request was lost"))
        if kind == "lost_reply":
            return Fault(turns=turns, after=Ambiguous("injected: the reply was lost"))
        if kind == "partial":
            return Fault(turns=turns, stored=chance.randint(0, 5), before=Unavailable("injected: cut short"))
        return Fault(turns=turns, before=Unavailable("injected: away"))


class FaultyBroker(Broker):
    """`inner` with `plan` in front of it. `calls` counts operations; `appended` is the size of every append tried."""

    def __init__(self, inner: Broker, plan: Plan) -> None:
        self.inner = inner
        self.plan = plan
        self.url = inner.url
        self.backend = inner.backend
        self.capabilities = inner.capabilities
        self.calls: Counter[str] = Counter()
        self.appended: list[int] = []
        self._checkpoints = FaultyCheckpoints(self)

    async def pass_through(self, operation: str, call: Callable[[], Awaitable[T]]) -> T:
        """One call under the plan; what a partial append needs is done by the stream."""
        self.calls[operation] += 1
        fault = self.plan(operation)
        if fault is None:
            return await call()
        await self.delay(fault)
        if fault.before is not None:
            raise fault.before
        result = await call()
        if fault.after is not None:
            raise fault.after
        return result

    async def delay(self, fault: Fault) -> None:
        for _ in range(fault.turns):
            await asyncio.sleep(0)
        if fault.gate is not None:
            await fault.gate.wait()

    async def open(self, name: str, *, create: bool = True, config: StreamConfig | None = None) -> FaultyStream:
        return FaultyStream(self, await self.inner.open(name, create=create, config=config))

    async def streams(self) -> list[str]:
        return await self.inner.streams()

    async def delete(self, name: str) -> None:
        await self.inner.delete(name)

    async def ping(self) -> float:
        return await self.inner.ping()

    @property
    def checkpoints(self) -> FaultyCheckpoints:
        return self._checkpoints

    async def aclose(self) -> None:
        await self.inner.aclose()


class FaultyStream(Stream):
    def __init__(self, broker: FaultyBroker, inner: Stream) -> None:
        self.broker = broker
        self.inner = inner
        self.name = inner.name
        self.incarnation = inner.incarnation
        self.size_bytes_max = inner.size_bytes_max

    async def append(self, messages: Sequence[Message], *, expected_last: int | None = None) -> list[int]:
        self.broker.calls["append"] += 1
        self.broker.appended.append(len(messages))
        fault = self.broker.plan("append")
        if fault is None:
            return await self.inner.append(messages, expected_last=expected_last)
        await self.broker.delay(fault)
        if fault.stored is not None and fault.stored < len(messages):
            sequences = await self.inner.append(messages[: fault.stored], expected_last=expected_last)
            raise PartialAppend(sequences, total=len(messages), stream=self.name) from fault.before
        if fault.before is not None and fault.stored is None:
            raise fault.before
        sequences = await self.inner.append(messages, expected_last=expected_last)
        if fault.after is not None:
            raise fault.after
        return sequences

    async def read(
        self,
        *,
        after: int = 0,
        subjects: Sequence[str] = ALL,
        limit: int = 256,
        bytes_max: int = BYTES_MAX,
        wait_s: float = 0.0,
    ) -> Page:
        return await self.broker.pass_through(
            "read",
            lambda: self.inner.read(after=after, subjects=subjects, limit=limit, bytes_max=bytes_max, wait_s=wait_s),
        )

    async def info(self) -> StreamInfo:
        return await self.broker.pass_through("info", self.inner.info)

    async def locate(self, time_ns: int) -> int:
        return await self.inner.locate(time_ns)

    async def trim(self, *, before: int) -> int:
        return await self.inner.trim(before=before)

    async def erase(self, sequences: Sequence[int]) -> int:
        return await self.broker.pass_through("erase", lambda: self.inner.erase(sequences))

    async def verify(self) -> Verification:
        return await self.inner.verify()

    async def consumer(self, name: str, config: ConsumerConfig | None = None, *, create: bool = True) -> FaultyConsumer:
        return FaultyConsumer(self.broker, await self.inner.consumer(name, config, create=create))

    async def consumers(self) -> list[str]:
        return await self.inner.consumers()


class FaultyConsumer(Consumer):
    def __init__(self, broker: FaultyBroker, inner: Consumer) -> None:
        self.broker = broker
        self.inner = inner
        self.name = inner.name
        self.stream = inner.stream
        self.config = inner.config

    async def fetch(self, *, limit: int = 256, bytes_max: int = BYTES_MAX, wait_s: float = 0.0) -> list[Delivery]:
        return await self.broker.pass_through(
            "fetch", lambda: self.inner.fetch(limit=limit, bytes_max=bytes_max, wait_s=wait_s)
        )

    async def ack(self, deliveries: Sequence[Delivery]) -> int:
        return await self.broker.pass_through("ack", lambda: self.inner.ack(deliveries))

    async def nak(self, deliveries: Sequence[Delivery], *, delay_s: float = 0.0) -> int:
        return await self.broker.pass_through("nak", lambda: self.inner.nak(deliveries, delay_s=delay_s))

    async def term(self, deliveries: Sequence[Delivery], *, reason: str = "") -> int:
        return await self.broker.pass_through("term", lambda: self.inner.term(deliveries, reason=reason))

    async def extend(self, deliveries: Sequence[Delivery]) -> int:
        return await self.broker.pass_through("extend", lambda: self.inner.extend(deliveries))

    async def info(self) -> ConsumerInfo:
        return await self.inner.info()

    async def pending(self, *, limit: int = 1000) -> list[Pending]:
        return await self.inner.pending(limit=limit)

    async def seek(self, after: int) -> None:
        await self.inner.seek(after)

    async def delete(self) -> None:
        await self.inner.delete()


class FaultyCheckpoints(Checkpoints):
    def __init__(self, broker: FaultyBroker) -> None:
        self.broker = broker

    async def save(self, checkpoint: Checkpoint, *, force: bool = False) -> Checkpoint:
        inner = self.broker.inner.checkpoints
        return await self.broker.pass_through("save", lambda: inner.save(checkpoint, force=force))

    async def load(self, stream: str, name: str) -> Checkpoint | None:
        return await self.broker.pass_through("load", lambda: self.broker.inner.checkpoints.load(stream, name))

    async def delete(self, stream: str, name: str) -> bool:
        return await self.broker.inner.checkpoints.delete(stream, name)

    async def list(self, stream: str = "") -> list[Checkpoint]:
        return await self.broker.inner.checkpoints.list(stream)
