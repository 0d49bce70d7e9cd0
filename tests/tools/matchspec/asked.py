"""Somebody to ask, and suites that ask."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

from mist.errors import MistError
from mist.protocol.envelope import Envelope
from mist.protocol.payloads import INFER_RESPONSE
from mist.tools.matchspec.graders import grader
from mist.tools.matchspec.suite import Harness, Infer, Sample, Suite, suite_of


class Killed(BaseException):
    """The process is gone at this instruction."""


class Oracle:
    """Answers `n` with `n`, and `n` from `wrong_from` on with 0. Counts every question by its text."""

    def __init__(self, wrong_from: int = 10**9, *, tokens: int | None = 10, usd: float | None = 0.01) -> None:
        self.asked: Counter[str] = Counter()
        self.ids: list[str] = []
        self.wrong_from = wrong_from
        self.tokens = tokens
        self.usd = usd
        self.failing: dict[str, list[MistError]] = {}
        """Errors to raise first, by question."""

    @property
    def calls(self) -> int:
        return sum(self.asked.values())

    async def __call__(self, request: Envelope) -> Envelope:
        text = request.data()["messages"][-1]["content"]
        self.asked[text] += 1
        self.ids.append(request.id)
        await asyncio.sleep(0)
        if self.failing.get(text):
            raise self.failing[text].pop(0)
        content = text if int(text) < self.wrong_from else "0"
        payload: dict[str, Any] = {
            "model": "oracle", "provider": "test", "content": content, "tokens_in": self.tokens, "tokens_out": 0,
            "cost_usd": self.usd, "latency_ms": 3, "finish_reason": "stop",
        }  # fmt: skip
        return Envelope.new(INFER_RESPONSE, payload, source="oracle", correlation_id=request.id)


def asking(count: int = 20, **harness: Any) -> Suite:
    """`count` numbers to be given back."""
    samples = [Sample(f"s{i}", str(i), str(i)) for i in range(1, count + 1)]
    settings: dict[str, Any] = {
        "name": "h", "samples": samples, "model": Infer(model="oracle"), "graders": (grader({"type": "numeric"}),),
        "retry_delay_s": 0.0, **harness,
    }  # fmt: skip
    return suite_of("asking", [Harness(**settings)], where="test")
