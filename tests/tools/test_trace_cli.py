"""`mist trace` as a person and a script use it, on the embedded log."""

from __future__ import annotations

import csv
import errno
import io
from pathlib import Path

import msgspec
import pytest
from conftest import run

import mist
from mist.broker.base import Message
from mist.cli.trace import _create
from mist.errors import AlreadyExists, StorageFull

from .shell import Shell, publish
from .spanning import message

CALLS = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,374,44\n2023-11-16 18:15:50.99,396,109\n"


@pytest.fixture
def calls(tmp_path: Path) -> str:
    (tmp_path / "calls.csv").write_text(CALLS)
    return str(tmp_path / "calls.csv")


def test_an_ingested_file_can_be_queried_when_the_command_returns(shell: Shell, calls: str) -> None:
    """The documented JSON: total, and one row per model with null for what is unknown; repeating changes nothing."""
    for _ in range(2):
        done = shell("trace", "ingest", calls, "--model", "conv", "-o", "json")
        assert (done.code, done.json["acknowledged"], done.json["refused"]) == (0, 2, 0)
        nothing = dict.fromkeys(("p50", "p90", "p95", "p99"))
        found = shell("trace", "stats", "--format", "json").json
        (row,) = found["spans"]
        assert (found["total"], row["model"], row["count"], row["errors"]) == (2, "conv", 2, 0)
        assert (row["latency_ms"], row["cost_usd"], row["cost_known"]) == (nothing, None, 0)
        for name, (low, high) in {"tokens_in": (374, 396), "tokens_out": (44, 109)}.items():
            expected = {"p50": low, "p90": high, "p95": high, "p99": high}
            assert row[name] == pytest.approx(expected, rel=0.008)


def test_the_store_lies_beside_the_log_unless_said_otherwise(shell: Shell, calls: str, tmp_path: Path) -> None:
    """DIR/tools/tokentrace.db; --store names another, which read verbs take too."""
    assert shell("trace", "ingest", calls).code == 0
    assert (tmp_path / "log" / "tools" / "tokentrace.db").is_file()
    other = str(tmp_path / "other.db")
    assert shell("trace", "worker", "--until-end", "--store", other).code == 0
    assert shell("trace", "stats", "--store", other, "-j").json["total"] == 2


def test_refused_rows_are_named_and_the_exit_code_says_partial(shell: Shell, tmp_path: Path) -> None:
    """9 = partial success; the good rows are there."""
    (tmp_path / "bad.csv").write_text(CALLS + "nonsense,1,2\n")
    done = shell("trace", "ingest", str(tmp_path / "bad.csv"), "-j")
    assert (done.code, done.json["acknowledged"], done.json["refused"]) == (9, 2, 1)
    assert "bad.csv:4: not a time" in done.err


def test_no_wait_publishes_only_and_a_worker_does_the_rest(shell: Shell, calls: str) -> None:
    """The two halves of `ingest`, apart."""
    assert shell("trace", "ingest", calls, "--no-wait").code == 0
    missing = shell("trace", "stats")
    assert missing.code == 3
    assert "mist trace worker --until-end" in missing.err
    work = shell("trace", "worker", "--until-end", "-j")
    assert (work.code, work.json["started_after"], work.json["spans"], work.json["position"]) == (0, 0, 2, 2)
    again = shell("trace", "worker", "--until-end", "-j")
    assert (again.json["started_after"], again.json["records"]) == (2, 0)


def test_read_verbs_create_nothing(shell: Shell, tmp_path: Path) -> None:
    """Not found is 3, and the disk is as it was."""
    for words in (["ls"], ["stats"], ["show", "x"], ["errors"], ["export"], ["tail"], ["worker", "--until-end"]):
        assert shell("trace", *words).code == 3, words
    assert list(tmp_path.iterdir()) == []


def test_a_trace_is_shown_as_a_table_a_tree_and_json(shell: Shell) -> None:
    """One trace of two spans, the child below its parent."""
    publish(
        shell, message(1), message(2, parent_id=f"{1:016x}", operation="tool", status="error", attrs={"error": "boom"})
    )
    assert shell("trace", "worker", "--until-end").code == 0
    trace_id = shell("trace", "ls", "-j").json[0]["trace_id"]
    tree = shell("trace", "show", trace_id[:6], "--tree").out.splitlines()
    assert tree[0] == f"trace {trace_id}"
    assert tree[1].startswith("chat  m1  ok  250 ms  100 → 20 tokens  $0.5")
    assert tree[2].startswith("└─ tool  error")
    shown = shell("trace", "show", trace_id, "-j").json
    assert [s["span_id"] for s in shown["spans"]] == [f"{1:016x}", f"{2:016x}"]
    assert shell("trace", "errors", "-j").json[0]["error"] == "boom"
    assert "boom" in shell("trace", "errors").out
    assert shell("trace", "ls", "--failed", "--model", "m1").code == 0


def test_quarantine_is_listed_with_reasons(shell: Shell) -> None:
    """What is no span is kept and shown."""
    publish(shell, Message("trace.span", b"garbage"), message(1))
    assert shell("trace", "worker", "--until-end", "-j").json["refused"] == 1
    (row,) = shell("trace", "errors", "--quarantined", "-j").json
    assert (row["sequence"], row["data"]) == (1, "garbage")
    assert row["reason"].startswith("malformed: ")


