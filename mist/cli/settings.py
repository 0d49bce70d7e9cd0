"""The settings of the command line and of every tool: here the tools' tables come together."""

from __future__ import annotations

from mist import config
from mist.config import MistConfig
from mist.tools.matchspec import settings as matchspec
from mist.tools.matchspec.settings import EvalSettings, MatchSpecSettings
from mist.tools.tokentrace import settings as tokentrace
from mist.tools.tokentrace.settings import TokenTraceSettings


class Settings(MistConfig, frozen=True, kw_only=True):
    """mist.toml as a whole: what MistConfig says, and one table for each tool."""

    tokentrace: TokenTraceSettings = TokenTraceSettings()
    matchspec: MatchSpecSettings = MatchSpecSettings()
    eval: EvalSettings = EvalSettings()


TEMPLATE = config.TEMPLATE + tokentrace.TEMPLATE + matchspec.TEMPLATE
