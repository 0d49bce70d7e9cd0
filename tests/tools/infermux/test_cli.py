"""`mist infer`, the console script `infermux`, and the router in `mist up`."""

from __future__ import annotations

import asyncio
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import pytest
from cli.conftest import records
from conftest import run

import mist
from mist.cli import infermux
from mist.client import Client
from mist.errors import NotFound
from mist.kit.server import AppServer, Site
from mist.protocol.codec import decode, encode
from mist.protocol.envelope import Envelope
from mist.protocol.payloads import ChatMessage, InferRequest, InferResponse
from mist.tools.infermux.api import Api
from mist.tools.infermux.calls import Calls
from mist.tools.infermux.chat import Reply
from mist.tools.infermux.failures import ProviderError
from tools.shell import Shell

from .fakes import FakeRouter

GOLDEN = "hello world, how are you"


@contextmanager
def router(fake: FakeRouter) -> Iterator[str]:
    """The doors over that router in a thread of their own; their address."""
    address: list[str] = []
    up, stop = threading.Event(), asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        api = Api(Calls(fake), names=fake.names)  # type: ignore[arg-type]
        async with AppServer(Site(api.doors()), close_s=1.0) as server:
            address.append(server.url)
            up.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    up.wait()
    try:
        yield address[0]
    finally:
        loops[0].call_soon_threadsafe(stop.set)
        thread.join()


def test_chat_in_this_process(shell: Shell, tmp_path: Path) -> None:
    """The seed's numbers; recorded unless not wanted; a spent budget and an unknown model end with their codes."""
    answer = shell("infer", "chat", GOLDEN)
    assert (answer.code, answer.out) == (0, f"echo: {GOLDEN}\n"), answer.err
    said = shell("infer", "chat", GOLDEN, "-j", "--system", "be brief", "--param", "temperature=0").json
    assert (said["content"], said["tokens_in"], said["tokens_out"]) == (f"echo: {GOLDEN}", 8, 7)
    assert shell("infer", "chat", GOLDEN, "--stream").out == f"echo: {GOLDEN}\n"
    assert [r.subject for r in records(shell.url, "infer")] == ["infer.request", "infer.started", "infer.response"] * 3
    question = decode(records(shell.url, "infer")[3].data).decode(InferRequest)
    assert [m.role for m in question.messages or []] == ["system", "user"]
    assert question.params == {"temperature": 0}
    assert len(records(shell.url, "trace")) == 3
    assert shell("infer", "chat", "x", "--no-record").code == 0
    assert len(records(shell.url, "trace")) == 3
    unknown = shell("infer", "chat", "x", "--model", "zzz")
    assert unknown.code == 3
    assert "zzz" in unknown.err
    assert decode(records(shell.url, "infer")[-1].data).decode(InferResponse).error_code == "not_found"
    assert shell("infer", "chat", "x", "--param", "nonsense").code == 2
    (tmp_path / "mist.toml").write_text(
        '[infermux]\nbudgets = [{ limit_usd = "0.00001", period = "day" }]\n', encoding="utf-8"
    )
    spent = shell("infer", "chat", GOLDEN)
    assert spent.code == 11
    assert "budget" in spent.err


def test_what_a_model_says_does_not_steer_the_terminal(shell: Shell) -> None:
    assert shell("infer", "chat", "\x1b[2Jx\ty\n").out == "echo: \\x1b[2Jx\ty\n\n"
    assert shell("infer", "chat", "\x1b[2Jx", "-o", "raw").out == "echo: \x1b[2Jx\n"


def test_route_and_providers(shell: Shell, tmp_path: Path) -> None:
    """Whom it would ask, by mist.toml, without asking or making anything."""
    (tmp_path / "mist.toml").write_text(
        """
        [infermux]
        aliases = { fast = "m" }
        providers = [
          { name = "one", type = "echo", models = ["m"] },
          { name = "two", type = "echo", models = ["m", "n"], priority = 1, can = { m = ["json"] } },
        ]
        budgets = [{ limit_usd = "1" }]
        """,
        encoding="utf-8",
    )
    found = shell("infer", "route", "fast", "--explain", "-j").json
    assert [(c["provider"], c["model"]) for c in found["candidates"]] == [("one", "m"), ("two", "m")]
    assert shell("infer", "route", "fast").out.splitlines()[1].split()[:2] == ["one", "m"]
    left = shell("infer", "route", "m", "--explain", "--param", 'tools=[{"type":"function"}]')
    assert "left out: two m" in left.err
    assert shell("infer", "route", "zzz").code == 3
    assert [p["name"] for p in shell("infer", "providers", "-j").json] == ["one", "two"]
    assert not (tmp_path / "log").exists()


