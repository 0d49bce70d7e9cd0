"""Clients that leave, over either HTTP protocol and at every door: the call ends with them. And spans that go on to another
TokenTrace."""

from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace
from typing import Any, Literal

import httpx
import pytest
from conftest import run

import mist
from mist.cli import _up_tools
from mist.errors import InvalidArgument, Unavailable
from mist.kit.server import AppServer, Site
from mist.protocol.codec import encode
from mist.protocol.envelope import Envelope
from mist.protocol.payloads import ChatMessage, InferRequest
from mist.tools.infermux.api import Api
from mist.tools.infermux.calls import ALL, Calls
from mist.tools.infermux.chat import ChatRequest
from mist.tools.infermux.handler import answered
from mist.tools.infermux.recorder import Recorder
from mist.transport import dial, server

from .fakes import FakeRouter

ASK: Any = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


@pytest.mark.parametrize("http", ["auto", "h11"])
def test_the_call_ends_with_its_client(http: Literal["auto", "h11"]) -> None:
    """Without ASGI and with it, as JSON, as events and as an envelope."""

    async def main() -> None:
        router = FakeRouter()
        router.gate = asyncio.Event()
        calls = Calls(router)  # type: ignore[arg-type]

        async def nothing(envelopes: list[Envelope]) -> list[int]:
            raise InvalidArgument("not here")

        doors = {
            **Api(calls, names=router.names).doors(),
            "/mist": server.ingest(nothing, reply=lambda e, _h: answered(calls, e, ALL, errors=False)),
        }
        asked = Envelope.new("infer.request", InferRequest("m", "", [ChatMessage("user", "x")]), source="me")
        async with (
            AppServer(Site(doors), http=http, close_s=1.0) as listener,
            httpx.AsyncClient(base_url=listener.url, trust_env=False) as client,
        ):
            for path, content in (
                ("/v1/chat/completions", httpx.Request("POST", "/", json=ASK).content),
                ("/v1/chat/completions", httpx.Request("POST", "/", json={**ASK, "stream": True}).content),
                ("/infer", b"{}"),
                ("/mist", encode(asked)),
            ):
                router.reached.clear()
                router.left.clear()
                asking = asyncio.create_task(client.post(path, content=content, timeout=30))
                await router.reached.wait()
                asking.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await asking
                await router.left.wait()
            router.gate.set()
            assert (await client.post("/mist", content=encode(asked))).json()["type"] == "infer.response"
            assert (await client.post("/v1/chat/completions", json=ASK)).status_code == 200
            streamed = await client.post("/v1/chat/completions", json={**ASK, "stream": True})
            assert streamed.text.endswith("data: [DONE]\n\n")
            assert calls.under_way == 0

    run(main())


def test_a_body_that_only_looks_like_a_stream_is_answered_in_one_piece() -> None:
    """`"stream": true` somewhere inside; and a `stream` whose name is written with an escape is refused, not ignored."""

    async def main() -> None:
        router = FakeRouter()
        api = Api(Calls(router), names=router.names)  # type: ignore[arg-type]
        async with (
            AppServer(Site(api.doors()), close_s=1.0) as listener,
            httpx.AsyncClient(base_url=listener.url, trust_env=False) as client,
        ):
            inside = {**ASK, "metadata": {"stream": True}}
            assert (await client.post("/v1/chat/completions", json=inside)).json()["object"] == "chat.completion"
            body = b'{"model":"m","messages":[{"role":"user","content":"x"}],"str\\u0065am":true}'
            assert (await client.post("/v1/chat/completions", content=body)).status_code == 400

    run(main())


def test_spans_go_on_to_another_tokentrace() -> None:
    """Out of the stream, each until it is there: what came while it was away comes later."""

    async def main() -> None:
        stop = asyncio.Event()
        told: list[str] = []
        async with mist.connect("memory:") as broker, await dial("chan:other-tokentrace") as other:
            trace = await broker.open("trace")
            recorder = Recorder(None, trace)
            calls = Calls(FakeRouter(), recorder)  # type: ignore[arg-type]
            for _ in range(3):
                await calls.complete(ChatRequest(model="m", messages=()))
            await recorder.aclose()
            platform: Any = SimpleNamespace(stop=stop, say=told.append, broker=broker)
            tries = 0

            async def forward() -> None:
                nonlocal tries
                tries += 1
                if tries == 1:
                    raise Unavailable("not there yet")
                await _up_tools._forward(platform, trace, "chan:other-tokentrace")

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(_up_tools, "AGAIN_S", 0.0)
                work = asyncio.create_task(_up_tools._away(platform, forward))
                spans = [await other.receive() for _ in range(3)]
                stop.set()
                await work
            assert {s.type for s in spans} == {"trace.span"}
            assert told == ["not there yet; trying again in 0 s"]

    run(main())
