"""Alert rules: what TOML says, as checked values.

    [[tokentrace.alerts]]
    name = "slow answers"
    metric = "latency_p95"
    op = ">"
    threshold = { warning = 2000, critical = 5000 }
    window = "5m"

Also read: the seed's `[[alert_rules]]` (metric, op, threshold, level; `alert_cooldown`), and `[[alerts]]` in a file of
its own. Promises: everything that cannot work is refused here, with the file, the rule and the key; a rule that was
loaded needs no further check. Secrets stay in the environment: a rule holds the variables' names only.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from mist.config import file_layer
from mist.errors import InvalidArgument
from mist.protocol.url import redact
from mist.quantities import Duration
from mist.tools.tokentrace.alerts.measure import ALIASES, METRICS, metric
from mist.tools.tokentrace.settings import TokenTraceSettings
from mist.tools.tokentrace.stats import GROUPS
from mist.tools.tokentrace.where import ATTRS_MAX, check_key

Level = Literal["warning", "critical"]
Op = Literal[">", ">=", "<", "<="]
NoData = Literal["ok", "keep", "alert"]
LEVELS: tuple[Level, ...] = ("warning", "critical")
"""From the mild one to the severe one."""
OPS: dict[str, Op] = {">": ">", ">=": ">=", "<": "<", "<=": "<=", "gt": ">", "gte": ">=", "lt": "<", "lte": "<="}

RULES_MAX = 200
NAME_CHARS_MAX = 100
TARGETS_MAX = 8
WINDOW_S = 300.0
WINDOW_S_MIN = 60.0
WINDOW_S_MAX = 31 * 86_400.0
EVERY_S_MIN = 30.0
"""The default period is a tenth of the window, but not below this; `every` may say less, down to one second."""
COOLDOWN_S = 300.0
TIMEOUT_S = 5.0


class Filter(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Spans that count; an empty field is any. `attrs` compares attributes as text."""

    tenant: str = ""
    operation: str = ""
    model: str = ""
    provider: str = ""
    attrs: dict[str, str] = {}


class Target(Struct, frozen=True, kw_only=True):
    """Where a webhook goes. Variables are looked up when it is sent."""

    url: str = ""
    url_env: str = ""
    headers: dict[str, str] = {}
    headers_env: dict[str, str] = {}
    """Header -> name of the environment variable that holds its value."""
    secret_env: str = ""
    timeout_s: float = TIMEOUT_S


class Rule(Struct, frozen=True, kw_only=True):
    """`thresholds` has one entry per level in use. `recover`: what the value has to come back to, for the mildest level."""

    name: str
    metric: str
    op: Op
    thresholds: dict[Level, float]
    recover: float
    window_s: float = WINDOW_S
    every_s: float = EVERY_S_MIN
    for_s: float = 0.0
    cooldown_s: float = COOLDOWN_S
    min_samples: int = 1
    filter: Filter = Filter()
    group_by: tuple[str, ...] = ()
    silence_until_ns: int = 0
    no_data: NoData = "ok"
    targets: tuple[Target, ...] = ()

    def beyond(self, value: float, limit: float) -> bool:
        match self.op:
            case ">":
                return value > limit
            case ">=":
                return value >= limit
            case "<":
                return value < limit
            case "<=":
                return value <= limit

    @property
    def mildest(self) -> Level:
        return "warning" if "warning" in self.thresholds else "critical"


def load_rules(path: Path, *, env: Mapping[str, str] | None = os.environ) -> tuple[Rule, ...]:
    """The rules of a TOML file. Raises InvalidArgument (with file, rule and key) and NotFound."""
    layer = file_layer(path)
    rules = rules_of(layer.values, layer.origin, env=env)
    if not rules:
        raise InvalidArgument(f"{path}: there is no alert in it", hint="[[tokentrace.alerts]] begins one")
    return rules