def test_through_a_router_that_runs(shell: Shell) -> None:
    """The same answers and the same codes as in this process; a stream as it comes."""
    fake = FakeRouter()
    with router(fake) as url:
        assert shell("infer", "chat", "hi", "--server", url).out == "echo: hi\n"
        said = shell("infer", "chat", "hi", "--server", url, "-j").json
        assert (said["content"], said["provider"], said["cost_usd"]) == ("echo: hi", "fake", 0.00013)
        assert shell("infer", "chat", "hi", "--server", url, "--stream").out == "one two three\n"
        streamed = shell("infer", "chat", "hi", "--server", url, "--stream", "-j").json
        assert (streamed["content"], streamed["tokens_in"], streamed["provider"]) == ("one two three", 6, "fake")
        fake.error = ProviderError("rate_limited", "slow down", retry_after_s=3)
        assert shell("infer", "chat", "hi", "--server", url).code == 11
        fake.error = NotFound("no model 'x'", hint="known: m", meta={"model": "x"})
        unknown = shell("infer", "chat", "hi", "--server", url)
        assert (unknown.code, unknown.err.strip()) == (3, f"error: {url}: answered 404: no model 'x'. known: m")
        fake.error = ProviderError("rate_limited", "slow down", retry_after_s=3)
        refused = shell("infer", "chat", "hi", "--server", url, "--stream")
        assert refused.code == 11
        assert "slow down" in refused.err
        assert [p["name"] for p in shell("infer", "providers", "--server", url, "-j").json] == ["fake"]
        assert shell("infer", "status", "--server", url, "-j").json["providers_total"] == 1
    assert shell("infer", "chat", "hi", "--server", url).code == 7
    assert shell("infer", "status", "--server", "ftp://there").code == 2


def test_a_tool_call_is_said(shell: Shell) -> None:
    fake = FakeRouter()
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    fake.reply = lambda _request: Reply(content="", model="m", tool_calls=[call], finish_reason="tool_calls")
    with router(fake) as url:
        assert "it wants to call: f" in shell("infer", "chat", "hi", "--server", url).err


GOOD = "[infermux]\nproviders = [{ name = 'a', type = 'openai', base_url = 'http://x/v1', api_key_env = 'SOME_KEY' }]\n"


@pytest.mark.parametrize(
    ("text", "env", "code"),
    [
        (GOOD, {"SOME_KEY": "sk"}, 0),
        (GOOD, {}, 3),
        (None, {}, 1),
        ("[infermux", {}, 2),
        ("[infermux]\nlisten = 7\n", {}, 3),
        ("[infermux]\nkeys = [{ name = 'k', env = 'NOT_SET' }]\n", {}, 3),
        ("[infermux]\nprices = 'nowhere.toml'\n", {}, 3),
    ],
)
def test_validate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, env: dict[str, str], code: int,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The codes of the seed's documents, and a sentence."""
    file = tmp_path / "router.toml"
    if text is not None:
        file.write_text(text, encoding="utf-8")
    monkeypatch.setenv("MIST_CONFIG", "")  # so that what the command sets is taken back
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert infermux.main(["validate", "--config", str(file)]) == code
    out, err = capsys.readouterr()
    assert bool(err) is bool(code)
    assert bool(out) is not bool(code)


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["version"], 0), (["--help"], 0), ([], 0), (["infer", "--prompt", "hi"], 0), (["infer", "hi", "--model=echo"], 0),
        (["route"], 0), (["infer", "--prompt", "hi", "--model", "zzz"], 3), (["magic"], 2), (["serve", "--wat"], 2),
        (["status", "--server", "http://127.0.0.1:9"], 2), (["validate", "x"], 2),
    ],
)  # fmt: skip
def test_the_console_script_has_its_documents_exit_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """0 done, 2 usage (and for status: no router there), 3 runtime; every error is printed."""
    monkeypatch.chdir(tmp_path)
    assert infermux.main(args) == code
    out, err = capsys.readouterr()
    assert bool(err) is bool(code)
    assert bool(out) is not bool(code)


