"""Names: our streams on the server, and the server's streams here.

A stream of ours is a JetStream stream of the same name with the subjects `mist.<name>.>`. Names of others that our
grammar does not know appear encoded (`encode_token`), and can be opened so. What is internal (key-value buckets, object
stores) is not listed.
"""

from __future__ import annotations

from mist.errors import InvalidArgument
from mist.protocol.subject import check_stream, decode_token, encode_token

FORMAT = "1"
BUCKET = "mist_checkpoints"
TAIL = "mist_tail_"
"""What our ephemeral consumers are called; they are not listed."""
_HIDDEN = ("KV_", "OBJ_", "$")
META = "mist"
META_INCARNATION = "mist.incarnation"
META_CONFIG = "mist.config"
META_IDENTITY = "mist.identity"


def prefix(stream: str) -> str:
    return f"mist.{stream}."


def shown(name: str) -> str | None:
    """A server's stream name as we call it; None: not to be listed."""
    if name.startswith(_HIDDEN):
        return None
    try:
        return check_stream(name)
    except InvalidArgument:
        pass
    try:
        return check_stream(encode_token(name))
    except InvalidArgument:
        return None  # too long for our grammar: natscli shows it


def candidates(name: str) -> list[str]:
    """The server's names that `name` may mean, the exact one first."""
    out = [name]
    try:
        raw = decode_token(name)
    except InvalidArgument:
        return out
    if raw != name and raw and not any(c in " .*>/\\" or not c.isprintable() for c in raw):
        out.append(raw)
    return out