def rules_of(
    document: Mapping[str, Any], origin: str, *, env: Mapping[str, str] | None = os.environ
) -> tuple[Rule, ...]:
    """The rules of a TOML document that was read already; none is fine. `origin` names it in errors. `env` None = do not
    ask for the variables that the rules name."""
    ours = document.get("tokentrace", {})
    ours = ours if isinstance(ours, Mapping) else {}
    cooldown_s = COOLDOWN_S
    for table in (document, ours):
        if "alert_cooldown" in table:
            cooldown_s = _seconds(table["alert_cooldown"], f"{origin}: alert_cooldown")
    places: list[tuple[str, Any, bool]] = [
        ("tokentrace.alerts", ours.get("alerts", []), False),
        ("alerts", document.get("alerts", []), False),
        ("tokentrace.alert_rules", ours.get("alert_rules", []), True),
        ("alert_rules", document.get("alert_rules", []), True),
    ]
    out: dict[str, Rule] = {}
    for key, tables, seeds in places:
        if not isinstance(tables, Sequence) or isinstance(tables, str):
            raise InvalidArgument(f"{origin}: {key} is a list of tables", hint=f"[[{key}]]")
        for number, table in enumerate(tables, 1):
            rule = _rule(table, f"{origin}: {key} {number}", origin, cooldown_s, seeds, env)
            if rule.name in out:
                raise InvalidArgument(f"{origin}: alert {rule.name!r}: name: there are two of that name")
            out[rule.name] = rule
    if len(out) > RULES_MAX:
        raise InvalidArgument(f"{origin}: {len(out)} alerts (max {RULES_MAX})")
    return tuple(out.values())


def configured(
    settings: TokenTraceSettings, env: Mapping[str, str] | None = os.environ, *, origin: str = "mist.toml"
) -> tuple[Rule, ...]:
    """The rules of the settings and of the file they name. `env` None = only check what stands in the settings."""
    tables = {
        "alerts": settings.alerts,
        "alert_rules": settings.alert_rules,
        "alert_cooldown": float(settings.alert_cooldown),
    }
    rules = rules_of({"tokentrace": tables}, origin, env=env)
    if not settings.alerts_file or env is None:
        return rules
    more = load_rules(Path(settings.alerts_file), env=env)
    both = {rule.name for rule in rules} & {rule.name for rule in more}
    if both:
        raise InvalidArgument(f"{settings.alerts_file}: alert {min(both)!r}: name: {origin} has one of that name too")
    return (*rules, *more)


class _Table(Struct, forbid_unknown_fields=True, rename={"for_": "for"}):
    """The keys of one rule, as TOML gives them."""

    metric: str = ""
    op: str = ">"
    threshold: float | dict[str, float] | None = None
    name: str = ""
    level: str = ""
    window: str = ""
    window_s: float | None = None
    every: str = ""
    every_s: float | None = None
    for_: str = ""
    for_s: float | None = None
    cooldown: str = ""
    cooldown_s: float | None = None
    min_samples: int | None = None
    min_spans: int | None = None
    """The documents' word for min_samples."""
    filter: dict[str, Any] = {}
    group_by: list[str] = []
    recover: float | None = None
    margin: float | str | None = None
    silence_until: Any = None
    no_data: str = "ok"
    delivery: dict[str, Any] | list[dict[str, Any]] = []


class _Delivery(Struct, forbid_unknown_fields=True):
    type: str = "http"
    url: str = ""
    url_env: str = ""
    headers: dict[str, str] = {}
    headers_env: dict[str, str] = {}
    secret_env: str = ""
    timeout: str = ""
    timeout_s: float | None = None


