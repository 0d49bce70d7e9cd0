"""Production traffic as a suite: answers that lie in the stream `infer`, graded where nobody asked for a test.

Each `infer.response` and the `infer.request` it answers (by correlation) are one sample: the last message of the user is its
input, the content its recorded output, with the counts, cost, latency and trace id that the answer states. Graders and gate are
those of a suite, and so are expectations: a question whose text is the input of one of its samples has that one's; for others
only graders count that need none, and where all need one they are left out, and counted.

MatchSpec's own questions are no traffic. A response that says it failed is a sample without an answer: an error. Reads a part of
the stream once; up to `ANSWERS_MAX` answers are taken.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from typing import Any

from msgspec import Struct

from mist.broker.base import Stream
from mist.errors import InvalidArgument, MistError, NotFound
from mist.protocol.codec import decode
from mist.protocol.envelope import Envelope
from mist.protocol.payloads import INFER_REQUEST, INFER_RESPONSE
from mist.tools.matchspec.asking import SOURCE, Answer, read_answer
from mist.tools.matchspec.grading import Grader
from mist.tools.matchspec.results import PAGE
from mist.tools.matchspec.suite import Harness, Recorded, Sample, Suite, cluster_of, suite_of

ANSWERS_MAX = 100_000
OPEN_MAX = 100_000
"""Questions that wait for their answer while reading; the oldest are forgotten."""
_SUBJECTS = (INFER_REQUEST, f"{INFER_REQUEST}.>", INFER_RESPONSE, f"{INFER_RESPONSE}.>")


class Exchange(Struct, frozen=True):
    """A question and its answer; None: it failed. `sequence` is the answer's."""

    id: str
    input: str
    model: str
    answer: Answer | None
    sequence: int


class Traffic(Struct, frozen=True):
    """`last`: the position read up to. `unmatched`: answers whose question was not read; `full`: there is more."""

    exchanges: list[Exchange]
    last: int
    unmatched: int
    full: bool


async def read_traffic(
    stream: Stream,
    *,
    after: int,
    to: int | None = None,
    models: Collection[str] = (),
    limit: int = ANSWERS_MAX,
) -> Traffic:
    """The exchanges whose answer lies after `after` and up to `to` (None = the end as it is now); only of these models, where
    some are named. Of several answers to one question the first counts."""
    end = (await stream.info()).last if to is None else to
    asked: OrderedDict[str, str] = OrderedDict()
    own: set[str] = set()
    found: dict[str, Exchange] = {}
    unmatched, at = 0, after
    while at < end and len(found) < limit:
        page = await stream.read(after=at, subjects=_SUBJECTS, limit=PAGE)
        for record in page.records:
            if record.sequence > end or len(found) >= limit:
                break
            at = record.sequence
            env = _envelope(record.data)
            if env is None:
                continue
            if env.type == INFER_REQUEST:
                if env.source == SOURCE:
                    own.add(env.id)
                else:
                    asked[env.id] = _question(env)
                    while len(asked) > OPEN_MAX:
                        asked.popitem(last=False)
            elif env.correlation_id in asked and env.correlation_id not in found:
                exchange = _exchange(env, asked[env.correlation_id], record.sequence)
                if not models or exchange.model in models:
                    found[env.correlation_id] = exchange
            elif env.correlation_id not in own and env.correlation_id not in found:
                unmatched += 1
        else:
            at = max(at, min(page.scanned, end))
            if page.scanned >= page.last:
                break
    return Traffic(list(found.values()), at, unmatched, len(found) >= limit and at < end)


def _envelope(data: bytes) -> Envelope | None:
    try:
        env = decode(data)
    except MistError:
        return None
    return env if env.type in (INFER_REQUEST, INFER_RESPONSE) else None


class _Asked(Struct):
    messages: list[dict[str, Any]] | None = None


def _question(env: Envelope) -> str:
    """What the user said last, as text."""
    try:
        messages = env.decode(_Asked).messages or []
    except MistError:
        return ""
    for message in reversed(messages):
        if message.get("role") != "user":
            continue
        content = message.get("content")
        if isinstance(content, str):
            return content
        parts = content if isinstance(content, list) else []
        return "\n".join(p["text"] for p in parts if isinstance(p, dict) and isinstance(p.get("text"), str))
    return ""


class _Said(Struct):
    model: str = ""
    error: str = ""


def _exchange(env: Envelope, question: str, sequence: int) -> Exchange:
    answer: Answer | None = None
    said = _Said()
    try:
        said = env.decode(_Said)
        answer = None if said.error else read_answer(env)
    except MistError:
        answer = None  # one that cannot be read is none: the sample is an error
    return Exchange(env.correlation_id, question, said.model or "unknown", answer, sequence)


class Made(Struct, frozen=True):
    """`left_out`: exchanges without an expectation that every grader wants."""

    suite: Suite
    left_out: int


def suite_of_traffic(base: Suite, traffic: Traffic) -> Made:
    """The traffic under the base suite's graders and gate, one harness per model. Raises NotFound when nothing is left to
    judge: a gate over nothing would be green."""
    graders = _graders(base)
    free = tuple(g.name for g in graders if _needs_nothing(g))
    known = {s.input: s for h in base.harnesses for s in h.samples}
    samples: dict[str, list[Sample]] = {}
    answers: dict[str, dict[str, Answer]] = {}
    left_out = 0
    for e in traffic.exchanges:
        like = known.get(e.input)
        if like is None and not free:
            left_out += 1
            continue
        names = like.graders if like is not None else () if len(free) == len(graders) else free
        metadata = {"request_id": e.id, "trace_id": e.answer.trace_id if e.answer is not None else ""}
        expected, tags = (like.expected, like.tags) if like is not None else ("", ())
        if base.gate.cluster:  # questions that nobody knows stand for themselves
            metadata[base.gate.cluster] = (
                cluster_of(like, base.gate.cluster) if like is not None else f"request {e.id[-150:]}"
            )
        samples.setdefault(e.model, []).append(
            Sample(e.id, e.input, expected, graders=names, tags=tags, metadata=metadata)
        )
        if e.answer is not None:
            answers.setdefault(e.model, {})[e.id] = e.answer
    harnesses = [
        Harness(name=model, samples=found, model=Recorded(label=model, answers=answers[model]), graders=graders)
        for model, found in samples.items()
        if model in answers
    ]
    if not harnesses:
        what = f"{left_out} answers have no expectation, and every grader wants one" if left_out else "there are none"
        raise NotFound(
            f"no answers to judge: {what}", hint="graders such as regex, json_schema, latency or llm_judge need none"
        )
    suite = suite_of(
        f"{base.name}-traffic", harnesses, where=base.name, gate=base.gate, description=base.description, tags=base.tags
    )
    return Made(suite, left_out)


def _graders(base: Suite) -> tuple[Grader, ...]:
    found: dict[str, Grader] = {}
    for h in base.harnesses:
        for g in h.graders:
            found.setdefault(g.name, g)
    return tuple(found.values())


def _needs_nothing(grader: Grader) -> bool:
    try:
        grader.check("")
    except InvalidArgument:
        return False
    return True
