"""Redaction: what is taken out, what is left alone byte for byte, and that nothing survives in any form."""

from __future__ import annotations

import json
import re
import zlib
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Raw

from mist.config import Layer, merge
from mist.errors import InvalidArgument
from mist.protocol.codec import decode, encode
from mist.protocol.envelope import Envelope
from mist.tools.tokentrace.detectors import BUILT_IN, custom, luhn
from mist.tools.tokentrace.redact import LEVELS_MAX, Redactor
from mist.tools.tokentrace.settings import RedactRule, RedactSettings
from tests.tools.spanning import envelope, payload

ENV = {"KEY": "0123456789abcdef0123"}
ALL = RedactSettings(
    rules=(
        RedactRule(detect=("api_key", "bearer", "jwt", "private_key", "email", "card", "phone")),
        RedactRule(name="staff", pattern=r"EMP-[0-9]{6}", action="drop"),
        RedactRule(attrs=("*password*", "user.email")),
    )
)


def redacted(rules: RedactSettings, attrs: dict[str, Any]) -> dict[str, Any]:
    """The attributes after redaction."""
    out: dict[str, Any] = Redactor(rules, ENV)(envelope(attrs=attrs)).data()["attrs"]
    return out


def one(**rule: Any) -> RedactSettings:
    return RedactSettings(rules=(RedactRule(**rule),), key_env="KEY")


SECRETS = {
    "api_key": [
        "sk-abcdefghijklmnop1234", "sk-ant-api03-" + "x" * 90, "AKIAIOSFODNN7EXAMPLE", "ghp_" + "a1" * 18,
        "github_pat_" + "b2" * 20, "xoxb-123456789012-abcdef", "AIza" + "C" * 35, "hf_" + "d" * 34,
        "sk_live_" + "e" * 24, "SG." + "f" * 22 + "." + "g" * 43, "glpat-" + "h" * 20, "npm_" + "i" * 36,
    ],
    "bearer": ["Bearer abc123def456", "bearer  eHl6LjEyMw==", "BEARER " + "z" * 40],
    "jwt": ["eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmNHl0w5N"],
    "private_key": ["-----BEGIN RSA PRIVATE KEY-----\nMIIEow\nIBAAK\n-----END RSA PRIVATE KEY-----", "-----BEGIN PRIVATE KEY-----\nMII"],
    "email": ["anna.b+c@mail.example.com", "o'neil@example.org", "käthe@example.de"],
    "card": ["4111111111111111", "4111 1111 1111 1111", "5500-0000-0000-0004", "378282246310005", "6011111111111117"],
    "phone": ["+49 170 1234567", "+1 (415) 555-0100", "+442071838750"],
}  # fmt: skip
HARMLESS = {
    "api_key": ["task-force-for-everything", "risk-adjusted", "sk-short", "ghp_short", "AKIA"],
    "bearer": ["the bearer understood", "bearer certificates", "forbearer abc123def456"],
    "jwt": ["eyJhbGciOiJIUzI1NiJ9"],
    "private_key": ["-----BEGIN PUBLIC KEY-----", "a PRIVATE KEY"],
    "email": ["a@b", "@example.com", "3 @ 4.50"],
    "card": ["4111111111111112", "1700000000000000000", "4bf92f3577b34da6a3ce929d0e0e4736", "41111111111111110"],
    "phone": ["1 + 1 = 2", "+12", "0170 1234567"],
}


@pytest.mark.parametrize(("label", "secret"), [(k, v) for k, vs in SECRETS.items() for v in vs])
def test_a_secret_is_found_wherever_it_stands(label: str, secret: str) -> None:
    """Alone, in a sentence, next to quotes and brackets; the sentence around it stays."""
    rules = one(detect=(label,))
    mask = f"[{label}]"
    assert redacted(rules, {"a": secret}) == {"a": mask}
    if not secret.startswith("-----BEGIN PRIVATE"):  # one without an end takes all that follows
        assert redacted(rules, {"a": f'it is "{secret}", see'}) == {"a": f'it is "{mask}", see'}


@pytest.mark.parametrize(("label", "text"), [(k, v) for k, vs in HARMLESS.items() for v in vs])
def test_what_only_resembles_a_secret_stays(label: str, text: str) -> None:
    """Words, numbers that fail their check, ids."""
    env = envelope(attrs={"a": text})
    assert Redactor(one(detect=(label,)), ENV)(env) is env


