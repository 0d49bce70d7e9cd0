"""One handler over every way: embedded, stdio, file, http, and each broker. The same inputs, the same outputs."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from conftest import run
from tool import BAD, DONE, ITEM, item, outputs_of, tool

import mist
from mist.broker.base import Broker, ConsumerConfig, Message
from mist.broker.deadletter import original
from mist.client import Client, Handler, serve
from mist.client.client import to_message
from mist.client.serving import Served
from mist.errors import Conflict, Internal, InvalidArgument, Locked, MistError, Unavailable
from mist.protocol import codec
from mist.protocol.envelope import Envelope
from mist.testing.servers import run_nats, run_redis

TOOL = Path(__file__).with_name("tool.py")
COUNT = 40
NDJSON = {"content-type": "application/x-ndjson"}
Way = Callable[[Handler, list[Envelope], Path], Awaitable[tuple[list[Envelope], Served]]]


def quiet(error: MistError, id: str) -> None:
    """Where failures are told in tests."""


async def embedded(handler: Handler, inputs: list[Envelope], place: Path) -> tuple[list[Envelope], Served]:
    outputs: list[Envelope] = []
    served = Served()
    for request in inputs:
        served.requests += 1
        try:
            outputs += await handler(request)
        except MistError as exc:
            served.failed += 1
            served.error = served.error or exc
    return outputs, served


async def by_file(handler: Handler, inputs: list[Envelope], place: Path) -> tuple[list[Envelope], Served]:
    (place / "in.jsonl").write_bytes(codec.encode_lines(inputs))
    served = await serve(handler, f"file:{place}/in.jsonl", out=f"file:{place}/out.jsonl", report=quiet)
    return codec.decode_lines((place / "out.jsonl").read_bytes()), served


async def by_http(handler: Handler, inputs: list[Envelope], place: Path) -> tuple[list[Envelope], Served]:
    stop, address = asyncio.Event(), asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(serve(handler, "http://127.0.0.1:0", stop=stop, on_ready=address.set_result))
    outputs: list[Envelope] = []
    async with httpx.AsyncClient() as client:
        for request in inputs:
            answer = await client.post(await address, content=codec.encode(request))
            if answer.status_code == 200 and answer.headers["content-type"] == "application/json":
                outputs.append(codec.decode(answer.content))
            elif answer.status_code == 200:
                outputs += codec.decode_lines(answer.content)
            else:
                assert answer.status_code in (202, 400), answer.text
    stop.set()
    served = await serving
    served.error = served.error or (InvalidArgument("") if served.failed else None)
    return outputs, served


async def by_broker(
    handler: Handler, inputs: list[Envelope], url: str, *, stop_after: Callable[[Broker], Awaitable[None]] | None = None
) -> tuple[list[Envelope], Served]:
    mark = "&" if "?" in url else "?"
    async with mist.connect(url) as broker:
        stream = await broker.open("in")
        await stream.append([to_message(e) for e in inputs])
        stop = asyncio.Event()
        config = ConsumerConfig(subjects=(ITEM, f"{ITEM}.>", "health.ping"), ack_wait_s=5.0, attempts_max=3)
        serving = asyncio.create_task(
            serve(handler, f"{url}{mark}stream=in&consumer=tool", out="out", stop=stop, config=config, report=quiet)
        )
        await drained(broker, "in", "tool", serving)
        stop.set()
        served = await serving
        return await outputs_in(broker, "out"), served


async def drained(broker: Broker, stream: str, consumer: str, work: asyncio.Task[Any] | None = None) -> None:
    opened = await broker.open(stream)
    while True:
        if work is not None and work.done():
            await work
        if consumer in await opened.consumers():
            info = await (await opened.consumer(consumer, create=False)).info()
            if info.lag == 0 and info.pending == 0:
                return
        await asyncio.sleep(0.02)


async def outputs_in(broker: Broker, name: str) -> list[Envelope]:
    stream = await broker.open(name)
    out: list[Envelope] = []
    after = 0
    while True:
        page = await stream.read(after=after)
        out += [codec.decode(r.data) for r in page.records]
        after = page.scanned
        if after >= page.last:
            return out


async def over_memory(handler: Handler, inputs: list[Envelope], place: Path) -> tuple[list[Envelope], Served]:
    return await by_broker(handler, inputs, f"memory:{place.name}")


async def over_log(handler: Handler, inputs: list[Envelope], place: Path) -> tuple[list[Envelope], Served]:
    return await by_broker(handler, inputs, f"log:{place}/log")


async def over_nats(handler: Handler, inputs: list[Envelope], place: Path) -> tuple[list[Envelope], Served]:
    with run_nats(own_process=True) as server:
        return await by_broker(handler, inputs, server.url)


async def over_redis(handler: Handler, inputs: list[Envelope], place: Path) -> tuple[list[Envelope], Served]:
    with run_redis(own_process=True) as server:
        return await by_broker(handler, inputs, server.url)


WAYS: list[Way] = [embedded, by_file, by_http, over_memory, over_log, over_nats, over_redis]


def numbers(outputs: Sequence[Envelope]) -> list[tuple[int, int]]:
    return [(o.data()["n"], o.data()["part"]) for o in outputs]


def expected(count: int = COUNT) -> list[tuple[int, int]]:
    return [(n, part) for n in range(count) for part in range(outputs_of(n))]


@pytest.mark.parametrize("many", [False, True], ids=["one", "many"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_every_way_gives_the_same_outputs(way: Way, many: bool, tmp_path: Path) -> None:
    """Inputs with no, one and two outputs, one that fails and a ping: outputs in order, ids and coordinates the same."""
    inputs = [item(n, tenant="acme", traceparent=f"00-{n + 1:032x}-{1:016x}-01") for n in range(COUNT)]
    ping = Envelope.new("health.ping", {"from": "test"}, source="test", id="ping")

    async def case() -> None:
        outputs, served = await way(tool(many=many), [*inputs, ping], tmp_path)
        pong = outputs.pop()
        assert numbers(outputs) == expected()
        assert (pong.type, pong.causation_id, pong.source) == ("health.pong", "ping", "tool")
        assert pong.data()["from"] == "tool"
        assert pong.data()["version"] == "7"
        reference, _ = await embedded(tool(), inputs, tmp_path)
        assert [o.id for o in outputs] == [o.id for o in reference]
        assert len({o.id for o in outputs}) == len(outputs)
        for out in outputs:
            n = out.data()["n"]
            assert (out.type, out.source, out.tenant) == (DONE, "tool", "acme")
            assert (out.correlation_id, out.causation_id) == (f"item-{n}", f"item-{n}")
            assert out.traceparent == inputs[n].traceparent
        assert served.failed == 1
        assert isinstance(served.error, InvalidArgument)

    run(case(), 60)


def pipe(lines: bytes) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, TOOL, "stdio:"], input=lines, capture_output=True, timeout=60, check=False)


def test_stdio_in_a_real_pipe() -> None:
    """Lines in, lines out, the end of the input is exit 0; an error is a line on stderr, the others go on, and the exit
    code is the error's."""
    good = pipe(codec.encode_lines([item(n) for n in range(BAD)]))
    assert (good.returncode, good.stderr) == (0, b"")
    assert numbers(codec.decode_lines(good.stdout)) == expected(BAD)
    bad = pipe(codec.encode_lines([item(n) for n in range(COUNT)]) + b"not an envelope\n")
    assert bad.returncode == InvalidArgument("").exit_code
    assert numbers(codec.decode_lines(bad.stdout)) == expected()
    told = [json.loads(line) for line in bad.stderr.splitlines()]
    assert [t["code"] for t in told] == ["validation", "malformed"]
    assert told[0]["meta"]["id"] == f"item-{BAD}"
    assert told[1]["meta"]["line"] == str(COUNT + 1)


