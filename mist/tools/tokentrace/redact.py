"""Redaction: what must not be stored is taken out of a span before anything stores it, the stream included.

    [tokentrace.redact]
    capture = "metadata"            # full | metadata | none: prompts and answers
    key_env = "REDACT_KEY"          # for hash
    [[tokentrace.redact.rules]]
    detect = ["api_key", "email"]   # what looks like a secret, anywhere
    action = "mask"                 # mask | hash | drop
    [[tokentrace.redact.rules]]
    attrs = ["user.email", "*password*"]   # by name, at any depth, in any case
    action = "hash"

A Redactor is a function over envelopes. Promises: an envelope where nothing matched is returned as it is, bytes
and checksum; in one that changed, nothing that matches a rule is left: not in keys, nested values, numbers, ids, the
envelope's own fields, duplicate keys, `\\u` escapes, or JSON within JSON down to `LEVELS_MAX`. Time is linear in the size.
Does not: look into base64 or compressed text, or touch envelopes that are not spans.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import zlib
from collections.abc import Mapping
from fnmatch import translate
from typing import Any, Literal

import msgspec
from msgspec import Raw
from msgspec.structs import replace

from mist.errors import InvalidArgument
from mist.protocol.envelope import Envelope
from mist.protocol.payloads import TRACE_SPAN
from mist.tools.tokentrace.detectors import BUILT_IN, Detector, custom
from mist.tools.tokentrace.otlp import genai, names, values
from mist.tools.tokentrace.settings import Action, RedactRule, RedactSettings

LEVELS_MAX = 4
"""JSON within JSON within JSON: how deep it is looked into."""
LONG_CHARS = 4096
"""Texts above this are withheld from a span that is too large to scan."""
RULES_MAX = 64
KNOWN_MAX = 10_000
"""Names and sources that are remembered as harmless."""
KEY_BYTES_MIN = 16
_LABEL = re.compile(r"[a-z][a-z0-9_-]{0,31}", re.ASCII)

CONTENT = (
    "prompt", "response", "completion", "content", "messages", "system_prompt", "input.value", "output.value",
    "gen_ai.input.messages", "gen_ai.output.messages", "gen_ai.system_instructions", "gen_ai.prompt", "gen_ai.prompt.*",
    "gen_ai.completion", "gen_ai.completion.*", "gen_ai.content.*", "gen_ai.event.content", "gen_ai.tool.definitions",
    "gen_ai.tool.call.arguments", "gen_ai.tool.call.result", "llm.prompts", "llm.prompts.*", "llm.completions",
    "llm.completions.*", "llm.input_messages*", "llm.output_messages*", "traceloop.entity.input", "traceloop.entity.output",
    "otel.events",
)  # fmt: skip
"""Attributes that hold what was asked and answered: ours, OpenTelemetry's GenAI names old and new, and those of OpenInference
and OpenLLMetry. Events are content as a whole: that is where older instrumentations put it."""


class _Drop:
    """Stands for a value that goes, with its key."""


_DROP = _Drop()
_WITHHELD = "[redacted]"


class Redactor:
    """The function for these settings: counts in `changed` and `too_large`, otherwise pure. `env` None = only check the
    settings. Raises InvalidArgument where they cannot work, naming the rule."""

    def __init__(self, settings: RedactSettings, env: Mapping[str, str] | None) -> None:
        self._settings = settings
        self._key = _key(settings, env)
        self._detectors: list[tuple[Detector, Action]] = []
        self._names: list[tuple[re.Pattern[str], Action | Literal["content"]]] = []
        if len(settings.rules) > RULES_MAX:
            raise InvalidArgument(f"tokentrace.redact: {len(settings.rules)} rules (max {RULES_MAX})")
        if settings.scan_chars_max < 1024:
            raise InvalidArgument("tokentrace.redact: scan_chars_max is below 1024")
        for number, rule in enumerate(settings.rules, 1):
            self._add(rule, f"tokentrace.redact: rule {number}")
        if settings.capture != "full":
            self._names += [
                (_glob(name, "tokentrace.redact: content"), "content") for name in settings.content or CONTENT
            ]
        for detector, _ in self._detectors:
            for other, _ in self._detectors:
                for text in (_WITHHELD, f"[{other.label}]", f"[{other.label}:h0123456789abcdef]"):
                    if detector.hit(text):
                        raise InvalidArgument(
                            f"tokentrace.redact: pattern {detector.label!r} matches {text!r}, which we put in"
                        )
        self._decided: dict[str, str] = {}
        self._harmless: set[str] = set()
        self._harmless_keys: set[bytes] = set()
        self.changed = 0
        self.too_large = 0

    def _add(self, rule: RedactRule, where: str) -> None:
        if (bool(rule.attrs), bool(rule.detect), bool(rule.pattern)).count(True) != 1:
            raise InvalidArgument(f"{where}: exactly one of attrs, detect and pattern says what")
        if rule.action == "hash" and not self._key:
            raise InvalidArgument(f"{where}: hash needs a key", hint='key_env = "REDACT_KEY"')
        if bool(rule.pattern) != bool(rule.name) or (rule.name and not _LABEL.fullmatch(rule.name)):
            raise InvalidArgument(f"{where}: a pattern, and only a pattern, has a name of a-z, 0-9, _ and -")
        self._names += [(_glob(name, where), rule.action) for name in rule.attrs]
        for label in rule.detect:
            if label not in BUILT_IN:
                raise InvalidArgument(f"{where}: there is no detector {label!r}", hint=f"known: {', '.join(BUILT_IN)}")
            self._detectors.append((BUILT_IN[label], rule.action))
        if rule.pattern:
            self._detectors.append((custom(rule.name, rule.pattern), rule.action))

    def __call__(self, env: Envelope) -> Envelope:
        """The envelope as it may be stored."""
        if env.type != TRACE_SPAN:
            return env
        raw = bytes(env.payload)
        out = env
        if self._has_name(raw) or self._has_secret(raw):
            payload = self._rewritten(raw)
            if payload != raw:
                out = replace(env, payload=Raw(payload), checksum=zlib.crc32(payload) if env.checksum else 0)
        if self._detectors:
            out = self._fields(out)
        if out is not env:
            self.changed += 1
        return out

    # is there anything to do?

    def _has_name(self, raw: bytes) -> bool:
        """Whether some key, at any depth and also one of two that are equal, has a name of ours."""
        if not self._names:
            return False
        keys = set(_KEY.findall(raw))
        fresh = keys - self._harmless_keys
        if not fresh:
            return False
        if _PAIRS.encode() in fresh or any(self._name(_unescape(key.decode(errors="replace"))) for key in fresh):
            return True
        if len(self._harmless_keys) > KNOWN_MAX:
            self._harmless_keys.clear()
        self._harmless_keys |= fresh
        return False

    def _name(self, key: str) -> str:
        """What to do about an attribute of this name; empty = nothing."""
        decided = self._decided.get(key)
        if decided is None:
            spoken = _spoken(key)
            decided = next((what for glob, what in self._names if any(map(glob.fullmatch, spoken))), "")
            if len(self._decided) > KNOWN_MAX:
                self._decided.clear()
            self._decided[key] = decided
        return decided

    def _has_secret(self, raw: bytes) -> bool:
        """Whether a detector finds something in the document, or has to look closer because there is too much of it."""
        if not self._detectors:
            return False
        if len(raw) > self._settings.scan_chars_max:
            return True
        return self._hits(_unescape(raw.decode(errors="replace")) if b"\\" in raw else raw)

    def _hits(self, text: str | bytes) -> bool:
        """Whether a detector finds something, in the text as it is and with its escapes resolved, level by level."""
        for _ in range(LEVELS_MAX + 1):
            data = text if isinstance(text, bytes) else text.encode(errors="replace")
            if any(detector.in_bytes(data) for detector, _ in self._detectors):
                return True
            if b"\\" not in data:
                return False
            text = _unescape(data.decode(errors="replace"))
        return False

    # taking it out

    def _rewritten(self, raw: bytes) -> bytes:
        try:
            return self._document(msgspec.json.decode(raw), len(raw))
        except _UNREADABLE:
            return b'"[redacted: not to be read]"'  # would be kept in quarantine, as it came

    def _document(self, value: Any, size: int) -> bytes:
        if self._detectors and size > self._settings.scan_chars_max:
            self.too_large += 1
            value = _cut(value, self._settings.scan_chars_max)
        if not isinstance(value, dict):
            new = self._value(value, 0)
            return msgspec.json.encode(None if new is _DROP else new)
        fields: dict[str, Any] = {}
        for key, item in value.items():
            if key in ("start_ns", "end_ns") and isinstance(item, int):
                fields[key] = item
            elif key in ("trace_id", "span_id", "parent_id") and isinstance(item, str):
                fields[key] = self._identity(item)
            elif key == "attrs":
                new = self._value(item, 0)
                fields[key] = {} if new is _DROP else new
            else:
                fields.update(self._object({key: item}, 0))
        return msgspec.json.encode(fields)

    def _value(self, value: Any, level: int) -> Any:
        """The value as it may be stored, or _DROP. `level` counts JSON within text; names count outside of texts only."""
        if isinstance(value, str):
            return self._text(value, level)
        if isinstance(value, dict):
            return self._object(value, level)
        if isinstance(value, list):
            return [new for item in value if (new := self._value(item, level)) is not _DROP]
        if isinstance(value, int | float) and not isinstance(value, bool):
            text = str(value)
            new = self._text(text, LEVELS_MAX) if self._detectors else text
            return value if new == text else new
        return value

    def _object(self, value: dict[str, Any], level: int) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, item in value.items():
            what = self._name(key) if level == 0 and self._names else ""
            new: Any
            if what == "drop" or (what == "content" and self._settings.capture == "none"):
                continue
            if what == "content":
                new = _metadata(item)
            elif what == "mask":
                new = _WITHHELD
            elif what == "hash":
                new = self._hash("hash", item if isinstance(item, str) else msgspec.json.encode(item).decode())
            elif key == _PAIRS and isinstance(item, list):
                new = [pair for entry in item for pair in self._pair(entry, level)]
            else:
                new = self._value(item, level)
            name = self._text(key, level)
            if new is not _DROP and name is not _DROP:
                out[name] = new
        return out

    def _pair(self, entry: Any, level: int) -> list[Any]:
        """An entry of a map of OpenTelemetry's that has a key twice: it is a list of key and value."""
        if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str):
            return [list(pair) for pair in self._object({entry[0]: entry[1]}, level).items()]
        new = self._value(entry, level)
        return [] if new is _DROP else [new]

    def _text(self, text: str, level: int) -> Any:
        out = text
        for detector, action in self._detectors:
            spans = list(detector.find(out))
            if not spans:
                continue
            if action == "drop":
                return _DROP
            parts, at = [], 0
            for start, end in spans:
                parts += [out[at:start], self._mask(detector.label, action, out[start:end])]
                at = end
            out = "".join([*parts, out[at:]])
        if "\\" in out and level < LEVELS_MAX and self._hits(out):
            out = self._nested(out, level)
            if out is not _DROP and self._hits(out):
                out = _WITHHELD  # a key that is there twice, or text that only looks like JSON
        return out

    def _nested(self, text: str, level: int) -> Any:
        """A text that is JSON, with what is in it taken out."""
        try:
            new = self._value(msgspec.json.decode(text), level + 1)
            return new if new is _DROP else msgspec.json.encode(new).decode()
        except _UNREADABLE:
            return _WITHHELD

    def _mask(self, label: str, action: Action, secret: str) -> str:
        return self._hash(label, secret) if action == "hash" else f"[{label}]"

    def _hash(self, label: str, text: str) -> str:
        # the letter keeps sixteen digits from being a number of something
        return f"[{label}:h{hmac.digest(self._key, text.encode(errors='replace'), hashlib.sha256).hex()[:16]}]"

    def _fields(self, env: Envelope) -> Envelope:
        """The envelope's own texts."""
        changes = {}
        for name in ("id", "source", "tenant", "correlation_id", "causation_id", "traceparent"):
            value: str = getattr(env, name)
            if value and value not in self._harmless:
                new = self._identity(value)
                if new != value:
                    changes[name] = new
                elif name in ("source", "tenant"):
                    if len(self._harmless) > KNOWN_MAX:
                        self._harmless.clear()
                    self._harmless.add(value)
        return replace(env, **changes) if changes else env

    def _identity(self, text: str) -> str:
        """Something told apart by: a whole one is hashed where there is a key, so that two stay two, else masked."""
        if not self._detectors or _HEX.fullmatch(text):
            return text
        for detector, _ in self._detectors:
            if detector.hit(text):
                return self._mask(detector.label, "hash" if self._key else "mask", text)
        return text if not self._hits(text) else _WITHHELD