def test_a_card_number_is_found_among_other_digits() -> None:
    """Behind and before other groups; as a number of JSON; the number of a clock is none."""
    rules = one(detect=("card",))
    assert redacted(rules, {"a": "22 4111 1111 1111 1111 12/29"}) == {"a": "22 [card] 12/29"}
    assert redacted(rules, {"a": 4111111111111111, "b": 1700000000000000000, "c": 4111111111111111.0}) == {
        "a": "[card]", "b": 1700000000000000000, "c": "[card].0",
    }  # fmt: skip
    assert luhn("79927398713")
    assert not luhn("79927398710")


def test_nothing_to_do_means_the_same_bytes() -> None:
    """The very envelope comes back; its odd spelling and its checksum are its own. Other types are not looked at."""
    raw = b'{ "trace_id" : "t", "attrs":{"b":1e2,  "a":"\\u00e9\\n", "a":"\\/"} }'
    env = Envelope.new("trace.span", Raw(raw), source="s", checksum=True)
    assert Redactor(ALL, ENV)(env) is env
    other = Envelope.new("infer.request", {"a": "sk-abcdefghijklmnop1234"}, source="s")
    assert Redactor(ALL, ENV)(other) is other


def test_what_changed_has_a_new_checksum_where_it_had_one() -> None:
    """The result is a good envelope."""
    for checksum in (True, False):
        env = Envelope.new("trace.span", payload(attrs={"a": "x@example.com"}), source="s", checksum=checksum)
        out = Redactor(ALL, ENV)(env)
        assert out.checksum == (zlib.crc32(out.payload) if checksum else 0)
        assert decode(encode(out)) == out
        assert out.data() == payload(attrs={"a": "[email]"})


def test_the_three_actions() -> None:
    """mask says what it was; hash says whether it is the same; drop takes the key along."""
    text = "from a@example.com"
    assert redacted(one(detect=("email",)), {"x": text, "y": 1}) == {"x": "from [email]", "y": 1}
    hashed = redacted(one(detect=("email",), action="hash"), {"x": text, "y": "a@example.com", "z": "b@example.com"})
    assert re.fullmatch(r"from \[email:h[0-9a-f]{16}\]", hashed["x"])
    assert hashed["x"] == f"from {hashed['y']}"
    assert hashed["z"] != hashed["y"]
    assert redacted(one(detect=("email",), action="drop"), {"x": text, "y": [1, text], "z": {"a@example.com": 1}}) == {
        "y": [1], "z": {},
    }  # fmt: skip
    by_name = {"user.email": 5, "DB_Password": "p", "n": [{"password2": {"a": 1}}], "pass": 1}
    rule = ("*password*", "user.email")
    assert redacted(one(attrs=rule), by_name) == {
        "user.email": "[redacted]", "DB_Password": "[redacted]", "n": [{"password2": "[redacted]"}], "pass": 1,
    }  # fmt: skip
    assert redacted(one(attrs=rule, action="drop"), by_name) == {"n": [{}], "pass": 1}
    once = redacted(one(attrs=rule, action="hash"), by_name)
    assert once == redacted(one(attrs=rule, action="hash"), by_name)
    assert once["user.email"].startswith("[hash:h")


CONTENTFUL = {
    "model": "m", "prompt": "secret words", "gen_ai.input.messages": [{"role": "user", "content": "abc"}],
    "gen_ai.prompt.0.content": "x", "gen_ai.usage.prompt_tokens": 5, "tokens_in": 3, "otel.events": [{"name": "e"}],
    "meta": {"response": "yes", "kind": "k"},
}  # fmt: skip


def test_content_is_kept_measured_or_left_out() -> None:
    """Names of prompts and answers, at any depth; figures stay."""
    assert redacted(RedactSettings(capture="full"), CONTENTFUL) == CONTENTFUL
    kept = {"model": "m", "gen_ai.usage.prompt_tokens": 5, "tokens_in": 3}
    assert redacted(RedactSettings(capture="none"), CONTENTFUL) == {**kept, "meta": {"kind": "k"}}
    assert redacted(RedactSettings(capture="metadata"), CONTENTFUL) == {
        **kept, "prompt": {"chars": 12}, "gen_ai.input.messages": {"items": 1, "chars": 7},
        "gen_ai.prompt.0.content": {"chars": 1}, "otel.events": {"items": 1, "chars": 1},
        "meta": {"response": {"chars": 3}, "kind": "k"},
    }  # fmt: skip
    mine = RedactSettings(capture="none", content=("model",))
    assert "model" not in redacted(mine, CONTENTFUL)
    assert "prompt" in redacted(mine, CONTENTFUL)


