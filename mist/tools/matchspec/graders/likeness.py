"""How alike two texts are, as numbers from 0 to 1. Pure; the definitions are those of the papers named.

Tokens: `words` are runs of letters and digits, case folded, everything else left out (ROUGE's); `tokens` are such runs
and each other visible character by itself, as written (BLEU's). Lengths are bounded, because the work grows with their
product: TooLarge above CHARS_MAX characters.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from math import exp, log
from typing import Literal

from mist.errors import TooLarge

CHARS_MAX = 64 * 1024
Smoothing = Literal["exp", "none"]

_WORD = re.compile(r"[^\W_]+")
_TOKEN = re.compile(r"[^\W_]+|[^\s]")


def words(text: str, *, fold: bool = True) -> list[str]:
    text = _bounded(text)
    return _WORD.findall(text.casefold() if fold else text)


def tokens(text: str) -> list[str]:
    return _TOKEN.findall(_bounded(text))


def _bounded(text: str) -> str:
    if len(text) > CHARS_MAX:
        raise TooLarge("text to compare", size_bytes=len(text), size_bytes_max=CHARS_MAX)
    return text


def distance(a: str, b: str) -> int:
    """The fewest insertions, deletions and substitutions of characters that make one the other (Levenshtein 1966).

    Bit-parallel (Myers 1999, in Hyyrö's form of 2003) over Python's integers: one pass over `b`, a column per step.
    """
    _bounded(a), _bounded(b)
    if not a or not b:
        return len(a) or len(b)
    at = _places(a)
    full, top = (1 << len(a)) - 1, 1 << (len(a) - 1)
    up, down, found = full, 0, len(a)
    for c in b:
        match = at.get(c, 0)
        diagonal = (((match & up) + up) ^ up) | match | down
        right, left = down | ~(diagonal | up), up & diagonal
        if right & top:
            found += 1
        elif left & top:
            found -= 1
        right = (right << 1) | 1
        up, down = ((left << 1) | ~(diagonal | right)) & full, right & diagonal & full
    return found


def levenshtein(a: str, b: str) -> float:
    """1 - distance / length of the longer. Two empty texts are alike."""
    longest = max(len(a), len(b))
    return (longest - distance(a, b)) / longest if longest else 1.0


def common(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence (bit-parallel, Hyyrö 2004)."""
    at = _places(a)
    full = (1 << len(a)) - 1
    left = full
    for item in b:
        hit = left & at.get(item, 0)
        left = ((left + hit) | (left - hit)) & full
    return len(a) - left.bit_count()


def _places(a: Iterable[Hashable]) -> dict[Hashable, int]:
    at: dict[Hashable, int] = {}
    for i, item in enumerate(a):
        at[item] = at.get(item, 0) | (1 << i)
    return at


def rouge_l(output: str, expected: str) -> float:
    """ROUGE-L of one sentence (Lin 2004): F1 of the longest common subsequence of words. Not stemmed."""
    a, b = words(output), words(expected)
    if not a or not b:
        return 0.0
    n = common(a, b)
    return 2 * n / (len(a) + len(b))


def bleu(output: str, expected: str, *, order: int = 4, smoothing: Smoothing = "exp") -> float:
    """BLEU of one sentence (Papineni et al. 2002): geometric mean of the clipped n-gram precisions, n up to `order`,
    times the brevity penalty. Orders for which the output has no n-gram are left out (the effective order).

    `smoothing` is for orders from 2 on without a match: `exp` takes half of one match for the first such order, a quarter
    for the next, and so on (as the NIST script does); `none` makes the whole 0. No word in common is 0 either way.
    """
    said, wanted = tokens(output), tokens(expected)
    if not said or not wanted:
        return 0.0
    total, used, halving = 0.0, 0, 1.0
    for n in range(1, order + 1):
        possible = len(said) - n + 1
        if possible < 1:
            break
        ours, theirs = _grams(said, n), _grams(wanted, n)
        hits: float = sum(min(count, theirs[gram]) for gram, count in ours.items())
        if n == 1 and not hits:
            return 0.0
        share = hits / possible
        if smoothing == "exp" and not hits:
            halving *= 2
            share = 1 / (halving * possible)
        if not share:
            return 0.0
        total += log(share)
        used += 1
    brevity = min(0.0, 1 - len(wanted) / len(said))
    return min(1.0, exp(brevity + total / used))


def _grams(items: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(items[i:] for i in range(n)), strict=False))
