"""Who could answer a question, by what it asks for: models, aliases, groups, providers, `provider/model`, `auto`.

A name means, the first that fits: an alias; a group; a model of one or more providers (or another name they have for it);
`provider/model`; a provider, which is its first model; a model that no provider lists, of the providers that list none
(they take whatever they are asked for). `auto` and the empty name are what `routing.auto` says, else the first model of
each provider, providers by priority and then as they are declared: the same every time.

Promises: a pure function of the settings and the name. Who could answer is in a plan, in stages: the candidates of what was
asked for, then those of each fallback of its group. A plan also says who is left out for good, and why.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from mist.errors import NotFound
from mist.tools.infermux.settings import (
    AUTO,
    Capability,
    GroupSettings,
    InferMuxSettings,
    ProviderSettings,
    StrategyName,
)

_SHOWN_MAX = 20


class Target(Struct, frozen=True, kw_only=True):
    """A model at a provider. `model` is the provider's name of it; None of `can` and `context_tokens` is not known."""

    provider: str
    model: str
    weight: float = 1.0
    priority: int = 0
    context_tokens: int | None = None
    can: tuple[Capability, ...] | None = None

    @property
    def key(self) -> tuple[str, str]:
        return self.provider, self.model

    @property
    def name(self) -> str:
        return f"{self.provider}/{self.model}"


class LeftOut(Struct, frozen=True):
    provider: str
    model: str
    reason: str


class Stage(Struct, frozen=True, kw_only=True):
    """Candidates that are asked in an order of `strategy`; `name` is what they were asked for by."""

    name: str
    group: str
    strategy: StrategyName
    targets: tuple[Target, ...]


class Plan(Struct, frozen=True, kw_only=True):
    """`stages` are never empty, and no target stands in two of them."""

    asked: str
    stages: tuple[Stage, ...]
    left_out: tuple[LeftOut, ...] = ()

    @property
    def group(self) -> str:
        return self.stages[0].group


class Catalogue:
    """The settings, to be asked for names."""

    def __init__(self, settings: InferMuxSettings) -> None:
        self._providers = {p.name: p for p in settings.asked}
        self._ordered = sorted(settings.asked, key=lambda p: p.priority)  # stable: then as declared
        self._groups = {g.name: g for g in settings.groups}
        self._aliases = settings.aliases
        self._routing = settings.routing
        self._names = settings.names()

    @property
    def names(self) -> list[str]:
        """What may be asked for by its own name."""
        return list(self._names)

    def plan(self, asked: str, provider: str = "") -> Plan:
        """Who could answer. `provider`: this one and no other. Raises NotFound with the known names."""
        if provider and provider not in self._providers:
            raise NotFound(
                f"no provider {provider[:64]!r}",
                hint=f"known: {', '.join(self._providers)}",
                meta={"model": asked[:80]},
            )
        name = self._unaliased(asked or AUTO)
        stages = [self._stage(name)]
        left_out: list[LeftOut] = []
        group = self._groups.get(stages[0].group)
        if group is not None:
            stages += [self._stage(self._unaliased(fallback)) for fallback in group.fallbacks]
        if name == AUTO:
            left_out += [LeftOut(p.name, "", "it lists no models") for p in self._ordered if not p.models]
        seen: set[tuple[str, str]] = set()
        kept = []
        for stage in stages:
            targets = []
            for target in stage.targets:
                if target.key in seen:
                    continue
                seen.add(target.key)
                if provider and target.provider != provider:
                    left_out.append(
                        LeftOut(target.provider, target.model, f"the question names the provider {provider}")
                    )
                else:
                    targets.append(target)
            if targets:
                kept.append(Stage(name=stage.name, group=stage.group, strategy=stage.strategy, targets=tuple(targets)))
        if not kept:
            where = f"provider {provider}" if provider else "anybody here"
            names = self.names
            more = f" and {len(names) - _SHOWN_MAX} more" if len(names) > _SHOWN_MAX else ""
            raise NotFound(
                f"no model {(asked or AUTO)[:80]!r} of {where}",
                hint=f"known: {', '.join(names[:_SHOWN_MAX]) or 'none'}{more}", meta={"model": asked[:80]},
            )  # fmt: skip
        return Plan(asked=asked, stages=tuple(kept), left_out=tuple(left_out))

    def _unaliased(self, name: str) -> str:
        if name == AUTO and self._routing.auto:
            name = self._routing.auto
        while name in self._aliases:
            name = self._aliases[name]
        return name

    def _stage(self, name: str) -> Stage:
        group = self._groups.get(name)
        if group is not None:
            targets = [t for model in group.models for t in self._targets(self._unaliased(model), group.providers)]
        else:
            # a model keeps its name, and goes by the rules of the first group that names it
            group = next((g for g in self._groups.values() if self._has(g, name)), None)
            targets = self._targets(name, group.providers if group is not None else ())
        strategy = group.strategy if group is not None else None
        if name == AUTO:
            strategy = "priority"
        targets.sort(key=lambda t: t.priority)  # stable
        return Stage(
            name=name, group=group.name if group is not None else "", strategy=strategy or self._routing.strategy,
            targets=tuple(targets),
        )  # fmt: skip

    def _has(self, group: GroupSettings, name: str) -> bool:
        return any(self._unaliased(model) == name for model in group.models)

    def _targets(self, name: str, only: Sequence[str]) -> list[Target]:
        """The model of that name at every provider that has it."""
        allowed = [p for p in self._ordered if not only or p.name in only]
        if name == AUTO:
            return [_target(p, p.models[0]) for p in allowed if p.models]
        found = [_target(p, p.aliases.get(name, name)) for p in allowed if name in p.models or name in p.aliases]
        if found:
            return found
        provider, _, model = name.partition("/")
        named = self._providers.get(provider)
        if named is not None and named in allowed:
            model = named.aliases.get(model, model)
            if model and (not named.models or model in named.models):
                return [_target(named, model)]
            if not model and named.models:
                return [_target(named, named.models[0])]
        return [_target(p, name) for p in allowed if not p.models]


def _target(provider: ProviderSettings, model: str) -> Target:
    return Target(
        provider=provider.name, model=model, weight=provider.weight, priority=provider.priority,
        context_tokens=provider.context_tokens.get(model), can=provider.can.get(model),
    )  # fmt: skip
