"""Files of calls to envelopes: columns, times, ids that stay the same, and rows that are refused one by one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import run

import mist
from mist.errors import InvalidArgument, NotFound
from mist.protocol.codec import encode
from mist.protocol.envelope import Envelope
from mist.protocol.payloads import TraceSpan
from mist.tools.tokentrace.files import BadRow, envelopes_of, time_ns
from mist.tools.tokentrace.ingest import ingest
from mist.tools.tokentrace.publish import publish
from mist.tools.tokentrace.store import Store

from .spanning import envelope

DATA = Path(os.environ.get("MIST_TEST_DATA") or Path(__file__).resolve().parents[2].parent / "shared" / "data")
AZURE = DATA / "azure_llm_conv_2023.csv"
HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def read(path: Path, **options: Any) -> tuple[list[Envelope], list[BadRow]]:
    found = list(envelopes_of(path, **options))
    return [e for e in found if not isinstance(e, BadRow)], [b for b in found if isinstance(b, BadRow)]


def write(tmp_path: Path, text: str, name: str = "calls.csv") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_an_azure_row_becomes_a_span_with_what_it_knows(tmp_path: Path) -> None:
    """Time and token counts; model from the file's name; no end, so no latency; no cost."""
    path = write(tmp_path, HEADER + "2023-11-16 18:15:46.6805900,374,44\r\n")
    ((env,), bad) = read(path)
    span = env.decode(TraceSpan)
    assert bad == []
    assert span.attrs == {"model": "calls", "tokens_in": 374, "tokens_out": 44}
    assert (span.start_ns, span.end_ns, span.operation) == (1_700_158_546_680_590_000, 0, "chat")
    assert (len(span.trace_id), len(span.span_id), env.id) == (32, 16, span.trace_id)


def test_ids_depend_on_the_bytes_of_the_file_and_the_row_only(tmp_path: Path) -> None:
    """Reading again, under another name or model, gives the same ids; another file gives others; rows differ."""
    text = HEADER + "2023-11-16 18:15:46,1,2\n2023-11-16 18:15:46,1,2\n"
    first = [e.id for e in read(write(tmp_path, text))[0]]
    again = [e.id for e in read(write(tmp_path, text, "other.csv"), model="m")[0]]
    changed = [e.id for e in read(write(tmp_path, text + "\n"))[0]]
    assert first == again
    assert len({*first, *changed}) == 4


def test_columns_are_mapped_by_name_or_by_hand_and_the_rest_is_kept(tmp_path: Path) -> None:
    """Our own names in any case, an explicit mapping, an unknown column as an attribute, an empty cell as unknown."""
    text = "Model,PromptTokens,latency_ms,cost_usd,team,status\ngpt,7,12.5,,blue,error\n,8,,0.25,,\n"
    (one, two), bad = read(write(tmp_path, text), columns={"tokens_in": "PromptTokens"}, model="fallback")
    assert bad == []
    assert one.decode().attrs == {"model": "gpt", "tokens_in": 7, "latency_ms": 12.5, "team": "blue"}
    assert one.decode().status == "error"
    assert two.decode().attrs == {"model": "fallback", "tokens_in": 8, "cost_usd": 0.25}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("yesterday,1,2", "not a time"),
        ("9999-12-31,1,2", "not a time from 1970 to 2262"),
        ("1969-12-31,1,2", "not a time from 1970 to 2262"),
        ("2023-11-16 18:15:46,one,2", "tokens_in is not a whole number"),
        ("2023-11-16 18:15:46,1.5,2", "tokens_in is not a whole number"),
        ("2023-11-16 18:15:46,-1,2", "tokens_in is not a whole number"),
        ("2023-11-16 18:15:46,nan,2", "tokens_in is not a whole number"),
        ("2023-11-16 18:15:46,1", "2 cells where the header has 3"),
        ("2023-11-16 18:15:46,1,2,3", "4 cells where the header has 3"),
    ],
)
def test_a_bad_row_is_reported_with_its_line_and_the_next_is_read(tmp_path: Path, row: str, reason: str) -> None:
    """One bad row costs one row."""
    good = "2023-11-16 18:15:46,1,2\n"
    envs, bad = read(write(tmp_path, HEADER + good + row + "\n" + good))
    assert len(envs) == 2
    assert [b.line for b in bad] == [3]
    assert reason in bad[0].reason


