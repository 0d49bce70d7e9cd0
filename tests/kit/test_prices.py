"""The price table: the best fitting entry in force at the time, unknown is None, mistakes are refused with their place."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from mist.errors import InvalidArgument, NotFound
from mist.kit.prices import Prices, load_prices, parse_prices

TABLE = b"""
version = "t1"
[[price]]
model = "gpt-4o*"
input_per_million = 5
output_per_million = 15
[[price]]
model = "gpt-4o*"
from = 2024-08-06
input_per_million = 2.5
output_per_million = 10
cached_input_per_million = 1.25
[[price]]
provider = "azure"
model = "gpt-4o*"
input_per_million = 3
output_per_million = 12
[[price]]
model = "gpt-4o-mini"
input_per_million = 0.15
output_per_million = 0.6
[[price]]
model = "embed"
input_per_million = 0.02
"""


def ns(day: str) -> int:
    return int(datetime.datetime.fromisoformat(day).replace(tzinfo=datetime.UTC).timestamp()) * 10**9


@pytest.fixture
def prices() -> Prices:
    return parse_prices(TABLE, "table")


def cost(prices: Prices, model: str, tokens_in: int | None, tokens_out: int | None, **more: object) -> float | None:
    values = {"provider": "openai", "time_ns": ns("2025-01-01"), **more}
    return prices.cost_usd(model=model, tokens_in=tokens_in, tokens_out=tokens_out, **values)  # type: ignore[arg-type]


def test_the_entry_in_force_at_the_time_holds(prices: Prices) -> None:
    """The later price from its day on, the earlier one before."""
    assert cost(prices, "gpt-4o-2024", 1_000_000, 100_000) == 2.5 + 1.0
    assert cost(prices, "gpt-4o-2024", 1_000_000, 100_000, time_ns=ns("2024-08-05")) == 5 + 1.5
    assert cost(prices, "gpt-4o-2024", 1_000_000, 100_000, time_ns=ns("2024-08-06")) == 2.5 + 1.0


def test_the_closer_entry_wins(prices: Prices) -> None:
    """A name before a pattern, a provider before any, whatever the order in the file."""
    assert cost(prices, "gpt-4o-mini", 1_000_000, 0) == 0.15
    assert cost(prices, "gpt-4o-mini-x", 1_000_000, 0) == 2.5
    assert cost(prices, "gpt-4o", 1_000_000, 0, provider="azure") == 3


def test_the_cached_part_of_the_input_has_its_price(prices: Prices) -> None:
    """Where the entry has one; never more than the input."""
    assert cost(prices, "gpt-4o", 1_000_000, 0, tokens_cached=400_000) == 0.6 * 2.5 + 0.4 * 1.25
    assert cost(prices, "gpt-4o", 1_000_000, 0, tokens_cached=4_000_000) == 1.25
    assert cost(prices, "gpt-4o-mini", 1_000_000, 0, tokens_cached=400_000) == 0.15


def test_what_cannot_be_known_is_none(prices: Prices) -> None:
    """No entry, no count that the entry needs; a model without output needs no output count."""
    assert cost(prices, "other", 5, 5) is None
    assert cost(prices, "gpt-4o", None, 5) is None
    assert cost(prices, "gpt-4o", 5, None) is None
    assert cost(prices, "embed", 1_000_000, None) == 0.02
    assert parse_prices(b"", "empty").cost_usd(provider="", model="x", time_ns=1, tokens_in=1, tokens_out=1) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("price = 3", "not a price table"),
        ("[[price]]\nmodel = 'x'", "input_per_million"),
        ("[[price]]\nmodel = ''\ninput_per_million = 1", "model is empty"),
        ("[[price]]\nmodel = 'x'\ninput_per_million = -1", "price 1 ('x'): input_per_million = -1"),
        ("[[price]]\nmodel = 'x'\ninput_per_million = nan", "not a price"),
        ("[[price]]\nmodel = 'x'\ninput_per_million = 1\nper_token = 2", "per_token"),
        ("[[price]]\nmodel = 'x'\ninput_per_million = 1\n" * 2, "price 2 ('x'): there is another"),
        ("]", "not a price table"),
    ],
)
def test_a_mistake_is_refused_with_its_place(text: str, said: str) -> None:
    """Nothing is guessed or ignored."""
    with pytest.raises(InvalidArgument) as caught:
        parse_prices(text.encode(), "prices.toml")
    assert said in str(caught.value)
    assert str(caught.value).startswith("prices.toml")


def test_the_version_is_said_or_made_from_the_bytes(tmp_path: Path) -> None:
    """So that a span can say what its cost was made with."""
    assert parse_prices(TABLE, "t").version == "t1"
    file = tmp_path / "p.toml"
    file.write_text("[[price]]\nmodel = 'x'\ninput_per_million = 1\n")
    assert len(load_prices(file).version) == 12
    with pytest.raises(NotFound):
        load_prices(tmp_path / "none.toml")
