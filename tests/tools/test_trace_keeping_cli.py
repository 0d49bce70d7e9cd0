"""The verbs that look over a store as a whole or change it, the ways out of it, and the tool's own console script."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import msgspec
import pytest

from mist.cli import tokentrace
from mist.cli._script import served
from mist.tools.tokentrace.store import Store

from .shell import Shell, publish
from .spanning import message

NS = 1_700_000_000 * 10**9


def filled(shell: Shell) -> None:
    """Six spans of two models, one failed, in the stream and the store."""
    messages = [
        message(n, trace_id=f"{n % 2:032x}", status="error" if n == 6 else "ok",
                attrs={"model": "a" if n < 5 else "b", "tokens_in": 1000, "tokens_out": 10, "user.id": f"u{n % 3}"})
        for n in range(1, 7)
    ]  # fmt: skip
    publish(shell, *messages)
    assert shell("trace", "worker", "--until-end").code == 0


def test_metrics_in_groups_and_over_time(shell: Shell) -> None:
    """Table, CSV and JSON; filters; what cannot be grouped by is refused."""
    filled(shell)
    found = shell("trace", "metrics", "--by", "model", "-j").json
    assert [(m["group"], m["spans"], m["errors"]) for m in found] == [({"model": "a"}, 4, 0), ({"model": "b"}, 2, 1)]
    rows = list(csv.DictReader(io.StringIO(shell("trace", "metrics", "--by", "user", "--model", "a", "-o", "csv").out)))
    assert [(r["user"], r["spans"]) for r in rows] == [("u1", "2"), ("u0", "1"), ("u2", "1")]
    (day,) = shell("trace", "metrics", "--bucket", "day", "-j").json
    assert (day["at"], day["spans"]) == (NS // 10**9 // 86400 * 86400, 6)
    assert "model" in shell("trace", "metrics", "--by", "model").out.splitlines()[0]
    assert shell("trace", "metrics", "--by", "magic").code == 2
    assert shell("trace", "ls", "--attr", "user.id=u0", "-j").json[0]["spans"] == 3


def test_a_rebuilt_store_answers_the_same(shell: Shell, tmp_path: Path) -> None:
    """Byte for byte, also when rows had been damaged by hand; a stream that begins later is refused without --force."""
    filled(shell)
    questions = (("stats", "-j"), ("metrics", "--by", "model", "-j"), ("ls", "-j"), ("export", "-"), ("errors", "-j"))
    before = [shell("trace", *q).out for q in questions]
    with Store.open(tmp_path / "log" / "tools" / "tokentrace.db") as store:
        store._db.execute("DELETE FROM spans WHERE sequence = 2")
        store._db.execute("UPDATE rollups SET spans = 99")
    assert [shell("trace", *q).out for q in questions] != before
    done = shell("trace", "rebuild", "-j")
    assert (done.code, done.json["spans"], done.json["records"]) == (0, 6, 6)
    assert [shell("trace", *q).out for q in questions] == before
    assert shell("stream", "purge", "trace", "--before", "3", "-y").code == 0
    refused = shell("trace", "rebuild")
    assert refused.code == 11
    assert "would be lost" in refused.err
    assert [shell("trace", *q).out for q in questions] == before
    assert shell("trace", "rebuild", "--force", "-j").json["spans"] == 4


PRICES = "[[price]]\nmodel = 'a'\ninput_per_million = {}\noutput_per_million = 0\n"


def test_costs_follow_the_price_table(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the settings at ingest; made again by `reprice`; unknown stays null."""
    table = tmp_path / "prices.toml"
    table.write_text(PRICES.format(1))
    monkeypatch.setenv("MIST_TOKENTRACE__PRICES", str(table))
    filled(shell)

    def costs() -> dict[str, float | None]:
        return {s["model"]: s["cost_usd"] for s in shell("trace", "stats", "-j").json["spans"]}

    assert costs() == {"a": pytest.approx(0.004), "b": None}
    table.write_text(PRICES.format(5))
    assert shell("trace", "reprice", "-j").json["changed"] == 4
    assert costs() == {"a": pytest.approx(0.02), "b": None}
    monkeypatch.delenv("MIST_TOKENTRACE__PRICES")
    assert shell("trace", "reprice").code == 2
    assert shell("trace", "reprice", "--prices", "none.toml").code == 3