def test_bytes_that_are_not_utf8_cost_their_row(tmp_path: Path) -> None:
    """A file in another encoding is not read wrongly and does not stop."""
    path = tmp_path / "calls.csv"
    path.write_bytes(b"model,tokens_in\nna\xefve,1\nok,2\n")
    envs, bad = read(path)
    assert [e.decode().attrs["model"] for e in envs] == ["ok"]
    assert [b.line for b in bad] == [2]


@pytest.mark.parametrize(
    ("name", "text", "columns", "hint"),
    [
        ("a.csv", "x,y\n1,2\n", {}, "no column we know"),
        ("a.csv", "", {}, "no column we know"),
        ("a.csv", "ContextTokens,tokens_in\n1,2\n", {}, "two columns mean the same"),
        ("a.csv", HEADER, {"tokens_in": "Nope"}, "no column 'Nope'"),
        ("a.csv", HEADER, {"colour": "TIMESTAMP"}, "not one of ours"),
        ("a.parquet", "x", {}, "cannot tell what this is"),
    ],
)
def test_a_file_that_cannot_be_mapped_is_refused_as_a_whole(
    tmp_path: Path, name: str, text: str, columns: dict[str, str], hint: str
) -> None:
    """Nothing is guessed from a header that says nothing."""
    with pytest.raises(InvalidArgument, match=hint):
        list(envelopes_of(write(tmp_path, text, name), columns=columns))


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    """Its own error, before anything is published."""
    with pytest.raises(NotFound):
        envelopes_of(tmp_path / "none.csv")


def test_json_lines_are_envelopes_spans_or_flat_objects(tmp_path: Path) -> None:
    """Each line on its own terms; whole envelopes keep their ids; garbage is refused by line."""
    lines = [
        encode(envelope(1)),
        b'{"trace_id":"t1","span_id":"s1","start_ns":5,"attrs":{"model":"m","x":[1]}}',
        b"",
        b'{"ContextTokens":3,"Team":"x"}',
        b'{"tokens_in":3,"model":null}',
        b"[1]",
        b"{nope",
        b'{"version":"1","id":"i","source":"s","type":"data.schema","timestamp_ns":1,"payload":{}}',
        b'{"tokens_in":true}',
    ]
    path = tmp_path / "calls.jsonl"
    path.write_bytes(b"\n".join(lines))
    envs, bad = read(path, model="dflt")
    assert envs[0] == envelope(1) or envs[0].id == f"{1:032x}"
    assert (envs[1].decode().trace_id, envs[1].decode().attrs) == ("t1", {"model": "m", "x": [1]})
    assert envs[2].decode().attrs == {"model": "dflt", "tokens_in": 3, "Team": "x"}
    assert envs[3].decode().attrs == {"model": "dflt", "tokens_in": 3}
    assert [b.line for b in bad] == [6, 7, 8, 9]


def test_json_lines_of_the_seeds_documents_are_spans_too(tmp_path: Path) -> None:
    """Their names are ours where ours are absent; `--column` comes first; a null and a time of 0 to the first token are
    unknown."""
    line = (
        '{"trace_id":"t","span_id":"s","parent_span_id":"p","name":"sum","comp_tokens":3,"ttft_ms":0,"error":null,'
        '"started_at":"1970-01-01T00:00:01Z","attributes":{"caller":"jobs"}}\n'
    )
    (env,), bad = read(write(tmp_path, line, "a.jsonl"))
    assert (bad, env.decode(TraceSpan)) == (
        [],
        TraceSpan(
            trace_id="t", span_id="s", parent_id="p", operation="sum", start_ns=10**9,
            attrs={"model": "a", "tokens_out": 3, "caller": "jobs"},
        ),
    )  # fmt: skip
    both = '{"name":"theirs","operation":"ours"}\n'
    (env,), _ = read(write(tmp_path, both, "b.jsonl"))
    assert (env.decode(TraceSpan).operation, env.data()["attrs"]["name"]) == ("ours", "theirs")
    (env,), _ = read(write(tmp_path, '{"name":"m1"}\n', "c.jsonl"), columns={"model": "name"})
    assert (env.data()["attrs"]["model"], env.data()["operation"]) == ("m1", "chat")