def test_a_reader_that_has_enough_ends_the_pipe() -> None:
    """`tool | head -1`: the broken pipe is a clean end."""
    child = subprocess.Popen([sys.executable, TOOL, "stdio:"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(codec.encode_lines([item(1)]))
    child.stdin.flush()
    assert child.stdout.readline()
    child.stdout.close()
    try:
        child.stdin.write(codec.encode_lines([item(2)] * 1000))
        child.stdin.close()
    except BrokenPipeError:
        pass
    assert child.wait(30) == 0


def test_a_file_run_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    """Killed again and again in the middle, in the end each output is in the file once, in order."""
    inputs = tmp_path / "in.jsonl"
    inputs.write_bytes(codec.encode_lines([item(n) for n in range(1, 400) if n != BAD]))
    argv = [sys.executable, TOOL, f"file:{inputs}", f"file:{tmp_path}/out.jsonl", "0.002"]
    kills = 0
    for pause in (0.2, 0.5, 0.1, 0.3, 0.4):
        child = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
        size = _size(tmp_path / "out.jsonl")
        while child.poll() is None and _size(tmp_path / "out.jsonl") == size:
            time.sleep(0.005)
        time.sleep(pause / 4)
        kills += child.poll() is None
        child.kill()
        child.wait()
    assert kills
    assert subprocess.run(argv, timeout=60, check=False).returncode == 0
    outputs = codec.decode_lines((tmp_path / "out.jsonl").read_bytes())
    assert numbers(outputs) == [(n, p) for n, p in expected(400) if n]


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def test_a_file_run_is_resumed_or_refused(tmp_path: Path) -> None:
    """More input goes on behind the old one; removed outputs are made anew; cut ones, another handler, a second process
    at the same time are refused."""

    async def case() -> None:
        source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        urls: dict[str, Any] = {"url": f"file:{source}", "out": f"file:{out}", "report": quiet}
        source.write_bytes(codec.encode_lines([item(n) for n in range(5)]))
        assert (await serve(tool(), **urls)).requests == 5
        assert (await serve(tool(), **urls)).requests == 0
        with source.open("ab") as more:
            more.write(codec.encode_lines([item(n) for n in range(5, 9)]))
        assert (await serve(tool(), **urls)).requests == 4
        assert numbers(codec.decode_lines(out.read_bytes())) == expected(9)
        with pytest.raises(Conflict, match="another handler"):
            await serve(Handler("other", many=None, one=_nothing), **urls)
        whole = out.read_bytes()
        out.write_bytes(whole[:-10])
        with pytest.raises(Conflict, match="was cut"):
            await serve(tool(), **urls)
        out.unlink()
        assert (await serve(tool(), **urls)).requests == 9
        assert out.read_bytes() != b""
        stop, ready = asyncio.Event(), asyncio.get_running_loop().create_future()
        follow = {**urls, "url": f"file:{source}?follow=1"}
        first = asyncio.create_task(serve(tool(), **follow, stop=stop, on_ready=ready.set_result))
        await ready
        with pytest.raises(Locked):
            await serve(tool(), **urls)
        stop.set()
        await first
        with pytest.raises(InvalidArgument, match="out="):
            await serve(tool(), f"file:{source}")

    run(case())


async def _nothing(request: Envelope) -> None:
    return None


def test_http_answers(tmp_path: Path) -> None:
    """200 with one envelope, several as lines, 202 for none; errors flat with their status; with `out` always 202."""

    async def case() -> None:
        stop, address = asyncio.Event(), asyncio.get_running_loop().create_future()
        serving = asyncio.create_task(serve(tool(), "http://127.0.0.1:0", stop=stop, on_ready=address.set_result))
        async with httpx.AsyncClient() as client:
            url = await address
            one = await client.post(url, content=codec.encode(item(1)))
            assert (one.status_code, one.headers["content-type"]) == (200, "application/json")
            two = await client.post(url, content=codec.encode(item(2)))
            assert (two.status_code, two.headers["content-type"]) == (200, "application/x-ndjson")
            assert len(two.content.splitlines()) == 2
            none = await client.post(url, content=codec.encode(item(0)))
            assert (none.status_code, none.content) == (202, b"")
            several = await client.post(url, content=codec.encode_lines([item(n) for n in range(5)]), headers=NDJSON)
            assert numbers(codec.decode_lines(several.content)) == expected(5)
            bad = await client.post(url, content=codec.encode(item(BAD)))
            assert (bad.status_code, bad.json()["code"]) == (400, "validation")
            among = await client.post(url, content=codec.encode_lines([item(1), item(BAD)]), headers=NDJSON)
            assert (among.status_code, among.json()["meta"]["item"]) == (400, "2")
            other = await client.post(url, content=codec.encode(Envelope.new("eval.run", {}, source="t")))
            assert (other.status_code, other.json()["message"]) == (400, "expected type work.item, got eval.run")
        stop.set()
        await serving

        stop, address = asyncio.Event(), asyncio.get_running_loop().create_future()
        out = f"log:{tmp_path}/log?stream=out"
        serving = asyncio.create_task(
            serve(tool(), "http://127.0.0.1:0", out=out, stop=stop, on_ready=address.set_result)
        )
        async with httpx.AsyncClient() as client:
            for _ in range(2):
                answer = await client.post(await address, content=codec.encode(item(2)))
                assert (answer.status_code, answer.content) == (202, b"")
        stop.set()
        await serving
        async with mist.connect(f"log:{tmp_path}/log") as broker:
            assert numbers(await outputs_in(broker, "out")) == expected(3)[1:]

    run(case())


def test_errors_over_a_broker_become_dead_letters(tmp_path: Path) -> None:
    """What cannot help is dead at once, what may help is tried again; an output nobody could store costs its request only;
    a record that is no envelope is dead too."""
    calls: dict[str, int] = {}

    async def moody(request: Envelope) -> list[Envelope]:
        n = request.decode(dict)["n"]
        calls[request.id] = calls.get(request.id, 0) + 1
        if n == 1:
            raise InvalidArgument("never")
        if n == 2 and calls[request.id] < 3:
            raise Unavailable("not now")
        if n == 3:
            raise ZeroDivisionError("a bug")
        return [Envelope.new("x" * 300 if n == 4 else DONE, {"n": n, "part": 0}, source="moody")]

    async def case() -> None:
        handler = Handler("moody", moody)
        async with mist.connect(f"memory:{tmp_path.name}") as broker:
            stream = await broker.open("in")
            messages = [to_message(item(n)) for n in range(6)]
            await stream.append([*messages, Message(ITEM, b"no envelope", "bad")])
            stop = asyncio.Event()
            told: list[str] = []
            config = ConsumerConfig(attempts_max=3)
            serving = asyncio.create_task(
                serve(
                    handler,
                    f"memory:{tmp_path.name}?stream=in&consumer=c",
                    out="out",
                    stop=stop,
                    config=config,
                    report=lambda error, id: told.append(id),
                )
            )
            await drained(broker, "in", "c", serving)
            stop.set()
            served = await serving
            assert sorted(numbers(await outputs_in(broker, "out"))) == [(0, 0), (2, 0), (5, 0)]
            assert calls["item-1"] == 1
            assert calls["item-2"] == calls["item-3"] == 3
            dead = (await (await broker.open("in--dead")).read()).records
            reasons = sorted(dict(r.headers).get("Mist-Reason", str(r.headers)) for r in dead)
            assert len(dead) == 4
            assert any("ZeroDivisionError" in r for r in reasons)
            assert sorted(told) == ["item-1", "item-3", "item-4"]
            assert served.failed == 4

    run(case())


def test_a_last_word_is_stored_before_the_letter(tmp_path: Path) -> None:
    """Once, whatever happened before: the attempts were used up, the last one was cut off, the word or the outputs were stored
    by a worker that died then. A letter that is sent again gets its outputs."""
    well: list[bool] = []
    calls: dict[str, int] = {}

    async def moody(request: Envelope) -> list[Envelope]:
        calls[request.id] = calls.get(request.id, 0) + 1
        n = request.decode(dict)["n"]
        if n == 1 and not well:
            raise Unavailable("not now")
        if n == 2:
            raise InvalidArgument("never")
        return [Envelope.new(DONE, {"n": n, "part": 0}, source="moody")]

    def sorry(request: Envelope, error: MistError) -> list[Envelope]:
        if request.decode(dict)["n"] == 2:
            raise ZeroDivisionError("a bug costs the word, and not the letter")
        return [Envelope.new("test.sorry", {"error": error.message}, source="moody")]

    handler = Handler("moody", moody, last_word=sorry)

    async def case() -> None:
        async with mist.connect(f"memory:{tmp_path.name}") as broker, Client(broker) as client:
            stream, dead = [await broker.open(name) for name in ("in", "in--dead")]
            await stream.append([to_message(item(n)) for n in range(3, 7)])
            consumer = await stream.consumer("c", ConsumerConfig(attempts_max=2, ack_wait_s=0.05))
            assert len(await consumer.fetch()) == 4  # a worker that dies with them
            await stream.append([to_message(item(n)) for n in (1, 2)])
            gone = Unavailable("attempts used up")
            await client.publish("out", await handler(item(4)))  # that worker stored, and died before it acknowledged
            await client.publish("out", handler.last_words(item(5), gone))  # so did one that had given up

            async def work() -> None:
                stop = asyncio.Event()
                serving = asyncio.create_task(
                    serve(handler, f"memory:{tmp_path.name}?stream=in&consumer=c", out="out", stop=stop, report=quiet)
                )
                await drained(broker, "in", "c", serving)
                stop.set()
                await serving

            await work()
            found = await outputs_in(broker, "out")
            words = [(e.type, e.correlation_id) for e in found]
            assert sorted(words) == [
                *[("test.sorry", f"item-{n}") for n in (1, 3, 5, 6)], (DONE, "item-4"),
            ]  # fmt: skip
            assert (calls["item-1"], "item-3" in calls) == (1, False)  # the last attempt is for the word
            letters = (await dead.read()).records
            assert sorted(codec.decode(r.data).id for r in letters) == [f"item-{n}" for n in (1, 2, 3, 5, 6)]
            assert len({e.id for e in found}) == len(found)

            well.append(True)
            (letter,) = [r for r in letters if codec.decode(r.data).id == "item-1"]
            await stream.append([msgspec.structs.replace(original(letter), id="retry")])  # as `mist dlq retry` does
            await work()
            assert (DONE, "item-1") in [(e.type, e.correlation_id) for e in await outputs_in(broker, "out")]

    run(case())


def test_outputs_are_known_after_the_window(tmp_path: Path) -> None:
    """Stored, not acknowledged, and handled again when the stream has long forgotten the ids: still there once."""

    async def case() -> None:
        async with mist.connect(f"memory:{tmp_path.name}") as broker, Client(broker) as client:
            stream = await broker.open("in")
            out = await broker.open("out", config=mist.StreamConfig(dedupe_ids_max=2))
            await stream.append([to_message(item(n)) for n in range(1, 9)])
            consumer = await stream.consumer("tool", ConsumerConfig(ack_wait_s=0.05))
            for delivery in await consumer.fetch():  # the first worker: it stored, and died before it acknowledged
                await client.publish("out", await tool()(codec.decode(delivery.record.data)))
            before = (await out.info()).last
            stop = asyncio.Event()
            serving = asyncio.create_task(
                serve(tool(), f"memory:{tmp_path.name}?stream=in&consumer=tool", out="out", stop=stop, report=quiet)
            )
            await drained(broker, "in", "tool", serving)
            stop.set()
            await serving
            assert (await out.info()).last == before
            assert numbers(await outputs_in(broker, "out")) == [(n, p) for n, p in expected(9) if n]

    run(case())


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["log", "nats", "redis"])
def test_kill_minus_nine_over_a_broker(backend: str, tmp_path: Path) -> None:
    """Real workers, killed at many instants: every input has its outputs in the stream exactly once."""
    if backend == "log":
        kill_campaign(f"log:{tmp_path}/log")
    else:
        with run_nats(own_process=True) if backend == "nats" else run_redis(own_process=True) as server:
            kill_campaign(server.url)


def kill_campaign(url: str) -> None:
    count = 300
    mark = "&" if "?" in url else "?"
    argv = [sys.executable, TOOL, f"{url}{mark}stream=in&consumer=tool", "out", "0.002"]

    async def prepare() -> None:
        async with mist.connect(url) as broker:
            stream = await broker.open("in")
            await stream.append([to_message(item(n)) for n in range(1, count) if n != BAD])
            await stream.consumer("tool", ConsumerConfig(ack_wait_s=0.5, attempts_max=0))
            await broker.open("out")

    async def grown(than: int, child: subprocess.Popen[bytes]) -> int:
        async with mist.connect(url) as broker:
            out = await broker.open("out")
            while (last := (await out.info()).last) <= than and child.poll() is None:
                await asyncio.sleep(0.005)
            return last

    async def finish() -> None:
        async with mist.connect(url) as broker:
            await drained(broker, "in", "tool")
            found = numbers(await outputs_in(broker, "out"))
            assert sorted(found) == [(n, p) for n, p in expected(count) if n]

    run(prepare())
    last = kills = 0
    for round in range(5):
        child = subprocess.Popen(argv)
        last = run(grown(last, child))
        time.sleep(0.013 * round)
        kills += child.poll() is None
        child.kill()
        child.wait()
    assert kills
    child = subprocess.Popen(argv)
    try:
        run(finish(), 60)
        child.send_signal(signal.SIGTERM)
        assert child.wait(30) == 128 + signal.SIGTERM
    finally:
        child.kill()
        child.wait()


def test_a_handler_says_what_it_cannot_be() -> None:
    """Both shapes, none, no name, one text as types; a wrong number of outcomes is Internal for all of them."""
    with pytest.raises(InvalidArgument):
        Handler("x")
    with pytest.raises(InvalidArgument):
        Handler("", _nothing)
    with pytest.raises(InvalidArgument):
        Handler("x", _nothing, accepts="a.b")

    async def short(requests: list[Envelope]) -> list[list[Envelope]]:
        return []

    async def case() -> None:
        outcomes = await Handler("x", many=short).handle([item(1), item(2)])
        assert [type(o) for o in outcomes] == [Internal, Internal]
        for url in ("log:x?stream=a", "https://host:1", "http://host", "file:a"):
            with pytest.raises(InvalidArgument):
                await serve(tool(), url)

    run(case())
