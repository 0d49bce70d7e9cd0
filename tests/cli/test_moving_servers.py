"""Moving between real servers: every pair, streams that others made, and a spool whose broker is killed."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import run

from cli.conftest import Cli, content, envelope, fill, message, records
from mist.broker.base import Message
from mist.kit.local import LocalServer
from mist.protocol.url import parse_url
from mist.testing.servers import MissingServer, run_nats, run_redis

MIXED = [
    *[message(envelope(n)) for n in range(1, 300)],
    *[Message("foreign.text", b"tick %d" % (n // 3), "", (("a", "1"), ("a", " 2 "))) for n in range(30)],
    Message("foreign.bytes", bytes(range(256))),
    Message("foreign.bytes", b""),
]


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, str]]:
    """One NATS and one Redis for the module."""
    with ExitStack() as stack:
        try:
            yield {"nats": stack.enter_context(run_nats()).url, "redis": stack.enter_context(run_redis()).url}
        except MissingServer as exc:
            if os.environ.get("CI"):
                raise
            pytest.skip(str(exc))


@pytest.fixture
def urls(servers: dict[str, str], tmp_path: Path) -> dict[str, str]:
    return {"log": f"log:{tmp_path / 'data'}", **servers}


@pytest.fixture
def tag() -> str:
    return secrets.token_hex(4)


def at(url: str, stream: str) -> str:
    return f"{url}{'&' if '?' in url else '?'}stream={stream}"


@pytest.mark.parametrize("source", ["log", "nats", "redis"])
@pytest.mark.parametrize("target", ["log", "nats", "redis"])
def test_every_pair(cli: Cli, urls: dict[str, str], tag: str, source: str, target: str, home: Path) -> None:
    """copy, mirror, replay, relay, export and import give what the source holds, once; again gives what is new."""
    a, b = urls[source], urls[target]
    fill(a, f"a{tag}", MIXED)
    wanted = content(a, f"a{tag}")
    assert wanted == [(m.subject, m.data, m.id, m.headers) for m in MIXED]
    for verb, *options in (["copy"], ["mirror", "--once"]):
        name = f"{verb}{tag}"
        done = cli.ok(verb, at(a, f"a{tag}"), at(b, name), "-j", *options).json
        assert done["stored"] == len(MIXED)
        assert cli.ok(verb, at(a, f"a{tag}"), at(b, name), "-j", *options).json["stored"] == 0
        assert content(b, name) == wanted
    cli.ok("replay", at(a, f"a{tag}"), "--to", at(b, f"replay{tag}"))
    assert content(b, f"replay{tag}") == wanted
    cli.ok("-u", a, "export", f"a{tag}", "x.jsonl")
    cli.ok("-u", b, "import", "x.jsonl", f"import{tag}")
    assert content(b, f"import{tag}") == wanted
    relayed = cli("relay", at(a, f"a{tag}") + "&follow=0", at(b, f"relay{tag}"), "-j")
    assert (relayed.code, relayed.json["relayed"], relayed.json["refused"]) == (9, 299, 32)
    assert [r.id for r in records(b, f"relay{tag}")] == [f"id-{n}" for n in range(1, 300)]


@pytest.mark.parametrize("target", ["log", "nats", "redis"])
def test_a_redis_stream_that_others_made(cli: Cli, urls: dict[str, str], tag: str, target: str) -> None:
    """XADD * with fields of their own: sequences near 2^60 and gaps; as it is shown it is copied, and gone on with."""
    import redis

    client = redis.Redis.from_url(urls["redis"])
    try:
        for n in range(50):
            client.xadd(f"orders{tag}", {"item": f"i{n // 4}", "n": str(n // 4)})
            time.sleep(0.001 if n % 10 == 0 else 0)
        done = cli.ok("copy", at(urls["redis"], f"orders{tag}"), at(urls[target], f"c{tag}"), "-j").json
        assert done["stored"] == 50
        assert int(done["position"]) > 2**59
        client.xadd(f"orders{tag}", {"item": "more"})
        again = cli.ok("copy", at(urls["redis"], f"orders{tag}"), at(urls[target], f"c{tag}"), "-j").json
        assert again["stored"] == 1
    finally:
        client.close()
    assert content(urls[target], f"c{tag}") == content(urls["redis"], f"orders{tag}")


@pytest.mark.parametrize("target", ["log", "nats", "redis"])
def test_a_nats_stream_that_others_made(cli: Cli, urls: dict[str, str], tag: str, target: str) -> None:
    """Subjects and limits of its own, a message deleted in the middle: every record that is there, in order."""
    import nats

    async def make() -> None:
        url = parse_url(urls["nats"])
        client = await nats.connect(f"{url.scheme}:{url.target}")
        js = client.jetstream()
        await js.add_stream(name=f"ORDERS{tag}", subjects=[f"orders{tag}.>"])
        for n in range(50):
            await js.publish(f"orders{tag}.eu.{n % 3}", b"row %d" % (n // 4), headers={"k": str(n)} if n % 2 else None)
        await js.delete_msg(f"ORDERS{tag}", 20)
        await client.close()

    run(make())
    source = at(urls["nats"], f"ORDERS{tag}")
    done = cli.ok("copy", source, at(urls[target], f"c{tag}"), "-j").json
    assert (done["stored"], done["position"]) == (49, 50)
    assert content(urls[target], f"c{tag}") == content(urls["nats"], f"ORDERS{tag}")


_PUBLISHER = """
import asyncio, sys
import mist
from mist.broker.base import Message

async def main(url, count):
    async with mist.connect(url) as broker:
        stream = await broker.open("s")
        for n in range(int(count)):
            await stream.append([Message("a.b", b"%d" % n, f"i{n}")])
            print(n, flush=True)
            await asyncio.sleep(0.002)

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nats", "redis"])
def test_a_spool_outlives_its_broker_and_its_publisher(cli: Cli, tmp_path: Path, kind: str) -> None:
    """The broker is away at the start, then killed and restarted twice, and publishers are killed: all is there, once."""
    with ExitStack() as stack:
        try:
            server = stack.enter_context((run_nats if kind == "nats" else run_redis)(own_process=True))
        except MissingServer as exc:
            if os.environ.get("CI"):
                raise
            pytest.skip(str(exc))
        assert isinstance(server, LocalServer)
        server.stop()
        url = f"spool+{at(server.url, 'x')}&spool={tmp_path / 'spool'}&spool_drain=0"
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        acked = 0
        for life in range(4):
            child = subprocess.Popen(
                [sys.executable, "-c", _PUBLISHER, url, "400"], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            assert child.stdout is not None
            for line in child.stdout:
                acked = max(acked, int(line))
                if int(line) == 60 and life < 3:
                    server.start()
                if int(line) == 200 and life < 3:
                    server.kill()
                    child.kill()
            _, err = child.communicate()
            assert life < 3 or child.returncode == 0, err.decode()
            server.stop()
        assert acked == 399
        assert cli("-u", url, "spool", "flush", "--timeout", "1").code == 6
        server.start()
        cli.ok("-u", url, "spool", "flush", "--timeout", "60")
        assert [r.id for r in records(server.url, "s")] == [f"i{n}" for n in range(400)]