# every string of a document, of which keys are captured: a search for keys alone would begin again at every quote
_KEY = re.compile(rb'"(?:([^"\\]*+(?:\\.[^"\\]*+)*+)"[ \t\r\n]*+:|[^"\\]*+(?:\\.[^"\\]*+)*+")', re.DOTALL)
_HEX = re.compile(r"[0-9a-f]{16}|[0-9a-f]{32}|00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}", re.ASCII)
_PAIRS = values.KVLIST
_PREFIXES = (names.ATTR, names.RESOURCE, names.SCOPE, names.RESOURCE_META)
_FILLED_BY: dict[str, list[str]] = {}
for _source_name, _source in genai.SOURCES.items():
    _FILLED_BY.setdefault(_source.column, []).append(_source_name)
_UNREADABLE = (msgspec.DecodeError, UnicodeError, RecursionError, OverflowError)
_FOUR = re.compile(r"[0-9a-fA-F]{4}", re.ASCII)
_SHORT = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}


def _unescape(text: str) -> str:
    """A text of JSON with its escapes resolved, wherever they are. What is no escape loses its backslash."""
    parts = iter(text.split("\\"))
    out = [next(parts)]
    surrogates = False
    for part in parts:
        if not part:  # an escaped backslash: what comes behind it is text
            out += ["\\", next(parts, "")]
        elif part[0] == "u" and _FOUR.match(part, 1):
            code = int(part[1:5], 16)
            surrogates = surrogates or 0xD800 <= code < 0xE000
            out += [chr(code), part[5:]]
        else:
            out += [_SHORT.get(part[0], part[0]), part[1:]]
    text = "".join(out)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if surrogates else text


