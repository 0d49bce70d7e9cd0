"""Connecting: what is refused and how it says so, every kind of credentials, TLS; secrets are never shown."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import nkeys
import pytest

import mist
from mist.broker.base import Message
from mist.errors import InvalidArgument, MistError, NotAuthorised, Unavailable, Unsupported
from mist.kit.local import free_port
from mist.protocol.url import parse_url
from mist.testing.servers import run_nats
from mist_nats.url import options
from tests.conftest import run


@asynccontextmanager
async def fake(info: dict[str, object]) -> AsyncIterator[str]:
    """A server that greets, answers pings and nothing else."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"INFO " + json.dumps(info).encode() + b"\r\n")
        while line := await reader.readline():
            if line.startswith(b"PING"):
                writer.write(b"PONG\r\n")
            elif line.startswith((b"PUB", b"HPUB")) and (reply := line.split()[2:-1]):
                await reader.readline()
                writer.write(b"HMSG %b 2 16 16\r\nNATS/1.0 503\r\n\r\n\r\n" % reply[0])
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"nats://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def works(url: str) -> None:
    async with mist.connect(url) as broker:
        name = f"conn-{secrets.token_hex(4)}"
        stream = await broker.open(name)
        assert await stream.append([Message("a", b"x")]) == [1]
        assert [r.data for r in (await stream.read()).records] == [b"x"]
        await broker.delete(name)


def test_an_old_server_is_refused_with_a_sentence() -> None:
    async def go() -> None:
        async with fake({"server_id": "X", "version": "2.8.4", "headers": True, "max_payload": 1048576}) as url:
            with pytest.raises(Unsupported, match=r"2\.8\.4 \(older than 2\.9\)"):
                await mist.connect(url)

    run(go())


def test_a_server_without_jetstream_is_refused_with_a_sentence() -> None:
    async def go() -> None:
        async with fake({"server_id": "X", "version": "2.12.0", "headers": True, "max_payload": 1048576}) as url:
            with pytest.raises(Unavailable, match="JetStream is not enabled on this server"):
                await mist.connect(url)

    run(go())


def test_an_account_without_jetstream() -> None:
    extra = (
        "accounts { A { users: [{user: a, password: p}] }, S { users: [{user: s, password: p}] } }\nsystem_account: S\n"
    )
    with run_nats(own_process=True, extra=extra) as server:
        port = server.url.split(":")[2].split("?")[0]
        with pytest.raises(Unavailable, match="JetStream is not enabled for this account"):
            run(_connect(f"nats://a:p@127.0.0.1:{port}"))


async def _connect(url: str) -> None:
    await (await mist.connect(url)).aclose()


def test_nobody_there_is_unavailable_at_once() -> None:
    """Every host of the URL is tried once; the sentence says why."""
    began = time.monotonic()
    with pytest.raises(Unavailable, match="cannot connect"):
        run(_connect(f"nats://127.0.0.1:{free_port()},127.0.0.1:{free_port()}"))
    assert time.monotonic() - began < 15, "it went on trying"


def test_a_server_that_says_nothing_is_unavailable_in_time() -> None:
    async def go() -> None:
        async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            writer.close()

        async with await asyncio.start_server(mute, "127.0.0.1", 0) as silent:
            port = silent.sockets[0].getsockname()[1]
            with pytest.raises(Unavailable):
                await mist.connect(f"nats://127.0.0.1:{port}?connect_timeout_s=0.3")
            await asyncio.sleep(0.1)

    run(go())


@pytest.fixture
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("USER", "PASSWORD", "TOKEN", "CREDS"):
        monkeypatch.delenv(f"MIST_NATS_{name}", raising=False)


def _authority(url: str) -> str:
    return url.split("//")[1]


def _without(error: pytest.ExceptionInfo[MistError], *hidden: str) -> None:
    text = f"{error.value} {error.value!r} {error.value.meta} {error.value.__cause__}"
    for secret in hidden:
        assert secret not in text


