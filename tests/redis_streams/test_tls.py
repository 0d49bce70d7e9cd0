"""TLS: certificates are checked, a client certificate is shown where asked for.

The servers of the wheels speak no TLS, so a small TLS front passes bytes to one of them; the certificates are made by
the openssl program.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from conftest import run

import mist
from mist.broker.base import Message
from mist.errors import Unavailable
from mist.kit.local import RedisServer


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a CA, a certificate for 127.0.0.1 and one for a client, all signed by it."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl program to make certificates with")
    folder = tmp_path_factory.mktemp("tls")

    def make(*args: str) -> None:
        subprocess.run([openssl, *args], cwd=folder, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    # from Python 3.13 on an authority has to say that it may sign
    usage = ("-addext", "keyUsage=critical,keyCertSign,cRLSign")
    make("req", "-x509", *key, "-days", "2", "-subj", "/CN=test ca", *usage, "-keyout", "ca.key", "-out", "ca.pem")
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1\n")
    for name in ("server", "client"):
        make("req", *key, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        make(
            "x509", "-req", "-days", "2", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
            "-extfile", "names", "-out", f"{name}.pem",
        )  # fmt: skip
    return folder


@contextlib.asynccontextmanager
async def front(server: RedisServer, folder: Path, *, mutual: bool = False) -> AsyncIterator[int]:
    """A port that speaks TLS and passes everything to the server."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(folder / "ca.pem"))
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    if mutual:
        context.verify_mode = ssl.CERT_REQUIRED
    tasks: set[asyncio.Task[None]] = set()

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", server.port)
        await asyncio.gather(pipe(reader, back), pipe(there, writer))

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(serve(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    listening = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=context)
    try:
        yield listening.sockets[0].getsockname()[1]
    finally:
        listening.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def test_tls(shared: RedisServer, certificates: Path) -> None:
    """With the CA it works, large replies and waiting reads included; without it the server is not believed."""

    async def body() -> None:
        async with front(shared, certificates) as port:
            url = f"rediss://127.0.0.1:{port}/0?tls_ca={certificates}/ca.pem"
            async with mist.connect(url) as broker:
                stream = await broker.open("over-tls")
                await stream.append([Message("a", b"x" * 300_000) for _ in range(5)])
                assert [len(r.data) for r in (await stream.read()).records] == [300_000] * 5
                waiting = asyncio.create_task(stream.read(after=5, wait_s=20))
                await asyncio.sleep(0.1)
                await stream.append([Message("a", b"1")])
                assert (await waiting).records[0].data == b"1"
                await broker.delete("over-tls")
            with pytest.raises(Unavailable, match="certificate"):
                await mist.connect(f"rediss://127.0.0.1:{port}/0")
            with pytest.raises(Unavailable):
                await mist.connect(f"rediss://localhost:{port}/0?tls_ca={certificates}/ca.pem")

    run(body())


def test_a_client_certificate(shared: RedisServer, certificates: Path) -> None:
    async def body() -> None:
        async with front(shared, certificates, mutual=True) as port:
            url = f"rediss://127.0.0.1:{port}/0?tls_ca={certificates}/ca.pem"
            key = f"&tls_cert={certificates}/client.pem&tls_key={certificates}/client.key"
            async with mist.connect(url + key) as broker:
                assert await broker.ping() >= 0
            with pytest.raises(Unavailable):
                await mist.connect(url)

    run(body())