def test_a_name_is_found_in_every_spelling() -> None:
    """Escaped, with quotes in it, given twice: the second copy hides nothing, and neither does the first."""
    for text in (
        '{"attrs":{"\\u0070assword":"geheim"}}', '{"attrs":{"a\\"password":"geheim"}}', '{"attrs":{"x\\\\password":"geheim"}}',
        '{"attrs":{"password":"geheim","password":1}}', '{"attrs":{"a":{"password" \n: {"b":"geheim"}}}}',
        '{"attrs":{"":"","x\\",\\":":"\\"a","password":"geheim"}}', '{"password":"geheim"}',
    ):  # fmt: skip
        env = Envelope.new("trace.span", Raw(text.encode()), source="s")
        assert b"geheim" not in bytes(Redactor(ALL, ENV)(env).payload), text


def test_a_name_is_meant_wherever_opentelemetry_put_it() -> None:
    """Resource and scope attributes, a map that has a key twice, and the column that an attribute was copied to."""
    attrs = {
        "user": "anna", "user.id": "anna", "resource.user.email": "x", "otel.attr.resource.password": "x", "otel.scope.password": "x",
        "map": {"otel.kvlist": [["password", "x"], ["password", "y"], ["kind", "k"], "odd"]}, "model": "m",
    }  # fmt: skip
    rules = one(attrs=("user.*", "password", "resource.password"), action="drop")
    assert redacted(rules, attrs) == {"map": {"otel.kvlist": [["kind", "k"], "odd"]}, "model": "m"}


def test_identities_are_hashed_whole_so_that_two_stay_two() -> None:
    """Ids, source and tenant that hold a secret: masked without a key, hashed with one. Ids that are plain hex are never
    taken for card numbers."""
    raw = payload(trace_id="a@example.com", span_id="4111111111111111")
    env = Envelope.new("trace.span", raw, source="b@example.com", tenant="c@example.com", id="d@example.com")
    out = Redactor(ALL, ENV)(env)
    assert (out.source, out.tenant, out.id, out.data()["trace_id"]) == ("[email]",) * 4
    assert out.data()["span_id"] == "4111111111111111"
    keyed = Redactor(msgspec.structs.replace(ALL, key_env="KEY"), ENV)(env)
    assert len({keyed.source, keyed.tenant, keyed.id, keyed.data()["trace_id"]}) == 4
    assert all(x.startswith("[email:h") for x in (keyed.source, keyed.tenant, keyed.id))
    assert out.data()["start_ns"] == raw["start_ns"]


def test_a_payload_that_cannot_be_read_is_not_kept_with_its_secret() -> None:
    """It would lie in quarantine as it came. Without a secret it does."""
    bad = Envelope.new("trace.span", Raw(b'{"a":"x@example.com",}'), source="s")
    assert bytes(Redactor(ALL, ENV)(bad).payload) == b'"[redacted: not to be read]"'
    deep = b'{"a":' + b"[" * 900 + b'"x@example.com"' + b"]" * 900 + b"}"
    assert b"example" not in bytes(Redactor(ALL, ENV)(Envelope.new("trace.span", Raw(deep), source="s")).payload)
    text = "[" * 900 + '"\\u0078@example.com"' + "]" * 900
    out = redacted(ALL, {"a": text, "b": 2**70})
    assert "example" not in out["a"]
    assert out["b"] == 2**70
    harmless = Envelope.new("trace.span", Raw(b'{"a":1,}'), source="s")
    assert Redactor(ALL, ENV)(harmless) is harmless