@pytest.mark.usefixtures("_no_environment")
def test_user_and_password(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the URL or the environment; a wrong one is NotAuthorised, and nothing shows it."""
    with run_nats(own_process=True, extra='authorization { user: "me", password: "s3cr:et/x" }\n') as server:
        at = _authority(server.url)
        run(works(f"nats://me:s3cr%3Aet%2Fx@{at}"))
        for wrong in (f"nats://me:hunter2@{at}", f"nats://{at}", f"nats://hunter2@{at}"):
            with pytest.raises(NotAuthorised) as error:
                run(_connect(wrong))
            _without(error, "hunter2")
        monkeypatch.setenv("MIST_NATS_USER", "me")
        monkeypatch.setenv("MIST_NATS_PASSWORD", "s3cr:et/x")
        run(works(f"nats://{at}"))

        async def shown() -> str:
            async with mist.connect(f"nats://me:s3cr%3Aet%2Fx@{at}") as broker:
                return f"{broker.url} {broker!r} {broker.options!r}"  # type: ignore[attr-defined]

        assert "s3cr" not in run(shown())


@pytest.mark.usefixtures("_no_environment")
def test_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the URL, a file, or the environment."""
    with run_nats(own_process=True, extra='authorization { token: "t0ken" }\n') as server:
        at = _authority(server.url)
        run(works(f"nats://t0ken@{at}"))
        (tmp_path / "token").write_text("t0ken\n")
        run(works(f"nats://{at}&token_file={tmp_path}/token"))
        with pytest.raises(NotAuthorised):
            run(_connect(f"nats://wrong@{at}"))
        monkeypatch.setenv("MIST_NATS_TOKEN", "t0ken")
        run(works(f"nats://{at}"))


def _pair(kind: int) -> tuple[nkeys.KeyPair, str, str]:
    """A key pair, its public key and its seed."""
    seed = nkeys.encode_seed(os.urandom(32), kind).decode()
    pair = nkeys.from_seed(bytearray(seed.encode()))
    return pair, pair.public_key.decode(), seed


@pytest.mark.usefixtures("_no_environment")
def test_an_nkey(tmp_path: Path) -> None:
    _, public, seed = _pair(nkeys.PREFIX_BYTE_USER)
    _, _, other = _pair(nkeys.PREFIX_BYTE_USER)
    (tmp_path / "me.nk").write_text(seed)
    (tmp_path / "other.nk").write_text(other)
    with run_nats(own_process=True, extra=f"authorization {{ users: [{{ nkey: {public} }}] }}\n") as server:
        run(works(f"{server.url}&nkey={tmp_path}/me.nk"))
        with pytest.raises(NotAuthorised) as error:
            run(_connect(f"{server.url}&nkey={tmp_path}/other.nk"))
        _without(error, other)


def _jwt(claims: dict[str, object], issuer: nkeys.KeyPair) -> str:
    def part(value: bytes) -> str:
        return base64.urlsafe_b64encode(value).rstrip(b"=").decode()

    body = {"jti": secrets.token_hex(16), "iat": int(time.time()), "iss": issuer.public_key.decode(), **claims}
    head = part(json.dumps({"typ": "JWT", "alg": "ed25519-nkey"}).encode())
    text = f"{head}.{part(json.dumps(body).encode())}"
    return f"{text}.{part(issuer.sign(text.encode()))}"


@pytest.mark.usefixtures("_no_environment")
def test_a_creds_file(tmp_path: Path) -> None:
    """A user's JWT and seed, as nsc writes them, on a server that trusts an operator."""
    operator, operator_key, _ = _pair(nkeys.PREFIX_BYTE_OPERATOR)
    account, account_key, _ = _pair(nkeys.PREFIX_BYTE_ACCOUNT)
    _, system_key, _ = _pair(nkeys.PREFIX_BYTE_ACCOUNT)
    _, user_key, user_seed = _pair(nkeys.PREFIX_BYTE_USER)
    no_limit = {
        "subs": -1,
        "data": -1,
        "payload": -1,
        "imports": -1,
        "exports": -1,
        "wildcards": True,
        "conn": -1,
        "leaf": -1,
    }
    js = {"mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1}
    operator_jwt = _jwt(
        {"sub": operator_key, "name": "O", "nats": {"type": "operator", "version": 2, "system_account": system_key}},
        operator,
    )
    account_jwt = _jwt(
        {"sub": account_key, "name": "A", "nats": {"type": "account", "version": 2, "limits": {**no_limit, **js}}},
        operator,
    )
    system_jwt = _jwt(
        {"sub": system_key, "name": "S", "nats": {"type": "account", "version": 2, "limits": no_limit}}, operator
    )
    user_jwt = _jwt(
        {"sub": user_key, "name": "u", "nats": {"type": "user", "version": 2, "subs": -1, "data": -1, "payload": -1}},
        account,
    )
    creds = tmp_path / "u.creds"
    creds.write_text(
        f"-----BEGIN NATS USER JWT-----\n{user_jwt}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{user_seed}\n------END USER NKEY SEED------\n"
    )
    extra = (
        f"operator: {operator_jwt}\nsystem_account: {system_key}\nresolver: MEMORY\n"
        f"resolver_preload {{ {account_key}: {account_jwt}, {system_key}: {system_jwt} }}\n"
    )
    with run_nats(own_process=True, extra=extra) as server:
        run(works(f"{server.url}&creds={creds}"))
        with pytest.raises(NotAuthorised):
            run(_connect(server.url))


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CA and a server's certificate for 127.0.0.1."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs openssl to make a certificate")
    at = tmp_path_factory.mktemp("tls")
    (at / "ext").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
    for argv in (
        ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=ca", "-days", "2",
         "-addext", "keyUsage=critical,keyCertSign,cRLSign"],
        ["req", "-newkey", "rsa:2048", "-nodes", "-keyout", "s.key", "-out", "s.csr", "-subj", "/CN=localhost"],
        ["x509", "-req", "-in", "s.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-out", "s.pem", "-days", "2",
         "-extfile", "ext"],
    ):  # fmt: skip
        subprocess.run([openssl, *argv], cwd=at, check=True, capture_output=True)
    return at


@pytest.mark.usefixtures("_no_environment")
def test_tls(tls: Path) -> None:
    """With the CA it works, with credentials on top; without, it is refused and says that it is TLS."""
    extra = f'tls {{ cert_file: "{tls}/s.pem", key_file: "{tls}/s.key" }}\nauthorization {{ user: u, password: p }}\n'
    with run_nats(own_process=True, extra=extra) as server:
        at = _authority(server.url)
        run(works(f"tls://u:p@{at}&tls_ca={tls}/ca.pem"))
        run(works(f"nats://u:p@{at}&tls_ca={tls}/ca.pem"))
        with pytest.raises(Unavailable, match="TLS"):
            run(_connect(f"tls://u:p@{at}"))


@pytest.mark.parametrize(
    "url",
    [
        "nats://", "nats://a b", "nats://h:99999", "nats://h:0", "nats://h,", "nats://h?sync=maybe", "nats://h?replicas=2",
        "nats://h?replicas=x", "nats://h?monitor=foo", "nats://h?connect_timeout_s=0", "nats://h?wat=1", "nats://h?domain=a.b",
        "nats://h?creds=/nowhere", "tls://h?tls_ca=/nowhere",
    ],
)  # fmt: skip
def test_urls_that_cannot_be_right(url: str) -> None:
    with pytest.raises(InvalidArgument):
        options(parse_url(url), {})


def test_urls_as_options() -> None:
    o = options(parse_url("nats://u:p%40q@h1,h2:5000,[::1]:6000?replicas=3&monitor=8333&name=me"), {})
    assert o.servers == ("nats://h1:4222", "nats://h2:5000", "nats://[::1]:6000")
    assert (o.client["user"], o.client["password"], o.client["name"]) == ("u", "p@q", "me")
    assert (o.replicas, o.monitor, o.connect_timeout_s) == (3, "http://h1:8333", 5.0)
    assert options(parse_url("nats://h"), {"MIST_NATS_TOKEN": "t"}).client["token"] == "t"
    assert "p@q" not in repr(o)
