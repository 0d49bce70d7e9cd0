"""The ids seen lately, for de-duplication: at most `ids_max` of them and `window_s` old, whole blocks at a time.

Two shapes. While nothing repeats, one set: adding a batch and comparing the growth finds duplicates in the batch and in
the window in one pass. After a hit, a map id -> sequence, until a hundred batches came without one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence

_CALM = 100


class Window:
    def __init__(self, *, ids_max: int, window_s: float) -> None:
        self.ids_max = ids_max
        self.window_ns = int(window_s * 1e9)
        self.clear()

    def clear(self) -> None:
        """Forget everything; `upto` says what has to be read again."""
        self.upto = -1
        self._blocks: deque[tuple[int, int, Sequence[str]]] = deque()
        self._count = 0
        self._set: set[str] = set()
        self._map: dict[str, int] | None = None
        self._calm = 0

    def learn(self, base: int, time_ns: int, ids: Sequence[str]) -> None:
        """Take in the ids of a stored block: ids[i] belongs to sequence base + i, empty ones are none."""
        self._blocks.append((base, time_ns, ids))
        self._count += len(ids)
        if self._map is not None:
            for i, id in enumerate(ids):
                if id:
                    self._map.setdefault(id, base + i)
        else:
            self._set.update(ids)

    def stored(self, base: int, time_ns: int, ids: Sequence[str]) -> None:
        """Take in a block of our own, after `known` said False for it."""
        if self._map is not None:
            self.learn(base, time_ns, ids)
        else:
            self._blocks.append((base, time_ns, ids))
            self._count += len(ids)

    def expire(self, now_ns: int) -> None:
        blocks = self._blocks
        oldest = now_ns - self.window_ns
        while blocks and (self._count > self.ids_max or blocks[0][1] < oldest):
            base, _, ids = blocks.popleft()
            self._count -= len(ids)
            if self._map is None:
                self._set.difference_update(ids)
            else:
                for i, id in enumerate(ids):
                    if self._map.get(id) == base + i:
                        del self._map[id]

    def drop(self, sequences: Sequence[int]) -> None:
        """Forget the ids of these sequences (in order); nothing where they are not, or not any more."""
        blocks: deque[tuple[int, int, Sequence[str]]] = deque()
        for base, time_ns, ids in self._blocks:
            low, high = bisect_left(sequences, base), bisect_left(sequences, base + len(ids))
            if low < high:
                ids = list(ids)
                for sequence in sequences[low:high]:
                    id, ids[sequence - base] = ids[sequence - base], ""
                    if self._map is None:
                        self._set.discard(id)
                    elif self._map.get(id) == sequence:
                        del self._map[id]
            blocks.append((base, time_ns, ids))
        self._blocks = blocks

    def known(self, ids: Sequence[str]) -> bool:
        """Whether any of these (non-empty) ids is in the window or comes twice; registers nothing lasting when so.

        When it answers False, the caller stores them and calls `stored` (or `clear`, when storing failed).
        """
        if self._map is not None:
            if self._map.keys().isdisjoint(ids) and len(set(ids)) == len(ids):
                self._calm += 1
                if self._calm > _CALM:
                    self._set, self._map = set(self._map), None
                return False
            self._calm = 0
            return True
        before = len(self._set)
        self._set.update(ids)
        if len(self._set) - before == len(ids):
            return False
        self._map = {}
        self._set = set()
        for base, _, seen in self._blocks:
            for i, id in enumerate(seen):
                if id:
                    self._map.setdefault(id, base + i)
        self._calm = 0
        return True

    def forget(self, ids: Sequence[str]) -> None:
        """Take back what `known` (False) took in, when the caller does not store them."""
        if self._map is None:
            self._set.difference_update(ids)

    def find(self, id: str) -> int:
        """The sequence of an id after `known` said True; 0 when it is not in the window."""
        return self._map.get(id, 0) if self._map is not None else 0
