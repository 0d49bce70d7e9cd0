"""Recorded answers: the key of a question, and reading answers from files and streams."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import run
from hypothesis import given, settings
from hypothesis import strategies as st

import mist
from mist.errors import InvalidArgument, NotFound
from mist.protocol.codec import encode
from mist.protocol.envelope import Envelope
from mist.protocol.payloads import INFER_REQUEST, INFER_RESPONSE, InferRequest, InferResponse
from mist.protocol.payloads import ChatMessage as WireMessage
from mist.tools.infermux.chat import ChatMessage, ChatRequest, Usage
from mist.tools.infermux.recordings import Recordings, epoch_of, key_of, question_key, read_recordings


def ask(text: str = "2+2?", params: dict[str, Any] | None = None, **fields: Any) -> ChatRequest:
    messages = (ChatMessage(role="user", content=text, **fields),)
    return ChatRequest(model="alias", messages=messages, params=params or {})


def answer(text: str, **fields: Any) -> InferResponse:
    return InferResponse(
        model="m", provider="p", content=text, tokens_in=3, tokens_out=1, cost_usd=0.25, finish_reason="stop", **fields
    )


def test_the_key_is_written_down() -> None:
    """A change of it would orphan every recording there is: these must hold for ever."""
    assert key_of(ask(), "m") == "567d2de863a936f17cf4425c8d668951bf5a78f906e23ee01d8bde7691d8d97c"
    rich = ChatRequest(
        model="x",
        messages=(
            ChatMessage(role="system", content="s"),
            ChatMessage(role="user", content=[{"type": "text", "text": "é"}], name="n"),
            ChatMessage(role="assistant", tool_calls=[{"id": "c", "function": {"name": "f", "arguments": "{}"}}]),
            ChatMessage(role="tool", content="r", tool_call_id="c"),
        ),
        params={"temperature": 0.5, "max_tokens": 10, "stop": ["a"]},
    )
    assert key_of(rich, "m") == "8a8eab0ff407ef545900dc202d78988cded93d64b3769443754c47d039532fdc"


def test_the_key_is_of_what_decides_an_answer() -> None:
    plain = key_of(ask(params={"temperature": 0, "tools": [{"a": 1, "b": 2.0}]}), "m")
    same = [
        ask(params={"tools": [{"b": 2, "a": 1.0}], "temperature": 0.0}),
        ask(params={"temperature": 0, "tools": [{"a": 1, "b": 2}], "stream": True, "stream_options": {}, "user": "u"}),
        ask(
            params={"temperature": 0, "tools": [{"a": 1, "b": 2}], "seed": None, "metadata": {"k": "v"}, "store": True}
        ),
    ]
    assert {key_of(other, "m") for other in same} == {plain}
    others = [
        ask("2+3?", {"temperature": 0, "tools": [{"a": 1, "b": 2}]}),
        ask(params={"temperature": 0.1, "tools": [{"a": 1, "b": 2}]}),
        ask(params={"temperature": 0, "tools": [{"a": 1, "b": 2}], "seed": 1}),
        ask(params={"temperature": False, "tools": [{"a": 1, "b": 2}]}),
        ask(params={"temperature": "0", "tools": [{"a": 1, "b": 2}]}),
        ask("2+2?", {"temperature": 0, "tools": [{"a": 1, "b": 2}]}, name="n"),
    ]
    keys = [plain, key_of(ask(params={"temperature": 0, "tools": [{"a": 1, "b": 2}]}), "m2"), *(key_of(o, "m") for o in others)]  # fmt: skip
    assert len(set(keys)) == len(keys)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(max_size=3), st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=6,
), max_size=4))  # fmt: skip
def test_a_key_survives_the_wire(params: dict[str, Any]) -> None:
    """What went through JSON, in whatever order of keys, is the same question; so is the payload of its envelope."""
    key = key_of(ask(params=params), "m")
    again = json.loads(json.dumps(dict(reversed(params.items()))))
    assert key_of(ask(params=again), "m") == key
    sent = Envelope.new(INFER_REQUEST, InferRequest("m", "", [WireMessage("user", "2+2?")], params), source="s")
    read = sent.decode(InferRequest)
    assert question_key(read.model, read.messages, read.params) == key


def test_several_answers_come_in_order_or_by_epoch() -> None:
    """The nth time it is asked gives the nth answer and then the first; an epoch gives its own, and no other."""
    with Recordings() as recordings:
        key, other = key_of(ask(), "m"), key_of(ask("x"), "m")
        for text in ("a", "b", "c"):
            recordings.add(key, answer(text), id=text)
        recordings.add(key, answer("again"), id="b")  # it was stored twice
        recordings.add(other, answer("z"))
        assert recordings.answers == 4
        assert (recordings.count(key), recordings.count(other), recordings.count("0" * 64)) == (3, 1, 0)
        assert [say(recordings, key) for _ in range(7)] == ["a", "b", "c", "a", "b", "c", "a"]
        assert [say(recordings, other) for _ in range(3)] == ["z", "z", "z"]
        assert [say(recordings, key, epoch) for epoch in (3, 1, 1, 2, 4)] == ["c", "a", "a", "b", None]
        assert say(recordings, key) == "b"  # asking by epoch moves nothing
        assert recordings.find("0" * 64) is None
        with pytest.raises(InvalidArgument, match="64 hex digits"):
            recordings.find("no key")


def say(recordings: Recordings, key: str, epoch: int | None = None) -> str | None:
    reply = recordings.find(key, epoch=epoch)
    return None if reply is None else reply.content


def test_an_epoch_is_read_from_meta() -> None:
    def asked(epoch: str) -> ChatRequest:
        return ChatRequest(model="m", messages=(), meta={"epoch": epoch})

    assert epoch_of(ChatRequest(model="m", messages=())) is None
    assert epoch_of(asked("2")) == 2
    for bad in ("0", "-1", "one", "1.5", "", "9" * 30, "²"):
        with pytest.raises(InvalidArgument, match="no number from 1"):
            epoch_of(asked(bad))


def exchange(text: str, reply: InferResponse, *, id: str, model: str = "m", **asked: Any) -> list[Envelope]:
    payload = InferRequest(model, "", [WireMessage("user", text)], **asked)
    request = Envelope.new(INFER_REQUEST, payload, source="s", id=id)
    return [request, Envelope.new(INFER_RESPONSE, reply, source="infermux", id=f"{id}-a", correlation_id=id)]


def test_an_answer_is_of_the_epoch_its_question_named() -> None:
    """In whatever order they came; where every epoch asks with a seed of its own; of two runs the first counts."""
    with Recordings() as recordings:
        for run_, epochs in (("a", (3, 1, 2)), ("b", (1, 2, 3))):
            for epoch in epochs:
                meta = {"epoch": str(epoch), "run": run_}
                plain = exchange("q", answer(f"{run_}{epoch}"), id=f"{run_}{epoch}", meta=meta)
                key = key_of(ask("q", {"seed": epoch}), "m")
                seeded = exchange("q", answer(f"{run_}{epoch}", request_key=key), id=f"{run_}{epoch}s", meta=meta)
                for envelope in (*plain, *seeded):
                    recordings.take(envelope)
        key = key_of(ask("q"), "m")
        assert [say(recordings, key, epoch) for epoch in (1, 2, 3, 4)] == ["a1", "a2", "a3", None]
        assert [say(recordings, key) for _ in range(6)] == ["a3", "a1", "a2", "b1", "b2", "b3"]
        assert say(recordings, key_of(ask("q", {"seed": 2}), "m"), 2) == "a2"
        assert say(recordings, key_of(ask("q", {"seed": 2}), "m"), 1) is None


def test_answers_are_read_from_a_stream_between_two_positions(tmp_path: Path) -> None:
    """By the key they carry, or by the question they answer; reading from a cursor gives what lies behind it."""
    key = key_of(ask("keyed"), "m")
    tools = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    envelopes = [
        *exchange("first", answer("1"), id="r1"),
        *exchange("auto", answer("2"), id="r2", model="auto"),
        *exchange("first", answer("3"), id="r3"),
        Envelope.new(INFER_RESPONSE, answer("4", request_key=key, tool_calls=tools, request_id="x", answered_by="m-1", tokens_cached=2), source="s", id="r4"),
        Envelope.new(INFER_RESPONSE, answer("?"), source="s", id="r5", correlation_id="nobody"),
        Envelope.new("trace.span", {"any": "thing"}, source="s"),
    ]  # fmt: skip

    async def body() -> None:
        async with mist.connect(f"log:{tmp_path}") as broker:
            async with mist.Client(broker) as client:
                await client.publish("infer", envelopes)
            with await Recordings.from_stream(broker) as all_:
                assert (all_.answers, all_.passed_over) == (4, 1)
                assert [say(all_, key_of(ask("first"), "m"), epoch) for epoch in (1, 2, 3)] == ["1", "3", None]
                assert say(all_, key_of(ask("auto"), "m")) == "2"
                reply = all_.find(key)
                assert reply is not None
                assert (reply.content, reply.model, reply.tool_calls, reply.id) == ("4", "m-1", tools, "x")
                assert reply.usage == Usage(tokens_in=3, tokens_out=1, cached=2)
                assert reply.cost_usd == 0.0
            with await Recordings.from_stream(broker, after=2, to=6) as some:
                assert (some.answers, some.passed_over) == (2, 0)
                assert say(some, key_of(ask("first"), "m")) == "3"
                assert await some.read_stream(broker, after=6) == 9
                assert await some.read_stream(broker, after=6) == 9  # twice is once
                assert (some.answers, some.passed_over) == (3, 2)
            with pytest.raises(NotFound):
                await Recordings.from_stream(broker, "nothing")

    run(body())


def test_answers_are_read_from_a_file(tmp_path: Path) -> None:
    """Envelopes as `mist export` writes them, and lines people write; in any mixture."""
    file = tmp_path / "answers.jsonl"
    line = {
        "model": "m",
        "messages": [{"role": "user", "content": "2+2?"}],
        "params": {"temperature": 0},
        "content": "4",
    }
    lines = [encode(e).decode() for e in exchange("first", answer("1"), id="r1")]
    lines += [
        "",
        json.dumps(line),
        json.dumps({**line, "content": "four", "tokens_out": None, "finish_reason": "length"}),
    ]
    file.write_text("\n".join(lines))
    with Recordings.from_file(file) as recordings:
        assert recordings.answers == 3
        assert say(recordings, key_of(ask("first"), "m")) == "1"
        key = key_of(ask(params={"temperature": 0}), "m")
        assert say(recordings, key, 1) == "4"
        reply = recordings.find(key, epoch=2)
        assert reply is not None
        assert (reply.content, reply.finish_reason, reply.usage.tokens_out) == ("four", "length", None)
        recordings.read_file(file)
        assert recordings.answers == 3


@pytest.mark.parametrize(
    ("line", "match"),
    [
        (b"{", "2: no recorded answer"),
        (b"[1]", "2: no recorded answer"),
        (b'"\xff"', "2: no recorded answer"),
        (b'{"model": "m", "content": "4"}', "2: .*model, messages and content are wanted"),
        (b'{"model": "m", "messages": [{"role": "user", "content": "x"}]}', "2: .*content"),
        (b'{"model": "m", "messages": [{"role": "user", "content": 5}], "content": "x"}', "2: .*messages"),
        (b'{"request_key": "abc", "content": "x"}', "2: .*64 hex digits"),
        (b'{"version": "1", "id": "i", "source": "s", "type": "infer.response", "timestamp_ns": 1, "payload": {"tokens_in": "x"}}', "2: .*tokens_in"),
        (b'{"version": "9", "id": "i", "source": "s", "type": "infer.response", "timestamp_ns": 1, "payload": {}}', "2: .*version"),
    ],
)  # fmt: skip
def test_a_line_that_is_no_answer_is_named(tmp_path: Path, line: bytes, match: str) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_bytes(b"\n" + line + b"\n")
    with pytest.raises(InvalidArgument, match=match):
        Recordings.from_file(file)
    with pytest.raises(NotFound):
        Recordings.from_file(tmp_path / "nothing")
    with pytest.raises(InvalidArgument, match="cannot be read"):
        Recordings.from_file(tmp_path)


def test_a_setting_says_where_they_are(tmp_path: Path) -> None:
    """A file, or a stream from a sequence or a cursor; nothing to answer with is an error. A failure is no answer."""
    url = f"log:{tmp_path / 'log'}"
    file = tmp_path / "a.jsonl"
    failed = InferResponse(model="m", finish_reason="error", error="x", error_code="timeout")
    envelopes = [
        *exchange("q", answer("1"), id="r1"),
        *exchange("q", answer("2"), id="r2"),
        *exchange("q", failed, id="r3"),
    ]
    file.write_bytes(b"\n".join(encode(envelope) for envelope in envelopes))

    async def answers(place: str, cursor: str = "") -> list[str | None]:
        with await read_recordings(place, cursor=cursor) as recordings:
            key = key_of(ask("q"), "m")
            return [say(recordings, key, at + 1) for at in range(recordings.count(key))]

    async def body() -> None:
        async with mist.connect(url) as broker, mist.Client(broker) as client:
            await client.publish("infer", envelopes)
            async with client.replay("infer", name="after-one") as reader:
                async for received in reader:
                    if received.sequence == 3:
                        break
        assert await answers(str(file)) == await answers(f"file:{file}") == await answers(url) == ["1", "2"]
        assert await answers(f"{url}?stream=infer", "2") == await answers(url, "after-one") == ["2"]
        for place, cursor, error, match in (
            (url, "4", NotFound, "holds no recorded answer behind 4"),
            (url, "nobody", NotFound, "no cursor is called 'nobody'"),
            (f"{url}?stream=other", "", NotFound, "other"),
            (str(file), "4", InvalidArgument, "is for a stream"),
            (f"{url}?strean=x", "", InvalidArgument, "strean"),
        ):
            with pytest.raises(error, match=match):
                await read_recordings(place, cursor=cursor)

    run(body())
