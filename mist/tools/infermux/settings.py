"""The table `[infermux]` of mist.toml: values, their defaults and their limits. What each means is in
docs/reference/infermux-settings.md; reading the file is mist/config.py's, making providers of it is building.py's.

Promises: everything is checked when it is read; a setting that cannot be right is InvalidArgument and names its key. No
secret stands in the file: a key is `api_key_env = "VARIABLE"` (or `api_key = "${VARIABLE}"`), a caller's key is its SHA-256.
Without a provider there is one: `echo`. The keys of the documents' breaker table are read under their names too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from decimal import Decimal, InvalidOperation
from typing import ClassVar, Literal

from msgspec import Struct

from mist.errors import InvalidArgument
from mist.kit.breaker import BreakerPolicy
from mist.protocol.subject import check_stream
from mist.quantities import Duration, Size

ProviderType = Literal["openai", "anthropic", "echo", "replay", "command"]
StrategyName = Literal["priority", "round_robin", "weighted", "least_latency", "cost", "sticky"]
Capture = Literal["full", "metadata", "none"]
Capability = Literal["tools", "vision", "json"]
Period = Literal["day", "month", "total"]
Action = Literal["refuse", "alert", "model_override"]
AUTO = "auto"
NANO = 1_000_000_000
VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def _check(holds: bool, message: str, hint: str = "") -> None:
    if not holds:
        raise InvalidArgument(message, hint=hint)


def _check_name(name: str, at: str) -> None:
    _check(_NAME.fullmatch(name) is not None, f"{at} = {name[:80]!r} is not up to 64 letters, digits, `.`, `_`, `-`")


def _check_unique(names: Iterable[str], at: str) -> None:
    seen: set[str] = set()
    for name in names:
        _check(name not in seen, f"{at}: there are two {name!r}")
        seen.add(name)


class HealthCheckSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The table `health_check` of a provider: where it is written, the provider is probed."""

    interval: Duration = Duration("60s")
    timeout: Duration = Duration("10s")
    disabled: bool = False

    def __post_init__(self) -> None:
        for name in ("interval", "timeout"):
            _check(getattr(self, name) > 0, f"infermux.providers: health_check.{name} is not above 0")


class ProviderSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One provider. 0 is no limit; an empty `models` is "whatever it is asked for"."""

    name: str
    type: ProviderType
    base_url: str = ""
    api_key_env: str = ""
    api_key: str = ""
    """`${VARIABLE}`, never the key."""
    headers: dict[str, str] = {}
    """Sent with every request; values may hold `${VARIABLE}`."""
    models: tuple[str, ...] = ()
    aliases: dict[str, str] = {}
    """Another name -> one of its models."""
    weight: float = 1.0
    priority: int = 0
    """Lower ones are asked first, whatever the strategy: it decides among equals."""
    timeout: Duration = Duration("60s")
    connect_timeout: Duration = Duration("5s")
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    concurrency_max: int = 0
    drop_params: bool = False
    """Leave out the parameters that it has no name for, instead of refusing the question."""
    extra_params: tuple[str, ...] = ()
    """`openai`: parameters that this server takes beyond OpenAI's; `*` = any."""
    context_tokens: dict[str, int] = {}
    can: dict[str, tuple[Capability, ...]] = {}
    """Model -> all it can. A model that is not named here is taken to be able to do what is asked."""
    recordings: str = ""
    """`replay`: a file, or a broker's URL with `?stream=`."""
    cursor: str = ""
    """`replay`: where to begin in that stream."""
    argv: tuple[str, ...] = ()
    """`command`: the program and its arguments."""
    question: Literal["json", "text"] = "json"
    """`command`: what stands on its standard input."""
    delay: Duration = Duration("0")
    """`echo`: how long it takes."""
    health_check: HealthCheckSettings = HealthCheckSettings(disabled=True)

    def __post_init__(self) -> None:
        at = f"infermux.providers {self.name[:64]!r}"
        _check_name(self.name, "infermux.providers: name")
        for name in ("requests_per_minute", "tokens_per_minute", "concurrency_max"):
            _check(getattr(self, name) >= 0, f"{at}: {name} = {getattr(self, name)} is below 0")
        _check(0 < self.weight < 1e6, f"{at}: weight = {self.weight} is not above 0")
        for name in ("timeout", "connect_timeout"):
            _check(getattr(self, name) > 0, f"{at}: {name} = {getattr(self, name)} is not above 0")
        _check(not (self.api_key and self.api_key_env), f"{at}: api_key and api_key_env are the same setting")
        _check(
            not self.api_key or VARIABLE.fullmatch(self.api_key) is not None, f"{at}: api_key holds a key",
            'name the variable that holds it: api_key_env = "OPENAI_API_KEY"',
        )  # fmt: skip
        _check(
            self.type not in ("openai", "anthropic") or bool(self.base_url),
            f"{at}: base_url is missing",
            "https://…/v1",
        )
        _check(self.type != "replay" or bool(self.recordings), f"{at}: recordings is missing")
        _check(self.type != "command" or bool(self.argv), f"{at}: argv is missing")
        _check(bool(self.models) or not self.probed, f"{at}: health_check asks its first model, and `models` is empty")
        for name, size in self.context_tokens.items():
            _check(size > 0, f"{at}: context_tokens.{name} = {size} is not above 0")
        if self.models:
            for alias, model in self.aliases.items():
                _check(model in self.models, f"{at}: aliases.{alias} = {model!r} is none of its models")

    @property
    def probed(self) -> bool:
        return not self.health_check.disabled

    @property
    def key_variable(self) -> str:
        """The environment variable with the key; empty when there is none."""
        match = VARIABLE.fullmatch(self.api_key)
        return match[1] if match else self.api_key_env


class GroupSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Models under one name, which `model` may ask for. A question for one of `models` by its own name keeps to that model, by
    the group's strategy, providers and fallbacks; where several groups name it, the first has it."""

    name: str
    models: tuple[str, ...]
    strategy: StrategyName | None = None
    """None = that of `routing`."""
    providers: tuple[str, ...] = ()
    """Only these; empty = all."""
    fallbacks: tuple[str, ...] = ()
    """Models, aliases or groups that are asked when nobody here answers, in this order. Theirs are not followed."""

    def __post_init__(self) -> None:
        _check_name(self.name, "infermux.groups: name")
        _check(bool(self.models), f"infermux.groups {self.name!r}: models is empty")


class RoutingSettings(Struct, frozen=True, kw_only=True):
    """The table `[infermux.routing]`."""

    strategy: StrategyName = "priority"
    auto: str = ""
    """What `auto` stands for; empty = the first model of each provider, in their order."""
    deadline: Duration = Duration("120s")
    """For a call as a whole, or until the first piece of a stream: every attempt and wait."""
    retries: int = 1
    """How often one candidate is asked again before the next."""
    attempts_max: int = 8
    """Of one call, at all candidates together."""
    retry_wait: Duration = Duration("200ms")
    retry_wait_max: Duration = Duration("2s")
    """Whoever asks to be left alone for longer is left for the next candidate."""
    hedge_after: Duration = Duration("0")
    """Ask a second candidate as well when the first has not answered for so long; 0 = never."""
    queue_max: int = 1000
    """Calls that may wait for a provider with `concurrency_max`."""
    sticky: str = "prefix"
    """What `sticky` keeps together: `prefix` (how the conversation begins), `key`, `team`, `project`, or `meta.NAME`."""
    prefix_chars: int = 1024
    latency_decay: Duration = Duration("10s")
    """After so long a measurement counts for a third."""
    latency_stale: Duration = Duration("60s")
    """What was last measured so long ago is unmeasured."""
    probe_share: float = 0.05
    """Of the calls, for candidates that are unmeasured while others are."""
    slow_start: Duration = Duration("30s")
    """A provider that works again gets its share back over this time; 0 = at once."""
    tokens_out_default: int = 4096
    """What an answer may have, for budgets, where the question does not say."""

    def __post_init__(self) -> None:
        for name in (
            "deadline",
            "attempts_max",
            "latency_decay",
            "latency_stale",
            "prefix_chars",
            "tokens_out_default",
        ):
            _check(getattr(self, name) > 0, f"infermux.routing.{name} = {getattr(self, name)} is not above 0")
        for name in ("retries", "queue_max"):
            _check(getattr(self, name) >= 0, f"infermux.routing.{name} = {getattr(self, name)} is below 0")
        _check(0 <= self.probe_share <= 1, f"infermux.routing.probe_share = {self.probe_share} is no share from 0 to 1")
        _check(
            self.sticky in ("prefix", "key", "team", "project") or self.sticky.startswith("meta."),
            f"infermux.routing.sticky = {self.sticky!r} is not prefix, key, team, project or meta.NAME",
        )


