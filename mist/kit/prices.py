"""What tokens cost, from a dated table: TOML that people keep beside their configuration.

    version = "2026-11"                    # optional; else the beginning of the file's SHA-256
    [[price]]
    provider = "openai"                    # optional: without it any provider
    model = "gpt-4o*"                      # a name, or a beginning with * at its end
    from = 2024-05-13                      # optional; of several that fit, the latest not after the call holds
    input_per_million = 2.50               # US dollars for a million tokens
    output_per_million = 10.00             # optional: a model without it has no output to pay (embeddings)
    cached_input_per_million = 1.25        # optional: for the part of the input that came from the provider's cache

Promises: unknown is None, never zero: no entry that fits, or a count that the entry needs and the call does not state.
An exact name wins over a pattern, the longer pattern over the shorter, a named provider over any, then the later date.
A table with an unknown key, a negative price or two entries for the same name and day is refused with its place.
Does not: ship prices. They change without notice, and a wrong one is worse than none.
"""

from __future__ import annotations

import datetime
import hashlib
import tomllib
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from mist.errors import InvalidArgument, NotFound

_MILLION = 1_000_000
_NS = 1_000_000_000
_CACHED_MAX = 10_000


class Price(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename={"from_": "from"}):
    model: str
    input_per_million: float
    output_per_million: float | None = None
    cached_input_per_million: float | None = None
    provider: str = ""
    from_: datetime.date = datetime.date(1970, 1, 1)

    def cost_usd(self, tokens_in: int | None, tokens_out: int | None, tokens_cached: int | None = None) -> float | None:
        """US dollars, or None where a count that is needed is not known. `tokens_cached` is a part of `tokens_in`."""
        if tokens_in is None or (self.output_per_million is not None and tokens_out is None):
            return None
        cached = min(tokens_cached or 0, tokens_in) if self.cached_input_per_million is not None else 0
        dollars = (tokens_in - cached) * self.input_per_million
        dollars += cached * (self.cached_input_per_million or 0.0)
        dollars += (tokens_out or 0) * (self.output_per_million or 0.0)
        return dollars / _MILLION


class _File(Struct, frozen=True, forbid_unknown_fields=True):
    price: list[Price] = []
    version: str = ""


class Prices:
    """A table in force. `version` is stored with every cost it makes."""

    def __init__(self, prices: list[Price], version: str) -> None:
        self.version = version
        self.prices = prices
        # what fits best comes first
        self._ordered = sorted(
            ((_starts_ns(p.from_), p) for p in prices),
            key=lambda item: (not item[1].model.endswith("*"), len(item[1].model), bool(item[1].provider), item[0]),
            reverse=True,
        )
        self._fitting: dict[tuple[str, str], list[tuple[int, Price]]] = {}

    def find(self, provider: str, model: str, time_ns: int) -> Price | None:
        """The entry for a call at that time."""
        key = (provider, model)
        fitting = self._fitting.get(key)
        if fitting is None:
            if len(self._fitting) >= _CACHED_MAX:  # names come from outside
                self._fitting.clear()
            fitting = self._fitting[key] = [item for item in self._ordered if _fits(item[1], provider, model)]
        for starts_ns, price in fitting:
            if starts_ns <= time_ns:
                return price
        return None

    def cost_usd(
        self,
        *,
        provider: str,
        model: str,
        time_ns: int,
        tokens_in: int | None,
        tokens_out: int | None,
        tokens_cached: int | None = None,
    ) -> float | None:
        """US dollars, or None where it cannot be known. `tokens_cached` is a part of `tokens_in`."""
        price = self.find(provider, model, time_ns)
        return price.cost_usd(tokens_in, tokens_out, tokens_cached) if price is not None else None


def _fits(price: Price, provider: str, model: str) -> bool:
    if price.provider and price.provider != provider:
        return False
    return model.startswith(price.model[:-1]) if price.model.endswith("*") else model == price.model


def _starts_ns(day: datetime.date) -> int:
    return int(datetime.datetime(day.year, day.month, day.day, tzinfo=datetime.UTC).timestamp()) * _NS


def load_prices(path: Path) -> Prices:
    """Read a table. Raises NotFound, InvalidArgument with the place."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as exc:
        raise NotFound(f"no price table {path}") from exc
    except OSError as exc:
        raise InvalidArgument(f"{path}: cannot be read: {exc.strerror}") from exc
    return parse_prices(data, str(path))


def parse_prices(data: bytes, origin: str) -> Prices:
    """The bytes of a table; `origin` is what errors call it."""
    try:
        found: dict[str, Any] = tomllib.loads(data.decode("utf-8-sig"))
        file = msgspec.convert(found, _File)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as exc:
        raise InvalidArgument(f"{origin}: not a price table: {str(exc)[:200]}") from exc
    known: set[tuple[str, str, datetime.date]] = set()
    for number, price in enumerate(file.price, 1):
        at = f"{origin}: price {number} ({price.model[:60]!r})"
        if not price.model:
            raise InvalidArgument(f"{at}: model is empty", hint='a name, or a beginning with * at its end ("*" is any)')
        for name in ("input_per_million", "output_per_million", "cached_input_per_million"):
            value = getattr(price, name)
            if value is not None and not 0 <= value < 1e9:
                raise InvalidArgument(f"{at}: {name} = {value} is not a price from 0 to 1e9 US dollars")
        key = (price.provider, price.model, price.from_)
        if key in known:
            raise InvalidArgument(f"{at}: there is another one for this name and day")
        known.add(key)
    return Prices(file.price, file.version or hashlib.sha256(data).hexdigest()[:12])
