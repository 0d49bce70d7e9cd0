"""Settings of InferMux, what a name means, and in which order candidates are asked."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import fields

from mist.cli.settings import Settings
from mist.config import merge, toml_layer
from mist.errors import InvalidArgument, MistError, NotAuthorised, NotFound, Overloaded
from mist.tools.infermux.chat import ChatMessage, ChatRequest, Usage
from mist.tools.infermux.costs import Costs, Size, to_nano
from mist.tools.infermux.keys import Keys
from mist.tools.infermux.limits import Limits, Slots, Window
from mist.tools.infermux.naming import Catalogue, Target
from mist.tools.infermux.routing import Ask, Candidate, PeakEwma, ordered, rendezvous
from mist.tools.infermux.settings import (
    BreakerSettings,
    BudgetSettings,
    GroupSettings,
    InferMuxSettings,
    KeySettings,
    ProviderSettings,
    RoutingSettings,
)

TWO = """
[[infermux.providers]]
name = "a"
type = "openai"
base_url = "http://127.0.0.1:1/v1"
models = ["small", "large"]
aliases = { "gpt" = "large" }
[[infermux.providers]]
name = "b"
type = "openai"
base_url = "http://127.0.0.1:2/v1"
models = ["large", "org/huge"]
priority = 1
"""


def table(text: str) -> InferMuxSettings:
    return merge(Settings, [toml_layer(text.encode(), "mist.toml")]).value.infermux


def targets(catalogue: Catalogue, name: str, provider: str = "") -> list[list[str]]:
    return [[t.name for t in stage.targets] for stage in catalogue.plan(name, provider).stages]


# --- settings


def test_without_a_table_there_is_echo() -> None:
    got = table("")
    assert [(p.name, p.type, p.models) for p in got.asked] == [("echo", "echo", ("echo",))]
    assert targets(Catalogue(got), "auto") == [["echo/echo"]]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[[infermux.providers]]\nname = 'x'\ntype = 'openai'", r"providers 'x': base_url is missing"),
        ("[[infermux.providers]]\nname = 'x'\ntype = 'opnai'", "infermux.providers"),
        ("[[infermux.providers]]\nname = 'x'\ntype = 'echo'\nheft = 2", "heft"),
        ("[[infermux.providers]]\nname = 'x/y'\ntype = 'echo'", "providers: name = 'x/y'"),
        ("[[infermux.providers]]\nname = 'x'\ntype = 'echo'\nweight = 0", "weight = 0"),
        ("[[infermux.providers]]\nname = 'x'\ntype = 'echo'\ntimeout = '0'", "timeout = 0"),
        ("[[infermux.providers]]\nname = 'x'\ntype = 'replay'", "recordings is missing"),
        ("[[infermux.providers]]\nname = 'x'\ntype = 'command'", "argv is missing"),
        ("[[infermux.providers]]\nname = 'x'\ntype = 'echo'\napi_key = 'sk-123'", "api_key holds a key"),
        ("[[infermux.providers]]\nname = 'x'\ntype = 'echo'\nmodels = ['m']\naliases = {a = 'n'}", r"aliases\.a = 'n'"),
        (TWO + "[[infermux.providers]]\nname = 'a'\ntype = 'echo'", "two 'a'"),
        (TWO + "[infermux.aliases]\nx = 'nothing'", r"infermux.aliases.x = 'nothing'"),
        (TWO + "[infermux.aliases]\nx = 'y'\ny = 'x'", "circle"),
        (TWO + "[[infermux.groups]]\nname = 'g'\nmodels = []", "'g': models is empty"),
        (TWO + "[[infermux.groups]]\nname = 'g'\nmodels = ['small']\nproviders = ['c']", "no provider 'c'"),
        (TWO + "[[infermux.groups]]\nname = 'g'\nmodels = ['small']\nfallbacks = ['c']", "fallbacks = 'c'"),
        (TWO + "[[infermux.groups]]\nname = 'g'\nmodels = ['g']", "'g' is a group"),
        ("[infermux.routing]\nstrategy = 'fastest'", "infermux.routing.strategy"),
        ("[infermux.routing]\nattempts_max = 0", r"infermux\.routing\.attempts_max"),
        ("[infermux.routing]\nsticky = 'x'", r"infermux\.routing\.sticky"),
        ("[infermux.breaker]\nfailures_max = 0", r"infermux\.breaker"),
        ("[infermux.breaker]\nfailure_rate = 1.5", r"infermux\.breaker"),
        ("[[infermux.budgets]]\nlimit_usd = 'much'", "limit_usd = 'much'"),
        ("[[infermux.budgets]]\nlimit_usd = -1", "limit_usd = -1"),
        ("[[infermux.budgets]]\nlimit_usd = '0.0000000001'", "nine decimals"),
        ("[[infermux.budgets]]\nlimit_usd = 1\nkey = 'a'\nteam = 'b'", "exclude one another"),
        ("[[infermux.budgets]]\nlimit_usd = 1\naction = 'model_override'", "belong together"),
        ("[[infermux.budgets]]\nlimit_usd = 1\nperiod = 'year'", "period"),
        ("[[infermux.keys]]\nname = 'k'", "one of sha256 and env"),
        ("[[infermux.keys]]\nname = 'k'\nsha256 = 'abc'", "64 hex digits"),
        ("[infermux]\nrequests_max = 0", "requests_max"),
        ("[infermux]\nstream = 'a.b'", "a.b"),
    ],
)
def test_what_cannot_be_right_is_refused(text: str, says: str) -> None:
    """Where it stands is in the message."""
    with pytest.raises(InvalidArgument, match=says):
        table(text)


def test_the_names_of_the_documents() -> None:
    """Their breaker table is read; what has no counterpart says what to write."""
    got = table(
        "[infermux.breaker]\nconsecutive_failures = 3\nerror_rate_threshold = 0.5\nmin_requests = 10\nrecovery_window = '10s'"
    )
    policy = got.breaker.policy()
    assert (policy.failures_max, policy.failure_rate, policy.volume_min, policy.open_s) == (3, 0.5, 10, 10.0)
    with pytest.raises(InvalidArgument, match=r"unknown key .infermux\.breaker\.latency_p95_ms"):
        table("[infermux.breaker]\nlatency_p95_ms = 5000")


def test_money_is_exact() -> None:
    """A limit is read as it is written, as text or as a number."""
    got = table(
        "[[infermux.budgets]]\nlimit_usd = 0.1\n[[infermux.budgets]]\nlimit_usd = '12.000000001'\nperiod = 'day'"
    )
    assert [b.limit_nano for b in got.budgets] == [100_000_000, 12_000_000_001]
    assert [b.name for b in got.budgets] == ["all/month", "all/day"]


# --- names


def test_what_a_name_means() -> None:
    """Aliases, groups, models, other names of them, provider/model, a provider, in this order; priority sorts."""
    got = table(
        TWO + "[infermux.aliases]\nfast = 'small'\nbest = 'g'\n"
        "[[infermux.groups]]\nname = 'g'\nmodels = ['org/huge', 'large']\nfallbacks = ['fast', 'large']\nstrategy = 'cost'\n"
    )
    catalogue = Catalogue(got)
    assert targets(catalogue, "small") == [["a/small"]]
    assert targets(catalogue, "fast") == [["a/small"]]
    assert targets(catalogue, "large") == [["a/large", "b/large"], ["a/small"]]  # as its group says: its fallbacks
    assert targets(catalogue, "gpt") == [["a/large"]]
    assert targets(catalogue, "b/large") == [["b/large"]]
    assert targets(catalogue, "a/gpt") == [["a/large"]]
    assert targets(catalogue, "org/huge")[0] == ["b/org/huge"]
    assert targets(catalogue, "b") == [["b/large"]]
    assert targets(catalogue, "g") == targets(catalogue, "best") == [["a/large", "b/org/huge", "b/large"], ["a/small"]]
    assert targets(catalogue, "auto") == targets(catalogue, "") == [["a/small", "b/large"]]
    assert targets(catalogue, "large", "b") == [["b/large"]]
    plan = catalogue.plan("g")
    assert (plan.group, plan.stages[0].strategy, plan.stages[1].strategy) == ("g", "cost", "priority")
    for name, provider in (("nothing", ""), ("b/small", ""), ("small", "b"), ("small", "c"), ("c/small", "")):
        with pytest.raises(NotFound) as missing:
            catalogue.plan(name, provider)
        assert "known: " in missing.value.hint


def test_whoever_takes_anything_is_asked_for_what_nobody_lists() -> None:
    got = table(TWO + "[[infermux.providers]]\nname = 'any'\ntype = 'echo'\n")
    catalogue = Catalogue(got)
    assert targets(catalogue, "small") == [["a/small"]]
    assert targets(catalogue, "new-model") == [["any/new-model"]]
    assert targets(catalogue, "any/x/y") == [["any/x/y"]]
    plan = catalogue.plan("auto")
    assert [t.name for t in plan.stages[0].targets] == ["a/small", "b/large"]
    assert [(o.provider, o.reason) for o in plan.left_out] == [("any", "it lists no models")]
    assert targets(Catalogue(table(TWO + "[infermux.routing]\nauto = 'large'")), "auto") == [["a/large", "b/large"]]


# --- orders


def candidates(*weights: float, priorities: tuple[int, ...] = ()) -> list[Candidate]:
    found = [
        Candidate(Target(provider=f"p{i}", model="m", weight=w, priority=priorities[i] if priorities else 0))
        for i, w in enumerate(weights)
    ]
    return sorted(found, key=lambda c: c.target.priority)


def names(found: list[Candidate]) -> list[str]:
    return [c.target.provider for c in found]


def order(
    strategy: Any, found: list[Candidate], *, policy: RoutingSettings | None = None, draw: Any = None, **ask: Any
) -> list[str]:
    ask.setdefault("now", 0.0)
    return names(
        ordered(strategy, found, Ask(**ask), policy or RoutingSettings(), draw=draw or random.Random(1).random)
    )


def test_weighted_is_in_proportion_and_smooth() -> None:
    """5:1:1 is a a b a c a a, not five times a; looking takes no turn."""
    found = candidates(5, 1, 1)
    firsts = []
    for _ in range(14):
        looked = ordered("weighted", found, Ask(now=0), RoutingSettings(), draw=random.random, look=True)
        firsts.append(order("weighted", found)[0])
        assert names(looked)[0] == firsts[-1]
    assert firsts == ["p0", "p0", "p1", "p0", "p2", "p0", "p0"] * 2
    two = candidates(5, 1)
    turns = [order("round_robin", two)[0] for _ in range(4)]
    assert turns == ["p0", "p1", "p0", "p1"]


def test_priority_comes_before_every_strategy() -> None:
    for strategy in ("priority", "round_robin", "weighted", "least_latency", "cost", "sticky"):
        found = candidates(1, 1, 1, 1, priorities=(1, 0, 1, 0))
        for _ in range(5):
            assert set(order(strategy, found, sticky=lambda: "k")[:2]) == {"p1", "p3"}


def test_sticky_keeps_the_others_where_they_are() -> None:
    """Without one candidate its keys spread over the others, and no other key moves. Weights are shares."""
    found = candidates(1, 1, 1, 1)
    keys = [f"key {i}" for i in range(400)]
    before = {k: order("sticky", found, sticky=lambda k=k: k)[0] for k in keys}
    left = [c for c in found if c.target.provider != "p2"]
    after = {k: order("sticky", left, sticky=lambda k=k: k)[0] for k in keys}
    moved = Counter(after[k] for k in keys if before[k] == "p2")
    assert all(after[k] == before[k] for k in keys if before[k] != "p2")
    assert set(moved) == {"p0", "p1", "p3"}
    assert min(Counter(before.values()).values()) > 60
    heavy = Counter(order("sticky", candidates(3, 1), sticky=lambda k=k: k)[0] for k in keys)
    assert 0.65 < heavy["p0"] / len(keys) < 0.85
    assert rendezvous("\ud800", found[0].target) > 0


def test_an_unknown_price_comes_last() -> None:
    prices = {"p0": None, "p1": 30, "p2": 10, "p3": 0}
    found = candidates(1, 1, 1, 1)
    assert order("cost", found, cost=lambda t: prices[t.provider]) == ["p3", "p2", "p1", "p0"]


def test_the_unmeasured_get_a_bounded_share_one_at_a_time() -> None:
    """Measured ones are asked; about `probe_share` of the calls go to the other, none while it has a call under way."""
    policy = RoutingSettings(probe_share=0.1)
    found = candidates(1, 1, 1)
    for c in found[:2]:
        c.whole.observe(0.5, 0.0, 10)
    draw = random.Random(3).random
    firsts = Counter(order("least_latency", found, policy=policy, draw=draw)[0] for _ in range(2000))
    assert 120 < firsts["p2"] < 280
    found[2].in_flight = 1
    assert all(order("least_latency", found, policy=policy, draw=draw)[0] != "p2" for _ in range(200))
    # what is long ago is unmeasured again
    assert order("least_latency", found[:2], policy=policy, draw=lambda: 0.0, now=1000.0)


def test_less_to_wait_comes_first() -> None:
    """Latency times what is under way; streams are measured by their first piece."""
    found = candidates(1, 1)
    found[0].whole.observe(1.0, 0.0, 10)
    found[1].whole.observe(1.5, 0.0, 10)
    assert order("least_latency", found) == ["p0", "p1"]
    found[0].in_flight = 1
    assert order("least_latency", found) == ["p1", "p0"]
    found[0].in_flight = 0
    found[0].first.observe(0.9, 0.0, 10)
    found[1].first.observe(0.1, 0.0, 10)
    assert order("least_latency", found, streamed=True) == ["p1", "p0"]


def test_two_choices_do_not_herd() -> None:
    """Of three, the slowest is never first, and the fastest is not always."""
    found = candidates(1, 1, 1)
    for c, s in zip(found, (0.1, 0.2, 0.3), strict=True):
        c.whole.observe(s, 0.0, 10)
    draw = random.Random(5).random
    firsts = Counter(order("least_latency", found, draw=draw)[0] for _ in range(600))
    assert set(firsts) == {"p0", "p1"}
    assert firsts["p1"] > 100


def test_the_average_rises_at_once_and_falls_with_time() -> None:
    ewma = PeakEwma()
    ewma.observe(0.1, 0.0, 10)
    ewma.observe(2.0, 1.0, 10)
    assert ewma.value == 2.0
    ewma.observe(0.1, 1.0, 10)
    assert ewma.value == 2.0  # no time has passed
    ewma.observe(0.1, 11.0, 10)
    assert math.isclose(ewma.value, 0.1 + 1.9 / math.e)


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(["priority", "round_robin", "weighted", "least_latency", "cost", "sticky"]),
    st.lists(
        st.tuples(st.floats(0.1, 100), st.integers(0, 2), st.integers(0, 3), st.floats(0, 10)), min_size=1, max_size=6
    ),
    st.randoms(use_true_random=False),
)
def test_everybody_is_in_the_order_once(strategy: Any, made: list[Any], rng: random.Random) -> None:
    """Whatever is known of them, and the same again with the same randomness."""

    def build() -> list[Candidate]:
        found = candidates(*(m[0] for m in made), priorities=tuple(m[1] for m in made))
        for c, m in zip(found, made, strict=True):
            c.in_flight = m[2]
            if m[3] > 5:
                c.whole.observe(m[3], 0.0, 10)
        return found

    seed = rng.random()
    one = order(strategy, build(), draw=random.Random(seed).random, sticky=lambda: "x")
    assert sorted(one) == sorted(names(build()))
    assert one == order(strategy, build(), draw=random.Random(seed).random, sticky=lambda: "x")


# --- rates and places


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 20), st.lists(st.tuples(st.floats(0, 20), st.integers(1, 8)), max_size=60))
def test_no_minute_has_more_than_the_limit(limit: int, calls: list[tuple[float, int]]) -> None:
    """Over any 60 seconds; only a call larger than the limit passes, alone. And what is refused fits when it says."""
    window = Window(limit)
    now = 0.0
    given: list[tuple[float, int]] = []
    for pause, weight in calls:
        now += pause
        if window.fits(weight, now):
            window.take(weight, now)
            given.append((now, weight))
        else:
            wait = window.wait_s(weight, now)
            assert wait > 0
            assert window.fits(weight, now + wait)  # asked of the future, which forgets what is over then
            now += wait
    for at, _ in given:
        inside = [w for t, w in given if at <= t < at + 60]
        assert sum(inside) <= limit or len(inside) == 1


def test_what_was_taken_can_be_corrected() -> None:
    limits = Limits(2, 1000)
    taken = limits.take(900, 5.0)
    assert limits.wait_s(200, 6.0) > 50
    limits.settle(taken, 100)
    assert limits.wait_s(200, 6.0) == 0
    limits.undo(limits.take(500, 6.0))
    assert limits.requests is not None
    assert limits.requests.used(6.0) == 1
    assert limits.wait_s(1, 66.5) == 0
    assert not Limits(0, 0)


def test_slots_are_fair_and_lose_nothing() -> None:
    """First come, first served; a cancelled wait takes no place, also when its turn had just come."""
    import asyncio

    async def body() -> None:
        slots = Slots(1, 2)
        await slots.take()
        order: list[int] = []

        async def wait(n: int) -> None:
            await slots.take()
            order.append(n)

        one, two = asyncio.create_task(wait(1)), asyncio.create_task(wait(2))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await slots.take()
        slots.give_back()  # one's turn, but it is cancelled before it can run
        one.cancel()
        await asyncio.wait({one, two})
        assert order == [2]
        assert (slots.in_use, slots.waiting) == (1, 0)
        slots.give_back()
        assert slots.in_use == 0

    asyncio.run(body())


# --- sizes, prices, keys


def test_how_large_a_question_is() -> None:
    """More than most have, never nothing; pictures, tools and `n` count."""
    plain = Size(ChatRequest(model="m", messages=(ChatMessage(role="user", content="a" * 300),)), 4096)
    assert (plain.tokens_in, plain.tokens_out, plain.stated) == (108, 4096, 0)
    chinese = Size(ChatRequest(model="m", messages=(ChatMessage(role="user", content="日本語" * 100),)), 1)
    assert chinese.tokens_in == 308
    parts: list[dict[str, Any]] = [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "data:…"}}]
    full = Size(
        ChatRequest(
            model="m", messages=(ChatMessage(role="user", content=parts),),
            params={"max_tokens": 10, "n": 3, "tools": [{"type": "function"}]},
        ),
        4096,
    )  # fmt: skip
    assert (full.tokens_out, full.stated, full.pictures) == (30, 30, 1)
    assert full.tokens_in > 1500


def test_prices_by_provider_then_type() -> None:
    """Unknown is None; echo costs what the seed's does, replay nothing; billionths are rounded up."""
    from mist.kit.prices import parse_prices

    got = table(
        TWO
        + "[[infermux.providers]]\nname = 'e'\ntype = 'echo'\n[[infermux.providers]]\nname = 'r'\ntype = 'replay'\nrecordings = 'x'"
    )
    prices = parse_prices(
        b"[[price]]\nprovider = 'openai'\nmodel = 'large'\ninput_per_million = 2.5\noutput_per_million = 10\n"
        b"[[price]]\nprovider = 'b'\nmodel = 'large'\ninput_per_million = 1\noutput_per_million = 1\n",
        "x",
    )
    costs = Costs(prices, got.asked)
    usage = Usage(tokens_in=512, tokens_out=128)
    assert costs.actual("a", "large", usage, 0) == pytest.approx(0.00256)
    assert costs.actual("b", "large", usage, 0) == pytest.approx(0.00064)
    assert costs.actual("a", "small", usage, 0) is None
    assert costs.actual("a", "large", Usage(tokens_in=5), 0) is None
    assert costs.actual("e", "echo", Usage(tokens_in=6, tokens_out=7), 0) == pytest.approx(0.00013)
    assert costs.estimate("r", "large", 1000, 1000, 0) == 0
    assert (to_nano(0.1 + 0.2), to_nano(1e-10), to_nano(0.0)) == (300_000_000, 1, 0)