class BreakerSettings(Struct, frozen=True, kw_only=True):
    """The table `[infermux.breaker]`: when a (provider, model) is left alone, and for how long."""

    failures_max: int = 5
    open: Duration = Duration("30s")
    factor: float = 2.0
    open_max: Duration = Duration("5m")
    probes_max: int = 1
    failure_rate: float = 0.0
    """0 = off."""
    window: Duration = Duration("60s")
    volume_min: int = 20

    ALIASES: ClassVar[dict[str, str]] = {
        "consecutive_failures": "failures_max", "recovery_window": "open", "recovery_backoff_multiplier": "factor",
        "recovery_backoff_max": "open_max", "error_rate_threshold": "failure_rate", "min_requests": "volume_min",
    }  # fmt: skip
    GONE: ClassVar[dict[str, str]] = {
        "window_seconds": 'window = "60s"',
        "latency_p95_ms": "slow providers are left by strategy = least_latency, and bounded by timeout",
        "probe_timeout": "the provider's timeout",
        "treat_rate_limit_as_error": "a 429 cools the candidate down for as long as it says, and never opens the circuit",
    }

    def __post_init__(self) -> None:
        try:
            self.policy()
        except InvalidArgument as exc:
            raise InvalidArgument(f"infermux.breaker: {exc.message}") from exc

    def policy(self) -> BreakerPolicy:
        return BreakerPolicy(
            failures_max=self.failures_max, open_s=self.open, factor=self.factor, open_s_max=self.open_max,
            probes_max=self.probes_max, failure_rate=self.failure_rate or None, window_s=self.window, volume_min=self.volume_min,
        )  # fmt: skip


class BudgetSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One limit of money. At most one of `key`, `team`, `project`: a name, or `*` for one such budget each; none of them =
    everybody together. Periods begin at midnight UTC."""

    limit_usd: str | int | float
    """As text to be exact: "12.50"."""
    period: Period = "month"
    key: str = ""
    team: str = ""
    project: str = ""
    action: Action = "refuse"
    model_override: str = ""
    """What is asked instead once the limit is reached."""
    unpriced: Literal["refuse", "allow"] = "refuse"
    """Candidates whose price is unknown; `allow` counts them as nothing until their cost is known."""

    def __post_init__(self) -> None:
        at = f"infermux.budgets {self.name}"
        _check(
            sum(map(bool, (self.key, self.team, self.project))) <= 1, f"{at}: key, team and project exclude one another"
        )
        try:
            limit = Decimal(str(self.limit_usd))
        except InvalidOperation as exc:
            raise InvalidArgument(
                f"{at}: limit_usd = {self.limit_usd!r} is no amount", hint='limit_usd = "12.50"'
            ) from exc
        _check(
            limit.is_finite() and 0 <= limit < 1_000_000_000,
            f"{at}: limit_usd = {self.limit_usd!r} is no amount from 0 to 1e9",
        )
        _check(limit * NANO % 1 == 0, f"{at}: limit_usd = {self.limit_usd!r} has more than nine decimals")
        _check(
            (self.action == "model_override") == bool(self.model_override),
            f"{at}: action = model_override and model_override = … belong together",
        )

    @property
    def scope(self) -> tuple[str, str]:
        """(kind, name): kind is key, team, project or all; name may be `*`."""
        for kind in ("key", "team", "project"):
            if getattr(self, kind):
                return kind, getattr(self, kind)
        return "all", ""

    @property
    def name(self) -> str:
        kind, of = self.scope
        return f"{kind} {of}/{self.period}" if of else f"{kind}/{self.period}"

    @property
    def limit_nano(self) -> int:
        """Billionths of a US dollar."""
        return int(Decimal(str(self.limit_usd)) * NANO)


class KeySettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who may ask. The key itself is compared by its SHA-256, given as `sha256`, or made of the variable `env`."""

    name: str
    sha256: str = ""
    env: str = ""
    team: str = ""
    project: str = ""
    models: tuple[str, ...] = ()
    """What may be asked for: names as they are asked, `*` at the end; empty = everything."""
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    concurrency_max: int = 0

    def __post_init__(self) -> None:
        at = f"infermux.keys {self.name[:64]!r}"
        _check_name(self.name, "infermux.keys: name")
        _check(
            bool(self.sha256) != bool(self.env), f"{at}: one of sha256 and env is needed", "printf %s KEY | sha256sum"
        )
        _check(
            not self.sha256 or re.fullmatch("[0-9a-f]{64}", self.sha256) is not None,
            f"{at}: sha256 is not 64 hex digits",
        )
        for name in ("requests_per_minute", "tokens_per_minute", "concurrency_max"):
            _check(getattr(self, name) >= 0, f"{at}: {name} = {getattr(self, name)} is below 0")