def test_a_span_too_large_to_scan_is_cut_down() -> None:
    """Long texts go, figures stay; where there are too many short ones, the attributes go."""
    rules = RedactSettings(rules=ALL.rules, scan_chars_max=20_000)
    redact = Redactor(rules, ENV)
    out = redact(envelope(attrs={"model": "m", "prompt": "y" * 30_000, "mail": "x@example.com"})).data()["attrs"]
    assert out == {"model": "m", "prompt": "[redacted: 30000 characters, too long to scan]", "mail": "[email]"}
    many = redact(envelope(attrs={f"k{n}": "y" * 100 for n in range(300)})).data()
    assert many["attrs"] == {"redacted": "too large to scan"}
    assert many["operation"] == "chat"
    assert redact.too_large == 2


BAD: list[tuple[dict[str, Any], str]] = [
    ({"rules": [{}]}, "exactly one of attrs, detect and pattern"),
    ({"rules": [{"attrs": ["a"], "detect": ["email"]}]}, "exactly one"),
    ({"rules": [{"detect": ["mail"]}]}, "no detector 'mail'"),
    ({"rules": [{"attrs": ["a"], "action": "hash"}]}, "hash needs a key"),
    ({"rules": [{"attrs": ["a"], "action": "burn"}]}, "Invalid enum value 'burn'"),
    ({"rules": [{"pattern": "abc"}]}, "has a name"),
    ({"rules": [{"pattern": "abc", "name": "A B"}]}, "has a name"),
    ({"rules": [{"attrs": [""]}]}, "1 to 256"),
    ({"rules": [{"attrs": ["x" * 300]}]}, "1 to 256"),
    ({"rules": [{"name": "x", "pattern": "redacted"}]}, r"matches '\[redacted\]', which we put in"),
    ({"rules": [{"name": "mail", "pattern": "mail"}]}, "which we put in"),
    ({"rules": [{"attrs": ["a"]}] * 65}, "max 64"),
    ({"capture": "some"}, "Invalid enum value"),
    ({"captures": "full"}, "unknown key 'captures'"),
    ({"key_env": "GONE"}, "GONE is not set"),
    ({"key_env": "SHORT"}, "shorter than 16"),
    ({"scan_chars_max": 10}, "scan_chars_max"),
]


@pytest.mark.parametrize(("table", "message"), BAD, ids=lambda v: "" if isinstance(v, dict) else v[:30])
def test_settings_that_cannot_work_are_refused(table: dict[str, Any], message: str) -> None:
    """At load, with the reason."""
    with pytest.raises(InvalidArgument, match=message):
        Redactor(merge(RedactSettings, [Layer("mist.toml", table)]).value, {**ENV, "SHORT": "x"})


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(a+)+b", "a repeat without an end"), ("a*", "matches the empty text"), ("a*b", "a repeat without an end"), (".*", "empty"),
        ("(a{1,40}){1,40}b", "steps for each character"), ("a{1,90}a{1,90}b", "steps for each character"),
        ("a{1,5000}b", "above 1024"), ("^a", "no anchors"), ("a$", "no anchors"), (r"(a)\1", "no anchors"), ("a(?=b)", "no anchors"),
        ("(?<!a)b", "no anchors"), ("(", "not a regular expression"), ("x" * 1001, "1001 characters"), ("a+?", "a repeat without an end"),
        ("(?m)a", "flags"), ("(a|b+)c", "a repeat without an end"),
    ],
)  # fmt: skip
def test_patterns_that_could_hurt_are_refused(pattern: str, message: str) -> None:
    """Anything whose steps are not bounded, or that would look different inside a document."""
    with pytest.raises(InvalidArgument, match=message):
        custom("p", pattern)


@pytest.mark.parametrize(
    "pattern", ["EMP-[0-9]{6}", r"\bcust_[a-z0-9]{8,64}", "(?i)acme (?:key|token) [a-f0-9]{8,}", "a{1,20}+b{1,20}c"]
)
def test_patterns_that_cannot_hurt_are_taken(pattern: str) -> None:
    """Bounded repeats, alternatives, word boundaries, case folding, an open end."""
    assert custom("p", pattern).label == "p"


