"""Metrics of a process: counters, gauges, histograms in memory; as Prometheus or OpenMetrics text, and as the Go library's JSON.

    metrics = Metrics()
    sent = metrics.counter("mist_sent_total", "Envelopes sent.", ("scheme",))
    sent.add(3, scheme="file")

Promises: the order of labels does not matter; asking for a name again gives the same family, with another kind, labels or
bounds it is an error; a family keeps at most `series_max` label sets, what comes beyond goes to the series whose labels are
all "other", so that a label made from user input cannot fill the memory; no number can break a page: NaN and infinities
are never added to a counter or histogram, a gauge may hold one (`null` in JSON), and a `watch` that fails is left out.
What was diverted or refused is counted in `mist_metrics_dropped_total{metric, reason}`, reason `overflow`, `not_finite` or `failed`. Safe for threads;
each series of a page is consistent in itself.

The numbers need nothing; the text is written by prometheus-client (the extra `metrics`). Does not: push, or keep history.
"""

from __future__ import annotations

import contextlib
import math
import re
import threading
import time
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any, Literal, TypeVar

import msgspec

from mist.errors import InvalidArgument, Unsupported
from mist.kit.server import Answer, App, Scope, page, refusal

SERIES_MAX = 1000
LABEL_CHARS_MAX = 200
OTHER = "other"
DROPPED = "mist_metrics_dropped_total"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Bounds of a histogram of seconds."""

_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_LABEL = re.compile(r"(?!__)[a-zA-Z_][a-zA-Z0-9_]*")

Kind = Literal["counter", "gauge", "histogram"]
F = TypeVar("F", bound="_Family")
Labels = tuple[str, ...]
Watched = float | Mapping[Labels, float]


class HistogramValue(msgspec.Struct, frozen=True):
    """`counts` has one number per bound and a last one for what lies above all of them; they are not cumulative."""

    counts: tuple[int, ...]
    count: int
    sum: float
    min: float
    max: float


class _Family(ABC):
    """One name: its labels and series."""

    kind: Kind

    @abstractmethod
    def values(self) -> Mapping[Labels, Any]:
        """Label values -> number or HistogramValue, as of now."""

    def __init__(self, metrics: Metrics, name: str, help: str, labels: Labels) -> None:
        self.name = name
        self.help = help
        self.labels = labels
        self._metrics = metrics
        self._lock = threading.Lock()

    def describe(self) -> tuple[Any, ...]:
        return (self.kind, self.labels)

    def _key(self, labels: Mapping[str, str], series: Mapping[Labels, object]) -> Labels:
        """The series these labels belong to. Call it with the lock held."""
        if len(labels) != len(self.labels):
            raise InvalidArgument(f"{self.name} has the labels {self.labels}, not {tuple(labels)}")
        try:
            key = tuple([_clean(labels[name]) for name in self.labels])
        except KeyError as exc:
            raise InvalidArgument(f"{self.name} has the labels {self.labels}, not {tuple(labels)}") from exc
        if key not in series and len(series) >= self._metrics.series_max:
            self._metrics.drop(self.name, "overflow")
            return (OTHER,) * len(self.labels)
        return key


class _Numbers(_Family):
    def __init__(self, metrics: Metrics, name: str, help: str, labels: Labels) -> None:
        super().__init__(metrics, name, help, labels)
        self._values: dict[Labels, float] = {} if labels else {(): 0}

    def get(self, **labels: str) -> float:
        """One series; 0 when it is not there."""
        with self._lock:
            return self._values.get(tuple(_clean(labels[name]) for name in self.labels), 0)

    def remove(self, **labels: str) -> None:
        """Forget one series."""
        with self._lock:
            self._values.pop(tuple(_clean(labels[name]) for name in self.labels), None)

    def values(self) -> dict[Labels, float]:
        with self._lock:
            return dict(self._values)

    def _add(self, amount: float, labels: Mapping[str, str]) -> None:
        with self._lock:
            key = self._key(labels, self._values)
            self._values[key] = self._values.get(key, 0) + amount


class Counter(_Numbers):
    """A number that only grows."""

    kind: Kind = "counter"

    def add(self, amount: float = 1, /, **labels: str) -> None:
        """Raises InvalidArgument for a negative amount and for other labels than the family's."""
        if amount < 0:
            raise InvalidArgument(f"counter {self.name}: cannot add {amount}")
        if not math.isfinite(amount):
            self._metrics.drop(self.name, "not_finite")
            return
        self._add(amount, labels)