ECHO = ProviderSettings(name="echo", type="echo", models=("echo",))


class InferMuxSettings(Struct, frozen=True, kw_only=True):
    """An empty text is the default that the comment names."""

    listen: str = "127.0.0.1:8600"
    stream: str = "infer"
    """Where questions and answers are recorded."""
    requests: str = "infer-requests"
    """Whose `infer.request` are answered, into `stream`; empty = of no stream. Never the stream of the record: what is recorded
    there would be asked again."""
    workers: int = 16
    """Requests of that stream under way at once."""
    capture: Capture = "full"
    """How much of the texts is recorded: `metadata` is roles, parameters and sizes, `none` not even that."""
    open: bool = False
    """Take calls from other machines without a key."""
    store: str = ""
    """The ledger's file; empty = DIR/tools/infermux.db, or the user's state directory."""
    prices: str = ""
    """A price table; empty = costs that providers do not state stay unknown."""
    providers: tuple[ProviderSettings, ...] = ()
    """Empty = `echo`."""
    aliases: dict[str, str] = {}
    """A name -> what is asked instead."""
    groups: tuple[GroupSettings, ...] = ()
    routing: RoutingSettings = RoutingSettings()
    breaker: BreakerSettings = BreakerSettings()
    budgets: tuple[BudgetSettings, ...] = ()
    keys: tuple[KeySettings, ...] = ()
    """Empty = everybody may ask."""
    body_bytes_max: Size = Size("32MiB")
    requests_max: int = 1024
    """Requests under way at once; more are told to come back."""
    drain: Duration = Duration("30s")

    ALIASES: ClassVar[dict[str, str]] = {"addr": "listen"}

    def __post_init__(self) -> None:
        check_stream(self.stream)
        if self.requests:
            check_stream(self.requests)
        _check(self.requests != self.stream, f"infermux.requests = {self.requests!r} is the stream of the record")
        for name in ("body_bytes_max", "requests_max", "drain", "workers"):
            _check(getattr(self, name) > 0, f"infermux.{name} = {getattr(self, name)} is not above 0")
        for what in ("providers", "groups", "keys"):
            _check_unique((item.name for item in getattr(self, what)), f"infermux.{what}")
        _check_unique((f"{b.name} {b.action}" for b in self.budgets), "infermux.budgets")
        self._check_names()

    @property
    def asked(self) -> tuple[ProviderSettings, ...]:
        """The providers in force."""
        return self.providers or (ECHO,)

    def names(self) -> dict[str, None]:
        """What may be asked for, in order: groups, aliases, the models of every provider."""
        found = [g.name for g in self.groups] + list(self.aliases)
        for provider in self.asked:
            found += [*provider.models, *provider.aliases]
        return dict.fromkeys(found)

    def _check_names(self) -> None:
        """Whatever an alias, a group, `auto` or a budget names is there."""
        known = self.names()
        providers = {p.name for p in self.asked}
        anything = any(not p.models for p in self.asked)

        def check(name: str, at: str) -> None:
            there = name in known or name in providers or name == AUTO or name.partition("/")[0] in providers
            _check(there or anything, f"{at} = {name[:80]!r} names no model, alias or group that is known here")

        for alias, name in self.aliases.items():
            check(name, f"infermux.aliases.{alias}")
            seen = {alias}
            while name in self.aliases:
                _check(name not in seen, f"infermux.aliases.{alias} goes round in a circle")
                seen.add(name)
                name = self.aliases[name]
        for group in self.groups:
            at = f"infermux.groups {group.name!r}"
            for provider in group.providers:
                _check(provider in providers, f"{at}: providers: there is no provider {provider[:64]!r}")
            for name in group.models:
                _check(all(name != g.name for g in self.groups), f"{at}: models: {name!r} is a group")
                check(name, f"{at}: models")
            for name in group.fallbacks:
                check(name, f"{at}: fallbacks")
        if self.routing.auto:
            _check(self.routing.auto != AUTO, "infermux.routing.auto = 'auto' names itself")
            check(self.routing.auto, "infermux.routing.auto")
        for budget in self.budgets:
            if budget.model_override:
                check(budget.model_override, f"infermux.budgets {budget.name}: model_override")


