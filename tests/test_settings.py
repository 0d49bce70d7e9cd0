"""Settings of tools: tables of mist.toml under variables under flags; durations and sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Struct

from mist.cli.settings import TEMPLATE, Settings
from mist.config import Layer, MistConfig, env_layers, load_config, merge, shown, toml_layer, unknown_variables
from mist.errors import InvalidArgument
from mist.quantities import Duration, Size
from mist.tools.tokentrace.alerts.rules import configured
from mist.tools.tokentrace.settings import TokenTraceSettings


def table(text: str) -> TokenTraceSettings:
    return merge(Settings, [toml_layer(f"[tokentrace]\n{text}".encode(), "mist.toml")]).value.tokentrace


def test_file_then_environment_then_flags(tmp_path: Path) -> None:
    """Later ones win key by key, and each value says where it came from."""
    (tmp_path / "mist.toml").write_text('[tokentrace]\nstream = "a"\nretain = "7d"\nlisten = "127.0.0.1:1"\n')
    env = {"HOME": str(tmp_path), "MIST_TOKENTRACE__RETAIN": "1h30m", "MIST_TOKENTRACE_LISTEN": ":2"}
    loaded = load_config({"tokentrace": {"listen": ":3"}}, schema=Settings, env=env, cwd=tmp_path)
    got = loaded.value.tokentrace
    assert (got.stream, got.retain, got.listen) == ("a", 5400.0, ":3")
    origins = {k.removeprefix("tokentrace."): v for k, v in loaded.origins.items() if k.startswith("tokentrace.")}
    assert origins["stream"].endswith("mist.toml")
    assert (origins["retain"], origins["listen"]) == ("MIST_TOKENTRACE__RETAIN", "flag")
    assert origins["store"] == "default"


def test_defaults_are_what_the_template_says() -> None:
    """The template names every setting; uncommented it is valid and changes nothing but the example rule."""
    text = "\n".join(line.removeprefix("# ") for line in TEMPLATE.splitlines()[2:])
    got = merge(Settings, [toml_layer(text.encode(), "template")])
    assert got.value.tokentrace.alert_rules == (
        {"metric": "error_rate", "op": ">", "threshold": 0.1, "level": "warning"},
    )
    assert shown(Settings()) == {**shown(got.value), "tokentrace": {**shown(got.value.tokentrace), "alert_rules": []}}
    assert {k for k, v in got.origins.items() if v == "default"} == set()


def test_unknown_keys_are_refused_with_a_hint() -> None:
    """A typing error names its neighbour; a key of the seed that is gone says what to write."""
    for text, hint in (("retian = '7d'", "retain"), ("max_spans = 5", "retain_bytes"), ("retain_days = 3", "30d")):
        with pytest.raises(InvalidArgument) as refused:
            table(text)
        assert "unknown key 'tokentrace." in refused.value.message
        assert hint in refused.value.hint
    with pytest.raises(InvalidArgument, match="same setting"):
        table('addr = ":1"\nlisten = ":2"')
    with pytest.raises(InvalidArgument, match=r"alert_rules 1: unknown key 'windw'.*'window'"):
        table("[[tokentrace.alert_rules]]\nmetric = 'error_rate'\nop = '>'\nthreshold = 1\nwindw = '1h'")


def test_keys_of_the_seed() -> None:
    """addr, alert_cooldown with a unit, and the rules table that the seed's parser lost."""
    got = table(
        "addr = ':8700'\nalert_cooldown = '10m'\n"
        "[[tokentrace.alert_rules]]\nmetric = 'error_rate'\nop = '>'\nthreshold = 0.5\nlevel = 'critical'\n"
        "[[tokentrace.alert_rules]]\nmetric = 'latency_p99'\nop = '<'\nthreshold = 1\n"
    )
    assert (got.listen, got.alert_cooldown) == (":8700", 600.0)
    rules = configured(got)
    assert [(r.metric, r.op, r.thresholds, r.cooldown_s) for r in rules] == [
        ("error_rate", ">", {"critical": 0.5}, 600), ("latency_p99", "<", {"warning": 1.0}, 600),
    ]  # fmt: skip
    for bad in ("alert_cooldown = 300", "[[tokentrace.alert_rules]]\nmetric = 'm'\nop = '!='\nthreshold = 1"):
        with pytest.raises(InvalidArgument):
            table(bad)


