"""Adapters as the settings name them."""

from __future__ import annotations

import os
from collections.abc import Mapping

from mist.errors import InvalidArgument
from mist.tools.infermux.providers.base import Provider
from mist.tools.infermux.settings import InferMuxSettings, ProviderSettings


def build_providers(settings: InferMuxSettings, *, env: Mapping[str, str] | None = None) -> list[Provider]:
    """One for each provider in force. Nothing is connected or read yet. Raises InvalidArgument, naming the setting, for a
    variable that is not set; Unsupported where an extra is not installed."""
    env = os.environ if env is None else env
    return [build(provider, env) for provider in settings.asked]


def build(provider: ProviderSettings, env: Mapping[str, str]) -> Provider:
    raise InvalidArgument("not merged yet")
