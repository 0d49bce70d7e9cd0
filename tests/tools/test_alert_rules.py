"""Alert rules: what is read, and what is refused, with file, rule and key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mist.errors import InvalidArgument, NotFound
from mist.tools.tokentrace.alerts.measure import METRICS, read
from mist.tools.tokentrace.alerts.rules import Filter, load_rules, rules_of
from tests.tools.alerting import figures, rule, summary

FULL = """
[[tokentrace.alerts]]
name = "slow answers"
metric = "latency_p95"
op = "gte"
threshold = { warning = 2000, critical = 5000 }
window = "10m"
every = "30s"
for = "2m"
cooldown = "1h30m"
min_samples = 20
margin = "10%"
no_data = "keep"
group_by = ["model", "tenant"]
filter = { operation = "chat", attrs = { stage = "prod" } }
silence_until = 2026-01-31T12:00:00Z
delivery = { url = "https://hook.test/x", headers_env = { Authorization = "TOKEN" }, secret_env = "SECRET", timeout = "2s" }
"""


def test_every_key_is_read(tmp_path: Path) -> None:
    """The whole of one rule."""
    path = tmp_path / "mist.toml"
    path.write_text('url = "log:x"\n' + FULL)
    (one,) = load_rules(path, env={"TOKEN": "Bearer t", "SECRET": "s"})
    assert one.name == "slow answers"
    assert (one.metric, one.op, one.thresholds) == ("latency_p95", ">=", {"warning": 2000.0, "critical": 5000.0})
    assert (one.window_s, one.every_s, one.for_s, one.cooldown_s) == (600, 30, 120, 5400)
    assert (one.min_samples, one.recover, one.no_data, one.group_by) == (20, 1800, "keep", ("model", "tenant"))
    assert one.filter == Filter(operation="chat", attrs={"stage": "prod"})
    assert one.silence_until_ns == 1_769_860_800_000_000_000
    (target,) = one.targets
    assert target.headers_env == {"Authorization": "TOKEN"}
    assert target.timeout_s == 2
    assert "Bearer" not in repr(one)


def test_the_seeds_rules_are_read() -> None:
    """`[[alert_rules]]` with its four keys: named by what they say, warning, five minutes of cooldown."""
    tables = [
        {"metric": m, "op": ">", "threshold": 0.5, "level": "critical"}
        for m in ("error_rate", "latency_p50", "latency_p99", "latency_avg", "total_cost_usd")
    ]
    found = rules_of({"alert_rules": tables}, "seed.toml")
    assert [r.name for r in found] == [f"{t['metric']} > 0.5" for t in tables]
    assert {r.cooldown_s for r in found} == {300}
    assert found[0].thresholds == {"critical": 0.5}
    (one,) = rules_of({"alert_cooldown": "10m", "alert_rules": tables[:1]}, "seed.toml")
    assert one.cooldown_s == 600


def test_what_is_not_said_has_a_default() -> None:
    """Window five minutes, a period of a tenth but 30 s at least, strict comparison, one sample."""
    one = rule(window=None, cooldown=None)
    assert (one.window_s, one.every_s, one.cooldown_s, one.for_s, one.min_samples) == (300, 30, 300, 0, 1)
    assert rule(window="1h").every_s == 360
    assert one.recover == 0.5
    assert not one.beyond(0.5, 0.5)
    assert rule(op="gte").beyond(0.5, 0.5)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"metric": "eror_rate"}, "metric: there is no 'eror_rate'.*did you mean 'error_rate'"),
    ({"metric": None}, "metric is required"),
    ({"op": "!="}, "op: '!=' is none"),
    ({"level": "info"}, "level: 'info' is none"),
    ({"threshold": {"warning": 0.1, "fatal": 0.2}}, "level: 'fatal' is none"),
    ({"threshold": {"warning": 0.5, "critical": 0.2}}, "critical = 0.2 is not beyond warning = 0.5 for >"),
    ({"op": "<", "threshold": {"warning": 0.2, "critical": 0.5}}, "not beyond warning = 0.2 for <"),
    ({"threshold": {"warning": 0.5}, "level": "critical"}, "level: the thresholds name their levels"),
    ({"threshold": None}, "threshold is required"),
    ({"threshold": {}}, "threshold is required"),
    ({"threshold": "high"}, "threshold: Expected"),
    ({"threshold": float("nan")}, "threshold"),
    ({"metric": "latency_p50", "threshold": float("inf")}, "not a number to compare with"),
    ({"threshold": 5}, "lies between 0 and 1.*0.05 is five per cent"),
    ({"thresholdd": 1}, "unknown key 'thresholdd'.*did you mean 'threshold'"),
    ({"filter": {"models": "x"}}, "filter: unknown key 'models'.*'model'"),
    ({"filter": {"attrs": {"n": 1}}}, "filter: attrs"),
    ({"filter": {"attrs": {f"a{n}": "" for n in range(11)}}}, r"11 attributes \(max 10\)"),
    ({"window": 300}, "window: 300 has no unit.*window_s = 300"),
    ({"window": "5 minutes"}, "window: .5 minutes. is no duration"),
    ({"window": "5m", "window_s": 300}, "window: window_s is given too"),
    ({"window": "30s"}, "window: 30 s is not between"),
    ({"window": "32d"}, "window: .* is not between"),
    ({"every": "2m"}, "every: 120 s is not between"),
    ({"every": "0s"}, "every: 0 s"),
    ({"cooldown_s": -1, "cooldown": None}, "cooldown_s: '-1.0' is not a duration"),
    ({"recover": 0.7}, "recover: 0.7 is beyond the threshold"),
    ({"op": "<", "recover": 0.2}, "recover: 0.2 is beyond"),
    ({"recover": 0.1, "margin": 0.1}, "margin: recover is given too"),
    ({"margin": "ten"}, "margin: 'ten'"),
    ({"margin": -1.0}, "margin: -1"),
    ({"margin": 0.6}, "recover: no metric comes back to -0.1"),
    ({"min_samples": -1}, "min_samples: -1 is negative"),
    ({"min_samples": 2, "min_spans": 2}, "min_spans: means min_samples"),
    ({"metric": "span_count", "min_samples": 3}, "min_samples: span_count is a count"),
    ({"metric": "error_count", "no_data": "alert"}, "no_data: error_count always has a value"),
    ({"no_data": "zero"}, "no_data: 'zero' is none"),
    ({"group_by": ["models"]}, "group_by: nothing is told apart by 'models'.*'model'"),
    ({"group_by": ["model", "model"]}, "group_by: a key is there twice"),
    ({"group_by": ["model"], "filter": {"model": "m"}}, "model is fixed by the filter"),
    ({"name": " "}, "name is not"),
    ({"name": ""}, "name is required"),
    ({"name": "x" * 101}, "name is not"),
    ({"delivery": {"url": "ftp://x"}}, "url: not an http"),
    ({"delivery": {"url": "http://u:geheim@"}}, r"url: not an http\(s\) URL"),
    ({"delivery": {}}, "either url or url_env"),
    ({"delivery": {"url_env": "GONE"}}, "url_env: the environment variable GONE is not set"),
    ({"delivery": {"url": "http://x", "secret_env": "GONE"}}, "secret_env: the environment variable GONE"),
    ({"delivery": {"url": "http://x", "headers_env": {"A": "GONE"}}}, "headers_env.A: .*GONE"),
    ({"delivery": {"url": "http://x", "headers": {"A": "b\r\nC: d"}}}, "'A' has no form in HTTP"),
    ({"delivery": {"url": "http://x", "type": "stdout"}}, "type: 'stdout' is not delivered"),
    ({"delivery": {"url": "http://x", "timeout": "2m"}}, "timeout: 120 s"),
    ({"delivery": [{"url": "http://x"}, {"url": "http://x"}]}, "two of them go to the same URL"),
    ({"delivery": [{"url": f"http://x/{n}"} for n in range(9)]}, r"9 of them \(max 8\)"),
]


@pytest.mark.parametrize(("keys", "message"), BAD, ids=lambda v: "" if isinstance(v, dict) else v[:40])
def test_what_cannot_work_is_refused_at_load(keys: dict[str, Any], message: str) -> None:
    """One error that names the file, the rule where it has a name, the key, and what to write instead."""
    with pytest.raises(InvalidArgument, match=message) as caught:
        rule(**keys)
    assert str(caught.value).startswith("mist.toml: ")
    assert "'r'" in str(caught.value) or "name" in keys
    assert "geheim" not in str(caught.value)


def test_two_rules_of_one_name_are_refused(tmp_path: Path) -> None:
    """The name is what state and silences belong to. Also over different tables."""
    table = {"name": "a", "metric": "error_rate", "threshold": 0.5}
    with pytest.raises(InvalidArgument, match="alert 'a': name: there are two"):
        rules_of({"tokentrace": {"alerts": [table]}, "alerts": [table]}, "f")
    with pytest.raises(InvalidArgument, match="max 200"):
        rules_of({"alerts": [{**table, "name": f"n{n}"} for n in range(201)]}, "f")
    with pytest.raises(InvalidArgument, match="is a list of tables"):
        rules_of({"alerts": {"name": "a"}}, "f")
    with pytest.raises(InvalidArgument, match="is a table"):
        rules_of({"alerts": ["a"]}, "f")
    empty = tmp_path / "rules.toml"
    empty.write_text("[[alert]]\n")
    with pytest.raises(InvalidArgument, match="there is no alert in it"):
        load_rules(empty)
    with pytest.raises(NotFound):
        load_rules(tmp_path / "none.toml")


def test_metrics_are_what_their_names_say() -> None:
    """Each metric against figures counted by hand."""
    cost = summary(known=2, total=0.5, p95=0.4)
    row = figures(
        spans=8, errors=2, timeouts=1, latency_ms=summary(known=4, total=400.0, p50=90.0, p95=200.0),
        tokens_in=summary(known=3, total=300.0), tokens_out=summary(known=2, total=30.0), cost_usd=cost,
        score=summary(known=1, total=0.7, p10=0.7),
    )  # fmt: skip
    expected = {
        "span_count": (8, 8), "error_count": (2, 8), "error_rate": (0.25, 8), "timeout_rate": (0.125, 8), "latency_avg": (100, 4),
        "latency_p50": (90, 4), "latency_p95": (200, 4), "tokens_in_total": (300, 3), "tokens_in_avg": (100, 3), "tokens_total": (330, 3),
        "total_cost_usd": (0.5, 2), "cost_per_call": (0.25, 2), "cost_p95": (0.4, 2), "quality_score": (0.7, 1), "quality_p10": (0.7, 1),
    }  # fmt: skip
    for name, (value, samples) in expected.items():
        share = METRICS[name].share
        (reading,) = read(rule(metric=name, threshold=0.5 if share else 10), [row])
        assert (reading.value, reading.samples) == (value, samples), name


def test_unknown_is_no_data_and_never_zero() -> None:
    """Without a known cost, or with fewer samples than asked for, there is no value. Only counts know about nothing."""
    spans = figures(spans=5)
    assert read(rule(metric="total_cost_usd"), [spans])[0].value is None
    assert read(rule(metric="error_rate", min_samples=6), [spans])[0].value is None
    assert read(rule(metric="error_rate", min_samples=5), [spans])[0].value == 0
    for name, metric in METRICS.items():
        (reading,) = read(rule(metric=name), [figures()])
        assert (reading.value is not None) == metric.counts
    assert read(rule(group_by=["model"]), []) == []