def test_what_cannot_be_right_is_refused() -> None:
    """Limits of zero, shares above one, names that name no stream."""
    for bad in (
        "[tokentrace.sample]\nrate = 1.1",
        "[tokentrace.sample]\nkeep = [{}]",
        "[tokentrace.redact]\nrules = [{ name = 'x', pattern = '(a+)+b' }]",
        "[[tokentrace.alerts]]\nname = 'x'\nmetric = 'error_rat'\nthreshold = 0.5",
        "stream = 'a.b'",
        "requests_max = 0",
        "body_bytes_max = 0",
        "read_timeout = 0",
        "drain = '0'",
    ):
        with pytest.raises(InvalidArgument):
            table(bad)


class Inner(Struct, frozen=True):
    b_c: int = 0
    d: tuple[str, ...] = ()


class Middle(Struct, frozen=True):
    c: int = 0


class Ambiguous(MistConfig, frozen=True, kw_only=True):
    a: Inner = Inner()
    a_b: Middle = Middle()


def test_variables() -> None:
    """Two names of one key are refused when both are set, and so is a single underscore that could mean two keys."""

    def read(**env: str) -> Ambiguous:
        return merge(Ambiguous, env_layers(Ambiguous, env)).value

    assert read(MIST_A__B_C="1").a.b_c == 1
    assert read(MIST_A_B__C="1").a_b.c == 1
    with pytest.raises(InvalidArgument, match=r"could mean a\.b_c or a_b\.c"):
        read(MIST_A_B_C="1")
    with pytest.raises(InvalidArgument, match=r"both set a\.d"):
        read(MIST_A__D="1", MIST_A_D="2")
    assert read(MIST_A_D="x, y ,").a.d == ("x", "y")
    assert unknown_variables(Ambiguous, {"MIST_A_D": "", "MIST_A__D": "", "MIST_A_E": ""}) == ["MIST_A_E"]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("250ms", 0.25),
        ("30s", 30),
        ("5m", 300),
        ("1h30m", 5400),
        ("7d", 604800),
        ("2w", 1209600),
        ("1.5h", 5400),
        ("0", 0),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    """Units are read, and written back exactly."""
    assert Duration(text) == seconds
    assert Duration(str(Duration(text))) == seconds


@pytest.mark.parametrize("bad", ["", "7", "-1s", "7 d", "d", "1s x", "1e9s", "s1", 7, 7.5, True, None, "9" * 50 + "s"])
def test_what_is_no_duration(bad: object) -> None:
    with pytest.raises(InvalidArgument):
        Duration(bad)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("10GiB", 10 * 2**30),
        ("512KiB", 2**19),
        ("1.5MB", 1_500_000),
        ("4096", 4096),
        (4096, 4096),
        ("1k", 1024),
        ("2 TiB", 2**41),
        ("0", 0),
    ],
)
def test_sizes(text: object, size: int) -> None:
    """Binary and decimal units, bare bytes; written back exactly."""
    assert Size(text) == size
    assert Size(str(Size(text))) == size


@pytest.mark.parametrize("bad", ["", "GiB", "-1", -1, "10 parsecs", 1.5, True, None, "1.5.5MB", "9" * 50])
def test_what_is_no_size(bad: object) -> None:
    with pytest.raises(InvalidArgument):
        Size(bad)


@given(st.integers(0, 10**12), st.integers(0, 2**60))
def test_quantities_come_back(milliseconds: int, size: int) -> None:
    """Whatever is shown reads back as the same value, to the millisecond and to the byte."""
    duration = Duration(f"{milliseconds}ms")
    assert abs(Duration(str(duration)) - duration) < 1e-3
    assert Size(str(Size(size))) == size


def test_layer_origin_is_named_in_type_errors() -> None:
    """The message says where, what and why."""
    with pytest.raises(InvalidArgument, match=r"MIST_TOKENTRACE__REQUESTS_MAX: tokentrace.requests_max = 'many'"):
        merge(Settings, [Layer("MIST_TOKENTRACE__REQUESTS_MAX", {"tokentrace": {"requests_max": "many"}})])
