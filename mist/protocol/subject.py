"""Names: stream names, subjects, subject filters, and the one encoder for text that comes from outside.

Promises: `encode_token` is injective and reversible (`decode_token`), and its output never contains
`. * > $ / \\` or white space, never starts or ends with `-` and never contains `--` (the separator of tenants and dead
letters). Matching follows NATS: tokens are separated by `.`, `*` is one token, `>` at the end is one or more.
Does not: normalise case or Unicode; two different inputs stay two different tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

from mist.errors import InvalidArgument

SUBJECT_CHARS_MAX = 255
STREAM_CHARS_MAX = 128
DEAD = "dead"

_STREAM = re.compile(r"[A-Za-z0-9_=][A-Za-z0-9_=-]*", re.ASCII)
_TOKEN_BAD = re.compile(r"[\s.*>\x00-\x1f\x7f]")
_ESCAPE = re.compile(rb"=([0-9A-F]{2})")
_PLAIN = re.compile(r"[A-Za-z0-9_]+(?:-[A-Za-z0-9_]+)*", re.ASCII)


def encode_token(text: str) -> str:
    """Any text as one subject token or stream-name part. `decode_token` gives it back.

    Letters, digits and `_` stay, a `-` between two of them stays, every other UTF-8 byte becomes `=XX`; the empty
    text is `=`. Raises InvalidArgument for text that has no UTF-8 form (lone surrogates).
    """
    if _PLAIN.fullmatch(text):
        return text
    if not text:
        return "="
    try:
        raw = text.encode()
    except UnicodeEncodeError as exc:
        raise InvalidArgument("a name holds a lone surrogate, it has no UTF-8 form") from exc
    kept = [byte < 128 and (chr(byte).isalnum() or byte == 0x5F) for byte in raw]
    return "".join(
        chr(byte)
        if kept[i] or (byte == 0x2D and 0 < i < len(raw) - 1 and kept[i - 1] and kept[i + 1])
        else f"={byte:02X}"
        for i, byte in enumerate(raw)
    )


def decode_token(token: str) -> str:
    """The text `encode_token` made this token from. Raises InvalidArgument for anything it never produces."""
    if token == "=":
        return ""
    try:
        text = _ESCAPE.sub(lambda m: bytes([int(m[1], 16)]), token.encode("ascii")).decode()
    except ValueError as exc:
        raise InvalidArgument(f"not an encoded token: {token[:80]!r}") from exc
    if encode_token(text) != token:
        raise InvalidArgument(f"not an encoded token: {token[:80]!r}")
    return text


def check_stream(name: str) -> str:
    """The name, if it may name a stream: `[A-Za-z0-9_=-]`, not starting with `-`, at most 128 characters."""
    if len(name) > STREAM_CHARS_MAX or not _STREAM.fullmatch(name):
        raise InvalidArgument(
            f"not a stream name: {name[:40]!r}",
            hint=f"letters, digits, _ and -, at most {STREAM_CHARS_MAX} characters",
        )
    return name


check_name = check_stream  # consumers, cursors and checkpoints follow the same grammar


def tenant_stream(stream: str, tenant: str) -> str:
    """`<stream>--<tenant token>`. No tenant can name another's stream or a dead-letter stream."""
    check_stream(stream)
    if not tenant:
        return stream
    token = encode_token(tenant)
    if token == DEAD:
        token = "=64ead"  # a tenant called "dead" must not own the dead letters
    return check_stream(f"{stream}--{token}")


def dead_stream(stream: str) -> str:
    """The stream that holds the dead letters of `stream`."""
    return check_stream(f"{stream}--{DEAD}")


def check_subject(subject: str) -> str:
    """The subject, if records may carry it: dot-separated non-empty tokens, no wildcards, white space or controls."""
    if len(subject) <= SUBJECT_CHARS_MAX and _subject_ok(subject):  # the cache must not keep huge texts
        return subject
    raise InvalidArgument(
        f"not a subject: {subject[:80]!r}",
        hint=f"tokens separated by dots, no spaces or wildcards, at most {SUBJECT_CHARS_MAX} bytes",
    )


@lru_cache(maxsize=4096)
def _subject_ok(subject: str) -> bool:
    try:
        size = len(subject.encode())
    except UnicodeEncodeError:
        return False
    return 0 < size <= SUBJECT_CHARS_MAX and all(t and not _TOKEN_BAD.search(t) for t in subject.split("."))


def check_filter(pattern: str) -> str:
    """The pattern, if it is a subject filter: like a subject, with `*` tokens and a last `>` allowed."""
    tokens = pattern.split(".")
    if tokens[-1] == ">":
        tokens.pop()
    # what is left must be a subject once every `*` is some token, or nothing at all
    ok = len(pattern) <= SUBJECT_CHARS_MAX and (
        pattern == ">" or _subject_ok(".".join("x" if t == "*" else t for t in tokens))
    )
    if not ok:
        raise InvalidArgument(
            f"not a subject filter: {pattern[:80]!r}", hint="`*` stands for one token, `>` at the end for the rest"
        )
    return pattern


def subject_for(type: str, *qualifiers: str) -> str:
    """The subject of an envelope: its type, then encoded qualifiers: `eval.result` + run -> `eval.result.<run>`."""
    tokens = [encode_token(t) for t in type.split(".")]
    tokens.extend(encode_token(q) for q in qualifiers if q)
    return check_subject(".".join(tokens))


def _regex(pattern: str) -> str:
    wild = {"*": r"[^.]+", ">": r".+"}
    return r"\.".join(wild.get(t) or re.escape(t) for t in pattern.split("."))


@lru_cache(maxsize=1024)
def _matcher(patterns: tuple[str, ...]) -> Callable[[str], bool] | None:
    if not patterns:
        raise InvalidArgument("no subject filter given", hint='use (">",) for everything')
    for pattern in patterns:
        check_filter(pattern)
    if ">" in patterns:
        return None
    exact = frozenset(p for p in patterns if not ({"*", ">"} & set(p.split("."))))
    wild = [p for p in patterns if p not in exact]
    if not wild:
        return exact.__contains__
    full = re.compile("|".join(f"(?:{_regex(p)})" for p in wild), re.DOTALL).fullmatch
    return lru_cache(maxsize=4096)(lambda s: s in exact or full(s) is not None)


def matcher(patterns: Sequence[str]) -> Callable[[str], bool] | None:
    """A predicate over subjects for these filters, or None when every subject matches."""
    if isinstance(patterns, str):  # a sequence of one-letter filters to Python, never what was meant
        raise InvalidArgument(f"subjects={patterns!r} is one text", hint=f"use ({patterns!r},)")
    return _matcher(tuple(patterns))


def matching(patterns: Sequence[str], subjects: Iterable[str]) -> list[str]:
    """The subjects that match at least one pattern, in order."""
    match = matcher(patterns)
    return [s for s in subjects if match is None or match(s)]