def test_serve_is_mist_up_with_the_router(monkeypatch: pytest.MonkeyPatch) -> None:
    """The seed's --addr is --listen; the documents' variable is heard, and a flag wins over it."""
    end = ["--tools", "infermux", "--usual-listen", "127.0.0.1:8600"]
    assert infermux._serve(["--addr=:1", "--tokentrace", "http://x"]) == [
        "--listen=:1",
        "--tokentrace",
        "http://x",
        *end,
    ]
    monkeypatch.setenv("INFERMUX_LISTEN", ":2")
    assert infermux._serve(["--listen", ":1"]) == ["--listen", ":2", "--listen", ":1", *end]


def test_the_router_does_not_open_to_the_world_without_keys(shell: Shell, tmp_path: Path) -> None:
    """Named, it refuses; keys or `open` mend it."""
    refused = shell("up", "--tools", "infermux", "--listen", "0.0.0.0:0")
    assert refused.code == 2
    assert "keys" in refused.err


def test_the_three_on_one_broker(spawn: Any, log: str) -> None:
    """An OpenAI client against `mist up`: the answer, the record, the trace in the store, a request of the stream answered, an
    envelope at /mist answered; then the way down."""
    process: subprocess.Popen[bytes] = spawn("up", "-u", log, "--listen", "127.0.0.1:0", "-o", "jsonl")
    assert process.stdout is not None
    found = msgspec.json.decode(process.stdout.readline())
    url = found["v1/chat/completions"].removesuffix("/chat/completions")
    messages: Any = [{"role": "user", "content": GOLDEN}]
    with openai.OpenAI(base_url=url, api_key="any", http_client=openai.DefaultHttpxClient(trust_env=False)) as ai:
        whole = ai.chat.completions.create(model="auto", messages=messages)
        assert whole.choices[0].message.content == f"echo: {GOLDEN}"
        with ai.chat.completions.create(model="echo", messages=messages, stream=True) as stream:
            assert "".join(c.choices[0].delta.content or "" for c in stream) == f"echo: {GOLDEN}"
        with pytest.raises(openai.NotFoundError):
            ai.chat.completions.create(model="zzz", messages=messages)
    asked = Envelope.new("infer.request", InferRequest("echo", "", [ChatMessage("user", "a")]), source="me", id="q-1")
    answer = httpx.post(found["mist"], content=encode(asked), trust_env=False)
    assert (answer.status_code, decode(answer.content).correlation_id) == (200, "q-1")
    queued = Envelope.new("infer.request", InferRequest("echo", "", [ChatMessage("user", "b")]), source="me", id="q-2")

    async def through_the_stream() -> None:
        async with mist.connect(log) as broker, Client(broker) as client:
            await client.publish("infer-requests", queued)
            async for received in client.follow("infer", subjects=("infer.response",)):
                if received.envelope.correlation_id == "q-2":
                    assert received.envelope.decode(InferResponse).content == "echo: b"
                    return

    run(through_the_stream())
    while not (recorded := records(log, "trace")):  # calls do not wait for their record, nor the record for the store
        time.sleep(0.02)
    trace = decode(recorded[0].data).decode().trace_id
    while not (spans := httpx.get(f"{found['traces']}{trace}", trust_env=False).json().get("spans")):
        time.sleep(0.02)
    assert (spans[0]["operation"], spans[0]["model"], spans[0]["cost_usd"]) == (
        "infermux.infer",
        "echo",
        pytest.approx(0.00013),
    )
    process.terminate()
    assert process.wait(30) == 143
    assert process.stderr is not None
    assert (
        "infermux ended: requests 5, under_way 0, recorded 19, unrecorded 0, dropped 0"
        in process.stderr.read().decode()
    )
    kinds = [r.subject for r in records(log, "infer")]
    assert [kinds.count(k) for k in ("infer.request", "infer.started", "infer.response")] == [5, 5, 5]
    assert len(records(log, "trace")) == 5
