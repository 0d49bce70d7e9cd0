"""Stream name <-> keys, pure.

A stream's key is its name (behind the prefix of the URL). Its state lies beside it in keys that carry the stream's key
as hash tag, so that a cluster keeps all of it in one slot:

    trace                      the stream            mist:{trace}:group:worker   one consumer
    mist:{trace}:meta          incarnation, settings mist:{trace}:due:worker     what it has given back
    mist:{trace}:ids:0, :1     ids seen              mist:{trace}:checkpoints    positions
    mist:{trace}:groups        names of consumers    mist:{trace}:wake           wakes waiting readers
    mist:streams, mist:positions                     which streams, which with checkpoints

A key outside our grammar for names (`user:events`) is called by its encoded token (`user=3Aevents`), which opens it too.
"""

from __future__ import annotations

import re

from mist.errors import InvalidArgument
from mist.protocol.subject import STREAM_CHARS_MAX, check_stream, decode_token, encode_token

_NAME = re.compile(r"[A-Za-z0-9_=][A-Za-z0-9_=-]*", re.ASCII)
_TAG = re.compile(r"\{[^}]+\}")


class Names:
    def __init__(self, prefix: str, *, cluster: bool = False) -> None:
        self.prefix = prefix
        self.cluster = cluster
        self.streams = f"{prefix}mist:streams"
        self.positions = f"{prefix}mist:positions"
        self.state = f"{prefix}mist:"
        """Every state key begins so."""

    def keys(self, key: str) -> tuple[str, ...]:
        """What every script takes: the stream's key and its meta hash. In a cluster also a key that never is: then no
        server runs a script while the slot moves, when the keys a script makes names of may be here or there."""
        both = key, self.beside(key, "meta")
        return (*both, self.beside(key, "never")) if self.cluster else both

    def beside(self, key: str, what: str) -> str:
        """The name of a state key of the stream with this key."""
        tagged = key if _TAG.search(key) else f"{{{key}}}"
        return f"{self.state}{tagged}:{what}"

    def candidates(self, name: str) -> list[str]:
        """The keys a stream name may stand for, the exact one first."""
        check_stream(name)
        exact = self.prefix + name
        try:
            decoded = decode_token(name)
        except InvalidArgument:
            return [exact]
        return [exact] if decoded == name else [exact, self.prefix + decoded]

    def name(self, key: bytes) -> str | None:
        """The stream name of a key, None for state of ours and for keys that can have none."""
        try:
            text = key.decode()
        except UnicodeDecodeError:
            return None
        if not text.startswith(self.prefix) or text.startswith(self.state):
            return None
        text = text[len(self.prefix) :]
        name = text if _NAME.fullmatch(text) else encode_token(text)
        return name if name and len(name) <= STREAM_CHARS_MAX else None
