"""A part of a suite, as a suite of its own: by tags or by sample ids. Its digest differs from the whole suite's, as do its runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from msgspec.structs import replace

from mist.errors import InvalidArgument
from mist.tools.matchspec.suite import Harness, ModelSpec, Recorded, Sample, Suite, suite_of


def by_tags(suite: Suite, tags: Collection[str]) -> Suite | None:
    """The whole suite where it has one of the tags itself, else its samples that have one; None where none has."""
    if not tags or set(tags) & set(suite.tags):
        return suite
    return _kept(suite, lambda sample: bool(set(tags) & set(sample.tags)))


def by_ids(suite: Suite, ids: Collection[str]) -> Suite | None:
    """Its samples with these ids (the seed's `tasks`); all where no id is given, None where none is there."""
    return _kept(suite, lambda sample: sample.id in ids) if ids else suite


def _kept(suite: Suite, wanted: Callable[[Sample], bool]) -> Suite | None:
    harnesses = []
    for h in suite.harnesses:
        samples = [sample for sample in h.samples if wanted(sample)]
        if samples:
            harnesses.append(replace(h, samples=samples, model=_answers(h, samples)))
    if not harnesses:
        return None
    return suite_of(
        suite.name, harnesses, where=suite.name, gate=suite.gate, description=suite.description, tags=suite.tags,
        seed=suite.seed,
    )  # fmt: skip


def _answers(harness: Harness, samples: Sequence[Sample]) -> ModelSpec:
    model = harness.model
    if not isinstance(model, Recorded) or model.answers is None:
        return model
    return replace(model, answers={s.id: model.answers[s.id] for s in samples if s.id in model.answers})


def split(text: str) -> list[str]:
    """The parts of a comma-separated option. Raises InvalidArgument for an empty one among them."""
    parts = [part.strip() for part in text.split(",")] if text else []
    if not all(parts):
        raise InvalidArgument(f"{text!r} has an empty part")
    return parts
