"""The scripts that run inside the server, as data: each is `prelude.lua` and its own file.

They run on Redis 6.2, 7 and Valkey alike, touch only keys of one slot (KEYS[1] the stream, KEYS[2] its meta hash, whose
name the others are made from), and answer `{word, …}`: `ok`, or why not. One script is one atomic step.
"""

from __future__ import annotations

from hashlib import sha1
from importlib.resources import files

_NAMES = (
    "append", "look", "open", "delete", "trim", "erase", "locate", "consumer", "guard", "release", "peek", "claim", "settle",
    "figures", "pending", "reset", "checkpoint",
)  # fmt: skip
_folder = files(__name__)
_PRELUDE = (_folder / "prelude.lua").read_text()


def _short(text: str) -> str:
    """Without comments and indentation: some scripts travel whole with every call."""
    lines = (line.strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line and not line.startswith("--")) + "\n"


TEXTS: dict[str, str] = {name: _short(_PRELUDE + (_folder / f"{name}.lua").read_text()) for name in _NAMES}
SHAS: dict[str, str] = {name: sha1(text.encode(), usedforsecurity=False).hexdigest() for name, text in TEXTS.items()}
SCRIPTS: dict[str, str] = {SHAS[name]: text for name, text in TEXTS.items()}


def run(name: str, keys: tuple[str | bytes, ...], *args: str | bytes | int) -> tuple[str | bytes | int, ...]:
    """The command that runs a script."""
    return ("EVALSHA", SHAS[name], len(keys), *keys, *args)


def whole(name: str, keys: tuple[str | bytes, ...], *args: str | bytes | int) -> tuple[str | bytes | int, ...]:
    """The same with its text, for transactions: a server that does not know the script must not run the rest."""
    return ("EVAL", TEXTS[name], len(keys), *keys, *args)
