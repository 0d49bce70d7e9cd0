"""The table `[tokentrace]` of mist.toml: values, their defaults and their limits. The meaning of each is in
docs/reference/configuration.md; reading the file is mist/config.py's.

Promises: everything is checked when it is read; a setting that cannot be right is InvalidArgument and names its key. The
keys of the seed's file are read where they still make sense; where not, the hint says what to write.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from msgspec import Struct

from mist.errors import InvalidArgument
from mist.protocol.envelope import SIZE_BYTES_MAX
from mist.protocol.subject import check_stream
from mist.quantities import Duration, Size

Durability = Literal["", "memory", "process", "power", "replicated"]


class SeedRule(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One `[[tokentrace.alert_rules]]` as the seed has it: `metric op threshold`."""

    metric: str
    op: Literal[">", "<"]
    threshold: float
    level: Literal["warning", "critical"] = "warning"


class TokenTraceSettings(Struct, frozen=True, kw_only=True):
    """0 is no limit; an empty text is the default that the comment names."""

    listen: str = "127.0.0.1:8700"
    stream: str = "trace"
    durability: Durability = ""
    """Of the stream, when it is made; empty = the broker's default."""
    store: str = ""
    """A file, or postgres://…; empty = DIR/tools/tokentrace.db, or the user's state directory."""
    retain: Duration = Duration("0")
    """Spans older than this go, from the store."""
    retain_bytes: Size = Size(0)
    prices: str = ""
    """A price table; empty = the one we ship."""
    capture: bool = False
    """Keep prompts and answers."""
    redact: tuple[str, ...] = ()
    """What else must not be stored: names of attributes, `*` for any rest."""
    sample: float = 1.0
    """The share of traces that is kept. Errors are kept always."""
    alerts: str = ""
    """A file of alert rules."""
    alert_rules: tuple[SeedRule, ...] = ()
    alert_cooldown: Duration = Duration("5m")
    otlp_grpc: str = ""
    """Where OTLP over gRPC listens; empty = nowhere."""
    otlp_http: bool = True
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
    }

    def __post_init__(self) -> None:
        check_stream(self.stream)
        if not 0 <= self.sample <= 1:
            raise InvalidArgument(f"tokentrace.sample = {self.sample} is not a share from 0 to 1")
        for name in ("body_bytes_max", "envelope_bytes_max", "requests_max", "read_timeout", "drain"):
            if getattr(self, name) <= 0:
                raise InvalidArgument(f"tokentrace.{name} = {getattr(self, name)} is not above 0")


TEMPLATE = """\

# [tokentrace]                    # variables: MIST_TOKENTRACE__LISTEN, or MIST_TOKENTRACE_LISTEN
# listen = "127.0.0.1:8700"       # where its HTTP door is
# stream = "trace"
# durability = ""                 # of the stream when it is made: process, power, replicated; empty = the broker's default
# store = ""                      # a file, or postgres://...; empty = beside the log, or the user's state directory
# retain = "0"                    # "30d": older spans go; 0 = none
# retain_bytes = 0                # "10GiB": the oldest spans go above it; 0 = no limit
# prices = ""                     # a price table of your own
# capture = false                 # keep prompts and answers
# redact = []                     # what else is never stored: ["user.email", "http.request.header.*"]
# sample = 1.0                    # the share of traces that is kept; errors always are
# alerts = ""                     # a file of alert rules
# alert_cooldown = "5m"
# otlp_grpc = ""                  # "127.0.0.1:4317": OTLP over gRPC
# otlp_http = true                # OTLP at /v1/traces
# body_bytes_max = "32MiB"        # of one request
# envelope_bytes_max = "10MiB"
# requests_max = 256              # under way at once
# read_timeout = "30s"            # for a request to arrive
# drain = "30s"                   # for the way down
# [[tokentrace.alert_rules]]      # rules of the seed: lifetime figures
# metric = "error_rate"
# op = ">"
# threshold = 0.1
# level = "warning"
"""
