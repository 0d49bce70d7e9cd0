"""The first record of a run: what it is a run of, so that going on with something else is refused, and says why."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence

import msgspec

import mist
from mist.broker.base import Message
from mist.protocol.codec import encode
from mist.protocol.envelope import Envelope
from mist.protocol.payloads import EVAL_RUN
from mist.tools.matchspec.asking import SOURCE
from mist.tools.matchspec.grading import describe
from mist.tools.matchspec.results import HarnessInfo, Manifest, Parent, run_id_of, run_subject
from mist.tools.matchspec.suite import Harness, Suite, model_settings


def manifest_for(
    suite: Suite,
    run: str,
    *,
    parent: Parent | None = None,
    baseline_run: str = "",
    infer_stream: str = "",
    infer_after: int = 0,
    tasks: Sequence[str] = (),
    tags: Mapping[str, str] | None = None,
) -> Manifest:
    return Manifest(
        suite=suite.name,
        tasks=list(tasks),
        tags=dict(tags or {}),
        baseline=bool(baseline_run),
        run=run,
        digest=suite.digest,
        digests=suite.digests,
        models=suite.models,
        samples=sum(len(h.samples) for h in suite.harnesses),
        total=suite.total,
        harnesses=[info_of(h) for h in suite.harnesses],
        gate=suite.gate,
        seed=suite.seed,
        versions={"mist": mist.__version__, "python": platform.python_version(), "msgspec": msgspec.__version__},
        parent=parent,
        baseline_run=baseline_run,
        infer_stream=infer_stream,
        infer_after=infer_after,
    )


def info_of(h: Harness) -> HarnessInfo:
    return HarnessInfo(
        name=h.name,
        model=h.label,
        samples=len(h.samples),
        epochs=h.epochs,
        reducer=h.reducer,
        pass_score=h.pass_score,
        settings=model_settings(h.model),
        graders=[describe(g) for g in h.graders],
        data_digest=h.data_digest,
    )


def manifest_message(manifest: Manifest) -> Message:
    """Its id is made from the run's name: begun twice, it is stored once."""
    env = Envelope.new(
        EVAL_RUN, manifest, source=SOURCE, id=run_id_of(EVAL_RUN, manifest.run), correlation_id=manifest.run
    )
    return Message(run_subject(manifest.run), encode(env), env.id)


def differences(manifest: Manifest, suite: Suite) -> list[str]:
    """What keeps this suite from being the one of the run, in words; empty: nothing does."""
    if manifest.digest == suite.digest:
        return []
    found: list[str] = []
    if manifest.suite != suite.name:
        found.append(f"the suite is called {suite.name}, not {manifest.suite}")
    was = {h.name: h for h in manifest.harnesses}
    now = {h.name: info_of(h) for h in suite.harnesses}
    found += [f"harness {name} is gone" for name in was if name not in now]
    found += [f"harness {name} is new" for name in now if name not in was]
    for name in [n for n in was if n in now]:
        a, b = was[name], now[name]
        if a.data_digest != b.data_digest:
            found.append(f"{name}: other data or recorded answers")
        if not _same(a.settings, b.settings) or a.model != b.model:
            found.append(f"{name}: other model settings ({_changed(a.settings, b.settings)})")
        if not _same(a.graders, b.graders):
            found.append(f"{name}: other graders")
        if (a.epochs, a.reducer, a.pass_score) != (b.epochs, b.reducer, b.pass_score):
            found.append(f"{name}: other repeats, reducer or pass_score")
    if manifest.seed != suite.seed:
        found.append(f"another seed ({manifest.seed}, now {suite.seed})")
    if manifest.gate.cluster != suite.gate.cluster:
        found.append(f"clusters by {suite.gate.cluster or 'nothing'}, not {manifest.gate.cluster or 'nothing'}")
    if manifest.digests.code != suite.digests.code:
        found.append("other code of a grader")
    if not found:
        found.append("other prompts")
    return found


def changed_parts(manifest: Manifest, suite: Suite) -> list[str]:
    """The parts of the digest that differ, by name."""
    return [n for n in suite.digests.__struct_fields__ if getattr(manifest.digests, n) != getattr(suite.digests, n)]


_canonical = msgspec.json.Encoder(order="deterministic").encode


def _same(a: object, b: object) -> bool:
    return _canonical(a) == _canonical(b)


def _changed(a: dict[str, object], b: dict[str, object]) -> str:
    keys = [k for k in {**a, **b} if not _same(a.get(k), b.get(k))]
    return ", ".join(keys) or "label"
