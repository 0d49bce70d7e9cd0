"""Harnesses and gates out of all the parts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mist.errors import InvalidArgument
from mist.tools.matchspec.positions import Table, nearest
from mist.tools.matchspec.reducers import reducer
from mist.tools.matchspec.settings import MatchSpecSettings
from mist.tools.matchspec.specs.graders import graders_of
from mist.tools.matchspec.specs.models import model_of
from mist.tools.matchspec.specs.reading import Reading
from mist.tools.matchspec.specs.samples import check_samples, samples_of
from mist.tools.matchspec.suite import CONCURRENCY_MAX, EPOCHS_MAX, Gate, Harness


def harness_settings(table: Table, settings: MatchSpecSettings, model_timeout: float = 0.0) -> dict[str, Any]:
    """How it is run, as arguments of Harness."""
    d = settings.defaults
    concurrency = table.integer("concurrency", d.concurrency, low=1, high=CONCURRENCY_MAX)
    timeout = table.number("timeout_seconds", model_timeout or d.timeout_seconds, above=0)
    epochs, reduce = table.integer("epochs", 1, low=1, high=EPOCHS_MAX), table.text("reducer", "mean")
    try:
        reducer(reduce, epochs)
    except InvalidArgument as exc:
        table.wrong(exc.message, exc.hint, key="reducer")
    return {
        "description": table.text("description"),
        "system": table.text("system"),
        "template": table.text("template"),
        "concurrency": settings.concurrency or concurrency,
        "timeout_s": settings.timeout_seconds or timeout,
        "retries": table.integer("retries", d.retries, low=0, high=1000),
        "retry_delay_s": table.number("retry_delay_ms", d.retry_delay_ms, low=0) / 1000,
        "epochs": epochs,
        "reducer": reduce,
        "pass_score": table.number("pass_score", None, above=0, high=1),
    }


def harness_of(table: Table, reading: Reading, folder: Path) -> Harness | None:
    """A harness file, or a harness written into a suite. None when something was wrong with it."""
    before = reading.problems.seen
    name = table.text("name", required=True)
    samples, doc, at = samples_of(table, "dataset", reading, folder)
    graders = graders_of(table, reading, folder)
    inner = table.table("model")
    if inner is None:
        table.wrong("model is missing", "it says who answers: model: {type: echo}", at_key=True)
    model, timeout = model_of(inner, reading, folder) if inner is not None else (None, 0.0)
    settings = harness_settings(table, reading.settings, timeout)
    table.close()
    if doc is not None and isinstance(samples, list):
        check_samples(samples, graders, doc, at, reading.problems)
    if samples is None or model is None or reading.problems.seen > before:
        return None
    return Harness(name=name, samples=samples, model=model, graders=graders, **settings)


def gate_of(table: Table, settings: MatchSpecSettings, graders: Sequence[str]) -> Gate:
    """`thresholds`, `statistics` and `gate` of a suite."""
    s = settings.statistics
    said: dict[str, Any] = {
        "confidence": s.confidence_level,
        "use_lower_bound": s.use_lower_bound,
        "min_sample_size": s.min_sample_size,
        "min_sample_action": s.min_sample_action,
        "cluster": s.cluster,
    }
    thresholds = table.table("thresholds")
    if thresholds is not None:
        per: dict[str, float] = {}
        for key in thresholds.value:
            found = thresholds.number(key, None, low=0, high=1)
            if key == "overall":
                said |= {} if found is None else {"overall": found}
            elif graders and key not in graders:
                thresholds.wrong(
                    f"no grader is called {key!r}", nearest(key, ["overall", *graders]), key=key, at_key=True
                )
            elif found is not None:
                per[key] = found
        said["per_grader"] = per
    statistics = table.table("statistics")
    if statistics is not None:
        said["confidence"] = statistics.number("confidence_level", s.confidence_level, above=0, high=1 - 1e-9)
        said["use_lower_bound"] = statistics.boolean("use_lower_bound", s.use_lower_bound)
        said["min_sample_size"] = statistics.integer("min_sample_size", s.min_sample_size, low=0)
        said["min_sample_action"] = statistics.one_of("min_sample_action", ("warn", "fail"), s.min_sample_action)
        said["cluster"] = statistics.text("cluster", s.cluster)
        statistics.close()
    gate = table.table("gate")
    if gate is not None:
        said["metric"] = gate.one_of("metric", ("pass_rate", "mean_score"), "pass_rate")
        said["on_error"] = gate.one_of("on_error", ("fail", "exclude"), "fail")
        said["errors_max_share"] = gate.number("errors_max_share", 0.05, low=0, high=1)
        said["cost_usd_max"] = gate.number("cost_usd_max", None, low=0)
        said["latency_ms_max"] = gate.number("latency_ms_max", None, low=0)
        gate.close()
    return Gate(**said)
