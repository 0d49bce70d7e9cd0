"""Do the links of README, CHANGELOG and docs/ resolve? Relative files and anchors only; never the network.

Prints one line per dead link, `file:line: what`, and ends with 1 if there was one. Links in code blocks and code
spans are text and are not looked at. An anchor is a heading's, made as GitHub makes it, or an `id` in HTML.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

_FENCE = re.compile(r"\s*(```+|~~~+)")
_CODE = re.compile(r"(`+)(?:(?!\1).)+\1")
_INLINE = re.compile(r"\]\(\s*<?([^)\s>]+)>?(?:\s+[\"'(][^)]*)?\)")
_REFERENCE = re.compile(r"^\s{0,3}\[[^\]]+\]:\s*<?([^\s>]+)>?")
_HEADING = re.compile(r"^ {0,3}#{1,6}\s+(.*?)\s*#*\s*$")
_HTML_ID = re.compile(r"<[^>]+\b(?:id|name)=[\"']([^\"']+)[\"']")
_ELSEWHERE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:|//")


def prose(text: str) -> Iterator[tuple[int, str]]:
    """The numbered lines of a document that are not inside a fenced code block."""
    fence = ""
    for number, line in enumerate(text.splitlines(), 1):
        m = _FENCE.match(line)
        if fence:
            if m and m[1].startswith(fence):
                fence = ""
        elif m:
            fence = m[1]
        else:
            yield number, line


def links(text: str) -> Iterator[tuple[int, str]]:
    """The numbered targets of a document's links and images."""
    for number, line in prose(text):
        bare = _CODE.sub("", line)
        for m in (*_INLINE.finditer(bare), *_REFERENCE.finditer(bare)):
            yield number, m[1]


def slug(heading: str) -> str:
    """The anchor GitHub gives to a heading."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(text: str) -> set[str]:
    """Everything in a document that a `#fragment` may name."""
    found: set[str] = set()
    for _, line in prose(text):
        if m := _HEADING.match(line):
            base = name = slug(m[1])
            again = 0
            while name in found:
                again += 1
                name = f"{base}-{again}"
            found.add(name)
        found.update(_HTML_ID.findall(line))
    return found


def dead(root: Path, document: Path) -> Iterator[str]:
    """One line for each link of the document that leads nowhere."""
    text = document.read_text(encoding="utf-8")
    for number, target in links(text):
        if _ELSEWHERE.match(target):
            continue
        where = f"{document.relative_to(root)}:{number}"
        path, _, fragment = unquote(target).partition("#")
        base = root if path.startswith("/") else document.parent
        goal = (base / path.lstrip("/")).resolve() if path else document
        if not goal.is_relative_to(root.resolve()):
            yield f"{where}: {target} leads out of the repository"
        elif not goal.exists():
            yield f"{where}: {target} does not exist"
        elif fragment and goal.suffix == ".md" and fragment not in anchors(goal.read_text(encoding="utf-8")):
            yield f"{where}: {target} names no heading of {goal.name}"


def main(root: Path) -> int:
    documents = sorted([*root.glob("*.md"), *(root / "docs").rglob("*.md")])
    problems = [line for document in documents for line in dead(root, document)]
    for line in problems:
        print(line)
    print(f"{len(documents)} documents, {len(problems)} dead links", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parent.parent))