def _rule(table: Any, place: str, origin: str, cooldown_s: float, seeds: bool, env: Mapping[str, str] | None) -> Rule:
    if not isinstance(table, Mapping):
        raise InvalidArgument(f"{place}: is a table")
    named = table.get("name")
    at = f"{origin}: alert {named[:NAME_CHARS_MAX]!r}" if isinstance(named, str) and named else place
    raw: _Table = _convert(table, _Table, at)
    if not raw.metric:
        raise InvalidArgument(f"{at}: metric is required")
    if raw.metric not in METRICS and raw.metric not in ALIASES:
        raise _unlike(f"{at}: metric: there is no {raw.metric[:60]!r}", raw.metric, [*METRICS, *ALIASES])
    known = metric(raw.metric)
    op = OPS.get(raw.op)
    if op is None:
        raise InvalidArgument(f"{at}: op: {raw.op[:20]!r} is none", hint="> >= < <= or gt gte lt lte")
    thresholds = _thresholds(raw, at)
    values = [thresholds[level] for level in LEVELS if level in thresholds]
    if len(values) == 2 and not (values[0] < values[1] if op in (">", ">=") else values[0] > values[1]):
        raise InvalidArgument(
            f"{at}: threshold: critical = {values[1]:g} is not beyond warning = {values[0]:g} for {op}"
        )
    if known.share and not all(0 <= v <= 1 for v in values):
        raise InvalidArgument(f"{at}: threshold: {raw.metric} lies between 0 and 1", hint="0.05 is five per cent")
    name = raw.name or (f"{raw.metric} {op} {values[-1]:g}" if seeds else "")
    if not name or len(name) > NAME_CHARS_MAX or not name.isprintable() or name != name.strip():
        what = "is required" if not name else f"is not 1 to {NAME_CHARS_MAX} printable characters"
        raise InvalidArgument(f"{at}: name {what}")
    window_s = _duration(raw, "window", at, WINDOW_S)
    if not WINDOW_S_MIN <= window_s <= WINDOW_S_MAX:
        raise InvalidArgument(f"{at}: window: {window_s:g} s is not between one minute and 31 days")
    every_s = _duration(raw, "every", at, max(EVERY_S_MIN, window_s / 10))
    if not 1 <= every_s <= window_s:
        raise InvalidArgument(f"{at}: every: {every_s:g} s is not between one second and the window")
    if raw.min_samples is not None and raw.min_spans is not None:
        raise InvalidArgument(f"{at}: min_spans: means min_samples, which is given too")
    asked = raw.min_samples if raw.min_samples is not None else raw.min_spans
    if known.counts and asked:
        raise InvalidArgument(f"{at}: min_samples: {raw.metric} is a count, and is known without samples")
    min_samples = 0 if known.counts else 1 if asked is None else asked
    if min_samples < 0:
        raise InvalidArgument(f"{at}: min_samples: {min_samples} is negative")
    if known.counts and raw.no_data != "ok":
        raise InvalidArgument(f"{at}: no_data: {raw.metric} always has a value")
    if raw.no_data not in ("ok", "keep", "alert"):
        raise InvalidArgument(f"{at}: no_data: {raw.no_data[:20]!r} is none", hint="ok, keep or alert")
    for key in raw.group_by:
        if key.startswith("attr."):
            _checked_key(key[5:], f"{at}: group_by")
        elif key not in GROUPS:
            raise _unlike(f"{at}: group_by: nothing is told apart by {key[:60]!r}", key, GROUPS)
        if raw.filter.get(key):
            raise InvalidArgument(f"{at}: group_by: {key} is fixed by the filter, so there is one group")
    if len(set(raw.group_by)) != len(raw.group_by):
        raise InvalidArgument(f"{at}: group_by: a key is there twice")
    chosen: Filter = _convert(raw.filter, Filter, f"{at}: filter")
    if len(chosen.attrs) > ATTRS_MAX:
        raise InvalidArgument(f"{at}: filter: {len(chosen.attrs)} attributes (max {ATTRS_MAX})")
    for key in chosen.attrs:
        _checked_key(key, f"{at}: filter: attrs")
    return Rule(
        name=name, metric=ALIASES.get(raw.metric, raw.metric), op=op, thresholds=thresholds,
        recover=_recover(raw, op, values[0], at), window_s=window_s, every_s=every_s,
        for_s=_duration(raw, "for", at, 0.0), cooldown_s=_duration(raw, "cooldown", at, cooldown_s),
        min_samples=max(min_samples, 0 if known.counts else 1),
        filter=chosen, group_by=tuple(raw.group_by),
        silence_until_ns=_moment(raw.silence_until, at), no_data=raw.no_data,  # type: ignore[arg-type]
        targets=_targets(raw.delivery, at, env),
    )  # fmt: skip


