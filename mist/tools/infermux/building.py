"""Adapters as the settings name them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial

from mist.errors import InvalidArgument
from mist.tools.infermux.providers.base import Provider
from mist.tools.infermux.settings import VARIABLE, InferMuxSettings, ProviderSettings


def build_providers(settings: InferMuxSettings, *, env: Mapping[str, str] | None = None) -> list[Provider]:
    """One for each provider in force. Nothing is connected or read yet: recordings are when they are first asked for. Raises
    InvalidArgument, naming the setting, for a variable that is not set; Unsupported where an extra is not installed."""
    variables: Mapping[str, str] = os.environ if env is None else env
    return [_build(provider, settings, variables) for provider in settings.asked]


def _build(provider: ProviderSettings, settings: InferMuxSettings, env: Mapping[str, str]) -> Provider:
    # each where it is needed: they bring HTTP clients and brokers
    name, models = provider.name, provider.models
    match provider.type:
        case "echo":
            from mist.tools.infermux.providers.echo import Echo

            return Echo(name, models=models, delay_s=provider.delay)
        case "replay":
            from mist.tools.infermux.providers.replay import Replay
            from mist.tools.infermux.recordings import read_recordings

            return Replay(name, partial(read_recordings, provider.recordings, cursor=provider.cursor), models=models)
        case "command":
            from mist.tools.infermux.providers.command import Command

            return Command(
                name, provider.argv, models=models, question=provider.question, drop_params=provider.drop_params
            )
        case "openai":
            from mist.tools.infermux.providers.openai import OpenAI

            return OpenAI(
                name, base_url=_filled(provider.base_url, env, name), api_key=_key(provider, env), models=models,
                headers=_headers(provider, env), extra_params=provider.extra_params, drop_params=provider.drop_params,
                connect_timeout_s=provider.connect_timeout,
            )  # fmt: skip
        case "anthropic":
            from mist.tools.infermux.providers.anthropic import Anthropic

            # what an answer may have where nobody says is one number, for the provider and for budgets
            return Anthropic(
                name, base_url=_filled(provider.base_url, env, name), api_key=_key(provider, env), models=models,
                headers=_headers(provider, env), max_tokens=settings.routing.tokens_out_default,
                drop_params=provider.drop_params, connect_timeout_s=provider.connect_timeout,
            )  # fmt: skip


def _key(provider: ProviderSettings, env: Mapping[str, str]) -> str:
    return _variable(provider.key_variable, env, provider.name) if provider.key_variable else ""


def _headers(provider: ProviderSettings, env: Mapping[str, str]) -> dict[str, str]:
    return {header: _filled(value, env, provider.name) for header, value in provider.headers.items()}


def _filled(text: str, env: Mapping[str, str], name: str) -> str:
    """The text with its `${VARIABLE}` filled in."""
    return VARIABLE.sub(lambda match: _variable(match[1], env, name), text)


def _variable(variable: str, env: Mapping[str, str], name: str) -> str:
    value = env.get(variable, "")
    if not value:
        raise InvalidArgument(
            f"infermux.providers {name!r}: the environment variable {variable} is not set", hint=f"export {variable}=…"
        )
    return value
