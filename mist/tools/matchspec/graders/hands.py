"""Whom graders ask, handed in by the program that runs them: a judge, embeddings, traces. This tool knows none by itself."""

from __future__ import annotations

from asyncio import Lock
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from copy import copy
from typing import TypeVar

from msgspec import Struct, field

from mist.errors import InvalidArgument
from mist.protocol.payloads import TraceSpan
from mist.tools.matchspec.asking import Ask
from mist.tools.matchspec.graders.base import Base
from mist.tools.matchspec.grading import Grader

G = TypeVar("G", bound=Grader)

Embed = Callable[[str, list[str]], Awaitable[list[list[float]]]]
"""(model, texts) -> one vector per text."""
Trace = Callable[[str], Awaitable[Sequence[TraceSpan]]]
"""A trace's id -> its spans; none when it is not known (yet)."""


VERDICTS_MAX = 10_000


class Verdicts(dict[str, str]):
    """The last VERDICTS_MAX replies of judges, by the key of what was asked."""

    def __setitem__(self, key: str, reply: str) -> None:
        if key not in self and len(self) >= VERDICTS_MAX:
            del self[next(iter(self))]
        super().__setitem__(key, reply)


class Hands(Struct, frozen=True, kw_only=True):
    """`ask`: the id of a judge's question is made from what is asked, equal questions have equal ids, so that a recorded answer
    can be found by it; who asks over a stream has to look for that first, as a stream keeps one message of an id.
    `verdicts` keeps the judges' replies; a program that wants them for longer hands in its own. `asking`: one lock per
    question under way, so that it is asked once."""

    ask: Ask | None = None
    embed: Embed | None = None
    trace: Trace | None = None
    verdicts: MutableMapping[str, str] = field(default_factory=Verdicts)
    asking: dict[str, Lock] = {}


class Asker(Base, frozen=True, kw_only=True):
    """A grader that asks. Without hands every verdict is an error."""

    @property
    def hands(self) -> Hands:
        found: Hands = self.__dict__.get("hands_given", _NONE)
        return found

    def nobody(self, what: str) -> InvalidArgument:
        return self.wrong(f"nobody was handed in to ask for {what}")


_NONE = Hands()


def equip(graders: Sequence[G], hands: Hands) -> tuple[G, ...]:
    """The graders, those that ask with somebody to ask. Their settings, and so digests, stay the same."""
    return tuple(_equipped(g, hands) for g in graders)


def _equipped(grader: G, hands: Hands) -> G:
    if not isinstance(grader, Asker):
        return grader
    twin = copy(grader)
    twin.__dict__["hands_given"] = hands
    return twin