@pytest.mark.parametrize(
    "seed",
    [
        "a",
        "eyJ",
        "eyJ-",
        "a@",
        "a.",
        "a@a.",
        "sk-",
        "SG.",
        "4111 ",
        "41",
        "-----BEGIN PRIVATE KEY-----",
        "-",
        "Bearer ",
        "\\",
        '\\"',
    ],
)
def test_a_hostile_text_ends(seed: str) -> None:
    """A text made to make patterns go back. With a pattern that takes the square of its length this test runs into the
    suite's time limit; there is nothing to compare, so that a slow machine passes."""
    env = envelope(attrs={"a": seed * (200_000 // len(seed))})
    json.loads(bytes(Redactor(ALL, ENV)(env).payload))


# the property: nothing survives

words = st.text(alphabet="abcxyz ,.:;()[]{}<>/\\\"'\n\té€🌍", max_size=12)
secrets = st.sampled_from([(k, s) for k, v in SECRETS.items() for s in v] + [("staff", "EMP-123456")])


@st.composite
def documents(draw: st.DrawFn) -> tuple[str, bytes]:
    """A secret, and a payload with it somewhere: in a key, a value, a nested one, JSON within JSON, given twice, and with any
    of its characters escaped."""
    _, secret = draw(secrets)
    text = draw(words) + " " + secret + " " + draw(words)
    depth = draw(st.integers(0, LEVELS_MAX - 1))
    for _ in range(depth):
        inner: Any = draw(st.sampled_from([text, [text], {"k": text}, {text: 1}, {"a": "b", "c": [{"d": text}]}]))
        text = spelled(draw, inner)
    place = draw(st.sampled_from(["value", "key", "nested", "twice", "operation", "list", "top"]))
    value = spelled(draw, text)
    attrs = {
        "value": f'{{"a":{value}}}',
        "key": f"{{{value}:1}}",
        "nested": f'{{"a":{{"b":[1,{{"c":{value}}}]}}}}',
        "twice": f'{{"a":{value},"a":"b"}}',
        "list": f"[{value}]",
    }.get(place, "{}")
    operation = value if place == "operation" else '"chat"'
    top = f',"extra":{value}' if place == "top" else ""
    return secret, f'{{"trace_id":"t","operation":{operation},"attrs":{attrs}{top}}}'.encode()


def spelled(draw: st.DrawFn, value: Any) -> str:
    """JSON text, some of its characters as \\u escapes."""
    plain = json.dumps(value, ensure_ascii=draw(st.booleans()))
    if not draw(st.booleans()):
        return plain
    rng = draw(st.randoms(use_true_random=False))
    out, inside, skip = [], False, 0
    for at, char in enumerate(plain):
        if skip:
            skip -= 1
            out.append(char)
        elif char == "\\":
            skip = 5 if plain[at + 1] == "u" else 1
            out.append(char)
        elif char == '"':
            inside = not inside
            out.append(char)
        elif inside and ord(char) < 0x10000 and rng.random() < 0.2:
            out.append(f"\\u{ord(char):04x}")
        else:
            out.append(char)
    return "".join(out)


def forms(data: bytes) -> list[str]:
    """The document as it is stored, and with escapes resolved as often as there are any: the oracle, written on its own."""
    text, out = data.decode(), []
    for _ in range(12):
        out.append(text)
        text = re.sub(
            r"\\(u[0-9a-fA-F]{4}|.)",
            lambda m: chr(int(m[1][1:], 16)) if len(m[1]) == 5 else {"n": "\n", "t": "\t", "r": "\r"}.get(m[1], m[1]),
            text, flags=re.DOTALL,
        )  # fmt: skip
    return out


@settings(max_examples=300, deadline=None)
@given(documents())
def test_no_secret_survives_in_any_form(case: tuple[str, bytes]) -> None:
    """Whatever the place and the spelling: the secret is in none of the stored bytes, and they are JSON still."""
    secret, raw = case
    assert any(secret in form for form in forms(raw))  # the test puts it there
    out = bytes(Redactor(ALL, ENV)(Envelope.new("trace.span", Raw(raw), source="s")).payload)
    json.loads(out)
    core = secret.split()[-1] if secret.lower().startswith("bearer") else secret
    assert not any(core in form for form in forms(out)), out


@settings(max_examples=100, deadline=None)
@given(documents())
def test_redacting_twice_changes_nothing(case: tuple[str, bytes]) -> None:
    """What was put in is never taken for a secret."""
    redact = Redactor(ALL, ENV)
    once = redact(Envelope.new("trace.span", Raw(case[1]), source="s"))
    assert redact(once) == once


def test_every_detector_has_an_example() -> None:
    """None is forgotten here."""
    assert set(SECRETS) == set(HARMLESS) == set(BUILT_IN)
