"""What a judge's reply says, as a score from 0 to 1. Pure. A reply that does not say it plainly has no score: None.

`integer_0_10`, `integer_0_5`, `float_0_1`: the last line that is not empty holds the number and nothing else but a label
before it (`Score: 7`), `/10` or `out of 10` after it, Markdown stars, a full stop.
`choice`: the last line names one of the choices, the same way (`Answer: B`); each choice has its score.
`json`: the reply (or the one JSON fence in it) is an object with `score`, a number from 0 to 1, or `pass`, true or false;
`reason` is kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from mist.tools.matchspec.graders import jsonvalue

Parser = Literal["integer_0_10", "integer_0_5", "float_0_1", "choice", "json"]

_LABEL = r"(?:[^\W\d_][\w ]{0,40}[:=]\s*)?"
_INTEGER = re.compile(_LABEL + r"(\d{1,2})(?:\s*(?:/|out of)\s*(\d{1,2}))?\.?", re.IGNORECASE)
_FLOAT = re.compile(_LABEL + r"(\d(?:\.\d{1,17})?|\.\d{1,17})(?:\s*(?:/|out of)\s*1(?:\.0)?)?\.?", re.IGNORECASE)


def parse(parser: Parser, reply: str, choices: Mapping[str, float]) -> tuple[float, str] | None:
    """(score, reason), or None."""
    if parser == "json":
        return _json(reply)
    lines = [line.strip(" \t*_`#>") for line in reply.splitlines() if line.strip(" \t*_`#>")]
    if not lines:
        return None
    reason = "\n".join(lines[:-1])
    match parser:
        case "integer_0_10":
            score = _integer(lines[-1], 10)
        case "integer_0_5":
            score = _integer(lines[-1], 5)
        case "float_0_1":
            m = _FLOAT.fullmatch(lines[-1])
            score = float(m[1]) if m and 0.0 <= float(m[1]) <= 1.0 else None
        case "choice":
            score = _choice(lines[-1], choices)
    return None if score is None else (score, reason)


def _integer(line: str, top: int) -> float | None:
    m = _INTEGER.fullmatch(line)
    if m is None or int(m[1]) > top or (m[2] and int(m[2]) != top):
        return None
    return int(m[1]) / top


def _choice(line: str, choices: Mapping[str, float]) -> float | None:
    bare = re.sub(_LABEL, "", line, count=1, flags=re.IGNORECASE) if ":" in line or "=" in line else line
    return choices.get(bare.strip(" \t*_`()[].\"'"))


def _json(reply: str) -> tuple[float, str] | None:
    found = jsonvalue.read(jsonvalue.fenced(reply))
    if not isinstance(found, dict):
        return None
    score, passed, reason = found.get("score"), found.get("pass"), found.get("reason", "")
    if isinstance(score, int | float) and not isinstance(score, bool):
        return (float(score), str(reason)) if 0.0 <= score <= 1.0 else None
    if score is None and isinstance(passed, bool):
        return (1.0 if passed else 0.0), str(reason)
    return None