@pytest.mark.parametrize(
    ("value", "ns"),
    [
        ("1970-01-01", 0),
        ("1970-01-01T00:00:01Z", 10**9),
        ("1970-01-01 00:00:01.123456789", 1_123_456_789),
        ("1970-01-01T01:00:00.5+01:00", 500_000_000),
        ("1700000000000000001", 1_700_000_000_000_000_001),
        (12, 12),
    ],
)
def test_times_are_read_to_the_nanosecond(value: str | int, ns: int) -> None:
    """No zone means UTC; whole numbers are nanoseconds already."""
    assert time_ns(value) == ns


@pytest.mark.skipif(not AZURE.exists(), reason="the shared data are not here")
def test_all_real_calls_are_ingested_once_however_often(tmp_path: Path) -> None:
    """19,366 calls, published and ingested twice, into a stream that does not remember ids: 19,366 spans."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            forgetful = mist.StreamConfig(dedupe_window_s=0.0)
            stream = await broker.open("trace", config=forgetful)
            with Store.open(tmp_path / "t.db") as store:
                for expected in (19_366, 38_732):
                    done = await publish(stream, envelopes_of(AZURE))
                    assert (done.acknowledged, done.last, done.refused_count) == (19_366, expected, 0)
                    await ingest(broker, stream, store, until=done.last)
                    assert store.count() == 19_366
                sums = store.one("SELECT sum(tokens_in), sum(tokens_out), max(cost_usd), max(latency_ms) FROM spans")
            lines = AZURE.read_text().splitlines()[1:]
            columns = [line.split(",") for line in lines]
            assert sums == (sum(int(c[1]) for c in columns), sum(int(c[2]) for c in columns), None, None)

    run(body())


def test_publish_repeats_what_is_worth_repeating(monkeypatch: pytest.MonkeyPatch) -> None:
    """A transient failure is repeated with the same ids and stored once; a lasting one is raised."""
    from mist.errors import Ambiguous, TooLarge

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            stream = await broker.open("trace")
            append = stream.append
            calls = 0

            async def flaky(messages: Any, **kw: Any) -> list[int]:
                nonlocal calls
                calls += 1
                stored = await append(messages, **kw)
                if calls == 1:
                    raise Ambiguous("the answer was lost")
                return stored

            monkeypatch.setattr(stream, "append", flaky)
            done = await publish(stream, [envelope(n) for n in range(1, 6)], batch=2)
            assert (done.acknowledged, (await stream.info()).records) == (5, 5)

            async def never(messages: Any, **kw: Any) -> list[int]:
                raise TooLarge("x", size_bytes=2, size_bytes_max=1)

            monkeypatch.setattr(stream, "append", never)
            with pytest.raises(TooLarge):
                await publish(stream, [envelope(7)])

    run(body())


def test_what_was_acknowledged_is_told_batch_by_batch() -> None:
    """The callback gets every envelope once with its sequence, after its append; the gate sees the count before it."""

    async def body() -> None:
        seen: list[tuple[str, int]] = []
        gates: list[int] = []

        async def gate(acknowledged: int) -> None:
            gates.append(acknowledged)

        async with mist.connect("memory:") as broker:
            stream = await broker.open("trace")
            await publish(
                stream,
                [envelope(1), BadRow(2, "bad"), envelope(2), envelope(3)],
                batch=2,
                on_acked=lambda envs, sequences: seen.extend((e.id, s) for e, s in zip(envs, sequences, strict=True)),
                gate=gate,
            )
        assert seen == [(f"{n:032x}", n) for n in (1, 2, 3)]
        assert gates == [0, 2]

    run(body())


def test_an_envelope_of_a_file_fits_the_wire() -> None:
    """What is published is canonical JSON that decodes to the span."""
    env = envelope(3)
    assert msgspec.json.decode(encode(env))["payload"]["trace_id"] == env.decode().trace_id
