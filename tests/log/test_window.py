"""The window of ids lately seen: what it knows, forgets and takes back, against a plain model."""

from __future__ import annotations

import random

import pytest

from mist.log.window import Window


def test_a_known_id_has_its_first_sequence() -> None:
    """After a hit every id of the window can be looked up, empty ones never."""
    window = Window(ids_max=100, window_s=10.0)
    assert not window.known(["a", "b"])
    window.stored(1, 0, ["a", "", "b"])
    assert window.known(["c", "b"])
    assert (window.find("a"), window.find("b"), window.find("c"), window.find("")) == (1, 3, 0, 0)


def test_an_id_twice_in_one_batch_is_known() -> None:
    """Duplicates within a batch are found like those of before."""
    assert Window(ids_max=10, window_s=1.0).known(["a", "a"])


def test_what_was_not_stored_is_taken_back() -> None:
    """A refused batch leaves nothing behind."""
    window = Window(ids_max=10, window_s=1.0)
    assert not window.known(["a"])
    window.forget(["a"])
    assert not window.known(["a"])


@pytest.mark.parametrize("seed", range(20))
def test_against_a_model(seed: int) -> None:
    """Whatever is stored, refused, learned, erased and expired, in either of its two shapes: the window knows exactly the ids of
    the blocks that are in it, with their first sequences."""
    rng = random.Random(seed)
    window = Window(ids_max=rng.choice((5, 20, 60)), window_s=0.000_000_05)
    blocks: list[tuple[int, int, list[str]]] = []
    sequence = now = 0
    for _ in range(400):
        now += rng.randint(0, 5)
        window.expire(now)
        while blocks and (sum(len(b[2]) for b in blocks) > window.ids_max or blocks[0][1] < now - window.window_ns):
            blocks.pop(0)
        known: dict[str, int] = {}
        for base, _, ids in blocks:
            for i, id in enumerate(ids):
                if id:
                    known.setdefault(id, base + i)
        pool = [f"new-{rng.randrange(10**9)}" for _ in range(6)]
        if known and rng.random() < 0.3:
            pool += rng.sample(sorted(known), min(2, len(known)))
        ids = rng.sample(pool, rng.randint(1, min(4, len(pool))))
        hit = window.known(ids)
        assert hit == any(i in known for i in ids)
        if hit:
            assert [window.find(i) for i in ids] == [known.get(i, 0) for i in ids]
            continue
        what = rng.random()
        if what < 0.2:
            window.forget(ids)
            continue
        stored = [*ids, ""] if rng.random() < 0.3 else ids
        window.stored(sequence + 1, now, stored)
        blocks.append((sequence + 1, now, stored))
        sequence += len(stored)
        if rng.random() < 0.2:
            gone = sorted(rng.sample(range(1, sequence + 3), min(3, sequence)))
            window.drop(gone)
            blocks = [
                (base, at, ["" if base + i in gone else id for i, id in enumerate(ids)]) for base, at, ids in blocks
            ]
        if rng.random() < 0.1:
            window.clear()
            for block in blocks:
                window.learn(*block)
