"""What a Redis URL says, checked before anything connects.

    redis://[user[:password]@]host[:6379][/db]?…        rediss:// is the same over TLS
    redis+sentinel://h1:26379,h2:26379/PRIMARY[/db]?…    redis+cluster://h1:7000,h2:7001?…

Credentials may also come from `password_file`, MIST_REDIS_USER and MIST_REDIS_PASSWORD, so that none stands in a
command line. No parameter weakens durability: `wait_replicas` and `waitaof` only wait for more.
"""

from __future__ import annotations

import os
import re
from urllib.parse import unquote

from msgspec import Struct

from mist.errors import InvalidArgument
from mist.protocol.url import Url

USER = "MIST_REDIS_USER"
PASSWORD = "MIST_REDIS_PASSWORD"
KNOWN = (
    "prefix", "tls", "tls_ca", "tls_cert", "tls_key", "password_file", "wait_replicas", "wait_timeout_s", "waitaof",
    "connect_timeout_s", "timeout_s", "name",
)  # fmt: skip
_HOST = re.compile(r"(?:\[(?P<six>[0-9A-Fa-f:.%]+)\]|(?P<host>[^\[\]:@/]+))(?::(?P<port>[0-9]{1,5}))?")
_PREFIX_CHARS_MAX = 100


class Settings(Struct, frozen=True, kw_only=True):
    """One parsed URL. `repr` and `str` are never printed: they hold the password."""

    kind: str
    """single, sentinel or cluster."""
    hosts: tuple[tuple[str, int], ...]
    primary: str = ""
    """The name of the primary that sentinels watch."""
    db: int = 0
    user: str = ""
    password: str = ""
    tls: bool = False
    tls_ca: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    prefix: str = ""
    """Before every key of ours, the streams' own keys included."""
    wait_replicas: int = 0
    wait_timeout_s: float = 5.0
    waitaof: bool = False
    connect_timeout_s: float = 5.0
    timeout_s: float = 10.0
    """How long a server may stay silent before the connection is given up."""
    name: str = "mist"
    """CLIENT SETNAME."""


def parse(url: Url) -> Settings:
    """The settings of a URL. Raises InvalidArgument naming what cannot be right."""
    url.refuse_unknown("stream", "subject", "consumer", *KNOWN)
    shown = url.redacted()
    scheme = url.scheme
    kind = {"redis+sentinel": "sentinel", "redis+cluster": "cluster"}.get(scheme, "single")
    if not url.target.startswith("//"):
        raise InvalidArgument(f"{shown}: names no host", hint=f"for example {scheme}://localhost:6379/0")
    authority, _, path = url.target[2:].partition("/")
    login, _, place = authority.rpartition("@")
    user, _, password = login.partition(":")
    hosts = tuple(_host(h, 26379 if kind == "sentinel" else 6379, shown) for h in place.split(","))
    if kind == "single" and len(hosts) != 1:
        raise InvalidArgument(f"{shown}: several hosts", hint="redis+cluster:// or redis+sentinel:// take several")
    parts = [p for p in path.split("/") if p]
    primary = ""
    if kind == "sentinel":
        if not parts:
            raise InvalidArgument(f"{shown}: names no primary", hint="redis+sentinel://host:26379/PRIMARY/0")
        primary = unquote(parts.pop(0))
    if len(parts) > 1 or (parts and not (parts[0].isascii() and parts[0].isdigit() and len(parts[0]) < 6)):
        raise InvalidArgument(f"{shown}: the path is the number of a database", hint="for example /0")
    db = int(parts[0]) if parts else 0
    if kind == "cluster" and db:
        raise InvalidArgument(f"{shown}: a cluster has only database 0")
    prefix = url.get("prefix")
    if len(prefix) > _PREFIX_CHARS_MAX or re.search(r"[{}\s\x00*?\[\]\\]", prefix):
        raise InvalidArgument(f"{shown}: prefix={prefix[:40]!r} holds {{ }} * ? [ ] \\ or a blank, or is too long")
    return Settings(
        kind=kind, hosts=hosts, primary=primary, db=db,
        user=unquote(user) or os.environ.get(USER, ""),
        password=_password(url, unquote(password)),
        tls=scheme == "rediss" or _flag(url, "tls"),
        tls_ca=url.get("tls_ca"), tls_cert=url.get("tls_cert"), tls_key=url.get("tls_key"), prefix=prefix,
        wait_replicas=int(_number(url, "wait_replicas", 0, whole=True)),
        wait_timeout_s=_number(url, "wait_timeout_s", 5.0),
        waitaof=_flag(url, "waitaof"),
        connect_timeout_s=_number(url, "connect_timeout_s", 5.0),
        timeout_s=_number(url, "timeout_s", 10.0),
        name=_name(url),
    )  # fmt: skip


def _password(url: Url, given: str) -> str:
    path = url.get("password_file")
    if path:
        if given:
            raise InvalidArgument(f"{url.redacted()}: a password and a password_file")
        try:
            with open(path, encoding="utf-8") as file:
                return file.read().strip("\r\n")
        except (OSError, UnicodeDecodeError) as exc:
            raise InvalidArgument(f"{url.redacted()}: cannot read password_file {path}") from exc
    return given or os.environ.get(PASSWORD, "")


def _host(text: str, port: int, shown: str) -> tuple[str, int]:
    found = _HOST.fullmatch(text)
    number = int(found["port"] or port) if found else 0
    if found is None or not 0 < number < 65536:
        raise InvalidArgument(f"{shown}: not host:port", hint=f"for example localhost:{port}")
    return found["six"] or unquote(found["host"]), number


def _number(url: Url, key: str, default: float, *, whole: bool = False) -> float:
    text = url.get(key)
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 3600 or (whole and value != int(value)) or (not whole and value <= 0):
        raise InvalidArgument(f"{url.redacted()}: {key}={text[:40]!r} is not a number from 0 to 3600")
    return value


def _flag(url: Url, key: str) -> bool:
    text = url.get(key).lower()
    if text not in ("", "0", "1", "no", "yes", "false", "true"):
        raise InvalidArgument(f"{url.redacted()}: {key}={text[:40]!r}", hint="yes or no")
    return text in ("1", "yes", "true")


def _name(url: Url) -> str:
    name = url.get("name", "mist")
    if not re.fullmatch(r"[!-~]{1,60}", name):
        raise InvalidArgument(f"{url.redacted()}: name={name[:40]!r}", hint="printable characters, no blanks")
    return name
