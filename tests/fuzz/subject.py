"""Any text as a token, a subject, a filter and a stream name."""

from __future__ import annotations

import re
import sys

from mist.errors import InvalidArgument
from mist.protocol import subject as s
from tests.fuzz.driver import Target, main

_TOKEN = re.compile(r"[A-Za-z0-9_=]+(?:-[A-Za-z0-9_=]+)*", re.ASCII)


def naive(pattern: list[str], subject: list[str]) -> bool:
    if pattern == [">"]:
        return bool(subject)
    if not pattern or not subject:
        return not pattern and not subject
    return pattern[0] in ("*", subject[0]) and naive(pattern[1:], subject[1:])


def check(data: bytes) -> bool:
    text = data.decode("utf-8", "surrogatepass" if b"\xed" in data else "replace") if _readable(data) else repr(data)
    accepted = False
    try:
        token = s.encode_token(text)
    except InvalidArgument:
        assert re.search("[\ud800-\udfff]", text), "only text without a UTF-8 form has no token"
    else:
        assert _TOKEN.fullmatch(token), "nothing forbidden is in a token"
        assert "--" not in token
        assert s.decode_token(token) == text, "reversible"
    try:
        plain = s.decode_token(text)
    except InvalidArgument:
        pass
    else:
        assert s.encode_token(plain) == text, "one text, one token"
    left, _, right = text.partition(" ")
    try:
        subject, pattern = s.check_subject(left), s.check_filter(right)
    except InvalidArgument:
        pass
    else:
        accepted = True
        match = s.matcher([pattern])
        found = match is None or match(subject)
        assert found == naive(pattern.split("."), subject.split(".")), "as the rule says"
    try:
        assert "/" not in s.check_stream(text)
        assert "." not in text
        assert "--dead" in s.dead_stream(text)
    except InvalidArgument:
        pass
    return accepted


def _readable(data: bytes) -> bool:
    try:
        data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return False
    return True


SEEDS = [
    b"trace.span trace.>", b"a.b.c *.b.*", b"a >", b"x.y x.y", b"eval.result.run-1 eval.result.*", b"a=2Eb", b"=",
    b"trace--tenant", b"a.b.c.d a.*.>", "é.ü é.*".encode(), b"t=C3=A9-x",
]  # fmt: skip
WORDS = [
    b".", b"*", b">", b" ", b"-", b"--", b"=", b"=2E", b"=c3", b"=ED=A0=80", b"\xed\xa0\x80", b"\n", b"\x00", b"$", b"/", b"\\",
    "é".encode(), "\u2028".encode(), b".>", b".*", b"..", b"x" * 130,
]  # fmt: skip
TARGET = Target("subject", SEEDS, WORDS, check)

if __name__ == "__main__":
    sys.exit(main(["subject"]))