class Gauge(_Numbers):
    """A number that goes up and down."""

    kind: Kind = "gauge"

    def set(self, value: float, /, **labels: str) -> None:
        with self._lock:
            self._values[self._key(labels, self._values)] = value

    def add(self, amount: float = 1, /, **labels: str) -> None:
        self._add(amount, labels)


class Histogram(_Family):
    """How often which size: counts below bounds, sum, least and most."""

    kind: Kind = "histogram"

    def __init__(self, metrics: Metrics, name: str, help: str, labels: Labels, bounds: Sequence[float]) -> None:
        super().__init__(metrics, name, help, labels)
        self.bounds = tuple(bounds)
        # counts (one more than bounds), sum, min, max
        self._values: dict[Labels, tuple[list[int], list[float]]] = {} if labels else {(): self._new()}

    def describe(self) -> tuple[Any, ...]:
        return (self.kind, self.labels, self.bounds)

    def observe(self, value: float, /, **labels: str) -> None:
        """A value that is not finite is counted as dropped: it would make the sum NaN for ever."""
        if not math.isfinite(value):
            self._metrics.drop(self.name, "not_finite")
            return
        with self._lock:
            key = self._key(labels, self._values)
            found = self._values.get(key)
            if found is None:
                found = self._values[key] = self._new()
            counts, totals = found
            counts[bisect_left(self.bounds, value)] += 1
            totals[0] += value
            if value < totals[1]:
                totals[1] = value
            if value > totals[2]:
                totals[2] = value

    @contextlib.contextmanager
    def time(self, *, clock: Callable[[], float] = time.monotonic, **labels: str) -> Iterator[None]:
        """Observe the seconds a block takes, also when it raises."""
        began = clock()
        try:
            yield
        finally:
            self.observe(clock() - began, **labels)

    def remove(self, **labels: str) -> None:
        """Forget one series."""
        with self._lock:
            self._values.pop(tuple(_clean(labels[name]) for name in self.labels), None)

    def values(self) -> dict[Labels, HistogramValue]:
        with self._lock:
            found = [(key, tuple(counts), tuple(totals)) for key, (counts, totals) in self._values.items()]
        out: dict[Labels, HistogramValue] = {}
        for key, counts, (total, least, most) in found:
            count = sum(counts)
            out[key] = HistogramValue(counts, count, total, least if count else 0.0, most if count else 0.0)
        return out

    def _new(self) -> tuple[list[int], list[float]]:
        return [0] * (len(self.bounds) + 1), [0.0, math.inf, -math.inf]


class _Watch(_Family):
    """Numbers that are asked for when a page is written."""

    def __init__(
        self, metrics: Metrics, name: str, help: str, labels: Labels, kind: Kind, read: Callable[[], Watched]
    ) -> None:
        super().__init__(metrics, name, help, labels)
        self.kind = kind
        self._read = read

    def values(self) -> dict[Labels, float]:
        """Empty when it fails: a page does not break for one number."""
        try:
            found = self._read()
            values = dict(found) if isinstance(found, Mapping) else {(): found}
            cleaned = {tuple(_clean(text) for text in key): float(value) for key, value in values.items()}
            if any(len(key) != len(self.labels) for key in cleaned):
                raise InvalidArgument(f"{self.name} has the labels {self.labels}")
        except Exception:
            self._metrics.drop(self.name, "failed")
            return {}
        if len(cleaned) > self._metrics.series_max:
            self._metrics.drop(self.name, "overflow", len(cleaned) - self._metrics.series_max)
            cleaned = dict(list(cleaned.items())[: self._metrics.series_max])
        return cleaned