TEMPLATE = """\

# [infermux]                      # variables: MIST_INFERMUX__LISTEN, or MIST_INFERMUX_LISTEN
# listen = "127.0.0.1:8600"       # where its HTTP door is
# stream = "infer"                # where calls are recorded
# requests = "infer-requests"     # infer.request envelopes of this stream are answered; empty = none
# workers = 16                    # of them at once
# capture = "full"                # of texts, in the record: full, metadata, none
# open = false                    # take calls from other machines without a key
# store = ""                      # the ledger's file; empty = beside the log, or the user's state directory
# prices = ""                     # a price table; none are shipped
# providers = []                  # tables [[infermux.providers]]: docs/reference/infermux-settings.md; none = echo
# aliases = {}                    # { fast = "gpt-4o-mini" }
# groups = []                     # [{ name = "smart", models = ["gpt-4o", "claude-opus"], strategy = "least_latency" }]
# budgets = []                    # [{ team = "*", limit_usd = "50.00", period = "month", action = "refuse" }]
# keys = []                       # [{ name = "ci", env = "CI_KEY", team = "build", models = ["gpt-*"] }]; none = anybody
# body_bytes_max = "32MiB"        # of one request
# requests_max = 1024             # under way at once
# drain = "30s"                   # for the way down
# [infermux.routing]
# strategy = "priority"           # priority, round_robin, weighted, least_latency, cost, sticky
# auto = ""                       # what `auto` stands for; empty = the first model of each provider, in their order
# deadline = "2m"                 # for a call as a whole
# retries = 1                     # of one candidate, before the next is asked
# attempts_max = 8                # of one call
# retry_wait = "200ms"            # grows, and is jittered
# retry_wait_max = "2s"
# hedge_after = "0"               # "800ms": ask a second candidate as well; 0 = never
# queue_max = 1000                # calls that wait for a provider with concurrency_max
# sticky = "prefix"               # what `sticky` keeps together: prefix, key, team, project, meta.NAME
# prefix_chars = 1024
# latency_decay = "10s"
# latency_stale = "1m"
# probe_share = 0.05              # of the calls, for the unmeasured
# slow_start = "30s"              # until a provider that works again has its share back
# tokens_out_default = 4096       # what an answer may have, for budgets, where the question does not say
# [infermux.breaker]              # of each (provider, model)
# failures_max = 5
# open = "30s"
# factor = 2.0
# open_max = "5m"
# probes_max = 1
# failure_rate = 0.0              # 0.5: half of volume_min calls or more in the window; 0 = off
# window = "1m"
# volume_min = 20
"""