def _spoken(key: str) -> list[str]:
    """The names an attribute goes by: its own, the one it had before OTLP's were sorted, and those that fill this column."""
    low = key.lower()
    before = [low.removeprefix(prefix) for prefix in _PREFIXES if low.startswith(prefix)]
    return [low, *before, *_FILLED_BY.get(low, ())]


def _metadata(value: Any) -> dict[str, int]:
    """What may be known about content that is not kept."""
    if isinstance(value, str):
        return {"chars": len(value)}
    if isinstance(value, list):
        return {"items": len(value), "chars": sum(len(text) for text in _texts(value))}
    return {"chars": sum(len(text) for text in _texts(value))}


def _texts(value: Any) -> list[str]:
    out, left = [], [value]
    while left:
        item = left.pop()
        if isinstance(item, str):
            out.append(item)
        elif isinstance(item, dict):
            left.extend(item.values())
        elif isinstance(item, list):
            left.extend(item)
    return out


def _cut(value: Any, chars_max: int) -> Any:
    """A span too large to scan, without its long texts; without its attributes where that is not enough."""

    def short(item: Any) -> Any:
        if isinstance(item, str):
            return item if len(item) <= LONG_CHARS else f"[redacted: {len(item)} characters, too long to scan]"
        if isinstance(item, dict):
            return {short(k): short(v) for k, v in item.items()}
        return [short(i) for i in item] if isinstance(item, list) else item

    value = short(value)
    if len(msgspec.json.encode(value)) <= chars_max:
        return value
    if not isinstance(value, dict):
        return "[redacted: too large to scan]"
    kept = {k: v for k, v in value.items() if not isinstance(v, dict | list)}
    return {**kept, "attrs": {"redacted": "too large to scan"}}


def _glob(name: str, where: str) -> re.Pattern[str]:
    if not 0 < len(name) <= 256:
        raise InvalidArgument(f"{where}: a name has 1 to 256 characters")
    return re.compile(translate(name.lower()))


def _key(settings: RedactSettings, env: Mapping[str, str] | None) -> bytes:
    if not settings.key_env:
        return b""
    if env is None:
        return bytes(KEY_BYTES_MIN)
    key = env.get(settings.key_env, "").encode()
    if len(key) < KEY_BYTES_MIN:
        raise InvalidArgument(
            f"tokentrace.redact: key_env: {settings.key_env} is not set, or shorter than {KEY_BYTES_MIN} bytes",
            hint="`openssl rand -hex 32` makes one",
        )
    return key