class Metrics:
    """The registry. `series_max` holds for each family."""

    def __init__(self, *, series_max: int = SERIES_MAX) -> None:
        self.series_max = series_max
        self._lock = threading.Lock()
        self._families: dict[str, _Family] = {}
        self._dropped: dict[Labels, float] = {}

    def counter(self, name: str, help: str = "", labels: Sequence[str] = ()) -> Counter:
        """`name` ends with `_total`."""
        return self._family(Counter(self, name, help, tuple(labels)))

    def gauge(self, name: str, help: str = "", labels: Sequence[str] = ()) -> Gauge:
        return self._family(Gauge(self, name, help, tuple(labels)))

    def histogram(
        self, name: str, help: str = "", labels: Sequence[str] = (), bounds: Sequence[float] = SECONDS
    ) -> Histogram:
        """`bounds` are upper ones, inclusive, growing and finite."""
        if list(bounds) != sorted(set(bounds)) or not all(math.isfinite(b) for b in bounds):
            raise InvalidArgument(f"{name}: bounds have to grow and be finite: {tuple(bounds)}")
        return self._family(Histogram(self, name, help, tuple(labels), bounds))

    def watch(
        self,
        name: str,
        help: str,
        read: Callable[[], Watched],
        *,
        labels: Sequence[str] = (),
        kind: Literal["counter", "gauge"] = "gauge",
    ) -> None:
        """A number kept elsewhere: `read()` gives it when a page is written, or a mapping from label values to numbers.
        Raises InvalidArgument for a name that is taken."""
        family = _Watch(self, name, help, tuple(labels), kind, read)
        if self._family(family) is not family:
            raise InvalidArgument(f"metric {name} is there already")

    def drop(self, metric: str, reason: str, amount: float = 1) -> None:
        """Count something that did not get its own series, or none at all."""
        with self._lock:
            self._dropped[metric, reason] = self._dropped.get((metric, reason), 0) + amount

    def get(self, name: str, /, **labels: str) -> float:
        """One number of a counter, gauge or watch; 0 when it is not there."""
        if name == DROPPED:
            return self._dropped.get((labels["metric"], labels["reason"]), 0)
        family = self._families.get(name)
        if not isinstance(family, _Numbers | _Watch):
            return 0
        return family.values().get(tuple(_clean(labels[n]) for n in family.labels), 0)

    def text(self, accept: str = "") -> tuple[bytes, str]:
        """The page and its content type: Prometheus text, or OpenMetrics where `accept` asks for it.

        Raises InvalidArgument with the install line when prometheus-client is not there.
        """
        exposition = _prometheus()
        try:
            encode, content_type = exposition.choose_encoder(accept)
        except (TypeError, ValueError):  # an Accept header that cannot be read
            encode, content_type = exposition.choose_encoder("")
        return encode(_Collector(self)), content_type

    def json(self) -> bytes:
        """The Go library's JSON: maps `counters`, `gauges`, `histograms`, empty ones left out; with a bucket `+Inf`."""
        out: dict[str, dict[str, Any]] = {"counters": {}, "gauges": {}, "histograms": {}}
        for family in self._sorted():
            for key, value in sorted(family.values().items()):
                flat = [text for pair in zip(family.labels, key, strict=True) for text in pair]
                entry: dict[str, Any] = {"name": family.name}
                if flat:
                    entry["labels"] = flat
                if isinstance(value, HistogramValue):
                    cumulative = _cumulative(value.counts)
                    bounds = [*map(go_float, family.bounds), "+Inf"]
                    entry |= {"count": value.count, "sum": value.sum, "min": value.min, "max": value.max}
                    entry["buckets"] = dict(zip(bounds, cumulative, strict=True))
                else:
                    entry["value"] = value  # NaN and infinities become null
                name = f"{family.name}{{{','.join(flat)}}}" if flat else family.name
                out[family.kind + "s"][name] = entry
        return msgspec.json.encode({kind: found for kind, found in out.items() if found}) + b"\n"

    def pages(self) -> dict[str, App]:
        """`/metrics` and `/metricsz`, for a `Site`."""

        async def text(scope: Scope) -> Answer:
            accept = b",".join(value for name, value in scope["headers"] if name.lower() == b"accept")
            try:
                body, content_type = self.text(accept.decode("latin-1"))
            except Unsupported as exc:
                return refusal(exc.http_status, exc)
            return Answer(200, body, content_type.encode())

        async def json(scope: Scope) -> Answer:
            return Answer(200, self.json())

        return {"/metrics": page(text), "/metricsz": page(json)}

    def _family(self, made: F) -> F:
        if not _NAME.fullmatch(made.name) or (made.kind == "counter") != made.name.endswith("_total"):
            raise InvalidArgument(
                f"{made.name!r} cannot name a {made.kind}", hint="counters end with _total, others do not"
            )
        if (
            any(not _LABEL.fullmatch(name) or name in ("le", "quantile") for name in made.labels)
            or made.name == DROPPED
        ):
            raise InvalidArgument(f"metric {made.name} with the labels {made.labels} cannot be")
        with self._lock:
            found = self._families.setdefault(made.name, made)
        if found.describe() != made.describe() or type(found) is not type(made):
            raise InvalidArgument(f"metric {made.name} is there already, as {found.describe()}")
        return found

    def _sorted(self) -> list[Any]:
        with self._lock:
            families: list[Any] = [self._families[name] for name in sorted(self._families)]
        return [
            *families,
            _Watch(
                self, DROPPED, "Diverted to `other`, refused or failed.", ("metric", "reason"), "counter", self._drops
            ),
        ]

    def _drops(self) -> Watched:
        with self._lock:
            return dict(self._dropped)


