"""A trace as a tree: pure. Spans whose parent is not in the trace are roots; a cycle is cut where it is met."""

from __future__ import annotations

from collections.abc import Sequence

from mist.tools.tokentrace.queries import StoredSpan


def tree(spans: Sequence[StoredSpan]) -> list[tuple[str, StoredSpan]]:
    """(branch drawing, span) in reading order: parents before children, children by start time."""
    known = {s.span_id for s in spans}
    children: dict[str, list[StoredSpan]] = {}
    roots: list[StoredSpan] = []
    for span in spans:
        if span.parent_id in known and span.parent_id != span.span_id:
            children.setdefault(span.parent_id, []).append(span)
        else:
            roots.append(span)
    out: list[tuple[str, StoredSpan]] = []
    seen: set[str] = set()
    _walk([(root, "", "") for root in roots], children, seen, out)
    rest = [s for s in spans if s.span_id not in seen]
    while rest:  # only cycles are left: enter each at its earliest span
        _walk([(rest[0], "", "")], children, seen, out)
        rest = [s for s in rest if s.span_id not in seen]
    return out


def _walk(
    entries: list[tuple[StoredSpan, str, str]],
    children: dict[str, list[StoredSpan]],
    seen: set[str],
    out: list[tuple[str, StoredSpan]],
) -> None:
    # an explicit stack: a trace may be deeper than Python's
    stack = entries[::-1]
    while stack:
        span, drawn, below = stack.pop()
        if span.span_id in seen:
            continue
        seen.add(span.span_id)
        out.append((drawn, span))
        kids = children.get(span.span_id, [])
        for i, kid in reversed(list(enumerate(kids))):
            last = i == len(kids) - 1
            stack.append((kid, below + ("└─ " if last else "├─ "), below + ("   " if last else "│  ")))


def depths(spans: Sequence[StoredSpan]) -> dict[str, int]:
    """Span id -> how many known parents are above it."""
    return {span.span_id: len(drawn) // 3 for drawn, span in tree(spans)}
