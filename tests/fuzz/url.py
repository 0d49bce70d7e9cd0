"""Any text as a URL: read, printed and read again the same, or refused; redaction is stable and total."""

from __future__ import annotations

import sys

from mist.errors import InvalidArgument
from mist.protocol.url import parse_url, redact
from tests.fuzz.driver import Target, main

SECRET = "s3cr3t"


def check(data: bytes) -> bool:
    text = data.decode("utf-8", "surrogateescape")
    shown = redact(text)
    assert redact(shown) == shown, "redacting twice changes nothing"
    assert SECRET not in redact(f"nats://user:{SECRET}@{text}"), "a password before any text is hidden"
    assert SECRET not in redact(f"log:x?token={SECRET}&{text}"), "so is a token before any text"
    try:
        url = parse_url(text)
    except InvalidArgument as exc:
        assert len(str(exc)) < 1000, "an error message is short"
        return False
    printed = str(url)
    assert parse_url(printed) == url, "printed and read again"
    assert str(parse_url(printed)) == printed
    assert "\n" not in printed
    url.redacted()
    for key, _ in url.query:
        assert url.get(key) == url.all(key)[-1]
    return True


SEEDS = [
    b"log:./data", b"log:///tmp/x?stream=s", b"memory:", b"memory:NAME", b"file:x.jsonl", b"file:///a%20b", b"stdio://",
    b"chan://n", b"nats://user:pw@h:4222?stream=s&subject=a.*.>", b"redis://:pw@h:6379/0", b"https://h/mist?timeout_s=3",
    b"nats://a:1,b:2", b"http://[::1]:80/a@b", b"log:a%3Fb%25c",
]  # fmt: skip
WORDS = [
    b"?", b"&", b"=", b"#", b"@", b":", b"/", b"//", b"%", b"%41", b"%ff", b"%00", b"%0A", b"\n", b"\x00", b" ", b"+", b"\xff",
    "é".encode(), b"token=", b"password=x", b"log:", b"nats:", b"stream=s", b"***", b"[", b"]", b",", b";",
]  # fmt: skip
TARGET = Target("url", SEEDS, WORDS, check)

if __name__ == "__main__":
    sys.exit(main(["url"]))