def test_stats_have_a_table_and_flat_csv(shell: Shell) -> None:
    """CSV has one line per model with named percentiles; the table shows - for unknown."""
    publish(shell, message(1), message(2, attrs={}))
    assert shell("trace", "worker", "--until-end").code == 0
    rows = list(csv.DictReader(io.StringIO(shell("trace", "stats", "-o", "csv").out)))
    assert [r["model"] for r in rows] == ["", "m1"]
    assert float(rows[1]["latency_p50_ms"]) == pytest.approx(250, rel=0.008)
    assert float(rows[1]["tokens_in_p90"]) == pytest.approx(100, rel=0.008)
    assert rows[0]["cost_usd"] == ""
    assert shell("trace", "stats").out.splitlines()[1].split()[-1] == "-"


def test_tail_shows_the_last_spans_without_a_store(shell: Shell) -> None:
    """From the stream; garbage is warned about and passed over."""
    publish(shell, *[message(n) for n in range(1, 5)], Message("trace.span", b"garbage"))
    done = shell("trace", "tail", "-n", "3", "-o", "jsonl")
    rows = [msgspec.json.decode(line) for line in done.out.splitlines()]
    assert [r["sequence"] for r in rows] == [3, 4]
    assert rows[0]["attrs"]["model"] == "m1"
    assert "sequence 5: malformed" in done.err
    assert "chat  m1  ok" in shell("trace", "tail").out


def test_an_export_that_cannot_be_finished_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    """Half a file would look like all of it, and the name would be taken."""
    path = tmp_path / "x.jsonl"

    def broken_off(why: BaseException) -> None:
        with _create(path) as file:
            file.write(b"{}")
            raise why

    for why, said in (
        (OSError(errno.ENOSPC, "No space left on device"), StorageFull),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ):
        with pytest.raises(said):
            broken_off(why)
        assert not path.exists()
    path.write_bytes(b"kept")
    with pytest.raises(AlreadyExists):
        broken_off(ValueError())
    assert path.read_bytes() == b"kept"


def test_an_export_goes_back_in(shell: Shell, tmp_path: Path) -> None:
    """JSON lines to a new file, never over an old one; ingested elsewhere they are the same spans."""
    publish(shell, message(1), message(2))
    assert shell("trace", "worker", "--until-end").code == 0
    file = str(tmp_path / "out.jsonl")
    assert shell("trace", "export", file).code == 0
    assert shell("trace", "export", file).code == 5
    assert "no such form" in shell("trace", "export", "calls.csv").err
    other = f"log:{tmp_path / 'other'}"
    assert shell("trace", "ingest", file, url=other).code == 0
    assert shell("trace", "export", url=other).out == Path(file).read_text()


def test_a_stream_made_again_needs_a_word(shell: Shell) -> None:
    """Exit code 5 and the option that goes on."""
    publish(shell, message(1))
    assert shell("trace", "worker", "--until-end").code == 0

    async def again() -> None:
        async with mist.connect(shell.url) as broker:
            await broker.delete("trace")

    run(again())
    publish(shell, message(2))
    refused = shell("trace", "worker", "--until-end")
    assert refused.code == 5
    assert "--restart" in refused.err
    assert shell("trace", "worker", "--until-end", "--restart").code == 0
    assert shell("trace", "stats", "-j").json["total"] == 2


@pytest.mark.parametrize(
    "words",
    [
        ["ingest", "none.csv"],
        ["ingest", "calls.csv", "--column", "nonsense"],
        ["stats", "--since", "yesterday"],
        ["show"],
    ],
)
def test_wrong_use_is_an_error_in_one_line(shell: Shell, calls: str, words: list[str]) -> None:
    """2 or 3, nothing on stdout."""
    assert shell("trace", "ingest", calls).code == 0
    done = shell("trace", *words)
    assert done.code in (2, 3)
    assert done.out == ""
    assert done.err.startswith("error: ")


def test_erase_asks_and_takes_all_of_one_user(shell: Shell) -> None:
    """--dry-run counts, -y does; the store and the stream agree afterwards, and the audit stream tells."""
    attrs = {"model": "m"}
    publish(shell, *[message(n, attrs={**attrs, "user": "u1" if n % 2 else "u2"}) for n in range(1, 7)])
    assert shell("trace", "worker", "--until-end").code == 0
    args = ("trace", "erase", "--user", "u1", "--reason", "ticket 1", "--by", "ops")
    dry = shell(*args, "--dry-run")
    assert dry.code == 10
    assert "3 records" in dry.out + dry.err
    assert shell(*args, "--no-input").code == 11
    done = shell(*args, "-y", "-o", "json")
    assert done.code == 0, done.err
    assert (done.json["records"], done.json["spans"], done.json["behind"]) == (3, 3, False)
    assert shell("trace", "stats", "-o", "json").json["total"] == 3
    assert shell("count", "trace").out.strip() == "3"
    assert shell("count", "audit").out.strip() == "2"
    assert shell("trace", "erase", "--reason", "x", "-y").code == 2
    assert shell("trace", "erase", "--user", "u", "--trace", "t", "--reason", "x", "-y").code == 2