def _checked_key(key: str, where: str) -> None:
    try:
        check_key(key)
    except InvalidArgument as exc:
        raise InvalidArgument(f"{where}: {exc.message}", hint=exc.hint) from exc


def _thresholds(raw: _Table, at: str) -> dict[Level, float]:
    if raw.threshold is None:
        raise InvalidArgument(f"{at}: threshold is required")
    if isinstance(raw.threshold, dict):
        if raw.level:
            raise InvalidArgument(f"{at}: level: the thresholds name their levels already")
        given = raw.threshold
    else:
        given = {raw.level or "warning": raw.threshold}
    for level, value in given.items():
        if level not in LEVELS:
            raise InvalidArgument(f"{at}: level: {level[:20]!r} is none", hint="warning or critical")
        if not math.isfinite(value):
            raise InvalidArgument(f"{at}: threshold: {value} is not a number to compare with")
    if not given:
        raise InvalidArgument(f"{at}: threshold is required")
    return {level: float(given[level]) for level in LEVELS if level in given}


def _recover(raw: _Table, op: Op, mildest: float, at: str) -> float:
    """The value to come back to: said, or the mildest threshold less a margin."""
    if raw.recover is not None and raw.margin is not None:
        raise InvalidArgument(f"{at}: margin: recover is given too")
    recover = mildest if raw.recover is None else raw.recover
    if raw.margin is not None:
        margin = raw.margin
        if isinstance(margin, str):
            number = margin.removesuffix("%")
            try:
                share = float(number)
            except ValueError:
                share = math.nan
            if number == margin or not 0 <= share < 100:
                raise InvalidArgument(f"{at}: margin: {margin[:20]!r} is not a number or a percentage below 100%")
            margin = abs(mildest) * share / 100
        if not (margin >= 0 and math.isfinite(margin)):
            raise InvalidArgument(f"{at}: margin: {margin} is not a number from 0")
        recover = mildest - margin if op in (">", ">=") else mildest + margin
    if not math.isfinite(recover) or (recover > mildest if op in (">", ">=") else recover < mildest):
        raise InvalidArgument(f"{at}: recover: {recover:g} is beyond the threshold {mildest:g} itself for {op}")
    if op in (">", ">=") and recover < 0 <= mildest:
        raise InvalidArgument(f"{at}: recover: no metric comes back to {recover:g}: all are 0 or more")
    return recover


def _duration(raw: Struct, key: str, at: str, default: float) -> float:
    text: str = getattr(raw, key if key != "for" else "for_")
    seconds: float | None = getattr(raw, f"{key}_s")
    if text and seconds is not None:
        raise InvalidArgument(f"{at}: {key}: {key}_s is given too")
    if text:
        return _seconds(text, f"{at}: {key}")
    return default if seconds is None else _seconds(seconds, f"{at}: {key}_s")


def _seconds(value: Any, where: str) -> float:
    """A text with its unit, or a number of seconds (the caller says that the key's name holds the unit)."""
    if isinstance(value, str):
        try:
            return float(Duration(value))
        except InvalidArgument as exc:
            raise InvalidArgument(f"{where}: {exc.message}", hint=exc.hint) from exc
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e9:
        return float(value)
    raise InvalidArgument(f"{where}: {str(value)[:20]!r} is not a duration", hint='for example "5m" or "1h30m"')


def _moment(value: Any, at: str) -> int:
    if value is None:
        return 0
    if not isinstance(value, date):
        raise InvalidArgument(f"{at}: silence_until: not a time of TOML", hint="silence_until = 2026-01-31T12:00:00Z")
    moment = value if isinstance(value, datetime) else datetime(value.year, value.month, value.day, tzinfo=UTC)
    return round(moment.replace(tzinfo=moment.tzinfo or UTC).timestamp()) * 1_000_000_000


