"""Deleting streams beside others who open, delete and make them at the same time, and when nothing can be read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import run

import mist
from mist.broker.base import Checkpoint, Message
from mist.errors import DataLoss, NotFound
from mist.log.broker import LogBroker


async def broker(folder: Path) -> LogBroker:
    made = await mist.connect(f"log:{folder}")
    assert isinstance(made, LogBroker)
    return made


def test_late_finisher_does_not_take_the_new_stream_away(tmp_path: Path) -> None:
    """Who saw the mark of a deleted stream and comes back late finds a new one under its name: it stays, with its
    records and its checkpoints."""

    async def go() -> None:
        async with await broker(tmp_path) as first, await broker(tmp_path) as second:
            await (await first.open("s")).append([Message("a", b"old")])
            await first.delete("s")
            new = await first.open("s")
            await new.append([Message("a", b"new")])
            await first.checkpoints.save(Checkpoint(stream="s", name="c", incarnation=new.incarnation, sequence=1))
            await second.thread(second._finish_delete, "s")
            page = await (await second.open("s", create=False)).read()
            assert [r.data for r in page.records] == [b"new"]
            assert await second.checkpoints.load("s", "c") is not None

    run(go())


def test_what_a_dead_deleter_left_is_removed_by_the_next(tmp_path: Path) -> None:
    """Directories moved out of the way and not removed go with the next deletion."""

    async def go() -> None:
        left = tmp_path / "streams" / ".old-x-0"
        async with await broker(tmp_path) as log:
            (left / "quarantine").mkdir(parents=True)
            (left / "quarantine" / "a.torn").write_bytes(b"x")
            (left / "tail").write_bytes(b"x")
            assert await log.streams() == []
            await log.open("s")
            await log.delete("s")
            assert os.listdir(tmp_path / "streams") == []

    run(go())


@pytest.mark.parametrize("how", ["overwritten", "emptied"])
def test_a_stream_of_which_nothing_can_be_read_can_be_deleted(tmp_path: Path, how: str) -> None:
    """It is refused, its neighbours work, deleting moves it out of the way and keeps it, and the name is free again."""

    async def go() -> None:
        async with await broker(tmp_path) as log:
            for name in ("s", "other"):
                await (await log.open(name)).append([Message("a", b"x")])
        folder = tmp_path / "streams" / "s"
        for file in folder.iterdir():
            if how == "emptied":
                file.unlink()
            else:
                file.write_bytes(b"rubbish" * 999)
        async with await broker(tmp_path) as log:
            with pytest.raises((DataLoss, NotFound)):
                await log.open("s")
            assert len((await (await log.open("other")).read()).records) == 1
            await log.delete("s")
            assert await (await log.open("s")).append([Message("a", b"y")]) == [1]
            kept = [n for n in os.listdir(tmp_path / "streams") if n.startswith(".damaged-s-")]
            assert len(kept) == 1
            with pytest.raises(NotFound):
                await log.delete("never")

    run(go())
