"""The table `[tokentrace]` of mist.toml: values, their defaults and their limits. The meaning of each is in
docs/reference/configuration.md; reading the file is mist/config.py's.

Promises: everything is checked when it is read; a setting that cannot be right is InvalidArgument and names its key. The
keys of the seed's file are read where they still make sense; where not, the hint says what to write.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from msgspec import Struct

from mist.errors import InvalidArgument
from mist.protocol.envelope import SIZE_BYTES_MAX
from mist.protocol.subject import check_stream
from mist.quantities import Duration, Size

Durability = Literal["", "memory", "process", "power", "replicated"]


Capture = Literal["full", "metadata", "none"]
Action = Literal["mask", "hash", "drop"]


class RedactRule(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One of `attrs` (globs over names), `detect` (built-in detectors), `pattern` (a regular expression, called `name`)."""

    attrs: tuple[str, ...] = ()
    detect: tuple[str, ...] = ()
    pattern: str = ""
    name: str = ""
    action: Action = "mask"


class RedactSettings(Struct, frozen=True, kw_only=True):
    """The table `[tokentrace.redact]`: what `redact` takes out. Nothing, as it stands here."""

    capture: Capture = "full"
    content: tuple[str, ...] = ()
    """Names of the attributes that hold prompts and answers; empty = those that `redact` knows."""
    key_env: str = ""
    """The environment variable with the key of `hash`."""
    scan_chars_max: int = 1024 * 1024
    """A span with more is cut down before it is scanned."""
    rules: tuple[RedactRule, ...] = ()


class Keep(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is kept always; all that it names must hold. An error is any status but ok and none. `attrs` compares as text;
    an empty text is "there at all"."""

    errors: bool = False
    slower_than: str = ""
    cost_over_usd: float | None = None
    attrs: dict[str, str] = {}


class SampleSettings(Struct, frozen=True, kw_only=True):
    """The table `[tokentrace.sample]`. `burst`: how many at once from one source; 0 = a second's worth."""

    rate: float = 1.0
    per_source_per_s: float = 0.0
    burst: float = 0.0
    keep: tuple[Keep, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise InvalidArgument(f"tokentrace.sample.rate = {self.rate} is not a share from 0 to 1")
        if not (0 <= self.per_source_per_s < 1e9 and 0 <= self.burst < 1e9):
            raise InvalidArgument("tokentrace.sample: per_source_per_s and burst are numbers from 0")
        if self.burst and not self.per_source_per_s:
            raise InvalidArgument("tokentrace.sample: burst without per_source_per_s limits nothing")


class TokenTraceSettings(Struct, frozen=True, kw_only=True):
    """0 is no limit; an empty text is the default that the comment names."""

    listen: str = "127.0.0.1:8700"
    stream: str = "trace"
    durability: Durability = ""
    """Of the stream, when it is made; empty = the broker's default."""
    store: str = ""
    """A file, or postgresql://…; empty = DIR/tools/tokentrace.db, or the user's state directory."""
    retain: Duration = Duration("0")
    """Spans older than this go, from the store."""
    retain_bytes: Size = Size(0)
    prices: str = ""
    """A price table; empty = costs that spans do not state stay unknown."""
    redact: RedactSettings = RedactSettings()
    """What must not be stored."""
    sample: SampleSettings = SampleSettings()
    """Which spans are kept."""
    alerts: tuple[dict[str, Any], ...] = ()
    """Alert rules: see alerts/rules.py."""
    alerts_file: str = ""
    """A file with more of them."""
    alert_rules: tuple[dict[str, Any], ...] = ()
    """The seed's."""
    alert_cooldown: Duration = Duration("5m")
    otlp_grpc: str = ""
    """Where OTLP over gRPC listens; empty = nowhere."""
    body_bytes_max: Size = Size("32MiB")
    envelope_bytes_max: Size = Size(SIZE_BYTES_MAX)
    requests_max: int = 256
    """Requests under way at once; more are told to come back."""
    read_timeout: Duration = Duration("30s")
    drain: Duration = Duration("30s")

    ALIASES: ClassVar[dict[str, str]] = {"addr": "listen"}
    GONE: ClassVar[dict[str, str]] = {
        "max_spans": 'spans are kept by age and size: retain = "30d", retain_bytes = "10GiB"',
        "retain_days": 'retain = "30d"',
        "capture": 'capture = "none" in [tokentrace.redact]',
    }

    def __post_init__(self) -> None:
        check_stream(self.stream)
        for name in ("body_bytes_max", "envelope_bytes_max", "requests_max", "read_timeout", "drain"):
            if getattr(self, name) <= 0:
                raise InvalidArgument(f"tokentrace.{name} = {getattr(self, name)} is not above 0")
        # checked here so that `mist config validate` sees them; imported where they are used, because every command reads settings
        if self.alerts or self.alert_rules:
            from mist.tools.tokentrace.alerts.rules import configured

            configured(self, None)
        if self.redact != RedactSettings() or self.sample.keep:
            from mist.tools.tokentrace.intake import Intake

            Intake(self.redact, self.sample, env=None)


TEMPLATE = """\

# [tokentrace]                    # variables: MIST_TOKENTRACE__LISTEN, or MIST_TOKENTRACE_LISTEN
# listen = "127.0.0.1:8700"       # where its HTTP door is
# stream = "trace"
# durability = ""                 # of the stream when it is made: process, power, replicated; empty = the broker's default
# store = ""                      # a file, or postgresql://...; empty = beside the log, or the user's state directory
# retain = "0"                    # "30d": older spans go; 0 = none
# retain_bytes = 0                # "10GiB": the oldest spans go above it; 0 = no limit
# prices = ""                     # a price table; none are shipped
# alerts = []                     # tables [[tokentrace.alerts]]: docs/how-to/alert-on-traces.md
# alerts_file = ""                # a file of such tables
# alert_cooldown = "5m"
# otlp_grpc = ""                  # "127.0.0.1:4317": OTLP over gRPC
# body_bytes_max = "32MiB"        # of one request
# envelope_bytes_max = "10MiB"
# requests_max = 256              # under way at once
# read_timeout = "30s"            # for a request to arrive
# drain = "30s"                   # for the way down
# [tokentrace.redact]             # docs/how-to/redact-and-sample.md
# capture = "full"                # prompts and answers: full, metadata (their sizes), none
# content = []                    # which attributes these are; empty = the names we know
# key_env = ""                    # the variable with the key of action = "hash"
# scan_chars_max = 1048576        # a larger span is cut down first
# rules = []                      # [{ detect = ["api_key", "email"] }, { attrs = ["user.*"], action = "drop" }]
# [tokentrace.sample]
# rate = 1.0                      # the share of traces that is kept
# per_source_per_s = 0.0          # at most so many spans a second from one source; 0 = any number
# burst = 0.0
# keep = []                       # [{ errors = true }, { slower_than = "5s" }]: kept always
# [[tokentrace.alert_rules]]      # rules of the seed
# metric = "error_rate"
# op = ">"
# threshold = 0.1
# level = "warning"
"""