class _Collector:
    """What prometheus-client asks for its text."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        for family in self._metrics._sorted():
            about = (family.name, family.help or family.name)
            values = sorted(family.values().items())
            if family.kind == "histogram":
                bounds = [*map(_le, family.bounds), "+Inf"]
                histogram = HistogramMetricFamily(*about, labels=family.labels)
                for key, value in values:
                    buckets = list(zip(bounds, _cumulative(value.counts), strict=True))
                    histogram.add_metric(key, buckets, sum_value=value.sum)
                yield histogram
                continue
            made = (CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily)(
                *about, labels=family.labels
            )
            for key, value in values:
                made.add_metric(key, value)
            yield made


def _cumulative(counts: Sequence[int]) -> list[int]:
    out: list[int] = []
    total = 0
    for count in counts:
        total += count
        out.append(total)
    return out


def _clean(value: str) -> str:
    """A label value that can be written: text, not endless, with lone surrogates escaped."""
    text = value if type(value) is str else str(value)
    if len(text) > LABEL_CHARS_MAX:
        text = text[:LABEL_CHARS_MAX]
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def go_float(value: float) -> str:
    """A number as Go's `%g` prints it with the fewest digits: `2.5`, `1e+06`, `1.234567e+06`."""
    number = Decimal(repr(float(value))).normalize()
    sign, digits, _ = number.as_tuple()
    power = number.adjusted()
    if number == 0 or -4 <= power < 6:
        return f"{number:f}"
    mantissa = "".join(map(str, digits))
    return f"{'-' * sign}{mantissa[0]}{'.' * (len(mantissa) > 1)}{mantissa[1:]}e{power:+03d}"


def _le(bound: float) -> str:
    return repr(float(bound))


def _prometheus() -> Any:
    try:
        from prometheus_client import exposition
    except ImportError as exc:
        raise Unsupported(
            "metrics as text",
            "this installation, which has no prometheus-client,",
            hint="pip install 'mist-stack[metrics]'",
        ) from exc
    return exposition
