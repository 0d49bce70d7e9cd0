"""`nats://…` and `tls://…` as options of a connection. Pure, except that `token_file` is read."""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from msgspec import Struct

from mist.errors import InvalidArgument
from mist.protocol.url import Url

KNOWN = (
    "stream", "subject", "consumer", "replicas", "monitor", "creds", "nkey", "token_file", "tls_ca", "tls_cert",
    "tls_key", "domain", "sync", "connect_timeout_s", "name",
)  # fmt: skip
PORT = 4222
SYNC = ("", "always", "default")
REPLICAS_MAX = 5
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s:/@\[\],]+)(?::([0-9]{1,5}))?", re.ASCII)
_DOMAIN = re.compile(r"[^\s.*>]+")


class Options(Struct, frozen=True, kw_only=True):
    """What the URL says. `client` goes to nats-py as it is; it holds the secrets, so it is never printed."""

    servers: tuple[str, ...]
    client: dict[str, Any]
    replicas: int
    monitor: str
    domain: str
    sync: str
    connect_timeout_s: float

    def __repr__(self) -> str:
        return f"Options(servers={self.servers!r}, …)"


def options(url: Url, environ: Mapping[str, str] = os.environ) -> Options:
    """Raises InvalidArgument with what to write instead, and without any secret."""
    url.refuse_unknown(*KNOWN)
    target = url.target.removeprefix("//").rstrip("/")
    login, at, hosts = target.rpartition("@")
    servers = []
    for host in hosts.split(","):
        found = _HOST.fullmatch(host)
        if found is None or not 0 < int(found[2] or PORT) < 65536:
            raise InvalidArgument(
                f"{url.redacted()}: no host in it", hint=f"for example {url.scheme}://localhost:{PORT}"
            )
        servers.append(f"{url.scheme}://{found[1]}:{found[2] or PORT}")
    return Options(
        servers=tuple(servers),
        client={"name": url.get("name", "mist"), **_login(url, login if at else "", environ), **_tls(url)},
        replicas=int(_number(url, "replicas", 0, REPLICAS_MAX)),
        monitor=_monitor(url, servers[0]),
        domain=_domain(url),
        sync=_sync(url),
        connect_timeout_s=_number(url, "connect_timeout_s", 5.0, 3600.0),
    )


def _login(url: Url, login: str, environ: Mapping[str, str]) -> dict[str, Any]:
    """The URL first, then the environment."""
    if login:
        user, colon, password = login.partition(":")
        if colon:
            return {"user": unquote(user), "password": unquote(password)}
        return {"token": unquote(user)}
    if path := url.get("creds") or environ.get("MIST_NATS_CREDS", ""):
        return {"user_credentials": _file(url, "creds", path)}
    if path := url.get("nkey"):
        return {"nkeys_seed": _file(url, "nkey", path)}
    if path := url.get("token_file"):
        return {"token": Path(_file(url, "token_file", path)).read_text().strip()}
    if user := environ.get("MIST_NATS_USER", ""):
        return {"user": user, "password": environ.get("MIST_NATS_PASSWORD", "")}
    if token := environ.get("MIST_NATS_TOKEN", ""):
        return {"token": token}
    return {}


def _file(url: Url, key: str, path: str) -> str:
    if not os.access(path, os.R_OK):
        raise InvalidArgument(f"{url.scheme}: the file of {key} cannot be read", hint="check its path and its mode")
    return path


def _tls(url: Url) -> dict[str, Any]:
    ca, cert, key = url.get("tls_ca"), url.get("tls_cert"), url.get("tls_key")
    if url.scheme != "tls" and not (ca or cert or key):
        return {}
    try:
        context = ssl.create_default_context(cafile=ca or None)
        if cert:
            context.load_cert_chain(cert, key or None)
    except (OSError, ssl.SSLError) as exc:
        raise InvalidArgument(f"{url.scheme}: tls_ca, tls_cert or tls_key cannot be used ({exc})") from exc
    return {"tls": context}


def _monitor(url: Url, first: str) -> str:
    """The base URL of the monitoring endpoint; `?` in front when it is only a guess."""
    text = url.get("monitor")
    host = first.partition("://")[2].rpartition(":")[0]
    if not text:
        return f"?http://{host}:8222"
    if text.isascii() and text.isdigit() and 0 < int(text) < 65536:
        return f"http://{host}:{text}"
    if re.fullmatch(r"https?://[^\s@/]+/?", text):
        return text.rstrip("/")
    raise InvalidArgument(f"{url.redacted()}: monitor is neither a port nor an http URL")


def _domain(url: Url) -> str:
    domain = url.get("domain")
    if domain and not _DOMAIN.fullmatch(domain):
        raise InvalidArgument(f"{url.redacted()}: not a JetStream domain: {domain[:40]!r}")
    return domain


def _sync(url: Url) -> str:
    sync = url.get("sync")
    if sync not in SYNC:
        raise InvalidArgument(f"{url.redacted()}: sync={sync[:20]!r}", hint="always or default")
    return sync


def _number(url: Url, key: str, default: float, most: float) -> float:
    text = url.get(key)
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= most or (key == "replicas" and value not in (1, 3, 5)):
        raise InvalidArgument(f"{url.redacted()}: {key}={text[:20]!r} cannot be right")
    return value
