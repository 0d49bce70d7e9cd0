"""Envelope ids: 16 random bytes as 32 lower-case hex characters.

A pool of urandom is cut into ids: 8 times faster than uuid4 (shared measurement, performance notes). The pool is
dropped in a forked child, which would otherwise hand out its parent's ids again.
"""

from __future__ import annotations

import os
import threading

_POOL_IDS = 1024
_local = threading.local()
_generation = 0


def new_id() -> str:
    """A new id, unique for all practical purposes, also across threads and forks."""
    pool: list[str] = getattr(_local, "pool", None) or _refill()
    if _local.generation != _generation:
        pool = _refill()
    return pool.pop()


def _refill() -> list[str]:
    raw = os.urandom(16 * _POOL_IDS).hex()
    _local.pool = [raw[i : i + 32] for i in range(0, len(raw), 32)]
    _local.generation = _generation
    return _local.pool  # type: ignore[no-any-return]


def _forked() -> None:
    global _generation
    _generation += 1


os.register_at_fork(after_in_child=_forked)
