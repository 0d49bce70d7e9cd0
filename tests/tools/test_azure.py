"""The real trace of an LLM service, its worker killed in the middle, on every backend: all there once, and the percentiles
are those of the file."""

from __future__ import annotations

import csv
import math
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cli.conftest import Cli, records

from mist.tools.tokentrace.store import Store

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("MIST_TEST_DATA") or ROOT.parent / "shared" / "data")
FILE = DATA / "azure_llm_conv_2023.csv"
CALLS = {"log": 19_366, "nats": 6000, "redis": 6000}
"""All of the file where that is cheap, its first rows elsewhere: what differs is the broker."""
Spawn = Callable[..., "subprocess.Popen[bytes]"]


@pytest.mark.slow
@pytest.mark.skipif(not FILE.exists(), reason="the shared data are not here")
@pytest.mark.parametrize("backend", CALLS)
def test_all_calls_are_there_once_though_the_worker_was_killed(
    backend: str, log: str, servers: Callable[[str], str], spawn: Spawn, cli: Cli, tmp_path: Path
) -> None:
    """`trace ingest --no-wait` publishes while one `trace worker` stores and is killed (SIGKILL); a second one goes on from
    the store's position. Store, stream and the append-only record of what was applied count the same, and the figures of
    `trace stats` are within 1 % of nearest rank."""
    url = log if backend == "log" else servers(backend)
    calls = CALLS[backend]
    kill_at = calls // 5
    file = tmp_path / FILE.name
    file.write_bytes(b"".join(FILE.read_bytes().splitlines(keepends=True)[: calls + 1]))
    place = tmp_path / "t.db"
    Store.open(place).close()
    publisher = spawn("-u", url, "trace", "ingest", str(file), "--no-wait", "--rate", str(calls * 0.6), "-j")
    work = ("-u", url, "trace", "worker", "--store", str(place), "--page", "500", "-j")
    first = spawn(*work, "--record", "first")
    while stored(place) < kill_at:
        assert first.poll() is None
        time.sleep(0.01)
    first.kill()
    first.wait()
    killed_at = stored(place)
    assert publisher.wait(60) == 0
    second = spawn(*work, "--record", "second", "--until-end")
    assert second.wait(60) == 0

    with Store.read(place) as store:
        assert kill_at <= killed_at < calls
        assert (store.count(), store.count("quarantine"), store.count("gaps")) == (calls, 0, 0)
        applied = dict(store.query("SELECT worker, count(*) FROM applied GROUP BY worker"))
        assert applied == {"first": killed_at, "second": calls - killed_at}
        assert store.one("SELECT count(DISTINCT trace_id || ' ' || span_id) FROM applied") == (calls,)
    assert len({r.id for r in records(url, "trace")}) == len(records(url, "trace")) == calls

    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    ask = ("-u", url, "trace", "stats", "--store", str(place), "-j")
    for question in (ask, (*ask, "--source", "tokentrace.ingest")):  # from the totals, and from the spans themselves
        found = cli.ok(*question).json
        assert found["total"] == calls
        for name, column in (("tokens_in", "ContextTokens"), ("tokens_out", "GeneratedTokens")):
            exact = sorted(int(row[column]) for row in rows)
            for percent in (50, 90, 95, 99):
                assert found["spans"][0][name][f"p{percent}"] == pytest.approx(
                    exact[math.ceil(percent / 100 * calls) - 1], rel=0.01
                )


def stored(place: Path) -> int:
    """How many spans are in the store."""
    with Store.read(place) as store:
        return store.count()