def test_old_spans_are_deleted_on_demand(shell: Shell) -> None:
    """A dry run says how many and exits 10; --yes deletes; the totals stay."""
    filled(shell)
    dry = shell("trace", "retain", "--age", "30d", "--dry-run")
    assert (dry.code, "6 spans" in dry.err) == (10, True)
    assert shell("trace", "retain").code == 2
    assert shell("trace", "retain", "--age", "30d", "-y", "-j").json == {"deleted": 6}
    assert shell("trace", "ls", "-j").json == []
    assert shell("trace", "stats", "-j").json["total"] == 6


def test_alerts_are_listed_and_silenced(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From mist.toml; an unknown one is not found."""
    filled(shell)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mist.toml").write_text(
        '[[tokentrace.alerts]]\nname = "slow"\nmetric = "latency_p95"\nop = ">"\nthreshold = 5\nwindow = "5m"\n'
    )
    (alert,) = shell("trace", "alerts", "-j").json
    assert (alert["name"], alert["state"], alert["silenced_until_ns"]) == ("slow", "ok", 0)
    assert shell("trace", "silence", "slow", "2h").code == 0
    assert shell("trace", "alerts", "-j").json[0]["silenced_until_ns"] > 0
    assert "slow" in shell("trace", "alerts").out
    assert shell("trace", "silence", "none", "2h").code == 3


def test_an_export_to_parquet_has_the_columns(shell: Shell, tmp_path: Path) -> None:
    """By the file's name; attrs as JSON text; unknown is null."""
    import pyarrow.parquet

    filled(shell)
    file = str(tmp_path / "spans.parquet")
    assert shell("trace", "export", file, "--model", "b").code == 0
    rows = pyarrow.parquet.read_table(file).to_pylist()
    assert [(r["sequence"], r["model"], r["cost_usd"]) for r in rows] == [(5, "b", None), (6, "b", None)]
    assert json.loads(rows[0]["attrs"])["tokens_in"] == 1000
    assert shell("trace", "export", file).code == 5
    assert shell("trace", "export", "--as", "parquet").code == 2


def test_an_export_as_otlp_is_a_request_a_line(shell: Shell) -> None:
    """OTLP's JSON, with the conventions' names."""
    filled(shell)
    lines = shell("trace", "export", "--as", "otlp").out.splitlines()
    (request,) = [msgspec.json.decode(line) for line in lines]
    spans = [s for r in request["resourceSpans"] for scope in r["scopeSpans"] for s in scope["spans"]]
    assert len(spans) == 6
    keys = {a["key"]: a["value"] for a in spans[0]["attributes"]}
    assert keys["gen_ai.request.model"] == {"stringValue": "a"}


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["version"], 0),
        (["--help"], 0),
        ([], 0),
        (["stats"], 3),
        (["magic"], 2),
        (["--url"], 2),
        (["serve", "--wat"], 2),
    ],
)
def test_the_console_script_has_its_documents_exit_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """0 done, 2 usage, 3 runtime; every error is printed."""
    monkeypatch.setenv("MIST_URL", f"log:{tmp_path}")
    assert tokentrace.main(args) == code
    out, err = capsys.readouterr()
    assert bool(err) is bool(code)
    assert bool(out) is not bool(code)


def test_serve_is_mist_up_with_the_tools_of_the_store() -> None:
    """The seed's --addr is --listen; tools can still be chosen."""
    assert served(["--addr=:1", "-v"], tokentrace.TOOLS, tokentrace.LISTEN) == [
        "--listen=:1", "-v", "--tools", tokentrace.TOOLS, "--usual-listen", tokentrace.LISTEN,
    ]  # fmt: skip
    assert served(["--addr", ":1", "--tools", "door"], "", "")[:4] == ["--listen", ":1", "--tools", "door"]
