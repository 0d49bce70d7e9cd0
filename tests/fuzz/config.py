"""Any bytes as mist.toml, and as values of the environment: a whole configuration, or refused with file and reason."""

from __future__ import annotations

import sys

from mist.config import MistConfig, env_layers, merge, toml_layer
from mist.errors import InvalidArgument
from tests.fuzz.driver import Target, main


def check(data: bytes) -> bool:
    text = data.decode("utf-8", "replace")
    accepted = False
    for layers in (lambda: [toml_layer(data, "mist.toml")], lambda: env_layers(MistConfig, _environment(text))):
        try:
            loaded = merge(MistConfig, layers())
        except InvalidArgument as exc:
            assert len(str(exc)) < 2000, "an error message is short"
            continue
        accepted = True
        assert set(loaded.origins) >= {"url", "format", "timeout_s"}
        assert loaded.value.format in ("table", "json", "jsonl", "csv", "raw")
    return accepted


def _environment(text: str) -> dict[str, str]:
    """The lines of a TOML-like text as variables: MIST_KEY=value."""
    pairs = [line.split("=", 1) for line in text.splitlines() if "=" in line]
    return {f"MIST_{k.strip().upper()}": v.strip().strip('"') for k, v in pairs}


SEEDS = [
    b'url = "log:./data"\n', b'format = "json"\ntimeout_s = 2.5\n', b"no_input = true\nquiet = false\npager = true\n",
    b'# comment\nurl = "nats://h:4222"\n', b"",
]  # fmt: skip
WORDS = [
    b"=", b"[", b"]", b"[[", b"]]", b'"', b"'", b"'''", b"\n", b"url", b"format", b"timeout_s", b"no_input", b"true", b"nan", b"-inf",
    b"1e400", b"2026-01-01", b"{", b"}", b".", b"\\u0000", b"\xef\xbb\xbf", b"\xff", b"[" * 40, b"0x_1",
]  # fmt: skip
TARGET = Target("config", SEEDS, WORDS, check)

if __name__ == "__main__":
    sys.exit(main(["config"]))
