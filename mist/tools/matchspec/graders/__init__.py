"""Graders: an output and what was expected to a verdict. A closed set; an unknown name is an error, never a pass.

    text.py        exact, contains, prefix, suffix, choice
    patterns.py    regex
    numeric.py     numeric
    similar.py     levenshtein, rouge_l, bleu, set_overlap
    json.py        is_json, json_schema, json_path
    python.py      python
    judge.py       llm_judge            asks, see hands.py
    similarity.py  semantic_similarity  asks
    traces.py      trace                asks
    budget.py      cost, latency, tokens

docs/reference/graders.md has the settings of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import msgspec
from msgspec.structs import fields

from mist.errors import Internal, InvalidArgument
from mist.tools.matchspec.asking import Ask
from mist.tools.matchspec.graders.base import Base
from mist.tools.matchspec.graders.budget import Cost, Latency, Tokens
from mist.tools.matchspec.graders.hands import Embed, Hands, Trace, equip
from mist.tools.matchspec.graders.json import IsJson, JsonPath, JsonSchema
from mist.tools.matchspec.graders.judge import LlmJudge
from mist.tools.matchspec.graders.numeric import Numeric
from mist.tools.matchspec.graders.patterns import Regex
from mist.tools.matchspec.graders.python import Python
from mist.tools.matchspec.graders.similar import Bleu, Levenshtein, RougeL, SetOverlap
from mist.tools.matchspec.graders.similarity import SemanticSimilarity
from mist.tools.matchspec.graders.text import Choice, Contains, Exact, Prefix, Suffix
from mist.tools.matchspec.graders.traces import Trace as TraceGrader
from mist.tools.matchspec.grading import Asking, Pure

_CLASSES: tuple[type[Base], ...] = (
    Exact, Contains, Prefix, Suffix, Choice, Regex, Numeric, Levenshtein, RougeL, Bleu, SetOverlap, IsJson, JsonSchema,
    JsonPath, Python, SemanticSimilarity, LlmJudge, Cost, Latency, Tokens, TraceGrader,
)  # fmt: skip
_BY_NAME = {c.kind: c for c in _CLASSES}
GRADERS = tuple(_BY_NAME)
ALIASES = {"exact_match": "exact", "model_graded": "llm_judge"}


def kind_of(name: object, where: str = "grader") -> str:
    """The grader's own name. Raises InvalidArgument for a name that is none, with the nearest that is one."""
    if isinstance(name, str):
        kind = ALIASES.get(name, name)
        if kind in _BY_NAME:
            return kind
        near = get_close_matches(name.lower().replace("-", "_"), [*GRADERS, *ALIASES], n=1)
        if near:
            raise InvalidArgument(f"{where}: unknown type {name!r}", hint=f"did you mean {near[0]!r}?")
    raise InvalidArgument(f"{where}: unknown type {name!r}", hint=f"known: {', '.join(GRADERS)}")


def grader_class(kind: str) -> type[Base]:
    """Its fields are the grader's settings."""
    return _BY_NAME[kind]


def settings_of(kind: str) -> list[str]:
    """The keys that a table of this grader may have."""
    return ["type", *(f.encode_name for f in fields(_BY_NAME[kind]))]


def grader(spec: Mapping[str, Any], where: str = "grader") -> Pure | Asking:
    """The grader a table `{type = "numeric", …}` describes. Raises InvalidArgument for an unknown type or key, and for
    settings that cannot be right."""
    kind = kind_of(spec.get("type"), where)
    unknown = sorted(set(spec) - set(settings_of(kind)))
    if unknown:
        near = get_close_matches(unknown[0], settings_of(kind), n=1)
        raise InvalidArgument(
            f"{where} ({kind}): unknown key {unknown[0]!r}",
            hint=f"did you mean {near[0]!r}?" if near else f"known: {', '.join(settings_of(kind))}",
        )
    try:
        made = msgspec.convert({**spec, "type": kind}, _BY_NAME[kind])
    except msgspec.ValidationError as exc:
        raise InvalidArgument(f"{where} ({kind}): {exc}") from exc
    except InvalidArgument as exc:
        raise InvalidArgument(f"{where} ({kind}): {exc.message}", hint=exc.hint) from exc
    if isinstance(made, Pure | Asking):
        return made
    raise Internal(f"{where}: {kind} neither grades nor asks")


__all__ = [
    "GRADERS",
    "Ask",
    "Bleu",
    "Choice",
    "Contains",
    "Cost",
    "Embed",
    "Exact",
    "Hands",
    "IsJson",
    "JsonPath",
    "JsonSchema",
    "Latency",
    "Levenshtein",
    "LlmJudge",
    "Numeric",
    "Prefix",
    "Python",
    "Regex",
    "RougeL",
    "SemanticSimilarity",
    "SetOverlap",
    "Suffix",
    "Tokens",
    "Trace",
    "TraceGrader",
    "equip",
    "grader",
    "grader_class",
    "kind_of",
    "settings_of",
]
