"""`mist bench` measures on a stream that it makes and removes, on every backend; `--peers` shows what else there is."""

from __future__ import annotations

import pytest

from cli.conftest import Cli
from mist.errors import InvalidArgument

KEYS = ["what", "records_per_s", "megabytes_per_s", "p50_us", "p99_us", "rounds"]


def test_bench_leaves_nothing_behind(cli: Cli, url: str) -> None:
    """Rates of appending, replaying and consuming; the stream is gone afterwards."""
    (row,) = cli.ok("-u", url, "bench", "pub", "-n", "300", "--batch", "100", "--rounds", "2", "-j").json
    assert list(row) == KEYS
    assert row["records_per_s"] > 0
    assert row["rounds"] == 2
    rows = cli.ok("-u", url, "bench", "sub", "-n", "300", "--batch", "100", "--rounds", "1", "-j").json
    assert [r["what"].split(" ")[0] for r in rows] == ["replay", "consume,"]
    latency = cli.ok("-u", url, "bench", "e2e", "-n", "50", "--rate", "1000", "-j").json
    assert all(r["p50_us"] > 0 for r in latency)
    if not url.startswith("memory:"):
        assert cli.ok("-u", url, "stream", "ls", "-j").json == []


def test_peers_run_on_the_same_backend(cli: Cli, url: str) -> None:
    """nats-py beside NATS, redis-py beside Redis, SQLite and a plain file beside the log; they clean up as well."""
    rows = cli.ok("-u", url, "bench", "pub", "-n", "200", "--batch", "100", "--rounds", "1", "--peers", "-j").json
    peers = [r["what"] for r in rows if r["what"].startswith("peer: ")]
    assert peers
    assert all(r["records_per_s"] > 0 for r in rows)
    args = ["-u", url, "bench", "sub", "-n", "200", "--batch", "100", "--rounds", "1", "--peers", "-j"]
    if url.startswith(("log:", "memory:")):
        assert cli(*args).code == 2
        return
    rows = cli.ok(*args).json
    assert rows[-1]["what"].startswith("peer: ")
    assert rows[-1]["records_per_s"] > 0
    assert cli.ok("-u", url, "stream", "ls", "-j").json == []


def test_a_file_cannot_be_measured(cli: Cli) -> None:
    """It needs a broker, and says which URL would do."""
    result = cli("-u", "file:x.jsonl", "bench", "pub")
    assert result.code == InvalidArgument("x").exit_code
    assert "needs a broker" in result.err


@pytest.mark.parametrize("args", [("pub", "-n", "0"), ("sub", "--batch", "0"), ("e2e", "--rate", "0")])
def test_counts_that_cannot_be(cli: Cli, args: tuple[str, ...]) -> None:
    """Refused before anything is made."""
    assert cli("bench", *args).code == 2