def test_who_shows_which_key() -> None:
    """By digest or variable; a key nobody knows is refused without saying which are known."""
    got = table(
        "[[infermux.keys]]\nname = 'ci'\nenv = 'CI_KEY'\nteam = 'build'\nproject = 'x'\n"
        "[[infermux.keys]]\nname = 'ann'\nsha256 = '2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b'\n"
    )
    keys = Keys(got, {"CI_KEY": "k1"})
    caller = keys.caller("k1", project="mine")
    assert (caller.key, caller.team, caller.project) == ("ci", "build", "x")
    assert keys.caller("secret", project="mine").project == "mine"
    for shown in ("", "k2", "K1"):
        with pytest.raises(NotAuthorised) as refused:
            keys.caller(shown)
        assert "ci" not in str(refused.value)
    with pytest.raises(MistError, match="CI_KEY"):
        Keys(got, {})
    assert Keys(table(""), {}).caller("anything").key == ""


def test_the_page_of_the_settings() -> None:
    """Its example is right, and it names every key there is."""
    page = (Path(__file__).parents[3] / "docs/reference/infermux-settings.md").read_text()
    got = table(re.findall(r"```toml\n(.*?)```", page, re.DOTALL)[0])
    catalogue = Catalogue(got)
    assert targets(catalogue, "smart") == [
        ["openai/gpt-4o", "claude/claude-opus-4-5"],
        ["openai/gpt-4o-mini"],
        ["here/llama3.2"],
    ]
    for kind in (
        InferMuxSettings, ProviderSettings, GroupSettings, RoutingSettings, BreakerSettings, BudgetSettings, KeySettings,
    ):  # fmt: skip
        for field in fields(kind):
            assert f"`{field.encode_name}`" in page, (kind, field.encode_name)