def _targets(
    given: dict[str, Any] | list[dict[str, Any]], at: str, env: Mapping[str, str] | None
) -> tuple[Target, ...]:
    tables = [given] if isinstance(given, dict) else given
    if len(tables) > TARGETS_MAX:
        raise InvalidArgument(f"{at}: delivery: {len(tables)} of them (max {TARGETS_MAX})")
    targets = tuple(_target(table, f"{at}: delivery", env) for table in tables)
    if len({(t.url, t.url_env) for t in targets}) != len(targets):
        raise InvalidArgument(f"{at}: delivery: two of them go to the same URL")
    return targets


def _target(table: dict[str, Any], at: str, env: Mapping[str, str] | None) -> Target:
    raw: _Delivery = _convert(table, _Delivery, at)
    if raw.type != "http":
        raise InvalidArgument(f"{at}: type: {raw.type[:20]!r} is not delivered", hint="http; the stream has them all")
    if bool(raw.url) == bool(raw.url_env):
        raise InvalidArgument(f"{at}: url: either url or url_env says where to")
    variables = [("url_env", raw.url_env), ("secret_env", raw.secret_env)]
    variables += [(f"headers_env.{key}", value) for key, value in raw.headers_env.items()]
    named = {variable for key, variable in variables if variable or key.startswith("headers_env")}
    if env is None:
        env = dict.fromkeys(named, "http://unknown")
    for key, variable in variables:
        if variable in named and not env.get(variable):
            raise InvalidArgument(f"{at}: {key}: the environment variable {variable[:60]} is not set")
    check_url(raw.url or env[raw.url_env], f"{at}: {'url' if raw.url else 'url_env'}")
    both = {k.lower() for k in raw.headers} & {k.lower() for k in raw.headers_env}
    if both:
        raise InvalidArgument(f"{at}: headers: {sorted(both)[0]!r} is in headers_env too")
    pairs = [*raw.headers.items(), *((key, env[variable]) for key, variable in raw.headers_env.items())]
    for key, value in pairs:
        if not key.replace("-", "").isalnum() or not key.isascii() or not value.isascii() or not value.isprintable():
            raise InvalidArgument(f"{at}: headers: {key[:40]!r} has no form in HTTP")
    timeout_s = _duration(raw, "timeout", at, TIMEOUT_S)
    if not 0 < timeout_s <= 60:
        raise InvalidArgument(f"{at}: timeout: {timeout_s:g} s is not above 0 and up to a minute")
    return Target(
        url=raw.url, url_env=raw.url_env, headers=raw.headers, headers_env=raw.headers_env,
        secret_env=raw.secret_env, timeout_s=timeout_s,
    )  # fmt: skip


def check_url(url: str, where: str) -> None:
    """Refuse what is not an http(s) URL with a host. The message shows no secrets."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1) and url.isprintable()
    except ValueError:
        good = False
    if not good or " " in url:
        raise InvalidArgument(f"{where}: not an http(s) URL: {redact(url)[:80]!r}")


def _convert(table: Any, into: type[Any], at: str) -> Any:
    known = [f.encode_name for f in msgspec.structs.fields(into)]
    for key in table:
        if key not in known:
            raise _unlike(f"{at}: unknown key {key[:60]!r}", key, known)
    for key in ("window", "every", "for", "cooldown", "timeout"):
        if key in known and isinstance(table.get(key), int | float):
            raise InvalidArgument(f"{at}: {key}: {table[key]} has no unit", hint=f'{key} = "5m", or {key}_s = 300')
    try:
        return msgspec.convert(dict(table), into)
    except msgspec.ValidationError as exc:
        text, _, path = str(exc).partition(" - at ")
        key = path.strip("`").removeprefix("$.")
        raise InvalidArgument(f"{at}: {key}: {text}" if key else f"{at}: {text}") from exc


def _unlike(message: str, word: str, known: Sequence[str]) -> InvalidArgument:
    near = get_close_matches(word, known, n=1)
    return InvalidArgument(
        message, hint=f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(known))}"
    )
