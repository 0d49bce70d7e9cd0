"""The public contract of `log:` over a real directory whose file operations fail."""

from __future__ import annotations

import errno
import random
from pathlib import Path
from typing import Any

import pytest
from conftest import run

from mist.broker.base import Checkpoint, Message, StreamConfig
from mist.errors import Ambiguous, MistError, PartialAppend
from mist.log.broker import LogBroker, connect
from mist.protocol.url import parse_url
from mist.testing.simfiles import SHORT, Faults, FaultyFiles

CONFIG = StreamConfig(segment_bytes=16384, records_max=60, full="drop_oldest")


async def _workload(broker: LogBroker, acked: dict[str, int], maybe: set[str]) -> None:
    """A bit of everything; errors of ours are passed over, others fail the test."""

    async def attempt(call: Any) -> Any:
        try:
            return await call
        except MistError:
            return None

    stream = await attempt(broker.open("s", config=CONFIG))
    for n in range(8):
        if stream is None:
            stream = await attempt(broker.open("s", config=CONFIG))
            continue
        messages = [Message("a.b", b"x" * 700, f"{n}-{i}") for i in range(4)]
        maybe.update(m.id for m in messages)
        try:
            for m, s in zip(messages, await stream.append(messages), strict=True):
                acked[m.id] = s
        except PartialAppend as exc:
            for m, s in zip(messages, exc.sequences, strict=False):
                acked[m.id] = s
        except Ambiguous as exc:
            maybe.update(exc.ids)
        except MistError:
            maybe.difference_update(m.id for m in messages)
        info = await attempt(stream.info())
        await attempt(stream.read(after=info.first - 1 if info else 0))
        consumer = await attempt(stream.consumer("c"))
        if consumer is not None:
            deliveries = await attempt(consumer.fetch(limit=3))
            if deliveries:
                await attempt(consumer.ack(deliveries))
        point = Checkpoint(stream="s", name="p", incarnation=stream.incarnation, sequence=n)
        await attempt(broker.checkpoints.save(point))
        if n == 5 and info is not None:
            await attempt(stream.trim(before=min(info.first + 2, info.last + 1)))
            await attempt(stream.verify())
            await attempt(stream.locate(info.created_ns))
    await attempt(broker.streams())
    await attempt(broker.ping())


def _count(folder: Path, error: int) -> int:
    faults = Faults(error, 0)

    async def go() -> None:
        async with await connect(parse_url(f"log:{folder}"), files=FaultyFiles(faults)) as broker:
            await _workload(broker, {}, set())

    run(go())
    return faults.seen


@pytest.mark.parametrize("forever", [False, True])
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.EROFS, errno.EINTR, SHORT])
def test_only_our_errors_come_out_and_what_was_acknowledged_stays(tmp_path: Path, error: int, forever: bool) -> None:
    """Whichever operation fails: foreign exceptions never cross, and after the fault everything acknowledged is there,
    nothing twice, nothing that was refused for certain."""
    total = _count(tmp_path / "count", error)
    rng = random.Random(error * 2 + forever)
    for k in sorted(rng.sample(range(1, total + 1), min(total, 6))):
        folder = tmp_path / str(k)
        acked: dict[str, int] = {}
        maybe: set[str] = set()

        async def go(folder: Path = folder, k: int = k, acked: dict[str, int] = acked, maybe: set[str] = maybe) -> None:
            faults = Faults(error, k, forever=forever)
            try:
                broker = await connect(parse_url(f"log:{folder}"), files=FaultyFiles(faults))
            except MistError:
                return
            async with broker:
                await _workload(broker, acked, maybe)
                faults.heal()
                stream = await broker.open("s", config=CONFIG)
                for _ in range(2):
                    try:
                        await stream.append([Message("a.b", b"", "last")])
                        break
                    except MistError:
                        continue
                maybe.add("last")
            async with await connect(parse_url(f"log:{folder}")) as again:
                stream = await again.open("s", create=False)
                info = await stream.info()
                records = (await stream.read(after=info.first - 1, limit=1000)).records
                ids = [r.id for r in records]
                assert ids[-1] == "last", "it does not go on"
                assert len(set(ids)) == len(ids)
                assert set(ids) <= maybe
                there = {r.id: r.sequence for r in records}
                for id, sequence in acked.items():
                    assert sequence < info.first or there.get(id) == sequence, f"operation {k}: {id} is lost"
                assert not (await stream.verify()).damage

        run(go())
