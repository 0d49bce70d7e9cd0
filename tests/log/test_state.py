"""Consumers, leases and checkpoints in state.db: what they promise, and what a damaged, full or shared file does to them."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import run

import mist
from mist.broker.base import Checkpoint, ConsumerConfig, Message
from mist.errors import CheckpointRegression, MistError, NotFound, StorageFull, Unavailable
from mist.log.files import REAL
from mist.log.state import Lease, State

BOOT = b"b" * 16
DUE_AT_ONCE = ConsumerConfig(ack_wait_s=0.001)
SLOW = ConsumerConfig()


def opened(folder: Path, boot: bytes = BOOT) -> State:
    return State(REAL, str(folder), boot)


def token(lease: Lease) -> str:
    return f"{lease.root}.{lease.attempt}"


def at(sequence: int, name: str = "c") -> Checkpoint:
    return Checkpoint(stream="s", name=name, incarnation="i", sequence=sequence)


def filled(folder: Path) -> State:
    """A state with a consumer that holds leases of every kind, and checkpoints."""
    state = opened(folder)
    row = state.consumer("s", "i", "worker", SLOW, create=True)
    (first,) = state.take(row.id, SLOW, limit=100, first=1, last=1000)[0]
    state.settle(row.id, {token(first): [2, 5, 7]})
    state.give_back(row.id, {token(first): [10, 20, 30]}, delay_ms=10**9)
    for i in range(60):
        state.save(at(i + 1, f"cursor-{i}"), force=False)
    return state


# -- leases -----------------------------------------------------------------------------------------------------------


def test_whole_and_partial_acks(tmp_path: Path) -> None:
    """A range is one row until part of it is settled; the floor stays below the lowest unsettled record."""
    state = opened(tmp_path)
    row = state.consumer("s", "i", "c", SLOW, create=True)
    (lease,) = state.take(row.id, SLOW, limit=10, first=1, last=10)[0]
    assert state.settle(row.id, {token(lease): [1, 2, 5]}) == 3
    assert state.figures(row.id, 1) == (2, 10, 7, 0)
    assert state.settle(row.id, {token(lease): [1, 2, 5]}) == 0, "settled twice"
    assert state.settle(row.id, {token(lease): [3, 4]}) == 2
    assert state.figures(row.id, 1)[0] == 5
    assert state.settle(row.id, {token(lease): [6, 7, 8, 9, 10]}) == 5
    assert state.figures(row.id, 1) == (10, 10, 0, 0)
    assert state.leases(row.id) == []
    state.close()


def test_given_back_ones_come_again_with_the_next_attempt(tmp_path: Path) -> None:
    """A subset goes back as a row of its own; the others keep their token."""
    state = opened(tmp_path)
    row = state.consumer("s", "i", "c", SLOW, create=True)
    (lease,) = state.take(row.id, SLOW, limit=5, first=1, last=5)[0]
    assert state.give_back(row.id, {token(lease): [2, 4]}, delay_ms=0) == 2
    (again,) = state.take(row.id, SLOW, limit=5, first=1, last=5)[0]
    assert (again.open(), again.attempt) == ([2, 4], 2)
    assert state.settle(row.id, {token(lease): [2, 4]}) == 0, "a stale token"
    assert state.settle(row.id, {token(lease): [1, 3, 5]}) == 3
    assert state.settle(row.id, {token(again): [4, 2]}) == 2
    assert state.figures(row.id, 1)[:3] == (5, 5, 0)
    state.close()


def test_a_lease_larger_than_asked_for_is_split(tmp_path: Path) -> None:
    """The rest stays due; both parts settle."""
    state = opened(tmp_path)
    row = state.consumer("s", "i", "c", DUE_AT_ONCE, create=True)
    state.take(row.id, DUE_AT_ONCE, limit=10, first=1, last=10)
    state.close()
    state = opened(tmp_path, b"2" * 16)
    (part,) = state.take(row.id, SLOW, limit=3, first=1, last=10)[0]
    (rest,) = state.take(row.id, SLOW, limit=100, first=1, last=10)[0]
    assert (part.open(), rest.open()) == ([1, 2, 3], [4, 5, 6, 7, 8, 9, 10])
    assert (part.attempt, rest.attempt) == (2, 2)
    assert state.settle(row.id, {token(part): [1, 2, 3]}) == 3
    assert state.settle(row.id, {token(rest): rest.open()}) == 7
    state.close()


def test_attempts_survive_restarts_and_boots(tmp_path: Path) -> None:
    """Within a boot a deadline stands; after one everything leased is due."""
    state = opened(tmp_path)
    row = state.consumer("s", "i", "c", SLOW, create=True)
    state.take(row.id, SLOW, limit=2, first=1, last=2)
    state.close()
    state = opened(tmp_path)
    assert state.take(row.id, SLOW, limit=2, first=1, last=2)[0] == []
    state.close()
    for boot, attempt in ((b"2" * 16, 2), (b"3" * 16, 3)):
        state = opened(tmp_path, boot)
        (lease,) = state.take(row.id, SLOW, limit=2, first=1, last=2)[0]
        assert lease.attempt == attempt
        state.close()


def test_random_leases_against_a_model(tmp_path: Path) -> None:
    """Two hundred random takes, acks, naks and extensions: every record is open exactly once until it is settled."""
    rng = random.Random(5)
    state = opened(tmp_path)
    row = state.consumer("s", "i", "c", SLOW, create=True)
    held: dict[str, list[int]] = {}
    settled: set[int] = set()
    for _ in range(200):
        what = rng.random()
        if what < 0.4:
            for lease in state.take(row.id, SLOW, limit=rng.randint(1, 20), first=1, last=400)[0]:
                held.setdefault(token(lease), []).extend(lease.open())
        elif held:
            name = rng.choice(sorted(held))
            some = rng.sample(held[name], rng.randint(1, len(held[name])))
            if what < 0.7:
                assert state.settle(row.id, {name: some}) == len(some)
                settled.update(some)
            elif what < 0.9:
                assert state.give_back(row.id, {name: some}, delay_ms=0) == len(some)
            else:
                assert state.extend(row.id, SLOW, {name: some}) == len(some)
                continue
            held[name] = [s for s in held[name] if s not in some]
            if not held[name]:
                del held[name]
        there = [s for lease in state.leases(row.id) for s in lease.open()]
        assert len(set(there)) == len(there)
        floor, delivered, pending, _ = state.figures(row.id, 1)
        assert pending == len(there)
        assert settled.isdisjoint(there)
        assert settled | set(there) == set(range(1, delivered + 1))
        assert floor == min(there, default=delivered + 1) - 1
    state.close()


# -- checkpoints ------------------------------------------------------------------------------------------------------


def test_checkpoints_never_go_back(tmp_path: Path) -> None:
    """Unless forced; and they are there after a restart."""
    state = opened(tmp_path)
    state.save(at(5), force=False)
    state.save(at(5), force=False)
    with pytest.raises(CheckpointRegression):
        state.save(at(4), force=False)
    state.save(at(3), force=True)
    state.close()
    state = opened(tmp_path, b"2" * 16)
    found = state.load("s", "c")
    assert found is not None
    assert found.sequence == 3
    assert state.delete_checkpoint("s", "c")
    assert not state.delete_checkpoint("s", "c")
    state.close()


def test_saved_checkpoints_survive_kill(tmp_path: Path) -> None:
    """What a process was told is saved is there after kill -9, and nothing newer than it tried."""
    program = (
        "import sys\n"
        "from mist.log.state import State\n"
        "from mist.log.files import REAL\n"
        "from mist.broker.base import Checkpoint\n"
        "state = State(REAL, sys.argv[1], b'b' * 16)\n"
        "for n in range(1, 100000):\n"
        "    state.save(Checkpoint(stream='s', name='c', incarnation='i', sequence=n), force=False)\n"
        "    print(n, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= 25:
            process.send_signal(signal.SIGKILL)
            break
    rest = process.stdout.read().split()
    process.wait()
    process.stdout.close()
    told = int(rest[-1]) if rest else 25
    state = opened(tmp_path)
    found = state.load("s", "c")
    assert found is not None
    assert told <= found.sequence <= told + 1
    assert state.warnings == []
    state.close()


# -- damage -----------------------------------------------------------------------------------------------------------


def use(state: State) -> None:
    """Everything one does with it. Raises only ours."""
    state.checkpoints("")
    state.load("s", "cursor-3")
    row = state.consumer("s", "i", "worker", None, create=True)
    state.figures(row.id, 1)
    state.pending(row.id, 10, 1)
    for lease in state.take(row.id, SLOW, limit=5, first=1, last=2000)[0]:
        state.settle(row.id, {token(lease): lease.open()})
    state.save(at(10**9, "cursor-3"), force=True)


@pytest.mark.parametrize(
    "content",
    [b"", b"x" * 100, b"SQLite format 3\0" + b"\xff" * 5000, os.urandom(9000)],
    ids=["empty", "short", "head", "noise"],
)
def test_an_overwritten_file_is_set_aside(tmp_path: Path, content: bytes) -> None:
    """Start-up never needs manual deletion: the damaged file is kept and reported, a new one works at once."""
    filled(tmp_path).close()
    (tmp_path / "state.db").write_bytes(content)
    for name in ("state.db-wal", "state.db-shm"):
        (tmp_path / name).unlink(missing_ok=True)
    state = opened(tmp_path)
    use(state)
    kept = [n for n in os.listdir(tmp_path) if ".damaged-" in n and not n.endswith(("-wal", "-shm"))]
    assert len(kept) == (1 if content else 0), "an empty file is a new database"
    assert len(state.warnings) == len(kept)
    assert all("kept as" in w for w in state.warnings)
    state.close()


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_truncated_file_is_set_aside(tmp_path: Path, share: float) -> None:
    """Pages that are gone are damage, found at the opening."""
    filled(tmp_path).close()
    size = os.path.getsize(tmp_path / "state.db")
    os.truncate(tmp_path / "state.db", int(size * share))
    state = opened(tmp_path)
    use(state)
    assert len(state.warnings) == 1
    state.close()


def test_flipped_bits_are_noticed_or_harmless(tmp_path: Path) -> None:
    """Every call answers or raises one of ours; no checkpoint has a value that was never saved; when it was set aside,
    the next opening is clean. Checkpoints that can still be read are taken over."""
    source = tmp_path / "source"
    source.mkdir()
    filled(source).close()
    whole = (source / "state.db").read_bytes()
    rng = random.Random(11)
    saved = {f"cursor-{i}": i + 1 for i in range(60)}
    aside = taken_over = 0
    for n in range(150):
        folder = tmp_path / str(n)
        folder.mkdir()
        data = bytearray(whole)
        bit = rng.randrange(len(data) * 8) if n % 3 else rng.randrange(8 * 4096)
        data[bit >> 3] ^= 1 << (bit & 7)
        (folder / "state.db").write_bytes(data)
        state = opened(folder)
        try:
            for c in state.checkpoints("s"):
                assert saved.get(c.name, c.sequence) == c.sequence, f"bit {bit}: {c}"
            if state.warnings:
                aside += 1
                taken_over += len(state.checkpoints("s")) > 30
            use(state)
        except MistError:
            state.close()
            state = opened(folder)
        use_or_ours(state)
        state.close()
        state = opened(folder)
        use_or_ours(state)
        state.close()
    assert aside
    assert taken_over, "nothing was saved out of damaged files"


def use_or_ours(state: State) -> None:
    """One damaged checkpoint is refused until its owner overwrites it."""
    with suppress(Unavailable):
        use(state)


def test_damage_while_in_use_is_survived(tmp_path: Path) -> None:
    """The call that meets it fails as Unavailable, the next one works on a new file."""
    state = filled(tmp_path)
    other = sqlite3.connect(tmp_path / "state.db")
    other.execute("pragma wal_checkpoint(truncate)")
    other.close()
    with open(tmp_path / "state.db", "r+b") as f:
        f.seek(4096)
        f.write(b"\xa5" * (os.path.getsize(tmp_path / "state.db") - 4096))
    failed = 0
    for _ in range(3):
        try:
            use(state)
            break
        except Unavailable:
            failed += 1
    use(state)
    assert state.warnings
    state.close()


def test_a_file_set_aside_by_another_process_is_left(tmp_path: Path) -> None:
    """Whoever still has the damaged file open goes on in the new one; his saves are not lost in the old."""
    mine = filled(tmp_path)
    theirs = opened(tmp_path)
    with theirs._locked():
        theirs._quarantine(sqlite3.DatabaseError("for the test"))
        theirs._open()
    mine.save(at(77, "late"), force=False)
    found = theirs.load("s", "late")
    assert found is not None
    assert found.sequence == 77
    mine.close()
    theirs.close()


def test_tokens_of_a_file_that_was_set_aside_fit_nothing(tmp_path: Path) -> None:
    """Numbers start elsewhere in a new file: an old delivery must not settle a new one."""
    state = opened(tmp_path)
    row = state.consumer("s", "i", "c", SLOW, create=True)
    (old,) = state.take(row.id, SLOW, limit=5, first=1, last=5)[0]
    state.close()
    (tmp_path / "state.db").write_bytes(b"x" * 5000)
    state = opened(tmp_path)
    new = state.consumer("s", "i", "c", SLOW, create=True)
    (lease,) = state.take(new.id, SLOW, limit=5, first=1, last=5)[0]
    assert new.id != row.id
    assert lease.id != old.id
    with pytest.raises(NotFound):
        state.settle(row.id, {token(old): [1, 2, 3, 4, 5]})
    assert state.settle(new.id, {token(old): [1, 2, 3, 4, 5]}) == 0
    state.close()


def test_a_full_disk_is_ours_and_leaves_reading(tmp_path: Path) -> None:
    """StorageFull, everything stored stays readable, and deleting makes room (a row may grow, so saving one needs some)."""
    state = filled(tmp_path)
    with state._reading() as db:
        pages = db.execute("pragma page_count").fetchone()[0]
        db.execute(f"pragma max_page_count={pages}")
    with pytest.raises(StorageFull):
        [state.save(at(1, f"more-{i}"), force=False) for i in range(5000)]
    assert len(state.checkpoints("s")) >= 60
    found = state.load("s", "cursor-59")
    assert found is not None
    assert found.sequence == 60
    more = [c.name for c in state.checkpoints("s") if c.name.startswith("more-")]
    assert all(state.delete_checkpoint("s", name) for name in more)
    state.save(at(61, "cursor-59"), force=False)
    found = state.load("s", "cursor-59")
    assert found is not None
    assert found.sequence == 61
    state.close()


def test_a_damaged_state_is_reported_by_the_broker(tmp_path: Path) -> None:
    """Streams are not touched; `info` carries the warning."""

    async def go() -> None:
        async with await mist.connect(f"log:{tmp_path}") as broker:
            stream = await broker.open("s")
            await stream.append([Message("a", b"x")])
            await stream.consumer("c")
        (tmp_path / "state.db").write_bytes(b"rubbish" * 1000)
        async with await mist.connect(f"log:{tmp_path}") as broker:
            stream = await broker.open("s")
            assert len((await stream.read()).records) == 1
            assert await stream.consumers() == []
            consumer = await stream.consumer("c")
            assert [d.record.sequence for d in await consumer.fetch()] == [1]
            info = await stream.info()
            assert any("state.db was damaged" in w for w in info.warnings)

    run(go())
