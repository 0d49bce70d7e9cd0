"""What MatchSpec can be told once: the head of `matchspec.yml`, `MATCHSPEC_*` variables, and the tables `[matchspec]` and
`[eval]` of mist.toml.

Later ones win: the defaults here, mist.toml, matchspec.yml, variables, flags. A harness that says a value itself keeps it, but
for `concurrency` and `timeout_seconds` at the top level, which are meant to overrule.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from mist.config import Layer, env_layers, merge
from mist.errors import InvalidArgument, NotFound

PREFIX = "MATCHSPEC_"
FILE = "matchspec.yml"


class Defaults(Struct, frozen=True, kw_only=True):
    """Of harnesses that do not say."""

    concurrency: int = 4
    timeout_seconds: float = 30.0
    retries: int = 0
    retry_delay_ms: float = 250.0


class Output(Struct, frozen=True, kw_only=True):
    """`retain_days`: 0 keeps all."""

    dir: str = ".matchspec/results"
    format: Literal["json", "junit", "markdown", "text", "html"] = "json"
    retain_days: int = 0


class Statistics(Struct, frozen=True, kw_only=True):
    """Of suites that do not say."""

    confidence_level: float = 0.95
    use_lower_bound: bool = False
    min_sample_size: int = 0
    min_sample_action: Literal["warn", "fail"] = "warn"
    cluster: str = ""


class MatchSpecSettings(Struct, frozen=True, kw_only=True):
    """0 and empty: as the harnesses, the suites, or the search order say."""

    config: str = ""
    """The suites' file; empty = ./matchspec.yml, then ~/.matchspec/config.yml."""
    root: str = ""
    """The folder that the paths in a suite's files may not leave; empty = the folder of the file that is run."""
    concurrency: int = 0
    """Calls under way at once, whatever a harness says."""
    timeout_seconds: float = 0.0
    """For one answer, whatever a harness says."""
    log_level: Literal["debug", "info", "warn", "error"] = "info"
    defaults: Defaults = Defaults()
    output: Output = Output()
    statistics: Statistics = Statistics()

    def __post_init__(self) -> None:
        d, s = self.defaults, self.statistics
        for name, value, good in (
            ("concurrency", self.concurrency, self.concurrency >= 0),
            ("timeout_seconds", self.timeout_seconds, 0 <= self.timeout_seconds < float("inf")),
            ("defaults.concurrency", d.concurrency, d.concurrency >= 1),
            ("defaults.timeout_seconds", d.timeout_seconds, 0 < d.timeout_seconds < float("inf")),
            ("defaults.retries", d.retries, d.retries >= 0),
            ("defaults.retry_delay_ms", d.retry_delay_ms, 0 <= d.retry_delay_ms < float("inf")),
            ("output.retain_days", self.output.retain_days, self.output.retain_days >= 0),
            ("statistics.confidence_level", s.confidence_level, 0 < s.confidence_level < 1),
            ("statistics.min_sample_size", s.min_sample_size, s.min_sample_size >= 0),
        ):
            if not good:
                raise InvalidArgument(f"matchspec: {name} = {value} cannot be right")


class EvalSettings(Struct, frozen=True, kw_only=True):
    """The table `[eval]` of the documents' matchspec.toml: short words for three of the settings."""

    timeout: float = 0.0
    """`timeout_seconds`; 0 = not said."""
    parallel: int = 0
    """`concurrency`."""
    suites: tuple[str, ...] = ()
    """Which suites are run when none is named; empty = all."""

    def __post_init__(self) -> None:
        if not 0 <= self.timeout < float("inf") or self.parallel < 0:
            raise InvalidArgument("eval: timeout and parallel are 0 or more")


def layers_of(settings: MatchSpecSettings, short: EvalSettings) -> list[Layer]:
    """What mist.toml says, as layers for `layered`."""
    words = {"timeout_seconds": short.timeout, "concurrency": short.parallel}
    return [
        Layer("[matchspec] of mist.toml", msgspec.to_builtins(settings)),
        Layer("[eval] of mist.toml", {key: value for key, value in words.items() if value}),
    ]


def layered(*layers: Layer, env: Mapping[str, str] = os.environ) -> MatchSpecSettings:
    """The settings in force: the layers in order, then the variables. Raises InvalidArgument naming layer and key."""
    return merge(MatchSpecSettings, [*layers, *env_layers(MatchSpecSettings, env, PREFIX)]).value


def find_config(named: str = "", *, env: Mapping[str, str] = os.environ, cwd: Path | None = None) -> Path | None:
    """`named` (--config), MATCHSPEC_CONFIG, ./matchspec.yml, $HOME/.matchspec/config.yml; None when there is none of the last
    two. Raises NotFound when one that was named is not there."""
    named = named or env.get(f"{PREFIX}CONFIG", "")
    if named:
        if not Path(named).is_file():
            raise NotFound(f"no file {named}", hint="`matchspec init` writes one")
        return Path(named)
    home = env.get("HOME", "")
    candidates = [(cwd or Path()) / FILE, *([Path(home) / ".matchspec" / "config.yml"] if home else [])]
    return next((path for path in candidates if path.is_file()), None)


TEMPLATE = """\

# [matchspec]                     # variables: MATCHSPEC_CONCURRENCY, MATCHSPEC_OUTPUT_DIR ...
# config = ""                     # the file of the suites; empty = ./matchspec.yml, then ~/.matchspec/config.yml
# root = ""                       # the folder that paths in suites' files may not leave; empty = that of the file that is run
# concurrency = 0                 # calls under way at once, whatever a harness says; 0 = as it says
# timeout_seconds = 0.0           # for one answer, the same way
# log_level = "info"              # debug, info, warn, error
# [matchspec.defaults]            # of harnesses that do not say
# concurrency = 4
# timeout_seconds = 30.0
# retries = 0
# retry_delay_ms = 250.0
# [matchspec.output]
# dir = ".matchspec/results"
# format = "json"                 # json, junit, markdown, text, html
# retain_days = 0                 # 0 keeps all
# [matchspec.statistics]          # of suites that do not say
# confidence_level = 0.95
# use_lower_bound = false
# min_sample_size = 0
# min_sample_action = "warn"      # warn, fail
# cluster = ""                    # a field of the samples' metadata; those with the same value depend on one another
# [eval]                          # short words for the same
# timeout = 0.0                   # seconds: timeout_seconds
# parallel = 0                    # concurrency
# suites = []                     # which are run when none is named
"""
